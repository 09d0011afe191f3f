"""``adapter_config.json``: the options that PEFT saves beside an adapter's tensors, read strictly.

Every option is either used here, known to have no effect on what a trained adapter computes, or
refused unless its value leaves it switched off. So no option is ever overlooked.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from moelora_jax.errors import AdapterError

FILE_NAME = "adapter_config.json"

#: Options that only say how an adapter was trained, or which modules were chosen for it, which the
#: tensors tell as well. Any value is accepted.
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "qalora_group_size",
        "revision",
        # Written by tools that do not save by PEFT: verl, SkyRL.
        "runtime_config",
        "task_type",
        "velora_config",
    }
)

#: Options that change what an adapter computes in a way that is not supported, and how.
_REFUSED = {
    "alora_invocation_tokens": "the adapter is active only after certain tokens",
    "arrow_config": "the adapter mixes several others by routing",
    "bias": "the adapter replaces biases of the model",
    "fan_in_fan_out": "the base weights are stored transposed",
    "init_lora_weights": "the adapter belongs to base weights that its initialisation changed; "
    "save it converted to a plain LoRA (path_initial_model_for_weight_conversion in PEFT)",
    "kasa_config": "the adapter belongs to truncated base weights",
    "layer_replication": "the adapter is for a model with repeated layers",
    "lora_bias": "the adapter adds a bias to lora_B",
    "modules_to_save": "the adapter replaces whole modules of the model",
    "monteclora_config": "the adapter samples its factors",
    "trainable_token_indices": "the adapter changes rows of the embedding",
    "use_bdlora": "the factors are block-diagonal",
    "use_dora": "DoRA rescales the base weights",
    "use_qalora": "the adapter pools its inputs",
}

_MERGE = "; PEFT's merge_and_unload makes a base model of it, if it can be one"

#: Values of refused options that are plain LoRA, besides None, False and empty ones.
_HARMLESS: Mapping[str, Collection[object]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"),
}


@dataclass(frozen=True)
class AdapterConfig:
    """The options of an adapter that decide how its tensors are read.

    The methods take the *name* of what a pair of factors changes, as PEFT spells it: the name of a
    module (``model.layers.0.self_attn.q_proj``), or of a parameter where PEFT adapts a parameter
    (``model.layers.0.mlp.experts.down_proj``).

    Attributes:
        path: the file, for messages.
        rank: the rank of every factor that no pattern names.
        alpha: likewise, the alpha.
        rank_pattern: regular expression to rank; see :meth:`rank_of`.
        alpha_pattern: regular expression to alpha.
        use_rslora: scaling is alpha/√rank instead of alpha/rank.
        target_modules: names or name endings of the adapted modules, or one regular expression.
        target_parameters: names or name endings of the adapted parameters.
        excludes: whether some modules were left out, though a target names them.
        ensure_weight_tying: whether embedding and head change alike where the model ties them.
        peft_version: the version of PEFT that saved the adapter, if it is known.
        base_model: name or path of the base model, if the file tells; for people and other tools.
    """

    path: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    target_modules: tuple[str, ...] | str
    target_parameters: tuple[str, ...]
    excludes: bool
    ensure_weight_tying: bool
    peft_version: str | None
    base_model: str | None

    def rank_of(self, name: str) -> int:
        """The rank of the factors that change ``name``.

        Raises:
            AdapterError: if several patterns match the name and disagree.
        """
        return self._match("rank_pattern", self.rank_pattern, name, self.rank)

    def scaling_of(self, name: str) -> float:
        """The scaling of the update of ``name``: alpha/rank, or alpha/√rank with ``use_rslora``.

        Raises:
            AdapterError: if several patterns match the name and disagree.
        """
        rank = self.rank_of(name)
        alpha = self._match("alpha_pattern", self.alpha_pattern, name, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets_parameter(self, name: str) -> bool:
        """Whether ``target_parameters`` names this parameter."""
        return any(_is_named_by(name, target) for target in self.target_parameters)

    def exchanges_experts(self) -> bool | None:
        """Whether PEFT older than 0.19 saved this, which exchanges A and B of expert parameters.

        None if that cannot be told: the version is missing, or it is a development version from
        between the last release that did and the first that did not.
        """
        found = re.match(r"(\d{1,4})\.(\d{1,4})\.", self.peft_version or "")
        if found is None:
            return None
        if (int(found[1]), int(found[2])) >= (0, 19):
            return False
        return None if "dev" in found.string else True

    def check_targets(self, names: Collection[str], in_model: Callable[[str], bool]) -> None:
        """Check that everything that the config says is adapted has tensors in the file.

        As for PEFT, a target that the model has no module for is none, as long as another one is:
        many trainers list the names of all families.

        Args:
            names: every module and parameter that the file's tensors change.
            in_model: whether the model has modules that a target names.

        Raises:
            AdapterError: naming the target without tensors.
        """
        if isinstance(self.target_modules, str):
            pattern = self.target_modules
            # "all-linear" is PEFT's word for every linear layer, not a pattern.
            if pattern != "all-linear" and not any(re.fullmatch(pattern, name) for name in names):
                _fail(self.path, "target_modules", f"{pattern!r} matches no tensor in the file")
        named = {
            "target_modules": () if isinstance(self.target_modules, str) else self.target_modules,
            "target_parameters": self.target_parameters,
        }
        for key, targets in named.items():
            absent = [t for t in targets if not any(_is_named_by(name, t) for name in names)]
            for target in absent:
                expected = key == "target_parameters" or (in_model(target) and not self.excludes)
                if expected or len(absent) == len(targets):
                    _fail(
                        self.path,
                        key,
                        f"the file has no tensors for {target!r}; take it out if none were trained",
                    )

    def _match[T](self, key: str, pattern: Mapping[str, T], name: str, default: T) -> T:
        """The value of the patterns that match ``name``, or the default if none does."""
        values = {
            value for part, value in pattern.items() if re.match(_pattern_expression(part), name)
        }
        if len(values) > 1:
            # While training, PEFT takes the first; but saving sorts them, so the first is lost.
            _fail(self.path, key, f"gives {name} several values: {values}")
        return values.pop() if values else default


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read and check the ``adapter_config.json`` of an adapter folder.

    Raises:
        AdapterError: if the file is missing or not JSON, a value has the wrong type, or an option
            is unknown or unsupported and not switched off.
    """
    path = folder / FILE_NAME
    options = _read_json(path)
    if options.get("peft_type") != "LORA":
        _fail(path, "peft_type", f"must be 'LORA', not {options.get('peft_type')!r}")
    for key in sorted(options.keys() - _VALID.keys() - _WITHOUT_EFFECT - {"peft_type"}):
        value = options[key]
        if value and value not in _HARMLESS.get(key, ()):
            reason = _REFUSED.get(key, "this option is not known")
            merge = "" if key not in _REFUSED else _MERGE
            _fail(path, key, f"{reason} (value {value!r}): not supported{merge}")
    for key, (is_valid, wanted) in _VALID.items():
        if not is_valid(options.get(key)):
            _fail(path, key, f"must be {wanted}, not {options.get(key)!r}")
    target_modules = options.get("target_modules") or ()
    alphas = options.get("alpha_pattern") or {}
    base_model = options.get("base_model_name_or_path")
    return AdapterConfig(
        path=path,
        rank=options["r"],
        alpha=float(options["lora_alpha"]),
        rank_pattern=options.get("rank_pattern") or {},
        alpha_pattern={key: float(alpha) for key, alpha in alphas.items()},
        use_rslora=bool(options.get("use_rslora")),
        target_modules=target_modules if isinstance(target_modules, str) else tuple(target_modules),
        target_parameters=tuple(options.get("target_parameters") or ()),
        excludes=bool(options.get("exclude_modules")),
        ensure_weight_tying=bool(options.get("ensure_weight_tying")),
        peft_version=options.get("peft_version"),
        base_model=base_model if isinstance(base_model, str) else None,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        options = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except FileNotFoundError as cause:
        raise AdapterError(f"{path}: no such file; is this an adapter folder?") from cause
    except (OSError, ValueError, RecursionError) as cause:
        raise AdapterError(f"{path}: not a readable JSON file: {cause}") from cause
    if not isinstance(options, dict):
        raise AdapterError(f"{path}: must hold one JSON object")
    return options


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    options = dict(pairs)
    if len(options) < len(pairs):
        raise ValueError(f"a key occurs twice among {[key for key, _ in pairs]}")
    return options


def _pattern_expression(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _is_named_by(name: str, target: str) -> bool:
    """Whether ``target`` is ``name``, or the end of it after a dot."""
    return name == target or name.endswith(f".{target}")


def _fail(path: Path, key: str, reason: str) -> NoReturn:
    raise AdapterError(f"{path}: {key}: {reason}")


def _is_rank(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_alpha(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # False for NaN, and for integers that no float can hold.
    return abs(value) <= sys.float_info.max


def _is_alpha_of_all(value: object) -> bool:
    # verl's model merger writes 0, because it does not know; the adapter would change nothing.
    return _is_alpha(value) and value != 0


def _is_switch(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _is_version(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_names(value: object) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    )


def _is_names_or_expression(value: object) -> bool:
    return _is_expression(value) if isinstance(value, str) else _is_names(value)


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _is_pattern_of(is_value: Callable[[object], bool]) -> Callable[[object], bool]:
    def is_pattern(value: object) -> bool:
        return value is None or (
            isinstance(value, dict)
            and all(_is_expression(_pattern_expression(key)) for key in value)
            and all(is_value(item) for item in value.values())
        )

    return is_pattern


#: The options that are used, how each is checked, and what it must be.
_VALID: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_rank, "a positive integer"),
    "lora_alpha": (_is_alpha_of_all, "the finite number of the training, not 0"),
    "rank_pattern": (
        _is_pattern_of(_is_rank),
        "an object of regular expressions and positive integers",
    ),
    "alpha_pattern": (
        _is_pattern_of(_is_alpha),
        "an object of regular expressions and finite numbers",
    ),
    "use_rslora": (_is_switch, "true or false"),
    "target_modules": (_is_names_or_expression, "a list of names or one regular expression"),
    "target_parameters": (_is_names, "a list of names"),
    "exclude_modules": (_is_names_or_expression, "a list of names or one regular expression"),
    "ensure_weight_tying": (_is_switch, "true or false"),
    "peft_version": (_is_version, "a string"),
}
