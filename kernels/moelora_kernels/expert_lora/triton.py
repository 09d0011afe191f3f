"""Expert projections with LoRA in Triton.

*gate_up* and *down* are grouped matrix products over the tiles of the sort. What adapters add
(:mod:`moelora_kernels.expert_lora.triton_expand`) is added before the sums leave the registers.

For few rows the programs of the shrink (:mod:`moelora_kernels.expert_lora.triton_shrink_rows`) are
the first of the product's own launch. The others read weights meanwhile, and wait for the rank
activations only when their sums are complete (:mod:`moelora_kernels.waiting`). Otherwise the shrink
is a launch of its own (:mod:`moelora_kernels.expert_lora.triton_shrink`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array
from jax.typing import DTypeLike

from moelora_kernels.backend import Launch, launch, precision, scalar
from moelora_kernels.buffers import given_or_new
from moelora_kernels.expert_lora.triton_expand import (
    ExpandSizes,
    Update,
    add_copied_expand,
    add_expand,
    find_adapters,
    find_updates,
    load_updates,
    tile_adapters,
)
from moelora_kernels.expert_lora.triton_shrink import shrink, shrink_sizes
from moelora_kernels.expert_lora.triton_shrink_rows import (
    ShrinkSizes,
    shrink_for_down,
    shrink_for_gate_up,
)
from moelora_kernels.tiles import max_tiles
from moelora_kernels.tuning.tiles import GemmTiles
from moelora_kernels.types import SIGNALS, Buffer, SitePages, TokenSort
from moelora_kernels.waiting import clear, leave, signal, wait_for

#: Rows of a tile from which on pages are copied ahead, with the rank activations they are for, and
#: rows are not loaded that the tile does not have.
COPY_AHEAD_ROWS = tl.constexpr(32)
#: Pages that are multiplied at once there, more of which would need more memory.
COPIED_PAGES = 4


class ProductSizes(NamedTuple):
    """Sizes of a grouped product that its kernels are compiled for.

    Attributes:
        width: summed columns.
        outputs: columns of the result.
        experts: of the weights.
        top_k: choices per token, where x has a row of each token; 0 where it has sorted rows.
        parts: numbers of the matrices that an expert has: 0 and 1, gate and up; or 0, down.
        activation: between gate and up; None for down.
        block_m: rows of a tile.
        block_n: columns of a tile.
        block_k: summed columns of one step.
        precision: of products, as :func:`moelora_kernels.backend.precision` says.
        shrink: of the rank activations; None for the base model.
        expand: of what adapters add; None for the base model.
    """

    width: int
    outputs: int
    experts: int
    top_k: int
    parts: tuple[int, ...]
    activation: str | None
    block_m: int
    block_n: int
    block_k: int
    precision: str
    shrink: ShrinkSizes | None = None
    expand: ExpandSizes | None = None


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
    pairs = x.shape[0] * top_k
    return _product(
        gate_up_tiles, x, weight, bias, sort, (sort.order, sort.row_of_pair), layer,
        pairs=pairs, top_k=top_k, tile_rows=tile_rows, activation=activation, sites=sites,
        rank_activations=rank_activations, signals=signals, dtype=x.dtype, tiles=tiles, out=out,
    )  # fmt: skip


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
    return _product(
        down_tiles, hidden, weight, bias, sort, (), layer,
        pairs=pairs, top_k=None, tile_rows=tile_rows, activation=None,
        sites=None if site is None else (site,), rank_activations=rank_activations,
        signals=signals, dtype=dtype, tiles=tiles, out=out,
    )  # fmt: skip


def _product(
    kernel: Any,
    x: Buffer,
    weight: Array,
    bias: Array | None,
    sort: TokenSort,
    more_of_sort: Sequence[Buffer],
    layer: Array,
    *,
    pairs: int,
    top_k: int | None,
    tile_rows: int,
    activation: str | None,
    sites: Sequence[SitePages] | None,
    rank_activations: Buffer | None,
    signals: Buffer | None,
    dtype: DTypeLike,
    tiles: GemmTiles,
    out: Buffer | None,
) -> Buffer:
    """Launch a grouped product, and the shrink before it or within."""
    experts, outputs = weight.shape[1], weight.shape[-2]
    producers = 0
    z: Any = None
    if sites is not None and tiles.shrink is not None:
        z = shrink(
            x, sort, sites, layer,
            pairs=pairs, top_k=top_k, tiles=tiles.shrink, out=rank_activations,
        )  # fmt: skip
    elif sites is not None:
        producers = pairs * len(sites)
        z = given_or_new(rank_activations, (len(sites), pairs, sites[0].max_rank), x.dtype)
        signals = given_or_new(signals, SIGNALS, jnp.int32)
    sizes = product_sizes(
        x, weight, tiles, tile_rows, top_k, activation, sites, z,
        expand_stages=expand_stages(tiles, tile_rows, few_rows=producers > 0),
    )  # fmt: skip
    num_sites = 1 if activation is None else 2
    arrays: list[Any] = [array for site in sites or () for array in site]
    arrays = arrays or [None] * (4 * num_sites)
    programs = max_tiles(pairs, experts, tile_rows) * triton.cdiv(outputs, tiles.block_n)
    inputs = (
        *(x, weight, bias, scalar(layer), sort.expert_tiles, sort.group_of_row, *more_of_sort),
        *arrays,
    )
    how = Launch((producers + programs,), tiles.num_warps, tiles.num_stages)
    constants = {
        "SIZES": sizes,
        "PRODUCERS": producers,
        "PROGRAMS": programs,
        "SIGNALS": SIGNALS[0],
    }
    shape = jax.ShapeDtypeStruct((pairs, outputs), dtype)
    if producers == 0:
        refs = None if out is None else [out]
        return launch(kernel, (*inputs, z, None), [shape], refs, how, **constants)[0]
    target = given_or_new(out, shape.shape, shape.dtype)
    written: list[Any] = [z, signals, target]
    launch(kernel, inputs, (), written, how, **constants)
    return target[...] if out is None else out


def product_sizes(
    x: Buffer,
    weight: Array,
    tiles: GemmTiles,
    tile_rows: int,
    top_k: int | None,
    activation: str | None,
    sites: Sequence[SitePages] | None,
    rank_activations: Buffer | None,
    *,
    expand_stages: int,
) -> ProductSizes:
    """Sizes of a grouped product of ``x`` with ``weight`` ``[layers, experts, ..., out, in]``."""
    sizes = ProductSizes(
        width=x.shape[1],
        outputs=weight.shape[-2],
        experts=weight.shape[1],
        top_k=top_k or 0,
        parts=(0,) if activation is None else (0, 1),
        activation=activation,
        # The smallest operand of a tensor core product.
        block_m=max(triton.next_power_of_2(tile_rows), 16),
        block_n=tiles.block_n,
        block_k=min(tiles.block_k, max(triton.next_power_of_2(x.shape[1]), 16)),
        precision=precision(x.dtype),
    )
    if not sites or rank_activations is None:
        return sizes
    shrinking = shrink_sizes(x, sites, rank_activations.shape, top_k)
    # A stack has several pages of one adapter where adapters have several.
    pages = min(triton.next_power_of_2(shrinking.max_pages), 4)
    slots = max(tiles.stack, 2 * pages) // pages
    expand = ExpandSizes(
        parts=sizes.parts,
        width=sizes.outputs,
        experts=sizes.experts,
        adapters=shrinking.adapters,
        max_pages=shrinking.max_pages,
        z_columns=shrinking.z_columns,
        slots=slots if tile_rows < COPY_AHEAD_ROWS.value else COPIED_PAGES // pages,
        pages=pages,
        stages=expand_stages,
        precision=sizes.precision,
    )
    return sizes._replace(shrink=shrinking, expand=expand)


def expand_stages(tiles: GemmTiles, tile_rows: int, *, few_rows: bool) -> int:
    """Steps of what adapters add that are on their way at once: few rows have few steps."""
    if tile_rows < COPY_AHEAD_ROWS.value:
        return 1 if few_rows else 2
    # A step of gate and up copies one tile more than a step of their product.
    return max(tiles.num_stages - 1, 1)


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
    SIZES: tl.constexpr,
    PRODUCERS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SIGNALS: tl.constexpr,
):
    """The first ``PRODUCERS`` programs shrink, the others multiply."""
    program = tl.program_id(0)
    layer = tl.load(layer_ptr)
    gate = SitePages(gate_a_ptr, gate_b_ptr, gate_table_ptr, gate_scaling_ptr)
    up = SitePages(up_a_ptr, up_b_ptr, up_table_ptr, up_scaling_ptr)
    shrunk_ptr = None if PRODUCERS == 0 else signals_ptr + 1
    if program >= PRODUCERS:
        product_tile(
            program - PRODUCERS, x_ptr, weight_ptr, bias_ptr, layer, tiles_ptr, group_ptr,
            order_ptr, (gate, up), z_ptr, shrunk_ptr, PRODUCERS, out_ptr, SIZES,
        )  # fmt: skip
        if PRODUCERS > 0:
            if leave(signals_ptr, PROGRAMS):
                wait_for(shrunk_ptr, PRODUCERS)
                clear(signals_ptr, SIGNALS)
    elif PRODUCERS > 0:
        shrink_for_gate_up(
            program, x_ptr, layer, group_ptr, order_ptr, row_of_pair_ptr, gate, up, z_ptr,
            SIZES.shrink, triton.next_power_of_2(SIZES.experts),
        )  # fmt: skip
        signal(shrunk_ptr)


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
    SIZES: tl.constexpr,
    PRODUCERS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SIGNALS: tl.constexpr,
):
    """The first ``PRODUCERS`` programs shrink, the others multiply."""
    program = tl.program_id(0)
    layer = tl.load(layer_ptr)
    site = SitePages(a_ptr, b_ptr, table_ptr, scaling_ptr)
    shrunk_ptr = None if PRODUCERS == 0 else signals_ptr + 1
    if program >= PRODUCERS:
        product_tile(
            program - PRODUCERS, hidden_ptr, weight_ptr, bias_ptr, layer, tiles_ptr, group_ptr,
            None, (site,), z_ptr, shrunk_ptr, PRODUCERS, out_ptr, SIZES,
        )  # fmt: skip
        if PRODUCERS > 0:
            if leave(signals_ptr, PROGRAMS):
                wait_for(shrunk_ptr, PRODUCERS)
                clear(signals_ptr, SIGNALS)
    elif PRODUCERS > 0:
        shrink_for_down(program, hidden_ptr, layer, group_ptr, site, z_ptr, SIZES.shrink)
        signal(shrunk_ptr)


@triton.jit
def product_tile(
    program,
    x_ptr,
    weight_ptr,
    bias_ptr,
    layer,
    tiles_ptr,
    group_ptr,
    order_ptr,
    sites,
    z_ptr,
    shrunk_ptr,
    producers,
    out_ptr,
    SIZES: tl.constexpr,
):
    """One tile of rows and ``block_n`` columns.

    An expert has a matrix for each of ``sites``: gate and up, between which is the activation, or
    down. Where ``producers`` programs of the launch make the rank activations, ``shrunk_ptr`` is
    the counter that they signal, else it is None.
    """
    EXPAND: tl.constexpr = SIZES.expand
    MANY_ROWS: tl.constexpr = SIZES.block_m >= COPY_AHEAD_ROWS
    MATRIX: tl.constexpr = SIZES.outputs * SIZES.width
    NUM_BLOCKS: tl.constexpr = (SIZES.outputs + SIZES.block_n - 1) // SIZES.block_n
    tile, block = program // NUM_BLOCKS, program % NUM_BLOCKS
    expert = tl.load(tiles_ptr + tile * 3)
    if expert >= 0:
        first, end = tl.load(tiles_ptr + tile * 3 + 1), tl.load(tiles_ptr + tile * 3 + 2)
        rows = first + tl.arange(0, SIZES.block_m)
        inside = rows < end
        columns = block * SIZES.block_n + tl.arange(0, SIZES.block_n)
        # Lanes without work repeat valid rows and columns; large tiles do not load such rows.
        x_row = tl.where(inside, rows, first)
        if SIZES.top_k > 0:
            x_row = tl.load(order_ptr + x_row) // SIZES.top_k
        column = tl.minimum(columns, SIZES.outputs - 1)
        loaded = (inside | (SIZES.block_m < COPY_AHEAD_ROWS))[:, None]
        depth = tl.arange(0, SIZES.block_k)
        stacked_expert = layer * SIZES.experts + expert
        weight_ptr += stacked_expert.to(tl.int64) * (len(SIZES.parts) * MATRIX)
        x_ptrs = x_ptr + x_row.to(tl.int64)[:, None] * SIZES.width + depth[None, :]
        first_ptrs = weight_ptr + column[None, :] * SIZES.width + depth[:, None]
        weight_ptrs = [first_ptrs + i * MATRIX for i in SIZES.parts]
        if EXPAND is not None:
            # Looked up before the products, which then hide the wait.
            adapter, slot, num_slots = tile_adapters(
                first, rows, inside, expert, group_ptr, EXPAND.adapters
            )
            table = (layer * 2 + 1) * EXPAND.adapters * EXPAND.max_pages * EXPAND.experts + expert
            updates = [
                Update(
                    z_ptr + i * (SIZES.shrink.z_rows * EXPAND.z_columns),
                    sites[i].table + table,
                    sites[i].b_pool,
                )
                for i in SIZES.parts
            ]
            # All adapters that a tile can have, or those of the first step.
            LANES: tl.constexpr = min(SIZES.block_m, triton.next_power_of_2(EXPAND.adapters))
            slot_adapter, mine = find_adapters(
                0, adapter, slot, LANES if MANY_ROWS else EXPAND.slots
            )
            pool_rows = find_updates(slot_adapter, 0, updates, EXPAND)
        totals = [tl.zeros([SIZES.block_m, SIZES.block_n], tl.float32) for i in SIZES.parts]
        for k in range(0, SIZES.width, SIZES.block_k):
            if SIZES.width % SIZES.block_k == 0:
                x = tl.load(x_ptrs + k, mask=loaded, other=0.0)
                weights = [tl.load(weight_ptrs[i] + k) for i in SIZES.parts]
            else:
                left = k + depth < SIZES.width
                x = tl.load(x_ptrs + k, mask=loaded & left[None, :], other=0.0)
                weights = [
                    tl.load(weight_ptrs[i] + k, mask=left[:, None], other=0.0) for i in SIZES.parts
                ]
            totals = [
                tl.dot(x, weights[i], totals[i], input_precision=SIZES.precision)
                for i in SIZES.parts
            ]
        if bias_ptr is not None:
            bias_ptr += stacked_expert * (len(SIZES.parts) * SIZES.outputs)
            totals = [
                totals[i] + tl.load(bias_ptr + i * SIZES.outputs + column).to(tl.float32)[None, :]
                for i in SIZES.parts
            ]
        if EXPAND is not None:
            if num_slots > 0:
                if not MANY_ROWS:  # Pages are on their way while this program waits.
                    bs = load_updates(pool_rows, columns, updates, EXPAND)
                if shrunk_ptr is not None:
                    wait_for(shrunk_ptr, producers)
                if MANY_ROWS:
                    totals = add_copied_expand(
                        totals, rows, slot, num_slots, slot_adapter, pool_rows, columns, updates,
                        EXPAND,
                    )  # fmt: skip
                else:
                    totals = add_expand(
                        totals, rows, adapter, slot, num_slots, mine, pool_rows, bs, columns,
                        updates, EXPAND,
                    )  # fmt: skip
        result = totals[0]
        if SIZES.activation is not None:
            result = activate(totals[0], totals[1], SIZES.activation)
        tl.store(
            out_ptr + rows.to(tl.int64)[:, None] * SIZES.outputs + columns[None, :],
            result.to(out_ptr.dtype.element_ty),
            mask=inside[:, None] & (columns < SIZES.outputs)[None, :],
        )
