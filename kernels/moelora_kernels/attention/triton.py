"""Causal attention over a paged KV cache in Triton, for prompts and for decoding.

One program has the queries of a tile in all heads that share a key head, and walks over the context
with a running softmax. Where there are few tiles, as in decoding, several programs share a context,
and a second kernel joins what they found.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, scalar
from moelora_kernels.types import Buffer

#: Context positions of one step.
BLOCK_CONTEXT = 64
#: Programs that keep a large GPU busy. With fewer, contexts are split.
BUSY_PROGRAMS = 264
#: Most programs that share one context.
MAX_SPLITS = 32
#: Columns behind the values of a partial result: its maximum, its sum of weights, two to align.
EXTRA_COLUMNS = 4
#: The least that a product of tiles takes.
MIN_BLOCK = 16
#: Powers of two are cheaper than powers of e.
LOG2_E = tl.constexpr(1.4426950408889634)


def paged_attention(
    queries: Array,
    k_cache: Buffer,
    v_cache: Buffer,
    layer: Array,
    block_table: Array,
    positions: Array,
    tiles: Array,
    *,
    tile_rows: int,
    scale: float,
    window: Array | None,
    sinks: Array | None,
    out: Buffer | None,
) -> Buffer:
    """See :func:`moelora_kernels.paged_attention`."""
    tokens, heads, head_dim = queries.shape
    _, num_blocks, block_size, kv_heads, value_dim = v_cache.shape
    num_tiles, table_width = tiles.shape[0], block_table.shape[1]
    # The split follows from shapes alone, so that a row's bits do not depend on its neighbours.
    steps = triton.cdiv(table_width * block_size, BLOCK_CONTEXT)
    splits = max(1, min(BUSY_PROGRAMS // (num_tiles * kv_heads), MAX_SPLITS, steps))
    block_m = max(triton.next_power_of_2(tile_rows * heads // kv_heads), 16)
    final = jax.ShapeDtypeStruct((tokens, heads, value_dim), queries.dtype)
    partial = jax.ShapeDtypeStruct((splits, tokens, heads, value_dim + EXTRA_COLUMNS), jnp.float32)
    refs = None if out is None else [out]
    shared = {
        "HEADS": heads,
        "VALUE_DIM": value_dim,
        "BLOCK_V": max(triton.next_power_of_2(value_dim), MIN_BLOCK),
        "SPLITS": splits,
        "EXTRA_COLUMNS": EXTRA_COLUMNS,
    }
    (result,) = launch(
        attend_tiles,
        (
            queries,
            k_cache,
            v_cache,
            scalar(layer),
            block_table,
            positions,
            tiles,
            None if window is None else scalar(window),
            sinks,
        ),
        [final if splits == 1 else partial],
        refs if splits == 1 else None,
        Launch(
            (num_tiles, kv_heads, splits),
            num_warps=8 if block_m >= 128 else 4,
            # Of wide heads in float32 more do not fit into shared memory.
            num_stages=2 if queries.dtype == jnp.float32 else 3,
        ),
        **shared,
        HEAD_DIM=head_dim,
        BLOCK_D=max(triton.next_power_of_2(head_dim), MIN_BLOCK),
        SCALE=scale,
        TOKENS=tokens,
        KV_HEADS=kv_heads,
        TILE_ROWS=tile_rows,
        NUM_BLOCKS=num_blocks,
        BLOCK_SIZE=block_size,
        TABLE_WIDTH=table_width,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_CONTEXT,
        PRECISION="ieee" if queries.dtype == jnp.float32 else "tf32",
    )
    if splits > 1:
        how = Launch((tokens, heads), num_warps=4)
        (result,) = launch(
            join_splits, (result, sinks), [final], refs, how,
            TOKENS=tokens, SPLIT_LANES=triton.next_power_of_2(splits), **shared,
        )  # fmt: skip
    return result


@triton.jit
def attend_tiles(
    query_ptr,
    key_ptr,
    value_ptr,
    layer_ptr,
    table_ptr,
    position_ptr,
    tiles_ptr,
    window_ptr,
    sinks_ptr,
    out_ptr,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SPLITS: tl.constexpr,
    EXTRA_COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries, one key head, one part of the context per program."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    sequence = tl.load(tiles_ptr + tl.program_id(0) * 3)
    if sequence >= 0:
        first = tl.load(tiles_ptr + tl.program_id(0) * 3 + 1)
        end = tl.load(tiles_ptr + tl.program_id(0) * 3 + 2)
        kv_head, split = tl.program_id(1), tl.program_id(2)
        row = tl.arange(0, BLOCK_M)
        inside = (first + row // GROUP < end) & (row < TILE_ROWS * GROUP)
        token = tl.where(inside, first + row // GROUP, first)
        head = kv_head * GROUP + row % GROUP
        column, value_column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        query = tl.load(
            query_ptr + ((token.to(tl.int64) * HEADS + head) * HEAD_DIM)[:, None] + column[None, :],
            mask=inside[:, None] & (column < HEAD_DIM)[None, :],
            other=0.0,
        )
        position = tl.load(position_ptr + token)
        context = tl.max(position, 0) + 1
        oldest = 0
        if window_ptr is not None:
            window = tl.load(window_ptr)
            oldest = tl.maximum(tl.min(position, 0) - window + 1, 0)
        part = tl.cdiv(tl.cdiv(context - oldest, BLOCK_N), SPLITS) * BLOCK_N
        stop = tl.minimum(context, oldest + (split + 1) * part)
        layer_row = tl.load(layer_ptr).to(tl.int64) * NUM_BLOCKS

        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        weights_sum = tl.zeros([BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        begin = oldest + split * part
        # Blocks are looked up a step ahead, or keys and values could not be copied ahead.
        table_ptr += sequence * TABLE_WIDTH
        place = begin + tl.arange(0, BLOCK_N)
        block = tl.load(table_ptr + place // BLOCK_SIZE, mask=place < stop, other=0)
        for start in range(begin, stop, BLOCK_N):
            place = start + tl.arange(0, BLOCK_N)
            exists = place < stop
            cache_row = (layer_row + block) * BLOCK_SIZE + place % BLOCK_SIZE
            next_place = place + BLOCK_N
            block = tl.load(table_ptr + next_place // BLOCK_SIZE, mask=next_place < stop, other=0)
            cached = cache_row * KV_HEADS + kv_head
            # Nothing is read behind the last position: it may be anything, also NaN.
            key = tl.load(
                key_ptr + (cached * HEAD_DIM)[None, :] + column[:, None],
                mask=exists[None, :] & (column < HEAD_DIM)[:, None],
                other=0.0,
            )
            value = tl.load(
                value_ptr + (cached * VALUE_DIM)[:, None] + value_column[None, :],
                mask=exists[:, None] & (value_column < VALUE_DIM)[None, :],
                other=0.0,
            )
            score = tl.dot(query, key, input_precision=PRECISION) * (SCALE * LOG2_E)
            visible = exists[None, :] & (place[None, :] <= position[:, None])
            if window_ptr is not None:
                visible = visible & (place[None, :] > position[:, None] - window)
            score = tl.where(visible, score, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(score, 1))
            # Rows that have seen nothing yet keep zeros instead of NaN.
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            weight = tl.exp2(score - shift[:, None])
            shrunk = tl.exp2(maximum - shift)
            weights_sum = weights_sum * shrunk + tl.sum(weight, 1)
            total = total * shrunk[:, None]
            total = tl.dot(weight.to(value.dtype), value, total, input_precision=PRECISION)
            maximum = new_maximum

        out_row = (split * TOKENS + token).to(tl.int64) * HEADS + head
        stored = inside[:, None] & (value_column < VALUE_DIM)[None, :]
        if SPLITS == 1:
            if sinks_ptr is not None:
                sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
                weights_sum += tl.exp2(sink - maximum)
            total = total / weights_sum[:, None]
            out_ptrs = out_ptr + (out_row * VALUE_DIM)[:, None] + value_column[None, :]
            tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=stored)
        else:
            part_ptr = out_ptr + out_row * (VALUE_DIM + EXTRA_COLUMNS)
            tl.store(part_ptr[:, None] + value_column[None, :], total, mask=stored)
            tl.store(part_ptr + VALUE_DIM, maximum, mask=inside)
            tl.store(part_ptr + VALUE_DIM + 1, weights_sum, mask=inside)


@triton.jit
def join_splits(
    partial_ptr,
    sinks_ptr,
    out_ptr,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SPLITS: tl.constexpr,
    EXTRA_COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT_LANES: tl.constexpr,
):
    """One token and head per program, which loads all parts at once."""
    row = tl.program_id(0) * HEADS + tl.program_id(1)
    split, column = tl.arange(0, SPLIT_LANES), tl.arange(0, BLOCK_V)
    exists = split < SPLITS
    part_ptr = partial_ptr + (split * (TOKENS * HEADS) + row) * (VALUE_DIM + EXTRA_COLUMNS)
    maximum = tl.load(part_ptr + VALUE_DIM, mask=exists, other=float("-inf"))
    weights = tl.load(part_ptr + VALUE_DIM + 1, mask=exists, other=0.0)
    totals = tl.load(
        part_ptr[:, None] + column[None, :],
        mask=exists[:, None] & (column < VALUE_DIM)[None, :],
        other=0.0,
    )
    largest = tl.max(maximum, 0)
    scale = tl.exp2(maximum - largest)
    weights_sum = tl.sum(scale * weights, 0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + tl.program_id(1)).to(tl.float32) * LOG2_E
        weights_sum += tl.exp2(sink - largest)
    total = tl.sum(scale[:, None] * totals, 0) / weights_sum
    out_ptrs = out_ptr + row * VALUE_DIM + column
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=column < VALUE_DIM)
