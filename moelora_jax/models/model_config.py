"""Reading config.json as transformers 4 or 5 writes it: the parts that the models share."""

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from typing import Any

from moelora_jax.config import ModelConfig, MoeConfig, RopeConfig, YarnScaling
from moelora_jax.errors import CheckpointError

#: What does not change the numbers that a model computes: what it is called, how it was trained,
#: how other programs run it, and which tokens they draw.
_WITHOUT_EFFECT = frozenset(
    {
        # Names and versions.
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "finetuning_task",
        "id2label",
        "label2id",
        "model_type",
        "problem_type",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        # Training.
        "attention_dropout",
        "aux_loss_alpha",
        "initializer_range",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "seq_aux",
        # Other programs.
        "_attn_implementation",
        "attn_implementation",
        "ep_size",
        "pretraining_tp",
        "return_dict",
        "torchscript",
        "use_cache",
        # Text; transformers 4 wrote it here in full.
        "bos_token_id",
        "do_sample",
        "length_penalty",
        "max_length",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "pad_token_id",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)
# Two names of one number, whichever version of transformers wrote the file.
_NUM_EXPERTS = ("num_experts", "num_local_experts")
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
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


class ConfigValues(Mapping[str, Any]):
    """The content of a config.json without its nulls, completed; it knows which keys were read.

    So no key is overlooked: :func:`read_decoder_config` refuses those that nobody asked for.

    Args:
        given: the content.
        defaults: what transformers assumes where the file says nothing.
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._values = {**defaults, **given}
        self._unread = dict.fromkeys(given)

    def __getitem__(self, key: str) -> Any:
        self._unread.pop(key, None)
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def unread(self) -> list[str]:
        """Keys of the file that were not read, but for those that are switched off."""
        return [key for key in self._unread if self._values[key]]


def known_values(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> ConfigValues:
    """The content of config.json without its nulls, completed.

    Args:
        raw: the content.
        defaults: what transformers assumes where the file says nothing.

    Raises:
        CheckpointError: a value is not of its key's kind.
    """
    given = {key: value for key, value in raw.items() if value is not None}
    _check_kinds(given)
    experts = {given[key] for key in _NUM_EXPERTS if key in given}
    if len(experts) > 1:
        raise CheckpointError(
            f"config.json: {' and '.join(_NUM_EXPERTS)} mean the same, but are {sorted(experts)}"
        )
    return ConfigValues(given, {**defaults, **{key: n for key in _NUM_EXPERTS for n in experts}})


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
    for key in ("quantization_config", "quantization", "compression_config"):
        found = values.get(key)
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise CheckpointError(
                f"config.json: {key} of quant_method {method!r} is not supported; use a bf16 model"
            )


def read_decoder_config(
    values: ConfigValues,
    architecture: str,
    moe: MoeConfig,
    *,
    without_effect: Collection[str] = (),
    **options: Any,
) -> ModelConfig:
    """What the models' configs say alike.

    Args:
        values: from :func:`known_values`; ``rms_norm_eps``, ``max_position_embeddings`` and
            ``rope_theta`` need defaults.
        architecture: the model's.
        moe: its routed layers.
        without_effect: keys that change nothing in this architecture.
        options: further fields of the result, or other values for some.

    Raises:
        CheckpointError: a key is missing, asks for something that is not supported, or was not
            read by anyone: so this comes last.
    """
    require(values, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    if "num_kv_heads" not in options:
        require(values, "num_key_value_heads")
        options["num_kv_heads"] = values["num_key_value_heads"]
    eos = values.get("eos_token_id", [])
    fields = {
        "architecture": architecture,
        "vocab_size": values["vocab_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "head_dim": values.get("head_dim")
        or values["hidden_size"] // values["num_attention_heads"],
        "moe": moe,
        "moe_layers": tuple(range(values["num_hidden_layers"])),
        "rope": read_rope(values),
        "norm_eps": float(values["rms_norm_eps"]),
        "attention_bias": bool(values.get("attention_bias", False)),
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "max_position": values["max_position_embeddings"],
        "eos_tokens": tuple(eos) if isinstance(eos, list) else (eos,),
    }
    known = {*_WITHOUT_EFFECT, *_NUM_EXPERTS, *without_effect}
    unread = [key for key in values.unread() if key not in known]
    if unread:
        raise CheckpointError(
            f"config.json: {', '.join(unread)} not known for {architecture}, which might change "
            "what the model computes; take it out if it does not"
        )
    return ModelConfig(**fields | options)


def read_rope(values: Mapping[str, Any]) -> RopeConfig:
    """``rope_parameters`` of transformers 5, or ``rope_theta`` and ``rope_scaling`` of 4.

    Raises:
        CheckpointError: the positions are not plain rotary ones or those of YaRN, or the two names
            say different things.
    """
    given = [values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key)]
    found = {_read_rope(rope, values) for rope in given or [{}]}
    if len(found) > 1:
        # Versions of transformers do not agree on which one counts.
        raise CheckpointError(
            "config.json: rope_parameters and rope_scaling contradict each other; leave one of them"
        )
    return found.pop()


def _read_rope(raw: object, values: Mapping[str, Any]) -> RopeConfig:
    if not isinstance(raw, dict):
        raise CheckpointError(f"config.json: rotary positions must be an object, not {raw!r}")
    rope = {key: value for key, value in raw.items() if value is not None}
    _check_kinds(rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise CheckpointError(f"config.json: rope_type {kind!r} is not supported")
    refuse_other(rope, partial_rotary_factor=1.0)
    refuse_other(values, partial_rotary_factor=1.0)
    unknown = sorted(rope.keys() - (_ROPE_KEYS if kind == "default" else _YARN_KEYS))
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
            attention_factor = _growth(factor, float(of_scores)) / _growth(factor, float(of_all))
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


def _check_kinds(values: Mapping[str, Any]) -> None:
    """Refuse values that are not of their keys' kinds."""
    for wanted, (is_kind, keys) in _KINDS.items():
        for key in sorted(keys & values.keys()):
            if not is_kind(values[key]):
                raise CheckpointError(f"config.json: {key} must be {wanted}, not {values[key]!r}")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # False for NaN, and for integers that no float can hold.
    return abs(value) <= sys.float_info.max


def _is_positive(value: object) -> bool:
    return _is_number(value) and value > 0  # type: ignore[operator]


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _are_words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _are_tokens(value: object) -> bool:
    return _is_count(value) or _are_counts(value)


#: What the values of keys must be, whatever the model: in words, how it is checked, and the keys.
_KINDS: Mapping[str, tuple[Callable[[object], bool], Set[str]]] = {
    "a whole number of at least 0": (
        _is_count,
        {
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
            "original_max_position_embeddings",
            "q_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "sliding_window",
            "topk_group",
            "v_head_dim",
            "vocab_size",
        },
    ),
    "a finite number": (
        _is_number,
        {
            "attention_factor",
            "clip_qkv",
            "mscale",
            "mscale_all_dim",
            "rms_norm_eps",
            "routed_scaling_factor",
        },
    ),
    "a positive number": (
        _is_positive,
        {
            "beta_fast",
            "beta_slow",
            "decoder_sparse_step",
            "factor",
            "num_attention_heads",
            "original_max_position_embeddings",
            "rope_theta",
        },
    ),
    "true or false": (
        _is_switch,
        {
            "attention_bias",
            "norm_topk_prob",
            "rope_interleave",
            "tie_word_embeddings",
            "truncate",
            "use_sliding_window",
        },
    ),
    "a list of whole numbers": (_are_counts, {"mlp_only_layers"}),
    "a list of words": (_are_words, {"layer_types"}),
    "a token or a list of tokens": (_are_tokens, {"eos_token_id"}),
}
