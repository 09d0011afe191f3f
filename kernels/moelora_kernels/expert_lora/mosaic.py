"""gate_up and down of many rows per expert in Pallas Mosaic GPU: Hopper, 16 bits a number.

Each processor takes one tile of rows and one block of columns after another. One warpgroup loads:
steps of ``BLOCK_K`` summed columns go through a ring of buffers in shared memory, by the tensor
memory accelerator. Two warpgroups multiply with ``wgmma``, 64 rows each, and share the weights. The
loads of the next tile start while the present one is still multiplied and stored.

LoRA is more steps of the same sums, before the others. In such a step the ring has four pages of B
below each other, and the rank activations of the tile's rows; each warpgroup spreads them so that a
row meets the pages of its own adapter only. Pages of gate have zeros in the columns of up, and the
other way around: with two products of half the width the assembler runs out of registers in ways
that cannot be foreseen, and then overlaps nothing. A small Triton kernel lists the pages that each
tile needs.

The accelerator cannot gather rows, so gate_up reads a copy of ``x`` in sorted order.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from moelora_kernels.backend import Launch, launch, scalar
from moelora_kernels.buffers import result
from moelora_kernels.expert_lora import reference
from moelora_kernels.expert_lora.triton import find_adapters, shrink, tile_adapters
from moelora_kernels.tiles import max_tiles
from moelora_kernels.tuning.tiles import MosaicTiles
from moelora_kernels.types import PAGE_ROWS, Buffer, SitePages, TokenSort

#: Rows of a tile of the sort: those of two warpgroups.
TILE_ROWS = 128
#: Rows that one ``wgmma`` takes.
GROUP_ROWS = 64
GROUPS = TILE_ROWS // GROUP_ROWS
#: Sums of a row: the widest ``wgmma``.
BLOCK_N = 256
#: Summed columns of one step, 128 bytes: what the swizzled layout has in a row.
BLOCK_K = 64
#: Pages that are multiplied in one step.
STEP_PAGES = BLOCK_K // PAGE_ROWS
#: Columns that a warpgroup stores at a time.
STORE_COLUMNS = 64

#: Numbers of one step in the list of steps: the column of the rank activations; for each site where
#: there is nothing but zeros; and for each page the first of its rows in the tile, the end of its
#: rows, and where it begins in the pool.
STEP_FIELDS = 32
ZEROS, STARTS, ENDS, PAGES = 1, 4, 8, 12


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
    tiles: MosaicTiles,
    sorted_x: Buffer | None,
    out: Buffer | None,
) -> Buffer:
    """See :func:`moelora_kernels.gate_up`. ``sorted_x`` is a buffer for the sorted copy of x."""
    require_sizes(tile_rows, x.dtype, weight.shape[-2], weight.shape[-1])
    pairs = x.shape[0] * top_k
    if sites is not None:
        rank_activations = shrink(
            x,
            sort,
            sites,
            layer,
            pairs=pairs,
            top_k=top_k,
            tiles=tiles.shrink,
            out=rank_activations,
        )
    return grouped_product(
        result(sorted_x, reference.gather_rows(x, sort, pairs, top_k)),
        weight,
        bias,
        sort,
        layer,
        pairs=pairs,
        activation=activation,
        sites=sites or (),
        rank_activations=rank_activations,
        tiles=tiles,
        out=out,
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
    dtype: DTypeLike,
    tiles: MosaicTiles,
    out: Buffer | None,
) -> Buffer:
    """See :func:`moelora_kernels.down`."""
    require_sizes(tile_rows, hidden.dtype, weight.shape[-2], weight.shape[-1])
    if dtype != hidden.dtype:
        raise ValueError(f"Mosaic's kernel cannot write {dtype} for {hidden.dtype}")
    sites = () if site is None else (site,)
    if sites:
        rank_activations = shrink(
            hidden,
            sort,
            sites,
            layer,
            pairs=pairs,
            top_k=None,
            tiles=tiles.shrink,
            out=rank_activations,
        )
    return grouped_product(
        hidden,
        weight[:, :, None],
        None if bias is None else bias[:, :, None],
        sort,
        layer,
        pairs=pairs,
        activation=None,
        sites=sites,
        rank_activations=rank_activations,
        tiles=tiles,
        out=out,
    )


def lora_steps(
    sort: TokenSort, sites: Sequence[SitePages], layer: Array, *, num_tiles: int
) -> tuple[Buffer, Buffer]:
    """The LoRA steps of every tile, int32.

    Returns:
        ``[tiles, 5]``: how many steps there are; the first with rows of the first warpgroup, the
        end of such steps, and both for the second. Then the steps themselves, ``[tiles, most,
        STEP_FIELDS]``.
    """
    _, _, adapters, pages, experts = sites[0].table.shape
    step_adapters = STEP_PAGES // len(sites)
    most = pages * triton.cdiv(min(adapters, TILE_ROWS), step_adapters)
    second = sites[1] if len(sites) == 2 else None
    count, steps = launch(
        list_steps,
        (
            sort.expert_tiles,
            sort.group_of_row,
            scalar(layer),
            sites[0].table,
            None if second is None else second.table,
        ),
        [
            jax.ShapeDtypeStruct((num_tiles, 5), jnp.int32),
            jax.ShapeDtypeStruct((num_tiles, most, STEP_FIELDS), jnp.int32),
        ],
        None,
        Launch((num_tiles,)),
        NUM_EXPERTS=experts,
        NUM_ADAPTERS=adapters,
        MAX_PAGES=pages,
        MOST=most,
        TILE_ROWS=TILE_ROWS,
        GROUP_ROWS=GROUP_ROWS,
        PAGE_ROWS=PAGE_ROWS,
        STEP_ADAPTERS=step_adapters,
        FIELDS=STEP_FIELDS,
        ZEROS=ZEROS,
        STARTS=STARTS,
        ENDS=ENDS,
        PAGES=PAGES,
        POOL_0=sites[0].b_pool.shape[0],
        POOL_1=0 if second is None else second.b_pool.shape[0],
    )
    return count, steps


def grouped_product(
    rows: Buffer,
    weight: Array,
    bias: Array | None,
    sort: TokenSort,
    layer: Array,
    *,
    pairs: int,
    activation: str | None,
    sites: Sequence[SitePages],
    rank_activations: Buffer | None,
    tiles: MosaicTiles,
    out: Buffer | None,
    steps: tuple[Buffer, Buffer] | None = None,
    interpret: Any = None,
) -> Buffer:
    """Products of sorted rows with the matrices of their experts, LoRA added.

    Args:
        rows: ``[>= pairs, depth]``, of 16 bits a number.
        weight: ``[layers, experts, parts, width, depth]``. There are two parts, gate and up, where
            there is an activation, else one.
        bias: ``[layers, experts, parts, width]`` or None.
        sort: with tiles of ``TILE_ROWS`` rows.
        layer: int32 scalar.
        pairs: rows of this batch.
        activation: None for a plain product.
        sites: pages of each part; none for the base model.
        rank_activations: ``[parts, >= pairs, >= max_rank]``, with ``sites``.
        tiles: launch parameters.
        out: ``[>= pairs, width]`` or None.
        steps: of :func:`lora_steps`; None makes them.
        interpret: parameters of Pallas' interpreter, for tests.

    Returns:
        ``[pairs, width]`` or ``out``; rows past the last real pair are not defined.
    """
    _, experts, parts, width, depth = weight.shape
    columns = BLOCK_N // parts
    num_blocks = pl.cdiv(width, columns)
    part_pages = STEP_PAGES // parts
    part_rows = part_pages * PAGE_ROWS
    # Of one LoRA step: its numbers, rank activations, pages, and zeros.
    num_loads = 1 + parts + BLOCK_K // 8 * parts
    num_depth_steps = pl.cdiv(depth, BLOCK_K)
    num_tiles = max_tiles(pairs, experts, TILE_ROWS)
    order = min(tiles.order, num_tiles)
    num_items = pl.cdiv(num_tiles, order) * order * num_blocks
    stages = tiles.stages
    lora_inputs: tuple[Buffer, ...] = ()
    if sites:
        assert rank_activations is not None
        steps = steps or lora_steps(sort, sites, layer, num_tiles=num_tiles)
        pools = (site.b_pool.reshape(-1, width) for site in sites)
        lora_inputs = (*steps, rank_activations, *pools)
    bias_inputs = () if bias is None else (bias.reshape(-1),)

    def body(tiles_ref: Any, layer_ref: Any, rows_ref: Any, weight_ref: Any, *refs: Any) -> None:
        lora_refs, refs = refs[: len(lora_inputs)], refs[len(lora_inputs) :]
        bias_refs, (out_ref, *scratch) = refs[: len(bias_inputs)], refs[len(bias_inputs) :]
        row_views, weight_views, out_views, loaded, used, *lora_scratch = scratch
        if interpret:
            rows_in, ranks_smem = row_views[0], row_views[-1]
            rows_smem = rows_in
        else:
            rows_in, rows_smem, ranks_smem = row_views
        weight_smem, pages_smem = weight_views
        out_smem, spread_smem = out_views
        warpgroup = lax.axis_index("warpgroup")
        processor = lax.axis_index("processor")
        layer = layer_ref[0]

        def for_each_item(item: Any) -> Array:
            """Call ``item`` with tile, expert, first row, end row, block and steps before it."""

            def visit(number: Array, before: Array) -> Array:
                index = processor + number * tiles.processors
                group = lax.div(index, order * num_blocks)
                in_group = lax.rem(index, order * num_blocks)
                block = lax.div(in_group, order)
                tile = group * order + lax.rem(in_group, order)
                entry = jnp.minimum(tile, num_tiles - 1)
                expert = jnp.where(tile < num_tiles, tiles_ref[entry, 0], -1)
                first, end = tiles_ref[entry, 1], tiles_ref[entry, 2]
                return lax.cond(
                    expert >= 0,
                    lambda before: item(entry, expert, first, end, block, before),
                    lambda before: before,
                    before,
                )

            count = lax.div(num_items - processor + tiles.processors - 1, tiles.processors)
            return lax.fori_loop(0, count, visit, jnp.int32(0))

        def slot_of(step: Array) -> Array:
            return lax.rem(step, stages)

        def wait_for_slot(step: Array) -> Array:
            """Wait until a slot's earlier contents were used by all warpgroups."""

            @pl.when(step >= stages)
            def wait() -> None:
                plgpu.barrier_wait(used.at[slot_of(step)])

            return slot_of(step)

        def load(
            tile: Array, expert: Array, first: Array, end: Array, block: Array, before: Array
        ) -> Array:
            if lora_inputs:
                before = load_pages(tile, first, block, before)
            matrix = (layer * experts + expert) * (parts * width)

            def load_step(number: Array, _: None) -> None:
                slot = wait_for_slot(before + number)
                in_depth = pl.ds(number * BLOCK_K, BLOCK_K)
                plgpu.copy_gmem_to_smem(
                    rows_ref.at[pl.ds(first, TILE_ROWS), in_depth],
                    rows_in.at[slot],
                    loaded.at[slot],
                )
                for part in range(parts):
                    # Sizes that a program is compiled for are multiples of 8.
                    row = pl.multiple_of(matrix + part * width + block * columns, 8)
                    plgpu.copy_gmem_to_smem(
                        weight_ref.at[pl.ds(row, columns), in_depth],
                        weight_smem.at[slot, pl.ds(part * columns, columns)],
                        loaded.at[slot],
                    )

            lax.fori_loop(0, num_depth_steps, load_step, None)
            return before + num_depth_steps

        def load_pages(tile: Array, first: Array, block: Array, before: Array) -> Array:
            count_ref, steps_ref, ranks_ref, *pool_refs = lora_refs
            step_smem, lora_loaded = lora_scratch

            def load_step(number: Array, _: None) -> None:
                # All of these are read before the first wait.
                step_ref = steps_ref.at[tile, number]
                first_rank, zeros = step_ref[0], [step_ref[ZEROS + part] for part in range(parts)]
                page_rows = [step_ref[PAGES + page] for page in range(STEP_PAGES)]
                slot = wait_for_slot(before + number)
                barrier = lora_loaded.at[slot]
                plgpu.copy_gmem_to_smem(step_ref, step_smem.at[slot], barrier)
                for part, pool_ref in enumerate(pool_refs):
                    plgpu.copy_gmem_to_smem(
                        ranks_ref.at[part, pl.ds(first, TILE_ROWS), pl.ds(first_rank, PAGE_ROWS)],
                        ranks_smem.at[slot, part],
                        barrier,
                    )
                    # Eight rows at a time are together in shared memory.
                    for row in range(part * part_rows, (part + 1) * part_rows, 8):
                        from_row = page_rows[row // PAGE_ROWS] + row % PAGE_ROWS
                        load_rows(pool_ref, from_row, slot, row, part)
                        if parts == 2:
                            # The other part's sums must not change.
                            load_rows(pool_ref, zeros[part], slot, row, 1 - part)

            def load_rows(pool_ref: Any, from_row: Array, slot: Array, row: int, part: int) -> None:
                plgpu.copy_gmem_to_smem(
                    pool_ref.at[
                        pl.ds(pl.multiple_of(from_row, 8), 8), pl.ds(block * columns, columns)
                    ],
                    pages_smem.at[slot, pl.ds(row, 8), pl.ds(part * columns, columns)],
                    lora_loaded.at[slot],
                )

            count = count_ref[tile, 0]
            lax.fori_loop(0, count, load_step, None)
            return before + count

        def skip_step(barriers: Any) -> Any:
            def step(number: Array, _: None) -> None:
                plgpu.barrier_wait(barriers.at[slot_of(number)])
                plgpu.barrier_arrive(used.at[slot_of(number)])

            return step

        def multiply(
            tile: Array, expert: Array, first: Array, end: Array, block: Array, before: Array
        ) -> Array:
            group_row = pl.multiple_of(warpgroup * GROUP_ROWS, GROUP_ROWS)
            in_group = pl.ds(group_row, GROUP_ROWS)
            num_rows = jnp.clip(end - first - group_row, 0, GROUP_ROWS)
            begin = before + lora_refs[0][tile, 0] if lora_inputs else before
            after = begin + num_depth_steps

            def sums(total: Any) -> Array:
                if lora_inputs:
                    add_lora(total)

                def step(number: Array, _: None) -> None:
                    slot = slot_of(begin + number)
                    plgpu.barrier_wait(loaded.at[slot])
                    plgpu.wgmma(total, rows_smem.at[slot, in_group], weight_smem.at[slot].T)
                    # All but the newest product are done.
                    plgpu.wgmma_wait(1)

                    @pl.when(number > 0)
                    def release() -> None:
                        plgpu.barrier_arrive(used.at[slot_of(begin + number - 1)])

                lax.fori_loop(0, num_depth_steps, step, None)
                return total[...]

            def add_lora(total: Any) -> None:
                count_ref, (step_smem, lora_loaded) = lora_refs[0], lora_scratch
                row = group_row + plgpu.broadcasted_iota(
                    jnp.int32, (GROUP_ROWS, PAGE_ROWS), 0, layout=plgpu.Layout.WGMMA
                )
                # The last stores have been read.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                def step(number: Array, _: None) -> None:
                    slot = slot_of(number)
                    plgpu.barrier_wait(lora_loaded.at[slot])
                    spread = []
                    for part in range(parts):
                        ranks = plgpu.load(
                            ranks_smem.at[slot, part, in_group],
                            layout=plgpu.Layout.WGMMA,
                            optimized=False,
                        )
                        for page in range(part * part_pages, (part + 1) * part_pages):
                            start, stop = (step_smem[slot, f + page] for f in (STARTS, ENDS))
                            mine = (row >= start) & (row < stop)
                            spread.append(jnp.where(mine, ranks, jnp.zeros_like(ranks)))
                    spread_smem[warpgroup, 0] = jnp.concatenate(spread, axis=1)
                    plgpu.commit_smem()
                    plgpu.wgmma(total, spread_smem.at[warpgroup, 0], pages_smem.at[slot])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(used.at[slot])

                # Steps without rows of this warpgroup are at one end or at the other.
                lower = before + count_ref[tile, 1 + 2 * warpgroup]
                upper = before + count_ref[tile, 2 + 2 * warpgroup]
                lax.fori_loop(before, lower, skip_step(lora_loaded), None)
                lax.fori_loop(lower, upper, step, None)
                lax.fori_loop(upper, begin, skip_step(lora_loaded), None)

            def compute() -> None:
                total = pl.run_scoped(sums, plgpu.ACC((GROUP_ROWS, BLOCK_N)))
                plgpu.barrier_arrive(used.at[slot_of(after - 1)])
                store(total)

            def with_bias(value: Array, part: int, column: Array) -> Array:
                if not bias_refs:
                    return value
                # Columns past the last are not stored.
                begin = ((layer * experts + expert) * parts + part) * width
                begin += jnp.minimum(column, width - STORE_COLUMNS)
                numbers = plgpu.load(
                    bias_refs[0].at[pl.ds(pl.multiple_of(begin, 8), STORE_COLUMNS)],
                    layout=plgpu.Layout.WGMMA.reduce(0),
                    optimized=False,
                )
                return value + lax.broadcast_in_dim(numbers.astype(jnp.float32), value.shape, (1,))

            def store(total: Array) -> None:
                for chunk in range(0, columns, STORE_COLUMNS):
                    column = block * columns + chunk
                    values = [
                        with_bias(
                            total[:, part * columns + chunk :][:, :STORE_COLUMNS], part, column
                        )
                        for part in range(parts)
                    ]
                    value = values[0]
                    if activation is not None:
                        value = activate(value, values[1], activation)
                    buffer = chunk // STORE_COLUMNS % 2
                    # The store before last, from the same buffer, has been read.
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    out_smem[warpgroup, buffer] = value.astype(rows.dtype)
                    plgpu.commit_smem()
                    store_rows(buffer, column)

            def store_rows(buffer: int, column: Array) -> None:
                # A copy has a fixed number of rows, so there is one for each power of two.
                start: Any = 0
                size = GROUP_ROWS
                while size:

                    @pl.when((num_rows & size) != 0)
                    def _(start: Any = start, size: int = size) -> None:
                        plgpu.copy_smem_to_gmem(
                            out_smem.at[warpgroup, buffer, pl.ds(start, size)],
                            out_ref.at[
                                pl.ds(first + group_row + start, size),
                                pl.ds(column, STORE_COLUMNS),
                            ],
                            commit_group=False,
                        )

                    start += num_rows & size
                    size //= 2
                plgpu.commit_smem_to_gmem_group()

            def skip() -> None:
                """No row of this tile is this warpgroup's."""
                if lora_inputs:
                    lax.fori_loop(before, begin, skip_step(lora_scratch[1]), None)
                lax.fori_loop(begin, after, skip_step(loaded), None)

            lax.cond(num_rows > 0, compute, skip)
            return after

        @pl.when(warpgroup == GROUPS)
        def _load_all() -> None:
            plgpu.set_max_registers(40, action="decrease")
            total = for_each_item(load)

            def drain(step: Array, _: None) -> None:
                plgpu.barrier_wait(used.at[slot_of(step)])

            lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)

        @pl.when(warpgroup < GROUPS)
        def _multiply_all() -> None:
            plgpu.set_max_registers(232, action="increase")
            for_each_item(multiply)
            plgpu.wait_smem_to_gmem(0)

    row_tile = (stages, TILE_ROWS, BLOCK_K)
    row_views: tuple[Any, ...] = (
        swizzled(*row_tile, tile_rows=8, dtype=rows.dtype),
        # As large as the rows, so that a slot is the same memory in both.
        plgpu.SMEM((stages, STEP_PAGES, TILE_ROWS, PAGE_ROWS), rows.dtype),
    )
    weight_views: tuple[Any, ...] = (
        swizzled(stages, BLOCK_N, BLOCK_K, tile_rows=8, dtype=rows.dtype),
        swizzled(stages, BLOCK_K, BLOCK_N, tile_rows=8, dtype=rows.dtype),
    )
    out_tile = (GROUPS, 2, GROUP_ROWS, STORE_COLUMNS)
    out_views: tuple[Any, ...] = (
        swizzled(*out_tile, tile_rows=1, dtype=rows.dtype),
        swizzled(*out_tile, tile_rows=8, dtype=rows.dtype),
    )
    scratch: list[Any] = [
        # Loads may start at any row where a tile of the layout has one row; wgmma needs eight. In
        # memory both are the same.
        row_views
        if interpret
        else plgpu.RefUnion(swizzled(*row_tile, tile_rows=1, dtype=rows.dtype), *row_views),
        weight_views if interpret else plgpu.RefUnion(*weight_views),
        out_views if interpret else plgpu.RefUnion(*out_views),
        plgpu.Barrier(num_arrivals=1 + parts, num_barriers=stages),
        plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    ]
    if lora_inputs:
        scratch += [
            plgpu.SMEM((stages, STEP_FIELDS), jnp.int32),
            plgpu.Barrier(num_arrivals=num_loads, num_barriers=stages),
        ]
    kernel = plgpu.kernel(
        body,
        out_type=() if out is not None else jax.ShapeDtypeStruct((pairs, width), rows.dtype),
        scratch_types=scratch,
        grid=(tiles.processors,),
        grid_names=("processor",),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="down_mosaic" if activation is None else "gate_up_mosaic",
    )
    inputs: tuple[Buffer, ...] = (sort.expert_tiles, scalar(layer), rows, weight.reshape(-1, depth))
    inputs += (*lora_inputs, *bias_inputs)
    if out is None:
        return kernel(*inputs)
    kernel(*inputs, out)
    return out


