"""What adapters add to a tile of sums that is still in registers: ``z · B``, in Triton.

Pages of several adapters of the tile are stacked along K, and the rank activations z are masked so
that each row meets the pages of its own adapter only. Rows without an adapter meet none: zeros are
added to their sums, which keeps them bitwise. Tiles of few rows mask z in registers
(:func:`add_expand`), those of many as they copy it (:func:`add_copied_expand`).

An adapter's *slot* is its number among the adapters of a tile. A step has ``SLOTS`` of them and
``PAGES`` pages of each, so K is ``SLOTS * PAGES * PAGE_ROWS``.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from moelora_kernels import types

#: As the host's, for kernels.
PAGE_ROWS = tl.constexpr(types.PAGE_ROWS)


@triton.jit
def spread(values, TIMES: tl.constexpr):
    """Each value ``TIMES`` times, one after another."""
    size: tl.constexpr = values.shape[0]
    return tl.reshape(tl.broadcast_to(values[:, None], [size, TIMES]), [size * TIMES])


@triton.jit
def tile_adapters(first, rows, inside, expert, group_ptr, NUM_ADAPTERS: tl.constexpr):
    """The adapters of a tile of rows of one expert.

    Returns:
        Adapter of each row or -1; its number among the adapters of the tile or -1; how many there
        are.
    """
    base_group = expert * (NUM_ADAPTERS + 1)
    group = tl.load(group_ptr + rows, mask=inside, other=base_group)
    # Rows are sorted by adapter, those of the base model first.
    before = tl.load(group_ptr + rows - 1, mask=inside & (rows > first), other=base_group)
    adapter = group - base_group - 1
    begins = ((adapter >= 0) & (group != before)).to(tl.int32)
    slot = tl.where(adapter >= 0, tl.cumsum(begins, 0) - 1, -1)
    return adapter, slot, tl.sum(begins, 0)


@triton.jit
def find_adapters(first_slot, adapter, slot, SLOTS: tl.constexpr):
    """``SLOTS`` adapters of a tile, -1 past the last, and the rows of each: ``[rows, SLOTS]``."""
    mine = slot[:, None] == (first_slot + tl.arange(0, SLOTS))[None, :]
    return tl.max(tl.where(mine, adapter[:, None], -1), 0), mine


@triton.jit
def find_pages(
    slot_adapter,
    first_page,
    table_ptr,
    NUM_EXPERTS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Pool rows ``[slots, PAGES]`` of adapters, -1 where there is no page.

    ``table_ptr`` points to the layer's B pages of adapter 0 for this expert.
    """
    page = first_page + tl.arange(0, PAGES)
    return tl.load(
        table_ptr + (slot_adapter[:, None] * MAX_PAGES + page[None, :]) * NUM_EXPERTS,
        mask=(slot_adapter >= 0)[:, None] & (page < MAX_PAGES)[None, :],
        other=-1,
    )


@triton.jit
def load_ranks(
    rows,
    adapter,
    first_page,
    z_ptr,
    Z_COLUMNS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
):
    """Rank activations ``[rows, PAGES * PAGE_ROWS]`` of each row's own adapter."""
    column = first_page * PAGE_ROWS + tl.arange(0, PAGES * PAGE_ROWS)
    return tl.load(
        z_ptr + rows[:, None] * Z_COLUMNS + column[None, :],
        mask=(adapter >= 0)[:, None] & (column < Z_COLUMNS)[None, :],
        other=0.0,
    )


@triton.jit
def load_pages(
    pool_row,
    columns,
    pool_ptr,
    width,
    SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
):
    """All rank rows of pages ``[slots, PAGES]``, one below the other, at some columns."""
    first = tl.where(pool_row >= 0, pool_row.to(tl.int64) * PAGE_ROWS, -PAGE_ROWS)
    rank_row = tl.reshape(
        first[:, :, None] + tl.arange(0, PAGE_ROWS)[None, None, :], [SLOTS * PAGES * PAGE_ROWS]
    )
    return tl.load(
        pool_ptr + rank_row[:, None] * width + columns[None, :],
        mask=(rank_row >= 0)[:, None] & (columns < width)[None, :],
        other=0.0,
    )


@triton.jit
def stack_ranks(
    z,
    mine,
    pool_row,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
):
    """``z`` of each row in the columns of its own adapter's pages, and zero in all others.

    Rank activations of pages that do not exist are not defined, so they must go as well.
    """
    z = tl.reshape(z, [ROWS, 1, PAGES, PAGE_ROWS])
    keep = mine[:, :, None, None] & (pool_row >= 0)[None, :, :, None]
    return tl.reshape(tl.where(keep, z, 0.0).to(z.dtype), [ROWS, SLOTS * PAGES * PAGE_ROWS])


class ExpandSizes(NamedTuple):
    """Sizes of what adapters add that kernels are compiled for.

    Attributes:
        parts: numbers of the matrices to whose sums is added: 0 and 1, gate and up; or 0.
        width: columns of B and of the sums.
        experts: of the page table.
        adapters: of the page table.
        max_pages: of the page table.
        z_columns: columns of the rank activations.
        slots: adapters of one step.
        pages: pages of each that one step has.
        stages: steps that are on their way at once.
        precision: of products, as :func:`moelora_kernels.backend.precision` says.
    """

    parts: tuple[int, ...]
    width: int
    experts: int
    adapters: int
    max_pages: int
    z_columns: int
    slots: int
    pages: int
    stages: int
    precision: str


