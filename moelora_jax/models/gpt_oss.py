"""gpt-oss: biases everywhere, attention sinks, a sliding window in every other layer, YaRN.

Experts gate with a clamped swiglu. Their weights are stored for all experts of a layer at once,
transposed, gate and up alternating, as plain numbers or in MXFP4.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from moelora_jax.config import ModelConfig, MoeConfig
from moelora_jax.errors import CheckpointError
from moelora_jax.models.decoder import each_layer, shared_parameters
from moelora_jax.models.model_config import (
    known_values,
    read_decoder_config,
    refuse_other,
    refuse_quantized,
    require,
)
from moelora_jax.models.parameters import Parameter

ARCHITECTURE = "GptOssForCausalLM"

_DEFAULTS = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 150000.0,
    "attention_bias": True,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"


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
        "head_dim",
        "num_local_experts",
        "num_experts_per_tok",
        "intermediate_size",
        "layer_types",
        "sliding_window",
        # transformers assumes its own YaRN where there is none.
        "rope_parameters" if "rope_scaling" not in values else "rope_scaling",
    )
    refuse_other(
        values,
        hidden_act="silu",
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        experts_per_token=values["num_experts_per_tok"],
    )
    if not _is_mxfp4(values.get("quantization_config")):
        refuse_quantized(values)
    layer_types = values["layer_types"]
    if len(layer_types) != values["num_hidden_layers"] or set(layer_types) - {_SLIDING, _FULL}:
        raise CheckpointError(
            f"config.json: layer_types must be {_SLIDING} or {_FULL} for each layer, "
            f"not {layer_types}"
        )
    return read_decoder_config(
        values,
        ARCHITECTURE,
        MoeConfig(
            num_experts=values["num_local_experts"],
            top_k=values["num_experts_per_tok"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            # The same as a softmax over the k best logits.
            scoring="softmax",
            renormalize=True,
            activation="clamped_swiglu",
            router_bias=True,
            expert_bias=True,
        ),
        attention_sinks=True,
        sliding_window=values["sliding_window"],
        sliding_layers=tuple(i for i, kind in enumerate(layer_types) if kind == _SLIDING),
        # The length before YaRN, which rope_scaling has, too.
        without_effect=("initial_context_length",),
    )


def _is_mxfp4(quantization: object) -> bool:
    return isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"


def checkpoint_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Where each stacked parameter comes from in a checkpoint of transformers."""
    return dict(_parameters(config))


def _parameters(config: ModelConfig) -> Iterator[tuple[str, Parameter]]:
    layers, experts = config.moe_layers, config.moe.num_experts
    hidden, inner = config.hidden_size, config.moe.intermediate_size
    yield from shared_parameters(config)
    yield "experts.router", each_layer((experts, hidden), "mlp.router.weight", layers)
    yield "experts.router_bias", each_layer((experts,), "mlp.router.bias", layers)
    yield (
        "experts.gate_up",
        replace(
            each_layer((experts, 2, inner, hidden), "mlp.experts.gate_up_proj", layers),
            axes=((0,), (3,), (2, 1)),  # [experts, hidden, intermediate·2]
            mxfp4_axes=((0,), (2, 1), (3,)),  # [experts, intermediate·2, hidden]
        ),
    )
    yield (
        "experts.gate_up_bias",
        replace(
            each_layer((experts, 2, inner), "mlp.experts.gate_up_proj_bias", layers),
            axes=((0,), (2, 1)),  # [experts, intermediate·2]
        ),
    )
    yield (
        "experts.down",
        replace(
            each_layer((experts, hidden, inner), "mlp.experts.down_proj", layers),
            axes=((0,), (2,), (1,)),  # [experts, intermediate, hidden]
            mxfp4_axes=((0,), (1,), (2,)),  # [experts, hidden, intermediate]
        ),
    )
    yield "experts.down_bias", each_layer((experts, hidden), "mlp.experts.down_proj_bias", layers)
