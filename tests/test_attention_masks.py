"""Sliding windows and sinks of paged attention, against NumPy float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from moelora_kernels import paged_attention, query_tiles

TOKENS, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 13, 4, 2, 8, 4


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 13, 2**31 - 1])
def test_window_and_sinks(window: int | None, with_sinks: bool) -> None:
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(TOKENS, HEADS, HEAD_DIM))
    # One layer, and a sequence that has all blocks but the first, in order.
    caches = rng.normal(size=(2, 1, 5, BLOCK_SIZE, KV_HEADS, HEAD_DIM))
    keys, values = caches[:, 0, 1:].reshape(2, -1, KV_HEADS, HEAD_DIM)
    sinks = rng.normal(size=HEADS) if with_sinks else None

    expected = np.empty_like(queries)
    for position in range(TOKENS):
        first = 0 if window is None else max(0, position - window + 1)
        seen = slice(first, position + 1)
        for head in range(HEADS):
            kv_head = head // (HEADS // KV_HEADS)
            weights = np.exp(0.3 * keys[seen, kv_head] @ queries[position, head])
            total = weights.sum() + (0 if sinks is None else np.exp(sinks[head]))
            expected[position, head] = weights @ values[seen, kv_head] / total

    counts = jnp.array([TOKENS], jnp.int32)
    actual = paged_attention(
        jnp.asarray(queries, jnp.float32),
        jnp.asarray(caches[0], jnp.float32),
        jnp.asarray(caches[1], jnp.float32),
        jnp.int32(0),
        jnp.array([[1, 2, 3, 4]], jnp.int32),
        jnp.arange(TOKENS, dtype=jnp.int32),
        query_tiles(counts, TOKENS, 4),
        tile_rows=4,
        scale=0.3,
        window=None if window is None else jnp.int32(window),
        sinks=None if sinks is None else jnp.asarray(sinks, jnp.float32),
    )
    # Float32 rounds values of about 1 by 1e-7, and sums a dozen of them.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)
