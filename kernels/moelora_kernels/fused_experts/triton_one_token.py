"""The experts of one token in one Triton launch: matrix-vector products on the ordinary units.

The programs of the launch have four tasks: the shrink before gate_up, gate_up, the shrink before
down, and down with the sum over the experts. Programs wait for those of the tasks before, as
:mod:`moelora_kernels.expert_lora.triton` explains. What does not depend on what they wait for is
loaded before. All are small, so that many are on a processor at once: every program begins with
look-ups that wait for each other, and meanwhile others must keep the memory busy.

All rows are pairs in the order of the router's choices.
"""

from typing import Any

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, scalar
from moelora_kernels.buffers import given_or_new
from moelora_kernels.expert_lora.triton import (
    activate,
    clear,
    leave,
    shrink_pages,
    signal,
    wait_for,
)
from moelora_kernels.types import PAGE_ROWS, SIGNALS, Buffer, ExpertPages

#: Output columns of a program.
BLOCK_N = 8
#: Summed columns of one step.
BLOCK_K = 128
#: Columns of a page that a program loads at once when it shrinks.
SHRINK_K = 128


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

    def buffer(given: Buffer | None, shape: tuple[int, ...], dtype: Any = x.dtype) -> Any:
        return given_or_new(given, shape, dtype)

    # Without LoRA there are no factors, and no rank activations of gate_up and down.
    lora: tuple[Any, ...] = (None,) * 14
    written = []
    sizes = dict.fromkeys(("NUM_ADAPTERS", "MAX_PAGES", "PAGE_LANES", "Z_ROWS", "Z_COLUMNS"), 0)
    if pages is not None:
        _, _, adapters, max_pages, _ = pages.gate.table.shape
        lora = tuple(array for site in pages for array in site)
        z = buffer(gate_up_ranks, (2, top_k, pages.gate.max_rank))
        written = [z, buffer(down_ranks, (1, top_k, pages.gate.max_rank))]
        sizes = {
            "NUM_ADAPTERS": adapters,
            "MAX_PAGES": max_pages,
            "PAGE_LANES": triton.next_power_of_2(max_pages),
            "Z_ROWS": z.shape[1],
            "Z_COLUMNS": z.shape[2],
        }
    total = buffer(out, (1, width))
    written += [buffer(hidden, (top_k, inner)), buffer(signals, SIGNALS, jnp.int32), total]
    shrinks = 0 if pages is None else top_k
    down_programs = triton.cdiv(width, BLOCK_N)
    programs = 3 * shrinks + top_k * triton.cdiv(inner, BLOCK_N) + down_programs
    launch(
        token_layer,
        (
            *(x, experts, weights, adapter_of_token, scalar(num_tokens), scalar(layer)),
            *(gate_up_weight, gate_up_bias, down_weight, down_bias, *lora),
        ),
        (),
        written,
        Launch((programs,), num_warps=4),
        HIDDEN=width,
        INTERMEDIATE=inner,
        TOP_K=top_k,
        ACTIVATION=activation,
        SCALING=float(scaling),
        NUM_EXPERTS=num_experts,
        SHRINKS=shrinks,
        DOWNS=down_programs,
        SIGNALS=SIGNALS[0],
        TOP_K_POW2=triton.next_power_of_2(top_k),
        BLOCK_N=BLOCK_N,
        GATE_UP_K=min(triton.next_power_of_2(width), BLOCK_K),
        DOWN_K=min(triton.next_power_of_2(inner), BLOCK_K),
        SHRINK_K=SHRINK_K,
        PAGE_ROWS=PAGE_ROWS,
        **sizes,
    )
    return total[...] if out is None else out


