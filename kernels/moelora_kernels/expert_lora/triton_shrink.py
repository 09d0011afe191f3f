"""The shrink of experts in Triton: ``z = scaling · A · x`` for rows of (token, expert).

Two forms. For few rows, one program per row: matrix-vector products with many loads in flight. For
many, programs take runs of rows that share expert and adapter, as the sort lists them, and use the
tensor cores. Where all experts name the same A pages of an adapter, a token is shrunk once for all
of its experts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, precision, scalar
from moelora_kernels.expert_lora.triton_expand import spread
from moelora_kernels.tiles import max_tiles
from moelora_kernels.tuning.tiles import ShrinkTiles
from moelora_kernels.types import PAGE_ROWS, Buffer, SitePages, TokenSort

#: Tokens of one block of the shrink by token, and programs that share the block.
CHUNK_TOKENS = 256
CHUNK_PROGRAMS = 32
#: Pages that a program of the shrink multiplies at once, at most.
STACK_PAGES = 8
#: Numbers of A that a program of one row multiplies at once, and bytes that it copies ahead.
STEP_NUMBERS = tl.constexpr(4096)
COPIED_BYTES = tl.constexpr(68 * 1024)
#: Registers of a thread where tokens are shrunk in the same launch as runs, which need fewer and
#: shall not wait for places on the processors. The assembler then takes as many, needed or not.
RUN_REGISTERS = 160


def shrink(
    x: Buffer,
    sort: TokenSort,
    sites: Sequence[SitePages],
    layer: Array,
    *,
    pairs: int,
    top_k: int | None,
    tiles: ShrinkTiles,
    out: Buffer | None,
) -> Buffer:
    """See :func:`moelora_kernels.shrink`."""
    shape = (len(sites), pairs, sites[0].max_rank) if out is None else out.shape
    rows = (sort.order, sort.group_of_row)
    inputs = (x, *rows, scalar(layer), *_factors(sites))
    constants: dict[str, Any] = {
        "TOP_K": 0 if top_k is None else top_k,
        "Z_ROWS": shape[1],
        "Z_COLUMNS": shape[2],
        **shrink_constants(x, sites),
    }
    grid: tuple[int, ...]
    max_registers = None
    if tiles.run_rows == 0:
        kernel, grid = shrink_rows, (pairs * len(sites),)
        constants["SITES"] = len(sites)
    else:
        kernel = shrink_runs
        if sort.run_tiles is None:
            raise ValueError("this sort has no runs: sort without run_rows=0")
        pages = min(constants["PAGE_LANES"], STACK_PAGES // len(sites))
        stack = pages * len(sites)
        groups = constants["NUM_EXPERTS"] * constants["NUM_ADAPTERS"]
        programs = min(tiles.programs, max_tiles(pairs, groups, tiles.run_rows))
        # Experts may share A of an adapter, which tokens are then multiplied with, not pairs.
        tokens = 0 if top_k is None or constants["NUM_EXPERTS"] == 1 else pairs // top_k
        token_programs = triton.cdiv(tokens, CHUNK_TOKENS) * CHUNK_PROGRAMS
        inputs = (x, *rows, sort.row_of_pair, sort.run_tiles, *inputs[3:])
        grid = (token_programs + programs, triton.cdiv(constants["MAX_PAGES"], pages))
        max_registers = RUN_REGISTERS if tokens else None
        if stack > 2:  # More pages make a step wider and give more warps work.
            tiles = replace(tiles, block_k=128, num_warps=4, num_stages=3)
        constants |= {
            "BLOCK_K": min(tiles.block_k, triton.next_power_of_2(x.shape[1])),
            "PAIRS": pairs,
            "RUN_ROWS": tiles.run_rows,
            "SITES": len(sites),
            "PAGES": pages,
            "PROGRAMS": programs,
            "NUM_RUN_TILES": sort.run_tiles.shape[0],
            "PRECISION": precision(x.dtype),
            "TOKEN_PROGRAMS": token_programs,
            "CHUNK_TOKENS": CHUNK_TOKENS,
            "CHUNK_PROGRAMS": CHUNK_PROGRAMS,
            "ADAPTERS_POW2": max(triton.next_power_of_2(constants["NUM_ADAPTERS"] + 1), 16),
            "EXPERTS_POW2": triton.next_power_of_2(constants["NUM_EXPERTS"]),
        }
    outputs = [jax.ShapeDtypeStruct(shape, x.dtype)]
    refs = None if out is None else [out]
    how = Launch(grid, tiles.num_warps, tiles.num_stages, max_registers)
    return launch(kernel, inputs, outputs, refs, how, **constants)[0]


def _factors(sites: Sequence[SitePages]) -> tuple[Array | None, ...]:
    """A pool, table and scaling of one or two sites."""
    factors = tuple(array for site in sites for array in (site.a_pool, site.table, site.scaling))
    return (*factors, *(None,) * (6 - len(factors)))


def shrink_constants(x: Buffer, sites: Sequence[SitePages]) -> dict[str, int]:
    """Compile-time parameters of a shrink."""
    _, _, adapters, pages, experts = sites[0].table.shape
    return {
        "WIDTH": x.shape[1],
        "NUM_EXPERTS": experts,
        "NUM_ADAPTERS": adapters,
        "MAX_PAGES": pages,
        "PAGE_LANES": triton.next_power_of_2(pages),
        "PAGE_ROWS": PAGE_ROWS,
    }


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
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    SITES: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_LANES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
):
    """One row and site per program."""
    row, site = tl.program_id(0) // SITES, tl.program_id(0) % SITES
    x_row = row
    if TOP_K > 0:
        # Past the last row the order is -1; nothing is read there.
        x_row = tl.load(order_ptr + row) // TOP_K
    shrink_row(
        row, x_row, site, tl.load(group_ptr + row), tl.load(layer_ptr), x_ptr,
        pool_0_ptr, table_0_ptr, scaling_0_ptr, pool_1_ptr, table_1_ptr, scaling_1_ptr, z_ptr,
        WIDTH, NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, PAGE_LANES, PAGE_ROWS, Z_ROWS, Z_COLUMNS,
    )  # fmt: skip


@triton.jit
def shrink_row(
    row,
    x_row,
    site,
    group,
    layer,
    x_ptr,
    pool_0_ptr,
    table_0_ptr,
    scaling_0_ptr,
    pool_1_ptr,
    table_1_ptr,
    scaling_1_ptr,
    z_ptr,
    WIDTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_LANES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
):
    """``z[site, row] = scaling · A · x[x_row]`` for one row and site."""
    adapter = group % (NUM_ADAPTERS + 1) - 1
    # Past the last row the group is -1.
    if (group >= 0) & (adapter >= 0):
        expert = group // (NUM_ADAPTERS + 1)
        x_ptr += x_row.to(tl.int64) * WIDTH
        z_ptr += (site * Z_ROWS + row).to(tl.int64) * Z_COLUMNS
        entry = (layer * 2 * NUM_ADAPTERS + adapter) * MAX_PAGES * NUM_EXPERTS + expert
        factor = (layer * NUM_ADAPTERS + adapter) * NUM_EXPERTS + expert
        # A branch per site keeps the alignment of each pool known to the compiler.
        if site == 0:
            shrink_pages(
                x_ptr, pool_0_ptr, table_0_ptr + entry, scaling_0_ptr + factor, z_ptr,
                WIDTH, NUM_EXPERTS, MAX_PAGES, PAGE_LANES, PAGE_ROWS,
            )  # fmt: skip
        elif pool_1_ptr is not None:
            shrink_pages(
                x_ptr, pool_1_ptr, table_1_ptr + entry, scaling_1_ptr + factor, z_ptr,
                WIDTH, NUM_EXPERTS, MAX_PAGES, PAGE_LANES, PAGE_ROWS,
            )  # fmt: skip


@triton.jit
def shrink_pages(
    x_ptr,
    pool_ptr,
    entry_ptr,
    scaling_ptr,
    z_ptr,
    WIDTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_LANES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
):
    """``z = scaling · A · x`` for one row and the pages that an adapter has, zero past them.

    Steps are copied ahead, as many as their bytes in shared memory allow: loads that wait for each
    other would take longer than the product that waits for them.
    """
    RANKS: tl.constexpr = PAGE_LANES * PAGE_ROWS
    STEP: tl.constexpr = STEP_NUMBERS // RANKS if RANKS < STEP_NUMBERS // 16 else 16
    NUMBER_BYTES: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth // 8
    STAGES: tl.constexpr = COPIED_BYTES // ((RANKS + 1) * STEP * NUMBER_BYTES) + 1
    rank = tl.arange(0, RANKS)
    page = rank // PAGE_ROWS
    pool_row = tl.load(entry_ptr + page * NUM_EXPERTS, mask=page < MAX_PAGES, other=-1)
    scaling = tl.load(scaling_ptr)
    has_page = pool_row >= 0
    a_ptrs = pool_ptr + (pool_row.to(tl.int64) * PAGE_ROWS + rank % PAGE_ROWS) * WIDTH
    column = tl.arange(0, STEP)
    products = tl.zeros([RANKS, STEP], tl.float32)
    for k in tl.range(0, WIDTH, STEP, num_stages=STAGES):
        inside = k + column < WIDTH
        x = tl.load(x_ptr + k + column, mask=inside, other=0.0)
        a_tile = a_ptrs[:, None] + k + column[None, :]
        a = tl.load(a_tile, mask=has_page[:, None] & inside[None, :], other=0.0)
        products += a.to(tl.float32) * x.to(tl.float32)[None, :]
    # Where there is no page, there may be no scaling either.
    z = tl.where(has_page, tl.sum(products, 1) * scaling, 0.0)
    tl.store(z_ptr + rank, z.to(z_ptr.dtype.element_ty), mask=page < MAX_PAGES)


@triton.jit
def shrink_runs(
    x_ptr,
    order_ptr,
    group_ptr,
    row_of_pair_ptr,
    run_tiles_ptr,
    layer_ptr,
    pool_0_ptr,
    table_0_ptr,
    scaling_0_ptr,
    pool_1_ptr,
    table_1_ptr,
    scaling_1_ptr,
    z_ptr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_LANES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAIRS: tl.constexpr,
    RUN_ROWS: tl.constexpr,
    SITES: tl.constexpr,
    PAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PROGRAMS: tl.constexpr,
    NUM_RUN_TILES: tl.constexpr,
    TOKEN_PROGRAMS: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    CHUNK_PROGRAMS: tl.constexpr,
    ADAPTERS_POW2: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
):
    """The first ``TOKEN_PROGRAMS`` programs shrink tokens, ``PROGRAMS`` others the listed runs.

    A token whose adapter has the same pages for all experts is shrunk once, and its rank
    activations are written to the rows of all of its experts.
    """
    program = tl.program_id(0)
    layer = tl.load(layer_ptr)
    if program >= TOKEN_PROGRAMS:
        run = program - TOKEN_PROGRAMS
        expert, adapter, first, end = load_run(run, run_tiles_ptr, NUM_RUN_TILES)
        while expert >= 0:
            # Those of the next run arrive during the product.
            run += PROGRAMS
            next_expert, next_adapter, next_first, next_end = load_run(
                run, run_tiles_ptr, NUM_RUN_TILES
            )
            shrink_run(
                expert, adapter, first, end, x_ptr, order_ptr, layer, pool_0_ptr, table_0_ptr,
                scaling_0_ptr, pool_1_ptr, table_1_ptr, scaling_1_ptr, z_ptr,
                WIDTH, TOP_K, NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, Z_ROWS, Z_COLUMNS,
                BLOCK_K, RUN_ROWS, SITES, PAGES, PRECISION, TOKEN_PROGRAMS > 0, EXPERTS_POW2,
            )  # fmt: skip
            expert, adapter, first, end = next_expert, next_adapter, next_first, next_end
    elif TOKEN_PROGRAMS > 0:
        if may_share_pages(
            layer, table_0_ptr, table_1_ptr,
            NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, SITES, PAGES, ADAPTERS_POW2,
        ):  # fmt: skip
            shrink_chunk(
                program, x_ptr, row_of_pair_ptr, group_ptr, layer, pool_0_ptr, table_0_ptr,
                scaling_0_ptr, pool_1_ptr, table_1_ptr, scaling_1_ptr, z_ptr,
                WIDTH, TOP_K, NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, Z_ROWS, Z_COLUMNS,
                BLOCK_K, PAIRS // TOP_K, RUN_ROWS, SITES, PAGES, PRECISION,
                CHUNK_TOKENS, CHUNK_PROGRAMS, ADAPTERS_POW2, EXPERTS_POW2,
            )  # fmt: skip


@triton.jit
def load_run(run, run_tiles_ptr, NUM_RUN_TILES: tl.constexpr):
    """Expert, adapter, first row and end row of an entry of the list; -1 past the last."""
    inside = run < NUM_RUN_TILES
    entry_ptr = run_tiles_ptr + run * 4
    return (
        tl.load(entry_ptr, mask=inside, other=-1),
        tl.load(entry_ptr + 1, mask=inside, other=-1),
        tl.load(entry_ptr + 2, mask=inside, other=-1),
        tl.load(entry_ptr + 3, mask=inside, other=-1),
    )


@triton.jit
def shrink_run(
    expert,
    adapter,
    first,
    end,
    x_ptr,
    order_ptr,
    layer,
    pool_0_ptr,
    table_0_ptr,
    scaling_0_ptr,
    pool_1_ptr,
    table_1_ptr,
    scaling_1_ptr,
    z_ptr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN_ROWS: tl.constexpr,
    SITES: tl.constexpr,
    PAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    SKIP_SHARED: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
):
    """Rows of one expert and adapter, from ``first`` to ``end``.

    The pages of all sites are columns of one product, for which the rows are read once. With
    ``SKIP_SHARED``, nothing is done where all experts share the pages.
    """
    rows = first + tl.arange(0, RUN_ROWS)
    inside = rows < end
    # All that is looked up at once, as each wait takes as long as some steps of the product.
    x_rows = rows
    if TOP_K > 0:
        x_rows = tl.load(order_ptr + rows, mask=inside, other=0) // TOP_K
    entry_ptrs, scaling_ptrs, page = find_entries(
        adapter, layer, table_0_ptr, scaling_0_ptr, table_1_ptr, scaling_1_ptr,
        NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, SITES, PAGES,
    )  # fmt: skip
    pool_row = tl.load(entry_ptrs + expert, mask=page < MAX_PAGES, other=-1)
    scaling = tl.load(scaling_ptrs + expert)
    shared = False
    if SKIP_SHARED:
        shared = have_shared_pages(
            entry_ptrs, scaling_ptrs, page < MAX_PAGES, expert, NUM_EXPERTS, EXPERTS_POW2
        )
    if not shared:
        a_ptrs = rank_rows(pool_row, pool_0_ptr, pool_1_ptr, WIDTH, PAGE_ROWS, SITES, PAGES)
        z = multiply_pages(
            x_rows, inside, pool_row, scaling, a_ptrs, x_ptr,
            WIDTH, BLOCK_K, PAGE_ROWS, PRECISION,
        )  # fmt: skip
        store_ranks(z, rows, inside, z_ptr, MAX_PAGES, PAGE_ROWS, Z_ROWS, Z_COLUMNS, SITES, PAGES)


@triton.jit
def shrink_chunk(
    program,
    x_ptr,
    row_of_pair_ptr,
    group_ptr,
    layer,
    pool_0_ptr,
    table_0_ptr,
    scaling_0_ptr,
    pool_1_ptr,
    table_1_ptr,
    scaling_1_ptr,
    z_ptr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOKENS: tl.constexpr,
    RUN_ROWS: tl.constexpr,
    SITES: tl.constexpr,
    PAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    CHUNK_PROGRAMS: tl.constexpr,
    ADAPTERS_POW2: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
):
    """Tokens of a chunk whose adapters share pages, ``RUN_ROWS`` of one adapter at a time.

    ``CHUNK_PROGRAMS`` programs share the chunk.
    """
    first_token = program // CHUNK_PROGRAMS * CHUNK_TOKENS
    token = first_token + tl.arange(0, CHUNK_TOKENS)
    first_row = tl.load(row_of_pair_ptr + token * TOP_K, mask=token < TOKENS, other=-1)
    group = tl.load(group_ptr + first_row, mask=first_row >= 0, other=0)
    # Adapter plus one: zero for the base model and for padding.
    number = group % (NUM_ADAPTERS + 1)
    numbers = tl.arange(0, ADAPTERS_POW2)
    counts = tl.histogram(number, ADAPTERS_POW2)
    tiles = tl.where(numbers > 0, (counts + RUN_ROWS - 1) // RUN_ROWS, 0)
    tiles_end = tl.cumsum(tiles, 0)
    lane = tl.arange(0, RUN_ROWS)
    for tile in range(program % CHUNK_PROGRAMS, tl.sum(tiles, 0), CHUNK_PROGRAMS):
        mine = tl.sum((tiles_end <= tile).to(tl.int32), 0)
        entry_ptrs, scaling_ptrs, page = find_entries(
            mine - 1, layer, table_0_ptr, scaling_0_ptr, table_1_ptr, scaling_1_ptr,
            NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, SITES, PAGES,
        )  # fmt: skip
        pool_row = tl.load(entry_ptrs + 0, mask=page < MAX_PAGES, other=-1)
        scaling = tl.load(scaling_ptrs + 0)
        a_ptrs = rank_rows(pool_row, pool_0_ptr, pool_1_ptr, WIDTH, PAGE_ROWS, SITES, PAGES)
        if have_shared_pages(
            entry_ptrs, scaling_ptrs, page < MAX_PAGES, 0, NUM_EXPERTS, EXPERTS_POW2
        ):
            before = tl.sum(tl.where(numbers < mine, tiles, 0), 0) * RUN_ROWS
            left = tl.sum(tl.where(numbers == mine, counts, 0), 0) + before - tile * RUN_ROWS
            # How many of the adapter's tokens there are up to each, from this tile on. The token of
            # a lane comes after all that have no more than the lane's number. Counting them takes
            # fewer registers than comparing each token with each lane, and so do the other runs.
            place = tl.cumsum((number == mine).to(tl.int32), 0) + before - tile * RUN_ROWS
            earlier = tl.histogram(tl.maximum(place, 0), RUN_ROWS, mask=place < RUN_ROWS)
            inside = lane < left
            tokens = tl.where(inside, first_token + tl.cumsum(earlier, 0), 0)
            z = multiply_pages(
                tokens, inside, pool_row, scaling, a_ptrs, x_ptr,
                WIDTH, BLOCK_K, PAGE_ROWS, PRECISION,
            )  # fmt: skip
            for choice in range(TOP_K):
                rows = tl.load(row_of_pair_ptr + tokens * TOP_K + choice, mask=inside, other=-1)
                store_ranks(
                    z, rows, inside, z_ptr,
                    MAX_PAGES, PAGE_ROWS, Z_ROWS, Z_COLUMNS, SITES, PAGES,
                )  # fmt: skip


@triton.jit
def find_entries(
    adapter,
    layer,
    table_0_ptr,
    scaling_0_ptr,
    table_1_ptr,
    scaling_1_ptr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    SITES: tl.constexpr,
    PAGES: tl.constexpr,
):
    """What this program multiplies with: pages of every site, those of the first before the others.

    Returns:
        Pointers to the entries and the scalings of expert 0, ``[SITES * PAGES]``, and which page of
        its site each is.
    """
    page = tl.arange(0, SITES * PAGES)
    site, page = page // PAGES, tl.program_id(1) * PAGES + page % PAGES
    entry = ((layer * 2 * NUM_ADAPTERS + adapter) * MAX_PAGES + page) * NUM_EXPERTS
    factor = (layer * NUM_ADAPTERS + adapter) * NUM_EXPERTS
    entry_ptrs, scaling_ptrs = table_0_ptr + entry, scaling_0_ptr + factor + tl.zeros_like(site)
    if SITES == 2:
        entry_ptrs = tl.where(site == 0, entry_ptrs, table_1_ptr + entry)
        scaling_ptrs = tl.where(site == 0, scaling_ptrs, scaling_1_ptr + factor)
    return entry_ptrs, scaling_ptrs, page


@triton.jit
def rank_rows(
    pool_row,
    pool_0_ptr,
    pool_1_ptr,
    WIDTH: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    SITES: tl.constexpr,
    PAGES: tl.constexpr,
):
    """A pointer to each row of A of the pages, ``[SITES * PAGES * PAGE_ROWS]``."""
    lane = tl.arange(0, SITES * PAGES * PAGE_ROWS)
    rank_row = spread(pool_row.to(tl.int64) * PAGE_ROWS, PAGE_ROWS) + lane % PAGE_ROWS
    a_ptrs = pool_0_ptr + rank_row * WIDTH
    if SITES == 2:
        a_ptrs = tl.where(lane < PAGES * PAGE_ROWS, a_ptrs, pool_1_ptr + rank_row * WIDTH)
    return a_ptrs


@triton.jit
def may_share_pages(
    layer,
    table_0_ptr,
    table_1_ptr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    SITES: tl.constexpr,
    PAGES: tl.constexpr,
    ADAPTERS_POW2: tl.constexpr,
):
    """Whether the first two experts share this program's first page of any adapter."""
    adapter = tl.arange(0, ADAPTERS_POW2)
    page = tl.program_id(1) * PAGES
    entry = ((layer * 2 * NUM_ADAPTERS + adapter) * MAX_PAGES + page) * NUM_EXPERTS
    inside = adapter < NUM_ADAPTERS
    pool_row = tl.load(table_0_ptr + entry, mask=inside, other=-1)
    shared = (pool_row >= 0) & (tl.load(table_0_ptr + entry + 1, mask=inside, other=-1) == pool_row)
    if SITES == 2:
        pool_row = tl.load(table_1_ptr + entry, mask=inside, other=-1)
        other = tl.load(table_1_ptr + entry + 1, mask=inside, other=-1)
        shared = shared | ((pool_row >= 0) & (other == pool_row))
    return tl.max(shared.to(tl.int32), 0) > 0


