"""Reading config.json as transformers 4 or 5 writes it: the parts that the models share."""

import math
from collections.abc import Mapping
from typing import Any

from moelora_jax.config import ModelConfig, MoeConfig, RopeConfig, YarnScaling
from moelora_jax.errors import CheckpointError

# Whole numbers, whatever the model.
_COUNTS = {
    "decoder_sparse_step",
    "first_k_dense_replace",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "kv_lora_rank",
    "max_position_embeddings",
    "moe_intermediate_size",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_local_experts",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "sliding_window",
    "topk_group",
    "v_head_dim",
    "vocab_size",
}
_ROPE_KEYS = {"rope_type", "type", "rope_theta"}
_YARN_KEYS = _ROPE_KEYS | {
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "truncate",
    "mscale",
    "mscale_all_dim",
}


def known_values(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json without its nulls, completed.

    Args:
        raw: the content.
        defaults: what transformers assumes where the file says nothing.

    Raises:
        CheckpointError: a size is not a whole number.
    """
    values = {key: value for key, value in raw.items() if value is not None}
    for key in sorted(_COUNTS & values.keys()):
        if type(values[key]) is not int or values[key] < 0:
            raise CheckpointError(
                f"config.json: {key} must be a whole number of at least 0, not {values[key]!r}"
            )
    # One number has two names, whichever version of transformers wrote the file.
    for key, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if other in values:
            values.setdefault(key, values[other])
    return dict(defaults) | values


def require(values: Mapping[str, Any], *keys: str) -> None:
    """Refuse a config without these keys."""
    missing = [key for key in keys if key not in values]
    if missing:
        raise CheckpointError(f"config.json: {', '.join(missing)} missing")


def refuse_other(values: Mapping[str, Any], **supported: Any) -> None:
    """Refuse values other than the supported ones; a key may be missing."""
    for key, value in supported.items():
        if values.get(key, value) != value:
            raise CheckpointError(
                f"config.json: {key} {values[key]!r} is not supported; only {value!r} is"
            )


def refuse_quantized(values: Mapping[str, Any]) -> None:
    """Refuse checkpoints whose weights are not plain floating-point numbers."""
    if values.get("quantization_config"):
        raise CheckpointError("config.json: quantization_config is not supported; use a bf16 model")


def read_decoder_config(
    values: Mapping[str, Any], architecture: str, moe: MoeConfig, **options: Any
) -> ModelConfig:
    """What the models' configs say alike.

    Args:
        values: from :func:`known_values`; ``rms_norm_eps``, ``max_position_embeddings`` and
            ``rope_theta`` need defaults.
        architecture: the model's.
        moe: its routed layers.
        options: further fields of the result, or other values for some.

    Raises:
        CheckpointError: a key is missing, or asks for something that is not supported.
    """
    require(
        values,
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    eos = values.get("eos_token_id", [])
    fields = {
        "architecture": architecture,
        "vocab_size": values["vocab_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "num_kv_heads": values["num_key_value_heads"],
        "head_dim": values.get("head_dim")
        or values["hidden_size"] // values["num_attention_heads"],
        "moe": moe,
        "moe_layers": tuple(range(values["num_hidden_layers"])),
        "rope": read_rope(values),
        "norm_eps": values["rms_norm_eps"],
        "attention_bias": bool(values.get("attention_bias", False)),
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "max_position": values["max_position_embeddings"],
        "eos_tokens": tuple(eos) if isinstance(eos, list) else (eos,),
    }
    return ModelConfig(**fields | options)


def read_rope(values: Mapping[str, Any]) -> RopeConfig:
    """``rope_parameters`` of transformers 5, or ``rope_theta`` and ``rope_scaling`` of 4.

    Raises:
        CheckpointError: the positions are not plain rotary ones or those of YaRN.
    """
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise CheckpointError(f"config.json: rope_type {kind!r} is not supported")
    refuse_other(rope, partial_rotary_factor=1.0)
    refuse_other(values, partial_rotary_factor=1.0)
    known = _ROPE_KEYS if kind == "default" else _YARN_KEYS
    unknown = sorted(rope.keys() - known - {"partial_rotary_factor"})
    if unknown:
        raise CheckpointError(f"config.json: {', '.join(unknown)} of rope_type {kind!r} unknown")
    theta = float(rope.get("rope_theta", values["rope_theta"]))
    yarn = None if kind == "default" else _read_yarn(rope, values)
    return RopeConfig(theta, yarn, interleaved=bool(values.get("rope_interleave", False)))


def _read_yarn(rope: Mapping[str, Any], values: Mapping[str, Any]) -> YarnScaling:
    length = values["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings", length)
    factor = float(rope.get("factor", length / original))
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        of_scores, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
        if of_scores and of_all:
            attention_factor = _growth(factor, of_scores) / _growth(factor, of_all)
        else:
            attention_factor = _growth(factor, 1.0)
    return YarnScaling(
        factor=factor,
        original_length=original,
        attention_factor=float(attention_factor),
        beta_fast=float(rope.get("beta_fast", 32)),
        beta_slow=float(rope.get("beta_slow", 1)),
        truncate=bool(rope.get("truncate", True)),
        score_factor=_growth(factor, float(rope.get("mscale_all_dim", 0))) ** 2,
    )


def _growth(factor: float, slope: float) -> float:
    """How much larger queries and keys become, so that attention stays as sharp as it was."""
    return 1.0 if factor <= 1 else 0.1 * slope * math.log(factor) + 1.0
