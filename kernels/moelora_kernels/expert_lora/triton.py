"""Expert projections with LoRA in Triton.

*shrink* has two forms. For few rows, one program per row: matrix-vector products with many loads in
flight. For many, programs take runs of rows that share expert and adapter, and use the tensor
cores. Where all experts name the same A pages of an adapter, a token is shrunk once for all of its
experts.

*gate_up* and *down* are grouped matrix products over the tiles of the sort. Before the sums leave
the registers, ``z · B`` is added to them: pages of several adapters of the tile are stacked along
K, and the rank activations z are masked so that each row meets the pages of its own adapter only.
Rows without an adapter meet none: zeros are added to their sums, which keeps them bitwise.

For few rows the programs of the shrink are the first of the product's own launch. The others read
weights meanwhile, and wait for the rank activations only when their sums are complete
(:func:`wait_for`). A GPU starts the programs of a launch in order, so those that wait always wait
for programs that run or are done.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array
from jax.typing import DTypeLike

from moelora_kernels.backend import Launch, launch, scalar
from moelora_kernels.buffers import given_or_new
from moelora_kernels.tiles import max_tiles
from moelora_kernels.tuning.tiles import GemmTiles, ShrinkTiles
from moelora_kernels.types import PAGE_ROWS, SIGNALS, Buffer, SitePages, TokenSort

#: Rows whose runs a few programs of the shrink share.
WINDOW_ROWS = 16
#: Tokens of one block of the shrink by token, and programs that share the block.
CHUNK_TOKENS = 256
CHUNK_PROGRAMS = 32
#: Pages that a program of the shrink multiplies at once, at most.
STACK_PAGES = 8
#: Rows of a tile from which on a tile whose rows have one adapter is treated apart: a prompt's.
ONE_ADAPTER_ROWS = tl.constexpr(64)
#: Columns of a page that a warp of a product loads at once when it shrinks.
SHRINK_COLUMNS = 64


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
    inputs = (x, *rows, scalar(layer), *_shrink_factors(sites))
    constants: dict[str, Any] = {
        "TOP_K": 0 if top_k is None else top_k,
        "Z_ROWS": shape[1],
        "Z_COLUMNS": shape[2],
        **_shrink_constants(x, sites, tiles.block_k),
    }
    grid: tuple[int, ...]
    if tiles.run_rows == 0:
        kernel, grid = shrink_rows, (pairs * len(sites),)
        constants["SITES"] = len(sites)
    else:
        kernel = shrink_runs
        pages = min(constants["PAGE_LANES"], STACK_PAGES // len(sites))
        stack = pages * len(sites)
        windows = triton.cdiv(pairs, WINDOW_ROWS) * tiles.slots
        # Experts may share A of an adapter, which tokens are then multiplied with, not pairs.
        tokens = 0 if top_k is None or constants["NUM_EXPERTS"] == 1 else pairs // top_k
        token_programs = triton.cdiv(tokens, CHUNK_TOKENS) * CHUNK_PROGRAMS
        inputs = (x, *rows, sort.row_of_pair, *inputs[3:])
        grid = (token_programs + windows, triton.cdiv(constants["MAX_PAGES"], pages))
        if stack > 2:  # More pages make a step wider and give more warps work.
            tiles = replace(tiles, block_k=64, num_warps=4, num_stages=4)
            constants["BLOCK_K"] = min(constants["BLOCK_K"], 64)
        constants |= {
            "PAIRS": pairs,
            "WINDOW_ROWS": WINDOW_ROWS,
            "RUN_ROWS": tiles.run_rows,
            "SITES": len(sites),
            "PAGES": pages,
            "SLOTS": tiles.slots,
            "PRECISION": precision(x.dtype),
            "TOKEN_PROGRAMS": token_programs,
            "CHUNK_TOKENS": CHUNK_TOKENS,
            "CHUNK_PROGRAMS": CHUNK_PROGRAMS,
            "ADAPTERS_POW2": max(triton.next_power_of_2(constants["NUM_ADAPTERS"] + 1), 16),
            "EXPERTS_POW2": triton.next_power_of_2(constants["NUM_EXPERTS"]),
        }
    outputs = [jax.ShapeDtypeStruct(shape, x.dtype)]
    refs = None if out is None else [out]
    how = Launch(grid, num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    return launch(kernel, inputs, outputs, refs, how, **constants)[0]


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
    sites: tuple[SitePages, SitePages] | None,
    rank_activations: Buffer | None,
    signals: Buffer | None,
    tiles: GemmTiles,
    out: Buffer | None,
) -> Buffer:
    """See :func:`moelora_kernels.gate_up`."""
    _, experts, _, intermediate, hidden = weight.shape
    pairs = x.shape[0] * top_k
    return _product(
        gate_up_tiles,
        (
            *(x, weight, bias, scalar(layer), sort.expert_tiles),
            *(sort.group_of_row, sort.order, sort.row_of_pair),
        ),
        jax.ShapeDtypeStruct((pairs, intermediate), x.dtype),
        out,
        _Expand(x, sort, sites, layer, pairs, top_k, rank_activations, signals),
        tiles,
        tile_rows,
        experts,
        HIDDEN=hidden,
        INTERMEDIATE=intermediate,
        TOP_K=top_k,
        ACTIVATION=activation,
        EXPERTS_POW2=triton.next_power_of_2(experts),
    )


def down(
    hidden: Buffer,
    weight: Array,
    bias: Array | None,
    sort: TokenSort,
    layer: Array,
    *,
    pairs: int,
    tile_rows: int,
    site: SitePages | None,
    rank_activations: Buffer | None,
    signals: Buffer | None,
    dtype: DTypeLike,
    tiles: GemmTiles,
    out: Buffer | None,
) -> Buffer:
    """See :func:`moelora_kernels.down`."""
    _, experts, width, intermediate = weight.shape
    sites = None if site is None else (site,)
    return _product(
        down_tiles,
        (hidden, weight, bias, scalar(layer), sort.expert_tiles, sort.group_of_row),
        jax.ShapeDtypeStruct((pairs, width), dtype),
        out,
        _Expand(hidden, sort, sites, layer, pairs, None, rank_activations, signals),
        tiles,
        tile_rows,
        experts,
        HIDDEN=width,
        INTERMEDIATE=intermediate,
    )


class _Expand(NamedTuple):
    """What a product adds for LoRA: see the parameters of :func:`moelora_kernels.gate_up`."""

    x: Buffer
    sort: TokenSort
    sites: Sequence[SitePages] | None
    layer: Array
    pairs: int
    top_k: int | None
    rank_activations: Buffer | None
    signals: Buffer | None


def _product(
    kernel: Any,
    inputs: tuple[Any, ...],
    shape: jax.ShapeDtypeStruct,
    out: Buffer | None,
    lora: _Expand,
    tiles: GemmTiles,
    tile_rows: int,
    experts: int,
    **constants: Any,
) -> Buffer:
    """Launch a grouped product, and the shrink before it or within.

    The kernel's parameters are ``inputs``, the arrays of its sites, rank activations, signals and
    output.
    """
    x = lora.x
    producers = 0
    arrays: tuple[Array | None, ...] = (None,) * (8 if kernel is gate_up_tiles else 4)
    z: Any = None
    signals: Any = lora.signals
    if lora.sites is not None:
        arrays = tuple(array for site in lora.sites for array in site)
        z = lora.rank_activations
        if tiles.shrink is not None:
            z = shrink(
                x, lora.sort, lora.sites, lora.layer,
                pairs=lora.pairs, top_k=lora.top_k, tiles=tiles.shrink, out=z,
            )  # fmt: skip
        else:
            producers = lora.pairs * len(lora.sites)
            z = given_or_new(z, (len(lora.sites), lora.pairs, lora.sites[0].max_rank), x.dtype)
            signals = given_or_new(signals, SIGNALS, jnp.int32)
    num_tiles = max_tiles(lora.pairs, experts, tile_rows)
    programs = num_tiles * triton.cdiv(shape.shape[1], tiles.block_n)
    constants |= product_constants(x, tiles, tile_rows, experts, lora.sites, z)
    constants |= {"PRODUCERS": producers, "PROGRAMS": programs, "SIGNALS": SIGNALS[0]}
    # Few rows have few steps to copy ahead for.
    constants["EXPAND_STAGES"] = 1 if producers else 2
    grid = (producers + programs,)
    how = Launch(grid, num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    if producers == 0:
        refs = None if out is None else [out]
        return launch(kernel, (*inputs, *arrays, z, None), [shape], refs, how, **constants)[0]
    target = given_or_new(out, shape.shape, shape.dtype)
    launch(kernel, (*inputs, *arrays), (), [z, signals, target], how, **constants)
    return target[...] if out is None else out


def product_constants(
    x: Buffer,
    tiles: GemmTiles,
    tile_rows: int,
    experts: int,
    sites: Sequence[SitePages] | None,
    rank_activations: Buffer | None,
) -> dict[str, Any]:
    """Compile-time parameters of a grouped product."""
    _, z_rows, z_columns = (0, 0, 0) if rank_activations is None else rank_activations.shape
    return expand_constants(x, tiles, sites) | {
        "Z_ROWS": z_rows,
        "Z_COLUMNS": z_columns,
        "NUM_EXPERTS": experts,
        # The smallest operand of a tensor core product.
        "BLOCK_M": max(triton.next_power_of_2(tile_rows), 16),
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": min(tiles.block_k, max(triton.next_power_of_2(x.shape[1]), 16)),
        "PRECISION": precision(x.dtype),
    }


def expand_constants(
    x: Buffer, tiles: GemmTiles, sites: Sequence[SitePages] | None
) -> dict[str, int]:
    """Compile-time parameters of what a product adds, and of the shrink in its launch."""
    names = ("NUM_ADAPTERS", "MAX_PAGES", "PAGE_LANES", "PAGE_ROWS")
    if not sites:
        return dict.fromkeys((*names, "SHRINK_K", "SLOTS", "PAGES"), 0)
    shrinking = _shrink_constants(x, sites, SHRINK_COLUMNS * tiles.num_warps)
    # A stack has several pages of one adapter where adapters have several.
    pages = min(shrinking["PAGE_LANES"], 4)
    return {name: shrinking[name] for name in names} | {
        "SHRINK_K": shrinking["BLOCK_K"],
        "SLOTS": max(tiles.stack, 2 * pages) // pages,
        "PAGES": pages,
    }


def _shrink_factors(sites: Sequence[SitePages]) -> tuple[Array | None, ...]:
    """A pool, table and scaling of one or two sites."""
    factors = tuple(array for site in sites for array in (site.a_pool, site.table, site.scaling))
    return (*factors, *(None,) * (6 - len(factors)))


def _shrink_constants(x: Buffer, sites: Sequence[SitePages], block_k: int) -> dict[str, int]:
    _, _, adapters, pages, experts = sites[0].table.shape
    return {
        "WIDTH": x.shape[1],
        "NUM_EXPERTS": experts,
        "NUM_ADAPTERS": adapters,
        "MAX_PAGES": pages,
        "PAGE_LANES": triton.next_power_of_2(pages),
        "PAGE_ROWS": PAGE_ROWS,
        "BLOCK_K": min(block_k, triton.next_power_of_2(x.shape[1])),
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
    SITES: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_LANES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
        BLOCK_K,
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
    BLOCK_K: tl.constexpr,
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
                WIDTH, NUM_EXPERTS, MAX_PAGES, PAGE_LANES, PAGE_ROWS, BLOCK_K,
            )  # fmt: skip
        elif pool_1_ptr is not None:
            shrink_pages(
                x_ptr, pool_1_ptr, table_1_ptr + entry, scaling_1_ptr + factor, z_ptr,
                WIDTH, NUM_EXPERTS, MAX_PAGES, PAGE_LANES, PAGE_ROWS, BLOCK_K,
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
    BLOCK_K: tl.constexpr,
):
    """``z = scaling · A · x`` for one row and the pages that an adapter has, if any."""
    pages = tl.arange(0, PAGE_LANES)
    entries = tl.load(entry_ptr + pages * NUM_EXPERTS, mask=pages < MAX_PAGES, other=-1)
    scaling = tl.load(scaling_ptr)
    rank = tl.arange(0, PAGE_ROWS)
    column = tl.arange(0, BLOCK_K)
    for page in range(0, tl.sum((entries >= 0).to(tl.int32), 0)):
        pool_row = tl.sum(tl.where(pages == page, entries, 0), 0)
        a_ptr = pool_ptr + pool_row.to(tl.int64) * PAGE_ROWS * WIDTH
        products = tl.zeros([PAGE_ROWS, BLOCK_K], tl.float32)
        for k in tl.range(0, WIDTH, BLOCK_K, loop_unroll_factor=4, num_stages=1):
            inside = k + column < WIDTH
            x = tl.load(x_ptr + k + column, mask=inside, other=0.0)
            a_tile = a_ptr + rank[:, None] * WIDTH + k + column[None, :]
            a = tl.load(a_tile, mask=inside[None, :], other=0.0)
            products += a.to(tl.float32) * x.to(tl.float32)[None, :]
        z = tl.sum(products, 1) * scaling
        tl.store(z_ptr + page * PAGE_ROWS + rank, z.to(z_ptr.dtype.element_ty))


@triton.jit
def signal(counter_ptr):
    """Say that what this program has stored may be read by others of the launch."""
    tl.debug_barrier()  # Stores of all threads come before the one that signals.
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait_for(counter_ptr, count):
    """Wait until ``count`` programs have signalled; what they stored may then be read."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < count:
        pass


