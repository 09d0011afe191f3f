"""Norms, rotation and the cache against NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moelora_kernels import LinearUpdate, add_rms_norm, prepare_heads
from moelora_kernels.backend import Implementation
from tests.kernels.cases import linear_update

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
    outputs = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    update, added = linear_update(tokens, outputs, "float32", without=1)

    def program(update: LinearUpdate | None, *inputs: jax.Array) -> tuple[jax.Array, ...]:
        caches = [jax.new_ref(jnp.full(shape, 7, jnp.float32)) for _ in range(2)]
        x, block, offset, cos, sin, query_norm, key_norm = inputs
        query = prepare_heads(
            x, *caches, jnp.int32(LAYER), block, offset, cos, sin,
            query_norm=query_norm if norms else None,
            key_norm=key_norm if norms else None,
            epsilon=EPSILON, update=update, implementation=implementation,
        )  # fmt: skip
        return query, *map(jax.freeze, caches)

    results = []
    for what in (None, update):
        outputs_of = jax.jit(functools.partial(program, what))
        query, keys, values = map(
            np.array,
            outputs_of(
                projected.reshape(tokens, -1), block, offset,
                np.cos(angle[:, 0]), np.sin(angle[:, 0]), *weights,
            ),
        )  # fmt: skip
        results.append([query] + [cache[LAYER, block, offset] for cache in (keys, values)])

        wanted = projected.astype(np.float64)
        if what is not None:
            wanted += added.reshape(wanted.shape)
        parts = np.split(wanted, [heads, heads + kv_heads], axis=1)
        for part, weight in zip(parts[:2], weights, strict=True):
            if norms:
                part[:] = rms_norm(part, weight[LAYER])
            halves = part[..., : head_dim // 2] + 1j * part[..., head_dim // 2 :]
            turned = halves * np.exp(1j * angle)
            part[:] = np.concatenate([turned.real, turned.imag], axis=-1)
        # Float32 rounds values of up to about 4 a few times, and each of the products added.
        for actual, part in zip(results[-1], parts, strict=True):
            np.testing.assert_allclose(actual, part, rtol=0, atol=4e-6 if what is None else 8e-6)
        for cache in (keys, values):
            cache[LAYER, block, offset] = 7
            assert (cache == 7).all()  # Nothing else was written.
    assert np.array_equal(results[0][2], projected[:, -kv_heads:])
    is_base = ~added.any(axis=1)
    for without, with_update in zip(*results, strict=True):
        assert np.array_equal(with_update[is_base], without[is_base])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tokens", "width"), [(1, 48), (7, 2048), (3, 2880)])
def test_residual_and_norm(tokens: int, width: int, implementation: Implementation) -> None:
    rng = np.random.default_rng(0)
    x, delta = rng.normal(size=(2, tokens, width)).astype(np.float32)
    weight = rng.normal(size=(LAYERS, width)).astype(np.float32)
    # The buffer has more rows than the batch.
    buffer = np.concatenate([delta, np.full((2, width), np.nan, np.float32)])

    update, added = linear_update(tokens, (width,), "float32")

    def program(update: LinearUpdate | None, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, delta, weight = inputs
        return add_rms_norm(
            x, jax.new_ref(delta), weight, jnp.int32(LAYER), epsilon=EPSILON, update=update,
            implementation=implementation,
        )  # fmt: skip

    results = []
    for what in (None, update):
        total, normed = jax.jit(functools.partial(program, what))(x, buffer, weight)
        results.append([np.asarray(total), np.asarray(normed)])
        wanted = (x + delta).astype(np.float64)
        if what is not None:
            wanted += added
        # One rounding of each product that is added, of values of up to about 8.
        np.testing.assert_allclose(total, wanted, rtol=0, atol=0 if what is None else 8e-6)
        # One rounding of the scale, one of each product, of values of up to about 10.
        atol = 5e-6 if what is None else 1e-5
        np.testing.assert_allclose(normed, rms_norm(wanted, weight[LAYER]), rtol=0, atol=atol)
    is_base = ~added.any(axis=1)
    for without, with_update in zip(*results, strict=True):
        assert np.array_equal(with_update[is_base], without[is_base])
