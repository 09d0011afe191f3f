"""LoRA of dense linear layers in Triton: the expert kernels with one expert, added in place."""

from typing import Any

import jax
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, precision, scalar
from moelora_kernels.expert_lora.triton_expand import (
    ExpandSizes,
    Update,
    add_expand,
    find_adapters,
    find_updates,
    load_updates,
    tile_adapters,
)
from moelora_kernels.expert_lora.triton_shrink import shrink
from moelora_kernels.tiles import max_tiles
from moelora_kernels.tuning.tiles import GemmTiles, ShrinkTiles
from moelora_kernels.types import Buffer, SitePages, TokenSort


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
        BLOCK_M=max(triton.next_power_of_2(tile_rows), 16),
        BLOCK_N=tiles.block_n,
        EXPAND=ExpandSizes(
            parts=(0,),
            width=width,
            experts=1,
            adapters=adapters,
            max_pages=max_pages,
            z_columns=z.shape[2],
            slots=tiles.stack // stacked_pages,
            pages=stacked_pages,
            stages=1,
            precision=precision(z.dtype),
        ),
    )
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXPAND: tl.constexpr,
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
        y_ptrs = y_ptr + token.to(tl.int64)[:, None] * EXPAND.width + columns[None, :]
        touched = has_adapter[:, None] & (columns < EXPAND.width)[None, :]
        total = tl.load(y_ptrs, mask=touched, other=0.0).to(tl.float32)
        adapter, slot, num_slots = tile_adapters(first, rows, inside, 0, group_ptr, EXPAND.adapters)
        table = (tl.load(layer_ptr) * 2 + 1) * EXPAND.adapters * EXPAND.max_pages
        updates = (Update(z_ptr, table_ptr + table, pool_ptr),)
        slot_adapter, mine = find_adapters(0, adapter, slot, EXPAND.slots)
        pool_rows = find_updates(slot_adapter, 0, updates, EXPAND)
        b = load_updates(pool_rows, columns, updates, EXPAND)
        totals = (total,)
        if num_slots > 0:
            totals = add_expand(
                totals, rows, adapter, slot, num_slots, mine, pool_rows, b, columns, updates, EXPAND
            )
        tl.store(y_ptrs, totals[0].to(y_ptr.dtype.element_ty), mask=touched)
