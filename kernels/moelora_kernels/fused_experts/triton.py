"""A whole MoE layer of a small batch in one Triton launch.

The programs of the launch do, in this order: the sort; for each tile of rows its shrinks and then
its gate_up; for each tile its shrinks and then its down; combine. Each is the program of the kernel
that does the task alone, and first waits for those programs before it that it reads from: of the
products and shrinks only those of its own tile. So the look-ups of a shrink, which wait for each
other, are hidden behind the products of the tiles before, whose weights are read without a pause.
See :mod:`moelora_kernels.waiting` for why waiting is safe. With few tokens a layer takes so
little time that the starts and ends of separate launches, at which the memory is idle, matter.
"""

from typing import Any

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, scalar
from moelora_kernels.buffers import given_or_new
from moelora_kernels.combine.triton import sum_experts
from moelora_kernels.expert_lora.triton import (
    down_tile,
    expand_stages,
    gate_up_tile,
    product_constants,
    rows_of_token,
    shrink_for_down,
    shrink_for_gate_up,
)
from moelora_kernels.sort.api import token_sort_shapes
from moelora_kernels.sort.triton import count_and_place, counting_constants
from moelora_kernels.tiles import max_tiles
from moelora_kernels.tuning.tiles import MoeTiles, MosaicTiles
from moelora_kernels.types import SIGNALS, Buffer, ExpertPages, TokenSort
from moelora_kernels.waiting import clear, count, leave, signal, wait_for

