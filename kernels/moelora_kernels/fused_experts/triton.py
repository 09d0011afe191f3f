"""A whole MoE layer of a small batch in one Triton launch.

The programs of the launch do, in this order: the sort; for each tile of rows its shrinks and then
its gate_up; for each tile its shrinks and then its down; combine. Each is the program of the kernel
that does the task alone, and first waits for those programs before it that it reads from: of the
products and shrinks only those of its own tile. So the look-ups of a shrink, which wait for each
other, are hidden behind the products of the tiles before, whose weights are read without a pause.
See :mod:`moelora_kernels.waiting` for why waiting is safe. With few tokens a layer takes so
little time that the starts and ends of separate launches, at which the memory is idle, matter.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, scalar
from moelora_kernels.buffers import given_or_new
from moelora_kernels.combine.triton import sum_experts
from moelora_kernels.expert_lora.triton import expand_stages, product_sizes, product_tile
from moelora_kernels.expert_lora.triton_shrink_rows import (
    rows_of_token,
    shrink_for_down,
    shrink_for_gate_up,
)
from moelora_kernels.sort.api import token_sort_shapes
from moelora_kernels.sort.triton import count_and_place, expert_lanes, sort_sizes
from moelora_kernels.tiles import max_tiles
from moelora_kernels.tuning.tiles import MoeTiles, MosaicTiles
from moelora_kernels.types import SIGNALS, Buffer, ExpertPages, SitePages, TokenSort
from moelora_kernels.waiting import clear, count, leave, signal, wait_for

#: Counters of the whole launch; two for each tile follow them.
LAUNCH_SIGNALS = 8
#: Rows of an expert, on average, up to which a tile has the adapters of one step of the expand.
ONE_STEP_ROWS = 4


class TaskSizes(NamedTuple):
    """How many programs the tasks of the launch have.

    Attributes:
        sorts: that sort.
        shrinks: that shrink for down; twice as many do for gate and up.
        tiles: entries of the tile map.
        gate_up_blocks: that each tile has for gate_up.
        down_blocks: that each tile has for down.
        combines: that combine.
        combine_block: columns of one of these.
    """

    sorts: int
    shrinks: int
    tiles: int
    gate_up_blocks: int
    down_blocks: int
    combines: int
    combine_block: int


def fused_experts(
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
    sort: TokenSort | None,
    gate_up_ranks: Buffer | None,
    hidden: Buffer | None,
    down_ranks: Buffer | None,
    expert_out: Buffer | None,
    signals: Buffer | None,
    out: Buffer | None,
    tiles: MoeTiles,
) -> Buffer:
    """See :func:`moelora_kernels.fused_experts`."""
    tokens, top_k = experts.shape
    pairs = tokens * top_k
    if isinstance(tiles.gate_up, MosaicTiles) or isinstance(tiles.down, MosaicTiles):
        raise TypeError("one launch is Triton's, and needs GemmTiles for both products")
    _, num_experts, _, inner, width = gate_up_weight.shape
    num_adapters = 0 if pages is None else pages.gate.num_adapters

    def buffer(given: Buffer | None, shape: tuple[int, ...], dtype: Any = x.dtype) -> Any:
        return given_or_new(given, shape, dtype)

    shapes = token_sort_shapes(
        tokens,
        top_k,
        num_experts=num_experts,
        num_adapters=num_adapters,
        tile_rows=tiles.tile_rows,
    )
    sorted_pairs = [
        buffer(sort and getattr(sort, name), getattr(shapes, name).shape, jnp.int32)
        for name in ("order", "row_of_pair", "expert_tiles", "group_of_row")
    ]
    sorting = sort_sizes(
        pairs, top_k, num_experts, num_adapters, tiles.tile_rows, sorted_pairs[2].shape[0]
    )
    # Without adapters there are no factors and no rank activations.
    factors: tuple[Any, ...] = (None,) * 12
    ranks: tuple[Any, Any] = (None, None)
    if pages is not None:
        max_rank = pages.gate.max_rank
        factors = tuple(array for site in pages for array in site)
        ranks = (
            buffer(gate_up_ranks, (2, pairs, max_rank)),
            buffer(down_ranks, (1, pairs, max_rank)),
        )
    hidden = buffer(hidden, (pairs, inner))
    total = buffer(out, (tokens, width))
    stages = expand_stages(
        tiles.gate_up, tiles.tile_rows, few_rows=pairs <= ONE_STEP_ROWS * num_experts
    )
    num_tiles = max_tiles(pairs, num_experts, tiles.tile_rows)
    if 2 * num_tiles + LAUNCH_SIGNALS > SIGNALS[0]:
        raise ValueError(
            f"one launch has signals for {(SIGNALS[0] - LAUNCH_SIGNALS) // 2} tiles; {tokens}"
            f" tokens of {top_k} experts may need {num_tiles}: choose tiles with one_launch=False"
        )
    combine_block = min(triton.next_power_of_2(width), 1024)
    tasks = TaskSizes(
        sorts=sorting.programs,
        shrinks=0 if pages is None else pairs,
        tiles=num_tiles,
        gate_up_blocks=triton.cdiv(inner, tiles.gate_up.block_n),
        down_blocks=triton.cdiv(width, tiles.down.block_n),
        combines=tokens * triton.cdiv(width, combine_block),
        combine_block=combine_block,
    )
    programs = tasks.sorts + 3 * tasks.shrinks + tasks.combines
    programs += num_tiles * (tasks.gate_up_blocks + tasks.down_blocks)
    launch(
        layer_in_one_launch,
        (
            *(x, experts, weights, adapter_of_token, scalar(num_tokens), scalar(layer)),
            *(gate_up_weight, gate_up_bias, down_weight, down_bias, *factors),
            *(() if pages else ranks),
        ),
        (),
        [
            *(ranks if pages else ()),
            *sorted_pairs,
            hidden,
            buffer(expert_out, (pairs, width)),
            buffer(signals, SIGNALS, jnp.int32),
            total,
        ],
        Launch((programs,), tiles.gate_up.num_warps, tiles.gate_up.num_stages),
        TASKS=tasks,
        SORT=sorting,
        GATE_UP=product_sizes(
            x, gate_up_weight, tiles.gate_up, tiles.tile_rows, top_k, activation,
            pages and pages[:2], ranks[0], expand_stages=stages,
        ),
        DOWN=product_sizes(
            hidden, down_weight, tiles.down, tiles.tile_rows, None, None,
            pages and pages[2:], ranks[1], expand_stages=stages,
        ),
        SCALING=float(scaling),
        LAUNCH_SIGNALS=LAUNCH_SIGNALS,
        SIGNALS=SIGNALS[0],
    )  # fmt: skip
    return total[...] if out is None else out


@triton.jit
def layer_in_one_launch(
    x_ptr,
    experts_ptr,
    weights_ptr,
    adapters_ptr,
    num_tokens_ptr,
    layer_ptr,
    gate_up_weight_ptr,
    gate_up_bias_ptr,
    down_weight_ptr,
    down_bias_ptr,
    gate_a_ptr,
    gate_b_ptr,
    gate_table_ptr,
    gate_scaling_ptr,
    up_a_ptr,
    up_b_ptr,
    up_table_ptr,
    up_scaling_ptr,
    down_a_ptr,
    down_b_ptr,
    down_table_ptr,
    down_scaling_ptr,
    gate_up_z_ptr,
    down_z_ptr,
    order_ptr,
    row_of_pair_ptr,
    tiles_ptr,
    group_ptr,
    hidden_ptr,
    expert_out_ptr,
    signals_ptr,
    out_ptr,
    TASKS: tl.constexpr,
    SORT: tl.constexpr,
    GATE_UP: tl.constexpr,
    DOWN: tl.constexpr,
    SCALING: tl.constexpr,
    LAUNCH_SIGNALS: tl.constexpr,
    SIGNALS: tl.constexpr,
):
    """The task of each program follows from its number."""
    # Programs that have left, that have sorted, and that are done with a task of a tile.
    sorted_ptr, done_ptr = signals_ptr + 1, signals_ptr + 2
    # Of each tile.
    gated_ptr = signals_ptr + LAUNCH_SIGNALS
    shrunk_ptr = gated_ptr + TASKS.tiles
    layer = tl.load(layer_ptr)
    program = tl.program_id(0)
    gate = SitePages(gate_a_ptr, gate_b_ptr, gate_table_ptr, gate_scaling_ptr)
    up = SitePages(up_a_ptr, up_b_ptr, up_table_ptr, up_scaling_ptr)
    down = SitePages(down_a_ptr, down_b_ptr, down_table_ptr, down_scaling_ptr)
    # Where the programs of a task end and those of the next begin.
    SORTED: tl.constexpr = TASKS.sorts
    GATED: tl.constexpr = SORTED + 2 * TASKS.shrinks + TASKS.tiles * TASKS.gate_up_blocks
    DONE: tl.constexpr = GATED + TASKS.shrinks + TASKS.tiles * TASKS.down_blocks
    if program < SORTED:
        count_and_place(
            program, experts_ptr, adapters_ptr, num_tokens_ptr,
            order_ptr, row_of_pair_ptr, tiles_ptr, group_ptr, SORT,
        )  # fmt: skip
        signal(sorted_ptr)
    elif program < GATED:
        wait_for(sorted_ptr, SORTED)
        tile, first, rows, number = find_task(
            program - SORTED, tiles_ptr, 2 if TASKS.shrinks > 0 else 0, TASKS.gate_up_blocks,
            TASKS.tiles,
        )  # fmt: skip
        if number >= 0:
            product_tile(
                tile * TASKS.gate_up_blocks + number, x_ptr, gate_up_weight_ptr, gate_up_bias_ptr,
                layer, tiles_ptr, group_ptr, order_ptr, (gate, up), gate_up_z_ptr,
                shrunk_ptr + tile, 2 * rows, hidden_ptr, GATE_UP,
            )  # fmt: skip
            signal(gated_ptr + tile)
        elif TASKS.shrinks > 0:
            if tile >= 0:
                shrink = 2 * (first + rows) + number
                done = shrink_for_gate_up(
                    shrink, x_ptr, layer, group_ptr, order_ptr, row_of_pair_ptr, gate, up,
                    gate_up_z_ptr, GATE_UP.shrink, expert_lanes(SORT.experts),
                )  # fmt: skip
                if done == 1:
                    signal(shrunk_ptr + tile)
                elif done > 1:
                    token = tl.load(order_ptr + shrink // 2) // SORT.top_k
                    token_rows = rows_of_token(token, row_of_pair_ptr, SORT.top_k)
                    token_tiles = tiles_of_rows(token_rows, tiles_ptr, TASKS.tiles)
                    signal(shrunk_ptr + token_tiles, token_rows >= 0)
        count(done_ptr)
    elif program < DONE:
        wait_for(sorted_ptr, SORTED)
        tile, first, rows, number = find_task(
            program - GATED, tiles_ptr, 1 if TASKS.shrinks > 0 else 0, TASKS.down_blocks,
            TASKS.tiles,
        )  # fmt: skip
        if tile >= 0:
            wait_for(gated_ptr + tile, TASKS.gate_up_blocks)
            if number >= 0:
                # The shrinks of gate and up have signalled, too.
                product_tile(
                    tile * TASKS.down_blocks + number, hidden_ptr, down_weight_ptr, down_bias_ptr,
                    layer, tiles_ptr, group_ptr, None, (down,), down_z_ptr,
                    shrunk_ptr + tile, 3 * rows, expert_out_ptr, DOWN,
                )  # fmt: skip
            elif TASKS.shrinks > 0:
                shrink_for_down(
                    first + rows + number, hidden_ptr, layer, group_ptr, down, down_z_ptr,
                    DOWN.shrink,
                )  # fmt: skip
                signal(shrunk_ptr + tile)
        signal(done_ptr)
    else:
        wait_for(done_ptr, DONE - SORTED)
        BLOCKS: tl.constexpr = triton.cdiv(DOWN.outputs, TASKS.combine_block)
        sum_experts(
            (program - DONE) // BLOCKS, (program - DONE) % BLOCKS,
            expert_out_ptr, weights_ptr, row_of_pair_ptr, out_ptr,
            DOWN.outputs, SORT.top_k, SCALING, TASKS.combine_block,
        )  # fmt: skip
        if leave(signals_ptr, TASKS.combines):
            clear(signals_ptr, SIGNALS)


@triton.jit
def load_first_rows(tiles_ptr, TILES: tl.constexpr):
    """First row of each tile, past all rows where there is none."""
    tiles = tl.arange(0, triton.next_power_of_2(TILES))
    first = tl.load(tiles_ptr + tiles * 3 + 1, mask=tiles < TILES, other=-1)
    return tl.where(first >= 0, first, 1 << 24)


@triton.jit
def tiles_of_rows(rows, tiles_ptr, TILES: tl.constexpr):
    """The tile of each of some rows."""
    first_rows = load_first_rows(tiles_ptr, TILES)
    return tl.sum((first_rows[None, :] <= rows[:, None]).to(tl.int32), 1) - 1


@triton.jit
def find_task(
    position,
    tiles_ptr,
    SHRINKS_PER_ROW: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The task at a position of the list in which each tile has its shrinks, then its products.

    Returns:
        Tile, -1 past the last task; its first row; its rows; the number of the product, negative
        for a shrink, the last of which is -1.
    """
    tile, number = position // BLOCKS, position % BLOCKS
    if SHRINKS_PER_ROW > 0:
        tiles = tl.arange(0, triton.next_power_of_2(TILES))
        first_rows = load_first_rows(tiles_ptr, TILES)
        starts = first_rows * SHRINKS_PER_ROW + tiles * BLOCKS
        tile = tl.sum((starts <= position).to(tl.int32), 0) - 1
        number = position - tl.max(tl.where(starts <= position, starts, 0), 0)
        tile = tl.maximum(tile, 0)  # There are no tiles at all without tokens.
    expert, first = tl.load(tiles_ptr + tile * 3), tl.load(tiles_ptr + tile * 3 + 1)
    rows = tl.load(tiles_ptr + tile * 3 + 2) - first
    number -= SHRINKS_PER_ROW * rows
    nothing = (expert < 0) | (number >= BLOCKS)
    return tl.where(nothing, -1, tile), first, rows, tl.where(nothing, -1, number)
