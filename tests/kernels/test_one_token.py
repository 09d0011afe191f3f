"""The experts of one token, against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moelora_kernels import one_token_experts
from tests.kernels.cases import ONE_TOKEN, LayerCase, LayerSpec, assert_close, poisoned


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("assignment", ["one", "base"])
def test_one_token(dtype: str, num_tokens: int, assignment: str) -> None:
    spec = LayerSpec(ONE_TOKEN, dtype=dtype, num_tokens=num_tokens, assignment=assignment)
    case = LayerCase(spec)

    def run(lora: bool) -> np.ndarray:
        out = jax.new_ref(poisoned((1, ONE_TOKEN.hidden), dtype))
        one_token_experts(
            case.cast(case.x),
            jnp.asarray(case.experts),
            jnp.asarray(case.weights, jnp.float32),
            case.device_num_tokens,
            case.cast(case.gate_up),
            case.cast(case.down),
            case.layer,
            scaling=2.5,
            adapter_of_token=jnp.asarray(case.adapter_of_token) if lora else None,
            pages=case.pages() if lora else None,
            out=out,
            implementation="reference",
        )
        return np.asarray(out[...])

    with_lora = run(lora=True)
    assert_close(with_lora, case.layer_output(scaling=2.5), dtype)
    if assignment == "base":
        assert np.array_equal(with_lora, run(lora=False))


def test_adapters_and_pages_go_together() -> None:
    case = LayerCase(LayerSpec(ONE_TOKEN))
    with pytest.raises(ValueError, match="together"):
        one_token_experts(
            case.cast(case.x),
            jnp.asarray(case.experts),
            jnp.asarray(case.weights, jnp.float32),
            case.device_num_tokens,
            case.cast(case.gate_up),
            case.cast(case.down),
            case.layer,
            pages=case.pages(),
        )