@triton.jit
def token_layer(
    x_ptr,
    experts_ptr,
    weights_ptr,
    adapter_ptr,
    num_tokens_ptr,
    layer_ptr,
    gate_up_ptr,
    gate_up_bias_ptr,
    down_ptr,
    down_bias_ptr,
    gate_a_ptr,
    gate_b_ptr,
    gate_table_ptr,
    gate_scaling_ptr,
    up_a_ptr,
    up_b_ptr,
    up_table_ptr,
    up_scaling_ptr,
    down_a_ptr,
    down_b_ptr,
    down_table_ptr,
    down_scaling_ptr,
    gate_up_z_ptr,
    down_z_ptr,
    hidden_ptr,
    signals_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALING: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    SHRINKS: tl.constexpr,
    DOWNS: tl.constexpr,
    SIGNALS: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATE_UP_K: tl.constexpr,
    DOWN_K: tl.constexpr,
    SHRINK_K: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_LANES: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
):
    """The task of each program follows from its number."""
    # Programs that have left, and programs that are done with each task.
    shrunk_ptr, gated_ptr, down_shrunk_ptr = signals_ptr + 1, signals_ptr + 2, signals_ptr + 3
    NUM_BLOCKS: tl.constexpr = (INTERMEDIATE + BLOCK_N - 1) // BLOCK_N
    GATE_UPS: tl.constexpr = TOP_K * NUM_BLOCKS
    SHRUNK: tl.constexpr = 2 * SHRINKS
    GATED: tl.constexpr = SHRUNK + GATE_UPS
    DOWN_SHRUNK: tl.constexpr = GATED + SHRINKS
    program = tl.program_id(0)
    pair = program // 2
    if program >= GATED:
        pair = tl.minimum(program - GATED, TOP_K - 1)
    elif program >= SHRUNK:
        pair = (program - SHRUNK) // NUM_BLOCKS
    # One wait for all that the rest depends on.
    expert, layer = tl.load(experts_ptr + pair), tl.load(layer_ptr)
    adapter = -1
    if SHRINKS > 0:
        adapter = tl.load(adapter_ptr)
    real = tl.load(num_tokens_ptr) > 0
    stacked_expert = layer.to(tl.int64) * NUM_EXPERTS + expert
    # Of the A pages of an adapter and this expert; its B pages follow after B_PAGES entries.
    entry = (layer * 2 * NUM_ADAPTERS + adapter) * MAX_PAGES * NUM_EXPERTS + expert
    B_PAGES: tl.constexpr = NUM_ADAPTERS * MAX_PAGES * NUM_EXPERTS
    factor = (layer * NUM_ADAPTERS + adapter) * NUM_EXPERTS + expert
    RANKS: tl.constexpr = PAGE_LANES * PAGE_ROWS
    rank = tl.arange(0, RANKS if SHRINKS > 0 else 1)
    if program < SHRUNK:
        if SHRINKS > 0:
            if real & (adapter >= 0):
                site = program % 2
                z_ptr = gate_up_z_ptr + (site * Z_ROWS + pair) * Z_COLUMNS
                # A branch per site keeps the alignment of each pool known to the compiler.
                if site == 0:
                    shrink_pages(
                        x_ptr, gate_a_ptr, gate_table_ptr + entry, gate_scaling_ptr + factor,
                        z_ptr,
                        HIDDEN, NUM_EXPERTS, MAX_PAGES, PAGE_LANES, PAGE_ROWS, SHRINK_K,
                    )  # fmt: skip
                else:
                    shrink_pages(
                        x_ptr, up_a_ptr, up_table_ptr + entry, up_scaling_ptr + factor, z_ptr,
                        HIDDEN, NUM_EXPERTS, MAX_PAGES, PAGE_LANES, PAGE_ROWS, SHRINK_K,
                    )  # fmt: skip
                signal(shrunk_ptr)
    elif program < GATED:
        if real:
            columns = ((program - SHRUNK) % NUM_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
            column = tl.minimum(columns, INTERMEDIATE - 1)
            if SHRINKS > 0:
                gate_row = find_rank_rows(
                    rank, adapter, gate_table_ptr + entry + B_PAGES, NUM_EXPERTS, MAX_PAGES,
                    PAGE_ROWS,
                )  # fmt: skip
                up_row = find_rank_rows(
                    rank, adapter, up_table_ptr + entry + B_PAGES, NUM_EXPERTS, MAX_PAGES,
                    PAGE_ROWS,
                )  # fmt: skip
            HALF: tl.constexpr = INTERMEDIATE * HIDDEN
            # Halfway, the rows of B are known, and what is loaded then arrives in time.
            MIDDLE: tl.constexpr = (HIDDEN // 2 + GATE_UP_K - 1) // GATE_UP_K * GATE_UP_K
            weight_ptrs = gate_up_ptr + stacked_expert * (2 * HALF) + column[:, None] * HIDDEN
            gate = tl.zeros([BLOCK_N, GATE_UP_K], tl.float32)
            up = tl.zeros([BLOCK_N, GATE_UP_K], tl.float32)
            gate, up = add_products(
                gate, up, x_ptr, weight_ptrs, 0, MIDDLE, HIDDEN, HALF, GATE_UP_K
            )
            if SHRINKS > 0:
                gate_b = load_rank_rows(gate_row, column, gate_b_ptr, INTERMEDIATE)
                up_b = load_rank_rows(up_row, column, up_b_ptr, INTERMEDIATE)
            gate, up = add_products(
                gate, up, x_ptr, weight_ptrs, MIDDLE, HIDDEN, HIDDEN, HALF, GATE_UP_K
            )
            gate, up = tl.sum(gate, 1), tl.sum(up, 1)
            if gate_up_bias_ptr is not None:
                bias_ptr = gate_up_bias_ptr + stacked_expert * (2 * INTERMEDIATE)
                gate += tl.load(bias_ptr + column).to(tl.float32)
                up += tl.load(bias_ptr + INTERMEDIATE + column).to(tl.float32)
            if SHRINKS > 0:
                if adapter >= 0:
                    wait_for(shrunk_ptr, SHRUNK)
                    z_ptrs = gate_up_z_ptr + pair * Z_COLUMNS + rank
                    gate_z = tl.load(z_ptrs, mask=gate_row >= 0, other=0.0).to(tl.float32)
                    up_z = tl.load(z_ptrs + Z_ROWS * Z_COLUMNS, mask=up_row >= 0, other=0.0)
                    gate += tl.sum(gate_z[:, None] * gate_b.to(tl.float32), 0)
                    up += tl.sum(up_z.to(tl.float32)[:, None] * up_b.to(tl.float32), 0)
            hidden = activate(gate, up, ACTIVATION).to(hidden_ptr.dtype.element_ty)
            inside = columns < INTERMEDIATE
            tl.store(hidden_ptr + pair * INTERMEDIATE + columns, hidden, mask=inside)
            signal(gated_ptr)
    elif program < DOWN_SHRUNK:
        if SHRINKS > 0:
            if real & (adapter >= 0):
                wait_for(gated_ptr, GATE_UPS)
                shrink_pages(
                    hidden_ptr + pair * INTERMEDIATE, down_a_ptr, down_table_ptr + entry,
                    down_scaling_ptr + factor, down_z_ptr + pair * Z_COLUMNS,
                    INTERMEDIATE, NUM_EXPERTS, MAX_PAGES, PAGE_LANES, PAGE_ROWS, SHRINK_K,
                )  # fmt: skip
                signal(down_shrunk_ptr)
    else:
        columns = (program - DOWN_SHRUNK) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = tl.minimum(columns, HIDDEN - 1)
        total = tl.zeros([BLOCK_N], tl.float32)
        if real:
            if SHRINKS > 0:
                pairs = tl.arange(0, TOP_K_POW2)
                exists = (pairs < TOP_K) & (adapter >= 0)
                all_experts = tl.load(experts_ptr + pairs, mask=exists, other=0)
                entries = entry - expert + B_PAGES + all_experts
                page = rank // PAGE_ROWS
                pool_row = tl.load(
                    down_table_ptr + entries[:, None] + page[None, :] * NUM_EXPERTS,
                    mask=exists[:, None] & (page < MAX_PAGES)[None, :], other=-1,
                )  # fmt: skip
                b_row = tl.where(
                    pool_row >= 0, pool_row * PAGE_ROWS + rank[None, :] % PAGE_ROWS, -1
                )
                b = load_rank_rows(b_row, column, down_b_ptr, HIDDEN).to(tl.float32)
                b *= tl.load(weights_ptr + pairs, mask=exists, other=0.0)[:, None, None]
            wait_for(gated_ptr, GATE_UPS)
            SIZE: tl.constexpr = HIDDEN * INTERMEDIATE
            depth = tl.arange(0, DOWN_K)
            products = tl.zeros([BLOCK_N, DOWN_K], tl.float32)
            for choice in tl.static_range(TOP_K):
                of_expert = layer.to(tl.int64) * NUM_EXPERTS + tl.load(experts_ptr + choice)
                weight = tl.load(weights_ptr + choice)
                tile_ptrs = down_ptr + of_expert * SIZE + column[:, None] * INTERMEDIATE
                row_ptr = hidden_ptr + choice * INTERMEDIATE
                for k in tl.range(0, INTERMEDIATE, DOWN_K, loop_unroll_factor=4, num_stages=1):
                    left = k + depth < INTERMEDIATE
                    hidden = tl.load(row_ptr + k + depth, mask=left, other=0.0).to(tl.float32)
                    tile = tl.load(tile_ptrs + (k + depth)[None, :], mask=left[None, :], other=0.0)
                    products += tile.to(tl.float32) * (hidden * weight)[None, :]
            total += tl.sum(products, 1)
            if down_bias_ptr is not None:
                for choice in tl.static_range(TOP_K):
                    of_expert = layer * NUM_EXPERTS + tl.load(experts_ptr + choice)
                    bias = tl.load(down_bias_ptr + of_expert * HIDDEN + column).to(tl.float32)
                    total += tl.load(weights_ptr + choice) * bias
            if SHRINKS > 0:
                if adapter >= 0:
                    wait_for(down_shrunk_ptr, SHRINKS)
                    z = tl.load(
                        down_z_ptr + pairs[:, None] * Z_COLUMNS + rank[None, :],
                        mask=b_row >= 0, other=0.0,
                    )  # fmt: skip
                    total += tl.sum(tl.sum(z.to(tl.float32)[:, :, None] * b, 1), 0)
        total = (total * SCALING).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + columns, total, mask=columns < HIDDEN)
        # All that could be waited for is done: these programs have waited for it.
        if leave(signals_ptr, DOWNS):
            clear(signals_ptr, SIGNALS)


@triton.jit
def add_products(
    gate,
    up,
    x_ptr,
    weight_ptrs,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    HIDDEN: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add ``weight[:, k] · x[k]`` of gate and up, for some k, to ``[columns, BLOCK_K]`` sums."""
    depth = tl.arange(0, BLOCK_K)
    for k in tl.range(FIRST, END, BLOCK_K, loop_unroll_factor=4, num_stages=1):
        left = k + depth < HIDDEN
        x = tl.load(x_ptr + k + depth, mask=left, other=0.0).to(tl.float32)[None, :]
        tile_ptrs = weight_ptrs + (k + depth)[None, :]
        gate_weight = tl.load(tile_ptrs, mask=left[None, :], other=0.0)
        up_weight = tl.load(tile_ptrs + HALF, mask=left[None, :], other=0.0)
        gate += gate_weight.to(tl.float32) * x
        up += up_weight.to(tl.float32) * x
    return gate, up


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
