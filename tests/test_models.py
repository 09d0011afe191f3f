"""Qwen3-MoE: its configurations, parameters and variants, against transformers."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moelora_jax import LLM, BucketConfig, CacheConfig, CheckpointError, Prompt, RuntimeConfig
from moelora_jax.config import RopeConfig
from moelora_jax.models import FAMILIES, convert_checkpoint, family_of, load_model, model_arrays
from moelora_jax.models.layers import rope_frequencies, rotation
from moelora_jax.models.qwen3_moe import read_model_config
from moelora_kernels import rms_norm, rotate

RUNTIME = RuntimeConfig(
    buckets=BucketConfig(decode=(4,), prefill=(32,)), cache=CacheConfig(max_length=32)
)
RAW = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "intermediate_size": 36,
    "norm_topk_prob": True,
    "rope_theta": 5000.0,
}


def torch_qwen3_moe(**options: Any) -> Any:
    torch = pytest.importorskip("torch")
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {key: value for key, value in RAW.items() if key not in ("architectures", "rope_theta")}
    config = Qwen3MoeConfig(**(sizes | {"num_hidden_layers": 2} | options))
    model = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"num_hidden_layers": 3, "mlp_only_layers": [1], "norm_topk_prob": False},
        {"decoder_sparse_step": 2, "tie_word_embeddings": True},
        {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ],
    ids=[
        "a dense layer between, weights not renormalised",
        "tied, every second",
        "biases, theta",
        "yarn",
    ],
)
def test_variants_equal_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    model = torch_qwen3_moe(**options)
    model.save_pretrained(tmp_path / "model")
    llm = LLM.load(tmp_path / "model", runtime=RUNTIME, dtype=jnp.float32)
    prompts = [Prompt([3, 1, 4, 1, 5, 9, 2, 6]), Prompt([96]), Prompt(list(range(20)))]
    for prompt, logits in zip(prompts, llm.score(prompts), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt.tokens])).logits[0].numpy()
        # As in test_parity.py.
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


def test_converted_copy_gives_the_same_model(tmp_path: Path) -> None:
    torch_qwen3_moe().save_pretrained(tmp_path / "model")
    convert_checkpoint(tmp_path / "model", tmp_path / "converted", jnp.bfloat16)
    original, config, _ = load_model(tmp_path / "model", jnp.bfloat16)
    copy, copied_config, _ = load_model(tmp_path / "converted", jnp.bfloat16)
    assert copied_config == config
    expected, actual = model_arrays(original), model_arrays(copy)
    assert expected.keys() == actual.keys()
    for path, array in expected.items():
        assert actual[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(actual[path], array)
    with pytest.raises(CheckpointError):
        convert_checkpoint(tmp_path / "model", tmp_path / "converted", jnp.bfloat16)


def test_configs_of_transformers_4_and_5_are_read_alike() -> None:
    version_5 = {key: value for key, value in RAW.items() if key not in ("rope_theta",)}
    version_5["num_local_experts"] = version_5.pop("num_experts")
    version_5["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    assert read_model_config(version_5) == read_model_config(RAW)
    assert read_model_config(RAW).rope.theta == 5000.0


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (0, 1, 2, 3)),
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"mlp_only_layers": [0, 3]}, (1, 2)),
    ],
)
def test_which_layers_have_experts(changes: dict[str, Any], layers: tuple[int, ...]) -> None:
    config = read_model_config(RAW | changes)
    assert config.moe_layers == layers
    assert {site.name: site.layers for site in config.lora_sites()}["up_proj"] == layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "num_experts missing"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "llama3", "factor": 4.0}}, "rope_type 'llama3'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type 'linear'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_unsupported_configs_are_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_model_config(RAW | changes)


def test_unknown_architectures_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM.*Qwen3MoeForCausalLM"):
        family_of({"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(CheckpointError, match="architectures"):
        family_of({})


def test_every_parameter_of_the_module_is_in_the_table() -> None:
    for changes in ({}, {"mlp_only_layers": [1]}, {"attention_bias": True}):
        config = read_model_config(RAW | changes)
        family = FAMILIES[config.architecture]
        table = family.parameters(config)
        skeleton = nnx.eval_shape(
            lambda family=family, config=config: family.module(
                config, dtype=jnp.float32, rngs=nnx.Rngs(0)
            )
        )
        shapes = {
            ".".join(map(str, path)): leaf.shape
            for path, leaf in nnx.to_flat_state(nnx.state(skeleton))
        }
        assert shapes == {path: parameter.shape for path, parameter in table.items()}


def test_rms_norm_and_rotation_against_float64() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3, 8)).astype(np.float32)
    weight = rng.normal(size=8).astype(np.float32)
    expected = weight * x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(
        rms_norm(jnp.asarray(x), jnp.asarray(weight), 1e-6), expected, atol=1e-6
    )

    positions = np.array([0, 1, 7, 100, 5000], np.int32)
    halves = x[..., :4] + 1j * x[..., 4:].astype(np.complex128)
    angle = positions[:, None, None] * 10000.0 ** (-np.arange(4) / 4)
    turned = halves * np.exp(1j * angle)
    rotated = rotate(jnp.asarray(x), *rotation(jnp.asarray(positions), RopeConfig(), x.shape[-1]))
    # An angle of 5,000 has a float32 spacing of 5e-4.
    np.testing.assert_allclose(
        rotated, np.concatenate([turned.real, turned.imag], -1), rtol=0, atol=2e-3
    )
    np.testing.assert_array_equal(rotated[0], x[0])


@pytest.mark.parametrize(
    "rope",
    [
        {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
        {"factor": 4.0, "original_max_position_embeddings": 32768},
        {"factor": 4.0},
        {"factor": 2.0, "attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0},
        {"factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    ],
)
def test_yarn_equals_transformers(rope: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    from transformers import Qwen3MoeConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "rope_theta": 150000.0} | rope
    config = Qwen3MoeConfig(head_dim=64, max_position_embeddings=131072, rope_parameters=dict(rope))
    expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, device=None)
    raw = RAW | {"rope_parameters": rope, "max_position_embeddings": 131072}
    ours = read_model_config(raw).rope
    assert ours.yarn is not None
    assert ours.yarn.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    # Transformers computes the frequencies in float32.
    np.testing.assert_allclose(rope_frequencies(ours, 64), expected.numpy(), rtol=1e-6)