@triton.jit
def have_shared_pages(
    entry_ptrs,
    scaling_ptrs,
    inside,
    expert,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
):
    """Whether there are pages, and all experts have the same; see :func:`share_pages`."""
    pool_row = tl.load(entry_ptrs + expert, mask=inside, other=-1)
    shared = share_pages(entry_ptrs, scaling_ptrs, inside, expert, NUM_EXPERTS, EXPERTS_POW2)
    return shared & (tl.max(pool_row, 0) >= 0)


@triton.jit
def share_pages(
    entry_ptrs,
    scaling_ptrs,
    inside,
    expert,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
):
    """Whether all experts have the pages and the scaling that ``expert`` has.

    Pointers are those of expert 0; only entries ``inside`` are looked at.
    """
    pool_row = tl.load(entry_ptrs + expert, mask=inside, other=-1)
    # The pages of one other expert tell most adapters that share nothing.
    other = tl.load(entry_ptrs + (expert + 1) % NUM_EXPERTS, mask=inside, other=-1)
    shared = tl.max((other != pool_row).to(tl.int32), 0) == 0
    if shared:
        experts = tl.arange(0, EXPERTS_POW2)
        experts = tl.where(experts < NUM_EXPERTS, experts, 0)[None, :]
        others = tl.load(entry_ptrs[:, None] + experts, mask=inside[:, None], other=-1)
        scaling = tl.load(scaling_ptrs + expert)
        differ = tl.load(scaling_ptrs[:, None] + experts) != scaling[:, None]
        differ = differ | (others != pool_row[:, None])
        shared = tl.max(tl.max(differ.to(tl.int32), 1), 0) == 0
    return shared


