"""The MoE layer of one token in Triton: matrix-vector products on the ordinary units.

Two launches, *gate_up* and *down*. Nothing has to be sorted, and down sums over the experts in
float32, so nothing has to be combined. The time is that of the weights' bytes if enough of them are
on their way at any moment, so every loop copies many steps ahead into shared memory. (Triton does
that for a loop without tensor core products only where the loop itself names its stages.)

The first programs of each launch shrink, one page each or a part of its columns: one program alone
would get no more of the memory than each of the others, and be done no sooner. The others load
pages of B while they multiply, and wait for the rank activations only when their sums are complete;
see :mod:`moelora_kernels.expert_lora.triton` for why that is safe. The launch of down clears the
counters of both.

Rank activations of each part are float32, whatever the dtype of their buffer, and summed in order.

All rows are pairs in the order of the router's choices.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, scalar
from moelora_kernels.buffers import given_or_new, new_buffer
from moelora_kernels.expert_lora.triton import activate, clear, leave, signal, wait_for
from moelora_kernels.tuning.tiles import GemmTiles
from moelora_kernels.types import PAGE_ROWS, SIGNALS, Buffer, ExpertPages, SitePages

#: Stages are for 16 bits a number.
GATE_UP_TILES = GemmTiles(block_n=8, block_k=256, num_warps=4, num_stages=8)
DOWN_TILES = GemmTiles(block_n=8, block_k=256, num_warps=4, num_stages=10)
#: Columns of a page that a warp of a shrink loads in a step.
SHRINK_COLUMNS = 64
#: Programs of a launch that shrink, at most, where pages are cut into parts; columns of a part.
SHRINK_PROGRAMS, PART_COLUMNS = 64, 256


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
        if sites:
            _, _, adapters, max_pages, _ = sites[0].table.shape
            arrays = [array for site in sites for array in site]
            written = [ranks, signals, target]
            num_pages = len(sites) * top_k * max_pages
            parts = shrink_parts(num_pages, depth, _float32_size(ranks))
            lora = {
                "NUM_ADAPTERS": adapters,
                "MAX_PAGES": max_pages,
                "PAGE_LANES": triton.next_power_of_2(max_pages),
                "PARTS": parts,
                "SHRINKS": num_pages * parts,
            }
        # As many steps of a page's rows as take no more shared memory than those of the product.
        shrink_stages = tiles.num_stages * tiles.block_n * len(sites) // PAGE_ROWS
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
            SHRINK_K=min(triton.next_power_of_2(depth), SHRINK_COLUMNS * tiles.num_warps),
            SHRINK_STAGES=max(shrink_stages * 2 // x.dtype.itemsize, 2),
            **sizes,
            **lora,
            **constants,
        )

    rows = given_or_new(hidden, (top_k, inner), x.dtype)
    total = given_or_new(out, (1, width), x.dtype)
    if pages is not None:
        signals = given_or_new(signals, SIGNALS, jnp.int32)
        gate_up_ranks = ranks_buffer(gate_up_ranks, 2 * top_k * pages.gate.max_rank)
        down_ranks = ranks_buffer(down_ranks, top_k * pages.gate.max_rank)
    run(
        gate_up_token,
        (x, gate_up_weight, gate_up_bias),
        () if pages is None else pages[:2],
        gate_up_ranks,
        rows,
        GATE_UP_TILES,
        top_k * triton.cdiv(inner, GATE_UP_TILES.block_n),
        width,
        ACTIVATION=activation,
    )
    run(
        down_token,
        (rows, weights, down_weight, down_bias),
        () if pages is None else pages[2:],
        down_ranks,
        total,
        DOWN_TILES,
        triton.cdiv(width, DOWN_TILES.block_n),
        inner,
        SCALING=float(scaling),
        TOP_K_POW2=triton.next_power_of_2(top_k),
    )
    return total[...] if out is None else out


def ranks_buffer(given: Buffer | None, numbers: int) -> Any:
    """``given`` if it has room for so many float32 numbers, else a new buffer."""
    if given is not None and _float32_size(given) >= numbers:
        return given
    return new_buffer((numbers,), jnp.float32)


def _float32_size(buffer: Buffer) -> int:
    return math.prod(buffer.shape) * buffer.dtype.itemsize // 4


def shrink_parts(num_pages: int, columns: int, room: int) -> int:
    """Programs that share the columns of a page; there is room for so many rank activations."""
    most = min(
        SHRINK_PROGRAMS // num_pages,
        room // (num_pages * PAGE_ROWS),
        triton.cdiv(columns, PART_COLUMNS),
    )
    return 1 << max(most.bit_length() - 1, 0)


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
    SHRINK_K: tl.constexpr,
    SHRINK_STAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_LANES: tl.constexpr,
    PARTS: tl.constexpr,
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
    if program < SHRINKS:
        if SHRINKS > 0:
            if real & (adapter >= 0):
                part, site = program % PARTS, program // PARTS % 2
                page = program // (2 * PARTS) % MAX_PAGES
                entry += page * NUM_EXPERTS
                factor = (layer * NUM_ADAPTERS + adapter) * NUM_EXPERTS + expert
                part_ptr = z_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
                part_ptr += ((site * TOP_K + pair) * PARTS + part) * RANKS + page * PAGE_ROWS
                # A branch per site keeps the alignment of each pool known to the compiler.
                if site == 0:
                    shrink_page(
                        x_ptr, gate_a_ptr, gate_table_ptr + entry, gate_scaling_ptr + factor,
                        part_ptr, part, HIDDEN, PAGE_ROWS, SHRINK_K, SHRINK_STAGES, PARTS,
                    )  # fmt: skip
                else:
                    shrink_page(
                        x_ptr, up_a_ptr, up_table_ptr + entry, up_scaling_ptr + factor, part_ptr,
                        part, HIDDEN, PAGE_ROWS, SHRINK_K, SHRINK_STAGES, PARTS,
                    )  # fmt: skip
                signal(signals_ptr + 1)
    elif real:
        columns = ((program - SHRINKS) % NUM_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
        # Columns past the last repeat it, so that loads need no mask.
        column = tl.minimum(columns, INTERMEDIATE - 1)
        if SHRINKS > 0:
            rank = tl.arange(0, PAGE_LANES * PAGE_ROWS)
            b_entry = entry + B_PAGES
            gate_row = find_rank_rows(
                rank, adapter, gate_table_ptr + b_entry, NUM_EXPERTS, MAX_PAGES, PAGE_ROWS
            )
            up_row = find_rank_rows(
                rank, adapter, up_table_ptr + b_entry, NUM_EXPERTS, MAX_PAGES, PAGE_ROWS
            )
        HALF: tl.constexpr = INTERMEDIATE * HIDDEN
        depth = tl.arange(0, BLOCK_K)
        stacked_expert = layer.to(tl.int64) * NUM_EXPERTS + expert
        weight_ptr += stacked_expert * (2 * HALF)
        gate_ptrs = weight_ptr + column[:, None] * HIDDEN + depth[None, :]
        gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        if SHRINKS > 0:
            gate_b = tl.zeros([PAGE_LANES * PAGE_ROWS, BLOCK_N], gate_b_ptr.dtype.element_ty)
            up_b = gate_b
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
            if SHRINKS > 0:
                if k == 0:  # Once the first copies are on their way, and long before its use.
                    gate_b = load_rank_rows(gate_row, column, gate_b_ptr, INTERMEDIATE)
                    up_b = load_rank_rows(up_row, column, up_b_ptr, INTERMEDIATE)
        gate, up = tl.sum(gate, 1), tl.sum(up, 1)
        if bias_ptr is not None:
            bias_ptr += stacked_expert * (2 * INTERMEDIATE)
            gate += tl.load(bias_ptr + column).to(tl.float32)
            up += tl.load(bias_ptr + INTERMEDIATE + column).to(tl.float32)
        if SHRINKS > 0:
            if adapter >= 0:
                wait_for(signals_ptr + 1, SHRINKS)
                part = tl.arange(0, PARTS)[:, None]
                z_ptrs = z_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
                z_ptrs += (pair * PARTS + part) * RANKS + rank[None, :]
                gate_z = tl.sum(tl.load(z_ptrs, mask=(gate_row >= 0)[None, :], other=0.0), 0)
                z_ptrs += TOP_K * PARTS * RANKS
                up_z = tl.sum(tl.load(z_ptrs, mask=(up_row >= 0)[None, :], other=0.0), 0)
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
    SHRINK_K: tl.constexpr,
    SHRINK_STAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_LANES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The first ``SHRINKS`` programs shrink, the others have ``BLOCK_N`` columns of the output."""
    program = tl.program_id(0)
    layer = tl.load(layer_ptr)
    adapter = -1
    if SHRINKS > 0:
        adapter = tl.load(adapter_ptr)
        # One wait for both, in programs that shrink.
        pair = tl.minimum(program // (MAX_PAGES * PARTS), TOP_K - 1)
        expert = tl.load(experts_ptr + pair)
    real = tl.load(num_tokens_ptr) > 0
    B_PAGES: tl.constexpr = NUM_ADAPTERS * MAX_PAGES * NUM_EXPERTS
    RANKS: tl.constexpr = MAX_PAGES * PAGE_ROWS
    entry = (layer * 2 * NUM_ADAPTERS + adapter) * MAX_PAGES * NUM_EXPERTS
    if program < SHRINKS:
        if SHRINKS > 0:
            if real & (adapter >= 0):
                page, part = program // PARTS % MAX_PAGES, program % PARTS
                part_ptr = z_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
                part_ptr += (pair * PARTS + part) * RANKS + page * PAGE_ROWS
                shrink_page(
                    hidden_ptr + pair * INTERMEDIATE,
                    a_ptr,
                    table_ptr + entry + page * NUM_EXPERTS + expert,
                    scaling_ptr + (layer * NUM_ADAPTERS + adapter) * NUM_EXPERTS + expert,
                    part_ptr, part, INTERMEDIATE, PAGE_ROWS, SHRINK_K, SHRINK_STAGES, PARTS,
                )  # fmt: skip
                signal(signals_ptr + 2)
    else:
        columns = (program - SHRINKS) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = tl.minimum(columns, HIDDEN - 1)
        total = tl.zeros([BLOCK_N], tl.float32)
        if real:
            if SHRINKS > 0:
                rank = tl.arange(0, PAGE_LANES * PAGE_ROWS)
                pairs = tl.arange(0, TOP_K_POW2)
                exists = (pairs < TOP_K) & (adapter >= 0)
                chosen = tl.load(experts_ptr + pairs, mask=exists, other=0)
                page = rank // PAGE_ROWS
                pool_row = tl.load(
                    table_ptr + entry + B_PAGES + chosen[:, None] + page[None, :] * NUM_EXPERTS,
                    mask=exists[:, None] & (page < MAX_PAGES)[None, :], other=-1,
                )  # fmt: skip
                b_row = tl.where(
                    pool_row >= 0, pool_row * PAGE_ROWS + rank[None, :] % PAGE_ROWS, -1
                )
            STEPS: tl.constexpr = (INTERMEDIATE + BLOCK_K - 1) // BLOCK_K
            depth = tl.arange(0, BLOCK_K)
            tile_ptrs = weight_ptr + column[:, None] * INTERMEDIATE + depth[None, :]
            products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            if SHRINKS > 0:
                b = tl.zeros([TOP_K_POW2, PAGE_LANES * PAGE_ROWS, BLOCK_N], b_ptr.dtype.element_ty)
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
                if SHRINKS > 0:
                    if step == 0:  # As in gate_up.
                        b = load_rank_rows(b_row, column, b_ptr, HIDDEN)
            total += tl.sum(products, 1)
            if bias_ptr is not None:
                for choice in tl.static_range(TOP_K):
                    of_expert = layer * NUM_EXPERTS + tl.load(experts_ptr + choice)
                    bias = tl.load(bias_ptr + of_expert * HIDDEN + column).to(tl.float32)
                    total += tl.load(weights_ptr + choice) * bias
            if SHRINKS > 0:
                if adapter >= 0:
                    weight = tl.load(weights_ptr + pairs, mask=exists, other=0.0)
                    wait_for(signals_ptr + 2, SHRINKS)
                    part = tl.arange(0, PARTS)[None, :, None]
                    z_ptrs = z_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
                    z_ptrs += (pairs[:, None, None] * PARTS + part) * RANKS + rank[None, None, :]
                    z = tl.load(z_ptrs, mask=(b_row >= 0)[:, None, :], other=0.0)
                    z = tl.sum(z, 1) * weight[:, None]
                    total += tl.sum(tl.sum(z[:, :, None] * b.to(tl.float32), 1), 0)
        total = (total * SCALING).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + columns, total, mask=columns < HIDDEN)
        if SHRINKS > 0:
            if real & (adapter >= 0):
                # These programs have waited for all that there was to wait for.
                if leave(signals_ptr, PROGRAMS):
                    clear(signals_ptr, SIGNALS)


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
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """``scaling · A · x`` for one page, if the adapter has it, and a part of the columns of x."""
    pool_row, scaling = tl.load(entry_ptr), tl.load(scaling_ptr)
    if pool_row >= 0:
        rank, column = tl.arange(0, PAGE_ROWS), tl.arange(0, BLOCK_K)
        a_ptrs = pool_ptr + pool_row.to(tl.int64) * PAGE_ROWS * WIDTH
        a_ptrs += rank[:, None] * WIDTH + column[None, :]
        products = tl.zeros([PAGE_ROWS, BLOCK_K], tl.float32)
        for k in tl.range(part * BLOCK_K, WIDTH, PARTS * BLOCK_K, num_stages=STAGES):
            if WIDTH % BLOCK_K == 0:
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
def load_rank_rows(rank_row, column, pool_ptr, WIDTH: tl.constexpr):
    """``[..., columns]`` of rank rows; zeros where there is none."""
    address = tl.expand_dims(rank_row.to(tl.int64) * WIDTH, -1) + column
    return tl.load(pool_ptr + address, mask=tl.expand_dims(rank_row >= 0, -1), other=0.0)
