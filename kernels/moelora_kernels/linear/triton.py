"""Linear maps with LoRA in Triton, whose weights are read where they are in the stack.

All is one launch, for few rows. The first programs shrink, one row for one map each. The others
have some columns of one map, and read weights meanwhile; they wait for the rank activations only
when their sums are complete, as :mod:`moelora_kernels.expert_lora.triton` says.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, scalar
from moelora_kernels.buffers import given_or_new
from moelora_kernels.expert_lora.triton import (
    add_expand,
    clear,
    expand_constants,
    find_adapters,
    find_pages,
    leave,
    precision,
    shrink_pages,
    signal,
    tile_adapters,
    wait_for,
)
from moelora_kernels.tuning.tiles import LinearTiles
from moelora_kernels.types import PAGE_ROWS, SIGNALS, Buffer, LinearMap, SitePages, TokenSort

#: Maps that one launch has parameters for.
MAX_MAPS = 3


def linear_lora(
    x: Array,
    maps: Sequence[LinearMap],
    layer: Array,
    sort: TokenSort | None,
    signals: Buffer | None,
    dtype: jnp.dtype,
    tiles: LinearTiles,
) -> Array:
    """See :func:`moelora_kernels.linear_lora`."""
    sites = _sites(maps, sort)
    y = jax.ShapeDtypeStruct((len(x), sum(m.weight.shape[1] for m in maps)), dtype)
    if not sites:
        return _launch(x, maps, layer, None, [None, None], [y], tiles, dtype)[0]
    # The rank activations are an output, too.
    ranks = jax.ShapeDtypeStruct((len(maps), len(x), sites[0].max_rank), x.dtype)
    counters = given_or_new(signals, SIGNALS, jnp.int32)
    return _launch(x, maps, layer, sort, [counters], [ranks, y], tiles, dtype, shrinks=True)[1]


def _sites(maps: Sequence[LinearMap], sort: TokenSort | None) -> list[SitePages]:
    """Pages of the maps that adapters change, if any do."""
    if len(maps) > MAX_MAPS:
        raise ValueError(f"at most {MAX_MAPS} maps can share a launch, not {len(maps)}")
    return [] if sort is None else [m.pages for m in maps if m.pages is not None]


def _launch(
    x: Array,
    maps: Sequence[LinearMap],
    layer: Array,
    sort: TokenSort | None,
    last: list[Any],
    outputs: list[Any],
    tiles: LinearTiles,
    dtype: jnp.dtype,
    *,
    shrinks: bool = False,
    multiply: bool = True,
) -> tuple[Buffer, ...]:
    """Launch :func:`linear_tiles`, whose last inputs and outputs together are signals, z and y."""
    tokens, width = x.shape
    widths = [m.weight.shape[1] for m in maps]
    pointers: list[Any] = []
    for weight, bias, pages in maps:
        pointers += [weight, bias] if multiply else [None, None]
        pointers += [None] * 4 if sort is None or pages is None else list(pages)
    missing = MAX_MAPS - len(maps)
    pointers += [None] * (6 * missing)
    producers = tokens * len(maps) if shrinks else 0
    row_tiles = triton.cdiv(tokens, tiles.block_m)
    programs = row_tiles * sum(triton.cdiv(out, tiles.block_n) for out in widths)
    widths += [0] * missing
    sites = _sites(maps, sort)
    constants = expand_constants(x, tiles, sites) | {"PAGE_ROWS": PAGE_ROWS}
    constants["Z_COLUMNS"] = sites[0].max_rank if sites else 0
    in_place = isinstance(outputs[0], jax.Ref)
    order = [None, None] if sort is None else [sort.order, sort.group_of_row]
    return launch(
        linear_tiles,
        (x, scalar(layer), *pointers, *order, *last),
        () if in_place else outputs,
        outputs if in_place else None,
        Launch((producers + programs,), num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        WIDTH=width,
        OUT_0=widths[0],
        OUT_1=widths[1],
        OUT_2=widths[2],
        TOKENS=tokens,
        MAPS=len(maps),
        PRODUCERS=producers,
        PROGRAMS=programs,
        MULTIPLY=multiply,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=min(tiles.block_k, max(triton.next_power_of_2(width), 16)),
        PRECISION=precision(x.dtype),
        **constants,
    )


@triton.jit
def linear_tiles(
    x_ptr,
    layer_ptr,
    weight_0_ptr,
    bias_0_ptr,
    a_0_ptr,
    b_0_ptr,
    table_0_ptr,
    scaling_0_ptr,
    weight_1_ptr,
    bias_1_ptr,
    a_1_ptr,
    b_1_ptr,
    table_1_ptr,
    scaling_1_ptr,
    weight_2_ptr,
    bias_2_ptr,
    a_2_ptr,
    b_2_ptr,
    table_2_ptr,
    scaling_2_ptr,
    order_ptr,
    group_ptr,
    signals_ptr,
    z_ptr,
    y_ptr,
    WIDTH: tl.constexpr,
    OUT_0: tl.constexpr,
    OUT_1: tl.constexpr,
    OUT_2: tl.constexpr,
    TOKENS: tl.constexpr,
    MAPS: tl.constexpr,
    PRODUCERS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_LANES: tl.constexpr,
    SHRINK_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
):
    """The first ``PRODUCERS`` programs shrink, the others multiply."""
    program = tl.program_id(0)
    layer = tl.load(layer_ptr)
    shrunk_ptr = None if PRODUCERS == 0 else signals_ptr + 1
    if program >= PRODUCERS:
        TILES: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
        BLOCKS_0: tl.constexpr = (OUT_0 + BLOCK_N - 1) // BLOCK_N
        BLOCKS_1: tl.constexpr = (OUT_1 + BLOCK_N - 1) // BLOCK_N
        z_1_ptr = None if z_ptr is None else z_ptr + TOKENS * Z_COLUMNS
        z_2_ptr = None if z_ptr is None else z_ptr + 2 * TOKENS * Z_COLUMNS
        # Tiles of the same columns are neighbours: all but one find the weights in the L2 cache.
        block, tile = (program - PRODUCERS) // TILES, (program - PRODUCERS) % TILES
        # A branch per map keeps the alignment of each pointer known to the compiler.
        if block < BLOCKS_0:
            linear_tile(
                block, tile, x_ptr, weight_0_ptr, bias_0_ptr, layer, order_ptr, group_ptr,
                b_0_ptr, table_0_ptr, z_ptr, shrunk_ptr, y_ptr,
                WIDTH, OUT_0, OUT_0 + OUT_1 + OUT_2, TOKENS, MULTIPLY, BLOCK_M, BLOCK_N, BLOCK_K,
                PRECISION, PRODUCERS, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS, SLOTS, PAGES,
            )  # fmt: skip
        elif block < BLOCKS_0 + BLOCKS_1:
            if MAPS > 1:
                linear_tile(
                    block - BLOCKS_0, tile, x_ptr, weight_1_ptr, bias_1_ptr, layer, order_ptr,
                    group_ptr, b_1_ptr, table_1_ptr, z_1_ptr, shrunk_ptr,
                    y_ptr + OUT_0,
                    WIDTH, OUT_1, OUT_0 + OUT_1 + OUT_2, TOKENS, MULTIPLY, BLOCK_M, BLOCK_N,
                    BLOCK_K, PRECISION, PRODUCERS, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS,
                    SLOTS, PAGES,
                )  # fmt: skip
        elif MAPS > 2:
            linear_tile(
                block - BLOCKS_0 - BLOCKS_1, tile, x_ptr, weight_2_ptr, bias_2_ptr, layer,
                order_ptr, group_ptr, b_2_ptr, table_2_ptr, z_2_ptr,
                shrunk_ptr, y_ptr + OUT_0 + OUT_1,
                WIDTH, OUT_2, OUT_0 + OUT_1 + OUT_2, TOKENS, MULTIPLY, BLOCK_M, BLOCK_N, BLOCK_K,
                PRECISION, PRODUCERS, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS, SLOTS, PAGES,
            )  # fmt: skip
        if PRODUCERS > 0:
            if leave(signals_ptr, PROGRAMS):
                wait_for(shrunk_ptr, PRODUCERS)
                clear(signals_ptr, 2)
    elif PRODUCERS > 0:
        row, number = program // MAPS, program % MAPS
        adapter = tl.load(group_ptr + row) - 1
        # Of rows past the last real one the group is -1.
        if adapter >= 0:
            x_ptr += tl.load(order_ptr + row).to(tl.int64) * WIDTH
            z_ptr += (number * TOKENS + row) * Z_COLUMNS
            entry = (layer * 2 * NUM_ADAPTERS + adapter) * MAX_PAGES
            factor = layer * NUM_ADAPTERS + adapter
            if number == 0:
                if a_0_ptr is not None:
                    shrink_pages(
                        x_ptr, a_0_ptr, table_0_ptr + entry, scaling_0_ptr + factor, z_ptr,
                        WIDTH, 1, MAX_PAGES, PAGE_LANES, PAGE_ROWS, SHRINK_K,
                    )  # fmt: skip
            elif number == 1:
                if a_1_ptr is not None:
                    shrink_pages(
                        x_ptr, a_1_ptr, table_1_ptr + entry, scaling_1_ptr + factor, z_ptr,
                        WIDTH, 1, MAX_PAGES, PAGE_LANES, PAGE_ROWS, SHRINK_K,
                    )  # fmt: skip
            elif a_2_ptr is not None:
                shrink_pages(
                    x_ptr, a_2_ptr, table_2_ptr + entry, scaling_2_ptr + factor, z_ptr,
                    WIDTH, 1, MAX_PAGES, PAGE_LANES, PAGE_ROWS, SHRINK_K,
                )  # fmt: skip
        signal(shrunk_ptr)


@triton.jit
def linear_tile(
    block,
    tile,
    x_ptr,
    weight_ptr,
    bias_ptr,
    layer,
    order_ptr,
    group_ptr,
    b_ptr,
    table_ptr,
    z_ptr,
    shrunk_ptr,
    y_ptr,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PRODUCERS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
):
    """``BLOCK_M`` rows and ``BLOCK_N`` columns of one map."""
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < TOKENS
    token = rows
    if order_ptr is not None:
        # Past the last real row the order is -1; there, rows are tokens of padding.
        order = tl.load(order_ptr + rows, mask=inside, other=-1)
        token = tl.where(order >= 0, order, rows)
    # Lanes without work repeat valid rows and columns, so that loads need no mask.
    token = tl.where(inside, token, 0).to(tl.int64)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.minimum(columns, OUT - 1)
    y_ptrs = y_ptr + token[:, None] * Y_STRIDE + columns[None, :]
    stored = inside[:, None] & (columns < OUT)[None, :]
    if b_ptr is not None:
        adapter, slot, num_slots = tile_adapters(first, rows, inside, 0, group_ptr, NUM_ADAPTERS)
        table_ptr += (layer * 2 + 1) * NUM_ADAPTERS * MAX_PAGES
        # Looked up before the products, which then hide the wait.
        slot_adapter, mine = find_adapters(0, adapter, slot, SLOTS)
        pool_row = find_pages(slot_adapter, 0, table_ptr, 1, MAX_PAGES, PAGES)
    if MULTIPLY:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        depth = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + token[:, None] * WIDTH + depth[None, :]
        weight_ptrs = weight_ptr + layer.to(tl.int64) * (OUT * WIDTH)
        weight_ptrs += column[None, :] * WIDTH + depth[:, None]
        for k in range(0, WIDTH, BLOCK_K):
            if WIDTH % BLOCK_K == 0:
                x = tl.load(x_ptrs + k)
                weight = tl.load(weight_ptrs + k)
            else:
                left = k + depth < WIDTH
                x = tl.load(x_ptrs + k, mask=left[None, :], other=0.0)
                weight = tl.load(weight_ptrs + k, mask=left[:, None], other=0.0)
            total = tl.dot(x, weight, total, input_precision=PRECISION)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + layer * OUT + column).to(tl.float32)[None, :]
    else:
        # Rows of the base model are left as they are.
        changed = adapter >= 0 if b_ptr is not None else rows < 0
        stored = stored & changed[:, None]
        total = tl.load(y_ptrs, mask=stored, other=0.0).to(tl.float32)
    if b_ptr is not None:
        if PRODUCERS > 0:
            if num_slots > 0:
                wait_for(shrunk_ptr, PRODUCERS)
        total = add_expand(
            total, rows, adapter, slot, num_slots, mine, pool_row, columns,
            z_ptr, table_ptr, b_ptr,
            OUT, 1, MAX_PAGES, PAGE_ROWS, Z_COLUMNS, BLOCK_M, SLOTS, PAGES, PRECISION,
        )  # fmt: skip
    tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=stored)
