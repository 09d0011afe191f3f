"""The shrink of few rows in Triton: one program per row, matrix-vector products.

Either in a launch of its own (:func:`shrink_rows`), or as the first programs of the product that
needs the rank activations (:func:`shrink_for_gate_up`, :func:`shrink_for_down`).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from moelora_kernels.expert_lora.triton_expand import PAGE_ROWS
from moelora_kernels.types import SitePages

#: Numbers of A that a program of one row multiplies at once, and bytes that it copies ahead.
STEP_NUMBERS = tl.constexpr(4096)
COPIED_BYTES = tl.constexpr(68 * 1024)


class ShrinkSizes(NamedTuple):
    """Sizes of a shrink that its kernels are compiled for.

    Attributes:
        width: columns of x and of A.
        top_k: choices per token, where x has a row of each token; 0 where it has sorted rows.
        sites: one or two.
        experts: of the page tables.
        adapters: of the page tables.
        max_pages: of the page tables.
        z_rows: rows of the rank activations of a site.
        z_columns: their columns, at least those of all pages.
    """

    width: int
    top_k: int
    sites: int
    experts: int
    adapters: int
    max_pages: int
    z_rows: int
    z_columns: int


@triton.jit
def shrink_rows(
    x_ptr,
    order_ptr,
    group_ptr,
    layer_ptr,
    pool_0_ptr,
    table_0_ptr,
    scaling_0_ptr,
    pool_1_ptr,
    table_1_ptr,
    scaling_1_ptr,
    z_ptr,
    SIZES: tl.constexpr,
):
    """One row and site per program."""
    row, site = tl.program_id(0) // SIZES.sites, tl.program_id(0) % SIZES.sites
    x_row = row
    if SIZES.top_k > 0:
        # Past the last row the order is -1; nothing is read there.
        x_row = tl.load(order_ptr + row) // SIZES.top_k
    shrink_row(
        row, x_row, site, tl.load(group_ptr + row), tl.load(layer_ptr), x_ptr,
        SitePages(pool_0_ptr, None, table_0_ptr, scaling_0_ptr),  # type: ignore[arg-type]
        SitePages(pool_1_ptr, None, table_1_ptr, scaling_1_ptr), z_ptr, SIZES,  # type: ignore[arg-type]
    )  # fmt: skip


@triton.jit
def shrink_for_gate_up(
    program,
    x_ptr,
    layer,
    group_ptr,
    order_ptr,
    row_of_pair_ptr,
    gate,
    up,
    z_ptr,
    SIZES: tl.constexpr,
    EXPERT_LANES: tl.constexpr,
):
    """One row for gate or for up; ``EXPERT_LANES`` is of :func:`share_pages`.

    Where all experts share the adapter's pages, the token's first row in sorted order is shrunk for
    all of them.

    Returns:
        How many rows are done, those of one expert or of all: 0 where the first row does the work.
    """
    row, site = program // 2, program % 2
    pair, group = tl.load(order_ptr + row), tl.load(group_ptr + row)
    adapter = group % (SIZES.adapters + 1) - 1
    done = 1
    # Past the last row the group is -1.
    if (group >= 0) & (adapter >= 0):
        PAGE_LANES: tl.constexpr = triton.next_power_of_2(SIZES.max_pages)
        table_ptr = gate.table if site == 0 else up.table
        scaling_ptr = gate.scaling if site == 0 else up.scaling
        page = tl.arange(0, PAGE_LANES)
        entry = ((layer * 2 * SIZES.adapters + adapter) * SIZES.max_pages + page) * SIZES.experts
        factor = (layer * SIZES.adapters + adapter) * SIZES.experts + tl.zeros_like(page)
        shared = share_pages(
            table_ptr + entry, scaling_ptr + factor, page < SIZES.max_pages,
            group // (SIZES.adapters + 1), SIZES.experts, EXPERT_LANES,
        )  # fmt: skip
        if shared:
            rows = rows_of_token(pair // SIZES.top_k, row_of_pair_ptr, SIZES.top_k)
            done = tl.where(tl.min(tl.where(rows >= 0, rows, row), 0) == row, SIZES.top_k, 0)
        if done > 0:
            shrink_row(row, pair // SIZES.top_k, site, group, layer, x_ptr, gate, up, z_ptr, SIZES)
            if shared:
                tl.debug_barrier()  # Numbers that other threads have stored are read.
                rows = rows_of_token(pair // SIZES.top_k, row_of_pair_ptr, SIZES.top_k)
                column = tl.arange(0, PAGE_LANES * PAGE_ROWS)
                inside = column < SIZES.max_pages * PAGE_ROWS
                z_ptrs = z_ptr + (site * SIZES.z_rows).to(tl.int64) * SIZES.z_columns + column
                z = tl.load(z_ptrs + row * SIZES.z_columns, mask=inside)
                tl.store(
                    z_ptrs[None, :] + rows[:, None] * SIZES.z_columns, z[None, :],
                    mask=(rows >= 0)[:, None] & inside[None, :],
                )  # fmt: skip
    return done


@triton.jit
def shrink_for_down(row, hidden_ptr, layer, group_ptr, down, z_ptr, SIZES: tl.constexpr):
    """One row."""
    group = tl.load(group_ptr + row)
    shrink_row(row, row, 0, group, layer, hidden_ptr, down, None, z_ptr, SIZES)


@triton.jit
def rows_of_token(token, row_of_pair_ptr, TOP_K: tl.constexpr):
    """The rows of a token's experts, -1 in lanes without one."""
    choice = tl.arange(0, triton.next_power_of_2(TOP_K))
    return tl.load(row_of_pair_ptr + token * TOP_K + choice, mask=choice < TOP_K, other=-1)


