"""The Triton attention kernel on a GPU, at the sizes of real models, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moelora_kernels import paged_attention, query_tiles

pytestmark = pytest.mark.gpu

LAYERS, LAYER, BLOCK_SIZE = 2, 1, 16
# Sums over up to some thousand positions in another order; bfloat16 rounds the weights to 8 bits.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}


def case(
    dtype: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    sequences: list[tuple[int, int]],
):
    """Queries of several sequences, each given as (cached positions, new tokens)."""
    rng = np.random.default_rng(0)
    tokens = sum(new for _, new in sequences)
    longest = max(cached + new for cached, new in sequences)
    width = -(-longest // BLOCK_SIZE)
    num_blocks = len(sequences) * width + 1
    table = 1 + rng.permutation(num_blocks - 1).reshape(len(sequences), width).astype(np.int32)
    positions = np.concatenate([np.arange(c, c + n) for c, n in sequences]).astype(np.int32)
    shape = (LAYERS, num_blocks, BLOCK_SIZE, kv_heads)
    # What no sequence has written is poison.
    caches = [np.full((*shape, width), np.nan, np.float32) for width in (head_dim, value_dim)]
    for row, (cached, new) in enumerate(sequences):
        place = np.arange(cached + new)
        for cache in caches:
            values = rng.normal(size=(cached + new, *cache.shape[3:]))
            cache[LAYER, table[row, place // BLOCK_SIZE], place % BLOCK_SIZE] = values
    queries = rng.normal(size=(tokens, heads, head_dim))
    counts = np.array([new for _, new in sequences], np.int32)
    arrays = [jnp.asarray(array, jnp.float32).astype(dtype) for array in (queries, *caches)]
    return arrays, jnp.asarray(table), jnp.asarray(positions), jnp.asarray(counts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim"),
    [(32, 4, 128, 128), (32, 8, 128, 128), (64, 8, 64, 64), (6, 2, 80, 80), (16, 16, 192, 128)],
)
@pytest.mark.parametrize(
    ("sequences", "tile_rows"),
    [
        ([(3000, 1)], 1),
        ([(0, 1), (700, 1), (63, 1), (64, 1), (1999, 1)], 1),
        ([(100 * i, 1) for i in range(32)], 1),
        ([(0, 300), (500, 200), (17, 1), (0, 16)], 16),
    ],
    ids=["one long", "decode 5", "decode 32", "prefill"],
)
@pytest.mark.parametrize("window", [None, 100], ids=["full", "window and sinks"])
def test_attention_against_the_reference(
    dtype: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    sequences: list[tuple[int, int]],
    tile_rows: int,
    window: int | None,
) -> None:
    arrays, table, positions, counts = case(dtype, heads, kv_heads, head_dim, value_dim, sequences)
    tokens = positions.size

    def attend(implementation: str, queries: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return paged_attention(
            queries,
            k,
            v,
            jnp.int32(LAYER),
            table,
            positions,
            query_tiles(counts, tokens, tile_rows),
            tile_rows=tile_rows,
            scale=head_dim**-0.5,
            window=None if window is None else jnp.int32(window),
            sinks=None if window is None else jax.random.normal(jax.random.key(0), (heads,)),
            implementation=implementation,  # type: ignore[arg-type]
        )

    run = jax.jit(attend, static_argnums=0)
    wide = [array.astype(jnp.float32) for array in arrays]
    expected = np.asarray(run("reference", *wide), np.float64)
    actual = np.asarray(run("triton", *arrays).astype(jnp.float32))
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error <= TOLERANCE[dtype]
    again = np.asarray(run("triton", *arrays).astype(jnp.float32))
    assert actual.tobytes() == again.tobytes()
