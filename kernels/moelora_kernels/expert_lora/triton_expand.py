"""What adapters add to a tile of sums that is still in registers: ``z · B``, in Triton.

Pages of several adapters of the tile are stacked along K, and the rank activations z are masked so
that each row meets the pages of its own adapter only. Rows without an adapter meet none: zeros are
added to their sums, which keeps them bitwise. Tiles of few rows mask z in registers
(:func:`add_expand`), those of many as they copy it (:func:`add_stack`).
"""

import triton
import triton.language as tl


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


@triton.jit
def add_expand(
    total,
    rows,
    adapter,
    slot,
    num_slots,
    mine,
    pool_row,
    b,
    columns,
    z_ptr,
    table_ptr,
    pool_ptr,
    WIDTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPAND_STAGES: tl.constexpr = 1,
):
    """``total + z · B``, for ``SLOTS`` adapters and ``PAGES`` pages of each at a time.

    ``mine``, ``pool_row`` and the pages ``b`` are those of the first step. With more than one of
    ``EXPAND_STAGES`` all steps look up their own, without a branch, so that the pages of the next
    are copied ahead.
    """
    for first_page in tl.static_range(0, MAX_PAGES, PAGES):
        if num_slots > 0:
            z = load_ranks(rows, adapter, first_page, z_ptr, Z_COLUMNS, PAGES, PAGE_ROWS)
            for first_slot in tl.range(0, num_slots, SLOTS, num_stages=EXPAND_STAGES):
                if (EXPAND_STAGES > 1) | (first_slot > 0) | (first_page > 0):
                    slot_adapter, mine = find_adapters(first_slot, adapter, slot, SLOTS)
                    pool_row = find_pages(
                        slot_adapter, first_page, table_ptr, NUM_EXPERTS, MAX_PAGES, PAGES
                    )
                    b = load_pages(pool_row, columns, pool_ptr, WIDTH, SLOTS, PAGES, PAGE_ROWS)
                stacked = stack_ranks(z, mine, pool_row, ROWS, SLOTS, PAGES, PAGE_ROWS)
                total = tl.dot(stacked, b, total, input_precision=PRECISION)
    return total


@triton.jit
def add_stack(
    total,
    rows,
    slot,
    first_slot,
    first_page,
    pool_rows,
    columns,
    z_ptr,
    pool_ptr,
    WIDTH: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``total + z · B`` for ``SLOTS`` adapters from ``first_slot`` on, as a step of a loop.

    Both factors are copied to shared memory as they are, so a loop of such steps copies ahead like
    that of a product. ``pool_rows [slots, pages]`` are those of all adapters of the tile. Rank
    activations of pages that do not exist must be zero.
    """
    PAGES: tl.constexpr = pool_rows.shape[1]
    LAST: tl.constexpr = pool_rows.shape[0] * PAGES - 1
    stacked = tl.arange(0, SLOTS * PAGES * PAGE_ROWS)
    # Division and remainder tell the compiler that numbers next to each other have one mask.
    own = slot[:, None] == (stacked // (PAGES * PAGE_ROWS) + first_slot)[None, :]
    rank = stacked % (PAGES * PAGE_ROWS) + first_page * PAGE_ROWS
    z = tl.load(
        z_ptr + rows[:, None] * Z_COLUMNS + rank[None, :],
        mask=own & (rank < Z_COLUMNS)[None, :],
        other=0.0,
    )
    # Slots past the last have no rows, so any page does for them.
    page = tl.minimum(stacked // PAGE_ROWS + first_slot * PAGES, LAST)
    pool_row = tl.gather(tl.reshape(pool_rows, [LAST + 1]), page, 0)
    b = tl.load(
        pool_ptr
        + (pool_row.to(tl.int64) * PAGE_ROWS + stacked % PAGE_ROWS)[:, None] * WIDTH
        + columns[None, :],
        mask=(pool_row >= 0)[:, None] & (columns < WIDTH)[None, :],
        other=0.0,
    )
    return tl.dot(z, b, total, input_precision=PRECISION)


@triton.jit
def expand_both(
    gate,
    up,
    gate_z,
    up_z,
    mine,
    gate_row,
    up_row,
    gate_b,
    up_b,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of :func:`add_expand` for gate and up."""
    stacked = stack_ranks(gate_z, mine, gate_row, ROWS, SLOTS, PAGES, PAGE_ROWS)
    gate = tl.dot(stacked, gate_b, gate, input_precision=PRECISION)
    stacked = stack_ranks(up_z, mine, up_row, ROWS, SLOTS, PAGES, PAGE_ROWS)
    return gate, tl.dot(stacked, up_b, up, input_precision=PRECISION)
