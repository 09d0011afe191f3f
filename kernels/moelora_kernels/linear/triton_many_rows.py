"""Linear maps of many rows with LoRA, whose weights are read where they are in the stack.

One launch shrinks: a program has a tile of rows in the order of the sort, so that those of an
adapter lie together, one page of all maps, and a part of the input's columns. Another multiplies:
a program has a tile of rows and columns of one map, whose steps the tensor memory accelerator
loads, and before it stores adds ``z · B`` for one adapter after another.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, Tiled, launch, precision, scalar
from moelora_kernels.expert_lora.triton_expand import spread, tile_adapters
from moelora_kernels.linear.triton_maps import find_block, map_outputs, map_parameters
from moelora_kernels.tuning.tiles import LinearTiles, linear_shrink_tiles
from moelora_kernels.types import PAGE_ROWS, Buffer, LinearMap, SitePages, TokenSort

#: Tiles of rows that all columns are multiplied with before the next tiles.
GROUP_TILES = 16


def linear_lora(
    x: Array,
    maps: Sequence[LinearMap],
    layer: Array,
    sort: TokenSort | None,
    dtype: jnp.dtype,
    tiles: LinearTiles,
) -> Array:
    """See :func:`moelora_kernels.linear_lora`."""
    tokens, width = x.shape
    sites = [] if sort is None else [m.pages for m in maps if m.pages is not None]
    ranks: list[Buffer | None] = [None, None, None]
    parts = adapters = max_pages = max_rank = 0
    if sort is not None and sites:
        z = shrink(x, sites, layer, sort)
        ranks, parts = [sort.row_of_pair, sort.group_of_row, z], z.shape[0]
        _, _, adapters, max_pages, _ = sites[0].table.shape
        max_rank = sites[0].max_rank
    arrays: list[tuple[Array | Tiled | None, ...]] = []
    for m in maps:
        # The stack's layers lie one below the other.
        weight = Tiled(m.weight.reshape(-1, width), (tiles.block_n, tiles.block_k))
        pages = m.pages if sites else None
        expand = (None, None) if pages is None else (pages.b_pool, pages.table)
        arrays.append((weight, m.bias, *expand))
    outputs = map_outputs(maps)
    blocks = sum(triton.cdiv(out, tiles.block_n) for out in outputs.values())
    (y,) = launch(
        multiply_tiles,
        (
            *(Tiled(x, (tiles.block_m, tiles.block_k)), scalar(layer)),
            *(*map_parameters(arrays), *ranks),
        ),
        [jax.ShapeDtypeStruct((tokens, sum(outputs.values())), dtype)],
        None,
        Launch((triton.cdiv(tokens, tiles.block_m) * blocks,), tiles.num_warps, tiles.num_stages),
        **outputs,
        WIDTH=width,
        TOKENS=tokens,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        GROUP_TILES=GROUP_TILES,
        PRECISION=precision(x.dtype),
        SITES=len(sites),
        PARTS=parts,
        NUM_ADAPTERS=adapters,
        MAX_PAGES=max_pages,
        PAGE_ROWS=PAGE_ROWS,
        Z_COLUMNS=max_rank,
    )
    return y


def shrink(x: Array, sites: Sequence[SitePages], layer: Array, sort: TokenSort) -> Array:
    """Rank activations of sorted rows, ``[parts, sites, tokens, max_rank]``, whose parts add up."""
    tokens, width = x.shape
    factors = map_parameters([(site.a_pool, site.table, site.scaling) for site in sites])
    tiles = linear_shrink_tiles(tokens, width, len(sites), x.dtype)
    step = tiles.num_warps * tiles.block_k
    _, _, adapters, max_pages, _ = sites[0].table.shape
    (z,) = launch(
        shrink_tiles,
        (x, scalar(layer), sort.order, sort.group_of_row, *factors),
        [jax.ShapeDtypeStruct((tiles.parts, len(sites), tokens, sites[0].max_rank), jnp.float32)],
        None,
        Launch(
            (triton.cdiv(tokens, tiles.rows) * tiles.parts, max_pages),
            num_warps=tiles.num_warps,
            num_stages=3,
        ),
        WIDTH=width,
        PART=triton.cdiv(triton.cdiv(width, tiles.parts), step) * step,
        TOKENS=tokens,
        SITES=len(sites),
        SITE_LANES=triton.next_power_of_2(len(sites)),
        PARTS=tiles.parts,
        NUM_ADAPTERS=adapters,
        MAX_PAGES=max_pages,
        PAGE_ROWS=PAGE_ROWS,
        Z_COLUMNS=sites[0].max_rank,
        WARPS=tiles.num_warps,
        BLOCK_M=tiles.rows,
        BLOCK_K=tiles.block_k,
        PRECISION=precision(x.dtype),
    )
    return z


@triton.jit
def shrink_tiles(
    x_ptr,
    layer_ptr,
    order_ptr,
    group_ptr,
    a_0_ptr,
    table_0_ptr,
    scaling_0_ptr,
    a_1_ptr,
    table_1_ptr,
    scaling_1_ptr,
    a_2_ptr,
    table_2_ptr,
    scaling_2_ptr,
    z_ptr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    TOKENS: tl.constexpr,
    SITES: tl.constexpr,
    SITE_LANES: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``z = scaling · A · x`` of a tile of rows and one page, summed over ``PART`` columns of x.

    The pages of all maps are columns of one product, for which the rows are read once.
    """
    tile, part, page = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    layer = tl.load(layer_ptr)
    z_ptr += part * (SITES * TOKENS * Z_COLUMNS)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.load(order_ptr + rows, mask=rows < TOKENS, other=-1)
    inside = token >= 0
    adapter, slot, num_slots = tile_adapters(
        tile * BLOCK_M, rows, inside, 0, group_ptr, NUM_ADAPTERS
    )
    x_ptrs = x_ptr + tl.where(inside, token, 0).to(tl.int64) * WIDTH
    COLUMNS: tl.constexpr = SITE_LANES * PAGE_ROWS
    lanes = tl.arange(0, SITE_LANES)
    column = tl.arange(0, COLUMNS)
    begin = part * PART
    for chosen in range(0, num_slots):
        mine = slot == chosen
        this = tl.max(tl.where(mine, adapter, 0), 0)
        entry = (layer * 2 * NUM_ADAPTERS + this) * MAX_PAGES + page
        factor = layer * NUM_ADAPTERS + this
        entry_ptrs = table_0_ptr + entry + tl.zeros_like(lanes)
        scaling_ptrs = scaling_0_ptr + factor + tl.zeros_like(lanes)
        if SITES > 1:
            entry_ptrs = tl.where(lanes == 1, table_1_ptr + entry, entry_ptrs)
            scaling_ptrs = tl.where(lanes == 1, scaling_1_ptr + factor, scaling_ptrs)
        if SITES > 2:
            entry_ptrs = tl.where(lanes == 2, table_2_ptr + entry, entry_ptrs)
            scaling_ptrs = tl.where(lanes == 2, scaling_2_ptr + factor, scaling_ptrs)
        pool_row = tl.load(entry_ptrs, mask=lanes < SITES, other=-1)
        scaling = spread(tl.load(scaling_ptrs), PAGE_ROWS)
        has_page = spread(pool_row >= 0, PAGE_ROWS)
        # Of pages that are missing the first of the pool is read, and nothing stored.
        rank_row = spread(tl.maximum(pool_row, 0).to(tl.int64) * PAGE_ROWS, PAGE_ROWS)
        rank_row = (rank_row + column % PAGE_ROWS) * WIDTH
        a_ptrs = a_0_ptr + rank_row
        if SITES > 1:
            a_ptrs = tl.where(column // PAGE_ROWS == 1, a_1_ptr + rank_row, a_ptrs)
        if SITES > 2:
            a_ptrs = tl.where(column // PAGE_ROWS == 2, a_2_ptr + rank_row, a_ptrs)
        # Each warp sums columns of its own, so that no product waits for another's.
        depth = tl.arange(0, WARPS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        x_tile = x_ptrs[None, :, None] + depth[:, None, :]
        a_tile = a_ptrs[None, :, None] + depth[:, None, :]
        z = tl.zeros([WARPS, BLOCK_M, COLUMNS], tl.float32)
        for k in range(begin, begin + PART, WARPS * BLOCK_K):
            if PARTS * PART == WIDTH:
                x, a = tl.load(x_tile + k), tl.load(a_tile + k)
            else:
                left = (k + depth < WIDTH)[:, None, :]
                x = tl.load(x_tile + k, mask=left, other=0.0)
                a = tl.load(a_tile + k, mask=left, other=0.0)
            z = tl.dot(x, tl.permute(a, (0, 2, 1)), z, input_precision=PRECISION)
        z = tl.sum(z, 0)
        z_row = (column // PAGE_ROWS * TOKENS)[None, :] + rows[:, None]
        tl.store(
            z_ptr + z_row * Z_COLUMNS + (page * PAGE_ROWS + column % PAGE_ROWS)[None, :],
            z * scaling[None, :],
            mask=mine[:, None] & has_page[None, :],
        )


@triton.jit
def multiply_tiles(
    x_blocks,
    layer_ptr,
    weight_0_blocks,
    bias_0_ptr,
    b_0_ptr,
    table_0_ptr,
    weight_1_blocks,
    bias_1_ptr,
    b_1_ptr,
    table_1_ptr,
    weight_2_blocks,
    bias_2_ptr,
    b_2_ptr,
    table_2_ptr,
    row_ptr,
    group_ptr,
    z_ptr,
    y_ptr,
    OUT_0: tl.constexpr,
    OUT_1: tl.constexpr,
    OUT_2: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    SITES: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
):
    """One tile of rows and columns of one map per program."""
    TILES: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    BLOCKS: tl.constexpr = (
        (OUT_0 + BLOCK_N - 1) // BLOCK_N
        + (OUT_1 + BLOCK_N - 1) // BLOCK_N
        + (OUT_2 + BLOCK_N - 1) // BLOCK_N
    )
    # Neighbours have few rows and few columns, which they find in the L2 cache.
    group = tl.program_id(0) // (GROUP_TILES * BLOCKS)
    size = tl.minimum(TILES - group * GROUP_TILES, GROUP_TILES)
    within = tl.program_id(0) % (GROUP_TILES * BLOCKS)
    tile = group * GROUP_TILES + within % size
    number, block, _, _ = find_block(within // size, OUT_0, OUT_1, OUT_2, BLOCK_N)
    layer = tl.load(layer_ptr)
    Y_STRIDE: tl.constexpr = OUT_0 + OUT_1 + OUT_2
    Z_SITE: tl.constexpr = TOKENS * Z_COLUMNS
    # A descriptor cannot be chosen by a number, so each map has a branch.
    if number == 0:
        multiply_tile(
            tile, block, layer, x_blocks, weight_0_blocks, bias_0_ptr, b_0_ptr, table_0_ptr,
            row_ptr, group_ptr, z_ptr, y_ptr,
            OUT_0, Y_STRIDE, WIDTH, TOKENS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            SITES, PARTS, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS,
        )  # fmt: skip
    # Rank activations of maps without pages do not exist.
    if b_0_ptr is not None:
        z_ptr += Z_SITE
    if OUT_1 > 0:
        if number == 1:
            multiply_tile(
                tile, block, layer, x_blocks, weight_1_blocks, bias_1_ptr, b_1_ptr, table_1_ptr,
                row_ptr, group_ptr, z_ptr, y_ptr + OUT_0,
                OUT_1, Y_STRIDE, WIDTH, TOKENS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
                SITES, PARTS, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS,
            )  # fmt: skip
        if b_1_ptr is not None:
            z_ptr += Z_SITE
    if OUT_2 > 0:
        if number == 2:
            multiply_tile(
                tile, block, layer, x_blocks, weight_2_blocks, bias_2_ptr, b_2_ptr, table_2_ptr,
                row_ptr, group_ptr, z_ptr, y_ptr + OUT_0 + OUT_1,
                OUT_2, Y_STRIDE, WIDTH, TOKENS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
                SITES, PARTS, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS,
            )  # fmt: skip


@triton.jit
def multiply_tile(
    tile,
    block,
    layer,
    x_blocks,
    weight_blocks,
    bias_ptr,
    b_ptr,
    table_ptr,
    row_ptr,
    group_ptr,
    z_ptr,
    y_ptr,
    OUT: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    SITES: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
):
    """A tile of rows and columns of one map."""
    first, column = tile * BLOCK_M, block * BLOCK_N
    token = first + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    if b_ptr is not None:
        table_ptr += (layer * 2 + 1) * NUM_ADAPTERS * MAX_PAGES
        row = tl.load(row_ptr + token, mask=token < TOKENS, other=-1)
        group = tl.load(group_ptr + row, mask=row >= 0, other=0)
        # Without an adapter it is one past the last.
        adapter = tl.where(group > 0, group - 1, NUM_ADAPTERS)
        chosen = tl.min(adapter, 0)
        # On their way while the products are made.
        z, b = load_page(
            chosen, 0, adapter, row, columns, table_ptr, b_ptr, z_ptr,
            OUT, TOKENS, SITES, PARTS, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS,
        )  # fmt: skip
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        # What is past the last row, output or column is not stored, or zero.
        x, weight = x_blocks.load([first, k]), weight_blocks.load([layer * OUT + column, k])
        total = tl.dot(x, tl.trans(weight), total, input_precision=PRECISION)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + layer * OUT + columns, mask=columns < OUT, other=0.0)
        total += bias.to(tl.float32)[None, :]
    if b_ptr is not None:
        page = 0
        while chosen < NUM_ADAPTERS:
            total = tl.dot(z, b, total, input_precision=PRECISION)
            page += 1
            if page == MAX_PAGES:
                page = 0
                chosen = tl.min(tl.where(adapter > chosen, adapter, NUM_ADAPTERS), 0)
            z, b = load_page(
                chosen, page, adapter, row, columns, table_ptr, b_ptr, z_ptr,
                OUT, TOKENS, SITES, PARTS, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS,
            )  # fmt: skip
    tl.store(
        y_ptr + token.to(tl.int64)[:, None] * Y_STRIDE + columns[None, :],
        total.to(y_ptr.dtype.element_ty),
        mask=(token < TOKENS)[:, None] & (columns < OUT)[None, :],
    )


@triton.jit
def load_page(
    chosen,
    page,
    adapter,
    row,
    columns,
    table_ptr,
    b_ptr,
    z_ptr,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    SITES: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
):
    """One page of an adapter's B, and the rank activations of its rows; zeros where there is none.

    Returns:
        ``[rows, PAGE_ROWS]`` and ``[PAGE_ROWS, columns]``, both in the dtype of B.
    """
    pool_row = tl.load(table_ptr + chosen * MAX_PAGES + page, mask=chosen < NUM_ADAPTERS, other=-1)
    rank = tl.arange(0, PAGE_ROWS)
    z_ptrs = z_ptr + row[:, None] * Z_COLUMNS + page * PAGE_ROWS + rank[None, :]
    mine = ((adapter == chosen) & (pool_row >= 0))[:, None]
    z = tl.load(z_ptrs, mask=mine, other=0.0)
    for part in tl.static_range(1, PARTS):
        z += tl.load(z_ptrs + part * SITES * TOKENS * Z_COLUMNS, mask=mine, other=0.0)
    b_ptrs = b_ptr + (pool_row.to(tl.int64) * PAGE_ROWS + rank)[:, None] * OUT + columns[None, :]
    b = tl.load(b_ptrs, mask=(pool_row >= 0) & (columns < OUT)[None, :], other=0.0)
    return z.to(b.dtype), b
