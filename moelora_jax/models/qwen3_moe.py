"""Qwen3-MoE: attention with normalised heads, routed experts, some layers dense."""

from collections.abc import Iterator, Mapping
from typing import Any

from moelora_jax.config import ModelConfig, MoeConfig
from moelora_jax.models.decoder import (
    gated_mlp_parameters,
    per_expert_parameters,
    shared_parameters,
)
from moelora_jax.models.model_config import (
    known_values,
    read_decoder_config,
    refuse_other,
    refuse_quantized,
    require,
)
from moelora_jax.models.parameters import Parameter

ARCHITECTURE = "Qwen3MoeForCausalLM"

_DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 10000.0}


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
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
    )
    refuse_other(values, hidden_act="silu", use_sliding_window=False, use_qk_norm=True)
    refuse_quantized(values)

    sparse_step = values.get("decoder_sparse_step", 1)
    dense = set(values.get("mlp_only_layers", ()))
    moe_layers = tuple(
        layer
        for layer in range(values["num_hidden_layers"])
        if layer not in dense and (layer + 1) % sparse_step == 0
    )
    return read_decoder_config(
        values,
        ARCHITECTURE,
        MoeConfig(
            num_experts=values["num_experts"],
            top_k=values["num_experts_per_tok"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["moe_intermediate_size"],
            renormalize=bool(values.get("norm_topk_prob", False)),
        ),
        moe_layers=moe_layers,
        dense_intermediate_size=values.get("intermediate_size", 0),
        qk_norm="head",
        # Of sliding windows, which are off.
        without_effect=("sliding_window", "max_window_layers"),
    )


def checkpoint_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Where each stacked parameter comes from in a checkpoint of transformers."""
    return dict(_parameters(config))


def _parameters(config: ModelConfig) -> Iterator[tuple[str, Parameter]]:
    yield from shared_parameters(config)
    yield from gated_mlp_parameters(
        "mlp", "mlp", config.dense_layers, config.hidden_size, config.dense_intermediate_size
    )
    if config.moe_layers:
        yield from per_expert_parameters(config, "mlp", "gate_proj", "up_proj", "down_proj")
