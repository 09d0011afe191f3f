"""LoRA of dense linear layers in Triton: the expert kernels with one expert, added in place."""

from typing import Any

import jax
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, precision, scalar
from moelora_kernels.expert_lora.triton_expand import (
    add_expand,
    find_adapters,
    find_pages,
    load_pages,
    tile_adapters,
)
from moelora_kernels.expert_lora.triton_shrink import shrink
from moelora_kernels.tiles import max_tiles
from moelora_kernels.tuning.tiles import GemmTiles, ShrinkTiles
from moelora_kernels.types import PAGE_ROWS, Buffer, SitePages, TokenSort


def dense_lora(
    x: Array,
    y: Array,
    pages: SitePages,
    sort: TokenSort,
    layer: Array,
    *,
    tile_rows: int,
    shrink_tiles: ShrinkTiles,
    tiles: GemmTiles,
    out: Buffer | None,
) -> Buffer:
    """See :func:`moelora_kernels.dense_lora`."""
    z = shrink(
        x, sort, (pages,), layer,
        pairs=len(y), top_k=1, tiles=shrink_tiles, out=None,
    )  # fmt: skip
    return add_expand_rows(z, y, pages, sort, layer, tile_rows=tile_rows, tiles=tiles, out=out)


def add_expand_rows(
    z: Buffer,
    y: Array,
    pages: SitePages,
    sort: TokenSort,
    layer: Array,
    *,
    tile_rows: int,
    tiles: GemmTiles,
    out: Buffer | None,
) -> Buffer:
    """``y`` with ``z [1, tokens, max_rank] · B`` of sorted rows added to it."""
    tokens, width = y.shape
    # XLA makes no copy here where nothing else reads the linear layer's output.
    total: Any = jax.new_ref(y) if out is None else out
    if out is not None:
        total[:tokens] = y
    _, _, adapters, max_pages, _ = pages.table.shape
    stacked_pages = min(triton.next_power_of_2(max_pages), 4)
    num_tiles = max_tiles(tokens, 1, tile_rows)
    inputs = (
        *(sort.order, sort.expert_tiles, sort.group_of_row),
        *(scalar(layer), z, pages.table, pages.b_pool),
    )
    launch(
        dense_expand,
        inputs,
        (),
        [total],
        Launch((num_tiles, triton.cdiv(width, tiles.block_n)), num_warps=4, num_stages=1),
        WIDTH=width,
        BLOCK_M=max(triton.next_power_of_2(tile_rows), 16),
        BLOCK_N=tiles.block_n,
        NUM_ADAPTERS=adapters,
        MAX_PAGES=max_pages,
        PAGE_ROWS=PAGE_ROWS,
        Z_COLUMNS=z.shape[2],
        SLOTS=tiles.stack // stacked_pages,
        PAGES=stacked_pages,
        PRECISION=precision(z.dtype),
    )  # fmt: skip
    return jax.freeze(total) if out is None else out


@triton.jit
def dense_expand(
    order_ptr,
    tiles_ptr,
    group_ptr,
    layer_ptr,
    z_ptr,
    table_ptr,
    pool_ptr,
    y_ptr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add ``z · B`` to the tokens of a tile that have an adapter; no other row is touched."""
    tile, block = tl.program_id(0), tl.program_id(1)
    if tl.load(tiles_ptr + tile * 3) >= 0:
        first, end = tl.load(tiles_ptr + tile * 3 + 1), tl.load(tiles_ptr + tile * 3 + 2)
        rows = first + tl.arange(0, BLOCK_M)
        inside = rows < end
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        has_adapter = tl.load(group_ptr + rows, mask=inside, other=0) > 0
        token = tl.load(order_ptr + rows, mask=inside, other=0)
        y_ptrs = y_ptr + token.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        touched = has_adapter[:, None] & (columns < WIDTH)[None, :]
        total = tl.load(y_ptrs, mask=touched, other=0.0).to(tl.float32)
        adapter, slot, num_slots = tile_adapters(first, rows, inside, 0, group_ptr, NUM_ADAPTERS)
        table_ptr += (tl.load(layer_ptr) * 2 + 1) * NUM_ADAPTERS * MAX_PAGES
        slot_adapter, mine = find_adapters(0, adapter, slot, SLOTS)
        pool_row = find_pages(slot_adapter, 0, table_ptr, 1, MAX_PAGES, PAGES)
        b = load_pages(pool_row, columns, pool_ptr, WIDTH, SLOTS, PAGES, PAGE_ROWS)
        total = add_expand(
            total, rows, adapter, slot, num_slots, mine, pool_row, b, columns,
            z_ptr, table_ptr, pool_ptr,
            WIDTH, 1, MAX_PAGES, PAGE_ROWS, Z_COLUMNS, BLOCK_M, SLOTS, PAGES, PRECISION,
        )  # fmt: skip
        tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=touched)
