"""Linear maps with LoRA against NumPy float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moelora_kernels import SIGNALS, LinearMap, linear_lora, sort_tokens
from moelora_kernels.backend import Implementation
from tests.kernels.cases import LAYER, LayerCase, LayerSpec, Shape, relative_error

TILE_ROWS = 16
#: One expert and one choice: gate and up of such a layer are linear maps of one input.
SHAPES = {
    "one token": Shape(1, 1, 1, 48, 20, 3, 1),
    "one token, many columns": Shape(1, 1, 1, 48, 1056, 3, 1),
    "two pages": Shape(33, 1, 1, 20, 48, 10, 2),
    "many adapters": Shape(128, 1, 1, 320, 192, 64, 4),
    # Other stages and registers with adapters than without, in bfloat16.
    "sums in parts": Shape(60, 1, 1, 512, 544, 5, 2),
    "many columns": Shape(128, 1, 1, 64, 1408, 5, 1),
    # In bfloat16; float32, and maps of few columns, are of the launch for few rows.
    "two launches": Shape(300, 1, 1, 320, 320, 5, 1),
    "columns in parts": Shape(200, 1, 1, 1024, 264, 5, 1),
    "many tiles": Shape(1100, 1, 1, 136, 272, 64, 2),
    "few columns": Shape(1100, 1, 1, 136, 72, 5, 2),
}
IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=pytest.mark.gpu)]
#: Sums of up to 1024 products, rounded once; bfloat16 also rounds the rank activations.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}


def run(
    case: LayerCase, weights: list[np.ndarray], implementation: Implementation, *, lora: bool
) -> np.ndarray:
    """Three maps: with pages, with pages and a bias, with a bias alone."""
    shape, pages = case.shape, case.pages()

    def program(signals: jax.Array, x: jax.Array, weights: list[jax.Array], pages: Any) -> Any:
        counters = jax.new_ref(signals)
        first, second, third, bias_2, bias_3 = weights
        maps = [
            LinearMap(first, None, pages.gate),
            LinearMap(second, bias_2, pages.up),
            LinearMap(third, bias_3),
        ]
        sort = sort_tokens(
            jnp.zeros((shape.tokens, 1), jnp.int32),
            jnp.asarray(case.adapter_of_token),
            case.device_num_tokens,
            num_experts=1,
            num_adapters=shape.adapters,
            tile_rows=TILE_ROWS,
            implementation=implementation,
        )
        y = linear_lora(
            x,
            maps,
            case.layer,
            sort=sort if lora else None,
            tile_rows=TILE_ROWS,
            signals=counters,
            implementation=implementation,
        )
        return jax.freeze(counters), y

    signals, y = jax.jit(program, donate_argnums=0)(
        jnp.zeros(SIGNALS, jnp.int32), case.cast(case.x), [case.cast(w) for w in weights], pages
    )
    assert not np.asarray(signals).any()
    return np.asarray(y)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_linear_lora(name: str, dtype: Any, implementation: Implementation) -> None:
    shape = SHAPES[name]
    case = LayerCase(LayerSpec(shape, dtype=dtype, num_tokens=shape.tokens - shape.tokens // 8))
    rng = np.random.default_rng(0)
    sizes = [(shape.intermediate, shape.hidden)] * 2 + [(9, shape.hidden)]
    weights = [rng.normal(size=(2, *size)) * shape.hidden**-0.5 for size in sizes]
    weights += [rng.normal(size=(2, size[0])) for size in sizes[1:]]
    weights = [np.asarray(case.cast(w), np.float64) for w in weights]
    real = slice(0, case.num_tokens)
    parts = [case.x @ weight[LAYER].T for weight in weights[:3]]
    parts[1] += weights[3][LAYER]
    parts[2] += weights[4][LAYER]
    without = np.concatenate(parts, axis=1)
    for site, part in zip(("gate", "up"), parts, strict=False):
        for token in range(case.num_tokens):
            update = case.update(site, token)
            if update is not None:
                part[token] += update.scaling * (update.b.T @ (update.a @ case.x[token]))
    expected = np.concatenate(parts, axis=1)

    base, with_adapters = (run(case, weights, implementation, lora=lora) for lora in (False, True))
    assert relative_error(base[real], without[real]) <= TOLERANCE[dtype]
    assert relative_error(with_adapters[real], expected[real]) <= TOLERANCE[dtype]
    is_base = case.adapter_of_token < 0
    is_base[case.num_tokens :] = True
    rows = np.flatnonzero(is_base)
    assert with_adapters[rows].tobytes() == base[rows].tobytes()
