"""config.json as model makers and tools publish it: read whole, or refused by the key's name."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moelora_jax import CheckpointError, ModelConfig, MoeLoraError
from moelora_jax.config import RopeConfig
from moelora_jax.models import family_of, load_model, read_model_config
from tests.test_families import TESTED, YARN, raw_config
from tests.test_models import torch_qwen3_moe

QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_CODER = QWEN3 | {
    "intermediate_size": 5472,
    "max_position_embeddings": 262144,
    "max_window_layers": 28,
    "qkv_bias": False,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.0,
    "shared_expert_intermediate_size": 0,
    "use_qk_norm": True,
}
OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0.dev0",
    "use_cache": True,
    "vocab_size": 50304,
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
#: Kimi-K2, but for its weights in FP8: a DeepSeek-V3 of other sizes, in which YaRN has no ramp.
KIMI_K2 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": QWEN3,
    "Qwen3-Coder-30B-A3B": QWEN3_CODER,
    "OLMoE-1B-7B": OLMOE,
    "Mixtral-8x7B": MIXTRAL,
    "gpt-oss-20b": GPT_OSS,
    "Kimi-K2": KIMI_K2,
}


def read(raw: dict[str, Any]) -> ModelConfig:
    return family_of(raw).read_config(raw)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_of_published_configs_is_known(name: str) -> None:
    raw = PUBLISHED[name]
    config = read(raw)
    assert config.num_layers == raw["num_hidden_layers"]
    assert config.rope.theta == raw["rope_theta"]


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.parametrize("only_changes", [True, False])
def test_every_key_that_transformers_writes_is_known(name: str, only_changes: bool) -> None:
    transformers = pytest.importorskip("transformers")
    family = TESTED[name]
    config = getattr(transformers, family.config_class)(**family.options)
    config.architectures, config.dtype = [family.architecture], "bfloat16"
    assert read(json.loads(config.to_json_string(use_diff=only_changes)))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # The config for a million tokens that comes with Qwen3-30B-A3B-2507.
        ("Qwen3-30B-A3B", {"dual_chunk_attention_config": {"chunk_size": 262144}}),
        ("Qwen3-30B-A3B", {"shared_expert_intermediate_size": 512}),
        ("Qwen3-30B-A3B", {"qkv_bias": True}),
        ("Qwen3-30B-A3B", {"use_qk_norm": False}),
        ("Qwen3-30B-A3B", {"layer_types": ["sliding_attention"]}),
        ("Qwen3-30B-A3B", {"quantization": {"group_size": 64, "bits": 4}}),
        ("Qwen3-30B-A3B", {"compression_config": {"quant_method": "compressed-tensors"}}),
        ("Qwen3-30B-A3B", {"quantization_config": {"quant_method": "fp8"}}),
        # transformers 5 prefers it to the one of the positions.
        ("Qwen3-30B-A3B", {"original_max_position_embeddings": 4096}),
        ("Qwen3-30B-A3B", {"partial_rotary_factor": 0.5}),
        ("Qwen3-30B-A3B", {"num_local_experts": 64}),
        ("OLMoE-1B-7B", {"sliding_window": 4096}),
        ("Mixtral-8x7B", {"attention_bias": True}),
        ("gpt-oss-20b", {"experts_per_token": 8}),
        ("gpt-oss-20b", {"quantization_config": {"quant_method": "bitsandbytes"}}),
        ("gpt-oss-20b", {"quantization_config": "mxfp4"}),
        ("Kimi-K2", {"qk_head_dim": 128}),
        ("Kimi-K2", {"index_topk": 2048}),
        ("Kimi-K2", {"num_experts": 256}),
    ],
)
def test_what_would_change_the_result_is_refused_by_its_key(
    name: str, changes: dict[str, Any]
) -> None:
    (key,) = changes
    with pytest.raises(CheckpointError, match=rf"config\.json: (.* )?{key}"):
        read(PUBLISHED[name] | changes)


def test_long_contexts_in_the_words_of_both_versions() -> None:
    """The model's card says what to add; where both versions of the key are there, both count."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    version_4 = QWEN3 | {"rope_scaling": scaling}
    parameters = scaling | {"rope_theta": 1000000.0}
    version_5 = {k: v for k, v in QWEN3.items() if k not in ("rope_theta", "rope_scaling")}
    long = read(version_5 | {"rope_parameters": parameters}).rope
    assert long.yarn is not None and long.theta == 1e6
    assert read(version_4).rope == read(version_4 | {"rope_parameters": parameters}).rope == long
    plain = {"rope_type": "default", "rope_theta": 1000000.0}
    with pytest.raises(CheckpointError, match="rope_parameters and rope_scaling contradict"):
        read(version_5 | {"rope_parameters": plain, "rope_scaling": scaling})
    with pytest.raises(CheckpointError, match="full_attention of rope_type 'default' unknown"):
        read(version_5 | {"rope_parameters": {"full_attention": plain}})


def test_olmoe_without_key_value_heads_has_as_many_as_heads() -> None:
    for without in ({"num_key_value_heads": None}, {}):
        raw = {key: value for key, value in OLMOE.items() if key != "num_key_value_heads"}
        assert read(raw | without) == read(OLMOE)


def wrong_values(raw: dict[str, Any]) -> list[dict[str, Any]]:
    values = (-1, 0, 1.5, "x", "false", [], [1], [None], {}, {"a": 1}, True)
    return [raw | {key: value} for key in raw for value in values]


@pytest.mark.parametrize("name", TESTED)
def test_values_of_another_kind_are_refused_in_words(name: str) -> None:
    """Or mean what they say; what no code expects must not come out as an error of Python's."""
    for raw in (raw_config(name), raw_config(name, TESTED[name].version_4)):
        changed = wrong_values(raw)
        for key in ("rope_parameters", "rope_scaling"):
            changed += [raw | {key: rope} for rope in wrong_values(raw.get(key) or YARN)]
        for content in changed:
            try:
                read(content)
            except (MoeLoraError, ValueError) as error:  # read_model_config names the folder.
                assert str(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": "false"}, "norm_topk_prob must be true or false, not 'false'"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a finite number"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive number"),
        ({"mlp_only_layers": 3}, "mlp_only_layers must be a list of whole numbers"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token or a list of tokens"),
        ({"rope_scaling": "yarn"}, "must be an object, not 'yarn'"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "factor must be a positive number"),
    ],
)
def test_a_value_of_another_kind_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(QWEN3 | changes)


def test_weights_that_modelopt_quantized_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    assert read_model_config(tmp_path)[1].rope == RopeConfig(1e6)
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: quantized weights"):
        read_model_config(tmp_path)


def test_a_tied_head_in_the_file_must_be_the_embedding(tmp_path: Path) -> None:
    """transformers then leaves them apart, whatever the config says."""
    model = torch_qwen3_moe(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.copy()}, tmp_path / "model.safetensors")
    load_model(tmp_path, jnp.float32)
    other = np.nextafter(embedding, np.float32(1))
    save_file(tensors | {"lm_head.weight": other}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.* tie_word_embeddings"):
        load_model(tmp_path, jnp.float32)
