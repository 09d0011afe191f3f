"""OLMoE: attention with normalised projections, which may be clipped; experts in every layer."""

from collections.abc import Mapping
from typing import Any

from moelora_jax.config import ModelConfig, MoeConfig
from moelora_jax.models.decoder import per_expert_parameters, shared_parameters
from moelora_jax.models.model_config import (
    known_values,
    read_decoder_config,
    refuse_other,
    refuse_quantized,
    require,
)
from moelora_jax.models.parameters import Parameter

ARCHITECTURE = "OlmoeForCausalLM"

_DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "rope_theta": 10000.0}


def read_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The model's description from a checkpoint's config.json, as transformers 4 or 5 writes it.

    Raises:
        CheckpointError: a key is missing, or asks for something that is not supported.
    """
    values = known_values(raw, _DEFAULTS)
    require(
        values,
        "hidden_size",
        "num_attention_heads",
        "num_experts",
        "num_experts_per_tok",
        "intermediate_size",
    )
    refuse_other(values, hidden_act="silu")
    refuse_quantized(values)
    clip = values.get("clip_qkv")
    return read_decoder_config(
        values,
        ARCHITECTURE,
        MoeConfig(
            num_experts=values["num_experts"],
            top_k=values["num_experts_per_tok"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            renormalize=bool(values.get("norm_topk_prob", False)),
        ),
        num_kv_heads=values.get("num_key_value_heads", values["num_attention_heads"]),
        qk_norm="projection",
        clip_qkv=None if clip is None else float(clip),
    )


def checkpoint_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Where each stacked parameter comes from in a checkpoint of transformers."""
    experts = per_expert_parameters(config, "mlp", "gate_proj", "up_proj", "down_proj")
    return {**dict(shared_parameters(config)), **dict(experts)}
