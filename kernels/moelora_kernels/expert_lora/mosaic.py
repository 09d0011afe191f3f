"""gate_up and down of many rows per expert in Pallas Mosaic GPU: Hopper, 16 bits a number.

Each processor takes one tile of rows and one block of columns after another. One warpgroup loads:
steps of ``BLOCK`` summed columns go through a ring of slots in shared memory, by the tensor memory
accelerator. Two warpgroups multiply with ``wgmma``. The loads of the next tile start while the
present one is still multiplied and stored.

``wgmma`` has 64 rows at least, and any number of columns that eight divides. So the matrices of the
experts are its first factor, 128 of their rows for each of the two warpgroups, and the rows of the
batch its second: few empty rows are multiplied, and weights are loaded once for up to 176 rows. The
sums lie the other way around, which the stores to shared memory put right.

LoRA is more steps of the same sums, before the others: those of gate, then those of up. In such a
step the slot has four pages of B in place of the weights. In place of the rows it has their rank
activations, which the loading warpgroup spreads so that a row meets the pages of its own adapter
only. The launch that makes the rank activations lists the pages of each tile. Pages of one number
come together, for which the rank activations of all rows stay in registers.

The accelerator cannot gather rows, so gate_up reads a copy of ``x`` in sorted order.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from moelora_kernels.backend import call_in_place, scalar
from moelora_kernels.buffers import given_or_new
from moelora_kernels.expert_lora.triton_gather import gather_rows
from moelora_kernels.expert_lora.triton_shrink import shrink_and_list
from moelora_kernels.expert_lora.triton_steps import (
    ENDS,
    PAGES,
    STARTS,
    STEP_FIELDS,
    STEP_PAGES,
    StepLists,
)
from moelora_kernels.tiles import max_tiles
from moelora_kernels.tuning.tiles import MosaicTiles
from moelora_kernels.types import PAGE_ROWS, RANK_PADDING, Buffer, SitePages, TokenSort

#: Warpgroups that multiply.
GROUPS = 2
#: Columns of the result that one ``wgmma`` makes; and summed columns of one step: 128 bytes, what
#: the swizzled layout has in a row.
BLOCK = 64
#: Blocks of columns of one tile, and those of a warpgroup.
BLOCKS = 4
GROUP_BLOCKS = BLOCKS // GROUPS
#: Rows of a tile of the sort: a multiple of 16 up to so many. There is a loop of products for each
#: size in these steps, so that few empty rows are multiplied.
MAX_TILE_ROWS = 176
SIZE_STEP = 16
#: Rows that a warpgroup stores at a time; fewer where that makes room for one more slot.
STORE_ROWS = (64, 32)
#: Bytes of shared memory for the slots and for the rows that are stored.
SHARED_MEMORY = 224 * 1024


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
    pairs, steps = x.shape[0] * top_k, None
    if sites is not None:
        rank_activations = padded(rank_activations, sites, pairs, x.dtype)
        rank_activations, steps = shrink_and_list(
            x,
            sort,
            sites,
            layer,
            pairs=pairs,
            top_k=top_k,
            tiles=tiles.shrink,
            tile_rows=tile_rows,
            out=rank_activations,
        )
    return grouped_product(
        gather_rows(x, sort, top_k, sorted_x),
        weight,
        bias,
        sort,
        layer,
        pairs=pairs,
        tile_rows=tile_rows,
        activation=activation,
        sites=sites or (),
        rank_activations=rank_activations,
        steps=steps,
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
    sites, steps = () if site is None else (site,), None
    if sites:
        rank_activations = padded(rank_activations, sites, pairs, hidden.dtype)
        rank_activations, steps = shrink_and_list(
            hidden,
            sort,
            sites,
            layer,
            pairs=pairs,
            top_k=None,
            tiles=tiles.shrink,
            tile_rows=tile_rows,
            out=rank_activations,
        )
    return grouped_product(
        hidden,
        weight[:, :, None],
        None if bias is None else bias[:, :, None],
        sort,
        layer,
        pairs=pairs,
        tile_rows=tile_rows,
        activation=None,
        sites=sites,
        rank_activations=rank_activations,
        steps=steps,
        tiles=tiles,
        out=out,
    )


def padded(
    given: Buffer | None, sites: Sequence[SitePages], pairs: int, dtype: DTypeLike
) -> Buffer:
    """A buffer for rank activations with as many rows as the kernel reads at once past the last."""
    rows = pairs + RANK_PADDING
    if given is not None and given.shape[1] < rows:
        raise ValueError(
            f"Mosaic's kernels need {rows} rows of rank activations, not {given.shape[1]}"
        )
    return given_or_new(given, (len(sites), rows, sites[0].max_rank), dtype)


def grouped_product(
    rows: Buffer,
    weight: Array,
    bias: Array | None,
    sort: TokenSort,
    layer: Array,
    *,
    pairs: int,
    tile_rows: int,
    activation: str | None,
    sites: Sequence[SitePages],
    rank_activations: Buffer | None,
    steps: StepLists | None,
    tiles: MosaicTiles,
    out: Buffer | None,
    interpret: Any = None,
) -> Buffer:
    """Products of sorted rows with the matrices of their experts, LoRA added.

    Args:
        rows: ``[>= pairs, depth]``, of 16 bits a number.
        weight: ``[layers, experts, parts, width, depth]``. There are two parts, gate and up, where
            there is an activation, else one.
        bias: ``[layers, experts, parts, width]`` or None.
        sort: the token sort.
        layer: int32 scalar.
        pairs: rows of this batch.
        tile_rows: what the sort was made with.
        activation: None for a plain product.
        sites: pages of each part; none for the base model.
        rank_activations: ``[parts, >= pairs, >= max_rank]``, with ``sites``.
        steps: of the tiles, with ``sites``.
        tiles: launch parameters.
        out: ``[>= pairs, width]`` or None.
        interpret: parameters of Pallas' interpreter, for tests.

    Returns:
        ``[pairs, width]`` or ``out``; rows past the last real pair are not defined.
    """
    _, experts, parts, width, depth = weight.shape
    # Columns of the result that one tile has.
    columns = BLOCKS // parts * BLOCK
    num_blocks = pl.cdiv(width, columns)
    num_depth_steps = pl.cdiv(depth, BLOCK)
    num_tiles = max_tiles(pairs, experts, tile_rows)
    order = min(tiles.order, num_tiles)
    num_items = pl.cdiv(num_tiles, order) * order * num_blocks
    slot_bytes = (max(tile_rows, BLOCK) + BLOCKS * BLOCK) * BLOCK * rows.dtype.itemsize

    def slots_beside(stored_rows: int) -> int:
        store_bytes = GROUPS * stored_rows * BLOCK * rows.dtype.itemsize
        return (SHARED_MEMORY - store_bytes) // slot_bytes

    stored_rows = max(STORE_ROWS, key=slots_beside)
    stages = slots_beside(stored_rows)
    # Rank activations are spread over so many rows at a time.
    smem_rows = max(tile_rows, BLOCK) if sites else tile_rows
    # Rows that there are programs for.
    sizes = list(range(tile_rows, 0, -SIZE_STEP))
    lora_inputs: tuple[Buffer, ...] = ()
    max_pages = 0
    if sites:
        max_pages = sites[0].table.shape[3]
        assert rank_activations is not None and steps is not None
        pools = (site.b_pool.reshape(-1, width) for site in sites)
        lora_inputs = (*steps, rank_activations, *pools)
    bias_inputs = () if bias is None else (bias.reshape(-1),)

    def body(tiles_ref: Any, layer_ref: Any, rows_ref: Any, weight_ref: Any, *refs: Any) -> None:
        lora_refs, refs = refs[: len(lora_inputs)], refs[len(lora_inputs) :]
        bias_refs, (out_ref, *scratch) = refs[: len(bias_inputs)], refs[len(bias_inputs) :]
        row_views, weight_smem, out_views, loaded, used, *lora_scratch = scratch
        rows_in, rows_smem = (row_views, row_views) if interpret else row_views
        out_smem, out_written = (out_views, out_views) if interpret else out_views
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
                    lambda before: item(tile, expert, first, end, block, before),
                    lambda before: before,
                    before,
                )

            count = lax.div(num_items - processor + tiles.processors - 1, tiles.processors)
            return lax.fori_loop(0, count, visit, jnp.int32(0))

        def size_of(first: Array, end: Array) -> Array:
            """Which of ``sizes`` is the smallest that has all rows."""
            return lax.div(tile_rows - (end - first), SIZE_STEP)

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
                before = load_pages(tile, first, end, block, before)
            matrix = (layer * experts + expert) * (parts * width)

            def load_step(number: Array, _: None) -> None:
                slot = wait_for_slot(before + number)
                in_depth = pl.ds(number * BLOCK, BLOCK)

                def load_rows(size: int) -> None:
                    plgpu.copy_gmem_to_smem(
                        rows_ref.at[pl.ds(first, size), in_depth],
                        rows_in.at[slot, pl.ds(0, size)],
                        loaded.at[slot],
                    )

                lax.switch(size_of(first, end), [functools.partial(load_rows, n) for n in sizes])
                for number_of, (part, column) in enumerate(blocks):
                    # Past the last column another block is loaded again, which no store needs.
                    from_column = jnp.minimum(block * columns + column, width - BLOCK)
                    row = pl.multiple_of(matrix + part * width + from_column, BLOCK)
                    plgpu.copy_gmem_to_smem(
                        weight_ref.at[pl.ds(row, BLOCK), in_depth],
                        weight_smem.at[slot, number_of],
                        loaded.at[slot],
                    )

            lax.fori_loop(0, num_depth_steps, load_step, None)
            return before + num_depth_steps

        def load_pages(tile: Array, first: Array, end: Array, block: Array, before: Array) -> Array:
            ends_ref, steps_ref, ranks_ref, *pool_refs = lora_refs
            (lora_loaded,) = lora_scratch
            # Rows that are spread at a time.
            begins = [min(n, smem_rows - BLOCK) for n in range(0, smem_rows, BLOCK)]

            def load_part(part: int, number: Array) -> Array:
                part_pool = pool_refs[part]
                part_blocks = [(n, column) for n, (own, column) in enumerate(blocks) if own == part]

                def load_number(page: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                    number, stop = carry
                    following = ends_ref[tile, part * max_pages + jnp.minimum(page + 1, last)]

                    @pl.when(stop > number)
                    def load_steps() -> None:
                        ranks = [
                            plgpu.load(
                                ranks_ref.at[
                                    part,
                                    pl.ds(first + begin, BLOCK),
                                    pl.ds(page * PAGE_ROWS, PAGE_ROWS),
                                ],
                                layout=plgpu.Layout.WGMMA,
                                optimized=False,
                            )
                            for begin in begins
                        ]
                        step = functools.partial(load_step, part_pool, part_blocks, ranks)
                        lax.fori_loop(number, stop, step, read_step(number))

                    return stop, following

                last = max_pages - 1
                stop = ends_ref[tile, part * max_pages]
                return lax.fori_loop(0, max_pages, load_number, (number, stop))[0]

            def read_step(number: Array) -> tuple[Array, ...]:
                return tuple(steps_ref[tile, number, field] for field in range(STEP_FIELDS))

            def load_step(
                pool_ref: Any,
                part_blocks: Sequence[tuple[int, int]],
                ranks: Sequence[Array],
                number: Array,
                fields: tuple[Array, ...],
            ) -> tuple[Array, ...]:
                # Arrives while the present step is waited for.
                following = read_step(number + 1)
                slot = wait_for_slot(before + number)
                barrier = lora_loaded.at[slot]
                for page in range(STEP_PAGES):
                    row = pl.multiple_of(fields[PAGES + page], PAGE_ROWS)
                    for number_of, column in part_blocks:
                        plgpu.copy_gmem_to_smem(
                            pool_ref.at[
                                pl.ds(row, PAGE_ROWS), pl.ds(block * columns + column, BLOCK)
                            ],
                            weight_smem.at[slot, number_of, pl.ds(page * PAGE_ROWS, PAGE_ROWS)],
                            barrier,
                        )
                for begin, value in zip(begins, ranks, strict=True):

                    @pl.when(begin < end - first)
                    def spread(begin: int = begin, value: Array = value) -> None:
                        """Rank activations in the columns of the row's own page, and zeros."""
                        row = begin + plgpu.broadcasted_iota(
                            jnp.int32, (BLOCK, PAGE_ROWS), 0, layout=plgpu.Layout.WGMMA
                        )
                        pages = []
                        for page in range(STEP_PAGES):
                            mine = (row >= fields[STARTS + page]) & (row < fields[ENDS + page])
                            pages.append(jnp.where(mine, value, jnp.zeros_like(value)))
                        rows_smem[slot, pl.ds(begin, BLOCK)] = jnp.concatenate(pages, axis=1)

                plgpu.commit_smem()
                plgpu.barrier_arrive(barrier)
                return following

            number = jnp.int32(0)
            for part in range(parts):
                number = load_part(part, number)
            return before + number

        def multiply(
            tile: Array, expert: Array, first: Array, end: Array, block: Array, before: Array
        ) -> Array:
            # Where the LoRA steps of each part end.
            ends = [
                before + lora_refs[0][tile, (part + 1) * max_pages - 1]
                for part in range(parts if lora_inputs else 0)
            ]
            begin = ends[-1] if ends else before
            after = begin + num_depth_steps
            mine = [GROUP_BLOCKS * warpgroup + number for number in range(GROUP_BLOCKS)]

            def sums(*totals: Any) -> list[Array]:
                def step(
                    size: int, barriers: Any, numbers: Sequence[int], transposed: bool = False
                ) -> Any:
                    def run(number: Array, _: None) -> None:
                        slot = slot_of(number)
                        plgpu.barrier_wait(barriers.at[slot])
                        for own in numbers:
                            matrix = weight_smem.at[slot, mine[own]]
                            plgpu.wgmma(
                                totals[own].at[:, pl.ds(0, size)],
                                matrix.T if transposed else matrix,
                                rows_smem.at[slot, pl.ds(0, size)].T,
                            )
                        # All but the newest products are done.
                        plgpu.wgmma_wait(len(numbers))

                        @pl.when(number > before)
                        def release() -> None:
                            plgpu.barrier_arrive(used.at[slot_of(number - 1)])

                    return run

                # LoRA steps are few, so that they have all rows of a tile, be they there or not.
                start = before
                for part, stop in enumerate(ends):
                    numbers = [n for n in range(GROUP_BLOCKS) if blocks[n][0] == part]
                    run = step(tile_rows, lora_scratch[0], numbers, True)
                    lax.fori_loop(start, stop, run, None)
                    start = stop

                def add_steps(size: int) -> None:
                    lax.fori_loop(begin, after, step(size, loaded, range(GROUP_BLOCKS)), None)
                    plgpu.wgmma_wait(0)

                lax.switch(size_of(first, end), [functools.partial(add_steps, n) for n in sizes])
                return [total[...] for total in totals]

            totals = pl.run_scoped(sums, *[plgpu.ACC((BLOCK, tile_rows))] * GROUP_BLOCKS)
            plgpu.barrier_arrive(used.at[slot_of(after - 1)])
            column = block * columns + warpgroup * (columns // GROUPS)
            if parts == 2:
                store(expert, first, end, column, totals)
            else:
                for number, total in enumerate(totals):
                    store(expert, first, end, column + number * BLOCK, [total])
            return after

        def store(
            expert: Array, first: Array, end: Array, column: Array, totals: Sequence[Array]
        ) -> None:
            """Store a block of columns, of which there are sums of each part."""
            biases = [load_bias(expert, part, column) for part in range(parts if bias_refs else 0)]
            for chunk in range(0, tile_rows, stored_rows):
                size = min(stored_rows, tile_rows - chunk)

                @pl.when(chunk < end - first)
                def store_chunk(chunk: int = chunk, size: int = size) -> None:
                    values = [total[:, chunk : chunk + size] for total in totals]
                    for part, bias in enumerate(biases):
                        values[part] += lax.broadcast_in_dim(bias, (BLOCK, size), (0,))
                    value = values[0]
                    if activation is not None:
                        value = activate(value, values[1], activation)
                    # The store before has been read.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_written.at[warpgroup, pl.ds(0, size)].T[...] = value.astype(rows.dtype)
                    plgpu.commit_smem()
                    num_rows = jnp.minimum(end - first - chunk, size)
                    copy_rows(num_rows, first + chunk, column)

        def load_bias(expert: Array, part: int, column: Array) -> Array:
            # Columns past the last are not stored.
            begin = ((layer * experts + expert) * parts + part) * width
            begin += jnp.minimum(column, width - BLOCK)
            numbers = plgpu.load(
                bias_refs[0].at[pl.ds(pl.multiple_of(begin, 8), BLOCK)],
                layout=plgpu.Layout.WGMMA.reduce(1),
                optimized=False,
            )
            return numbers.astype(jnp.float32)

        def copy_rows(num_rows: Array, first: Array, column: Array) -> None:
            # A copy has a fixed number of rows, so there is one for each power of two.
            start: Any = 0
            size = stored_rows
            while size:

                @pl.when((num_rows & size) != 0)
                def _(start: Any = start, size: int = size) -> None:
                    plgpu.copy_smem_to_gmem(
                        out_smem.at[warpgroup, pl.ds(start, size)],
                        out_ref.at[pl.ds(first + start, size), pl.ds(column, BLOCK)],
                        commit_group=False,
                    )

                start += num_rows & size
                size //= 2
            plgpu.commit_smem_to_gmem_group()

        @pl.when(warpgroup == GROUPS)
        def _load_all() -> None:
            plgpu.set_max_registers(72 if lora_inputs else 40, action="decrease")
            total = for_each_item(load)

            def drain(step: Array, _: None) -> None:
                plgpu.barrier_wait(used.at[slot_of(step)])

            lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)

        @pl.when(warpgroup < GROUPS)
        def _multiply_all() -> None:
            plgpu.set_max_registers(216 if lora_inputs else 232, action="increase")
            for_each_item(multiply)
            plgpu.wait_smem_to_gmem(0)

    # A warpgroup's blocks: one of each part, or neighbours.
    blocks = [
        (number % 2, number // 2 * BLOCK) if parts == 2 else (0, number * BLOCK)
        for number in range(BLOCKS)
    ]
    row_tile, out_tile = (stages, smem_rows, BLOCK), (GROUPS, stored_rows, BLOCK)

    def views(shape: tuple[int, ...]) -> Any:
        """Two views of the same memory.

        Loads and stores may start at any row where a tile of the layout has one row; ``wgmma``
        needs eight.
        """
        eight = swizzled(*shape, tile_rows=8, dtype=rows.dtype)
        if interpret:
            return eight
        return plgpu.RefUnion(swizzled(*shape, tile_rows=1, dtype=rows.dtype), eight)

    scratch: list[Any] = [
        views(row_tile),
        swizzled(stages, BLOCKS, BLOCK, BLOCK, tile_rows=8, dtype=rows.dtype),
        views(out_tile),
        plgpu.Barrier(num_arrivals=1 + BLOCKS, num_barriers=stages),
        plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    ]
    if lora_inputs:
        # Each block of each page, and the rank activations.
        arrivals = STEP_PAGES * BLOCKS // parts + 1
        scratch.append(plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages))
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
        return call_in_place(kernel, *inputs)
    call_in_place(kernel, *inputs, out)
    return out


