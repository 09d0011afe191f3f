"""Expert projections with LoRA in Triton.

*shrink* has two forms. For few rows, one program per row and page: a matrix-vector product that has all its
loads in flight. For many, one program per run of rows that share expert and adapter, with the tensor cores.

*gate_up* and *down* are grouped matrix products over the tiles of the sort. Before they leave the
accumulator, :func:`add_expand` adds ``z · B``: the pages of several adapters of the tile are stacked along K, and
the rank activations are masked so that each row meets its own adapter's pages only. Rows without an adapter
meet none: zeros are added to their sums, which keeps them bitwise.
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
#: Tiles up to this height have registers left to load the first pages before the products begin.
EARLY_ROWS = 32


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
    # Equal sites would cost a branch in the kernel; a second site is optional.
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
            "PRECISION": _precision(x.dtype),
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
    lora = (None,) * 6
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
    lora = (None,) * 4
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
        "PRECISION": _precision(dtype),
    }


def _expand_constants(
    tiles: GemmTiles, rank_activations: Buffer | None, site: SitePages | None
) -> dict[str, int]:
    if rank_activations is None or site is None:
        names = ("NUM_ADAPTERS", "MAX_PAGES", "Z_ROWS", "Z_COLUMNS", "STACK", "PAGE_ROWS")
        return dict.fromkeys((*names, "EARLY_ROWS"), 0)
    return {
        "NUM_ADAPTERS": site.table.shape[2],
        "MAX_PAGES": site.table.shape[3],
        "Z_ROWS": rank_activations.shape[1],
        "Z_COLUMNS": rank_activations.shape[2],
        "STACK": tiles.stack,
        "PAGE_ROWS": PAGE_ROWS,
        "EARLY_ROWS": EARLY_ROWS,
    }


def _precision(dtype: jnp.dtype) -> str:
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
        Adapter of each row or -1; its number among the adapters of the tile or -1; how many there are.
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
def most_pages(adapter, entry_ptr, NUM_EXPERTS: tl.constexpr, MAX_PAGES: tl.constexpr):
    """Pages of the adapter that has most of them."""
    if MAX_PAGES == 1:
        return 1
    count = 0
    for page in tl.static_range(MAX_PAGES):
        pool_row = tl.load(
            entry_ptr + (adapter * MAX_PAGES + page) * NUM_EXPERTS, mask=adapter >= 0, other=-1
        )
        # Pages are a prefix, so the last one that exists counts.
        count = tl.where(tl.max(pool_row, 0) >= 0, page + 1, count)
    return count


@triton.jit
def stack_pages(
    first_entry,
    adapter,
    slot,
    num_slots,
    entry_ptr,
    NUM_EXPERTS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    STACK: tl.constexpr,
):
    """Pages ``first_entry`` and following of a tile, stacked along K: all first pages, then all second.

    Returns:
        Pool row of each of the ``STACK * PAGE_ROWS`` stacked rank rows, -1 where there is none; its
        column in the rank activations; and which rows of the tile it belongs to.
    """
    stacked = tl.arange(0, STACK * PAGE_ROWS)
    entry = first_entry + stacked // PAGE_ROWS
    # Where no row has an adapter, no slot is found.
    page = entry // tl.maximum(num_slots, 1)
    mine = slot[:, None] == (entry % tl.maximum(num_slots, 1))[None, :]
    stacked_adapter = tl.max(tl.where(mine, adapter[:, None], -1), 0)
    pool_row = tl.load(
        entry_ptr + (stacked_adapter * MAX_PAGES + page) * NUM_EXPERTS,
        mask=(stacked_adapter >= 0) & (page < MAX_PAGES),
        other=-1,
    )
    return pool_row, page * PAGE_ROWS + stacked % PAGE_ROWS, mine


@triton.jit
def load_stacked(
    pool_row,
    rank_column,
    mine,
    z_rows,
    columns,
    z_ptr,
    pool_ptr,
    WIDTH: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
):
    """Operands of one product ``z · B``: rank activations, zero but for a row's own pages; pages."""
    exists = pool_row >= 0
    z = tl.load(
        z_ptr + z_rows[:, None] * Z_COLUMNS + rank_column[None, :],
        mask=mine & exists[None, :],
        other=0.0,
    )
    b_row = pool_row.to(tl.int64) * PAGE_ROWS + rank_column % PAGE_ROWS
    b = tl.load(
        pool_ptr + b_row[:, None] * WIDTH + columns[None, :],
        mask=exists[:, None] & (columns < WIDTH)[None, :],
        other=0.0,
    )
    return z, b


