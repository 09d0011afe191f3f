"""The MoE layer of one token in Triton: matrix-vector products on the ordinary units.

Two launches, *gate_up* and *down*. Nothing has to be sorted, and down sums over the experts in
float32, so nothing has to be combined. The time is that of the weights' bytes if enough of them are
on their way at any moment, so every loop copies many steps ahead into shared memory. (Triton does
that for a loop without tensor core products only where the loop itself names its stages.)

The first programs of each launch shrink, each a part of the columns of a page. The others wait for
them only when their sums are complete; see :mod:`moelora_kernels.waiting` for why that is safe. The
launch of down clears the counters of both.

Rank activations of each part are float32, whatever the dtype of their buffer, and summed in order.

All rows are pairs in the order of the router's choices.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, scalar
from moelora_kernels.buffers import given_or_new, new_buffer
from moelora_kernels.expert_lora.triton import activate
from moelora_kernels.tuning.tiles import GemmTiles
from moelora_kernels.types import PAGE_ROWS, SIGNALS, Buffer, ExpertPages, SitePages
from moelora_kernels.waiting import clear, leave, signal, wait_for


class Tiles(NamedTuple):
    """Tiles of the two launches; stages are for 16 bits a number.

    Attributes:
        gate_up: of the first launch.
        down: of the second one.
        shrink_part: columns of a page that are on their way to a program at once. It has no more of
            them unless there would be more than :data:`MAX_PARTS`.
    """

    gate_up: GemmTiles
    down: GemmTiles
    shrink_part: int


#: Programs of gate_up that an H200 runs at once, six on each processor. Then few steps of each need
#: to be on their way, and the shrink, which begins with look-ups, waits behind fewer of them.
ONE_WAVE = 792
FEW_PROGRAMS = Tiles(GemmTiles(8, 128, 4, 4), GemmTiles(8, 256, 4, 5), shrink_part=512)
MANY_PROGRAMS = Tiles(GemmTiles(8, 256, 4, 5), GemmTiles(8, 256, 4, 7), shrink_part=1024)
#: Columns of a page that a warp of a shrink loads in a step.
SHRINK_COLUMNS = 64
#: Parts of a page, for which workspaces have room.
MAX_PARTS = 8


def one_token(
    x: Array,
    experts: Array,
    weights: Array,
    num_tokens: Array,
    gate_up_weight: Array,
    down_weight: Array,
    layer: Array,
    *,
    gate_up_bias: Array | None,
    down_bias: Array | None,
    activation: str,
    scaling: float,
    adapter_of_token: Array | None,
    pages: ExpertPages | None,
    gate_up_ranks: Buffer | None,
    hidden: Buffer | None,
    down_ranks: Buffer | None,
    signals: Buffer | None,
    out: Buffer | None,
) -> Buffer:
    """See :func:`moelora_kernels.fused_experts`."""
    top_k = experts.shape[1]
    _, num_experts, _, inner, width = gate_up_weight.shape
    tiles_of = FEW_PROGRAMS
    if top_k * triton.cdiv(inner, FEW_PROGRAMS.gate_up.block_n) > ONE_WAVE:
        tiles_of = MANY_PROGRAMS
    token = (experts, adapter_of_token, scalar(num_tokens), scalar(layer))
    sizes = {
        "HIDDEN": width,
        "INTERMEDIATE": inner,
        "TOP_K": top_k,
        "NUM_EXPERTS": num_experts,
        "PAGE_ROWS": PAGE_ROWS,
        "SIGNALS": SIGNALS[0],
    }

    def run(
        kernel: Any,
        inputs: tuple[Any, ...],
        sites: Sequence[SitePages],
        ranks: Any,
        target: Any,
        tiles: GemmTiles,
        programs: int,
        depth: int,
        **constants: Any,
    ) -> None:
        # Factors, rank activations and signals.
        arrays: list[Any] = [None] * (10 if kernel is gate_up_token else 6)
        written = [target]
        lora = dict.fromkeys(("NUM_ADAPTERS", "MAX_PAGES", "PAGE_LANES", "PARTS", "SHRINKS"), 0)
        part = max(tiles_of.shrink_part, triton.next_power_of_2(triton.cdiv(depth, MAX_PARTS)))
        part = min(triton.next_power_of_2(depth), part)
        shrink_k = min(part, SHRINK_COLUMNS * tiles.num_warps)
        if sites:
            _, _, adapters, max_pages, _ = sites[0].table.shape
            arrays = [array for site in sites for array in site]
            parts = triton.cdiv(depth, part)
            ranks = ranks_buffer(ranks, (len(sites), top_k, parts, max_pages * PAGE_ROWS))
            written = [ranks, signals, target]
            lora = {
                "NUM_ADAPTERS": adapters,
                "MAX_PAGES": max_pages,
                "PAGE_LANES": triton.next_power_of_2(max_pages),
                "PARTS": parts,
                "SHRINKS": len(sites) * top_k * max_pages * parts,
            }
        launch(
            kernel,
            (*inputs, *token, *arrays),
            (),
            written,
            Launch((lora["SHRINKS"] + programs,), tiles.num_warps),
            PROGRAMS=programs,
            BLOCK_N=tiles.block_n,
            BLOCK_K=min(triton.next_power_of_2(depth), tiles.block_k),
            STAGES=tiles.num_stages * 2 // x.dtype.itemsize,
            PART=part,
            SHRINK_K=shrink_k,
            SHRINK_STAGES=min(part, tiles_of.shrink_part) // shrink_k + 1,
            **sizes,
            **lora,
            **constants,
        )

    rows = given_or_new(hidden, (top_k, inner), x.dtype)
    total = given_or_new(out, (1, width), x.dtype)
    if pages is not None:
        signals = given_or_new(signals, SIGNALS, jnp.int32)
    run(
        gate_up_token,
        (x, gate_up_weight, gate_up_bias),
        () if pages is None else pages[:2],
        gate_up_ranks,
        rows,
        tiles_of.gate_up,
        top_k * triton.cdiv(inner, tiles_of.gate_up.block_n),
        width,
        ACTIVATION=activation,
    )
    run(
        down_token,
        (rows, weights, down_weight, down_bias),
        () if pages is None else pages[2:],
        down_ranks,
        total,
        tiles_of.down,
        triton.cdiv(width, tiles_of.down.block_n),
        inner,
        SCALING=float(scaling),
        TOP_K_POW2=triton.next_power_of_2(top_k),
    )
    return total[...] if out is None else out


def ranks_buffer(given: Buffer | None, shape: tuple[int, ...]) -> Any:
    """``given`` if it has room for float32 numbers of this shape, else a new buffer."""
    if given is not None and math.prod(given.shape) * given.dtype.itemsize >= 4 * math.prod(shape):
        return given
    return new_buffer(shape, jnp.float32)


@triton.jit
def gate_up_token(
    x_ptr,
    weight_ptr,
    bias_ptr,
    experts_ptr,
    adapter_ptr,
    num_tokens_ptr,
    layer_ptr,
    gate_a_ptr,
    gate_b_ptr,
    gate_table_ptr,
    gate_scaling_ptr,
    up_a_ptr,
    up_b_ptr,
    up_table_ptr,
    up_scaling_ptr,
    z_ptr,
    signals_ptr,
    hidden_ptr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SHRINKS: tl.constexpr,
    SIGNALS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    SHRINK_K: tl.constexpr,
    SHRINK_STAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_LANES: tl.constexpr,
):
    """The first ``SHRINKS`` programs shrink, the others have ``BLOCK_N`` columns of one pair."""
    NUM_BLOCKS: tl.constexpr = (INTERMEDIATE + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    pair = (program - SHRINKS) // NUM_BLOCKS
    if program < SHRINKS:
        if SHRINKS > 0:
            pair = program // (2 * MAX_PAGES * PARTS)
    # One wait for all that the rest depends on.
    expert, layer = tl.load(experts_ptr + pair), tl.load(layer_ptr)
    adapter = -1
    if SHRINKS > 0:
        adapter = tl.load(adapter_ptr)
    real = tl.load(num_tokens_ptr) > 0
    # Of the A pages of an adapter and this expert; its B pages follow after B_PAGES entries.
    entry = (layer * 2 * NUM_ADAPTERS + adapter) * MAX_PAGES * NUM_EXPERTS + expert
    B_PAGES: tl.constexpr = NUM_ADAPTERS * MAX_PAGES * NUM_EXPERTS
    RANKS: tl.constexpr = MAX_PAGES * PAGE_ROWS
    if SHRINKS > 0:
        z_ptr = z_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    if program < SHRINKS:
        if SHRINKS > 0:
            if real & (adapter >= 0):
                part, site = program % PARTS, program // PARTS % 2
                page = program // (2 * PARTS) % MAX_PAGES
                entry += page * NUM_EXPERTS
                factor = (layer * NUM_ADAPTERS + adapter) * NUM_EXPERTS + expert
                z_ptr += ((site * TOP_K + pair) * PARTS + part) * RANKS + page * PAGE_ROWS
                # A branch per site keeps the alignment of each pool known to the compiler.
                if site == 0:
                    shrink_page(
                        x_ptr, gate_a_ptr, gate_table_ptr + entry, gate_scaling_ptr + factor,
                        z_ptr, part, HIDDEN, PAGE_ROWS, PART, SHRINK_K, SHRINK_STAGES,
                    )  # fmt: skip
                else:
                    shrink_page(
                        x_ptr, up_a_ptr, up_table_ptr + entry, up_scaling_ptr + factor, z_ptr,
                        part, HIDDEN, PAGE_ROWS, PART, SHRINK_K, SHRINK_STAGES,
                    )  # fmt: skip
                signal(signals_ptr + 1)
    elif real:
        columns = ((program - SHRINKS) % NUM_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = repeat_last(columns, INTERMEDIATE, BLOCK_N)
        if SHRINKS > 0:
            rank = tl.arange(0, PAGE_LANES * PAGE_ROWS)
            b_entry = entry + B_PAGES
            gate_row = find_rank_rows(
                rank, adapter, gate_table_ptr + b_entry, NUM_EXPERTS, MAX_PAGES, PAGE_ROWS
            )
            up_row = find_rank_rows(
                rank, adapter, up_table_ptr + b_entry, NUM_EXPERTS, MAX_PAGES, PAGE_ROWS
            )
            gate_b = load_rank_rows(gate_row, column, gate_b_ptr, INTERMEDIATE)
            up_b = load_rank_rows(up_row, column, up_b_ptr, INTERMEDIATE)
        HALF: tl.constexpr = INTERMEDIATE * HIDDEN
        depth = tl.arange(0, BLOCK_K)
        stacked_expert = layer.to(tl.int64) * NUM_EXPERTS + expert
        weight_ptr += stacked_expert * (2 * HALF)
        gate_ptrs = weight_ptr + column[:, None] * HIDDEN + depth[None, :]
        gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for k in tl.range(0, HIDDEN, BLOCK_K, num_stages=STAGES):
            if HIDDEN % BLOCK_K == 0:
                x = tl.load(x_ptr + k + depth)
                gate_weight = tl.load(gate_ptrs + k)
                up_weight = tl.load(gate_ptrs + HALF + k)
            else:
                left = k + depth < HIDDEN
                x = tl.load(x_ptr + k + depth, mask=left, other=0.0)
                gate_weight = tl.load(gate_ptrs + k, mask=left[None, :], other=0.0)
                up_weight = tl.load(gate_ptrs + HALF + k, mask=left[None, :], other=0.0)
            gate += gate_weight.to(tl.float32) * x.to(tl.float32)[None, :]
            up += up_weight.to(tl.float32) * x.to(tl.float32)[None, :]
        gate, up = tl.sum(gate, 1), tl.sum(up, 1)
        if bias_ptr is not None:
            bias_ptr += stacked_expert * (2 * INTERMEDIATE)
            gate += tl.load(bias_ptr + column).to(tl.float32)
            up += tl.load(bias_ptr + INTERMEDIATE + column).to(tl.float32)
        if SHRINKS > 0:
            if adapter >= 0:
                wait_for(signals_ptr + 1, SHRINKS)
                z_ptr += pair * PARTS * RANKS
                gate_z = sum_parts(z_ptr, rank, gate_row, gate_b, PARTS, RANKS)
                up_z = sum_parts(z_ptr + TOP_K * PARTS * RANKS, rank, up_row, up_b, PARTS, RANKS)
                gate += tl.sum(gate_z[:, None] * gate_b.to(tl.float32), 0)
                up += tl.sum(up_z[:, None] * up_b.to(tl.float32), 0)
        hidden = activate(gate, up, ACTIVATION).to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + pair * INTERMEDIATE + columns, hidden, mask=columns < INTERMEDIATE)


@triton.jit
def down_token(
    hidden_ptr,
    weights_ptr,
    weight_ptr,
    bias_ptr,
    experts_ptr,
    adapter_ptr,
    num_tokens_ptr,
    layer_ptr,
    a_ptr,
    b_ptr,
    table_ptr,
    scaling_ptr,
    z_ptr,
    signals_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    SCALING: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SHRINKS: tl.constexpr,
    SIGNALS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    SHRINK_K: tl.constexpr,
    SHRINK_STAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_LANES: tl.constexpr,
):
    """The first ``SHRINKS`` programs shrink, the others have ``BLOCK_N`` columns of the output."""
    program = tl.program_id(0)
    layer = tl.load(layer_ptr)
    adapter = -1
    if SHRINKS > 0:
        # One wait for both.
        adapter = tl.load(adapter_ptr)
        shrink_pair = tl.minimum(program // (MAX_PAGES * PARTS), TOP_K - 1)
        shrink_expert = tl.load(experts_ptr + shrink_pair)
    real = tl.load(num_tokens_ptr) > 0
    B_PAGES: tl.constexpr = NUM_ADAPTERS * MAX_PAGES * NUM_EXPERTS
    RANKS: tl.constexpr = MAX_PAGES * PAGE_ROWS
    if SHRINKS > 0:
        z_ptr = z_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    entry = (layer * 2 * NUM_ADAPTERS + adapter) * MAX_PAGES * NUM_EXPERTS
    if program < SHRINKS:
        if SHRINKS > 0:
            if real & (adapter >= 0):
                page, part = program // PARTS % MAX_PAGES, program % PARTS
                shrink_page(
                    hidden_ptr + shrink_pair * INTERMEDIATE,
                    a_ptr,
                    table_ptr + entry + page * NUM_EXPERTS + shrink_expert,
                    scaling_ptr + (layer * NUM_ADAPTERS + adapter) * NUM_EXPERTS + shrink_expert,
                    z_ptr + (shrink_pair * PARTS + part) * RANKS + page * PAGE_ROWS,
                    part, INTERMEDIATE, PAGE_ROWS, PART, SHRINK_K, SHRINK_STAGES,
                )  # fmt: skip
                signal(signals_ptr + 2)
    else:
        columns = (program - SHRINKS) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = repeat_last(columns, HIDDEN, BLOCK_N)
        total = tl.zeros([BLOCK_N], tl.float32)
        if real:
            if SHRINKS > 0:
                # The ranks of all pairs, one after another.
                LANES: tl.constexpr = PAGE_LANES * PAGE_ROWS
                lane = tl.arange(0, TOP_K_POW2 * LANES)
                pair, rank = lane // LANES, lane % LANES
                exists = pair < TOP_K
                expert = tl.load(experts_ptr + pair, mask=exists, other=0)
                weight_of_rank = tl.load(weights_ptr + pair, mask=exists, other=0.0)
                b_row = find_rank_rows(
                    rank, tl.where(exists, adapter, -1), table_ptr + entry + B_PAGES + expert,
                    NUM_EXPERTS, MAX_PAGES, PAGE_ROWS,
                )  # fmt: skip
                b = load_rank_rows(b_row, column, b_ptr, HIDDEN)
            STEPS: tl.constexpr = (INTERMEDIATE + BLOCK_K - 1) // BLOCK_K
            depth = tl.arange(0, BLOCK_K)
            tile_ptrs = weight_ptr + column[:, None] * INTERMEDIATE + depth[None, :]
            products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            # One loop over all experts, so that the copies never have to begin anew.
            for step in tl.range(0, TOP_K * STEPS, num_stages=STAGES):
                choice, k = step // STEPS, step % STEPS * BLOCK_K
                of_expert = layer.to(tl.int64) * NUM_EXPERTS + tl.load(experts_ptr + choice)
                first = of_expert * (HIDDEN * INTERMEDIATE) + k
                row_ptrs = hidden_ptr + choice * INTERMEDIATE + k + depth
                if INTERMEDIATE % BLOCK_K == 0:
                    hidden, tile = tl.load(row_ptrs), tl.load(tile_ptrs + first)
                else:
                    left = k + depth < INTERMEDIATE
                    hidden = tl.load(row_ptrs, mask=left, other=0.0)
                    tile = tl.load(tile_ptrs + first, mask=left[None, :], other=0.0)
                scaled = hidden.to(tl.float32) * tl.load(weights_ptr + choice)
                products += tile.to(tl.float32) * scaled[None, :]
            total += tl.sum(products, 1)
            if bias_ptr is not None:
                for choice in tl.static_range(TOP_K):
                    of_expert = layer * NUM_EXPERTS + tl.load(experts_ptr + choice)
                    bias = tl.load(bias_ptr + of_expert * HIDDEN + column).to(tl.float32)
                    total += tl.load(weights_ptr + choice) * bias
            if SHRINKS > 0:
                if adapter >= 0:
                    wait_for(signals_ptr + 2, SHRINKS)
                    z = sum_parts(z_ptr + pair * PARTS * RANKS, rank, b_row, b, PARTS, RANKS)
                    # These programs have waited for all that there was to wait for.
                    if leave(signals_ptr, PROGRAMS):
                        clear(signals_ptr, SIGNALS)
                    total += tl.sum((z * weight_of_rank)[:, None] * b.to(tl.float32), 0)
        total = (total * SCALING).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + columns, total, mask=columns < HIDDEN)


@triton.jit
def repeat_last(columns, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns past the last repeat it, so that loads need no mask.

    Where there are none, the compiler must see that columns are neighbours, which a minimum hides:
    it would load pages of B two bytes at a time.
    """
    if WIDTH % BLOCK_N == 0:
        return columns
    return tl.minimum(columns, WIDTH - 1)


