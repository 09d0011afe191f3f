"""Paged attention against NumPy float64 over sequences that were never paged."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelora_kernels import paged_attention, query_tiles, write_cache
from tests.kernels.cases import (
    LAYER,
    PREFILL_SHAPES,
    AttentionCase,
    AttentionShape,
    AttentionSpec,
    assert_close,
    assert_same_bits,
    compiled,
    decode_specs,
    oracle_tiles,
    poisoned,
    prefill_specs,
    to_device,
)


class StepBuffers(NamedTuple):
    attention: jax.Array
    k_cache: jax.Array
    v_cache: jax.Array


def attention_step(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    block_table: jax.Array,
    positions: jax.Array,
    block_of_token: jax.Array,
    offset_of_token: jax.Array,
    query_counts: jax.Array,
    *,
    tile_rows: int,
    scale: float,
    out: StepBuffers,
) -> StepBuffers:
    """What one layer of a model does: write the new keys and values, then attend."""
    write_cache(out.k_cache, keys, layer, block_of_token, offset_of_token)
    write_cache(out.v_cache, values, layer, block_of_token, offset_of_token)
    tiles = query_tiles(query_counts, queries.shape[0], tile_rows)
    attention = paged_attention(
        queries,
        out.k_cache,
        out.v_cache,
        layer,
        block_table,
        positions,
        tiles,
        tile_rows=tile_rows,
        scale=scale,
        out=out.attention,
    )
    return out._replace(attention=attention)


def buffers(case: AttentionCase) -> StepBuffers:
    shape = case.shape
    attention = poisoned((shape.tokens + 2, shape.heads, shape.value_dim), case.dtype)
    return StepBuffers(
        attention,
        to_device(case.k_cache, case.dtype),
        to_device(case.v_cache, case.dtype),
    )


def run(case: AttentionCase, out: StepBuffers | None = None, *, tile_rows: int = 8) -> StepBuffers:
    return compiled(attention_step, tile_rows=tile_rows, scale=case.scale)(
        out or buffers(case),
        to_device(case.queries, case.dtype),
        to_device(case.new_keys, case.dtype),
        to_device(case.new_values, case.dtype),
        jnp.int32(LAYER),
        jnp.asarray(case.block_table),
        jnp.asarray(case.positions),
        jnp.asarray(case.block_of_token),
        jnp.asarray(case.offset_of_token),
        jnp.asarray(case.query_counts),
    )


def check(case: AttentionCase, tile_rows: int) -> None:
    real = slice(0, case.num_tokens)
    after = run(case, tile_rows=tile_rows)
    assert_close(np.asarray(after.attention)[real], case.expected[real], case.dtype)

    # Nothing was written but the new positions, and what padding wrote to block 0.
    for cache, before, new in (
        (after.k_cache, case.k_cache, case.new_keys),
        (after.v_cache, case.v_cache, case.new_values),
    ):
        expected = before.copy()
        expected[LAYER, case.block_of_token[real], case.offset_of_token[real]] = new[real]
        written = np.asarray(cache, np.float64)
        np.testing.assert_array_equal(written[:, 1:], expected[:, 1:])
        np.testing.assert_array_equal(written[1 - LAYER], expected[1 - LAYER])


@settings(max_examples=40)
@given(spec=prefill_specs())
def test_prefill(spec: AttentionSpec) -> None:
    check(AttentionCase(spec), tile_rows=8)


@settings(max_examples=30)
@given(spec=decode_specs())
def test_decode(spec: AttentionSpec) -> None:
    check(AttentionCase(spec), tile_rows=16)  # more than there are tokens


def test_a_full_sequence_in_one_chunk_and_in_several() -> None:
    """Chunked prefill is one prefill: each token sees the same keys."""
    shape = PREFILL_SHAPES[1]
    length = shape.max_length
    whole = AttentionCase(AttentionSpec(shape, ((0, length), (3, 2), (0, 0), (1, 1)), seed=3))
    check(whole, tile_rows=8)
    outputs, caches = [], buffers(whole)
    for start, end in ((0, 7), (7, 8), (8, length)):
        chunk = AttentionCase(AttentionSpec(shape, ((start, end - start), *[(0, 0)] * 3)))
        real = slice(0, end - start)
        for name in ("queries", "new_keys", "new_values", "positions"):
            getattr(chunk, name)[real] = getattr(whole, name)[start:end]
        chunk.block_table = whole.block_table
        chunk.block_of_token[real] = whole.block_of_token[start:end]
        chunk.offset_of_token[real] = whole.offset_of_token[start:end]
        caches = run(chunk, caches._replace(attention=buffers(chunk).attention))
        outputs.append(np.asarray(caches.attention)[real])
    assert_close(np.concatenate(outputs), whole.expected[:length], "float32")


def test_the_same_bits_again_and_in_place() -> None:
    case = AttentionCase(AttentionSpec(PREFILL_SHAPES[1], ((4, 9), (0, 6), (11, 1), (0, 0))))
    # A copy: JAX may borrow memory from NumPy, and borrowed memory cannot be donated.
    first, again = run(case), jax.tree.map(jnp.copy, buffers(case))
    addresses = [array.unsafe_buffer_pointer() for array in again]
    again = run(case, again)
    assert [array.unsafe_buffer_pointer() for array in again] == addresses
    real = slice(0, case.num_tokens)
    assert_same_bits(np.asarray(again.attention)[real], np.asarray(first.attention)[real])


def test_result_does_not_depend_on_where_blocks_are() -> None:
    lengths = ((4, 9), (0, 6), (11, 1), (0, 0))
    case, moved = (AttentionCase(AttentionSpec(PREFILL_SHAPES[1], lengths)) for _ in range(2))
    # Every block moves one further; block 0 stays.
    blocks = case.k_cache.shape[1]
    new_block = np.concatenate([[0], np.roll(np.arange(1, blocks), 1)]).astype(np.int32)
    for name in ("k_cache", "v_cache"):
        cache = np.empty_like(case.k_cache)
        cache[:, new_block] = getattr(case, name)
        setattr(moved, name, cache)
    moved.block_table = new_block[case.block_table]
    moved.block_of_token = new_block[case.block_of_token]
    assert (moved.block_table != case.block_table).any()
    real = slice(0, case.num_tokens)
    one, other = np.asarray(run(moved).attention), np.asarray(run(case).attention)
    assert_same_bits(one[real], other[real])


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(0, 11), min_size=5, max_size=5).filter(lambda c: sum(c) <= 24),
    tile_rows=st.sampled_from([1, 4, 32]),
)
def test_query_tiles(counts: list[int], tile_rows: int) -> None:
    tiles = compiled(query_tiles, tokens=24, tile_rows=tile_rows)(
        None, jnp.asarray(counts, jnp.int32)
    )
    tiles = np.asarray(tiles)
    sequence_of_token = [(s,) for s, count in enumerate(counts) for _ in range(count)]
    expected = [[*t.group, t.first, t.end] for t in oracle_tiles(sequence_of_token, tile_rows)]
    assert tiles[: len(expected)].tolist() == expected
    assert (tiles[len(expected) :] == -1).all()


def test_values_are_rounded_to_the_dtype_of_the_cache() -> None:
    cache = jax.new_ref(jnp.zeros((1, 2, 3, 1, 4), jnp.bfloat16))
    values = jnp.full((1, 1, 4), 1 / 3, jnp.float32)
    write_cache(cache, values, jnp.int32(0), jnp.array([1]), jnp.array([2]))
    expected = np.zeros((1, 2, 3, 1, 4))
    expected[0, 1, 2] = float(jnp.bfloat16(1 / 3))
    np.testing.assert_array_equal(np.asarray(cache[...], np.float64), expected)


def test_heads_that_cannot_be_grouped_raise() -> None:
    case = AttentionCase(AttentionSpec(AttentionShape(1, 1, 4, 4), ((0, 1),)))
    case.k_cache = case.k_cache[:, :, :, :3]
    case.v_cache = case.v_cache[:, :, :, :3]
    case.new_keys, case.new_values = case.new_keys[:, :3], case.new_values[:, :3]
    with pytest.raises(ValueError, match="4 query heads cannot be grouped over 3 key heads"):
        run(case)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((26, 4, 20), "float32", "too small"), ((27, 4, 20), "bfloat16", "out is bfloat16")],
)
def test_an_out_that_does_not_fit_raises(shape: tuple[int, ...], dtype: str, message: str) -> None:
    case = AttentionCase(AttentionSpec(PREFILL_SHAPES[1], ((0, 1), *[(0, 0)] * 3)))
    with pytest.raises(ValueError, match=message):
        run(case, buffers(case)._replace(attention=poisoned(shape, dtype)))