#: Counters of the whole launch; two for each tile follow them.
LAUNCH_SIGNALS = 8
#: Rows of an expert, on average, up to which a tile has the adapters of one step of the expand.
ONE_STEP_ROWS = 4


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
    gate_up_tiles, down_tiles = tiles.gate_up, tiles.down
    if isinstance(gate_up_tiles, MosaicTiles) or isinstance(down_tiles, MosaicTiles):
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
    ranks: list[Any] = [None, None]
    factors: tuple[Any, ...] = (None,) * 12
    shrinks = 0
    if pages is not None:
        max_rank = pages.gate.max_rank
        ranks = [buffer(gate_up_ranks, (2, pairs, max_rank))]
        ranks.append(buffer(down_ranks, (1, pairs, max_rank)))
        factors = tuple(array for site in pages for array in site)
        shrinks = pairs
    products = {
        "GATE_UP": product_constants(
            x, gate_up_tiles, tiles.tile_rows, num_experts, pages and pages[:2], ranks[0]
        ),
        "DOWN": product_constants(
            hidden_like := buffer(hidden, (pairs, inner)),
            down_tiles,
            tiles.tile_rows,
            num_experts,
            pages and pages[2:],
            ranks[1],
        ),
    }
    both = products["GATE_UP"]
    own = ("BLOCK_N", "BLOCK_K", "SLOTS", "PAGES", "Z_ROWS", "Z_COLUMNS")
    constants = {name: value for name, value in both.items() if name not in own}
    for prefix, values in products.items():
        constants |= {f"{prefix}_{name}": values[name] for name in own}
    sorting, sorts = counting_constants(
        pairs, top_k, num_experts, num_adapters, tiles.tile_rows, sorted_pairs[2].shape[0]
    )
    num_tiles = max_tiles(pairs, num_experts, tiles.tile_rows)
    if 2 * num_tiles + LAUNCH_SIGNALS > SIGNALS[0]:
        raise ValueError(
            f"one launch has signals for {(SIGNALS[0] - LAUNCH_SIGNALS) // 2} tiles; {tokens}"
            f" tokens of {top_k} experts may need {num_tiles}: choose tiles with one_launch=False"
        )
    gate_ups = num_tiles * triton.cdiv(inner, gate_up_tiles.block_n)
    downs = num_tiles * triton.cdiv(width, down_tiles.block_n)
    combine_block = min(triton.next_power_of_2(width), 1024)
    combines = tokens * triton.cdiv(width, combine_block)
    total = buffer(out, (tokens, width))
    launch(
        layer_in_one_launch,
        (
            *(x, experts, weights, adapter_of_token, scalar(num_tokens), scalar(layer)),
            *(gate_up_weight, gate_up_bias, down_weight, down_bias, *factors),
            *([None, None] if pages is None else []),
        ),
        (),
        [
            *([] if pages is None else ranks),
            *sorted_pairs,
            hidden_like,
            buffer(expert_out, (pairs, width)),
            buffer(signals, SIGNALS, jnp.int32),
            total,
        ],
        Launch(
            (sorts + 3 * shrinks + gate_ups + downs + combines,),
            num_warps=gate_up_tiles.num_warps,
            num_stages=gate_up_tiles.num_stages,
        ),
        HIDDEN=width,
        INTERMEDIATE=inner,
        ACTIVATION=activation,
        SCALING=float(scaling),
        COMBINE_BLOCK=combine_block,
        SORTS=sorts,
        SHRINKS=shrinks,
        GATE_UPS=gate_ups,
        DOWNS=downs,
        COMBINES=combines,
        TILES=num_tiles,
        TILES_POW2=triton.next_power_of_2(num_tiles),
        LAUNCH_SIGNALS=LAUNCH_SIGNALS,
        SIGNALS=SIGNALS[0],
        EXPAND_STAGES=expand_stages(
            gate_up_tiles, tiles.tile_rows, few_rows=pairs <= ONE_STEP_ROWS * num_experts
        ),
        **constants | sorting,
    )
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
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALING: tl.constexpr,
    COMBINE_BLOCK: tl.constexpr,
    SORTS: tl.constexpr,
    SHRINKS: tl.constexpr,
    GATE_UPS: tl.constexpr,
    DOWNS: tl.constexpr,
    COMBINES: tl.constexpr,
    TILES: tl.constexpr,
    TILES_POW2: tl.constexpr,
    LAUNCH_SIGNALS: tl.constexpr,
    SIGNALS: tl.constexpr,
    EXPAND_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_LANES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    GATE_UP_BLOCK_N: tl.constexpr,
    GATE_UP_BLOCK_K: tl.constexpr,
    GATE_UP_SLOTS: tl.constexpr,
    GATE_UP_PAGES: tl.constexpr,
    GATE_UP_Z_ROWS: tl.constexpr,
    GATE_UP_Z_COLUMNS: tl.constexpr,
    DOWN_BLOCK_N: tl.constexpr,
    DOWN_BLOCK_K: tl.constexpr,
    DOWN_SLOTS: tl.constexpr,
    DOWN_PAGES: tl.constexpr,
    DOWN_Z_ROWS: tl.constexpr,
    DOWN_Z_COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    SORT_BLOCK: tl.constexpr,
):
    """The task of each program follows from its number."""
    # Programs that have left, that have sorted, and that are done with a task of a tile.
    sorted_ptr, done_ptr = signals_ptr + 1, signals_ptr + 2
    # Of each tile.
    gated_ptr = signals_ptr + LAUNCH_SIGNALS
    shrunk_ptr = gated_ptr + TILES
    layer = tl.load(layer_ptr)
    program = tl.program_id(0)
    GATE_UP_BLOCKS: tl.constexpr = GATE_UPS // TILES
    DOWN_BLOCKS: tl.constexpr = DOWNS // TILES
    GATED: tl.constexpr = SORTS + 2 * SHRINKS + GATE_UPS
    DONE: tl.constexpr = GATED + SHRINKS + DOWNS
    if program < SORTS:
        count_and_place(
            program, experts_ptr, adapters_ptr, num_tokens_ptr,
            order_ptr, row_of_pair_ptr, tiles_ptr, group_ptr,
            PAIRS, TOP_K, NUM_EXPERTS, NUM_ADAPTERS, TILE_ROWS, NUM_TILES, EXPERTS_POW2,
            KEY_STRIDE, SORT_BLOCK,
        )  # fmt: skip
        signal(sorted_ptr)
    elif program < GATED:
        wait_for(sorted_ptr, SORTS)
        tile, first, rows, number = find_task(
            program - SORTS, tiles_ptr, 2 if SHRINKS > 0 else 0, GATE_UP_BLOCKS, TILES, TILES_POW2
        )
        if number >= 0:
            gate_up_tile(
                tile * GATE_UP_BLOCKS + number, x_ptr, gate_up_weight_ptr, gate_up_bias_ptr, layer,
                tiles_ptr, group_ptr, order_ptr, gate_b_ptr, gate_table_ptr, up_b_ptr, up_table_ptr,
                gate_up_z_ptr, shrunk_ptr + tile, 2 * rows, hidden_ptr,
                HIDDEN, INTERMEDIATE, TOP_K, ACTIVATION, NUM_EXPERTS, BLOCK_M, GATE_UP_BLOCK_N,
                GATE_UP_BLOCK_K, PRECISION, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS,
                GATE_UP_Z_ROWS, GATE_UP_Z_COLUMNS, GATE_UP_SLOTS, GATE_UP_PAGES,
                EXPAND_STAGES,
            )  # fmt: skip
            signal(gated_ptr + tile)
        elif SHRINKS > 0:
            if tile >= 0:
                shrink = 2 * (first + rows) + number
                done = shrink_for_gate_up(
                    shrink, x_ptr, layer, group_ptr, order_ptr, row_of_pair_ptr,
                    gate_a_ptr, gate_table_ptr, gate_scaling_ptr,
                    up_a_ptr, up_table_ptr, up_scaling_ptr, gate_up_z_ptr,
                    HIDDEN, TOP_K, NUM_EXPERTS, EXPERTS_POW2, NUM_ADAPTERS, MAX_PAGES, PAGE_LANES,
                    PAGE_ROWS, GATE_UP_Z_ROWS, GATE_UP_Z_COLUMNS,
                )  # fmt: skip
                if done == 1:
                    signal(shrunk_ptr + tile)
                elif done > 1:
                    token = tl.load(order_ptr + shrink // 2) // TOP_K
                    token_rows = rows_of_token(token, row_of_pair_ptr, TOP_K)
                    token_tiles = tiles_of_rows(token_rows, tiles_ptr, TILES, TILES_POW2)
                    signal(shrunk_ptr + token_tiles, token_rows >= 0)
        count(done_ptr)
    elif program < DONE:
        wait_for(sorted_ptr, SORTS)
        tile, first, rows, number = find_task(
            program - GATED, tiles_ptr, 1 if SHRINKS > 0 else 0, DOWN_BLOCKS, TILES, TILES_POW2
        )
        if tile >= 0:
            wait_for(gated_ptr + tile, GATE_UP_BLOCKS)
            if number >= 0:
                down_tile(
                    tile * DOWN_BLOCKS + number, hidden_ptr, down_weight_ptr, down_bias_ptr, layer,
                    tiles_ptr, group_ptr, down_b_ptr, down_table_ptr, down_z_ptr,
                    shrunk_ptr + tile, 3 * rows, expert_out_ptr,
                    HIDDEN, INTERMEDIATE, NUM_EXPERTS, BLOCK_M, DOWN_BLOCK_N, DOWN_BLOCK_K,
                    PRECISION, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS, DOWN_Z_COLUMNS, DOWN_SLOTS,
                    DOWN_PAGES, EXPAND_STAGES,
                )  # fmt: skip
            elif SHRINKS > 0:
                shrink_for_down(
                    first + rows + number, hidden_ptr, layer, group_ptr,
                    down_a_ptr, down_table_ptr, down_scaling_ptr, down_z_ptr,
                    INTERMEDIATE, NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, PAGE_LANES, PAGE_ROWS,
                    DOWN_Z_ROWS, DOWN_Z_COLUMNS,
                )  # fmt: skip
                signal(shrunk_ptr + tile)
        signal(done_ptr)
    else:
        wait_for(done_ptr, DONE - SORTS)
        BLOCKS: tl.constexpr = (HIDDEN + COMBINE_BLOCK - 1) // COMBINE_BLOCK
        sum_experts(
            (program - DONE) // BLOCKS, (program - DONE) % BLOCKS,
            expert_out_ptr, weights_ptr, row_of_pair_ptr, out_ptr,
            HIDDEN, TOP_K, SCALING, COMBINE_BLOCK,
        )  # fmt: skip
        if leave(signals_ptr, COMBINES):
            clear(signals_ptr, SIGNALS)


@triton.jit
def load_first_rows(tiles_ptr, TILES: tl.constexpr, TILES_POW2: tl.constexpr):
    """First row of each tile, past all rows where there is none."""
    tiles = tl.arange(0, TILES_POW2)
    first = tl.load(tiles_ptr + tiles * 3 + 1, mask=tiles < TILES, other=-1)
    return tl.where(first >= 0, first, 1 << 24)


@triton.jit
def tiles_of_rows(rows, tiles_ptr, TILES: tl.constexpr, TILES_POW2: tl.constexpr):
    """The tile of each of some rows."""
    first_rows = load_first_rows(tiles_ptr, TILES, TILES_POW2)
    return tl.sum((first_rows[None, :] <= rows[:, None]).to(tl.int32), 1) - 1


@triton.jit
def find_task(
    position,
    tiles_ptr,
    SHRINKS_PER_ROW: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    TILES_POW2: tl.constexpr,
):
    """The task at a position of the list in which each tile has its shrinks, then its products.

    Returns:
        Tile, -1 past the last task; its first row; its rows; the number of the product, negative
        for a shrink, the last of which is -1.
    """
    tile, number = position // BLOCKS, position % BLOCKS
    if SHRINKS_PER_ROW > 0:
        tiles = tl.arange(0, TILES_POW2)
        first_rows = load_first_rows(tiles_ptr, TILES, TILES_POW2)
        starts = first_rows * SHRINKS_PER_ROW + tiles * BLOCKS
        tile = tl.sum((starts <= position).to(tl.int32), 0) - 1
        number = position - tl.max(tl.where(starts <= position, starts, 0), 0)
        tile = tl.maximum(tile, 0)  # There are no tiles at all without tokens.
    expert, first = tl.load(tiles_ptr + tile * 3), tl.load(tiles_ptr + tile * 3 + 1)
    rows = tl.load(tiles_ptr + tile * 3 + 2) - first
    number -= SHRINKS_PER_ROW * rows
    nothing = (expert < 0) | (number >= BLOCKS)
    return tl.where(nothing, -1, tile), first, rows, tl.where(nothing, -1, number)
