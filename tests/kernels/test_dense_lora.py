"""LoRA of dense layers and of embeddings against NumPy float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from moelora_kernels import dense_lora, embedding_lora, sort_tokens
from tests.kernels.cases import (
    LAYER,
    LayerCase,
    LayerSpec,
    Shape,
    assert_close,
    assert_same_bits,
    compiled,
    layer_specs,
    poisoned,
    rounded,
)

TILE_ROWS = 8
#: One expert and one choice: the gate projection of such a layer is a dense linear layer.
SHAPES = (
    Shape(1, 1, 1, 48, 20, 3, 1),
    Shape(7, 1, 1, 32, 32, 5, 4),
    Shape(33, 1, 1, 20, 48, 10, 2),
)


def base_output(case: LayerCase) -> np.ndarray:
    y = np.random.default_rng(case.spec.seed).normal(
        size=(case.shape.tokens, case.shape.intermediate)
    )
    y[case.num_tokens :] = np.nan
    return rounded(y, case.dtype)


def expected_output(case: LayerCase) -> np.ndarray:
    expected = base_output(case)
    for token in range(case.num_tokens):
        update = case.update("gate", token)
        if update is not None:
            expected[token] += update.scaling * (update.b.T @ (update.a @ case.x[token]))
    return expected


def run(case: LayerCase, *, in_place: bool = True, page_seed: int = 0) -> np.ndarray:
    tokens, width = base_output(case).shape
    result = compiled(dense_lora, tile_rows=TILE_ROWS)(
        poisoned((tokens + 2, width), case.dtype) if in_place else None,
        case.cast(case.x),
        case.cast(base_output(case)),
        case.pages(page_seed).gate,
        case.token_sort(TILE_ROWS),
        case.layer,
    )
    return np.asarray(result)[:tokens]


@settings(max_examples=40)
@given(spec=layer_specs(SHAPES))
def test_dense_lora(spec: LayerSpec) -> None:
    case = LayerCase(spec)
    y, expected, result = base_output(case), expected_output(case), run(case)
    real = slice(0, case.num_tokens)
    assert_close(result[real], expected[real], case.dtype)

    # Tokens without an adapter, and padding, keep their bits.
    base = [t for t in range(case.shape.tokens) if case.adapter_of_token[t] < 0]
    base = np.asarray(base, np.int32)
    assert_same_bits(result[base], y[base].astype(result.dtype))


@settings(max_examples=40)
@given(spec=layer_specs(SHAPES))
def test_embedding_lora(spec: LayerSpec) -> None:
    """The same of a vocabulary of ``hidden`` tokens, each of them a one-hot input."""
    case = LayerCase(spec)
    vocabulary, tokens = case.shape.hidden, case.shape.tokens
    ids = np.random.default_rng(spec.seed).integers(vocabulary, size=tokens).astype(np.int32)
    y = base_output(case)
    pages = case.pages().gate
    pages = pages._replace(table=pages.table[LAYER:], scaling=pages.scaling[LAYER:])
    expected = y.copy()
    for token in range(case.num_tokens):
        update = case.update("gate", token)
        if update is not None:
            expected[token] += update.scaling * (update.b.T @ update.a[:, ids[token]])
    result = np.asarray(
        compiled(embedding_lora, tile_rows=TILE_ROWS)(
            poisoned((tokens + 2, y.shape[1]), case.dtype),
            jnp.asarray(ids),
            case.cast(y),
            pages,
            case.token_sort(TILE_ROWS),
        )
    )[:tokens]
    assert_close(result[: case.num_tokens], expected[: case.num_tokens], case.dtype)
    base = np.flatnonzero(case.adapter_of_token < 0)
    assert_same_bits(result[base], y[base].astype(result.dtype))


def test_an_output_of_a_wider_dtype() -> None:
    """Logits of the router and of the head are float32, whatever the compute dtype."""
    case = LayerCase(LayerSpec(SHAPES[2], dtype="bfloat16", num_tokens=31))
    y = base_output(case)
    result = compiled(dense_lora, tile_rows=TILE_ROWS)(
        None,
        case.cast(case.x),
        jnp.asarray(y, jnp.float32),
        case.pages().gate,
        case.token_sort(TILE_ROWS),
        case.layer,
    )
    assert result.dtype == jnp.float32
    real = slice(0, case.num_tokens)
    error = np.asarray(result, np.float64)[real] - expected_output(case)[real]
    # Rank activations are rounded to bfloat16, of which the change is some hundred times the step.
    assert np.abs(error).max() < 0.03
    base = np.flatnonzero(case.adapter_of_token < 0)
    assert_same_bits(np.asarray(result)[base], y.astype(np.float32)[base])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_again(dtype: str) -> None:
    case = LayerCase(LayerSpec(SHAPES[2], dtype=dtype, num_tokens=31))
    first = run(case)
    assert_same_bits(run(case), first)
    assert_same_bits(run(case, in_place=False), first)
    assert_same_bits(run(case, page_seed=1), first)


def test_with_the_sort_kernel() -> None:
    case = LayerCase(LayerSpec(SHAPES[2], num_tokens=31))
    sort = compiled(
        sort_tokens, num_experts=1, num_adapters=case.shape.adapters, tile_rows=TILE_ROWS
    )(
        None,
        jnp.asarray(np.zeros((33, 1), np.int32)),
        jnp.asarray(case.adapter_of_token),
        case.device_num_tokens,
    )
    result = compiled(dense_lora, tile_rows=TILE_ROWS)(
        None,
        case.cast(case.x),
        case.cast(base_output(case)),
        case.pages().gate,
        sort,
        case.layer,
    )
    assert_same_bits(result, run(case))


def test_nonzero_updates() -> None:
    """The cases do change their tokens; else the tests above would show little."""
    case = LayerCase(LayerSpec(SHAPES[2]))
    change = np.abs(run(case).astype(np.float64) - base_output(case)).max(axis=1)
    has_update = [case.update("gate", token) is not None for token in range(case.shape.tokens)]
    np.testing.assert_array_equal(change > 1e-3, has_update)


def test_pages_of_several_experts_raise() -> None:
    case = LayerCase(LayerSpec(Shape(7, 1, 2, 32, 32, 2, 1)))
    with pytest.raises(ValueError, match="one expert in its table, not 2"):
        run(case)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((33, 48), "bfloat16", "out is bfloat16"), ((32, 48), "float32", "too small")],
)
def test_an_out_that_does_not_fit_raises(shape: tuple[int, ...], dtype: str, message: str) -> None:
    case = LayerCase(LayerSpec(SHAPES[2]))
    with pytest.raises(ValueError, match=message):
        compiled(dense_lora, tile_rows=TILE_ROWS)(
            poisoned(shape, dtype),
            case.cast(case.x),
            case.cast(base_output(case)),
            case.pages().gate,
            case.token_sort(TILE_ROWS),
            case.layer,
        )
