"""Run in a process of its own: Triton attention under its interpreter, against the reference."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from moelora_kernels import paged_attention, query_tiles
from moelora_kernels.attention import triton
from tests.kernels.triton_interpreter import interpret

SEQUENCES, BLOCKS, BLOCK_SIZE, KV_HEADS, HEADS, HEAD_DIM = 3, 6, 16, 2, 6, 20
#: Rows of a tile, and of each sequence the cached positions and the new tokens.
BATCHES = ((1, ((0, 1), (90, 1), (33, 1))), (8, ((0, 9), (50, 20), (17, 1))))


def check(
    tile_rows: int,
    sequences: tuple[tuple[int, int], ...],
    window: int | None,
    sinks: bool,
    value_dim: int = HEAD_DIM,
) -> None:
    rng = np.random.default_rng(0)
    # Block 0, which no sequence has, is poison.
    caches = rng.normal(
        size=(2, SEQUENCES * BLOCKS + 1, BLOCK_SIZE, KV_HEADS, HEAD_DIM + value_dim)
    )
    caches[:, 0] = np.nan
    keys, values = np.split(np.asarray(caches, np.float32), [HEAD_DIM], axis=-1)
    table = 1 + rng.permutation(SEQUENCES * BLOCKS).reshape(SEQUENCES, BLOCKS)
    positions = np.concatenate([np.arange(start, start + new) for start, new in sequences])
    counts = jnp.asarray([new for _, new in sequences], jnp.int32)
    queries = jnp.asarray(rng.normal(size=(positions.size, HEADS, HEAD_DIM)), jnp.float32)
    expected, actual = (
        paged_attention(
            queries,
            jnp.asarray(keys),
            jnp.asarray(values),
            jnp.int32(1),
            jnp.asarray(table, jnp.int32),
            jnp.asarray(positions, jnp.int32),
            query_tiles(counts, positions.size, tile_rows),
            tile_rows=tile_rows,
            scale=0.2,
            window=None if window is None else jnp.int32(window),
            sinks=jax.random.normal(jax.random.key(0), (HEADS,)) if sinks else None,
            implementation=name,  # type: ignore[arg-type]
        )
        for name in ("reference", "triton")
    )
    # Float32 rounds values of about 1 by 1e-7, and sums some dozens of them.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)
    print("attention", tile_rows, sequences, window, sinks, value_dim, flush=True)


def main() -> None:
    triton.launch = interpret
    for triton.BLOCK_CONTEXT, triton.BUSY_PROGRAMS in ((16, 264), (64, 1)):
        for (tile_rows, sequences), window in itertools.product(BATCHES, (None, 5, 40)):
            check(tile_rows, sequences, window, sinks=window != 5)
        for (tile_rows, sequences), value_dim in itertools.product(BATCHES, (12, 40)):
            check(tile_rows, sequences, None, sinks=False, value_dim=value_dim)


if __name__ == "__main__":
    main()
