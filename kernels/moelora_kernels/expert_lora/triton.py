"""Expert projections with LoRA in Triton.

*shrink* has two forms. For few rows, one program per row and page: a matrix-vector product that has
all its loads in flight. For many, programs take runs of rows that share expert and adapter, and use
the tensor cores.

*gate_up* and *down* are grouped matrix products over the tiles of the sort. Before the sums leave
the registers, ``z · B`` is added to them: pages of several adapters of the tile are stacked along
K, and the rank activations z are masked so that each row meets the pages of its own adapter only.
Rows without an adapter meet none: zeros are added to their sums, which keeps them bitwise.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array
from jax.typing import DTypeLike

from moelora_kernels.backend import Launch, launch, scalar
from moelora_kernels.tuning.tiles import GemmTiles, ShrinkTiles
from moelora_kernels.types import PAGE_ROWS, Buffer, SitePages, TokenSort

#: Rows whose runs a few programs of the shrink share.
WINDOW_ROWS = 16
#: Longer runs are cut here, for programs to share.
CUT_ROWS = 128


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
    _, _, adapters, pages, experts = sites[0].table.shape
    shape = (len(sites), pairs, sites[0].max_rank) if out is None else out.shape
    first, second = sites[0], sites[1] if len(sites) == 2 else None
    inputs = (
        x,
        sort.order,
        sort.group_of_row,
        scalar(layer),
        *(first.a_pool, first.table, first.scaling),
        *((None,) * 3 if second is None else (second.a_pool, second.table, second.scaling)),
    )
    constants = {
        "WIDTH": x.shape[1],
        "TOP_K": 0 if top_k is None else top_k,
        "NUM_EXPERTS": experts,
        "NUM_ADAPTERS": adapters,
        "MAX_PAGES": pages,
        "PAGE_ROWS": PAGE_ROWS,
        "Z_ROWS": shape[1],
        "Z_COLUMNS": shape[2],
        "BLOCK_K": min(tiles.block_k, triton.next_power_of_2(x.shape[1])),
    }
    how = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    if tiles.run_rows == 0:
        kernel, grid = shrink_rows, (pairs, pages, len(sites))
    else:
        kernel = shrink_runs
        windows = triton.cdiv(pairs, WINDOW_ROWS)
        grid = (windows * tiles.slots, pages, len(sites))
        constants |= {
            "PAIRS": pairs,
            "WINDOW_ROWS": WINDOW_ROWS,
            "RUN_ROWS": tiles.run_rows,
            "SLOTS": tiles.slots,
            "CUT_ROWS": CUT_ROWS,
            "PRECISION": precision(x.dtype),
        }
    outputs = [jax.ShapeDtypeStruct(shape, x.dtype)]
    refs = None if out is None else [out]
    return launch(kernel, inputs, outputs, refs, Launch(grid, **how), **constants)[0]


def gate_up(
    x: Buffer,
    weight: Array,
    bias: Array | None,
    sort: TokenSort,
    layer: Array,
    *,
    top_k: int,
    tile_rows: int,
    activation: str,
    rank_activations: Buffer | None,
    sites: tuple[SitePages, SitePages] | None,
    tiles: GemmTiles,
    out: Buffer | None,
) -> Buffer:
    """See :func:`moelora_kernels.gate_up`."""
    _, experts, _, intermediate, hidden = weight.shape
    pairs = x.shape[0] * top_k
    lora: tuple[Buffer | None, ...] = (None,) * 6
    if rank_activations is not None and sites is not None:
        gate, up = sites
        lora = (
            sort.group_of_row,
            rank_activations,
            *(gate.table, gate.b_pool, up.table, up.b_pool),
        )
    return launch(
        gate_up_tiles,
        (x, weight, bias, sort.order, sort.expert_tiles, scalar(layer), *lora),
        [jax.ShapeDtypeStruct((pairs, intermediate), x.dtype)],
        None if out is None else [out],
        _gemm_launch(tiles, pairs, tile_rows, experts, intermediate),
        HIDDEN=hidden,
        INTERMEDIATE=intermediate,
        TOP_K=top_k,
        ACTIVATION=activation,
        **_gemm_constants(x.dtype, tiles, tile_rows, experts, hidden),
        **_expand_constants(tiles, rank_activations, None if sites is None else sites[0]),
    )[0]


def down(
    hidden: Buffer,
    weight: Array,
    bias: Array | None,
    sort: TokenSort,
    layer: Array,
    *,
    pairs: int,
    tile_rows: int,
    rank_activations: Buffer | None,
    site: SitePages | None,
    dtype: DTypeLike,
    tiles: GemmTiles,
    out: Buffer | None,
) -> Buffer:
    """See :func:`moelora_kernels.down`."""
    _, experts, width, intermediate = weight.shape
    lora: tuple[Buffer | None, ...] = (None,) * 4
    if rank_activations is not None and site is not None:
        lora = (sort.group_of_row, rank_activations, site.table, site.b_pool)
    return launch(
        down_tiles,
        (hidden, weight, bias, sort.expert_tiles, scalar(layer), *lora),
        [jax.ShapeDtypeStruct((pairs, width), dtype)],
        None if out is None else [out],
        _gemm_launch(tiles, pairs, tile_rows, experts, width),
        HIDDEN=width,
        INTERMEDIATE=intermediate,
        **_gemm_constants(hidden.dtype, tiles, tile_rows, experts, intermediate),
        **_expand_constants(tiles, rank_activations, site),
    )[0]


def _gemm_launch(tiles: GemmTiles, pairs: int, tile_rows: int, experts: int, width: int) -> Launch:
    num_tiles = pairs // tile_rows + min(pairs, experts)
    blocks = triton.cdiv(width, tiles.block_n)
    return Launch((num_tiles * blocks,), num_warps=tiles.num_warps, num_stages=tiles.num_stages)


def _gemm_constants(
    dtype: jnp.dtype, tiles: GemmTiles, tile_rows: int, experts: int, depth: int
) -> dict[str, object]:
    block_k = min(tiles.block_k, max(triton.next_power_of_2(depth), 16))
    return {
        "NUM_EXPERTS": experts,
        # The smallest operand of a tensor core product.
        "BLOCK_M": max(triton.next_power_of_2(tile_rows), 16),
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": block_k,
        "PRECISION": precision(dtype),
    }


def _expand_constants(
    tiles: GemmTiles, rank_activations: Buffer | None, site: SitePages | None
) -> dict[str, int]:
    if rank_activations is None or site is None:
        names = ("NUM_ADAPTERS", "MAX_PAGES", "Z_ROWS", "Z_COLUMNS")
        return dict.fromkeys((*names, "PAGE_ROWS", "SLOTS", "PAGES"), 0)
    # A stack has several pages of one adapter where adapters have several.
    pages = min(triton.next_power_of_2(site.table.shape[3]), 4)
    stack = max(tiles.stack, 2 * pages)
    return {
        "NUM_ADAPTERS": site.table.shape[2],
        "MAX_PAGES": site.table.shape[3],
        "Z_ROWS": rank_activations.shape[1],
        "Z_COLUMNS": rank_activations.shape[2],
        "PAGE_ROWS": PAGE_ROWS,
        "SLOTS": stack // pages,
        "PAGES": pages,
    }


def precision(dtype: jnp.dtype) -> str:
    """float32 products must not be rounded to tf32."""
    return "ieee" if dtype == jnp.float32 else "tf32"


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
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row, page and site per program: ``z[site, row, page] = scaling · A · x[row]``."""
    row, page, site = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group = tl.load(group_ptr + row)
    adapter = group % (NUM_ADAPTERS + 1) - 1
    # Past the last row the group is -1.
    if (group >= 0) & (adapter >= 0):
        expert = group // (NUM_ADAPTERS + 1)
        layer = tl.load(layer_ptr)
        x_row = row
        if TOP_K > 0:
            x_row = tl.load(order_ptr + row) // TOP_K
        x_ptr += x_row.to(tl.int64) * WIDTH
        z_ptr += (site * Z_ROWS + row).to(tl.int64) * Z_COLUMNS + page * PAGE_ROWS
        entry = ((layer * 2 * NUM_ADAPTERS + adapter) * MAX_PAGES + page) * NUM_EXPERTS + expert
        factor = (layer * NUM_ADAPTERS + adapter) * NUM_EXPERTS + expert
        # A branch per site keeps the alignment of each pool known to the compiler.
        if site == 0:
            shrink_row(
                x_ptr, pool_0_ptr, table_0_ptr + entry, scaling_0_ptr + factor, z_ptr,
                WIDTH, PAGE_ROWS, BLOCK_K,
            )  # fmt: skip
        elif pool_1_ptr is not None:
            shrink_row(
                x_ptr, pool_1_ptr, table_1_ptr + entry, scaling_1_ptr + factor, z_ptr,
                WIDTH, PAGE_ROWS, BLOCK_K,
            )  # fmt: skip


