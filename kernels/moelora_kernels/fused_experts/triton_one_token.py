"""The MoE layer of one token in Triton: matrix-vector products on the ordinary units.

Two launches, *gate_up* and *down*. Nothing has to be sorted, and down sums over the experts in
float32, so nothing has to be combined. The time is that of the weights' bytes if enough of them are
on their way at any moment, so every loop copies many steps ahead into shared memory. (Triton does
that for a loop without tensor core products only where the loop itself names its stages.)

The first programs of each launch shrink, one page each. The others wait for them only when their
sums are complete; see :mod:`moelora_kernels.waiting` for why that is safe. The launch of
down clears the counters of both.

All rows are pairs in the order of the router's choices.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, scalar
from moelora_kernels.buffers import given_or_new
from moelora_kernels.expert_lora.triton import activate
from moelora_kernels.tuning.tiles import GemmTiles
from moelora_kernels.types import PAGE_ROWS, SIGNALS, Buffer, ExpertPages, SitePages
from moelora_kernels.waiting import clear, leave, signal, wait_for

#: Stages are for 16 bits a number.
GATE_UP_TILES = GemmTiles(block_n=8, block_k=256, num_warps=4, num_stages=8)
DOWN_TILES = GemmTiles(block_n=8, block_k=256, num_warps=4, num_stages=10)
#: Columns of a page that a warp of a shrink loads in a step, and steps whose loads are in flight.
SHRINK_COLUMNS, SHRINK_STAGES = 64, 8


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
        names = ("NUM_ADAPTERS", "MAX_PAGES", "PAGE_LANES", "Z_ROWS", "Z_COLUMNS", "SHRINKS")
        lora = dict.fromkeys(names, 0)
        if sites:
            _, _, adapters, max_pages, _ = sites[0].table.shape
            arrays = [array for site in sites for array in site]
            written = [ranks, signals, target]
            lora = {
                "NUM_ADAPTERS": adapters,
                "MAX_PAGES": max_pages,
                "PAGE_LANES": triton.next_power_of_2(max_pages),
                "Z_ROWS": ranks.shape[1],
                "Z_COLUMNS": ranks.shape[2],
                "SHRINKS": len(sites) * top_k * max_pages,
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
            SHRINK_K=min(triton.next_power_of_2(depth), SHRINK_COLUMNS * tiles.num_warps),
            SHRINK_STAGES=SHRINK_STAGES * 2 // x.dtype.itemsize,
            **sizes,
            **lora,
            **constants,
        )

    rows = given_or_new(hidden, (top_k, inner), x.dtype)
    total = given_or_new(out, (1, width), x.dtype)
    if pages is not None:
        signals = given_or_new(signals, SIGNALS, jnp.int32)
        gate_up_ranks = given_or_new(gate_up_ranks, (2, top_k, pages.gate.max_rank), x.dtype)
        down_ranks = given_or_new(down_ranks, (1, top_k, pages.gate.max_rank), x.dtype)
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
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
):
    """The first ``SHRINKS`` programs shrink, the others have ``BLOCK_N`` columns of one pair."""
    NUM_BLOCKS: tl.constexpr = (INTERMEDIATE + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    pair = (program - SHRINKS) // NUM_BLOCKS
    if program < SHRINKS:
        if SHRINKS > 0:
            pair = program // (2 * MAX_PAGES)
    # One wait for all that the rest depends on.
    expert, layer = tl.load(experts_ptr + pair), tl.load(layer_ptr)
    adapter = -1
    if SHRINKS > 0:
        adapter = tl.load(adapter_ptr)
    real = tl.load(num_tokens_ptr) > 0
    # Of the A pages of an adapter and this expert; its B pages follow after B_PAGES entries.
    entry = (layer * 2 * NUM_ADAPTERS + adapter) * MAX_PAGES * NUM_EXPERTS + expert
    B_PAGES: tl.constexpr = NUM_ADAPTERS * MAX_PAGES * NUM_EXPERTS
    if program < SHRINKS:
        if SHRINKS > 0:
            if real & (adapter >= 0):
                page, site = program // 2 % MAX_PAGES, program % 2
                entry += page * NUM_EXPERTS
                factor = (layer * NUM_ADAPTERS + adapter) * NUM_EXPERTS + expert
                z_ptr += (site * Z_ROWS + pair) * Z_COLUMNS + page * PAGE_ROWS
                # A branch per site keeps the alignment of each pool known to the compiler.
                if site == 0:
                    shrink_page(
                        x_ptr, gate_a_ptr, gate_table_ptr + entry, gate_scaling_ptr + factor,
                        z_ptr, HIDDEN, PAGE_ROWS, SHRINK_K, SHRINK_STAGES,
                    )  # fmt: skip
                else:
                    shrink_page(
                        x_ptr, up_a_ptr, up_table_ptr + entry, up_scaling_ptr + factor, z_ptr,
                        HIDDEN, PAGE_ROWS, SHRINK_K, SHRINK_STAGES,
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
                gate_b = load_rank_rows(gate_row, column, gate_b_ptr, INTERMEDIATE)
                up_b = load_rank_rows(up_row, column, up_b_ptr, INTERMEDIATE)
                wait_for(signals_ptr + 1, SHRINKS)
                z_ptrs = z_ptr + pair * Z_COLUMNS + rank
                gate_z = tl.load(z_ptrs, mask=gate_row >= 0, other=0.0).to(tl.float32)
                up_z = tl.load(z_ptrs + Z_ROWS * Z_COLUMNS, mask=up_row >= 0, other=0.0)
                gate += tl.sum(gate_z[:, None] * gate_b.to(tl.float32), 0)
                up += tl.sum(up_z.to(tl.float32)[:, None] * up_b.to(tl.float32), 0)
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
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
):
    """The first ``SHRINKS`` programs shrink, the others have ``BLOCK_N`` columns of the output."""
    program = tl.program_id(0)
    layer = tl.load(layer_ptr)
    adapter = -1
    if SHRINKS > 0:
        adapter = tl.load(adapter_ptr)
    real = tl.load(num_tokens_ptr) > 0
    B_PAGES: tl.constexpr = NUM_ADAPTERS * MAX_PAGES * NUM_EXPERTS
    entry = (layer * 2 * NUM_ADAPTERS + adapter) * MAX_PAGES * NUM_EXPERTS
    if program < SHRINKS:
        if SHRINKS > 0:
            if real & (adapter >= 0):
                pair, page = program // MAX_PAGES, program % MAX_PAGES
                expert = tl.load(experts_ptr + pair)
                shrink_page(
                    hidden_ptr + pair * INTERMEDIATE,
                    a_ptr,
                    table_ptr + entry + page * NUM_EXPERTS + expert,
                    scaling_ptr + (layer * NUM_ADAPTERS + adapter) * NUM_EXPERTS + expert,
                    z_ptr + pair * Z_COLUMNS + page * PAGE_ROWS,
                    INTERMEDIATE, PAGE_ROWS, SHRINK_K, SHRINK_STAGES,
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
                expert = tl.load(experts_ptr + pairs, mask=exists, other=0)
                page = rank // PAGE_ROWS
                pool_row = tl.load(
                    table_ptr + entry + B_PAGES + expert[:, None] + page[None, :] * NUM_EXPERTS,
                    mask=exists[:, None] & (page < MAX_PAGES)[None, :], other=-1,
                )  # fmt: skip
                b_row = tl.where(
                    pool_row >= 0, pool_row * PAGE_ROWS + rank[None, :] % PAGE_ROWS, -1
                )
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
                    b = load_rank_rows(b_row, column, b_ptr, HIDDEN).to(tl.float32)
                    weight = tl.load(weights_ptr + pairs, mask=exists, other=0.0)
                    wait_for(signals_ptr + 2, SHRINKS)
                    z = tl.load(
                        z_ptr + pairs[:, None] * Z_COLUMNS + rank[None, :],
                        mask=b_row >= 0, other=0.0,
                    )  # fmt: skip
                    z = z.to(tl.float32) * weight[:, None]
                    total += tl.sum(tl.sum(z[:, :, None] * b, 1), 0)
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
    WIDTH: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``z = scaling · A · x`` for one page, if the adapter has it; few waits for memory."""
    pool_row, scaling = tl.load(entry_ptr), tl.load(scaling_ptr)
    if pool_row >= 0:
        rank, column = tl.arange(0, PAGE_ROWS), tl.arange(0, BLOCK_K)
        a_ptrs = pool_ptr + pool_row.to(tl.int64) * PAGE_ROWS * WIDTH
        a_ptrs += rank[:, None] * WIDTH + column[None, :]
        products = tl.zeros([PAGE_ROWS, BLOCK_K], tl.float32)
        for k in tl.range(0, WIDTH, BLOCK_K, num_stages=STAGES):
            if WIDTH % BLOCK_K == 0:
                x, a = tl.load(x_ptr + k + column), tl.load(a_ptrs + k)
            else:
                inside = k + column < WIDTH
                x = tl.load(x_ptr + k + column, mask=inside, other=0.0)
                a = tl.load(a_ptrs + k, mask=inside[None, :], other=0.0)
            products += a.to(tl.float32) * x.to(tl.float32)[None, :]
        z = tl.sum(products, 1) * scaling
        tl.store(z_ptr + rank, z.to(z_ptr.dtype.element_ty))


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
