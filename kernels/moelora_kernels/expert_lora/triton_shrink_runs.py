"""The shrink of many rows in Triton: runs of rows that share expert and adapter, on tensor cores.

A run is a stretch of sorted rows of one expert and adapter, and its rows are the M of a matrix
product; the pages of all sites, side by side, are its N, so rows are read once for gate and up.
Tokens whose adapter has the same pages for all experts are multiplied once, not once per expert.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from moelora_kernels.expert_lora.triton_expand import PAGE_ROWS, spread
from moelora_kernels.expert_lora.triton_shrink_rows import share_pages
from moelora_kernels.types import SitePages


class RunSizes(NamedTuple):
    """Sizes of the shrink of many rows, besides those of every shrink.

    Attributes:
        pairs: rows of the batch.
        run_rows: rows that a program multiplies at once; longer runs are cut.
        slots: programs that share the runs that begin in ``run_rows`` rows.
        pages: pages of each site that a program multiplies with.
        block_k: summed columns of one step.
        precision: of products, as :func:`moelora_kernels.backend.precision` says.
        token_programs: programs that shrink tokens for all of their experts.
        chunk_tokens: tokens among which those of one adapter are gathered.
        chunk_programs: programs that share these tokens.
    """

    pairs: int
    run_rows: int
    slots: int
    pages: int
    block_k: int
    precision: str
    token_programs: int
    chunk_tokens: int
    chunk_programs: int


@triton.jit
def shrink_runs(
    x_ptr,
    order_ptr,
    group_ptr,
    row_of_pair_ptr,
    layer_ptr,
    pool_0_ptr,
    table_0_ptr,
    scaling_0_ptr,
    pool_1_ptr,
    table_1_ptr,
    scaling_1_ptr,
    z_ptr,
    SIZES: tl.constexpr,
    RUNS: tl.constexpr,
):
    """The first ``token_programs`` programs shrink tokens, the others rows of (token, expert).

    A token whose adapter has the same pages for all experts is shrunk once, and its rank
    activations are written to the rows of all of its experts.
    """
    program = tl.program_id(0)
    layer = tl.load(layer_ptr)
    first = SitePages(pool_0_ptr, None, table_0_ptr, scaling_0_ptr)  # type: ignore[arg-type]
    second = SitePages(pool_1_ptr, None, table_1_ptr, scaling_1_ptr)  # type: ignore[arg-type]
    if program >= RUNS.token_programs:
        shrink_window(
            program - RUNS.token_programs, x_ptr, order_ptr, group_ptr, layer, first, second, z_ptr,
            SIZES, RUNS,
        )  # fmt: skip
    elif RUNS.token_programs > 0:
        shrink_chunk(
            program, x_ptr, row_of_pair_ptr, group_ptr, layer, first, second, z_ptr, SIZES, RUNS
        )


@triton.jit
def shrink_window(
    program,
    x_ptr,
    order_ptr,
    group_ptr,
    layer,
    first,
    second,
    z_ptr,
    SIZES: tl.constexpr,
    RUNS: tl.constexpr,
):
    """The runs that begin in a window of ``run_rows`` rows, shared among ``slots`` programs.

    One of more than ``run_rows`` is cut where windows begin, so that one adapter's batch spreads
    over the device. Where tokens are shrunk, runs whose pages all experts share are left out.
    """
    window, program_slot = program // RUNS.slots, program % RUNS.slots
    lane = tl.arange(0, RUNS.run_rows)
    rows = window * RUNS.run_rows + lane
    inside = rows < RUNS.pairs
    group = tl.load(group_ptr + rows, mask=inside, other=-1)
    before = tl.load(group_ptr + rows - 1, mask=inside & (rows > 0), other=-1)
    earlier = tl.load(
        group_ptr + rows - RUNS.run_rows, mask=inside & (rows >= RUNS.run_rows), other=-1
    )
    # Rows of the base model have no run, nor do those past the last, whose group is -1.
    has_adapter = (group >= 0) & (group % (SIZES.adapters + 1) > 0)
    # The run that goes on in this window is longer than that if two rows so far apart are of it.
    goes_on = tl.sum(tl.where(lane == 0, group, 0), 0) == group
    cut = (lane == 0) & (tl.max((goes_on & (group == earlier)).to(tl.int32), 0) > 0)
    begins = (has_adapter & ((group != before) | cut)).to(tl.int32)
    number = tl.where(begins > 0, tl.cumsum(begins, 0) - 1, -1)
    for run in range(program_slot, tl.sum(begins, 0), RUNS.slots):
        row = tl.max(tl.where(number == run, rows, 0), 0)
        run_group = tl.max(tl.where(number == run, group, 0), 0)
        adapter = run_group % (SIZES.adapters + 1) - 1
        expert = run_group // (SIZES.adapters + 1)
        # All that is looked up at once, as each wait takes as long as some steps of the product.
        run_rows = row + lane
        same = tl.load(group_ptr + run_rows, mask=run_rows < RUNS.pairs, other=-1) == run_group
        after = tl.load(
            group_ptr + row + RUNS.run_rows, mask=row + RUNS.run_rows < RUNS.pairs, other=-1
        )
        x_rows = run_rows
        if SIZES.top_k > 0:
            x_rows = tl.load(order_ptr + run_rows, mask=run_rows < RUNS.pairs, other=0)
            x_rows = x_rows // SIZES.top_k
        entry_ptrs, scaling_ptrs, page = find_entries(adapter, layer, first, second, SIZES, RUNS)
        pool_row = tl.load(entry_ptrs + expert, mask=page < SIZES.max_pages, other=-1)
        scaling = tl.load(scaling_ptrs + expert)
        a_ptrs = rank_rows(pool_row, first, second, SIZES, RUNS)
        # A longer run is cut where the next window begins.
        same = same & ((after != run_group) | (run_rows < (window + 1) * RUNS.run_rows))
        if RUNS.token_programs > 0:
            shared = share_pages(
                entry_ptrs, scaling_ptrs, page < SIZES.max_pages, expert,
                SIZES.experts, triton.next_power_of_2(SIZES.experts),
            )  # fmt: skip
        else:
            shared = False
        if not shared:
            z = multiply_pages(x_rows, same, pool_row, scaling, a_ptrs, x_ptr, SIZES, RUNS)
            store_ranks(z, run_rows, same, z_ptr, SIZES, RUNS)


@triton.jit
def shrink_chunk(
    program,
    x_ptr,
    row_of_pair_ptr,
    group_ptr,
    layer,
    first,
    second,
    z_ptr,
    SIZES: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Tokens of a chunk whose adapters share pages, ``run_rows`` of one adapter at a time.

    ``chunk_programs`` programs share the chunk.
    """
    TOKENS: tl.constexpr = RUNS.pairs // SIZES.top_k
    # One number for each adapter and for none; a histogram has sixteen at least.
    NUMBERS: tl.constexpr = max(triton.next_power_of_2(SIZES.adapters + 1), 16)
    token = program // RUNS.chunk_programs * RUNS.chunk_tokens + tl.arange(0, RUNS.chunk_tokens)
    first_row = tl.load(row_of_pair_ptr + token * SIZES.top_k, mask=token < TOKENS, other=-1)
    group = tl.load(group_ptr + first_row, mask=first_row >= 0, other=0)
    # Adapter plus one: zero for the base model and for padding.
    number = group % (SIZES.adapters + 1)
    numbers = tl.arange(0, NUMBERS)
    counts = tl.histogram(number, NUMBERS)
    tiles = tl.where(numbers > 0, (counts + RUNS.run_rows - 1) // RUNS.run_rows, 0)
    tiles_end = tl.cumsum(tiles, 0)
    lane = tl.arange(0, RUNS.run_rows)
    for tile in range(program % RUNS.chunk_programs, tl.sum(tiles, 0), RUNS.chunk_programs):
        mine = tl.sum((tiles_end <= tile).to(tl.int32), 0)
        adapter = mine - 1
        entry_ptrs, scaling_ptrs, page = find_entries(adapter, layer, first, second, SIZES, RUNS)
        pool_row = tl.load(entry_ptrs + 0, mask=page < SIZES.max_pages, other=-1)
        scaling = tl.load(scaling_ptrs + 0)
        a_ptrs = rank_rows(pool_row, first, second, SIZES, RUNS)
        if share_pages(
            entry_ptrs, scaling_ptrs, page < SIZES.max_pages, 0,
            SIZES.experts, triton.next_power_of_2(SIZES.experts),
        ):  # fmt: skip
            before = tl.sum(tl.where(numbers < mine, tiles, 0), 0)
            is_mine = number == mine
            place = tl.cumsum(is_mine.to(tl.int32), 0) - 1 - (tile - before) * RUNS.run_rows
            chosen = is_mine[:, None] & (place[:, None] == lane[None, :])
            tokens = tl.max(tl.where(chosen, token[:, None], -1), 0)
            z = multiply_pages(
                tl.maximum(tokens, 0), tokens >= 0, pool_row, scaling, a_ptrs, x_ptr, SIZES, RUNS
            )
            for choice in range(SIZES.top_k):
                rows = tl.load(
                    row_of_pair_ptr + tokens * SIZES.top_k + choice, mask=tokens >= 0, other=-1
                )
                store_ranks(z, rows, rows >= 0, z_ptr, SIZES, RUNS)


@triton.jit
def find_entries(adapter, layer, first, second, SIZES: tl.constexpr, RUNS: tl.constexpr):
    """What this program multiplies with: pages of every site, those of the first before the others.

    Returns:
        Pointers to the entries and the scalings of expert 0, ``[sites * pages]``, and which page of
        its site each is.
    """
    lane = tl.arange(0, SIZES.sites * RUNS.pages)
    site, page = lane // RUNS.pages, tl.program_id(1) * RUNS.pages + lane % RUNS.pages
    entry = ((layer * 2 * SIZES.adapters + adapter) * SIZES.max_pages + page) * SIZES.experts
    factor = (layer * SIZES.adapters + adapter) * SIZES.experts
    entry_ptrs, scaling_ptrs = first.table + entry, first.scaling + factor + tl.zeros_like(site)
    if SIZES.sites == 2:
        entry_ptrs = tl.where(site == 0, entry_ptrs, second.table + entry)
        scaling_ptrs = tl.where(site == 0, scaling_ptrs, second.scaling + factor)
    return entry_ptrs, scaling_ptrs, page


@triton.jit
def rank_rows(pool_row, first, second, SIZES: tl.constexpr, RUNS: tl.constexpr):
    """A pointer to each row of A of the pages, ``[sites * pages * PAGE_ROWS]``."""
    lane = tl.arange(0, SIZES.sites * RUNS.pages * PAGE_ROWS)
    rank_row = spread(pool_row.to(tl.int64) * PAGE_ROWS, PAGE_ROWS) + lane % PAGE_ROWS
    a_ptrs = first.a_pool + rank_row * SIZES.width
    if SIZES.sites == 2:
        of_first = lane < RUNS.pages * PAGE_ROWS
        a_ptrs = tl.where(of_first, a_ptrs, second.a_pool + rank_row * SIZES.width)
    return a_ptrs


@triton.jit
def multiply_pages(
    x_rows, inside, pool_row, scaling, a_ptrs, x_ptr, SIZES: tl.constexpr, RUNS: tl.constexpr
):
    """``scaling · A · x`` of some rows of x, float32 ``[rows, sites * pages * PAGE_ROWS]``."""
    depth = tl.arange(0, RUNS.block_k)
    has_page = spread(pool_row >= 0, PAGE_ROWS)
    x_tile = (x_ptr + x_rows.to(tl.int64) * SIZES.width)[:, None] + depth[None, :]
    a_tile = a_ptrs[:, None] + depth[None, :]
    z = tl.zeros([x_rows.shape[0], a_ptrs.shape[0]], tl.float32)
    for k in range(0, SIZES.width, RUNS.block_k):
        x_mask, a_mask = inside[:, None], has_page[:, None]
        if SIZES.width % RUNS.block_k != 0:
            left = (k + depth < SIZES.width)[None, :]
            x_mask, a_mask = x_mask & left, a_mask & left
        x = tl.load(x_tile + k, mask=x_mask, other=0.0)
        a = tl.load(a_tile + k, mask=a_mask, other=0.0)
        z = tl.dot(x, tl.trans(a), z, input_precision=RUNS.precision)
    # Where there is no page, there may be no scaling either.
    return tl.where(has_page[None, :], z * spread(scaling, PAGE_ROWS)[None, :], 0.0)


@triton.jit
def store_ranks(z, rows, inside, z_ptr, SIZES: tl.constexpr, RUNS: tl.constexpr):
    """Write the rank activations of this program's pages to some rows."""
    SITE_RANKS: tl.constexpr = RUNS.pages * PAGE_ROWS
    column = tl.arange(0, SIZES.sites * SITE_RANKS)
    rank = tl.program_id(1) * SITE_RANKS + column % SITE_RANKS
    z_row = (column // SITE_RANKS * SIZES.z_rows)[None, :] + rows[:, None]
    tl.store(
        z_ptr + z_row.to(tl.int64) * SIZES.z_columns + rank[None, :],
        z.to(z_ptr.dtype.element_ty),
        mask=inside[:, None] & (rank < SIZES.max_pages * PAGE_ROWS)[None, :],
    )
