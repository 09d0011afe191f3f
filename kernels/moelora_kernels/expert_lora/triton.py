"""Expert projections with LoRA in Triton.

*gate_up* and *down* are grouped matrix products over the tiles of the sort. What adapters add
(:mod:`moelora_kernels.expert_lora.triton_expand`) is added before the sums leave the registers.

For few rows the programs of the shrink (:mod:`moelora_kernels.expert_lora.triton_shrink`) are the
first of the product's own launch. The others read weights meanwhile, and wait for the rank
activations only when their sums are complete (:mod:`moelora_kernels.waiting`).
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
    add_expand,
    add_stack,
    expand_both,
    find_adapters,
    find_pages,
    load_pages,
    load_ranks,
    tile_adapters,
)
from moelora_kernels.expert_lora.triton_shrink import (
    share_pages,
    shrink,
    shrink_constants,
    shrink_row,
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
    constants["EXPAND_STAGES"] = expand_stages(tiles, tile_rows, few_rows=producers > 0)
    grid = (producers + programs,)
    how = Launch(grid, num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    if producers == 0:
        refs = None if out is None else [out]
        return launch(kernel, (*inputs, *arrays, z, None), [shape], refs, how, **constants)[0]
    target = given_or_new(out, shape.shape, shape.dtype)
    launch(kernel, (*inputs, *arrays), (), [z, signals, target], how, **constants)
    return target[...] if out is None else out


def expand_stages(tiles: GemmTiles, tile_rows: int, *, few_rows: bool) -> int:
    """Steps of what adapters add that are on their way at once: few rows have few steps."""
    if tile_rows < COPY_AHEAD_ROWS.value:
        return 1 if few_rows else 2
    # A step of gate and up copies one tile more than a step of their product.
    return max(tiles.num_stages - 1, 1)


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
    expand = expand_constants(x, tiles, sites)
    if sites and tile_rows >= COPY_AHEAD_ROWS.value:
        expand["SLOTS"] = COPIED_PAGES // expand["PAGES"]
    return expand | {
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
        return dict.fromkeys((*names, "SLOTS", "PAGES"), 0)
    shrinking = shrink_constants(x, sites)
    # A stack has several pages of one adapter where adapters have several.
    pages = min(shrinking["PAGE_LANES"], 4)
    return {name: shrinking[name] for name in names} | {
        "SLOTS": max(tiles.stack, 2 * pages) // pages,
        "PAGES": pages,
    }


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
            PAGE_ROWS, Z_ROWS, Z_COLUMNS,
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
):
    """One row for gate or for up.

    Where all experts share the adapter's pages, the token's first row in sorted order is shrunk for
    all of them.

    Returns:
        How many rows are done, those of one expert or of all: 0 where the first row does the work.
    """
    row, site = program // 2, program % 2
    pair, group = tl.load(order_ptr + row), tl.load(group_ptr + row)
    adapter = group % (NUM_ADAPTERS + 1) - 1
    done = 1
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
        if shared:
            rows = rows_of_token(pair // TOP_K, row_of_pair_ptr, TOP_K)
            done = tl.where(tl.min(tl.where(rows >= 0, rows, row), 0) == row, TOP_K, 0)
        if done > 0:
            shrink_row(
                row, pair // TOP_K, site, group, layer, x_ptr,
                gate_a_ptr, gate_table_ptr, gate_scaling_ptr,
                up_a_ptr, up_table_ptr, up_scaling_ptr, z_ptr,
                HIDDEN, NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, PAGE_LANES, PAGE_ROWS,
                Z_ROWS, Z_COLUMNS,
            )  # fmt: skip
            if shared:
                tl.debug_barrier()  # Numbers that other threads have stored are read.
                rows = rows_of_token(pair // TOP_K, row_of_pair_ptr, TOP_K)
                column = tl.arange(0, PAGE_LANES * PAGE_ROWS)
                inside = column < MAX_PAGES * PAGE_ROWS
                z_ptrs = z_ptr + (site * Z_ROWS).to(tl.int64) * Z_COLUMNS + column
                z = tl.load(z_ptrs + row * Z_COLUMNS, mask=inside)
                tl.store(
                    z_ptrs[None, :] + rows[:, None] * Z_COLUMNS, z[None, :],
                    mask=(rows >= 0)[:, None] & inside[None, :],
                )  # fmt: skip
    return done


@triton.jit
def rows_of_token(token, row_of_pair_ptr, TOP_K: tl.constexpr):
    """The rows of a token's experts, -1 in lanes without one."""
    choice = tl.arange(0, triton.next_power_of_2(TOP_K))
    return tl.load(row_of_pair_ptr + token * TOP_K + choice, mask=choice < TOP_K, other=-1)


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
    counter that they signal, else it is None. ``EXPAND_STAGES`` is of the loop over adapters.
    """
    NUM_BLOCKS: tl.constexpr = (INTERMEDIATE + BLOCK_N - 1) // BLOCK_N
    # Slots whose pages are looked up before the product: all that a tile can have, or the first.
    LANES: tl.constexpr = (
        BLOCK_M if NUM_ADAPTERS >= BLOCK_M else triton.next_power_of_2(NUM_ADAPTERS)
    )
    FIRST_SLOTS: tl.constexpr = LANES if BLOCK_M >= COPY_AHEAD_ROWS else SLOTS
    tile, block = program // NUM_BLOCKS, program % NUM_BLOCKS
    expert = tl.load(tiles_ptr + tile * 3)
    if expert >= 0:
        first, end = tl.load(tiles_ptr + tile * 3 + 1), tl.load(tiles_ptr + tile * 3 + 2)
        rows = first + tl.arange(0, BLOCK_M)
        inside = rows < end
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        # Lanes without work repeat valid rows and columns; large tiles do not load such rows.
        loaded = (inside | (BLOCK_M < COPY_AHEAD_ROWS))[:, None]
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
            slot_adapter, mine = find_adapters(0, adapter, slot, FIRST_SLOTS)
            gate_row = find_pages(slot_adapter, 0, gate_table_ptr, NUM_EXPERTS, MAX_PAGES, PAGES)
            up_row = find_pages(slot_adapter, 0, up_table_ptr, NUM_EXPERTS, MAX_PAGES, PAGES)
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, HIDDEN, BLOCK_K):
            if HIDDEN % BLOCK_K == 0:
                x = tl.load(x_ptrs + k, mask=loaded, other=0.0)
                gate_weight = tl.load(gate_ptrs + k)
                up_weight = tl.load(up_ptrs + k)
            else:
                left = k + depth < HIDDEN
                x = tl.load(x_ptrs + k, mask=loaded & left[None, :], other=0.0)
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
                if BLOCK_M < COPY_AHEAD_ROWS:  # Pages are on their way while this program waits.
                    gate_b = load_pages(
                        gate_row, columns, gate_b_ptr, INTERMEDIATE, SLOTS, PAGES, PAGE_ROWS
                    )
                    up_b = load_pages(
                        up_row, columns, up_b_ptr, INTERMEDIATE, SLOTS, PAGES, PAGE_ROWS
                    )
                if shrunk_ptr is not None:
                    wait_for(shrunk_ptr, producers)
                for first_page in tl.static_range(0, MAX_PAGES, PAGES):
                    if BLOCK_M >= COPY_AHEAD_ROWS:
                        if first_page > 0:
                            gate_row = find_pages(
                                slot_adapter, first_page, gate_table_ptr,
                                NUM_EXPERTS, MAX_PAGES, PAGES,
                            )  # fmt: skip
                            up_row = find_pages(
                                slot_adapter, first_page, up_table_ptr,
                                NUM_EXPERTS, MAX_PAGES, PAGES,
                            )  # fmt: skip
                        for first_slot in tl.range(0, num_slots, SLOTS, num_stages=EXPAND_STAGES):
                            gate = add_stack(
                                gate, rows, slot, first_slot, first_page, gate_row, columns, z_ptr,
                                gate_b_ptr, INTERMEDIATE, Z_COLUMNS, SLOTS, PAGE_ROWS, PRECISION,
                            )  # fmt: skip
                            up = add_stack(
                                up, rows, slot, first_slot, first_page, up_row, columns, up_z_ptr,
                                up_b_ptr, INTERMEDIATE, Z_COLUMNS, SLOTS, PAGE_ROWS, PRECISION,
                            )  # fmt: skip
                    else:
                        gate_z = load_ranks(
                            rows, adapter, first_page, z_ptr, Z_COLUMNS, PAGES, PAGE_ROWS
                        )
                        up_z = load_ranks(
                            rows, adapter, first_page, up_z_ptr, Z_COLUMNS, PAGES, PAGE_ROWS
                        )
                        for first_slot in tl.range(0, num_slots, SLOTS, num_stages=EXPAND_STAGES):
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
                                gate_b = load_pages(
                                    gate_row, columns, gate_b_ptr,
                                    INTERMEDIATE, SLOTS, PAGES, PAGE_ROWS,
                                )  # fmt: skip
                                up_b = load_pages(
                                    up_row, columns, up_b_ptr,
                                    INTERMEDIATE, SLOTS, PAGES, PAGE_ROWS,
                                )  # fmt: skip
                            gate, up = expand_both(
                                gate, up, gate_z, up_z, mine, gate_row, up_row, gate_b, up_b,
                                BLOCK_M, SLOTS, PAGES, PAGE_ROWS, PRECISION,
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
            Z_ROWS, Z_COLUMNS,
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
):
    """One row."""
    shrink_row(
        row, row, 0, tl.load(group_ptr + row), layer, hidden_ptr,
        a_ptr, table_ptr, scaling_ptr, None, None, None, z_ptr,
        INTERMEDIATE, NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, PAGE_LANES, PAGE_ROWS,
        Z_ROWS, Z_COLUMNS,
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
    # Slots whose pages are looked up before the product: all that a tile can have, or the first.
    LANES: tl.constexpr = (
        BLOCK_M if NUM_ADAPTERS >= BLOCK_M else triton.next_power_of_2(NUM_ADAPTERS)
    )
    FIRST_SLOTS: tl.constexpr = LANES if BLOCK_M >= COPY_AHEAD_ROWS else SLOTS
    tile, block = program // NUM_BLOCKS, program % NUM_BLOCKS
    expert = tl.load(tiles_ptr + tile * 3)
    if expert >= 0:
        first, end = tl.load(tiles_ptr + tile * 3 + 1), tl.load(tiles_ptr + tile * 3 + 2)
        rows = first + tl.arange(0, BLOCK_M)
        inside = rows < end
        loaded = (inside | (BLOCK_M < COPY_AHEAD_ROWS))[:, None]
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
            slot_adapter, mine = find_adapters(0, adapter, slot, FIRST_SLOTS)
            pool_row = find_pages(slot_adapter, 0, table_ptr, NUM_EXPERTS, MAX_PAGES, PAGES)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, INTERMEDIATE, BLOCK_K):
            if INTERMEDIATE % BLOCK_K == 0:
                hidden = tl.load(hidden_ptrs + k, mask=loaded, other=0.0)
                weight = tl.load(weight_ptrs + k)
            else:
                left = k + depth < INTERMEDIATE
                hidden = tl.load(hidden_ptrs + k, mask=loaded & left[None, :], other=0.0)
                weight = tl.load(weight_ptrs + k, mask=left[:, None], other=0.0)
            total = tl.dot(hidden, weight, total, input_precision=PRECISION)
        if bias_ptr is not None:
            bias_ptr += (layer * NUM_EXPERTS + expert) * HIDDEN
            total += tl.load(bias_ptr + column).to(tl.float32)[None, :]
        if z_ptr is not None:
            if num_slots > 0:
                if BLOCK_M < COPY_AHEAD_ROWS:  # Pages are on their way while this program waits.
                    b = load_pages(pool_row, columns, b_ptr, HIDDEN, SLOTS, PAGES, PAGE_ROWS)
                if shrunk_ptr is not None:
                    wait_for(shrunk_ptr, producers)
                if BLOCK_M >= COPY_AHEAD_ROWS:
                    for first_page in tl.static_range(0, MAX_PAGES, PAGES):
                        if first_page > 0:
                            pool_row = find_pages(
                                slot_adapter, first_page, table_ptr, NUM_EXPERTS, MAX_PAGES, PAGES
                            )
                        for first_slot in tl.range(0, num_slots, SLOTS, num_stages=EXPAND_STAGES):
                            total = add_stack(
                                total, rows, slot, first_slot, first_page, pool_row, columns, z_ptr,
                                b_ptr, HIDDEN, Z_COLUMNS, SLOTS, PAGE_ROWS, PRECISION,
                            )  # fmt: skip
                else:
                    total = add_expand(
                        total, rows, adapter, slot, num_slots, mine, pool_row, b, columns,
                        z_ptr, table_ptr, b_ptr,
                        HIDDEN, NUM_EXPERTS, MAX_PAGES, PAGE_ROWS, Z_COLUMNS, BLOCK_M, SLOTS, PAGES,
                        PRECISION, EXPAND_STAGES,
                    )  # fmt: skip
        tl.store(
            out_ptr + rows.to(tl.int64)[:, None] * HIDDEN + columns[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=inside[:, None] & (columns < HIDDEN)[None, :],
        )
