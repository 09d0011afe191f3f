"""DeepSeek-V3: DeepSeek-V2 with another router, whose choice a bias corrects."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from moelora_jax.config import ModelConfig
from moelora_jax.models import deepseek_v2
from moelora_jax.models.decoder import each_layer
from moelora_jax.models.model_config import known_values, refuse_other, require
from moelora_jax.models.parameters import Parameter
from moelora_kernels import ExpertGroups

ARCHITECTURE = "DeepseekV3ForCausalLM"

_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "norm_topk_prob": True,
}


def read_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The model's description from a checkpoint's config.json, as transformers 4 or 5 writes it.

    Raises:
        CheckpointError: a key is missing, or asks for something that is not supported.
    """
    values = known_values(raw, _DEFAULTS)
    require(values, "n_group", "topk_group", "first_k_dense_replace", "routed_scaling_factor")
    refuse_other(values, scoring_func="sigmoid", topk_method="noaux_tc")
    return deepseek_v2.read_deepseek_config(
        values,
        ARCHITECTURE,
        scoring="sigmoid",
        renormalize=bool(values["norm_topk_prob"]),
        correction_bias=True,
        groups=ExpertGroups(values["n_group"], values["topk_group"], summed=2),
    )


def checkpoint_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Where each stacked parameter comes from in a checkpoint of transformers."""
    parameters = deepseek_v2.checkpoint_parameters(config)
    if config.moe_layers:
        name, shape = "mlp.gate.e_score_correction_bias", (config.moe.num_experts,)
        parameters["experts.correction_bias"] = replace(
            each_layer(shape, name, config.moe_layers), dtype=jnp.float32
        )
    return parameters
