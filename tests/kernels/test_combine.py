"""Combine against NumPy float64."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from moelora_kernels import combine
from tests.kernels.cases import (
    TOP_8,
    WIDE,
    LayerCase,
    LayerSpec,
    assert_close,
    assert_same_bits,
    compiled,
    layer_specs,
    poisoned,
    rounded,
    to_device,
)

SCALING = 2.5


def outputs_of(case: LayerCase, extra: int = 2) -> np.ndarray:
    """Random expert outputs in a buffer that is too large, NaN past the last real row."""
    outputs = np.full((case.shape.pairs + extra, case.shape.hidden), np.nan)
    values = np.random.default_rng(case.spec.seed).normal(size=outputs.shape)
    outputs[: len(case.rows)] = rounded(values, "float32")[: len(case.rows)]
    return outputs


def run(case: LayerCase, *, in_place: bool = True, extra: int = 2) -> np.ndarray:
    tokens, hidden = case.shape.tokens, case.shape.hidden
    out = poisoned((tokens + extra, hidden), case.dtype) if in_place else None
    result = compiled(combine, scaling=SCALING, dtype=case.dtype)(
        out,
        to_device(outputs_of(case, extra), "float32"),
        to_device(case.weights, "float32"),
        case.token_sort(16),
    )
    return np.asarray(result)[:tokens]


@settings(max_examples=30)
@given(spec=layer_specs())
def test_combine(spec: LayerSpec) -> None:
    case = LayerCase(spec)
    result = run(case)
    assert_close(result, case.combined(outputs_of(case), SCALING), case.dtype)
    assert not result[case.num_tokens :].any()


def test_a_sum_is_rounded_once() -> None:
    case = LayerCase(LayerSpec(TOP_8, dtype="bfloat16"))
    exact = run(LayerCase(LayerSpec(TOP_8, dtype="float32")))
    # The expert outputs of both cases are the same float32 numbers, and so are the weights.
    assert_same_bits(run(case), exact.astype(jnp.dtype("bfloat16")))


def test_given_buffers_make_no_difference() -> None:
    case = LayerCase(LayerSpec(WIDE, dtype="bfloat16", num_tokens=30))
    assert_same_bits(run(case, in_place=False, extra=0), run(case))
    assert_same_bits(run(case), run(case))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((33, 48), "bfloat16", "out is bfloat16"),
        ((32, 48), "float32", "too small"),
        ((33, 47), "float32", "too small"),
        ((33, 1, 48), "float32", "out is float32"),
    ],
)
def test_an_out_that_does_not_fit_raises(shape: tuple[int, ...], dtype: str, message: str) -> None:
    case = LayerCase(LayerSpec(WIDE))
    with pytest.raises(ValueError, match=message):
        compiled(combine, scaling=SCALING, dtype="float32")(
            poisoned(shape, dtype),
            to_device(outputs_of(case), "float32"),
            to_device(case.weights, "float32"),
            case.token_sort(16),
        )


@pytest.mark.usefixtures("unchecked")
def test_an_implementation_that_does_not_exist_is_refused() -> None:
    case = LayerCase(LayerSpec(TOP_8, dtype="float32"))
    outputs, weights = to_device(outputs_of(case), "float32"), to_device(case.weights, "float32")
    unknown: Any = "pallas"
    with pytest.raises(ValueError, match="must be reference or triton, or None, not 'pallas'"):
        combine(outputs, weights, case.token_sort(16), dtype=jnp.float32, implementation=unknown)