@triton.jit
def shrink_row(
    x_ptr,
    pool_ptr,
    entry_ptr,
    scaling_ptr,
    z_ptr,
    WIDTH: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``z = scaling · A · x`` for one row and the page that a table entry names, if any."""
    pool_row = tl.load(entry_ptr)
    if pool_row >= 0:
        scaling = tl.load(scaling_ptr)
        rank = tl.arange(0, PAGE_ROWS)
        column = tl.arange(0, BLOCK_K)
        a_ptr = pool_ptr + pool_row.to(tl.int64) * PAGE_ROWS * WIDTH
        products = tl.zeros([PAGE_ROWS, BLOCK_K], tl.float32)
        for k in tl.range(0, WIDTH, BLOCK_K, loop_unroll_factor=4):
            inside = k + column < WIDTH
            x = tl.load(x_ptr + k + column, mask=inside, other=0.0)
            a_tile = a_ptr + rank[:, None] * WIDTH + k + column[None, :]
            a = tl.load(a_tile, mask=inside[None, :], other=0.0)
            products += a.to(tl.float32) * x.to(tl.float32)[None, :]
        z = tl.sum(products, 1) * scaling
        tl.store(z_ptr + rank, z.to(z_ptr.dtype.element_ty))


@triton.jit
def shrink_runs(
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
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAIRS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    RUN_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    CUT_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The runs that begin in a window of rows, shared among ``SLOTS`` programs per page and site.

    A run is a stretch of rows of one expert and adapter. Long ones are cut at multiples of
    ``CUT_ROWS``, so that one adapter's batch still spreads over the device.
    """
    window, program_slot = tl.program_id(0) // SLOTS, tl.program_id(0) % SLOTS
    page, site = tl.program_id(1), tl.program_id(2)
    layer = tl.load(layer_ptr)
    rows = window * WINDOW_ROWS + tl.arange(0, WINDOW_ROWS)
    group = tl.load(group_ptr + rows, mask=rows < PAIRS, other=-1)
    before = tl.load(group_ptr + rows - 1, mask=(rows > 0) & (rows < PAIRS), other=-1)
    # Rows of the base model have no run, nor do those past the last, whose group is -1.
    has_adapter = (group >= 0) & (group % (NUM_ADAPTERS + 1) > 0)
    begins = has_adapter & ((group != before) | (rows % CUT_ROWS == 0))
    slot = tl.cumsum(begins.to(tl.int32), 0) - 1
    num_runs = tl.sum(begins.to(tl.int32), 0)
    lane = tl.arange(0, RUN_ROWS)
    for number in range(program_slot, num_runs, SLOTS):
        chosen = begins & (slot == number)
        row = tl.max(tl.where(chosen, rows, 0), 0)
        run_group = tl.max(tl.where(chosen, group, 0), 0)
        adapter = run_group % (NUM_ADAPTERS + 1) - 1
        expert = run_group // (NUM_ADAPTERS + 1)
        entry = ((layer * 2 * NUM_ADAPTERS + adapter) * MAX_PAGES + page) * NUM_EXPERTS + expert
        factor = (layer * NUM_ADAPTERS + adapter) * NUM_EXPERTS + expert
        end = tl.minimum((row // CUT_ROWS + 1) * CUT_ROWS, PAIRS)
        while row < end:
            run_rows = row + lane
            same = run_rows < end
            same = same & (tl.load(group_ptr + run_rows, mask=same, other=-1) == run_group)
            x_rows = run_rows
            if TOP_K > 0:
                x_rows = tl.load(order_ptr + run_rows, mask=same, other=0) // TOP_K
            x_ptrs = x_ptr + x_rows.to(tl.int64) * WIDTH
            z_row = (site * Z_ROWS + run_rows).to(tl.int64)
            z_ptrs = z_ptr + z_row * Z_COLUMNS + page * PAGE_ROWS
            # A branch per site keeps the alignment of each pool known to the compiler.
            if site == 0:
                _shrink_run(
                    x_ptrs, same, pool_0_ptr, table_0_ptr + entry, scaling_0_ptr + factor, z_ptrs,
                    WIDTH, PAGE_ROWS, BLOCK_K, RUN_ROWS, PRECISION,
                )  # fmt: skip
            elif pool_1_ptr is not None:
                _shrink_run(
                    x_ptrs, same, pool_1_ptr, table_1_ptr + entry, scaling_1_ptr + factor, z_ptrs,
                    WIDTH, PAGE_ROWS, BLOCK_K, RUN_ROWS, PRECISION,
                )  # fmt: skip
            rows_left = tl.sum(same.to(tl.int32), 0) == RUN_ROWS
            row = tl.where(rows_left, row + RUN_ROWS, end)


@triton.jit
def _shrink_run(
    x_ptrs,
    same,
    pool_ptr,
    entry_ptr,
    scaling_ptr,
    z_ptrs,
    WIDTH: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pool_row = tl.load(entry_ptr)
    if pool_row >= 0:
        scaling = tl.load(scaling_ptr)
        rank = tl.arange(0, PAGE_ROWS)
        column = tl.arange(0, BLOCK_K)
        a_ptr = pool_ptr + pool_row.to(tl.int64) * PAGE_ROWS * WIDTH
        x_tile = x_ptrs[:, None] + column[None, :]
        a_tile = a_ptr + column[:, None] + rank[None, :] * WIDTH
        z = tl.zeros([RUN_ROWS, PAGE_ROWS], tl.float32)
        for k in range(0, WIDTH, BLOCK_K):
            if WIDTH % BLOCK_K == 0:
                x = tl.load(x_tile + k, mask=same[:, None], other=0.0)
                a = tl.load(a_tile + k)
            else:
                left = k + column < WIDTH
                x = tl.load(x_tile + k, mask=same[:, None] & left[None, :], other=0.0)
                a = tl.load(a_tile + k, mask=left[:, None], other=0.0)
            z = tl.dot(x, a, z, input_precision=PRECISION)
        z = (z * scaling).to(z_ptrs.dtype.element_ty)
        tl.store(z_ptrs[:, None] + rank[None, :], z, mask=same[:, None])


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
    WIDTH: tl.constexpr,
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
        pool_ptr + rank_row[:, None] * WIDTH + columns[None, :],
        mask=(rank_row >= 0)[:, None] & (columns < WIDTH)[None, :],
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
):
    """``total + z · B``, for ``SLOTS`` adapters and ``PAGES`` pages of each at a time.

    ``mine`` and ``pool_row`` are those of the first step.
    """
    for first_page in tl.static_range(0, MAX_PAGES, PAGES):
        if num_slots > 0:
            z = load_ranks(rows, adapter, first_page, z_ptr, Z_COLUMNS, PAGES, PAGE_ROWS)
            for first_slot in tl.range(0, num_slots, SLOTS, num_stages=1):
                if (first_slot > 0) | (first_page > 0):
                    slot_adapter, mine = find_adapters(first_slot, adapter, slot, SLOTS)
                    pool_row = find_pages(
                        slot_adapter, first_page, table_ptr, NUM_EXPERTS, MAX_PAGES, PAGES
                    )
                b = load_pages(pool_row, columns, pool_ptr, WIDTH, SLOTS, PAGES, PAGE_ROWS)
                stacked = stack_ranks(z, mine, pool_row, ROWS, SLOTS, PAGES, PAGE_ROWS)
                total = tl.dot(stacked, b, total, input_precision=PRECISION)
    return total


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr):
    """The gated activation of float32 sums."""
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate) * up
    # NaN must stay NaN, as in the reference.
    gate = tl.minimum(gate, 7.0, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -7.0, 7.0, propagate_nan=tl.PropagateNan.ALL)
    return (up + 1.0) * gate * tl.sigmoid(1.702 * gate)


@triton.jit
def gate_up_tiles(
    x_ptr,
    weight_ptr,
    bias_ptr,
    order_ptr,
    tiles_ptr,
    layer_ptr,
    group_ptr,
    z_ptr,
    gate_table_ptr,
    gate_pool_ptr,
    up_table_ptr,
    up_pool_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
):
    """One tile of rows and ``BLOCK_N`` intermediate columns per program."""
    NUM_BLOCKS: tl.constexpr = (INTERMEDIATE + BLOCK_N - 1) // BLOCK_N
    tile, block = tl.program_id(0) // NUM_BLOCKS, tl.program_id(0) % NUM_BLOCKS
    expert = tl.load(tiles_ptr + tile * 3)
    if expert >= 0:
        first, end = tl.load(tiles_ptr + tile * 3 + 1), tl.load(tiles_ptr + tile * 3 + 2)
        layer = tl.load(layer_ptr)
        rows = first + tl.arange(0, BLOCK_M)
        inside = rows < end
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        # Lanes without work repeat valid rows and columns, so that loads need no mask.
        token = tl.load(order_ptr + tl.where(inside, rows, first)) // TOP_K
        column = tl.minimum(columns, INTERMEDIATE - 1)
        depth = tl.arange(0, BLOCK_K)
        half = INTERMEDIATE * HIDDEN
        weight_ptr += (layer * NUM_EXPERTS + expert).to(tl.int64) * (2 * half)
        x_ptrs = x_ptr + token.to(tl.int64)[:, None] * HIDDEN + depth[None, :]
        gate_ptrs = weight_ptr + column[None, :] * HIDDEN + depth[:, None]
        up_ptrs = gate_ptrs + half
        if z_ptr is not None:
            adapter, slot, num_slots = tile_adapters(
                first, rows, inside, expert, group_ptr, NUM_ADAPTERS
            )
            table = (layer * 2 + 1) * NUM_ADAPTERS * MAX_PAGES * NUM_EXPERTS + expert
            gate_table_ptr += table
            up_table_ptr += table
            up_z_ptr = z_ptr + Z_ROWS * Z_COLUMNS
            # Looked up before the products, which then hide the wait.
            slot_adapter, mine = find_adapters(0, adapter, slot, SLOTS)
            gate_row = find_pages(slot_adapter, 0, gate_table_ptr, NUM_EXPERTS, MAX_PAGES, PAGES)
            up_row = find_pages(slot_adapter, 0, up_table_ptr, NUM_EXPERTS, MAX_PAGES, PAGES)
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, HIDDEN, BLOCK_K):
            if HIDDEN % BLOCK_K == 0:
                x = tl.load(x_ptrs + k)
                gate_weight = tl.load(gate_ptrs + k)
                up_weight = tl.load(up_ptrs + k)
            else:
                left = k + depth < HIDDEN
                x = tl.load(x_ptrs + k, mask=left[None, :], other=0.0)
                gate_weight = tl.load(gate_ptrs + k, mask=left[:, None], other=0.0)
                up_weight = tl.load(up_ptrs + k, mask=left[:, None], other=0.0)
            gate = tl.dot(x, gate_weight, gate, input_precision=PRECISION)
            up = tl.dot(x, up_weight, up, input_precision=PRECISION)
        if bias_ptr is not None:
            bias_ptr += (layer * NUM_EXPERTS + expert) * (2 * INTERMEDIATE)
            gate += tl.load(bias_ptr + column).to(tl.float32)[None, :]
            up += tl.load(bias_ptr + INTERMEDIATE + column).to(tl.float32)[None, :]
        if z_ptr is not None:
            for first_page in tl.static_range(0, MAX_PAGES, PAGES):
                if num_slots > 0:
                    gate_z = load_ranks(
                        rows, adapter, first_page, z_ptr, Z_COLUMNS, PAGES, PAGE_ROWS
                    )
                    up_z = load_ranks(
                        rows, adapter, first_page, up_z_ptr, Z_COLUMNS, PAGES, PAGE_ROWS
                    )
                    for first_slot in tl.range(0, num_slots, SLOTS, num_stages=1):
                        if (first_slot > 0) | (first_page > 0):
                            slot_adapter, mine = find_adapters(first_slot, adapter, slot, SLOTS)
                            gate_row = find_pages(
                                slot_adapter, first_page, gate_table_ptr,
                                NUM_EXPERTS, MAX_PAGES, PAGES,
                            )  # fmt: skip
                            up_row = find_pages(
                                slot_adapter, first_page, up_table_ptr,
                                NUM_EXPERTS, MAX_PAGES, PAGES,
                            )  # fmt: skip
                        gate_b = load_pages(
                            gate_row, columns, gate_pool_ptr, INTERMEDIATE, SLOTS, PAGES, PAGE_ROWS
                        )
                        up_b = load_pages(
                            up_row, columns, up_pool_ptr, INTERMEDIATE, SLOTS, PAGES, PAGE_ROWS
                        )
                        stacked = stack_ranks(
                            gate_z, mine, gate_row, BLOCK_M, SLOTS, PAGES, PAGE_ROWS
                        )
                        gate = tl.dot(stacked, gate_b, gate, input_precision=PRECISION)
                        stacked = stack_ranks(up_z, mine, up_row, BLOCK_M, SLOTS, PAGES, PAGE_ROWS)
                        up = tl.dot(stacked, up_b, up, input_precision=PRECISION)
        hidden = activate(gate, up, ACTIVATION)
        tl.store(
            out_ptr + rows.to(tl.int64)[:, None] * INTERMEDIATE + columns[None, :],
            hidden.to(out_ptr.dtype.element_ty),
            mask=inside[:, None] & (columns < INTERMEDIATE)[None, :],
        )


