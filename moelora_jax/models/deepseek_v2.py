"""DeepSeek-V2: latent attention, shared experts beside routed ones, the first layers dense."""

from collections.abc import Iterator, Mapping
from typing import Any

from moelora_jax.config import LatentConfig, ModelConfig, MoeConfig
from moelora_jax.errors import CheckpointError
from moelora_jax.models.decoder import (
    gated_mlp_parameters,
    per_expert_parameters,
    shared_parameters,
)
from moelora_jax.models.model_config import (
    ConfigValues,
    known_values,
    read_decoder_config,
    refuse_other,
    refuse_quantized,
    require,
)
from moelora_jax.models.parameters import Parameter
from moelora_kernels import ExpertGroups

ARCHITECTURE = "DeepseekV2ForCausalLM"

_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "rope_interleave": True,
}


def read_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The model's description from a checkpoint's config.json, as transformers 4 or 5 writes it.

    Raises:
        CheckpointError: a key is missing, or asks for something that is not supported.
    """
    values = known_values(raw, _DEFAULTS)
    refuse_other(
        values,
        scoring_func="softmax",
        mlp_bias=False,
        rope_interleave=True,
        # transformers ignores it, other implementations do not agree on what it means.
        norm_topk_prob=False,
    )
    groups = None
    if values["topk_method"] == "group_limited_greedy":
        require(values, "n_group", "topk_group")
        groups = ExpertGroups(values["n_group"], values["topk_group"])
    elif values["topk_method"] != "greedy":
        raise CheckpointError(
            f"config.json: topk_method {values['topk_method']!r} is not supported"
        )
    return read_deepseek_config(values, ARCHITECTURE, groups=groups, renormalize=False)


def read_deepseek_config(values: ConfigValues, architecture: str, **router: Any) -> ModelConfig:
    """What the configs of DeepSeek-V2 and -V3 say alike.

    Args:
        values: from :func:`~moelora_jax.models.model_config.known_values`, with defaults.
        architecture: the model's.
        router: how experts are chosen: fields of :class:`~moelora_jax.config.MoeConfig`.

    Raises:
        CheckpointError: a key is missing, or asks for something that is not supported.
    """
    require(
        values,
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    )
    heads = values["num_attention_heads"]
    head_dim = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    refuse_other(
        values,
        hidden_act="silu",
        moe_layer_freq=1,
        num_key_value_heads=heads,
        num_experts=values["n_routed_experts"],
        qk_head_dim=head_dim,
    )
    refuse_quantized(values)
    return read_decoder_config(
        values,
        architecture,
        MoeConfig(
            num_experts=values["n_routed_experts"],
            top_k=values["num_experts_per_tok"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["moe_intermediate_size"],
            routed_scaling=float(values["routed_scaling_factor"]),
            **router,
        ),
        num_kv_heads=heads,
        head_dim=head_dim,
        latent=LatentConfig(
            query_rank=values.get("q_lora_rank"),
            key_value_rank=values["kv_lora_rank"],
            rope_dim=values["qk_rope_head_dim"],
            value_dim=values["v_head_dim"],
        ),
        moe_layers=tuple(range(values["first_k_dense_replace"], values["num_hidden_layers"])),
        dense_intermediate_size=values["intermediate_size"],
        shared_intermediate_size=values["n_shared_experts"] * values["moe_intermediate_size"],
        without_effect=(
            # What transformers 5 calls so is the rotated part of a head.
            "head_dim",
            # Of routers that choose groups of experts.
            "n_group",
            "topk_group",
            # Layers behind the last one, which predict more tokens.
            "num_nextn_predict_layers",
            "num_mtp_layers",
        ),
    )


def checkpoint_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Where each stacked parameter comes from in a checkpoint of transformers."""
    return dict(_parameters(config))


def _parameters(config: ModelConfig) -> Iterator[tuple[str, Parameter]]:
    hidden = config.hidden_size
    dense, shared = config.dense_intermediate_size, config.shared_intermediate_size
    yield from shared_parameters(config)
    yield from gated_mlp_parameters("mlp", "mlp", config.dense_layers, hidden, dense)
    yield from gated_mlp_parameters(
        "shared_experts", "mlp.shared_experts", config.moe_layers, hidden, shared
    )
    if config.moe_layers:
        yield from per_expert_parameters(config, "mlp", "gate_proj", "up_proj", "down_proj")