@triton.jit
def leave(signals_ptr, PROGRAMS: tl.constexpr):
    """Whether this program is the last of ``PROGRAMS`` to get here."""
    return tl.atomic_add(signals_ptr, 1, sem="relaxed", scope="gpu") == PROGRAMS - 1


@triton.jit
def clear(signals_ptr, SIGNALS: tl.constexpr):
    """Make the counters ready for the next launch."""
    tl.store(signals_ptr + tl.arange(0, SIGNALS), tl.zeros([SIGNALS], tl.int32))


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
    WINDOW_ROWS: tl.constexpr,
    RUN_ROWS: tl.constexpr,
    SITES: tl.constexpr,
    PAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKEN_PROGRAMS: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    CHUNK_PROGRAMS: tl.constexpr,
    ADAPTERS_POW2: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
):
    """The first ``TOKEN_PROGRAMS`` programs shrink tokens, the others rows of (token, expert).

    A token whose adapter has the same pages for all experts is shrunk once, and its rank
    activations are written to the rows of all of its experts.
    """
    program = tl.program_id(0)
    layer = tl.load(layer_ptr)
    if program >= TOKEN_PROGRAMS:
        shrink_window(
            program - TOKEN_PROGRAMS, x_ptr, order_ptr, group_ptr, layer,
            pool_0_ptr, table_0_ptr, scaling_0_ptr, pool_1_ptr, table_1_ptr, scaling_1_ptr, z_ptr,
            WIDTH, TOP_K, NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, Z_ROWS, Z_COLUMNS,
            BLOCK_K, PAIRS, WINDOW_ROWS, RUN_ROWS, SITES, PAGES, SLOTS, PRECISION,
            TOKEN_PROGRAMS > 0, EXPERTS_POW2,
        )  # fmt: skip
    elif TOKEN_PROGRAMS > 0:
        shrink_chunk(
            program, x_ptr, row_of_pair_ptr, group_ptr, layer,
            pool_0_ptr, table_0_ptr, scaling_0_ptr, pool_1_ptr, table_1_ptr, scaling_1_ptr, z_ptr,
            WIDTH, TOP_K, NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, Z_ROWS, Z_COLUMNS,
            BLOCK_K, PAIRS // TOP_K, RUN_ROWS, SITES, PAGES, PRECISION,
            CHUNK_TOKENS, CHUNK_PROGRAMS, ADAPTERS_POW2, EXPERTS_POW2,
        )  # fmt: skip