@triton.jit
def down_tiles(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    tiles_ptr,
    layer_ptr,
    group_ptr,
    z_ptr,
    table_ptr,
    pool_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
):
    """One tile of rows and ``BLOCK_N`` hidden columns per program."""
    NUM_BLOCKS: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    tile, block = tl.program_id(0) // NUM_BLOCKS, tl.program_id(0) % NUM_BLOCKS
    expert = tl.load(tiles_ptr + tile * 3)
    if expert >= 0:
        first, end = tl.load(tiles_ptr + tile * 3 + 1), tl.load(tiles_ptr + tile * 3 + 2)
        layer = tl.load(layer_ptr)
        rows = first + tl.arange(0, BLOCK_M)
        inside = rows < end
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.where(inside, rows, first)
        column = tl.minimum(columns, HIDDEN - 1)
        depth = tl.arange(0, BLOCK_K)
        weight_ptr += (layer * NUM_EXPERTS + expert).to(tl.int64) * (HIDDEN * INTERMEDIATE)
        hidden_ptrs = hidden_ptr + row.to(tl.int64)[:, None] * INTERMEDIATE + depth[None, :]
        weight_ptrs = weight_ptr + column[None, :] * INTERMEDIATE + depth[:, None]
        if z_ptr is not None:
            adapter, slot, num_slots = tile_adapters(
                first, rows, inside, expert, group_ptr, NUM_ADAPTERS
            )
            table_ptr += (layer * 2 + 1) * NUM_ADAPTERS * MAX_PAGES * NUM_EXPERTS + expert
            # Looked up before the products, which then hide the wait.
            slot_adapter, mine = find_adapters(0, adapter, slot, SLOTS)
            pool_row = find_pages(slot_adapter, 0, table_ptr, NUM_EXPERTS, MAX_PAGES, PAGES)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, INTERMEDIATE, BLOCK_K):
            if INTERMEDIATE % BLOCK_K == 0:
                hidden = tl.load(hidden_ptrs + k)
                weight = tl.load(weight_ptrs + k)
            else:
                left = k + depth < INTERMEDIATE
                hidden = tl.load(hidden_ptrs + k, mask=left[None, :], other=0.0)
                weight = tl.load(weight_ptrs + k, mask=left[:, None], other=0.0)
            total = tl.dot(hidden, weight, total, input_precision=PRECISION)
        if bias_ptr is not None:
            bias_ptr += (layer * NUM_EXPERTS + expert) * HIDDEN
            total += tl.load(bias_ptr + column).to(tl.float32)[None, :]
        if z_ptr is not None:
            total = add_expand(
                total, rows, adapter, slot, num_slots, mine, pool_row, columns,
                z_ptr, table_ptr, pool_ptr,
                HIDDEN, NUM_EXPERTS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS, BLOCK_M, SLOTS, PAGES,
                PRECISION,
            )  # fmt: skip
        tl.store(
            out_ptr + rows.to(tl.int64)[:, None] * HIDDEN + columns[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=inside[:, None] & (columns < HIDDEN)[None, :],
        )
