"""Token sort in Triton: one launch for small batches, two for large ones. No atomics.

The row of a pair is the number of pairs that come before it. Up to :data:`MAX_COUNTED_PAIRS` pairs,
it is counted by comparing every pair with every other. Above, each block of pairs first counts how
many of its own have a group up to each; a pair then adds up one such number of every block, and
compares itself with the others of its own block only.

Programs of the same launches list the runs, which needs the rows of each group. In one launch a
program counts them with atomic additions, whose order changes nothing. In two they are sums of what
the blocks have; each program lists the runs of some groups, and waits until those before it have
said how many tiles they have.
"""

from typing import Any

import jax
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, scalar
from moelora_kernels.types import TokenSort
from moelora_kernels.waiting import signal, wait_for

#: Pairs up to which every pair is compared with every other.
MAX_COUNTED_PAIRS = 4096
#: Pairs of one block of the form for large batches.
BLOCK_PAIRS = 512
#: Blocks of which a pair adds up the numbers; there are no more, but larger ones.
MAX_BLOCKS = 128
#: Groups that a program counts at once there.
BLOCK_GROUPS = 128
#: Pairs that a program places there.
PART_PAIRS = 32
#: Groups whose runs a program lists at once there, and such programs at most. More groups would
#: need more registers than placing pairs does.
LIST_GROUPS, LIST_PROGRAMS = 64, 64


def sort_tokens(
    experts: Array,
    adapter_of_token: Array | None,
    num_tokens: Array,
    *,
    num_experts: int,
    num_adapters: int,
    tile_rows: int,
    run_rows: int,
    shapes: TokenSort,
    out: TokenSort | None,
) -> TokenSort:
    """See :func:`moelora_kernels.sort_tokens`."""
    pairs, top_k = experts.size, experts.shape[1]
    groups = num_experts * (num_adapters + 1)
    sizes = shapes if out is None else out
    arrays = ["order", "row_of_pair", "expert_tiles", "group_of_row"]
    runs: dict[str, Any] = {"RUN_ROWS": 0, "NUM_RUN_TILES": 0}
    if run_rows and num_adapters:
        arrays.append("run_tiles")
        runs = {"RUN_ROWS": run_rows, "NUM_RUN_TILES": sizes.run_tiles.shape[0]}  # type: ignore[union-attr]
    else:
        runs["run_tiles_ptr"] = None
    outputs = [getattr(sizes, name) for name in arrays]
    refs = None if out is None else outputs
    inputs = (experts, adapter_of_token, scalar(num_tokens))
    num_tiles = sizes.expert_tiles.shape[0]
    constants, programs = counting_constants(
        pairs, top_k, num_experts, num_adapters, tile_rows, num_tiles
    )
    if pairs <= MAX_COUNTED_PAIRS and (groups + 1) * constants["KEY_STRIDE"] < 2**31:
        num_warps = 8 if constants["KEY_STRIDE"] >= 1024 else 4
        if runs["RUN_ROWS"]:
            outputs = [*outputs, jax.ShapeDtypeStruct((groups,), "int32")]
            programs += 1
        else:
            runs["counts_ptr"] = None
        how = Launch((programs,), num_warps=num_warps)
        results = launch(sort_by_counting, inputs, outputs, refs, how, **constants, **runs)
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
        # Behind the counts are two numbers of each program that lists runs.
        list_blocks = triton.cdiv(groups, LIST_GROUPS)
        lists = min(list_blocks, LIST_PROGRAMS) if runs["RUN_ROWS"] else 0
        lists_pow2 = triton.next_power_of_2(max(lists, 1))
        (counts,) = launch(
            count_groups,
            inputs,
            [jax.ShapeDtypeStruct((groups + triton.cdiv(2 * lists, blocks), blocks), "int32")],
            None,
            Launch((blocks, triton.cdiv(groups, BLOCK_GROUPS)), num_warps=8),
            BLOCK_GROUPS=BLOCK_GROUPS,
            LISTS=lists,
            LISTS_POW2=lists_pow2,
            **shared,
        )
        counted: Any = jax.new_ref(counts) if lists else counts
        results = launch(
            place_pairs,
            (*inputs, counted),
            outputs,
            refs,
            Launch((lists + 1 + triton.cdiv(pairs, PART_PAIRS),), num_warps=8),
            NUM_EXPERTS=num_experts,
            TILE_ROWS=tile_rows,
            NUM_TILES=num_tiles,
            EXPERTS_POW2=constants["EXPERTS_POW2"],
            PART=PART_PAIRS,
            LISTS=lists,
            LISTS_POW2=lists_pow2,
            LIST_BLOCKS=triton.cdiv(list_blocks, max(lists, 1)),
            LIST_GROUPS=LIST_GROUPS,
            **shared,
            **runs,
        )
    # Past the arrays of the sort is what it counted in.
    named = dict(zip(arrays, results, strict=False))
    return TokenSort(**named)