class Update(NamedTuple):
    """Pointers to what adapters add to the sums of one matrix: ``z · B``.

    Attributes:
        z: rank activations.
        table: the layer's B pages of adapter 0 for the tile's expert.
        pool: pages of B.
    """

    z: Any
    table: Any
    pool: Any


@triton.jit
def find_updates(slot_adapter, first_page, updates, EXPAND: tl.constexpr):
    """Pool rows ``[slots, pages]`` of the pages of B that a step has, for each matrix."""
    return [
        find_pages(
            slot_adapter, first_page, updates[i].table,
            EXPAND.experts, EXPAND.max_pages, EXPAND.pages,
        )
        for i in EXPAND.parts
    ]  # fmt: skip


@triton.jit
def load_updates(pool_rows, columns, updates, EXPAND: tl.constexpr):
    """The pages of B that a step has, for each matrix."""
    return [
        load_pages(
            pool_rows[i], columns, updates[i].pool,
            EXPAND.width, EXPAND.slots, EXPAND.pages, PAGE_ROWS,
        )
        for i in EXPAND.parts
    ]  # fmt: skip


@triton.jit
def add_expand(
    totals,
    rows,
    adapter,
    slot,
    num_slots,
    mine,
    pool_rows,
    bs,
    columns,
    updates,
    EXPAND: tl.constexpr,
):
    """``total + z · B`` for each matrix, a step at a time, where a tile has few rows.

    ``mine``, ``pool_rows`` and the pages ``bs`` are those of the first step. With more than one
    stage all steps look up their own, without a branch, so that the pages of the next are copied
    ahead.
    """
    ROWS: tl.constexpr = rows.shape[0]
    for first_page in tl.static_range(0, EXPAND.max_pages, EXPAND.pages):
        zs = [
            load_ranks(
                rows, adapter, first_page, updates[i].z, EXPAND.z_columns, EXPAND.pages, PAGE_ROWS
            )
            for i in EXPAND.parts
        ]
        for first_slot in tl.range(0, num_slots, EXPAND.slots, num_stages=EXPAND.stages):
            if (EXPAND.stages > 1) | (first_slot > 0) | (first_page > 0):
                slot_adapter, mine = find_adapters(first_slot, adapter, slot, EXPAND.slots)
                pool_rows = find_updates(slot_adapter, first_page, updates, EXPAND)
                bs = load_updates(pool_rows, columns, updates, EXPAND)
            totals = [
                tl.dot(
                    stack_ranks(
                        zs[i], mine, pool_rows[i], ROWS, EXPAND.slots, EXPAND.pages, PAGE_ROWS
                    ),
                    bs[i],
                    totals[i],
                    input_precision=EXPAND.precision,
                )
                for i in EXPAND.parts
            ]
    return totals


@triton.jit
def add_copied_expand(
    totals,
    rows,
    slot,
    num_slots,
    slot_adapter,
    pool_rows,
    columns,
    updates,
    EXPAND: tl.constexpr,
):
    """``total + z · B`` for each matrix, a step at a time, where a tile has many rows.

    ``slot_adapter`` has all adapters of the tile, and ``pool_rows`` their first pages.
    """
    for first_page in tl.static_range(0, EXPAND.max_pages, EXPAND.pages):
        if first_page > 0:
            pool_rows = find_updates(slot_adapter, first_page, updates, EXPAND)
        for first_slot in tl.range(0, num_slots, EXPAND.slots, num_stages=EXPAND.stages):
            totals = [
                add_copied_step(
                    totals[i], rows, slot, first_slot, first_page, pool_rows[i], columns,
                    updates[i], EXPAND,
                )
                for i in EXPAND.parts
            ]  # fmt: skip
    return totals


@triton.jit
def add_copied_step(
    total,
    rows,
    slot,
    first_slot,
    first_page,
    pool_rows,
    columns,
    update,
    EXPAND: tl.constexpr,
):
    """``total + z · B`` for the adapters from ``first_slot`` on.

    Both factors are copied to shared memory as they are, so a loop of such steps copies ahead like
    that of a product. Rank activations of pages that do not exist must be zero.
    """
    LAST: tl.constexpr = pool_rows.shape[0] * EXPAND.pages - 1
    SLOT_RANKS: tl.constexpr = EXPAND.pages * PAGE_ROWS
    stacked = tl.arange(0, EXPAND.slots * SLOT_RANKS)
    # Division and remainder tell the compiler that numbers next to each other have one mask.
    own = slot[:, None] == (stacked // SLOT_RANKS + first_slot)[None, :]
    rank = stacked % SLOT_RANKS + first_page * PAGE_ROWS
    z = tl.load(
        update.z + rows[:, None] * EXPAND.z_columns + rank[None, :],
        mask=own & (rank < EXPAND.z_columns)[None, :],
        other=0.0,
    )
    # Slots past the last have no rows, so any page does for them.
    page = tl.minimum(stacked // PAGE_ROWS + first_slot * EXPAND.pages, LAST)
    pool_row = tl.gather(tl.reshape(pool_rows, [LAST + 1]), page, 0)
    b = tl.load(
        update.pool
        + (pool_row.to(tl.int64) * PAGE_ROWS + stacked % PAGE_ROWS)[:, None] * EXPAND.width
        + columns[None, :],
        mask=(pool_row >= 0)[:, None] & (columns < EXPAND.width)[None, :],
        other=0.0,
    )
    return tl.dot(z, b, total, input_precision=EXPAND.precision)