@triton.jit
def shrink_row(row, x_row, site, group, layer, x_ptr, first, second, z_ptr, SIZES: tl.constexpr):
    """``z[site, row] = scaling · A · x[x_row]`` for one row and site, ``first`` or ``second``."""
    adapter = group % (SIZES.adapters + 1) - 1
    # Past the last row the group is -1.
    if (group >= 0) & (adapter >= 0):
        expert = group // (SIZES.adapters + 1)
        x_ptr += x_row.to(tl.int64) * SIZES.width
        z_ptr += (site * SIZES.z_rows + row).to(tl.int64) * SIZES.z_columns
        entry = (layer * 2 * SIZES.adapters + adapter) * SIZES.max_pages * SIZES.experts + expert
        factor = (layer * SIZES.adapters + adapter) * SIZES.experts + expert
        # A branch per site keeps the alignment of each pool known to the compiler.
        if site == 0:
            shrink_pages(
                x_ptr, first.a_pool, first.table + entry, first.scaling + factor, z_ptr, SIZES
            )
        elif SIZES.sites == 2:
            shrink_pages(
                x_ptr, second.a_pool, second.table + entry, second.scaling + factor, z_ptr, SIZES
            )


@triton.jit
def shrink_pages(x_ptr, pool_ptr, entry_ptr, scaling_ptr, z_ptr, SIZES: tl.constexpr):
    """``z = scaling · A · x`` for one row and the pages that an adapter has, zero past them.

    Steps are copied ahead, as many as their bytes in shared memory allow: loads that wait for each
    other would take longer than the product that waits for them.
    """
    RANKS: tl.constexpr = triton.next_power_of_2(SIZES.max_pages) * PAGE_ROWS
    STEP: tl.constexpr = STEP_NUMBERS // RANKS if RANKS < STEP_NUMBERS // 16 else 16
    NUMBER_BYTES: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth // 8
    STAGES: tl.constexpr = COPIED_BYTES // ((RANKS + 1) * STEP * NUMBER_BYTES) + 1
    rank = tl.arange(0, RANKS)
    page = rank // PAGE_ROWS
    pool_row = tl.load(entry_ptr + page * SIZES.experts, mask=page < SIZES.max_pages, other=-1)
    scaling = tl.load(scaling_ptr)
    has_page = pool_row >= 0
    a_ptrs = pool_ptr + (pool_row.to(tl.int64) * PAGE_ROWS + rank % PAGE_ROWS) * SIZES.width
    column = tl.arange(0, STEP)
    products = tl.zeros([RANKS, STEP], tl.float32)
    for k in tl.range(0, SIZES.width, STEP, num_stages=STAGES):
        inside = k + column < SIZES.width
        x = tl.load(x_ptr + k + column, mask=inside, other=0.0)
        a_tile = a_ptrs[:, None] + k + column[None, :]
        a = tl.load(a_tile, mask=has_page[:, None] & inside[None, :], other=0.0)
        products += a.to(tl.float32) * x.to(tl.float32)[None, :]
    # Where there is no page, there may be no scaling either.
    z = tl.where(has_page, tl.sum(products, 1) * scaling, 0.0)
    tl.store(z_ptr + rank, z.to(z_ptr.dtype.element_ty), mask=page < SIZES.max_pages)


@triton.jit
def share_pages(
    entry_ptrs,
    scaling_ptrs,
    inside,
    expert,
    EXPERTS: tl.constexpr,
    EXPERT_LANES: tl.constexpr,
):
    """Whether all experts have the pages and the scaling that ``expert`` has.

    Pointers are those of expert 0; only entries ``inside`` are looked at. ``EXPERT_LANES`` is a
    power of two, no less than the experts.
    """
    pool_row = tl.load(entry_ptrs + expert, mask=inside, other=-1)
    # The pages of one other expert tell most adapters that share nothing.
    other = tl.load(entry_ptrs + (expert + 1) % EXPERTS, mask=inside, other=-1)
    shared = tl.max((other != pool_row).to(tl.int32), 0) == 0
    if shared:
        experts = tl.arange(0, EXPERT_LANES)
        experts = tl.where(experts < EXPERTS, experts, 0)[None, :]
        others = tl.load(entry_ptrs[:, None] + experts, mask=inside[:, None], other=-1)
        scaling = tl.load(scaling_ptrs + expert)
        differ = tl.load(scaling_ptrs[:, None] + experts) != scaling[:, None]
        differ = differ | (others != pool_row[:, None])
        shared = tl.max(tl.max(differ.to(tl.int32), 1), 0) == 0
    return shared
