"""What adapters add to the outputs of linear maps, added by whichever launch reads them next.

A program there has one token: while it loads the outputs, it loads the token's rank activations and
pages of B, and multiplies them on the ordinary units.
"""

from typing import Any

import jax
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch
from moelora_kernels.linear.triton import MAX_MAPS, find_block, is_given, of_map
from moelora_kernels.types import PAGE_ROWS, LinearUpdate

#: Columns of one program of a launch that does nothing else.
BLOCK = 512
#: Ranks of one step of a sum over a page's ranks.
RANKS = 4


def operands(update: LinearUpdate | None) -> tuple[Array | None, ...]:
    """``z_ptr``, ``pool_rows_ptr`` and one ``b_ptr`` for each map that a launch may have."""
    if update is None:
        return (None,) * (2 + MAX_MAPS)
    missing = MAX_MAPS - len(update.b_pools)
    return update.ranks, update.pool_rows, *update.b_pools, *[None] * missing


def constants(update: LinearUpdate | None) -> dict[str, int]:
    """Compile-time parameters of :func:`find_update`."""
    parts, maps, _, _ = (0, 0, 0, 0) if update is None else update.ranks.shape
    max_pages = 0 if update is None else update.pool_rows.shape[2]
    return {
        "Z_PARTS": parts,
        "MAPS": maps,
        "MAX_PAGES": max_pages,
        "PAGE_ROWS": PAGE_ROWS,
        "RANKS": RANKS,
    }


def add_update(y: Array, update: LinearUpdate) -> Array:
    """``y``, and what adapters add to it, by a launch of its own."""
    tokens, missing = len(y), MAX_MAPS - len(update.outputs)
    blocks = sum(triton.cdiv(out, BLOCK) for out in update.outputs)
    # XLA makes no copy here where nothing else reads the products.
    total: Any = jax.new_ref(y)
    launch(
        add_update_rows,
        operands(update),
        (),
        [total],
        Launch((tokens, blocks), num_warps=4),
        **{f"OUT_{i}": size for i, size in enumerate([*update.outputs, *[0] * missing])},
        BLOCK=BLOCK,
        TOKENS=tokens,
        **constants(update),
    )
    return jax.freeze(total)


@triton.jit
def add_update_rows(
    z_ptr,
    pool_rows_ptr,
    b_0_ptr,
    b_1_ptr,
    b_2_ptr,
    y_ptr,
    OUT_0: tl.constexpr,
    OUT_1: tl.constexpr,
    OUT_2: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    Z_PARTS: tl.constexpr,
    MAPS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Some columns of one token's outputs."""
    token = tl.program_id(0)
    number, block, out, start = find_block(tl.program_id(1), OUT_0, OUT_1, OUT_2, BLOCK)
    if is_given(number, b_0_ptr, b_1_ptr, b_2_ptr):
        column = block * BLOCK + tl.arange(0, BLOCK)
        y_ptrs = y_ptr + token.to(tl.int64) * (OUT_0 + OUT_1 + OUT_2) + start + column
        y = tl.load(y_ptrs, mask=column < out, other=0.0)
        added, _, exists = find_update(
            number * TOKENS + token, column, column < out, z_ptr, pool_rows_ptr,
            of_map(number, b_0_ptr, b_1_ptr, b_2_ptr), out,
            0, TOKENS, Z_PARTS, MAPS, MAX_PAGES, PAGE_ROWS, RANKS,
        )  # fmt: skip
        total = (y.to(tl.float32) + added).to(y.dtype)
        tl.store(y_ptrs, total, mask=(column < out) & exists)


@triton.jit
def find_update(
    row,
    column,
    inside,
    z_ptr,
    pool_rows_ptr,
    b_ptr,
    width,
    SECOND: tl.constexpr,
    TOKENS: tl.constexpr,
    Z_PARTS: tl.constexpr,
    MAPS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """What adapters add to one token's outputs at some columns of a map, and whether any does.

    ``row`` is the number of the map times ``TOKENS``, and the token; columns may have any shape.
    Where ``SECOND`` is not 0, what they add so many columns further on comes in between.
    """
    added = tl.zeros(column.shape, tl.float32)
    second = tl.zeros(column.shape, tl.float32)
    rank = tl.arange(0, RANKS)
    z_ptrs = z_ptr + row * (MAX_PAGES * PAGE_ROWS) + rank
    for _ in tl.static_range(len(column.shape)):
        rank = tl.expand_dims(rank, -1)
    b_ptrs = b_ptr + rank * width + tl.expand_dims(column, 0)
    inside = tl.expand_dims(inside, 0)
    pool_row = tl.load(pool_rows_ptr + row * MAX_PAGES)
    exists = pool_row >= 0
    for page in tl.static_range(MAX_PAGES):
        if page > 0:
            pool_row = tl.load(pool_rows_ptr + row * MAX_PAGES + page)
        if pool_row >= 0:
            first_row = pool_row.to(tl.int64) * PAGE_ROWS
            # All steps are copied ahead.
            for first in tl.range(0, PAGE_ROWS, RANKS, num_stages=PAGE_ROWS // RANKS + 1):
                z_step = z_ptrs + page * PAGE_ROWS + first
                z = tl.load(z_step)
                for part in tl.static_range(1, Z_PARTS):
                    z += tl.load(z_step + part * (MAPS * TOKENS * MAX_PAGES * PAGE_ROWS))
                z = tl.reshape(z.to(b_ptr.dtype.element_ty).to(tl.float32), rank.shape)
                b_step = b_ptrs + (first_row + first) * width
                b = tl.load(b_step, mask=inside, other=0.0)
                added += tl.sum(z * b.to(tl.float32), 0)
                if SECOND > 0:
                    b = tl.load(b_step + SECOND, mask=inside, other=0.0)
                    second += tl.sum(z * b.to(tl.float32), 0)
    return added, second, exists
