"""Linear maps with LoRA in Triton, whose weights are read where they are in the stack.

With few rows all products are one launch. Each program has some columns of one map, or, where these
are too few to keep the memory busy, part of their sums; whoever completes the last part of a tile
adds up all of them, always in the same order. The pages of A are columns like those of a map, which
the first programs multiply. No program waits for another: what adapters add is left to the launch
that reads the sums next, see :mod:`moelora_kernels.linear.triton_update`.

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
from moelora_kernels.expert_lora.triton_expand import tile_adapters
from moelora_kernels.tuning.tiles import LinearTiles
from moelora_kernels.types import PAGE_ROWS, SIGNALS, Buffer, LinearMap, LinearUpdate, TokenSort

#: Maps that one launch has parameters for.
MAX_MAPS = 3
#: Programs that share the sums of a page, at most.
SHRINK_PARTS = 4


def linear_lora(
    x: Array,
    maps: Sequence[LinearMap],
    layer: Array,
    sort: TokenSort | None,
    signals: Buffer | None,
    dtype: jnp.dtype,
    tiles: LinearTiles,
) -> tuple[Array, LinearUpdate | None]:
    """See :func:`moelora_kernels.linear_lora_deferred`."""
    if len(maps) > MAX_MAPS:
        raise ValueError(f"at most {MAX_MAPS} maps can share a launch, not {len(maps)}")
    tokens, width = x.shape
    outputs = [m.weight.shape[1] for m in maps]
    missing = MAX_MAPS - len(maps)
    pages = [None if sort is None else m.pages for m in maps]
    sites = [site for site in pages if site is not None]
    block_k = min(tiles.block_k, max(triton.next_power_of_2(width), 16))
    # No part is empty.
    steps = triton.cdiv(width, block_k)
    parts = triton.cdiv(steps, triton.cdiv(steps, tiles.parts))
    row_tiles = triton.cdiv(tokens, tiles.block_m)
    targets = row_tiles * sum(triton.cdiv(out, tiles.block_n) for out in outputs)
    if parts > 1 and targets > SIGNALS[0]:
        raise ValueError(
            f"a launch has signals for {SIGNALS[0]} tiles, not for {targets}:"
            " choose larger tiles, or parts=1"
        )
    shrinks = shrink_parts = adapters = max_pages = max_rank = 0
    sums = targets * parts * tiles.block_n * tiles.block_m if parts > 1 else 1
    new = [
        jax.ShapeDtypeStruct((sums,), jnp.float32),
        jax.ShapeDtypeStruct((tokens, sum(outputs)), dtype),
    ]
    if sites:
        _, _, adapters, max_pages, _ = sites[0].table.shape
        max_rank = sites[0].max_rank
        shrink_parts = triton.cdiv(steps, triton.cdiv(steps, SHRINK_PARTS))
        # A tile of rows has so many adapters at most.
        blocks = triton.cdiv(min(tiles.block_m, adapters) * max_rank, tiles.block_n)
        shrinks = blocks * row_tiles * len(maps) * shrink_parts
        new = [
            jax.ShapeDtypeStruct((shrink_parts, len(maps), tokens, max_rank), jnp.float32),
            jax.ShapeDtypeStruct((len(maps), tokens, max_pages), jnp.int32),
            *new,
        ]
    weights: list[Array | None] = []
    for m in maps:
        weights += [m.weight, m.bias]
    factors: list[Array | None] = []
    for site in pages:
        factors += [None] * 3 if site is None else [site.a_pool, site.table, site.scaling]
    results = launch(
        linear_tiles,
        (
            *(x, scalar(layer), *weights, *[None] * (2 * missing)),
            *(*factors, *[None] * (3 * missing)),
            *([None, None] if sort is None else [sort.order, sort.group_of_row]),
            None if parts == 1 else given_or_new(signals, SIGNALS, jnp.int32),
            *([] if sites else [None, None]),
        ),
        new,
        None,
        Launch((shrinks + targets * parts,), tiles.num_warps, tiles.num_stages),
        **{f"OUT_{i}": size for i, size in enumerate([*outputs, *[0] * missing])},
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
        PRECISION=precision(x.dtype),
        NUM_ADAPTERS=adapters,
        MAX_PAGES=max_pages,
        PAGE_ROWS=PAGE_ROWS,
        Z_COLUMNS=max_rank,
    )
    if not sites:
        return results[-1], None
    b_pools = tuple(None if site is None else site.b_pool for site in pages)
    return results[-1], LinearUpdate(results[0], results[1], b_pools, tuple(outputs))


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
    table_0_ptr,
    scaling_0_ptr,
    a_1_ptr,
    table_1_ptr,
    scaling_1_ptr,
    a_2_ptr,
    table_2_ptr,
    scaling_2_ptr,
    order_ptr,
    group_ptr,
    signals_ptr,
    z_ptr,
    pool_rows_ptr,
    sums_ptr,
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
    PRECISION: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
):
    """The first ``SHRINKS`` programs shrink, the others have a part of a tile of the output."""
    program = tl.program_id(0)
    layer = tl.load(layer_ptr)
    TILES: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
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
                    z_ptr + (part * MAPS + number) * (TOKENS * Z_COLUMNS),
                    pool_rows_ptr + number * (TOKENS * MAX_PAGES),
                    WIDTH, TOKENS, SHRINK_PARTS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PRECISION,
                    NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS,
                )  # fmt: skip
    else:
        program -= SHRINKS
        target, part = program // PARTS, program % PARTS
        # Tiles of the same columns are neighbours: all but one find the weights in the L2 cache.
        number, block, out, start = find_block(target // TILES, OUT_0, OUT_1, OUT_2, BLOCK_N)
        rows = target % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rows < TOKENS
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        # Columns past the last repeat it, so that loads need no mask.
        column = tl.minimum(columns, out - 1)
        weight_ptr = of_map(number, weight_0_ptr, weight_1_ptr, weight_2_ptr)
        weight_ptr += layer.to(tl.int64) * (out * WIDTH)
        total = multiply(
            part, x_ptr, weight_ptr, column, rows, inside,
            WIDTH, PARTS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PRECISION,
        )  # fmt: skip
        bias_ptr = of_map(number, bias_0_ptr, bias_1_ptr, bias_2_ptr)
        if bias_ptr is not None:
            has_bias = is_given(number, bias_0_ptr, bias_1_ptr, bias_2_ptr) & (part == 0)
            bias = tl.load(bias_ptr + layer * out + column, mask=has_bias, other=0.0)
            total += bias.to(tl.float32)[:, None]
        complete = True
        if PARTS > 1:
            SUMS: tl.constexpr = BLOCK_N * BLOCK_M
            lane = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
            sums_ptrs = sums_ptr + target * (PARTS * SUMS) + lane
            tl.store(sums_ptrs + part * SUMS, total)
            tl.debug_barrier()  # Stores of all threads come before the one that counts.
            parts_ptr = signals_ptr + target
            complete = tl.atomic_add(parts_ptr, 1, sem="acq_rel", scope="gpu") == PARTS - 1
        if complete:
            if PARTS > 1:
                tl.store(parts_ptr, 0)
                total = tl.load(sums_ptrs)
                for other in tl.static_range(1, PARTS):
                    total += tl.load(sums_ptrs + other * SUMS)
            tl.store(
                y_ptr + start + rows[:, None] * (OUT_0 + OUT_1 + OUT_2) + columns[None, :],
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
    pool_rows_ptr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
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
    # Past the last real row the order is -1; there, rows are tokens of padding.
    token = tl.where(order >= 0, order, rows)
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
    if (block == 0) & (part == 0):
        # Where the next launch finds each token's pages of B.
        table_ptr += NUM_ADAPTERS * MAX_PAGES
        for page in tl.static_range(MAX_PAGES):
            b_row = tl.load(table_ptr + adapter * MAX_PAGES + page, mask=adapter >= 0, other=-1)
            tl.store(pool_rows_ptr + token * MAX_PAGES + page, b_row, mask=rows < TOKENS)
    any_row = tl.max(pool_row, 0)
    if any_row >= 0:
        # Lanes without a page repeat another's, and store nothing.
        rank_row = tl.where(pool_row >= 0, pool_row, any_row).to(tl.int64) * PAGE_ROWS
        rank_row += rank % PAGE_ROWS
        z = multiply(
            part, x_ptr, a_ptr, rank_row, token, adapter >= 0,
            WIDTH, PARTS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PRECISION,
        )  # fmt: skip
        z_ptrs = z_ptr + token[None, :] * Z_COLUMNS + rank[:, None]
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
def multiply(
    part,
    x_ptr,
    weight_ptr,
    column,
    token,
    inside,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Part of the sums ``[columns, rows]`` of tokens with columns, which are rows of the weights.

    The only row of a batch is multiplied on the ordinary units.
    """
    STEPS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    PART: tl.constexpr = (STEPS + PARTS - 1) // PARTS * BLOCK_K
    depth = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + column[:, None] * WIDTH + depth[None, :]
    if PARTS == 1:
        begin, end = 0, WIDTH
    else:
        begin = part * PART
        end = tl.minimum(begin + PART, WIDTH)
    if BLOCK_M == 1:
        products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for k in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
            if WIDTH % BLOCK_K == 0:
                x, weight = tl.load(x_ptr + k + depth), tl.load(weight_ptrs + k)
            else:
                left = k + depth < WIDTH
                x = tl.load(x_ptr + k + depth, mask=left, other=0.0)
                weight = tl.load(weight_ptrs + k, mask=left[None, :], other=0.0)
            products += weight.to(tl.float32) * x.to(tl.float32)[None, :]
        total = tl.sum(products, 1)[:, None]
    else:
        # Rows that do not exist are not loaded: all programs would want the same cache lines.
        x_ptrs = x_ptr + tl.where(inside, token, 0)[None, :] * WIDTH + depth[:, None]
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
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