def counting_constants(
    pairs: int, top_k: int, num_experts: int, num_adapters: int, tile_rows: int, num_tiles: int
) -> tuple[dict[str, int], int]:
    """Compile-time parameters of the sort by counting, and how many programs it needs."""
    block = 16
    return {
        "PAIRS": pairs,
        "TOP_K": top_k,
        "NUM_EXPERTS": num_experts,
        "NUM_ADAPTERS": num_adapters,
        "TILE_ROWS": tile_rows,
        "NUM_TILES": num_tiles,
        "EXPERTS_POW2": max(triton.next_power_of_2(num_experts), 16),
        "KEY_STRIDE": max(triton.next_power_of_2(pairs), block),
        "SORT_BLOCK": block,
    }, triton.cdiv(pairs, block) + 1


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
def write_expert_tiles(
    counts,
    tiles_ptr,
    NUM_EXPERTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
):
    """Cut ``counts[e]`` consecutive rows of each expert into tiles, and mark the unused entries.

    An expert has as few tiles as can be, of about equal size, a multiple of 16.
    """
    expert = tl.arange(0, EXPERTS_POW2)
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
    mark_unused(tiles_ptr, tl.sum(tiles, 0) * 3, NUM_TILES * 3)


@triton.jit
def write_run_tiles(
    group,
    first,
    end,
    before,
    run_tiles_ptr,
    NUM_ADAPTERS: tl.constexpr,
    RUN_ROWS: tl.constexpr,
):
    """Cut the rows of consecutive groups into tiles, but for those without an adapter.

    ``before`` tiles come first. Returns how many there are then.
    """
    adapter = group % (NUM_ADAPTERS + 1) - 1
    tiles = tl.where(adapter >= 0, tl.cdiv(end - first, RUN_ROWS), 0)
    first_tile = before + tl.cumsum(tiles, 0) - tiles
    for number in range(0, tl.max(tiles, 0)):
        entry = run_tiles_ptr + (first_tile + number) * 4
        used = number < tiles
        tile_first = first + number * RUN_ROWS
        tl.store(entry, group // (NUM_ADAPTERS + 1), mask=used)
        tl.store(entry + 1, adapter, mask=used)
        tl.store(entry + 2, tile_first, mask=used)
        tl.store(entry + 3, tl.minimum(tile_first + RUN_ROWS, end), mask=used)
    return before + tl.sum(tiles, 0)


@triton.jit
def mark_unused(tiles_ptr, begin, END: tl.constexpr):
    """Write -1 to all numbers of a tile map from ``begin`` on."""
    fields = tl.arange(0, 1024)
    for start in range(begin, END, 1024):
        tl.store(tiles_ptr + start + fields, -1, mask=start + fields < END)


@triton.jit
def sort_by_counting(
    experts_ptr,
    adapters_ptr,
    num_tokens_ptr,
    order_ptr,
    row_of_pair_ptr,
    tiles_ptr,
    group_of_row_ptr,
    run_tiles_ptr,
    counts_ptr,
    PAIRS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    SORT_BLOCK: tl.constexpr,
    RUN_ROWS: tl.constexpr,
    NUM_RUN_TILES: tl.constexpr,
):
    """With ``RUN_ROWS``, the first program lists the runs. The others: :func:`count_and_place`."""
    LISTS: tl.constexpr = 1 if RUN_ROWS > 0 else 0
    program = tl.program_id(0)
    if program >= LISTS:
        count_and_place(
            program - LISTS, experts_ptr, adapters_ptr, num_tokens_ptr,
            order_ptr, row_of_pair_ptr, tiles_ptr, group_of_row_ptr,
            PAIRS, TOP_K, NUM_EXPERTS, NUM_ADAPTERS, TILE_ROWS, NUM_TILES, EXPERTS_POW2, KEY_STRIDE,
            SORT_BLOCK,
        )  # fmt: skip
    elif RUN_ROWS > 0:
        list_runs(
            experts_ptr, adapters_ptr, num_tokens_ptr, run_tiles_ptr, counts_ptr,
            PAIRS, TOP_K, NUM_EXPERTS, NUM_ADAPTERS, KEY_STRIDE, RUN_ROWS, NUM_RUN_TILES,
        )  # fmt: skip


@triton.jit
def list_runs(
    experts_ptr,
    adapters_ptr,
    num_tokens_ptr,
    run_tiles_ptr,
    counts_ptr,
    PAIRS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    RUN_ROWS: tl.constexpr,
    NUM_RUN_TILES: tl.constexpr,
):
    """The tiles of all runs, by one program, which counts the rows of each group in memory."""
    GROUPS: tl.constexpr = NUM_EXPERTS * (NUM_ADAPTERS + 1)
    BLOCK: tl.constexpr = 1024
    in_block = tl.arange(0, BLOCK)
    num_tokens = tl.load(num_tokens_ptr)
    group_of_pair = group_of_pairs(
        tl.arange(0, KEY_STRIDE), experts_ptr, adapters_ptr, num_tokens,
        PAIRS, TOP_K, NUM_ADAPTERS, GROUPS,
    )  # fmt: skip
    for start in range(0, GROUPS, BLOCK):
        tl.store(counts_ptr + start + in_block, 0, mask=start + in_block < GROUPS)
    tl.debug_barrier()  # What other threads have stored is added to.
    tl.atomic_add(counts_ptr + group_of_pair, 1, mask=group_of_pair < GROUPS, sem="relaxed")
    tl.debug_barrier()  # And what they have added is read: from the L2 cache, where it is.
    rows, tiles = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for start in range(0, GROUPS, BLOCK):
        group = start + in_block
        counts = tl.load(counts_ptr + group, mask=group < GROUPS, other=0, cache_modifier=".cg")
        end = rows + tl.cumsum(counts, 0)
        tiles = write_run_tiles(
            group, end - counts, end, tiles, run_tiles_ptr, NUM_ADAPTERS, RUN_ROWS
        )
        rows += tl.sum(counts, 0)
    mark_unused(run_tiles_ptr, tiles * 4, NUM_RUN_TILES * 4)


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
    PAIRS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs place ``BLOCK`` pairs each; the first writes the tile map instead."""
    LAST: tl.constexpr = NUM_EXPERTS * (NUM_ADAPTERS + 1)
    num_tokens = tl.load(num_tokens_ptr)
    # Not in parts: a sum over parts takes as many registers as all comparisons of one.
    every = tl.arange(0, KEY_STRIDE)
    if program == 0:
        inside = every < PAIRS
        expert = tl.load(experts_ptr + every, mask=inside, other=0)
        real = inside & (every // TOP_K < num_tokens)
        counts = tl.histogram(tl.where(real, expert, 0), EXPERTS_POW2, mask=real)
        write_expert_tiles(counts, tiles_ptr, NUM_EXPERTS, TILE_ROWS, NUM_TILES, EXPERTS_POW2)
    else:
        pair = (program - 1) * BLOCK + tl.arange(0, BLOCK)
        group = group_of_pairs(
            pair, experts_ptr, adapters_ptr, num_tokens, PAIRS, TOP_K, NUM_ADAPTERS, LAST
        )
        every_group = group_of_pairs(
            every, experts_ptr, adapters_ptr, num_tokens, PAIRS, TOP_K, NUM_ADAPTERS, LAST
        )
        # The pair breaks ties, which makes the sort stable. What is past the last pair comes last.
        key, every_key = group * KEY_STRIDE + pair, every_group * KEY_STRIDE + every
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
    LISTS: tl.constexpr,
    LISTS_POW2: tl.constexpr,
):
    """``counts[group, block]``: pairs of a block whose group is at most ``group``.

    The ``LISTS`` numbers behind them are counters, by which programs that list runs wait.
    """
    block, first = tl.program_id(0), tl.program_id(1) * BLOCK_GROUPS
    if LISTS > 0:
        if (block == 0) & (first == 0):
            number = tl.arange(0, LISTS_POW2)
            tl.store(counts_ptr + GROUPS * BLOCKS + number, 0, mask=number < LISTS)
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
    run_tiles_ptr,
    PAIRS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    LIST_GROUPS: tl.constexpr,
    LISTS: tl.constexpr,
    LISTS_POW2: tl.constexpr,
    LIST_BLOCKS: tl.constexpr,
    RUN_ROWS: tl.constexpr,
    NUM_RUN_TILES: tl.constexpr,
):
    """Programs place ``PART`` pairs of a block each.

    The first ``LISTS`` list runs instead, and the next writes the tile map.
    """
    program = tl.program_id(0)
    num_tokens = tl.load(num_tokens_ptr)
    any_block = tl.arange(0, BLOCKS)
    if program < LISTS:
        if RUN_ROWS > 0:
            list_runs_of_groups(
                program, counts_ptr, run_tiles_ptr, GROUPS, BLOCKS, NUM_ADAPTERS, LIST_GROUPS,
                LISTS, LISTS_POW2, LIST_BLOCKS, RUN_ROWS, NUM_RUN_TILES,
            )  # fmt: skip
    elif program == LISTS:
        expert = tl.arange(0, EXPERTS_POW2)
        # An expert's rows end with those of its last adapter.
        last_group = expert * (NUM_ADAPTERS + 1) + NUM_ADAPTERS
        used = (expert < NUM_EXPERTS)[:, None]
        up_to_ptrs = counts_ptr + last_group[:, None] * BLOCKS + any_block[None, :]
        up_to = tl.load(up_to_ptrs, mask=used, other=0)
        up_to_last = tl.load(
            up_to_ptrs - (NUM_ADAPTERS + 1) * BLOCKS, mask=used & (expert > 0)[:, None], other=0
        )
        rows = tl.sum(up_to - up_to_last, 1)
        write_expert_tiles(rows, tiles_ptr, NUM_EXPERTS, TILE_ROWS, NUM_TILES, EXPERTS_POW2)
    else:
        part = program - LISTS - 1
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


@triton.jit
def list_runs_of_groups(
    program,
    counts_ptr,
    run_tiles_ptr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    LIST_GROUPS: tl.constexpr,
    LISTS: tl.constexpr,
    LISTS_POW2: tl.constexpr,
    LIST_BLOCKS: tl.constexpr,
    RUN_ROWS: tl.constexpr,
    NUM_RUN_TILES: tl.constexpr,
):
    """The tiles of the runs of ``LIST_BLOCKS`` blocks of groups.

    Behind the counts are a counter of each program, which those before it signal, and how many
    tiles each has.
    """
    counters_ptr = counts_ptr + GROUPS * BLOCKS
    tiles_ptr = counters_ptr + LISTS
    number = tl.arange(0, LISTS_POW2)
    own = tl.full([], 0, tl.int32)
    for block in range(program * LIST_BLOCKS, (program + 1) * LIST_BLOCKS):
        group, first, end = rows_of_groups(block, counts_ptr, GROUPS, BLOCKS, LIST_GROUPS)
        has_adapter = group % (NUM_ADAPTERS + 1) > 0
        own += tl.sum(tl.where(has_adapter, tl.cdiv(end - first, RUN_ROWS), 0), 0)
    tl.store(tiles_ptr + program, own)
    signal(counters_ptr + number, mask=(number > program) & (number < LISTS))
    wait_for(counters_ptr + program, program)
    tiles = tl.sum(tl.load(tiles_ptr + number, mask=number < program, other=0), 0)
    for block in range(program * LIST_BLOCKS, (program + 1) * LIST_BLOCKS):
        group, first, end = rows_of_groups(block, counts_ptr, GROUPS, BLOCKS, LIST_GROUPS)
        tiles = write_run_tiles(group, first, end, tiles, run_tiles_ptr, NUM_ADAPTERS, RUN_ROWS)
    if program == LISTS - 1:
        mark_unused(run_tiles_ptr, tiles * 4, NUM_RUN_TILES * 4)


@triton.jit
def rows_of_groups(
    block, counts_ptr, GROUPS: tl.constexpr, BLOCKS: tl.constexpr, LIST_GROUPS: tl.constexpr
):
    """First and end row of each group of a block of groups; none past the last group."""
    group = block * LIST_GROUPS + tl.arange(0, LIST_GROUPS)
    up_to_ptrs = counts_ptr + group[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :]
    inside = (group < GROUPS)[:, None]
    up_to = tl.load(up_to_ptrs, mask=inside, other=0)
    up_to_last = tl.load(up_to_ptrs - BLOCKS, mask=inside & (group > 0)[:, None], other=0)
    return group, tl.sum(up_to_last, 1), tl.sum(up_to, 1)
