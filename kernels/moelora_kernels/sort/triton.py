"""Token sort in Triton: one launch for small batches, two for large ones. No atomics.

The row of a pair is the number of pairs that come before it. Up to :data:`MAX_COUNTED_PAIRS` pairs,
it is counted by comparing every pair with every other. Above, each block of pairs first counts how
many of its own have a group up to each; a pair then adds up one such number of every block, and
compares itself with the others of its own block only.
"""

from typing import NamedTuple

import jax
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, scalar
from moelora_kernels.types import TokenSort

#: Pairs up to which every pair is compared with every other.
MAX_COUNTED_PAIRS = 4096
#: Pairs that a program places there.
COUNTED_BLOCK = 16
#: Pairs of one block of the form for large batches.
BLOCK_PAIRS = 512
#: Blocks of which a pair adds up the numbers; there are no more, but larger ones.
MAX_BLOCKS = 128
#: Groups that a program counts at once there.
BLOCK_GROUPS = 128
#: Pairs that a program places there.
PART_PAIRS = 32


class SortSizes(NamedTuple):
    """Sizes of the sort by counting that its kernel is compiled for.

    Attributes:
        pairs: of the batch.
        top_k: choices per token.
        experts: of the layer.
        adapters: slots; 0 is allowed.
        tile_rows: rows of a full tile.
        tiles: entries of the tile map.
        block: pairs that a program places.
        key_stride: a power of two above every pair: ``group * key_stride + pair`` sorts by both.
    """

    pairs: int
    top_k: int
    experts: int
    adapters: int
    tile_rows: int
    tiles: int
    block: int
    key_stride: int

    @property
    def programs(self) -> int:
        """One for each block of pairs, and one for the tile map."""
        return triton.cdiv(self.pairs, self.block) + 1


def sort_tokens(
    experts: Array,
    adapter_of_token: Array | None,
    num_tokens: Array,
    *,
    num_experts: int,
    num_adapters: int,
    tile_rows: int,
    shapes: TokenSort,
    out: TokenSort | None,
) -> TokenSort:
    """See :func:`moelora_kernels.sort_tokens`. The result has no ``run_tiles``."""
    pairs, top_k = experts.size, experts.shape[1]
    groups = num_experts * (num_adapters + 1)
    sizes = shapes if out is None else out
    arrays = ("order", "row_of_pair", "expert_tiles", "group_of_row")
    outputs = [getattr(sizes, name) for name in arrays]
    refs = None if out is None else outputs
    inputs = (experts, adapter_of_token, scalar(num_tokens))
    num_tiles = sizes.expert_tiles.shape[0]
    counting = sort_sizes(pairs, top_k, num_experts, num_adapters, tile_rows, num_tiles)
    if pairs <= MAX_COUNTED_PAIRS and (groups + 1) * counting.key_stride < 2**31:
        how = Launch((counting.programs,), num_warps=8 if counting.key_stride >= 1024 else 4)
        results = launch(sort_by_counting, inputs, outputs, refs, how, SIZES=counting)
    else:
        block = max(BLOCK_PAIRS, triton.next_power_of_2(triton.cdiv(pairs, MAX_BLOCKS)))
        # A power of two, so that loads are wide. Blocks past the last pair have none.
        blocks = triton.next_power_of_2(triton.cdiv(pairs, block))
        shared = {
            "PAIRS": pairs,
            "TOP_K": top_k,
            "NUM_ADAPTERS": num_adapters,
            "GROUPS": groups,
            "BLOCKS": blocks,
            "BLOCK": block,
        }
        counts = launch(
            count_groups,
            inputs,
            [jax.ShapeDtypeStruct((groups, blocks), "int32")],
            None,
            Launch((blocks, triton.cdiv(groups, BLOCK_GROUPS)), num_warps=8),
            BLOCK_GROUPS=BLOCK_GROUPS,
            **shared,
        )
        results = launch(
            place_pairs,
            (*inputs, *counts),
            outputs,
            refs,
            Launch((triton.cdiv(pairs, PART_PAIRS) + 1,), num_warps=8),
            NUM_EXPERTS=num_experts,
            TILE_ROWS=tile_rows,
            NUM_TILES=num_tiles,
            PART=PART_PAIRS,
            **shared,
        )
    named = dict(zip(arrays, results, strict=True))
    return TokenSort(**named)


def sort_sizes(
    pairs: int, top_k: int, num_experts: int, num_adapters: int, tile_rows: int, num_tiles: int
) -> SortSizes:
    """Sizes of the sort by counting."""
    return SortSizes(
        pairs=pairs,
        top_k=top_k,
        experts=num_experts,
        adapters=num_adapters,
        tile_rows=tile_rows,
        tiles=num_tiles,
        block=COUNTED_BLOCK,
        key_stride=max(triton.next_power_of_2(pairs), COUNTED_BLOCK),
    )


