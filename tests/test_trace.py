"""Traces: they agree with the model's own parts, and leave what is served alone."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from moelora_jax import LLM, MoeParams, Prompt, RequestError, moe_lora
from moelora_jax.errors import CapacityError
from moelora_kernels import ExpertPages
from tests.adapter_files import tiny_model_config
from tests.tiny_llm import random_adapter, tiny_llm

# Layers 1 and 2 have experts, 0 and 3 do not.
CONFIG = replace(tiny_model_config(num_layers=4), moe_layers=(1, 2), dense_intermediate_size=24)
ROWS = [
    Prompt([3, 1, 4, 1, 5], "small"),
    Prompt([9, 2, 6]),
    Prompt([5, 3, 5, 8, 9, 7], "large"),
    Prompt([3, 1, 4, 1, 5]),
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    llm = tiny_llm(config=CONFIG)
    llm.load_adapter("small", random_adapter(CONFIG, 0, rank=5))
    llm.load_adapter("large", random_adapter(CONFIG, 1, rank=20))
    return llm


def test_shapes_and_order(llm: LLM) -> None:
    moe = CONFIG.moe
    for prompt, trace in zip(ROWS, llm.trace(ROWS), strict=True):
        tokens = len(prompt.tokens)
        assert (list(trace.tokens), trace.adapter) == (prompt.tokens, prompt.adapter)
        assert trace.moe_layers == (1, 2)
        assert trace.moe_input.shape == trace.moe_output.shape == (2, tokens, moe.hidden_size)
        assert trace.router_logits.shape == (2, tokens, moe.num_experts)
        assert trace.experts.shape == trace.weights.shape == (2, tokens, moe.top_k)
        assert trace.hidden.shape == (tokens, moe.hidden_size)
        assert trace.logits.shape == (tokens, CONFIG.vocab_size)
        assert trace.experts.dtype == np.int32


def test_logits_are_those_of_score(llm: LLM) -> None:
    for trace, logits in zip(llm.trace(ROWS), llm.score(ROWS), strict=True):
        # The same sums in another order: the program has another size.
        np.testing.assert_allclose(trace.logits, logits, rtol=0, atol=1e-5)


def test_router_and_experts_agree_with_the_layer_alone(llm: LLM) -> None:
    """Each row's MoE input, put through one layer with its adapter, gives its MoE output."""
    experts = llm.runner.model.experts  # type: ignore[attr-defined]
    params = MoeParams(experts.router[...], experts.gate_up[...], experts.down[...])
    sites = llm.runner.pool.device_state()
    pages = ExpertPages(sites["gate_proj"], sites["up_proj"], sites["down_proj"])
    slots = llm.runner.registry.resident()
    for trace in llm.trace(ROWS):
        for layer in range(2):
            x = trace.moe_input[layer].astype(np.float64)
            logits = x @ np.asarray(params.router[layer], np.float64).T
            np.testing.assert_allclose(trace.router_logits[layer], logits, rtol=0, atol=1e-5)
            best = np.argsort(-logits, axis=-1)[:, : CONFIG.moe.top_k]
            np.testing.assert_array_equal(trace.experts[layer], best)
            scores = np.exp(np.take_along_axis(logits, best, axis=-1))
            weights = scores / scores.sum(axis=-1, keepdims=True)
            np.testing.assert_allclose(trace.weights[layer], weights, rtol=1e-5)
            slot = slots[trace.adapter] if trace.adapter else -1
            output = moe_lora(
                jnp.asarray(trace.moe_input[layer]),
                params,
                jnp.int32(layer),
                CONFIG.moe,
                adapter_of_token=jnp.full(len(trace.tokens), slot, jnp.int32),
                pages=pages,
            )
            np.testing.assert_allclose(trace.moe_output[layer], output, rtol=0, atol=1e-5)


def test_an_adapter_changes_the_trace(llm: LLM) -> None:
    tuned, _, _, base = llm.trace(ROWS)
    assert np.abs(tuned.moe_output - base.moe_output).max() > 0.1
    # The first layer with experts comes after attention, which the adapter changes too.
    assert np.abs(tuned.moe_input - base.moe_input).max() > 0.1


def test_routed_scaling_is_in_the_weights() -> None:
    config = replace(CONFIG, moe=replace(CONFIG.moe, routed_scaling=2.5))
    (trace,) = tiny_llm(config=config).trace([Prompt([1, 2, 3])])
    np.testing.assert_allclose(trace.weights.sum(-1), 2.5, rtol=1e-5)


def test_serving_does_not_notice(llm: LLM) -> None:
    before = llm.score(ROWS)
    addresses, programs = llm.runner.addresses(), len(llm.runner.programs)
    llm.trace(ROWS)
    assert llm.runner.addresses() == addresses
    assert len(llm.runner.programs) == programs
    for first, second in zip(before, llm.score(ROWS), strict=True):
        np.testing.assert_array_equal(first, second)


def test_bad_rows_are_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="batch is empty"):
        llm.trace([])
    with pytest.raises(RequestError, match="row 1: adapter 'other' is not loaded"):
        llm.trace([Prompt([1]), Prompt([1], "other")])
    with pytest.raises(CapacityError, match="exceed the cache's max_length 48"):
        llm.trace([Prompt([1] * 49)])
