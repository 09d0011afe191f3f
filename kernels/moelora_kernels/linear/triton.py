"""Linear maps with LoRA in Triton, whose weights are read where they are in the stack.

With few rows all is one launch. The first programs shrink: each sums part of one page's products
with rows of one adapter. The next multiply: each has some columns of one map, or, where these are
too few to keep the memory busy, part of their sums; whoever completes the last part of a tile adds
up all of them, always in the same order. What adapters add is one more such part, with programs of
its own, or else comes after a tile's only part: these wait until all pages have been shrunk, while
weights are read. See :mod:`moelora_kernels.waiting` for why waiting is safe.

The weights are the left operand, so that a tile has no more rows than the batch. For one row the
products are on the ordinary units.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, precision, scalar
from moelora_kernels.buffers import given_or_new
from moelora_kernels.expert_lora.triton_expand import (
    find_adapters,
    find_pages,
    load_pages,
    load_ranks,
    stack_ranks,
    tile_adapters,
)
from moelora_kernels.fused_experts.triton_one_token import (
    find_rank_rows,
    load_rank_rows,
    sum_parts,
)
from moelora_kernels.linear.triton_maps import (
    find_block,
    is_given,
    map_outputs,
    map_parameters,
    of_map,
)
from moelora_kernels.tuning.tiles import LinearTiles
from moelora_kernels.types import PAGE_ROWS, SIGNALS, Buffer, LinearMap, SitePages, TokenSort
from moelora_kernels.waiting import clear, count, signal, wait_for

#: Neighbours among whose rows a program of the launch for few rows shrinks those of one adapter.
WINDOW_ROWS = 16
#: Programs with which a shrink still starts at once.
MAX_SHRINKS = 320
#: Counters of the whole launch; one for each tile follows them.
LAUNCH_SIGNALS = 8


def linear_lora(
    x: Array,
    maps: Sequence[LinearMap],
    layer: Array,
    sort: TokenSort | None,
    signals: Buffer | None,
    dtype: jnp.dtype,
    tiles: LinearTiles,
) -> Array:
    """See :func:`moelora_kernels.linear_lora`."""
    tokens, width = x.shape
    sites = [] if sort is None else [m.pages for m in maps if m.pages is not None]
    order, group_of_row = None, None
    # Without sites the launch is that of the base model, as the router's is: nothing is looked up.
    if sort is not None and sites:
        order, group_of_row = sort.order, sort.group_of_row
    outputs = map_outputs(maps)
    targets = triton.cdiv(tokens, tiles.block_m) * sum(
        triton.cdiv(out, tiles.block_n) for out in outputs.values()
    )
    block_k = min(tiles.block_k, max(triton.next_power_of_2(width), 16))
    # No part is empty.
    steps = triton.cdiv(width, block_k)
    parts = triton.cdiv(steps, triton.cdiv(steps, tiles.parts))
    all_parts = parts + 1 if sites and parts > 1 else parts
    programs, stages, registers = targets * all_parts, tiles.num_stages, None
    lora = _lora_constants(tokens, width, len(maps), sites, tiles.stack)
    if sites:
        # One more clears the counters.
        programs += lora["SHRINKS"] + 1
        stages, registers = tiles.lora or (stages, registers)
    # Parts of rank activations, then parts of sums.
    scratch = lora["SHRINK_PARTS"] * len(maps) * tokens * lora["Z_COLUMNS"]
    if all_parts > 1:
        if LAUNCH_SIGNALS + targets > SIGNALS[0]:
            raise ValueError(
                f"a launch has signals for {SIGNALS[0] - LAUNCH_SIGNALS} tiles, not for"
                f" {targets}: choose larger tiles, or parts=1"
            )
        scratch += targets * all_parts * tiles.block_n * tiles.block_m
    # Only what several programs share needs the two.
    shared: list[Any] = [None, None]
    new = [jax.ShapeDtypeStruct((tokens, sum(outputs.values())), dtype)]
    if scratch:
        shared = [given_or_new(signals, SIGNALS, jnp.int32)]
        new.insert(0, jax.ShapeDtypeStruct((scratch,), jnp.float32))
    *_, y = launch(
        linear_tiles,
        (
            *(x, scalar(layer)),
            *map_parameters([(m.weight, m.bias) for m in maps]),
            *map_parameters([_arrays(m.pages if sites else None) for m in maps]),
            *(order, group_of_row, *shared),
        ),
        new,
        None,
        Launch((programs,), tiles.num_warps, stages, registers),
        **outputs,
        WIDTH=width,
        MAPS=len(maps),
        TOKENS=tokens,
        PARTS=parts,
        ALL_PARTS=all_parts,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=block_k,
        STAGES=stages,
        LAUNCH_SIGNALS=LAUNCH_SIGNALS,
        PRECISION=precision(x.dtype),
        **lora,
    )
    return y


def _arrays(pages: SitePages | None) -> tuple[Array | None, ...]:
    """What a launch needs of a map's pages."""
    if pages is None:
        return None, None, None, None
    return pages.a_pool, pages.b_pool, pages.table, pages.scaling


