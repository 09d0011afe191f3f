"""LoRA of linear maps of many rows, whose products XLA makes.

Rows are in the order of the sort, so that the rows of an adapter lie together. One launch shrinks:
a program has a tile of rows, one page of all maps, and a part of the input's columns. Another
expands: it adds up the parts, and adds ``z · B`` to a tile of what XLA made, in place.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, precision, scalar
from moelora_kernels.expert_lora.triton_expand import (
    find_adapters,
    find_pages,
    load_pages,
    spread,
    stack_ranks,
    tile_adapters,
)
from moelora_kernels.tuning.tiles import linear_lora_tiles
from moelora_kernels.types import PAGE_ROWS, LinearMap, TokenSort

#: Maps with pages that one launch has parameters for.
MAX_SITES = 3


def add_lora(x: Array, y: Array, maps: Sequence[LinearMap], layer: Array, sort: TokenSort) -> Array:
    """``y``, which is what the maps make of ``x``, with LoRA: a shrink and an expand."""
    sites = [m.pages for m in maps if m.pages is not None]
    if not sites:
        return y
    if len(sites) > MAX_SITES:
        raise ValueError(f"at most {MAX_SITES} maps can share a launch, not {len(sites)}")
    tokens, width = x.shape
    _, _, adapters, max_pages, _ = sites[0].table.shape
    tiles = linear_lora_tiles(tokens, width, len(sites), max_pages, x.dtype)
    missing = MAX_SITES - len(sites)
    constants = {
        "TOKENS": tokens,
        "SITES": len(sites),
        "PARTS": tiles.parts,
        "NUM_ADAPTERS": adapters,
        "MAX_PAGES": max_pages,
        "PAGE_ROWS": PAGE_ROWS,
        "Z_COLUMNS": sites[0].max_rank,
        "PRECISION": precision(x.dtype),
    }
    rows = (scalar(layer), sort.order, sort.group_of_row)
    factors = [array for site in sites for array in (site.a_pool, site.table, site.scaling)]
    row_tiles = triton.cdiv(tokens, tiles.shrink_rows)
    step = tiles.shrink_warps * tiles.shrink_k
    (z,) = launch(
        shrink_tiles,
        (x, *rows, *factors, *[None] * (3 * missing)),
        [jax.ShapeDtypeStruct((tiles.parts, len(sites), tokens, sites[0].max_rank), jnp.float32)],
        None,
        Launch((row_tiles * tiles.parts, max_pages), num_warps=tiles.shrink_warps, num_stages=3),
        WIDTH=width,
        PART=triton.cdiv(triton.cdiv(width, tiles.parts), step) * step,
        SITE_LANES=triton.next_power_of_2(len(sites)),
        WARPS=tiles.shrink_warps,
        BLOCK_M=tiles.shrink_rows,
        BLOCK_K=tiles.shrink_k,
        **constants,
    )
    starts, outs, start = [], [], 0
    for m in maps:
        if m.pages is not None:
            starts.append(start)
            outs.append(m.weight.shape[1])
        start += m.weight.shape[1]
    blocks = sum(triton.cdiv(out, tiles.block_n) for out in outs)
    starts, outs = starts + [0] * missing, outs + [0] * missing
    factors = [array for site in sites for array in (site.b_pool, site.table)]
    # XLA makes no copy here where nothing else reads the products.
    total: Any = jax.new_ref(y)
    launch(
        expand_tiles,
        (*rows, *factors, *[None] * (2 * missing), z),
        (),
        [total],
        Launch((triton.cdiv(tokens, tiles.block_m) * blocks,), num_warps=tiles.num_warps),
        START_0=starts[0],
        START_1=starts[1],
        START_2=starts[2],
        OUT_0=outs[0],
        OUT_1=outs[1],
        OUT_2=outs[2],
        Y_STRIDE=start,
        PAGES=min(triton.next_power_of_2(max_pages), 4),
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        **constants,
    )
    return jax.freeze(total)


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
def expand_tiles(
    layer_ptr,
    order_ptr,
    group_ptr,
    b_0_ptr,
    table_0_ptr,
    b_1_ptr,
    table_1_ptr,
    b_2_ptr,
    table_2_ptr,
    z_ptr,
    y_ptr,
    TOKENS: tl.constexpr,
    SITES: tl.constexpr,
    START_0: tl.constexpr,
    START_1: tl.constexpr,
    START_2: tl.constexpr,
    OUT_0: tl.constexpr,
    OUT_1: tl.constexpr,
    OUT_2: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    PAGES: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y + z · B``; neighbouring programs have the same rows."""
    BLOCKS_0: tl.constexpr = (OUT_0 + BLOCK_N - 1) // BLOCK_N
    BLOCKS_1: tl.constexpr = (OUT_1 + BLOCK_N - 1) // BLOCK_N
    BLOCKS_2: tl.constexpr = (OUT_2 + BLOCK_N - 1) // BLOCK_N
    BLOCKS: tl.constexpr = BLOCKS_0 + BLOCKS_1 + BLOCKS_2
    tile, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    layer = tl.load(layer_ptr)
    # A branch per map keeps the alignment of each pointer known to the compiler.
    if block < BLOCKS_0:
        expand_tile(
            tile, block, 0, layer, order_ptr, group_ptr, b_0_ptr, table_0_ptr, z_ptr,
            y_ptr + START_0,
            OUT_0, Y_STRIDE, TOKENS, SITES, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, PAGES,
            Z_COLUMNS, PARTS, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    elif block < BLOCKS_0 + BLOCKS_1:
        if SITES > 1:
            expand_tile(
                tile, block - BLOCKS_0, 1, layer, order_ptr, group_ptr, b_1_ptr, table_1_ptr,
                z_ptr, y_ptr + START_1,
                OUT_1, Y_STRIDE, TOKENS, SITES, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, PAGES,
                Z_COLUMNS, PARTS, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
    elif SITES > 2:
        expand_tile(
            tile, block - BLOCKS_0 - BLOCKS_1, 2, layer, order_ptr, group_ptr, b_2_ptr,
            table_2_ptr, z_ptr, y_ptr + START_2,
            OUT_2, Y_STRIDE, TOKENS, SITES, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, PAGES,
            Z_COLUMNS, PARTS, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip


@triton.jit
def expand_tile(
    tile,
    block,
    site,
    layer,
    order_ptr,
    group_ptr,
    b_ptr,
    table_ptr,
    z_ptr,
    y_ptr,
    OUT: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    SITES: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    PAGES: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y + z · B`` of a tile of rows and ``BLOCK_N`` columns of one map."""
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    token = tl.load(order_ptr + rows, mask=rows < TOKENS, other=-1)
    inside = token >= 0
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    y_ptrs = y_ptr + token.to(tl.int64)[:, None] * Y_STRIDE + columns[None, :]
    present = inside[:, None] & (columns < OUT)[None, :]
    # On its way while adapters and pages are looked up.
    y = tl.load(y_ptrs, mask=present, other=0.0)
    adapter, slot, num_slots = tile_adapters(first, rows, inside, 0, group_ptr, NUM_ADAPTERS)
    if num_slots > 0:
        table_ptr += (layer * 2 + 1) * NUM_ADAPTERS * MAX_PAGES
        z_ptrs = z_ptr + (site * TOKENS + rows)[:, None] * Z_COLUMNS
        total = y.to(tl.float32)
        for first_page in tl.static_range(0, MAX_PAGES, PAGES):
            column = first_page * PAGE_ROWS + tl.arange(0, PAGES * PAGE_ROWS)
            mask = (adapter >= 0)[:, None] & (column < Z_COLUMNS)[None, :]
            z = tl.load(z_ptrs + column[None, :], mask=mask, other=0.0)
            for part in tl.static_range(1, PARTS):
                part_ptrs = z_ptrs + part * (SITES * TOKENS * Z_COLUMNS)
                z += tl.load(part_ptrs + column[None, :], mask=mask, other=0.0)
            z = z.to(b_ptr.dtype.element_ty)
            for chosen in tl.range(0, num_slots, num_stages=1):
                slot_adapter, mine = find_adapters(chosen, adapter, slot, 1)
                pool_row = find_pages(slot_adapter, first_page, table_ptr, 1, MAX_PAGES, PAGES)
                b = load_pages(pool_row, columns, b_ptr, OUT, 1, PAGES, PAGE_ROWS)
                stacked = stack_ranks(z, mine, pool_row, BLOCK_M, 1, PAGES, PAGE_ROWS)
                total = tl.dot(stacked, b, total, input_precision=PRECISION)
        # Rows of the base model are left as they are.
        stored = present & (adapter >= 0)[:, None]
        tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=stored)
