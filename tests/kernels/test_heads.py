"""Norms, rotation and the cache against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moelora_kernels import add_rms_norm, prepare_heads
from moelora_kernels.backend import Implementation

IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=pytest.mark.gpu)]
LAYERS, LAYER, EPSILON = 2, 1, 1e-6


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 20), (32, 4, 128), (3, 3, 16)])
def test_heads(
    heads: int, kv_heads: int, head_dim: int, norms: bool, implementation: Implementation
) -> None:
    rng = np.random.default_rng(0)
    tokens, blocks, block_size = 5, 4, 3
    projected = rng.normal(size=(tokens, heads + 2 * kv_heads, head_dim)).astype(np.float32)
    angle = rng.normal(size=(tokens, 1, head_dim // 2)).astype(np.float32)
    weights = rng.normal(size=(2, LAYERS, head_dim)).astype(np.float32)
    block, offset = np.divmod(rng.permutation(blocks * block_size)[:tokens].astype(np.int32), 3)
    shape = (LAYERS, blocks, block_size, kv_heads, head_dim)

    def program(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        caches = [jax.new_ref(jnp.full(shape, 7, jnp.float32)) for _ in range(2)]
        x, block, offset, cos, sin, query_norm, key_norm = inputs
        query = prepare_heads(
            x, *caches, jnp.int32(LAYER), block, offset, cos, sin,
            query_norm=query_norm if norms else None,
            key_norm=key_norm if norms else None,
            epsilon=EPSILON, implementation=implementation,
        )  # fmt: skip
        return query, *map(jax.freeze, caches)

    outputs = jax.jit(program)(
        projected.reshape(tokens, -1), block, offset, np.cos(angle[:, 0]), np.sin(angle[:, 0]),
        *weights,
    )  # fmt: skip
    query, keys, values = map(np.array, outputs)

    wanted = projected.astype(np.float64)
    parts = np.split(wanted, [heads, heads + kv_heads], axis=1)
    for part, weight in zip(parts[:2], weights, strict=True):
        if norms:
            part[:] = rms_norm(part, weight[LAYER])
        halves = part[..., : head_dim // 2] + 1j * part[..., head_dim // 2 :]
        turned = halves * np.exp(1j * angle)
        part[:] = np.concatenate([turned.real, turned.imag], axis=-1)
    # Float32 rounds values of up to about 4 a few times.
    np.testing.assert_allclose(query, parts[0], rtol=0, atol=4e-6)
    np.testing.assert_allclose(keys[LAYER, block, offset], parts[1], rtol=0, atol=4e-6)
    assert np.array_equal(values[LAYER, block, offset], projected[:, -kv_heads:])
    for cache in (keys, values):
        cache[LAYER, block, offset] = 7
        assert (cache == 7).all()  # Nothing else was written.


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tokens", "width"), [(1, 48), (7, 2048), (3, 2880)])
def test_residual_and_norm(tokens: int, width: int, implementation: Implementation) -> None:
    rng = np.random.default_rng(0)
    x, delta = rng.normal(size=(2, tokens, width)).astype(np.float32)
    weight = rng.normal(size=(LAYERS, width)).astype(np.float32)
    # The buffer has more rows than the batch.
    buffer = np.concatenate([delta, np.full((2, width), np.nan, np.float32)])

    def program(x: jax.Array, delta: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        return add_rms_norm(
            x, jax.new_ref(delta), weight, jnp.int32(LAYER), epsilon=EPSILON,
            implementation=implementation,
        )  # fmt: skip

    total, normed = jax.jit(program)(x, buffer, weight)
    assert np.array_equal(total, x + delta)
    expected = rms_norm((x + delta).astype(np.float64), weight[LAYER])
    # One rounding of the scale, one of each product, of values of up to about 10.
    np.testing.assert_allclose(normed, expected, rtol=0, atol=5e-6)
