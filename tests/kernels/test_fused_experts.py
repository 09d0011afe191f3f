"""The layer of a small batch, against NumPy float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from moelora_kernels import fused_experts
from tests.kernels.cases import (
    ONE_TOKEN,
    TOP_8,
    LayerCase,
    LayerSpec,
    assert_close,
    compiled,
    layer_specs,
    poisoned,
)


def run(case: LayerCase, *, lora: bool = True, bias: bool = False) -> np.ndarray:
    program = compiled(fused_experts, scaling=2.5, implementation="reference")
    out = program(
        poisoned((case.shape.tokens + 3, case.shape.hidden), case.dtype),
        case.cast(case.x),
        jnp.asarray(case.experts),
        jnp.asarray(case.weights, jnp.float32),
        case.device_num_tokens,
        case.cast(case.gate_up),
        case.cast(case.down),
        case.layer,
        gate_up_bias=case.cast(case.gate_up_bias) if bias else None,
        down_bias=case.cast(case.down_bias) if bias else None,
        adapter_of_token=jnp.asarray(case.adapter_of_token) if lora else None,
        pages=case.pages() if lora else None,
    )
    return np.asarray(out)[: case.shape.tokens]


@settings(max_examples=20)
@given(spec=layer_specs(shapes=(ONE_TOKEN, TOP_8)))
def test_layer(spec: LayerSpec) -> None:
    case = LayerCase(spec)
    with_lora = run(case)
    assert_close(with_lora, case.layer_output(scaling=2.5), case.dtype)
    base_rows = case.adapter_of_token < 0
    assert np.array_equal(with_lora[base_rows], run(case, lora=False)[base_rows])


def test_biases() -> None:
    case = LayerCase(LayerSpec(TOP_8, num_tokens=6))
    rows = case.rows
    ranks = case.rank_activations(("gate", "up"), case.token_rows())
    hidden = np.full((case.shape.pairs, case.shape.intermediate), np.nan)
    hidden[: len(rows)] = case.gated_hidden(ranks, "silu", bias=True)
    outputs = case.expert_outputs(hidden, case.rank_activations(("down",), hidden), bias=True)
    assert_close(run(case, bias=True), case.combined(outputs, 2.5), case.dtype)


def test_adapters_and_pages_go_together() -> None:
    case = LayerCase(LayerSpec(ONE_TOKEN))
    with pytest.raises(ValueError, match="together"):
        fused_experts(
            case.cast(case.x),
            jnp.asarray(case.experts),
            jnp.asarray(case.weights, jnp.float32),
            case.device_num_tokens,
            case.cast(case.gate_up),
            case.cast(case.down),
            case.layer,
            pages=case.pages(),
        )