def swizzled(*shape: int, tile_rows: int, dtype: jnp.dtype) -> Any:
    """Shared memory that neither the loads nor ``wgmma`` find bank conflicts in."""
    transforms = (plgpu.TilingTransform((tile_rows, BLOCK_K)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def require_sizes(tile_rows: int, dtype: DTypeLike, width: int, depth: int) -> None:
    """Raise ValueError for what the kernels here cannot do."""
    if tile_rows != TILE_ROWS:
        raise ValueError(f"Mosaic's kernels need tiles of {TILE_ROWS} rows, not {tile_rows}")
    if jnp.dtype(dtype).itemsize != 2:
        raise ValueError(f"Mosaic's kernels need a dtype of 16 bits, not {jnp.dtype(dtype)}")
    for size in (depth, width):
        # A dimension that is one step wide loses its index in Mosaic's copies: a store past the
        # last column would overwrite the first ones.
        if size % BLOCK_K or size == BLOCK_K:
            raise ValueError(
                f"Mosaic's kernels need widths that are multiples of {BLOCK_K} above it, not {size}"
            )


def activate(gate: Array, up: Array, activation: str) -> Array:
    """The gated activation of float32 sums."""
    if activation == "silu":
        return gate / (1.0 + jnp.exp(-gate)) * up
    gate, up = jnp.minimum(gate, 7.0), jnp.minimum(jnp.maximum(up, -7.0), 7.0)
    return (up + 1.0) * gate / (1.0 + jnp.exp(-1.702 * gate))


@triton.jit
def list_steps(
    tiles_ptr,
    group_ptr,
    layer_ptr,
    table_0_ptr,
    table_1_ptr,
    count_ptr,
    steps_ptr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    MOST: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    STEP_ADAPTERS: tl.constexpr,
    FIELDS: tl.constexpr,
    ZEROS: tl.constexpr,
    STARTS: tl.constexpr,
    ENDS: tl.constexpr,
    PAGES: tl.constexpr,
    POOL_0: tl.constexpr,
    POOL_1: tl.constexpr,
):
    """The LoRA steps of one tile per program.

    A step has the pages of one number that adapters next to each other in the tile have, those of
    the first site before those of the second.
    """
    tile = tl.program_id(0)
    expert = tl.load(tiles_ptr + tile * 3)
    if expert >= 0:
        first, end = tl.load(tiles_ptr + tile * 3 + 1), tl.load(tiles_ptr + tile * 3 + 2)
        layer = tl.load(layer_ptr)
        lane = tl.arange(0, TILE_ROWS)
        rows = first + lane
        adapter, slot, num_slots = tile_adapters(
            first, rows, rows < end, expert, group_ptr, NUM_ADAPTERS
        )
        table = (layer * 2 + 1) * NUM_ADAPTERS * MAX_PAGES * NUM_EXPERTS + expert
        number = tl.arange(0, STEP_ADAPTERS)
        count, first_end, second_begin = 0, 0, 0
        for first_slot in range(0, num_slots, STEP_ADAPTERS):
            step_adapter, mine = find_adapters(first_slot, adapter, slot, STEP_ADAPTERS)
            start = tl.min(tl.where(mine, lane[:, None], TILE_ROWS), 0)
            stop = tl.max(tl.where(mine, lane[:, None] + 1, 0), 0)
            for page in range(MAX_PAGES):
                entry = table + (step_adapter * MAX_PAGES + page) * NUM_EXPERTS
                page_0 = tl.load(table_0_ptr + entry, mask=step_adapter >= 0, other=-1)
                last = tl.max(page_0, 0)
                if table_1_ptr is not None:
                    page_1 = tl.load(table_1_ptr + entry, mask=step_adapter >= 0, other=-1)
                    last = tl.maximum(last, tl.max(page_1, 0))
                if last >= 0:
                    step_ptr = steps_ptr + (tile * MOST + count) * FIELDS
                    tl.store(step_ptr, page * PAGE_ROWS)
                    tl.store(step_ptr + ZEROS, POOL_0 * PAGE_ROWS)
                    step_ptrs = step_ptr + number
                    store_pages(
                        step_ptrs, start, stop, page_0, POOL_0, STARTS, ENDS, PAGES, PAGE_ROWS
                    )
                    if table_1_ptr is not None:
                        tl.store(step_ptr + ZEROS + 1, POOL_1 * PAGE_ROWS)
                        step_ptrs += STEP_ADAPTERS
                        store_pages(
                            step_ptrs, start, stop, page_1, POOL_1, STARTS, ENDS, PAGES, PAGE_ROWS
                        )
                    count += 1
            # Rows rise from step to step.
            if tl.min(start, 0) < GROUP_ROWS:
                first_end = count
            if tl.max(stop, 0) <= GROUP_ROWS:
                second_begin = count
        count_ptr += tile * 5
        tl.store(count_ptr, count)
        tl.store(count_ptr + 1, 0)
        tl.store(count_ptr + 2, first_end)
        tl.store(count_ptr + 3, second_begin)
        tl.store(count_ptr + 4, count)


@triton.jit
def store_pages(
    step_ptrs,
    start,
    stop,
    page,
    POOL: tl.constexpr,
    STARTS: tl.constexpr,
    ENDS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
):
    """Where there is no page, one past the pool, which loads find zeros in."""
    tl.store(step_ptrs + STARTS, start)
    tl.store(step_ptrs + ENDS, tl.where(page >= 0, stop, start))
    tl.store(step_ptrs + PAGES, tl.where(page >= 0, page, POOL) * PAGE_ROWS)
