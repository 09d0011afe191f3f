"""Linear maps with LoRA in Triton, whose weights are read where they are in the stack.

With few rows all is one launch. The pages of A are columns like those of a map, which the first
programs multiply. Each of the others has some columns of one map, or, where these are too few to
keep the memory busy, part of their sums; whoever completes the last part of a tile adds up all of
them, always in the same order. The first part adds what adapters do: when the last of its weights
are on their way, it waits for the rank activations. See :mod:`moelora_kernels.waiting` for why
waiting is safe.

The weights are the left operand, so that a tile has no more rows than the batch. For one row the
products are on the ordinary units.
"""

from collections.abc import Sequence

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
from moelora_kernels.fused_experts.triton_one_token import find_rank_rows, load_rank_rows
from moelora_kernels.tuning.tiles import LinearTiles
from moelora_kernels.types import PAGE_ROWS, SIGNALS, Buffer, LinearMap, TokenSort
from moelora_kernels.waiting import clear, leave, signal, wait_for

#: Maps that one launch has parameters for.
MAX_MAPS = 3
#: Programs that share the sums of a page, at most.
SHRINK_PARTS = 4
#: Programs that shrink, above which they do not share sums: the products would begin late.
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
    if len(maps) > MAX_MAPS:
        raise ValueError(f"at most {MAX_MAPS} maps can share a launch, not {len(maps)}")
    tokens, width = x.shape
    outputs = [m.weight.shape[1] for m in maps]
    missing = MAX_MAPS - len(maps)
    sites = [] if sort is None else [m.pages for m in maps if m.pages is not None]
    block_k = min(tiles.block_k, max(triton.next_power_of_2(width), 16))
    # No part is empty.
    steps = triton.cdiv(width, block_k)
    parts = triton.cdiv(steps, triton.cdiv(steps, tiles.parts))
    row_tiles = triton.cdiv(tokens, tiles.block_m)
    targets = row_tiles * sum(triton.cdiv(out, tiles.block_n) for out in outputs)
    shrinks = shrink_parts = adapters = max_pages = max_rank = pages = 0
    # Parts of rank activations, then parts of sums.
    scratch = 0
    if sites:
        _, _, adapters, max_pages, _ = sites[0].table.shape
        max_rank = sites[0].max_rank
        # A stack has several pages of one adapter where adapters have several.
        pages = min(triton.next_power_of_2(max_pages), 4)
        # A tile of rows has so many adapters at most.
        present = min(tiles.block_m, tokens, adapters)
        shrinks = triton.cdiv(present * max_rank, tiles.block_n) * row_tiles * len(maps)
        most_parts = max(1, min(SHRINK_PARTS, MAX_SHRINKS // shrinks))
        shrink_parts = triton.cdiv(steps, triton.cdiv(steps, most_parts))
        shrinks *= shrink_parts
        scratch = shrink_parts * len(maps) * tokens * max_rank
    if parts > 1:
        if LAUNCH_SIGNALS + targets > SIGNALS[0]:
            raise ValueError(
                f"a launch has signals for {SIGNALS[0] - LAUNCH_SIGNALS} tiles, not for"
                f" {targets}: choose larger tiles, or parts=1"
            )
        scratch += targets * parts * tiles.block_n * tiles.block_m
    new = [jax.ShapeDtypeStruct((tokens, sum(outputs)), dtype)]
    # Only what several programs share needs the two.
    shared: list[Buffer | None] = [None, None]
    if scratch:
        shared = [given_or_new(signals, SIGNALS, jnp.int32)]
        new.insert(0, jax.ShapeDtypeStruct((scratch,), jnp.float32))
    weights: list[Array | None] = []
    factors: list[Array | None] = []
    for m in maps:
        weights += [m.weight, m.bias]
        site = None if sort is None else m.pages
        factors += [None] * 4 if site is None else [*site]
    *_, y = launch(
        linear_tiles,
        (
            *(x, scalar(layer), *weights, *[None] * (2 * missing)),
            *(*factors, *[None] * (4 * missing)),
            *([None, None] if sort is None else [sort.order, sort.group_of_row]),
            *shared,
        ),
        new,
        None,
        Launch((shrinks + targets * parts,), tiles.num_warps, tiles.num_stages),
        **{f"OUT_{number}": size for number, size in enumerate([*outputs, *[0] * missing])},
        WIDTH=width,
        MAPS=len(maps),
        TOKENS=tokens,
        SHRINKS=shrinks,
        SHRINK_PARTS=shrink_parts,
        PARTS=parts,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=block_k,
        STAGES=tiles.num_stages,
        LAUNCH_SIGNALS=LAUNCH_SIGNALS,
        PRECISION=precision(x.dtype),
        NUM_ADAPTERS=adapters,
        MAX_PAGES=max_pages,
        PAGE_ROWS=PAGE_ROWS,
        Z_COLUMNS=max_rank,
        SLOTS=max(tiles.stack, 2 * pages) // pages if pages else 0,
        PAGES=pages,
    )
    return y


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
    OUT_0: tl.constexpr,
    OUT_1: tl.constexpr,
    OUT_2: tl.constexpr,
    WIDTH: tl.constexpr,
    MAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    SHRINKS: tl.constexpr,
    SHRINK_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
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
):
    """The first ``SHRINKS`` programs shrink, the others have a part of a tile of the output."""
    program = tl.program_id(0)
    layer = tl.load(layer_ptr)
    TILES: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    # Of one map, and of one part.
    Z_MAP: tl.constexpr = TOKENS * Z_COLUMNS
    Z_PART: tl.constexpr = MAPS * Z_MAP
    if program < SHRINKS:
        if SHRINKS > 0:
            part, number = program % SHRINK_PARTS, program // SHRINK_PARTS % MAPS
            tile = program // (SHRINK_PARTS * MAPS)
            if is_given(number, a_0_ptr, a_1_ptr, a_2_ptr):
                shrink_tile(
                    tile // TILES, tile % TILES, part, x_ptr, layer, order_ptr, group_ptr,
                    of_map(number, a_0_ptr, a_1_ptr, a_2_ptr),
                    of_map(number, table_0_ptr, table_1_ptr, table_2_ptr),
                    of_map(number, scaling_0_ptr, scaling_1_ptr, scaling_2_ptr),
                    scratch_ptr + part * Z_PART + number * Z_MAP,
                    WIDTH, TOKENS, SHRINK_PARTS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
                    NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS,
                )  # fmt: skip
            signal(signals_ptr + 1)
    else:
        TARGETS: tl.constexpr = TILES * (
            (OUT_0 + BLOCK_N - 1) // BLOCK_N
            + (OUT_1 + BLOCK_N - 1) // BLOCK_N
            + (OUT_2 + BLOCK_N - 1) // BLOCK_N
        )
        STEPS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
        PART: tl.constexpr = (STEPS + PARTS - 1) // PARTS * BLOCK_K
        program -= SHRINKS
        target, part = program // PARTS, program % PARTS
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
        # Columns past the last repeat it, so that loads need no mask.
        column = tl.minimum(columns, out - 1)
        weight_ptr = of_map(number, weight_0_ptr, weight_1_ptr, weight_2_ptr)
        weight_ptr += layer.to(tl.int64) * (out * WIDTH)
        if PARTS == 1:
            begin, end = 0, WIDTH
        else:
            begin = part * PART
            end = tl.minimum(begin + PART, WIDTH)
        depth = tl.arange(0, BLOCK_K)
        weight_ptrs = weight_ptr + column[:, None] * WIDTH + depth[None, :]
        # Rows that do not exist are not loaded: all programs would want the same cache lines.
        x_ptrs = x_ptr + tl.where(inside, token, 0)[None, :] * WIDTH + depth[:, None]
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if BLOCK_M == 1:
            products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        if SHRINKS > 0:
            b_ptr = of_map(number, b_0_ptr, b_1_ptr, b_2_ptr)
            table_ptr = of_map(number, table_0_ptr, table_1_ptr, table_2_ptr)
            table_ptr += (layer * 2 + 1) * NUM_ADAPTERS * MAX_PAGES
            has_pages = (part == 0) & is_given(number, b_0_ptr, b_1_ptr, b_2_ptr)
            z_ptr = scratch_ptr + number * Z_MAP
            # Then the last step is on its way.
            waiting_step = begin + tl.maximum(tl.cdiv(end - begin, BLOCK_K) - STAGES, 0) * BLOCK_K
            if BLOCK_M == 1:
                adapter = tl.load(group_ptr) - 1
                has_pages = has_pages & (adapter >= 0)
                added = tl.zeros([BLOCK_N, 1], tl.float32)
            else:
                adapter, slot, num_slots = tile_adapters(
                    first, rows, inside, 0, group_ptr, NUM_ADAPTERS
                )
                has_pages = has_pages & (num_slots > 0)
                # Looked up before the products, which then hide the wait.
                slot_adapter, mine = find_adapters(0, tl.where(has_pages, adapter, -1), slot, SLOTS)
                pool_row = find_pages(slot_adapter, 0, table_ptr, 1, MAX_PAGES, PAGES)
                z = tl.zeros([BLOCK_M, PAGES * PAGE_ROWS], tl.float32)
                b = tl.zeros([SLOTS * PAGES * PAGE_ROWS, BLOCK_N], b_ptr.dtype.element_ty)
        for k in range(begin, end, BLOCK_K):
            x, weight = load_step(
                x_ptr, x_ptrs, weight_ptrs, inside, depth, k, WIDTH, BLOCK_M, BLOCK_K
            )
            if BLOCK_M > 1:
                total = tl.dot(weight, x, total, input_precision=PRECISION)
            if SHRINKS > 0:
                # In the loop, or nothing would be copied ahead while the program waits.
                if (part == 0) & (k == waiting_step):
                    if has_pages:
                        wait_for(signals_ptr + 1, SHRINKS)
                        if BLOCK_M == 1:
                            added = expand_row(
                                column, adapter, table_ptr, b_ptr, out, z_ptr,
                                SHRINK_PARTS, Z_PART, MAX_PAGES, PAGE_ROWS, PAGES,
                            )  # fmt: skip
                        else:
                            z = sum_ranks(
                                rows, adapter, 0, z_ptr,
                                SHRINK_PARTS, Z_PART, Z_COLUMNS, PAGES, PAGE_ROWS,
                            )  # fmt: skip
                            b = load_pages(pool_row, columns, b_ptr, out, SLOTS, PAGES, PAGE_ROWS)
                    if leave(signals_ptr, TARGETS):
                        wait_for(signals_ptr + 1, SHRINKS)
                        clear(signals_ptr, 2)
            if BLOCK_M == 1:
                products += weight.to(tl.float32) * x.to(tl.float32)[None, :]
        if BLOCK_M == 1:
            total = tl.sum(products, 1)[:, None]
        # Added first of all: of a sum of one step the compiler makes one that starts from the bias,
        # and it must do so with LoRA, too, or rows of the base model would be rounded otherwise.
        bias_ptr = of_map(number, bias_0_ptr, bias_1_ptr, bias_2_ptr)
        if bias_ptr is not None:
            has_bias = is_given(number, bias_0_ptr, bias_1_ptr, bias_2_ptr) & (part == 0)
            bias = tl.load(bias_ptr + layer * out + column, mask=has_bias, other=0.0)
            total += bias.to(tl.float32)[:, None]
        if SHRINKS > 0:
            if has_pages:
                if BLOCK_M == 1:
                    total += added
                else:
                    total = expand(
                        total, z, b, rows, adapter, slot, num_slots, mine, pool_row, columns,
                        table_ptr, b_ptr, out, z_ptr,
                        SHRINK_PARTS, Z_PART, MAX_PAGES, PAGE_ROWS, Z_COLUMNS, BLOCK_M,
                        SLOTS, PAGES, PRECISION,
                    )  # fmt: skip
        complete = True
        if PARTS > 1:
            SUMS: tl.constexpr = BLOCK_N * BLOCK_M
            lane = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
            sums_ptrs = scratch_ptr + SHRINK_PARTS * Z_PART + target * (PARTS * SUMS) + lane
            tl.store(sums_ptrs + part * SUMS, total)
            tl.debug_barrier()  # Stores of all threads come before the one that counts.
            parts_ptr = signals_ptr + LAUNCH_SIGNALS + target
            complete = tl.atomic_add(parts_ptr, 1, sem="acq_rel", scope="gpu") == PARTS - 1
        if complete:
            if PARTS > 1:
                tl.store(parts_ptr, 0)
                total = tl.load(sums_ptrs)
                for other in tl.static_range(1, PARTS):
                    total += tl.load(sums_ptrs + other * SUMS)
            tl.store(
                y_ptr + start + token[:, None] * (OUT_0 + OUT_1 + OUT_2) + columns[None, :],
                tl.trans(total.to(y_ptr.dtype.element_ty)),
                mask=inside[:, None] & (columns < out)[None, :],
            )


@triton.jit
def shrink_tile(
    block,
    tile,
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
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
):
    """A part of ``z = scaling · A · x`` for a tile of sorted rows and some of its adapters' ranks.

    All rows meet all of these ranks, and each keeps its own.
    """
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    order = tl.load(order_ptr + rows, mask=rows < TOKENS, other=-1)
    lane = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if BLOCK_M == 1:
        adapter = tl.load(group_ptr + rows) - 1
        lane_adapter = tl.load(group_ptr + tl.zeros_like(lane)) - 1
        mine = ((lane < Z_COLUMNS) & (lane_adapter >= 0))[:, None]
    else:
        adapter, slot, _ = tile_adapters(first, rows, order >= 0, 0, group_ptr, NUM_ADAPTERS)
        mine = slot[None, :] == (lane // Z_COLUMNS)[:, None]
        lane_adapter = tl.max(tl.where(mine, adapter[None, :], -1), 1)
    table_ptr += layer * (2 * NUM_ADAPTERS * MAX_PAGES)
    rank = lane % Z_COLUMNS
    entry = lane_adapter * MAX_PAGES + rank // PAGE_ROWS
    pool_row = tl.load(table_ptr + entry, mask=lane_adapter >= 0, other=-1)
    scaling_ptrs = scaling_ptr + layer * NUM_ADAPTERS + lane_adapter
    scaling = tl.load(scaling_ptrs, mask=lane_adapter >= 0, other=0.0)
    any_row = tl.max(pool_row, 0)
    if any_row >= 0:
        # Lanes without a page repeat another's, and store nothing.
        rank_row = tl.where(pool_row >= 0, pool_row, any_row).to(tl.int64) * PAGE_ROWS
        rank_row += rank % PAGE_ROWS
        STEPS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
        PART: tl.constexpr = (STEPS + PARTS - 1) // PARTS * BLOCK_K
        begin = part * PART
        depth = tl.arange(0, BLOCK_K)
        a_ptrs = a_ptr + rank_row[:, None] * WIDTH + depth[None, :]
        x_ptrs = x_ptr + tl.maximum(order, 0)[None, :] * WIDTH + depth[:, None]
        z = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for k in range(begin, tl.minimum(begin + PART, WIDTH), BLOCK_K):
            x, a = load_step(x_ptr, x_ptrs, a_ptrs, adapter >= 0, depth, k, WIDTH, BLOCK_M, BLOCK_K)
            if BLOCK_M == 1:
                z += tl.sum(a.to(tl.float32) * x.to(tl.float32)[None, :], 1)[:, None]
            else:
                z = tl.dot(a, x, z, input_precision=PRECISION)
        z_ptrs = z_ptr + rows[None, :] * Z_COLUMNS + rank[:, None]
        tl.store(z_ptrs, z * scaling[:, None], mask=mine & (pool_row >= 0)[:, None])


@triton.jit
def of_map(number, first, second, third):
    """Of three maps' pointers that of one; of a map that has none, any."""
    if first is None:
        if second is None:
            pointer = third
        else:
            pointer = second
            if third is not None:
                pointer = tl.where(number == 2, third, pointer)
    else:
        pointer = first
        if second is not None:
            pointer = tl.where(number == 1, second, pointer)
        if third is not None:
            pointer = tl.where(number == 2, third, pointer)
    return pointer


@triton.jit
def is_given(number, first, second, third):
    """Whether one of three maps has such a pointer."""
    given = number < 0
    if first is not None:
        given = given | (number == 0)
    if second is not None:
        given = given | (number == 1)
    if third is not None:
        given = given | (number == 2)
    return given


@triton.jit
def find_block(
    block,
    OUT_0: tl.constexpr,
    OUT_1: tl.constexpr,
    OUT_2: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The map of a block of columns, the block's number in it, its outputs, the first of them."""
    BLOCKS_0: tl.constexpr = (OUT_0 + BLOCK_N - 1) // BLOCK_N
    BLOCKS_1: tl.constexpr = (OUT_1 + BLOCK_N - 1) // BLOCK_N
    number = (block >= BLOCKS_0).to(tl.int32) + (block >= BLOCKS_0 + BLOCKS_1).to(tl.int32)
    block -= tl.where(number == 0, 0, tl.where(number == 1, BLOCKS_0, BLOCKS_0 + BLOCKS_1))
    out = tl.where(number == 0, OUT_0, tl.where(number == 1, OUT_1, OUT_2))
    start = tl.where(number == 0, 0, tl.where(number == 1, OUT_0, OUT_0 + OUT_1))
    if OUT_0 % 8 == 0 and OUT_1 % 8 == 0 and OUT_2 % 8 == 0:
        # The compiler does not see it through a choice, and would load pages number by number.
        out, start = tl.multiple_of(out, 8), tl.multiple_of(start, 8)
    return number, block, out, start


@triton.jit
def load_step(
    x_ptr,
    x_ptrs,
    weight_ptrs,
    inside,
    depth,
    k,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What one step multiplies: ``[BLOCK_K, rows]`` of x, or of the only row, and the weights."""
    if BLOCK_M == 1:
        if WIDTH % BLOCK_K == 0:
            x, weight = tl.load(x_ptr + k + depth), tl.load(weight_ptrs + k)
        else:
            left = k + depth < WIDTH
            x = tl.load(x_ptr + k + depth, mask=left, other=0.0)
            weight = tl.load(weight_ptrs + k, mask=left[None, :], other=0.0)
    else:
        if WIDTH % BLOCK_K == 0:
            x = tl.load(x_ptrs + k, mask=inside[None, :], other=0.0)
            weight = tl.load(weight_ptrs + k)
        else:
            left = k + depth < WIDTH
            x = tl.load(x_ptrs + k, mask=inside[None, :] & left[:, None], other=0.0)
            weight = tl.load(weight_ptrs + k, mask=left[None, :], other=0.0)
    return x, weight


@triton.jit
def sum_ranks(
    rows,
    adapter,
    first_page,
    z_ptr,
    PARTS: tl.constexpr,
    Z_PART: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
):
    """Rank activations ``[rows, PAGES * PAGE_ROWS]`` whose parts are added up."""
    z = load_ranks(rows, adapter, first_page, z_ptr, Z_COLUMNS, PAGES, PAGE_ROWS)
    for part in tl.static_range(1, PARTS):
        part_ptr = z_ptr + part * Z_PART
        z += load_ranks(rows, adapter, first_page, part_ptr, Z_COLUMNS, PAGES, PAGE_ROWS)
    return z


@triton.jit
def expand(
    total,
    z,
    b,
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

    ``z``, ``b``, ``mine`` and ``pool_row`` are those of the first step.
    """
    for first_page in tl.static_range(0, MAX_PAGES, PAGES):
        if first_page > 0:
            z = sum_ranks(
                rows, adapter, first_page, z_ptr,
                SHRINK_PARTS, Z_PART, Z_COLUMNS, PAGES, PAGE_ROWS,
            )  # fmt: skip
        rounded = z.to(b_ptr.dtype.element_ty)
        for first_slot in tl.range(0, num_slots, SLOTS, num_stages=1):
            if (first_slot > 0) | (first_page > 0):
                slot_adapter, mine = find_adapters(first_slot, adapter, slot, SLOTS)
                pool_row = find_pages(slot_adapter, first_page, table_ptr, 1, MAX_PAGES, PAGES)
                b = load_pages(pool_row, columns, b_ptr, out, SLOTS, PAGES, PAGE_ROWS)
            stacked = stack_ranks(rounded, mine, pool_row, ROWS, SLOTS, PAGES, PAGE_ROWS)
            total = tl.dot(tl.trans(b), tl.trans(stacked), total, input_precision=PRECISION)
    return total


@triton.jit
def expand_row(
    column,
    adapter,
    table_ptr,
    b_ptr,
    out,
    z_ptr,
    SHRINK_PARTS: tl.constexpr,
    Z_PART: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    PAGES: tl.constexpr,
):
    """``z · B`` of the only row, ``[columns, 1]``."""
    total = tl.zeros([column.shape[0]], tl.float32)
    for first_page in tl.static_range(0, MAX_PAGES, PAGES):
        rank = first_page * PAGE_ROWS + tl.arange(0, PAGES * PAGE_ROWS)
        rank_row = find_rank_rows(
            rank, adapter, table_ptr + adapter * MAX_PAGES, 1, MAX_PAGES, PAGE_ROWS
        )
        b = load_rank_rows(rank_row, column, b_ptr, out)
        z = tl.load(z_ptr + rank, mask=rank_row >= 0, other=0.0)
        for part in tl.static_range(1, SHRINK_PARTS):
            z += tl.load(z_ptr + part * Z_PART + rank, mask=rank_row >= 0, other=0.0)
        z = z.to(b_ptr.dtype.element_ty).to(tl.float32)
        total += tl.sum(z[:, None] * b.to(tl.float32), 0)
    return total[:, None]