@triton.constexpr_function
def expert_lanes(experts):
    """Lanes for the experts: a power of two, of which a histogram needs sixteen at least."""
    return max(triton.next_power_of_2(experts), 16)


@triton.jit
def group_of_pairs(
    pair,
    experts_ptr,
    adapters_ptr,
    num_tokens,
    PAIRS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    LAST: tl.constexpr,
):
    """Expert and adapter of each pair as one number that sorts like them; LAST for padding."""
    token = pair // TOP_K
    inside = pair < PAIRS
    # Padding is loaded, too, so that no load waits for ``num_tokens``.
    group = tl.load(experts_ptr + pair, mask=inside, other=0) * (NUM_ADAPTERS + 1)
    if adapters_ptr is not None:
        group += tl.load(adapters_ptr + token, mask=inside, other=-1) + 1
    return tl.where(inside & (token < num_tokens), group, LAST)


@triton.jit
def write_pairs(pair, row, group, num_rows, order_ptr, row_of_pair_ptr, group_of_row_ptr, PAIRS):
    """Write all that is indexed by pairs ``pair`` or by their rows ``row``, a permutation."""
    inside = pair < PAIRS
    real = row < num_rows
    tl.store(order_ptr + row, tl.where(real, pair, -1), mask=inside)
    tl.store(group_of_row_ptr + row, tl.where(real, group, -1), mask=inside)
    tl.store(row_of_pair_ptr + pair, tl.where(real, row, -1), mask=inside)


