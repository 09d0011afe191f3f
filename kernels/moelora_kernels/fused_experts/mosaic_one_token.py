"""The MoE layer of one token in one Pallas Mosaic GPU launch: Hopper, 16 bits a number.

Each processor has a loading warpgroup, which streams matrix rows through rings of buffers in shared
memory by the tensor memory accelerator, and computing ones, each with a ring of its own. Nothing
that is loaded depends on what is computed: while processors wait for each other between the
projections, the rings fill with the weights of down, and the memory is never idle.

The work of gate_up is cut into items, which processors and their warpgroups take in turn: first the
pages that shrink, then blocks of intermediate columns of a pair. An item is eight rows of one
matrix and eight of another: gate and up, or the halves of a page. Down has one block of output
columns per processor, and its warpgroups share the summed columns.

All programs of the launch must run at once, since they wait for each other: there is one for each
processor.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mosaic_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from moelora_kernels.backend import scalar
from moelora_kernels.buffers import given_or_new
from moelora_kernels.expert_lora.mosaic import activate
from moelora_kernels.types import PAGE_ROWS, SIGNALS, Buffer, ExpertPages

#: Rows of a matrix that are loaded and summed together.
ROWS = 8
#: Summed columns of one step.
BLOCK_K = 256
#: Warpgroups that compute.
GROUPS = 3
#: Items whose pages of B are in shared memory or on their way. Each place is always the same
#: warpgroup's, as one that waits for a barrier must wait each time.
ITEMS = 2 * GROUPS
#: Bytes of shared memory that a program can have, less what barriers need.
SHARED_MEMORY = 226 * 1024

#: Counters: programs' warpgroups that need no counter any more; that are done with each task.
LEFT, SHRUNK, GATED, DOWN_SHRUNK = range(4)

#: ``[ROWS, BLOCK_K]``: a row in a warp, eight columns in a thread.
TILE = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 256), (128,), (8,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)
#: ``[PAGE_ROWS, ROWS]``: a rank in a thread. Its sum over ranks lies as the sum of a ``TILE`` over
#: columns does.
RANKS = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 4), (1,))),
    warp_dims=(-2,),
    lane_dims=(plgpu.Replicated(2), -3),
    vector_dim=-1,
)
SUMS = TILE.reduce(1)


def one_token(
    x: Array,
    experts: Array,
    weights: Array,
    num_tokens: Array,
    gate_up_weight: Array,
    down_weight: Array,
    layer: Array,
    *,
    gate_up_bias: Array | None,
    down_bias: Array | None,
    activation: str,
    scaling: float,
    adapter_of_token: Array | None,
    pages: ExpertPages | None,
    gate_up_ranks: Buffer | None,
    hidden: Buffer | None,
    down_ranks: Buffer | None,
    signals: Buffer | None,
    out: Buffer | None,
    processors: int = 132,
    interpret: Any = None,
) -> Buffer:
    """See :func:`moelora_kernels.fused_experts`."""
    top_k = experts.shape[1]
    _, num_experts, _, inner, width = gate_up_weight.shape
    if width % 8 or inner % 8 or x.dtype.itemsize != 2:
        raise ValueError("Mosaic's kernel needs 16 bits a number and widths that 8 divides")
    blocks = inner // ROWS
    gate_steps, down_steps = pl.cdiv(width, BLOCK_K), pl.cdiv(inner, BLOCK_K)
    # Output columns of a processor, in sets of ROWS; two sets share a slot of the ring.
    sets = pl.cdiv(width, ROWS * processors)
    set_pairs = pl.cdiv(sets, 2)
    max_pages = 0 if pages is None else pages.gate.table.shape[3]
    all_shrinks, all_down_shrinks = 2 * top_k * max_pages, top_k * max_pages
    slot_bytes = 2 * ROWS * BLOCK_K * 2
    other_bytes = 2 * BLOCK_K * (gate_steps + top_k * down_steps)
    other_bytes += 4 * GROUPS * sets * ROWS
    other_bytes += 2 * max_pages * PAGE_ROWS * ROWS * (2 * ITEMS + top_k * sets)
    # The index of a barrier must be below 32.
    slots = min((SHARED_MEMORY - other_bytes) // slot_bytes, 30) // GROUPS
    if slots < 2:
        raise ValueError("too little shared memory for Mosaic's kernel of one token")
    lora_inputs: tuple[Any, ...] = ()
    lora_buffers: tuple[Any, ...] = ()
    if pages is not None:
        lora_inputs = (adapter_of_token,)
        for site in pages:
            halves = site.a_pool.reshape(-1, ROWS, site.a_pool.shape[-1])
            lora_inputs += (halves, site.b_pool, site.table, site.scaling)
        lora_buffers = (
            given_or_new(gate_up_ranks, (2, top_k, pages.gate.max_rank), x.dtype),
            given_or_new(down_ranks, (1, top_k, pages.gate.max_rank), x.dtype),
        )
    bias_inputs: tuple[Any, ...] = ()
    if gate_up_bias is not None and down_bias is not None:
        bias_inputs = (gate_up_bias.reshape(-1), down_bias.reshape(-1))

    def body(*refs: Any) -> None:
        x_ref, experts_ref, weights_ref, num_tokens_ref, layer_ref, *refs = refs
        gate_up_ref, down_ref, *refs = refs
        bias_refs, refs = refs[: len(bias_inputs)], refs[len(bias_inputs) :]
        lora_refs, refs = refs[: len(lora_inputs)], refs[len(lora_inputs) :]
        z_refs, refs = refs[: len(lora_buffers)], refs[len(lora_buffers) :]
        hidden_ref, signals_ref, out_ref, *refs = refs
        ring, x_smem, h_smem, part_smem, loaded, used, x_loaded, h_loaded, parts_done, *refs = refs
        lora_smem, refs = refs[: 5 * (max_pages > 0)], refs[5 * (max_pages > 0) :]
        group = lax.axis_index("warpgroup")
        processor = lax.axis_index("processor")
        layer = layer_ref[0]
        real = num_tokens_ref[0] > 0
        adapter: Any = lora_refs[0][0] if lora_refs else jnp.int32(-1)
        has_adapter = real & (adapter >= 0)
        shrinks = jnp.where(has_adapter, all_shrinks, 0)
        items = jnp.where(
            real, lax.div(shrinks + top_k * blocks - processor + processors - 1, processors), 0
        )
        # Pages of down are shrunk by the first warpgroup, before its share of the products.
        down_shrinks = jnp.where(
            has_adapter, lax.div(all_down_shrinks - processor + processors - 1, processors), 0
        )
        column = processor * (sets * ROWS)

        def site(index: int) -> Any:
            return lora_refs[1 + 4 * index : 5 + 4 * index]

        def first_step(of_group: Any, item: Any) -> Any:
            """Steps of a warpgroup before an item."""
            return lax.div(item - of_group + GROUPS - 1, GROUPS) * gate_steps

        def signal(counter: int) -> None:
            if interpret:
                plgpu.barrier_arrive(refs[counter - 1])
            else:
                _signal(signals_ref.at[pl.ds(counter, 1)])

        def wait_for(counter: int, count: Any) -> None:
            if interpret:
                plgpu.barrier_wait(refs[counter - 1])
            else:
                _wait_for(signals_ref.at[pl.ds(counter, 1)], count)

        def slot_of(of_group: Any, step: Any) -> Any:
            return of_group * slots + lax.rem(step, slots)

        def load_all() -> None:
            def load_x(k: Any, _: None) -> None:
                plgpu.copy_gmem_to_smem(
                    x_ref.at[pl.ds(0, 1), pl.ds(k * BLOCK_K, BLOCK_K)], x_smem.at[k], x_loaded
                )

            lax.fori_loop(0, gate_steps, load_x, None)
            lax.fori_loop(0, items, load_item, None)
            # All that is loaded is waited for by those that compute.
            load_down()

        def load_rows(ref: Any, first: Any, row: Any, k: Any, of_group: Any, step: Any) -> None:
            """Load one step: some rows and columns of two neighbouring matrices."""
            slot = slot_of(of_group, step)

            @pl.when(step >= slots)
            def _() -> None:
                plgpu.barrier_wait(used.at[slot])

            plgpu.copy_gmem_to_smem(
                ref.at[pl.ds(first, 2), pl.ds(row, ROWS), pl.ds(k * BLOCK_K, BLOCK_K)],
                ring.at[slot],
                loaded.at[slot],
            )

        def load_item(item: Any, _: None) -> None:
            of_group = lax.rem(item, GROUPS)
            before = first_step(of_group, item)
            index = processor + item * processors

            def load_matrix(ref: Any, first: Any, row: Any) -> None:
                def step(k: Any, _: None) -> None:
                    load_rows(ref, first, row, k, of_group, before + k)

                lax.fori_loop(0, gate_steps, step, None)

            def load_products() -> None:
                _, block, expert = product_of(index)
                matrix = layer * num_experts + expert
                load_matrix(gate_up_ref, 2 * matrix, block * ROWS)
                if lora_refs:

                    @pl.when(has_adapter)
                    def _() -> None:
                        load_b(item, expert, block)

            def load_page() -> None:
                pair, page, number = page_of(index)
                for which in range(2):
                    a_ref, _, table_ref, _ = site(which)

                    @pl.when(number == which)
                    def _(a_ref: Any = a_ref, table_ref: Any = table_ref) -> None:
                        load_matrix(
                            a_ref, pool_page(table_ref, 0, page, experts_ref[pair], a_ref), 0
                        )

            if lora_refs:
                lax.cond(index < shrinks, load_page, load_products)
            else:
                load_products()

        def product_of(index: Any) -> Any:
            """Pair, block of columns and expert of an item."""
            number = index - shrinks
            pair = lax.div(number, blocks)
            return pair, lax.rem(number, blocks), experts_ref[pair]

        def page_of(index: Any) -> Any:
            """Pair, page and site of an item that shrinks."""
            return (
                lax.div(index, 2 * max_pages),
                lax.rem(lax.div(index, 2), max_pages),
                lax.rem(index, 2),
            )

        def pool_page(table_ref: Any, factor: int, page: Any, expert: Any, pool_ref: Any) -> Any:
            """Where a page of B, or the first half of one of A, is.

            Where there is none, past the pool, where loads find zeros.
            """
            row = table_ref[layer, factor, adapter, page, expert]
            return jnp.where(row >= 0, row * (2 - factor), pool_ref.shape[0])

        def load_b(item: Any, expert: Any, block: Any) -> None:
            b_smem, _, b_loaded, b_used, _ = lora_smem
            slot = lax.rem(item, ITEMS)
            # Items that shrink have no such pages, and are the first.
            before = lax.div(jnp.maximum(shrinks - processor + processors - 1, 0), processors)

            @pl.when(item - before >= ITEMS)
            def _() -> None:
                plgpu.barrier_wait(b_used.at[slot])

            for which in range(2):
                _, b_ref, table_ref, _ = site(which)
                for page in range(max_pages):
                    row = pool_page(table_ref, 1, page, expert, b_ref)
                    plgpu.copy_gmem_to_smem(
                        b_ref.at[row, :, pl.ds(block * ROWS, ROWS)],
                        b_smem.at[slot, which, page],
                        b_loaded.at[slot],
                    )

        def load_down() -> None:
            if lora_refs:
                a_ref, b_ref, table_ref, _ = site(2)
                _, down_b_smem, _, _, down_b_loaded = lora_smem

                def load_page(turn: Any, _: None) -> None:
                    pair, page = down_page_of(turn)
                    row = pool_page(table_ref, 0, page, experts_ref[pair], a_ref)
                    before = first_step(0, items) + turn * down_steps

                    def step(k: Any, _: None) -> None:
                        load_rows(a_ref, row, 0, k, 0, before + k)

                    lax.fori_loop(0, down_steps, step, None)

                lax.fori_loop(0, down_shrinks, load_page, None)

                @pl.when(has_adapter & (column < width))
                def _() -> None:
                    for pair in range(top_k):
                        for page in range(max_pages):
                            row = pool_page(table_ref, 1, page, experts_ref[pair], b_ref)
                            plgpu.copy_gmem_to_smem(
                                b_ref.at[row, :, pl.ds(column, sets * ROWS)],
                                down_b_smem.at[pair, page],
                                down_b_loaded,
                            )

            def step(number: Any, _: None) -> None:
                of_group = lax.rem(number, GROUPS)
                pair, k = lax.div(number, down_steps), lax.rem(number, down_steps)
                matrix = layer * num_experts + experts_ref[pair]
                before = down_before(of_group) + lax.div(number, GROUPS) * set_pairs
                for part in range(set_pairs):
                    # The second of the last two sets may not be used, but is loaded.
                    first = matrix * (width // ROWS) + processor * sets + 2 * part
                    load_rows(down_ref, first, 0, k, of_group, before + part)

            @pl.when(real & (column < width))
            def _() -> None:
                lax.fori_loop(0, top_k * down_steps, step, None)

        def down_page_of(turn: Any) -> Any:
            """Pair and page that a processor shrinks for down."""
            index = processor + turn * processors
            return lax.div(index, max_pages), lax.rem(index, max_pages)

        def down_before(of_group: Any) -> Any:
            """Steps of a warpgroup before the products of down."""
            return first_step(of_group, items) + jnp.where(
                of_group == 0, down_shrinks * down_steps, 0
            )

        def tile(ref: Any) -> Array:
            return plgpu.load(ref, layout=TILE, optimized=False).astype(jnp.float32)

        def row_of(ref: Any) -> Array:
            """``[BLOCK_K]`` as rows of a tile."""
            row = plgpu.load(ref, layout=TILE.reduce(0), optimized=False).astype(jnp.float32)
            return plgpu.layout_cast(lax.broadcast_in_dim(row, (ROWS, BLOCK_K), (1,)), TILE)

        def zeros(shape: tuple[int, ...], layout: Any) -> Array:
            return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)

        def sum_rows(steps: Any, before: Any, row: Any) -> tuple[Array, Array]:
            """Sums of the two halves of this warpgroup's next steps."""

            def step(k: Any, sums: Any) -> Any:
                slot = slot_of(group, before + k)
                x = row(k)
                plgpu.barrier_wait(loaded.at[slot])
                sums = tuple(s + tile(ring.at[slot, half]) * x for half, s in enumerate(sums))
                plgpu.barrier_arrive(used.at[slot])
                return sums

            tile_zeros = zeros((ROWS, BLOCK_K), TILE)
            first, second = lax.fori_loop(0, steps, step, (tile_zeros, tile_zeros))
            return jnp.sum(first, axis=1), jnp.sum(second, axis=1)

        def load_sums(ref: Any) -> Array:
            return plgpu.load(ref, layout=SUMS, optimized=False).astype(jnp.float32)

        def ranks_of(ref: Any, pair: Any, number: int) -> list[Array]:
            """Rank activations of a pair, one array for each page."""
            return [
                plgpu.load(
                    ref.at[number, pair, pl.ds(page * PAGE_ROWS, PAGE_ROWS)],
                    layout=RANKS.reduce(1),
                    optimized=False,
                ).astype(jnp.float32)
                for page in range(max_pages)
            ]

        def expand(total: Array, ranks: list[Array], page_ref: Any) -> Array:
            """``total + ranks · B``, elements to be summed over the ranks."""
            for page, z in enumerate(ranks):
                b = plgpu.load(page_ref(page), layout=RANKS, optimized=False).astype(jnp.float32)
                spread = lax.broadcast_in_dim(z, (PAGE_ROWS, ROWS), (0,))
                total = total + b * plgpu.layout_cast(spread, RANKS)
            return total

        def compute_item(turn: Any, _: None) -> None:
            item = group + turn * GROUPS
            index = processor + item * processors

            def products() -> None:
                pair, block, expert = product_of(index)
                if lora_refs:
                    lax.cond(
                        has_adapter,
                        lambda: with_lora(pair, block, expert),
                        lambda: without(pair, block, expert),
                    )
                else:
                    without(pair, block, expert)

            def row(k: Any) -> Array:
                return row_of(x_smem.at[k, 0])

            def without(pair: Any, block: Any, expert: Any) -> None:
                finish(*sum_rows(gate_steps, turn * gate_steps, row), pair, block, expert)

            def with_lora(pair: Any, block: Any, expert: Any) -> None:
                b_smem, _, b_loaded, b_used, _ = lora_smem

                # Weights go on being loaded meanwhile.
                @pl.when(is_first(turn, index))
                def _() -> None:
                    wait_for(SHRUNK, shrinks)

                gate_z, up_z = (ranks_of(z_refs[0], pair, number) for number in range(2))
                gate, up = sum_rows(gate_steps, turn * gate_steps, row)
                slot = lax.rem(item, ITEMS)
                plgpu.barrier_wait(b_loaded.at[slot])
                rank_zeros = zeros((PAGE_ROWS, ROWS), RANKS)
                gate_more = expand(rank_zeros, gate_z, lambda page: b_smem.at[slot, 0, page])
                up_more = expand(rank_zeros, up_z, lambda page: b_smem.at[slot, 1, page])
                plgpu.barrier_arrive(b_used.at[slot])
                finish(
                    gate + jnp.sum(gate_more, axis=0),
                    up + jnp.sum(up_more, axis=0),
                    pair,
                    block,
                    expert,
                )

            def finish(gate: Array, up: Array, pair: Any, block: Any, expert: Any) -> None:
                if bias_refs:
                    first = (layer * num_experts + expert) * (2 * inner) + block * ROWS
                    gate += load_sums(bias_refs[0].at[pl.ds(first, ROWS)])
                    up += load_sums(bias_refs[0].at[pl.ds(first + inner, ROWS)])
                value = activate(gate, up, activation)
                hidden_ref[pair, pl.ds(block * ROWS, ROWS)] = value.astype(x.dtype)

            def page() -> None:
                pair, page, number = page_of(index)
                halves = sum_rows(gate_steps, turn * gate_steps, row)
                expert = experts_ref[pair]
                factor = jnp.where(
                    number == 0,
                    site(0)[3][layer, adapter, expert],
                    site(1)[3][layer, adapter, expert],
                )
                for half, value in enumerate(halves):
                    rank = page * PAGE_ROWS + half * ROWS
                    z_refs[0][number, pair, pl.ds(rank, ROWS)] = (value * factor).astype(x.dtype)
                signal(SHRUNK)

            if lora_refs:
                lax.cond(index < shrinks, page, products)
            else:
                products()

        def is_first(turn: Any, index: Any) -> Any:
            """Whether this is the first item of a warpgroup that does not shrink."""
            return (turn == 0) | (index - GROUPS * processors < shrinks)

        def compute_all() -> None:
            plgpu.barrier_wait(x_loaded)
            turns = lax.div(items - group + GROUPS - 1, GROUPS)
            lax.fori_loop(0, turns, compute_item, None)
            signal(GATED)
            wait_for(GATED, processors * GROUPS)

            @pl.when(group == 0)
            def _() -> None:
                if not interpret:
                    _see_stores()

                def step(k: Any, _: None) -> None:
                    plgpu.copy_gmem_to_smem(
                        hidden_ref.at[pl.ds(0, top_k), pl.ds(k * BLOCK_K, BLOCK_K)],
                        h_smem.at[k],
                        h_loaded,
                    )

                lax.fori_loop(0, down_steps, step, None)

            plgpu.barrier_wait(h_loaded)
            if lora_refs:
                pl.when(group == 0)(lambda: lax.fori_loop(0, down_shrinks, shrink_down, None))
            pl.when(column < width)(compute_down)
            leave()

        def shrink_down(turn: Any, _: None) -> None:
            pair, page = down_page_of(turn)
            before = first_step(0, items) + turn * down_steps
            halves = sum_rows(down_steps, before, lambda k: row_of(h_smem.at[k, pair]))
            factor = site(2)[3][layer, adapter, experts_ref[pair]]
            for half, value in enumerate(halves):
                rank = page * PAGE_ROWS + half * ROWS
                z_refs[1][0, pair, pl.ds(rank, ROWS)] = (value * factor).astype(x.dtype)
            signal(DOWN_SHRUNK)

        def compute_down() -> None:
            before = down_before(group)

            def step(turn: Any, sums: Any) -> Any:
                number = group + turn * GROUPS
                pair, k = lax.div(number, down_steps), lax.rem(number, down_steps)
                h = row_of(h_smem.at[k, pair]) * weights_ref[pair]
                new = []
                for part in range(set_pairs):
                    slot = slot_of(group, before + turn * set_pairs + part)
                    plgpu.barrier_wait(loaded.at[slot])
                    for half, total in enumerate(sums[2 * part : 2 * part + 2]):
                        new.append(total + tile(ring.at[slot, half]) * h)
                    plgpu.barrier_arrive(used.at[slot])
                return tuple(new)

            turns = lax.div(top_k * down_steps - group + GROUPS - 1, GROUPS)
            sums = tuple(zeros((ROWS, BLOCK_K), TILE) for _ in range(sets))
            for number, total in enumerate(lax.fori_loop(0, turns, step, sums)):
                part_smem[group, number] = jnp.sum(total, axis=1)
            plgpu.barrier_arrive(parts_done)
            plgpu.barrier_wait(parts_done)
            if lora_refs:

                @pl.when(has_adapter)
                def _() -> None:
                    wait_for(DOWN_SHRUNK, all_down_shrinks)
                    plgpu.barrier_wait(lora_smem[4])

            for number in range(sets):

                @pl.when((group == number % GROUPS) & (column + number * ROWS < width))
                def _(number: int = number) -> None:
                    finish_down(number)

        def finish_down(number: int) -> None:
            first = column + number * ROWS
            total = load_sums(part_smem.at[0, number])
            for of_group in range(1, GROUPS):
                total += load_sums(part_smem.at[of_group, number])
            if bias_refs:
                for pair in range(top_k):
                    begin = (layer * num_experts + experts_ref[pair]) * width + first
                    total += load_sums(bias_refs[1].at[pl.ds(begin, ROWS)]) * weights_ref[pair]
            if lora_refs:

                def with_lora(total: Array) -> Array:
                    more = zeros((PAGE_ROWS, ROWS), RANKS)
                    for pair in range(top_k):
                        ranks = [z * weights_ref[pair] for z in ranks_of(z_refs[1], pair, 0)]
                        more = expand(
                            more,
                            ranks,
                            lambda page, pair=pair: lora_smem[1].at[
                                pair, page, :, pl.ds(number * ROWS, ROWS)
                            ],
                        )
                    return total + jnp.sum(more, axis=0)

                total = lax.cond(has_adapter, with_lora, lambda total: total, total)
            out_ref[0, pl.ds(first, ROWS)] = (total * scaling).astype(x.dtype)

        def leave() -> None:
            """All that could be waited for was waited for."""
            if interpret:
                return
            signal(LEFT)

            @pl.when((processor == 0) & (group == 0))
            def _() -> None:
                wait_for(LEFT, processors * GROUPS)
                for counter in range(4):
                    signals_ref[counter] = jnp.int32(0)

        def compute_padding() -> None:
            for number in range(sets):

                @pl.when((group == number % GROUPS) & (column + number * ROWS < width))
                def _(number: int = number) -> None:
                    out_ref[0, pl.ds(column + number * ROWS, ROWS)] = zeros((ROWS,), SUMS).astype(
                        x.dtype
                    )

        @pl.when(group == GROUPS)
        def _load() -> None:
            plgpu.set_max_registers(40, action="decrease")
            pl.when(real)(load_all)

        @pl.when(group < GROUPS)
        def _compute() -> None:
            plgpu.set_max_registers(152, action="increase")
            lax.cond(real, compute_all, compute_padding)

    dtype = x.dtype
    scratch: list[Any] = [
        plgpu.SMEM((GROUPS * slots, 2, ROWS, BLOCK_K), dtype),
        plgpu.SMEM((gate_steps, 1, BLOCK_K), dtype),
        plgpu.SMEM((down_steps, top_k, BLOCK_K), dtype),
        plgpu.SMEM((GROUPS, sets, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=1, num_barriers=GROUPS * slots),
        plgpu.Barrier(num_arrivals=1, num_barriers=GROUPS * slots),
        plgpu.Barrier(num_arrivals=gate_steps),
        plgpu.Barrier(num_arrivals=down_steps),
        plgpu.Barrier(num_arrivals=GROUPS),
    ]
    if pages is not None:
        scratch += [
            plgpu.SMEM((ITEMS, 2, max_pages, PAGE_ROWS, ROWS), dtype),
            plgpu.SMEM((top_k, max_pages, PAGE_ROWS, sets * ROWS), dtype),
            plgpu.Barrier(num_arrivals=2 * max_pages, num_barriers=ITEMS),
            plgpu.Barrier(num_arrivals=1, num_barriers=ITEMS),
            plgpu.Barrier(num_arrivals=top_k * max_pages),
        ]
    if interpret:
        arrivals = (max(all_shrinks, 1), GROUPS, max(all_down_shrinks, 1))
        scratch += [plgpu.Barrier(num_arrivals=count) for count in arrivals]
    total = given_or_new(out, (1, width), dtype)
    kernel = plgpu.kernel(
        body,
        out_type=(),
        scratch_types=scratch,
        grid=(processors,),
        grid_names=("processor",),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="one_token",
    )
    kernel(
        x,
        experts.reshape(-1),
        weights.reshape(-1),
        scalar(num_tokens),
        scalar(layer),
        gate_up_weight.reshape(-1, inner, width),
        down_weight.reshape(-1, ROWS, inner),
        *bias_inputs,
        *lora_inputs,
        *lora_buffers,
        given_or_new(hidden, (top_k, inner), dtype),
        given_or_new(signals, SIGNALS, jnp.int32),
        total,
    )
    return total[...] if out is None else out


def _signal(counter_ref: Any) -> None:
    """Say that what this warpgroup has stored may be read by others of the launch."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_: Any, ref: Any) -> None:
        # The accelerator reads some of it.
        mosaic_utils.inline_ptx("fence.proxy.async;", has_side_effects=True)
        mosaic_utils.warpgroup_barrier()
        counter = mosaic_utils.SemaphoreRef(mosaic_utils.memref_ptr(ref))
        counter.signal(1, memory_scope="gpu")

    run(counter_ref)


def _wait_for(counter_ref: Any, count: Any) -> None:
    """Wait until so many have signalled; what they stored may then be read."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def run(_: Any, ref: Any, count: Any) -> None:
        counter = mosaic_utils.SemaphoreRef(mosaic_utils.memref_ptr(ref))
        counter.wait(count.registers.item(), decrement=False, memory_scope="gpu")

    run(counter_ref, jnp.asarray(count, jnp.int32))


def _see_stores() -> None:
    """Loads of the accelerator from here on see what was waited for."""

    @plgpu.inline_mgpu()
    def run(_: Any) -> None:
        mosaic_utils.inline_ptx("fence.proxy.async;", has_side_effects=True)

    run()