@triton.jit
def shrink_window(
    program,
    x_ptr,
    order_ptr,
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
    PAIRS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    RUN_ROWS: tl.constexpr,
    SITES: tl.constexpr,
    PAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    SKIP_SHARED: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
):
    """The runs that begin in a window of rows, shared among ``SLOTS`` programs.

    A run is a stretch of rows of one expert and adapter. Where it is long, a new one begins at
    every multiple of ``RUN_ROWS`` that has as many of its rows before, so that one adapter's batch
    spreads over the device. The pages of all sites are columns of one product, for which the rows
    are read once. With ``SKIP_SHARED``, runs whose pages all experts share are left out.
    """
    window, program_slot = program // SLOTS, program % SLOTS
    rows = window * WINDOW_ROWS + tl.arange(0, WINDOW_ROWS)
    inside = rows < PAIRS
    group = tl.load(group_ptr + rows, mask=inside, other=-1)
    before = tl.load(group_ptr + rows - 1, mask=inside & (rows > 0), other=-1)
    earlier = tl.load(group_ptr + rows - RUN_ROWS, mask=inside & (rows >= RUN_ROWS), other=-1)
    # Rows of the base model have no run, nor do those past the last, whose group is -1.
    has_adapter = (group >= 0) & (group % (NUM_ADAPTERS + 1) > 0)
    cut = (rows % RUN_ROWS == 0) & (group == earlier)
    begins = (has_adapter & ((group != before) | cut)).to(tl.int32)
    number = tl.where(begins > 0, tl.cumsum(begins, 0) - 1, -1)
    lane = tl.arange(0, RUN_ROWS)
    for run in range(program_slot, tl.sum(begins, 0), SLOTS):
        row = tl.max(tl.where(number == run, rows, 0), 0)
        run_group = tl.max(tl.where(number == run, group, 0), 0)
        adapter = run_group % (NUM_ADAPTERS + 1) - 1
        expert = run_group // (NUM_ADAPTERS + 1)
        entry_ptrs, scaling_ptrs, page = find_entries(
            adapter, layer, table_0_ptr, scaling_0_ptr, table_1_ptr, scaling_1_ptr,
            NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, SITES, PAGES,
        )  # fmt: skip
        pool_row = tl.load(entry_ptrs + expert, mask=page < MAX_PAGES, other=-1)
        scaling = tl.load(scaling_ptrs + expert)
        a_ptrs = rank_rows(pool_row, pool_0_ptr, pool_1_ptr, WIDTH, PAGE_ROWS, SITES, PAGES)
        # The next run of the same rows begins here at the latest.
        end = tl.minimum(((row + RUN_ROWS - 1) // RUN_ROWS + 1) * RUN_ROWS, PAIRS)
        if SKIP_SHARED:
            if share_pages(
                entry_ptrs, scaling_ptrs, page < MAX_PAGES, expert, NUM_EXPERTS, EXPERTS_POW2
            ):
                end = row
        while row < end:
            run_rows = row + lane
            same = run_rows < end
            same = same & (tl.load(group_ptr + run_rows, mask=same, other=-1) == run_group)
            x_rows = run_rows
            if TOP_K > 0:
                x_rows = tl.load(order_ptr + run_rows, mask=same, other=0) // TOP_K
            z = multiply_pages(
                x_rows, same, pool_row, scaling, a_ptrs, x_ptr,
                WIDTH, BLOCK_K, PAGE_ROWS, PRECISION,
            )  # fmt: skip
            store_ranks(
                z, run_rows, same, z_ptr, MAX_PAGES, PAGE_ROWS, Z_ROWS, Z_COLUMNS, SITES, PAGES
            )
            all_same = tl.sum(same.to(tl.int32), 0) == RUN_ROWS
            row = tl.where(all_same, row + RUN_ROWS, end)


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
    token = program // CHUNK_PROGRAMS * CHUNK_TOKENS + tl.arange(0, CHUNK_TOKENS)
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
        adapter = mine - 1
        entry_ptrs, scaling_ptrs, page = find_entries(
            adapter, layer, table_0_ptr, scaling_0_ptr, table_1_ptr, scaling_1_ptr,
            NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, SITES, PAGES,
        )  # fmt: skip
        pool_row = tl.load(entry_ptrs + 0, mask=page < MAX_PAGES, other=-1)
        scaling = tl.load(scaling_ptrs + 0)
        a_ptrs = rank_rows(pool_row, pool_0_ptr, pool_1_ptr, WIDTH, PAGE_ROWS, SITES, PAGES)
        if share_pages(entry_ptrs, scaling_ptrs, page < MAX_PAGES, 0, NUM_EXPERTS, EXPERTS_POW2):
            before = tl.sum(tl.where(numbers < mine, tiles, 0), 0)
            is_mine = number == mine
            place = tl.cumsum(is_mine.to(tl.int32), 0) - 1 - (tile - before) * RUN_ROWS
            chosen = is_mine[:, None] & (place[:, None] == lane[None, :])
            tokens = tl.max(tl.where(chosen, token[:, None], -1), 0)
            z = multiply_pages(
                tl.maximum(tokens, 0), tokens >= 0, pool_row, scaling, a_ptrs, x_ptr,
                WIDTH, BLOCK_K, PAGE_ROWS, PRECISION,
            )  # fmt: skip
            for choice in range(TOP_K):
                rows = tl.load(
                    row_of_pair_ptr + tokens * TOP_K + choice, mask=tokens >= 0, other=-1
                )
                store_ranks(
                    z, rows, rows >= 0, z_ptr,
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
    """``scaling · A · x`` of some rows of x, in float32."""
    depth = tl.arange(0, BLOCK_K)
    has_page = spread(pool_row >= 0, PAGE_ROWS)
    x_tile = (x_ptr + x_rows.to(tl.int64) * WIDTH)[:, None] + depth[None, :]
    a_tile = a_ptrs[:, None] + depth[None, :]
    z = tl.zeros([x_rows.shape[0], a_ptrs.shape[0]], tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        x_mask, a_mask = inside[:, None], has_page[:, None]
        if WIDTH % BLOCK_K != 0:
            left = (k + depth < WIDTH)[None, :]
            x_mask, a_mask = x_mask & left, a_mask & left
        x = tl.load(x_tile + k, mask=x_mask, other=0.0)
        a = tl.load(a_tile + k, mask=a_mask, other=0.0)
        z = tl.dot(x, tl.trans(a), z, input_precision=PRECISION)
    return z * spread(scaling, PAGE_ROWS)[None, :]


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
def only_adapter(first, end, expert, group_ptr, NUM_ADAPTERS: tl.constexpr):
    """The adapter of a tile of rows of one expert if all of them have the same, else -1."""
    first_group, last_group = tl.load(group_ptr + first), tl.load(group_ptr + end - 1)
    return tl.where(first_group == last_group, first_group - expert * (NUM_ADAPTERS + 1) - 1, -1)


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

    ``mine`` and ``pool_row`` are those of the first step. With more than one of ``EXPAND_STAGES``
    all steps look up their own, without a branch, so that the pages of the next are copied ahead.
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
def expand_both(
    gate,
    up,
    gate_z,
    up_z,
    mine,
    gate_row,
    up_row,
    columns,
    gate_b_ptr,
    up_b_ptr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of :func:`add_expand` for gate and up."""
    gate_b = load_pages(gate_row, columns, gate_b_ptr, WIDTH, SLOTS, PAGES, PAGE_ROWS)
    up_b = load_pages(up_row, columns, up_b_ptr, WIDTH, SLOTS, PAGES, PAGE_ROWS)
    stacked = stack_ranks(gate_z, mine, gate_row, ROWS, SLOTS, PAGES, PAGE_ROWS)
    gate = tl.dot(stacked, gate_b, gate, input_precision=PRECISION)
    stacked = stack_ranks(up_z, mine, up_row, ROWS, SLOTS, PAGES, PAGE_ROWS)
    return gate, tl.dot(stacked, up_b, up, input_precision=PRECISION)


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
    layer_ptr,
    tiles_ptr,
    group_ptr,
    order_ptr,
    row_of_pair_ptr,
    gate_a_ptr,
    gate_b_ptr,
    gate_table_ptr,
    gate_scaling_ptr,
    up_a_ptr,
    up_b_ptr,
    up_table_ptr,
    up_scaling_ptr,
    z_ptr,
    signals_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PRODUCERS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SIGNALS: tl.constexpr,
    EXPAND_STAGES: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_LANES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    SHRINK_K: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
):
    """The first ``PRODUCERS`` programs shrink, the others multiply."""
    program = tl.program_id(0)
    layer = tl.load(layer_ptr)
    shrunk_ptr = None if PRODUCERS == 0 else signals_ptr + 1
    if program >= PRODUCERS:
        gate_up_tile(
            program - PRODUCERS, x_ptr, weight_ptr, bias_ptr, layer, tiles_ptr, group_ptr,
            order_ptr, gate_b_ptr, gate_table_ptr, up_b_ptr, up_table_ptr, z_ptr, shrunk_ptr,
            PRODUCERS, out_ptr,
            HIDDEN, INTERMEDIATE, TOP_K, ACTIVATION, NUM_EXPERTS, BLOCK_M, BLOCK_N, BLOCK_K,
            PRECISION, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, Z_ROWS, Z_COLUMNS, SLOTS, PAGES,
            EXPAND_STAGES,
        )  # fmt: skip
        if PRODUCERS > 0:
            if leave(signals_ptr, PROGRAMS):
                wait_for(shrunk_ptr, PRODUCERS)
                clear(signals_ptr, SIGNALS)
    elif PRODUCERS > 0:
        shrink_for_gate_up(
            program, x_ptr, layer, group_ptr, order_ptr, row_of_pair_ptr, gate_a_ptr,
            gate_table_ptr, gate_scaling_ptr, up_a_ptr, up_table_ptr, up_scaling_ptr, z_ptr,
            HIDDEN, TOP_K, NUM_EXPERTS, EXPERTS_POW2, NUM_ADAPTERS, MAX_PAGES, PAGE_LANES,
            PAGE_ROWS, Z_ROWS, Z_COLUMNS, SHRINK_K,
        )  # fmt: skip
        signal(shrunk_ptr)


@triton.jit
def shrink_for_gate_up(
    program,
    x_ptr,
    layer,
    group_ptr,
    order_ptr,
    row_of_pair_ptr,
    gate_a_ptr,
    gate_table_ptr,
    gate_scaling_ptr,
    up_a_ptr,
    up_table_ptr,
    up_scaling_ptr,
    z_ptr,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_LANES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row for gate or for up.

    Where all experts share the adapter's pages, the row of a token's first expert is shrunk for all
    of them.
    """
    row, site = program // 2, program % 2
    pair, group = tl.load(order_ptr + row), tl.load(group_ptr + row)
    adapter = group % (NUM_ADAPTERS + 1) - 1
    # Past the last row the group is -1.
    if (group >= 0) & (adapter >= 0):
        table_ptr = gate_table_ptr if site == 0 else up_table_ptr
        scaling_ptr = gate_scaling_ptr if site == 0 else up_scaling_ptr
        page = tl.arange(0, PAGE_LANES)
        entry = ((layer * 2 * NUM_ADAPTERS + adapter) * MAX_PAGES + page) * NUM_EXPERTS
        factor = (layer * NUM_ADAPTERS + adapter) * NUM_EXPERTS + tl.zeros_like(page)
        shared = share_pages(
            table_ptr + entry, scaling_ptr + factor, page < MAX_PAGES,
            group // (NUM_ADAPTERS + 1), NUM_EXPERTS, EXPERTS_POW2,
        )  # fmt: skip
        if (pair % TOP_K == 0) | (shared == 0):
            shrink_row(
                row, pair // TOP_K, site, group, layer, x_ptr,
                gate_a_ptr, gate_table_ptr, gate_scaling_ptr,
                up_a_ptr, up_table_ptr, up_scaling_ptr, z_ptr,
                HIDDEN, NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, PAGE_LANES, PAGE_ROWS,
                Z_ROWS, Z_COLUMNS, BLOCK_K,
            )  # fmt: skip
            if shared:
                tl.debug_barrier()  # Numbers that other threads have stored are read.
                column = tl.arange(0, PAGE_LANES * PAGE_ROWS)
                inside = column < MAX_PAGES * PAGE_ROWS
                z_ptrs = z_ptr + (site * Z_ROWS).to(tl.int64) * Z_COLUMNS + column
                z = tl.load(z_ptrs + row * Z_COLUMNS, mask=inside)
                for choice in range(1, TOP_K):
                    other = tl.load(row_of_pair_ptr + pair + choice)
                    tl.store(z_ptrs + other * Z_COLUMNS, z, mask=inside)


@triton.jit
def gate_up_tile(
    program,
    x_ptr,
    weight_ptr,
    bias_ptr,
    layer,
    tiles_ptr,
    group_ptr,
    order_ptr,
    gate_b_ptr,
    gate_table_ptr,
    up_b_ptr,
    up_table_ptr,
    z_ptr,
    shrunk_ptr,
    producers,
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
    PAGE_ROWS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
    EXPAND_STAGES: tl.constexpr = 1,
):
    """One tile of rows and ``BLOCK_N`` intermediate columns.

    Where ``producers`` programs of the launch make the rank activations, ``shrunk_ptr`` is the
    counter that they signal, else it is None. See :func:`add_expand` for ``EXPAND_STAGES``.
    """
    NUM_BLOCKS: tl.constexpr = (INTERMEDIATE + BLOCK_N - 1) // BLOCK_N
    tile, block = program // NUM_BLOCKS, program % NUM_BLOCKS
    expert = tl.load(tiles_ptr + tile * 3)
    if expert >= 0:
        first, end = tl.load(tiles_ptr + tile * 3 + 1), tl.load(tiles_ptr + tile * 3 + 2)
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
            if BLOCK_M >= ONE_ADAPTER_ROWS:
                only = only_adapter(first, end, expert, group_ptr, NUM_ADAPTERS)
                only_slot = only + tl.zeros([1], tl.int32)
                only_gate_row = find_pages(
                    only_slot, 0, gate_table_ptr, NUM_EXPERTS, MAX_PAGES, PAGES
                )
                only_up_row = find_pages(only_slot, 0, up_table_ptr, NUM_EXPERTS, MAX_PAGES, PAGES)
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
                if shrunk_ptr is not None:
                    wait_for(shrunk_ptr, producers)
                for first_page in tl.static_range(0, MAX_PAGES, PAGES):
                    gate_z = load_ranks(
                        rows, adapter, first_page, z_ptr, Z_COLUMNS, PAGES, PAGE_ROWS
                    )
                    up_z = load_ranks(
                        rows, adapter, first_page, up_z_ptr, Z_COLUMNS, PAGES, PAGE_ROWS
                    )
                    several = num_slots
                    if BLOCK_M >= ONE_ADAPTER_ROWS:
                        if only >= 0:
                            several = 0
                            if first_page > 0:
                                only_gate_row = find_pages(
                                    only_slot, first_page, gate_table_ptr,
                                    NUM_EXPERTS, MAX_PAGES, PAGES,
                                )  # fmt: skip
                                only_up_row = find_pages(
                                    only_slot, first_page, up_table_ptr,
                                    NUM_EXPERTS, MAX_PAGES, PAGES,
                                )  # fmt: skip
                            gate, up = expand_both(
                                gate, up, gate_z, up_z, (adapter >= 0)[:, None], only_gate_row,
                                only_up_row, columns, gate_b_ptr, up_b_ptr,
                                INTERMEDIATE, BLOCK_M, 1, PAGES, PAGE_ROWS, PRECISION,
                            )  # fmt: skip
                    for first_slot in tl.range(0, several, SLOTS, num_stages=EXPAND_STAGES):
                        if (EXPAND_STAGES > 1) | (first_slot > 0) | (first_page > 0):
                            slot_adapter, mine = find_adapters(first_slot, adapter, slot, SLOTS)
                            gate_row = find_pages(
                                slot_adapter, first_page, gate_table_ptr,
                                NUM_EXPERTS, MAX_PAGES, PAGES,
                            )  # fmt: skip
                            up_row = find_pages(
                                slot_adapter, first_page, up_table_ptr,
                                NUM_EXPERTS, MAX_PAGES, PAGES,
                            )  # fmt: skip
                        gate, up = expand_both(
                            gate, up, gate_z, up_z, mine, gate_row, up_row, columns,
                            gate_b_ptr, up_b_ptr,
                            INTERMEDIATE, BLOCK_M, SLOTS, PAGES, PAGE_ROWS, PRECISION,
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
    layer_ptr,
    tiles_ptr,
    group_ptr,
    a_ptr,
    b_ptr,
    table_ptr,
    scaling_ptr,
    z_ptr,
    signals_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PRODUCERS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SIGNALS: tl.constexpr,
    EXPAND_STAGES: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_LANES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    SHRINK_K: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
):
    """The first ``PRODUCERS`` programs shrink, the others multiply."""
    program = tl.program_id(0)
    layer = tl.load(layer_ptr)
    shrunk_ptr = None if PRODUCERS == 0 else signals_ptr + 1
    if program >= PRODUCERS:
        down_tile(
            program - PRODUCERS, hidden_ptr, weight_ptr, bias_ptr, layer, tiles_ptr, group_ptr,
            b_ptr, table_ptr, z_ptr, shrunk_ptr, PRODUCERS, out_ptr,
            HIDDEN, INTERMEDIATE, NUM_EXPERTS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS, SLOTS, PAGES,
            EXPAND_STAGES,
        )  # fmt: skip
        if PRODUCERS > 0:
            if leave(signals_ptr, PROGRAMS):
                wait_for(shrunk_ptr, PRODUCERS)
                clear(signals_ptr, SIGNALS)
    elif PRODUCERS > 0:
        shrink_for_down(
            program, hidden_ptr, layer, group_ptr, a_ptr, table_ptr, scaling_ptr, z_ptr,
            INTERMEDIATE, NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, PAGE_LANES, PAGE_ROWS,
            Z_ROWS, Z_COLUMNS, SHRINK_K,
        )  # fmt: skip
        signal(shrunk_ptr)


@triton.jit
def shrink_for_down(
    row,
    hidden_ptr,
    layer,
    group_ptr,
    a_ptr,
    table_ptr,
    scaling_ptr,
    z_ptr,
    INTERMEDIATE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_LANES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row."""
    shrink_row(
        row, row, 0, tl.load(group_ptr + row), layer, hidden_ptr,
        a_ptr, table_ptr, scaling_ptr, None, None, None, z_ptr,
        INTERMEDIATE, NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, PAGE_LANES, PAGE_ROWS,
        Z_ROWS, Z_COLUMNS, BLOCK_K,
    )  # fmt: skip


@triton.jit
def down_tile(
    program,
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    layer,
    tiles_ptr,
    group_ptr,
    b_ptr,
    table_ptr,
    z_ptr,
    shrunk_ptr,
    producers,
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
    PAGE_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
    EXPAND_STAGES: tl.constexpr = 1,
):
    """One tile of rows and ``BLOCK_N`` hidden columns; see :func:`gate_up_tile`."""
    NUM_BLOCKS: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    tile, block = program // NUM_BLOCKS, program % NUM_BLOCKS
    expert = tl.load(tiles_ptr + tile * 3)
    if expert >= 0:
        first, end = tl.load(tiles_ptr + tile * 3 + 1), tl.load(tiles_ptr + tile * 3 + 2)
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
            if BLOCK_M >= ONE_ADAPTER_ROWS:
                only = only_adapter(first, end, expert, group_ptr, NUM_ADAPTERS)
                only_slot = only + tl.zeros([1], tl.int32)
                only_row = find_pages(only_slot, 0, table_ptr, NUM_EXPERTS, MAX_PAGES, PAGES)
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
                if shrunk_ptr is not None:
                    wait_for(shrunk_ptr, producers)
                several = num_slots
                if BLOCK_M >= ONE_ADAPTER_ROWS:
                    if only >= 0:
                        several = 0
                        total = add_expand(
                            total, rows, adapter, slot, num_slots, (adapter >= 0)[:, None],
                            only_row, columns, z_ptr, table_ptr, b_ptr,
                            HIDDEN, NUM_EXPERTS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS, BLOCK_M, 1, PAGES,
                            PRECISION,
                        )  # fmt: skip
                total = add_expand(
                    total, rows, adapter, slot, several, mine, pool_row, columns,
                    z_ptr, table_ptr, b_ptr,
                    HIDDEN, NUM_EXPERTS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS, BLOCK_M, SLOTS, PAGES,
                    PRECISION, EXPAND_STAGES,
                )  # fmt: skip
        tl.store(
            out_ptr + rows.to(tl.int64)[:, None] * HIDDEN + columns[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=inside[:, None] & (columns < HIDDEN)[None, :],
        )