def swizzled(*shape: int, tile_rows: int, dtype: jnp.dtype) -> Any:
    """Shared memory that neither the loads nor ``wgmma`` find bank conflicts in."""
    transforms = (plgpu.TilingTransform((tile_rows, BLOCK)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def require_sizes(tile_rows: int, dtype: DTypeLike, width: int, depth: int) -> None:
    """Raise ValueError for what the kernels here cannot do."""
    if tile_rows % 16 or not 0 < tile_rows <= MAX_TILE_ROWS:
        raise ValueError(
            f"Mosaic's kernels need tiles of 16, 32, ... {MAX_TILE_ROWS} rows, not {tile_rows}"
        )
    if jnp.dtype(dtype).itemsize != 2:
        raise ValueError(f"Mosaic's kernels need a dtype of 16 bits, not {jnp.dtype(dtype)}")
    for size in (depth, width):
        # A dimension that is one step wide loses its index in Mosaic's copies: a store past the
        # last column would overwrite the first ones.
        if size % BLOCK or size == BLOCK:
            raise ValueError(
                f"Mosaic's kernels need widths that are multiples of {BLOCK} above it, not {size}"
            )


def activate(gate: Array, up: Array, activation: str) -> Array:
    """The gated activation of float32 sums."""
    if activation == "silu":
        return gate / (1.0 + jnp.exp(-gate)) * up
    gate, up = jnp.minimum(gate, 7.0), jnp.minimum(jnp.maximum(up, -7.0), 7.0)
    return (up + 1.0) * gate / (1.0 + jnp.exp(-1.702 * gate))