@triton.jit
def multiply_pages(
    x_rows,
    inside,
    pool_row,
    scaling,
    a_ptrs,
    x_ptr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``scaling · A · x`` of some rows of x, in float32: zeros, where there is no page at all."""
    depth = tl.arange(0, BLOCK_K)
    has_page = spread(pool_row >= 0, PAGE_ROWS)
    x_tile = (x_ptr + x_rows.to(tl.int64) * WIDTH)[:, None] + depth[None, :]
    a_tile = a_ptrs[:, None] + depth[None, :]
    z = tl.zeros([x_rows.shape[0], a_ptrs.shape[0]], tl.float32)
    width = tl.where(tl.max(pool_row, 0) >= 0, WIDTH, 0)
    for k in range(0, width, BLOCK_K):
        x_mask, a_mask = inside[:, None], has_page[:, None]
        if WIDTH % BLOCK_K != 0:
            left = (k + depth < WIDTH)[None, :]
            x_mask, a_mask = x_mask & left, a_mask & left
        x = tl.load(x_tile + k, mask=x_mask, other=0.0)
        a = tl.load(a_tile + k, mask=a_mask, other=0.0)
        z = tl.dot(x, tl.trans(a), z, input_precision=PRECISION)
    # Where there is no page, there may be no scaling either.
    return tl.where(has_page[None, :], z * spread(scaling, PAGE_ROWS)[None, :], 0.0)


@triton.jit
def store_ranks(
    z,
    rows,
    inside,
    z_ptr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    SITES: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Write the rank activations of this program's pages to some rows."""
    column = tl.arange(0, SITES * PAGES * PAGE_ROWS)
    rank = tl.program_id(1) * PAGES * PAGE_ROWS + column % (PAGES * PAGE_ROWS)
    z_row = (column // (PAGES * PAGE_ROWS) * Z_ROWS)[None, :] + rows[:, None]
    tl.store(
        z_ptr + z_row.to(tl.int64) * Z_COLUMNS + rank[None, :],
        z.to(z_ptr.dtype.element_ty),
        mask=inside[:, None] & (rank < MAX_PAGES * PAGE_ROWS)[None, :],
    )