def _lora_constants(
    tokens: int, width: int, maps: int, sites: Sequence[SitePages], stack: int
) -> dict[str, int]:
    """Compile-time parameters of what adapters add; the base model has neither programs nor pages.

    Args:
        tokens: rows of the launch.
        width: columns of the input.
        maps: of the launch.
        sites: pages of those maps that adapters change.
        stack: pages that are multiplied at once.
    """
    adapters = max_pages = pages = shrinks = shrink_k = shrink_parts = 0
    if sites:
        _, _, adapters, max_pages, _ = sites[0].table.shape
        # A stack has several pages of one adapter where adapters have several.
        pages = min(triton.next_power_of_2(max_pages), 4)
        # A run of rows ends with its adapter, or with its window.
        runs = min(tokens, adapters + tokens // WINDOW_ROWS)
        shrunk = runs * maps * max_pages
        shrink_k = 256 if shrunk * triton.cdiv(width, 256) <= MAX_SHRINKS else 512
        shrink_k = min(shrink_k, max(triton.next_power_of_2(width), 16))
        shrink_parts = triton.cdiv(width, shrink_k)
        shrinks = shrunk * shrink_parts
    return {
        "TOKENS_POW2": max(triton.next_power_of_2(tokens), WINDOW_ROWS),
        "SHRINKS": shrinks,
        "SHRINK_PARTS": shrink_parts,
        "SHRINK_K": shrink_k,
        "WINDOW_ROWS": WINDOW_ROWS,
        "NUM_ADAPTERS": adapters,
        "MAX_PAGES": max_pages,
        "PAGE_ROWS": PAGE_ROWS,
        "Z_COLUMNS": max_pages * PAGE_ROWS,
        "SLOTS": max(stack, 2 * pages) // pages if pages else 0,
        "PAGES": pages,
        "PAGE_LANES": triton.next_power_of_2(max_pages) if max_pages else 0,
    }


@triton.jit
def linear_tiles(
    x_ptr,
    layer_ptr,
    weight_0_ptr,
    bias_0_ptr,
    weight_1_ptr,
    bias_1_ptr,
    weight_2_ptr,
    bias_2_ptr,
    a_0_ptr,
    b_0_ptr,
    table_0_ptr,
    scaling_0_ptr,
    a_1_ptr,
    b_1_ptr,
    table_1_ptr,
    scaling_1_ptr,
    a_2_ptr,
    b_2_ptr,
    table_2_ptr,
    scaling_2_ptr,
    order_ptr,
    group_ptr,
    signals_ptr,
    scratch_ptr,
    y_ptr,
    WIDTH: tl.constexpr,
    OUT_0: tl.constexpr,
    OUT_1: tl.constexpr,
    OUT_2: tl.constexpr,
    MAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOKENS_POW2: tl.constexpr,
    SHRINKS: tl.constexpr,
    SHRINK_PARTS: tl.constexpr,
    SHRINK_K: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    ALL_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    LAUNCH_SIGNALS: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE_LANES: tl.constexpr,
):
    """The first ``SHRINKS`` programs shrink, the others have a part of a tile of the output.

    With LoRA the last one clears the counters.
    """
    program = tl.program_id(0)
    layer = tl.load(layer_ptr)
    shrunk_ptr = None if SHRINKS == 0 else signals_ptr + 1
    # Of one map, and of one part.
    Z_MAP: tl.constexpr = TOKENS * Z_COLUMNS
    Z_PART: tl.constexpr = MAPS * Z_MAP
    TILES: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    BLOCKS_0: tl.constexpr = (OUT_0 + BLOCK_N - 1) // BLOCK_N
    BLOCKS_1: tl.constexpr = (OUT_1 + BLOCK_N - 1) // BLOCK_N
    BLOCKS_2: tl.constexpr = (OUT_2 + BLOCK_N - 1) // BLOCK_N
    TARGETS: tl.constexpr = TILES * (BLOCKS_0 + BLOCKS_1 + BLOCKS_2)
    LAST: tl.constexpr = SHRINKS + TARGETS * ALL_PARTS
    if program < SHRINKS:
        if SHRINKS > 0:
            part, number = program % SHRINK_PARTS, program // SHRINK_PARTS % MAPS
            page = program // (SHRINK_PARTS * MAPS)
            if is_given(number, (a_0_ptr, a_1_ptr, a_2_ptr)):
                shrink_run(
                    page // MAX_PAGES, page % MAX_PAGES, part, x_ptr, layer, order_ptr, group_ptr,
                    of_map(number, (a_0_ptr, a_1_ptr, a_2_ptr)),
                    of_map(number, (table_0_ptr, table_1_ptr, table_2_ptr)),
                    of_map(number, (scaling_0_ptr, scaling_1_ptr, scaling_2_ptr)),
                    scratch_ptr + part * Z_PART + number * Z_MAP,
                    WIDTH, TOKENS, TOKENS_POW2, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS,
                    SHRINK_K, WINDOW_ROWS, PRECISION,
                )  # fmt: skip
            signal(shrunk_ptr)
    elif program == LAST:
        if SHRINKS > 0:
            # When all others have gone on, nobody looks at the counters any more.
            wait_for(signals_ptr, TARGETS)
            wait_for(shrunk_ptr, SHRINKS)
            clear(signals_ptr, 2)
    else:
        program -= SHRINKS
        target, part = program // PARTS, program % PARTS
        if ALL_PARTS > PARTS:
            # Those that wait for the shrink come last.
            if target >= TARGETS:
                target, part = program - TARGETS * PARTS, PARTS
        # Tiles of the same columns are neighbours: all but one find the weights in the L2 cache.
        number, block, out, start = find_block(target // TILES, OUT_0, OUT_1, OUT_2, BLOCK_N)
        first = target % TILES * BLOCK_M
        rows = first + tl.arange(0, BLOCK_M)
        inside = rows < TOKENS
        token = rows
        if order_ptr is not None:
            # Past the last real row the order is -1; there, rows are tokens of padding.
            order = tl.load(order_ptr + rows, mask=inside, other=-1)
            token = tl.where(order >= 0, order, rows)
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        column = columns
        if OUT_0 % BLOCK_N != 0 or OUT_1 % BLOCK_N != 0 or OUT_2 % BLOCK_N != 0:
            # Columns past the last repeat it, so that loads need no mask.
            column = tl.minimum(columns, out - 1)
        if SHRINKS > 0:
            b_ptr = of_map(number, (b_0_ptr, b_1_ptr, b_2_ptr))
            table_ptr = of_map(number, (table_0_ptr, table_1_ptr, table_2_ptr))
            table_ptr += (layer * 2 + 1) * NUM_ADAPTERS * MAX_PAGES
            expands = (ALL_PARTS == 1) | (part == PARTS)
            has_pages = expands & is_given(number, (b_0_ptr, b_1_ptr, b_2_ptr))
            if BLOCK_M == 1:
                adapter = tl.load(group_ptr) - 1
                has_pages = has_pages & (adapter >= 0)
                rank = tl.arange(0, PAGE_LANES * PAGE_ROWS)
                rank_row = find_rank_rows(
                    rank, tl.where(has_pages, adapter, -1), table_ptr + adapter * MAX_PAGES,
                    1, MAX_PAGES, PAGE_ROWS,
                )  # fmt: skip
                b = load_rank_rows(rank_row, column, b_ptr, out)
            else:
                adapter, slot, num_slots = tile_adapters(
                    first, rows, inside, 0, group_ptr, NUM_ADAPTERS
                )
                has_pages = has_pages & (num_slots > 0)
                # Looked up before the products, which then hide the wait.
                slot_adapter, mine = find_adapters(0, tl.where(has_pages, adapter, -1), slot, SLOTS)
                pool_row = find_pages(slot_adapter, 0, table_ptr, 1, MAX_PAGES, PAGES)
        weight_ptr = of_map(number, (weight_0_ptr, weight_1_ptr, weight_2_ptr))
        weight_ptr += layer.to(tl.int64) * (out * WIDTH)
        if BLOCK_M == 1:
            total = multiply_row(x_ptr, weight_ptr, column, WIDTH, BLOCK_N, BLOCK_K, STAGES)
        else:
            total = multiply(
                part, x_ptr, weight_ptr, token, inside, column,
                WIDTH, PARTS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
        # Added first of all: of a sum of one step the compiler makes one that starts from the bias,
        # and it must do so with LoRA, too, or rows of the base model would be rounded otherwise.
        bias_ptr = of_map(number, (bias_0_ptr, bias_1_ptr, bias_2_ptr))
        if bias_ptr is not None:
            has_bias = is_given(number, (bias_0_ptr, bias_1_ptr, bias_2_ptr)) & (part == 0)
            bias = tl.load(bias_ptr + layer * out + column, mask=has_bias, other=0.0)
            total += bias.to(tl.float32)[:, None]
        if SHRINKS > 0:
            if has_pages:
                z_ptr = scratch_ptr + number * Z_MAP
                if BLOCK_M == 1:
                    wait_for_shrinks(signals_ptr, SHRINKS)
                    z = sum_parts(z_ptr, rank, rank_row, b, SHRINK_PARTS, Z_PART)
                    total += tl.sum(z[:, None] * b.to(tl.float32), 0)[:, None]
                else:
                    total = expand(
                        total, rows, adapter, slot, num_slots, mine, pool_row, columns, table_ptr,
                        b_ptr, out, z_ptr, signals_ptr,
                        SHRINKS, SHRINK_PARTS, Z_PART, MAX_PAGES, PAGE_ROWS, Z_COLUMNS, BLOCK_M,
                        SLOTS, PAGES, PRECISION,
                    )  # fmt: skip
            elif expands:
                count(signals_ptr)
        complete = True
        if ALL_PARTS > 1:
            SUMS: tl.constexpr = BLOCK_N * BLOCK_M
            lane = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
            sums_ptrs = scratch_ptr + SHRINK_PARTS * Z_PART + target * (ALL_PARTS * SUMS) + lane
            tl.store(sums_ptrs + part * SUMS, total)
            tl.debug_barrier()  # Stores of all threads come before the one that counts.
            parts_ptr = signals_ptr + LAUNCH_SIGNALS + target
            complete = tl.atomic_add(parts_ptr, 1, sem="acq_rel", scope="gpu") == ALL_PARTS - 1
        if complete:
            if ALL_PARTS > 1:
                tl.store(parts_ptr, 0)
                total = tl.load(sums_ptrs)
                for other in tl.static_range(1, ALL_PARTS):
                    total += tl.load(sums_ptrs + other * SUMS)
            tl.store(
                y_ptr + start + token[:, None] * (OUT_0 + OUT_1 + OUT_2) + columns[None, :],
                tl.trans(total.to(y_ptr.dtype.element_ty)),
                mask=inside[:, None] & (columns < out)[None, :],
            )


@triton.jit
def multiply(
    part,
    x_ptr,
    weight_ptr,
    token,
    inside,
    column,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Part of the sums ``[columns, rows]``; zeros past the last part."""
    STEPS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    PART: tl.constexpr = (STEPS + PARTS - 1) // PARTS * BLOCK_K
    depth = tl.arange(0, BLOCK_K)
    # Rows that do not exist are not loaded: all programs would want the same lines of the cache.
    x_ptrs = x_ptr + tl.where(inside, token, 0)[None, :] * WIDTH + depth[:, None]
    weight_ptrs = weight_ptr + column[:, None] * WIDTH + depth[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if PARTS == 1:
        begin, end = 0, WIDTH
    else:
        begin = part * PART
        end = tl.minimum(begin + PART, WIDTH)
    for k in range(begin, end, BLOCK_K):
        if WIDTH % BLOCK_K == 0:
            x = tl.load(x_ptrs + k, mask=inside[None, :], other=0.0)
            weight = tl.load(weight_ptrs + k)
        else:
            left = k + depth < WIDTH
            x = tl.load(x_ptrs + k, mask=inside[None, :] & left[:, None], other=0.0)
            weight = tl.load(weight_ptrs + k, mask=left[None, :], other=0.0)
        total = tl.dot(weight, x, total, input_precision=PRECISION)
    return total


@triton.jit
def multiply_row(
    x_ptr,
    weight_ptr,
    column,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All sums ``[columns, 1]`` of the only row; many steps are copied ahead."""
    depth = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + column[:, None] * WIDTH + depth[None, :]
    products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k in tl.range(0, WIDTH, BLOCK_K, num_stages=STAGES):
        if WIDTH % BLOCK_K == 0:
            x, weight = tl.load(x_ptr + k + depth), tl.load(weight_ptrs + k)
        else:
            left = k + depth < WIDTH
            x = tl.load(x_ptr + k + depth, mask=left, other=0.0)
            weight = tl.load(weight_ptrs + k, mask=left[None, :], other=0.0)
        products += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    return tl.sum(products, 1)[:, None]


@triton.jit
def wait_for_shrinks(signals_ptr, SHRINKS: tl.constexpr):
    """Wait for the rank activations, and say that this program has not to wait any more."""
    wait_for(signals_ptr + 1, SHRINKS)
    count(signals_ptr)


@triton.jit
def expand(
    total,
    rows,
    adapter,
    slot,
    num_slots,
    mine,
    pool_row,
    columns,
    table_ptr,
    b_ptr,
    out,
    z_ptr,
    signals_ptr,
    SHRINKS: tl.constexpr,
    SHRINK_PARTS: tl.constexpr,
    Z_PART: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``total + (z · B)ᵀ``, for ``SLOTS`` adapters and ``PAGES`` pages of each at a time.

    ``mine`` and ``pool_row`` are those of the first step.
    """
    b = load_pages(pool_row, columns, b_ptr, out, SLOTS, PAGES, PAGE_ROWS)
    wait_for_shrinks(signals_ptr, SHRINKS)
    for first_page in tl.static_range(0, MAX_PAGES, PAGES):
        z = load_ranks(rows, adapter, first_page, z_ptr, Z_COLUMNS, PAGES, PAGE_ROWS)
        for part in tl.static_range(1, SHRINK_PARTS):
            z += load_ranks(
                rows, adapter, first_page, z_ptr + part * Z_PART, Z_COLUMNS, PAGES, PAGE_ROWS
            )
        z = z.to(b_ptr.dtype.element_ty)
        for first_slot in tl.range(0, num_slots, SLOTS, num_stages=1):
            if (first_slot > 0) | (first_page > 0):
                slot_adapter, mine = find_adapters(first_slot, adapter, slot, SLOTS)
                pool_row = find_pages(slot_adapter, first_page, table_ptr, 1, MAX_PAGES, PAGES)
                b = load_pages(pool_row, columns, b_ptr, out, SLOTS, PAGES, PAGE_ROWS)
            stacked = stack_ranks(z, mine, pool_row, ROWS, SLOTS, PAGES, PAGE_ROWS)
            total = tl.dot(tl.trans(b), tl.trans(stacked), total, input_precision=PRECISION)
    return total


@triton.jit
def shrink_run(
    run,
    page,
    part,
    x_ptr,
    layer,
    order_ptr,
    group_ptr,
    a_ptr,
    table_ptr,
    scaling_ptr,
    z_ptr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    TOKENS_POW2: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One of the parts of ``z = scaling · A · x``, for one page and the rows of one run.

    A run is the rows of one adapter among ``WINDOW_ROWS`` neighbours. There may be fewer.
    """
    every = tl.arange(0, TOKENS_POW2)
    group = tl.load(group_ptr + every, mask=every < TOKENS, other=-1)
    before = tl.load(group_ptr + every - 1, mask=(every < TOKENS) & (every > 0), other=-1)
    # Rows of the base model have no run, nor do those past the last real one, whose group is -1.
    begins = ((group > 0) & ((group != before) | (every % WINDOW_ROWS == 0))).to(tl.int32)
    chosen = (begins > 0) & (tl.cumsum(begins, 0) - 1 == run)
    run_group = tl.max(tl.where(chosen, group, 0), 0)
    if run_group > 0:
        adapter = run_group - 1
        pool_row = tl.load(table_ptr + (layer * 2 * NUM_ADAPTERS + adapter) * MAX_PAGES + page)
        scaling = tl.load(scaling_ptr + layer * NUM_ADAPTERS + adapter)
        window = tl.max(tl.where(chosen, every, 0), 0) // WINDOW_ROWS * WINDOW_ROWS
        rows = window + tl.arange(0, WINDOW_ROWS)
        mine = tl.load(group_ptr + rows, mask=rows < TOKENS, other=-1) == run_group
        token = tl.load(order_ptr + rows, mask=mine, other=0)
        if pool_row >= 0:
            rank = tl.arange(0, PAGE_ROWS)
            depth = part * BLOCK_K + tl.arange(0, BLOCK_K)
            a_ptrs = a_ptr + pool_row.to(tl.int64) * (PAGE_ROWS * WIDTH)
            a_ptrs += rank[:, None] * WIDTH + depth[None, :]
            x_ptrs = x_ptr + token[None, :] * WIDTH + depth[:, None]
            if WIDTH % BLOCK_K == 0:
                a, x = tl.load(a_ptrs), tl.load(x_ptrs, mask=mine[None, :], other=0.0)
            else:
                left = depth < WIDTH
                a = tl.load(a_ptrs, mask=left[None, :], other=0.0)
                x = tl.load(x_ptrs, mask=mine[None, :] & left[:, None], other=0.0)
            z = tl.zeros([PAGE_ROWS, WINDOW_ROWS], tl.float32)
            z = tl.dot(a, x, z, input_precision=PRECISION) * scaling
            z_ptrs = z_ptr + rows[None, :] * Z_COLUMNS + page * PAGE_ROWS + rank[:, None]
            tl.store(z_ptrs, z, mask=mine[None, :])