@triton.jit
def add_rest(
    total,
    first_entry,
    num_entries,
    adapter,
    slot,
    num_slots,
    z_rows,
    columns,
    entry_ptr,
    z_ptr,
    pool_ptr,
    WIDTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    STACK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``total + z · B`` for the pages from ``first_entry`` on, ``STACK`` at a time."""
    for entry in range(first_entry, num_entries, STACK):
        pool_row, rank_column, mine = stack_pages(
            entry, adapter, slot, num_slots, entry_ptr, NUM_EXPERTS, MAX_PAGES, PAGE_ROWS, STACK
        )
        z, b = load_stacked(
            pool_row, rank_column, mine, z_rows, columns, z_ptr, pool_ptr,
            WIDTH, PAGE_ROWS, Z_COLUMNS,
        )  # fmt: skip
        total = tl.dot(z, b, total, input_precision=PRECISION)
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
    STACK: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    EARLY_ROWS: tl.constexpr,
):
    """One tile of rows and ``BLOCK_N`` intermediate columns per program: both halves, then activation."""
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
            # Looked up before the products, so that they hide the wait.
            adapter, slot, num_slots = tile_adapters(
                first, rows, inside, expert, group_ptr, NUM_ADAPTERS
            )
            entry = (layer * 2 + 1) * NUM_ADAPTERS * MAX_PAGES * NUM_EXPERTS + expert
            gate_row, rank_column, mine = stack_pages(
                0, adapter, slot, num_slots, gate_table_ptr + entry,
                NUM_EXPERTS, MAX_PAGES, PAGE_ROWS, STACK,
            )  # fmt: skip
            up_row, _, _ = stack_pages(
                0, adapter, slot, num_slots, up_table_ptr + entry,
                NUM_EXPERTS, MAX_PAGES, PAGE_ROWS, STACK,
            )  # fmt: skip
            gate_pages = most_pages(adapter, gate_table_ptr + entry, NUM_EXPERTS, MAX_PAGES)
            up_pages = most_pages(adapter, up_table_ptr + entry, NUM_EXPERTS, MAX_PAGES)
            up_z_ptr = z_ptr + Z_ROWS * Z_COLUMNS
            if BLOCK_M <= EARLY_ROWS:
                gate_z, gate_b = load_stacked(
                    gate_row, rank_column, mine, rows, columns, z_ptr, gate_pool_ptr,
                    INTERMEDIATE, PAGE_ROWS, Z_COLUMNS,
                )  # fmt: skip
                up_z, up_b = load_stacked(
                    up_row, rank_column, mine, rows, columns, up_z_ptr, up_pool_ptr,
                    INTERMEDIATE, PAGE_ROWS, Z_COLUMNS,
                )  # fmt: skip
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
            if num_slots > 0:
                if BLOCK_M > EARLY_ROWS:
                    gate_z, gate_b = load_stacked(
                        gate_row, rank_column, mine, rows, columns, z_ptr, gate_pool_ptr,
                        INTERMEDIATE, PAGE_ROWS, Z_COLUMNS,
                    )  # fmt: skip
                    up_z, up_b = load_stacked(
                        up_row, rank_column, mine, rows, columns, up_z_ptr, up_pool_ptr,
                        INTERMEDIATE, PAGE_ROWS, Z_COLUMNS,
                    )  # fmt: skip
                gate = tl.dot(gate_z, gate_b, gate, input_precision=PRECISION)
                up = tl.dot(up_z, up_b, up, input_precision=PRECISION)
                gate = add_rest(
                    gate, STACK, num_slots * gate_pages, adapter, slot, num_slots, rows, columns,
                    gate_table_ptr + entry, z_ptr, gate_pool_ptr,
                    INTERMEDIATE, NUM_EXPERTS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS, STACK, PRECISION,
                )  # fmt: skip
                up = add_rest(
                    up, STACK, num_slots * up_pages, adapter, slot, num_slots, rows, columns,
                    up_table_ptr + entry, up_z_ptr, up_pool_ptr,
                    INTERMEDIATE, NUM_EXPERTS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS, STACK, PRECISION,
                )  # fmt: skip
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
    STACK: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    EARLY_ROWS: tl.constexpr,
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
            # Looked up before the products, so that they hide the wait.
            adapter, slot, num_slots = tile_adapters(
                first, rows, inside, expert, group_ptr, NUM_ADAPTERS
            )
            entry = (layer * 2 + 1) * NUM_ADAPTERS * MAX_PAGES * NUM_EXPERTS + expert
            pool_row, rank_column, mine = stack_pages(
                0, adapter, slot, num_slots, table_ptr + entry,
                NUM_EXPERTS, MAX_PAGES, PAGE_ROWS, STACK,
            )  # fmt: skip
            num_pages = most_pages(adapter, table_ptr + entry, NUM_EXPERTS, MAX_PAGES)
            if BLOCK_M <= EARLY_ROWS:
                z, b = load_stacked(
                    pool_row, rank_column, mine, rows, columns, z_ptr, pool_ptr,
                    HIDDEN, PAGE_ROWS, Z_COLUMNS,
                )  # fmt: skip
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
            if num_slots > 0:
                if BLOCK_M > EARLY_ROWS:
                    z, b = load_stacked(
                        pool_row, rank_column, mine, rows, columns, z_ptr, pool_ptr,
                        HIDDEN, PAGE_ROWS, Z_COLUMNS,
                    )  # fmt: skip
                total = tl.dot(z, b, total, input_precision=PRECISION)
                total = add_rest(
                    total, STACK, num_slots * num_pages, adapter, slot, num_slots, rows, columns,
                    table_ptr + entry, z_ptr, pool_ptr,
                    HIDDEN, NUM_EXPERTS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS, STACK, PRECISION,
                )  # fmt: skip
        tl.store(
            out_ptr + rows.to(tl.int64)[:, None] * HIDDEN + columns[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=inside[:, None] & (columns < HIDDEN)[None, :],
        )