@triton.jit
def write_expert_tiles(counts, tiles_ptr, TILE_ROWS: tl.constexpr, NUM_TILES: tl.constexpr):
    """Cut ``counts[e]`` consecutive rows of each expert into tiles, and mark the unused entries.

    An expert has as few tiles as can be, of about equal size, a multiple of 16.
    """
    expert = tl.arange(0, counts.shape[0])
    end = tl.cumsum(counts, 0)
    first = end - counts
    tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    even = tl.cdiv(counts, tl.maximum(tiles, 1))
    tile_rows = tl.minimum((even + 15) // 16 * 16, TILE_ROWS)
    first_tile = tl.cumsum(tiles, 0) - tiles
    for number in range(0, tl.max(tiles, 0)):
        entry = tiles_ptr + (first_tile + number) * 3
        used = number < tiles
        tile_first = first + number * tile_rows
        tl.store(entry, expert, mask=used)
        tl.store(entry + 1, tile_first, mask=used)
        tl.store(entry + 2, tl.minimum(tile_first + tile_rows, end), mask=used)
    fields = tl.arange(0, 1024)
    for start in range(tl.sum(tiles, 0) * 3, NUM_TILES * 3, 1024):
        tl.store(tiles_ptr + start + fields, -1, mask=start + fields < NUM_TILES * 3)


@triton.jit
def sort_by_counting(
    experts_ptr,
    adapters_ptr,
    num_tokens_ptr,
    order_ptr,
    row_of_pair_ptr,
    tiles_ptr,
    group_of_row_ptr,
    SIZES: tl.constexpr,
):
    """See :func:`count_and_place`."""
    count_and_place(
        tl.program_id(0), experts_ptr, adapters_ptr, num_tokens_ptr,
        order_ptr, row_of_pair_ptr, tiles_ptr, group_of_row_ptr, SIZES,
    )  # fmt: skip


@triton.jit
def count_and_place(
    program,
    experts_ptr,
    adapters_ptr,
    num_tokens_ptr,
    order_ptr,
    row_of_pair_ptr,
    tiles_ptr,
    group_of_row_ptr,
    SIZES: tl.constexpr,
):
    """Programs place ``block`` pairs each; the first writes the tile map instead."""
    PAIRS: tl.constexpr = SIZES.pairs
    TOP_K: tl.constexpr = SIZES.top_k
    ADAPTERS: tl.constexpr = SIZES.adapters
    LAST: tl.constexpr = SIZES.experts * (ADAPTERS + 1)
    num_tokens = tl.load(num_tokens_ptr)
    # Not in parts: a sum over parts takes as many registers as all comparisons of one.
    every = tl.arange(0, SIZES.key_stride)
    if program == 0:
        inside = every < PAIRS
        expert = tl.load(experts_ptr + every, mask=inside, other=0)
        real = inside & (every // TOP_K < num_tokens)
        counts = tl.histogram(tl.where(real, expert, 0), expert_lanes(SIZES.experts), mask=real)
        write_expert_tiles(counts, tiles_ptr, SIZES.tile_rows, SIZES.tiles)
    else:
        pair = (program - 1) * SIZES.block + tl.arange(0, SIZES.block)
        group = group_of_pairs(
            pair, experts_ptr, adapters_ptr, num_tokens, PAIRS, TOP_K, ADAPTERS, LAST
        )
        every_group = group_of_pairs(
            every, experts_ptr, adapters_ptr, num_tokens, PAIRS, TOP_K, ADAPTERS, LAST
        )
        # The pair breaks ties, which makes the sort stable. What is past the last pair comes last.
        key = group * SIZES.key_stride + pair
        every_key = every_group * SIZES.key_stride + every
        row = tl.sum((every_key[None, :] < key[:, None]).to(tl.int32), 1)
        num_rows = num_tokens * TOP_K
        write_pairs(pair, row, group, num_rows, order_ptr, row_of_pair_ptr, group_of_row_ptr, PAIRS)


@triton.jit
def count_groups(
    experts_ptr,
    adapters_ptr,
    num_tokens_ptr,
    counts_ptr,
    PAIRS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """``counts[group, block]``: pairs of a block whose group is at most ``group``."""
    block, first = tl.program_id(0), tl.program_id(1) * BLOCK_GROUPS
    num_tokens = tl.load(num_tokens_ptr)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    group = group_of_pairs(
        pair, experts_ptr, adapters_ptr, num_tokens, PAIRS, TOP_K, NUM_ADAPTERS, GROUPS
    )
    bin_of_pair = group - first
    mine = (bin_of_pair >= 0) & (bin_of_pair < BLOCK_GROUPS)
    counts = tl.histogram(tl.where(mine, bin_of_pair, 0), BLOCK_GROUPS, mask=mine)
    counts = tl.cumsum(counts, 0) + tl.sum((bin_of_pair < 0).to(tl.int32), 0)
    row = first + tl.arange(0, BLOCK_GROUPS)
    tl.store(counts_ptr + row * BLOCKS + block, counts, mask=row < GROUPS)


@triton.jit
def place_pairs(
    experts_ptr,
    adapters_ptr,
    num_tokens_ptr,
    counts_ptr,
    order_ptr,
    row_of_pair_ptr,
    tiles_ptr,
    group_of_row_ptr,
    PAIRS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """Programs place ``PART`` pairs of a block each; the first writes the tile map instead."""
    num_tokens = tl.load(num_tokens_ptr)
    any_block = tl.arange(0, BLOCKS)
    if tl.program_id(0) == 0:
        expert = tl.arange(0, expert_lanes(NUM_EXPERTS))
        # An expert's rows end with those of its last adapter.
        last_group = expert * (NUM_ADAPTERS + 1) + NUM_ADAPTERS
        used = (expert < NUM_EXPERTS)[:, None]
        up_to_ptrs = counts_ptr + last_group[:, None] * BLOCKS + any_block[None, :]
        up_to = tl.load(up_to_ptrs, mask=used, other=0)
        up_to_last = tl.load(
            up_to_ptrs - (NUM_ADAPTERS + 1) * BLOCKS, mask=used & (expert > 0)[:, None], other=0
        )
        rows = tl.sum(up_to - up_to_last, 1)
        write_expert_tiles(rows, tiles_ptr, TILE_ROWS, NUM_TILES)
    else:
        part = tl.program_id(0) - 1
        block = part // (BLOCK // PART)
        pair = part * PART + tl.arange(0, PART)
        group = group_of_pairs(
            pair, experts_ptr, adapters_ptr, num_tokens, PAIRS, TOP_K, NUM_ADAPTERS, GROUPS
        )
        real = group < GROUPS
        # Before a pair come those of earlier groups, and those of its group in earlier blocks. Its
        # own block is counted by comparing. Whole lines are loaded, since such loads are wide.
        line_ptrs = counts_ptr + group[:, None] * BLOCKS + any_block[None, :]
        line = tl.load(line_ptrs, mask=real[:, None], other=0)
        earlier = tl.load(line_ptrs - BLOCKS, mask=(real & (group > 0))[:, None], other=0)
        number = any_block[None, :]
        counts = tl.where(number < block, line, tl.where(number > block, earlier, 0))
        in_block = tl.arange(0, BLOCK)
        other_group = group_of_pairs(
            block * BLOCK + in_block,
            experts_ptr, adapters_ptr, num_tokens, PAIRS, TOP_K, NUM_ADAPTERS, GROUPS,
        )  # fmt: skip
        key, other_key = group * BLOCK + pair % BLOCK, other_group * BLOCK + in_block
        before = tl.sum((other_key[None, :] < key[:, None]).to(tl.int32), 1)
        # Padding comes last in the batch, so it keeps its place.
        row = tl.where(real, tl.sum(counts, 1) + before, pair)
        write_pairs(
            pair,
            row,
            group,
            num_tokens * TOP_K,
            order_ptr,
            row_of_pair_ptr,
            group_of_row_ptr,
            PAIRS,
        )