@triton.jit
def sum_parts(z_ptr, rank, rank_row, b, PARTS: tl.constexpr, RANKS: tl.constexpr):
    """Rank activations in float32, rounded once to the dtype of ``b``."""
    z = tl.load(z_ptr + rank, mask=rank_row >= 0, other=0.0)
    for part in tl.static_range(1, PARTS):
        z += tl.load(z_ptr + part * RANKS + rank, mask=rank_row >= 0, other=0.0)
    return z.to(b.dtype).to(tl.float32)


@triton.jit
def shrink_page(
    x_ptr,
    pool_ptr,
    entry_ptr,
    scaling_ptr,
    z_ptr,
    part,
    WIDTH: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``scaling · A · x`` for one page, if the adapter has it, and a part of the columns of x."""
    pool_row, scaling = tl.load(entry_ptr), tl.load(scaling_ptr)
    if pool_row >= 0:
        rank, column = tl.arange(0, PAGE_ROWS), part * PART + tl.arange(0, BLOCK_K)
        a_ptrs = pool_ptr + pool_row.to(tl.int64) * PAGE_ROWS * WIDTH
        a_ptrs += rank[:, None] * WIDTH + column[None, :]
        products = tl.zeros([PAGE_ROWS, BLOCK_K], tl.float32)
        for k in tl.range(0, PART, BLOCK_K, num_stages=STAGES):
            if WIDTH % PART == 0:
                x, a = tl.load(x_ptr + k + column), tl.load(a_ptrs + k)
            else:
                inside = k + column < WIDTH
                x = tl.load(x_ptr + k + column, mask=inside, other=0.0)
                a = tl.load(a_ptrs + k, mask=inside[None, :], other=0.0)
            products += a.to(tl.float32) * x.to(tl.float32)[None, :]
        tl.store(z_ptr + rank, tl.sum(products, 1) * scaling)


@triton.jit
def find_rank_rows(
    rank,
    adapter,
    entry_ptr,
    NUM_EXPERTS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
):
    """The row of each rank in a pool seen as ``[pages * PAGE_ROWS, width]``; -1 where none is."""
    page = rank // PAGE_ROWS
    pool_row = tl.load(
        entry_ptr + page * NUM_EXPERTS, mask=(page < MAX_PAGES) & (adapter >= 0), other=-1
    )
    return tl.where(pool_row >= 0, pool_row * PAGE_ROWS + rank % PAGE_ROWS, -1)


@triton.jit
def load_rank_rows(rank_row, column, pool_ptr, width):
    """``[..., columns]`` of rank rows; zeros where there is none."""
    address = tl.expand_dims(rank_row.to(tl.int64) * width, -1) + column
    return tl.load(pool_ptr + address, mask=tl.expand_dims(rank_row >= 0, -1), other=0.0)
