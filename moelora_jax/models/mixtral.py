"""Mixtral: plain attention, in some checkpoints with a sliding window; experts in every layer."""

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

ARCHITECTURE = "MixtralForCausalLM"

_DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 1e6}


def read_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The model's description from a checkpoint's config.json, as transformers 4 or 5 writes it.

    Raises:
        CheckpointError: a key is missing, or asks for something that is not supported.
    """
    values = known_values(raw, _DEFAULTS)
    require(
        values,
        "hidden_size",
        "num_hidden_layers",
        "num_local_experts",
        "num_experts_per_tok",
        "intermediate_size",
    )
    refuse_other(values, hidden_act="silu", attention_bias=False)
    refuse_quantized(values)
    window = values.get("sliding_window")
    return read_decoder_config(
        values,
        ARCHITECTURE,
        MoeConfig(
            num_experts=values["num_local_experts"],
            top_k=values["num_experts_per_tok"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
        ),
        sliding_window=window,
        sliding_layers=() if window is None else tuple(range(values["num_hidden_layers"])),
    )


def checkpoint_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Where each stacked parameter comes from in a checkpoint of transformers."""
    experts = per_expert_parameters(config, "block_sparse_moe", gate="w1", up="w3", down="w2")
    return {**dict(shared_parameters(config)), **dict(experts)}
