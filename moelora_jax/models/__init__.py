"""The model families, and loading one from a checkpoint folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from moelora_jax.adapters.module_names import (
    DEEPSEEK_NAMES,
    GPT_OSS_NAMES,
    MIXTRAL_NAMES,
    QWEN3_MOE_NAMES,
    ModuleNames,
)
from moelora_jax.config import ModelConfig
from moelora_jax.errors import CheckpointError
from moelora_jax.models import deepseek_v2, deepseek_v3, gpt_oss, mixtral, olmoe, qwen3_moe
from moelora_jax.models.checkpoint import load_parameters, read_config
from moelora_jax.models.decoder import Decoder
from moelora_jax.models.orbax_checkpoint import is_orbax, load_orbax, save_orbax
from moelora_jax.models.parameters import Parameter

__all__ = [
    "FAMILIES",
    "ModelFamily",
    "build_model",
    "convert_checkpoint",
    "family_of",
    "load_model",
    "model_arrays",
    "read_model_config",
]


@dataclass(frozen=True)
class ModelFamily:
    """All that the rest of the project needs to know of one model architecture.

    Attributes:
        module: the flax module; called as ``module(config, dtype=..., rngs=...)``.
        read_config: from config.json to the model's description.
        parameters: from the description to where each stacked parameter comes from.
        module_names: how adapters name the model's modules.
        ignored_tensors: shell-style patterns of tensors that a checkpoint may hold without being
            used; ``{num_layers}`` in them is the number of layers.
    """

    module: Callable[..., nnx.Module]
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    parameters: Callable[[ModelConfig], dict[str, Parameter]]
    module_names: ModuleNames
    ignored_tensors: Sequence[str] = ()


_MODELOPT = "hf_quant_config.json"
# Some old checkpoints hold what can be computed from the config.
_ROTARY_FREQUENCIES = "model.layers.*.self_attn.rotary_emb.inv_freq"
# The layer behind the last one, which predicts one more token; it is of use for speculation only.
_NEXT_TOKENS = "model.layers.{num_layers}.*"

#: By the entry of ``architectures`` in config.json.
FAMILIES: dict[str, ModelFamily] = {
    qwen3_moe.ARCHITECTURE: ModelFamily(
        module=Decoder,
        read_config=qwen3_moe.read_model_config,
        parameters=qwen3_moe.checkpoint_parameters,
        module_names=QWEN3_MOE_NAMES,
        ignored_tensors=(_ROTARY_FREQUENCIES,),
    ),
    olmoe.ARCHITECTURE: ModelFamily(
        module=Decoder,
        read_config=olmoe.read_model_config,
        parameters=olmoe.checkpoint_parameters,
        module_names=QWEN3_MOE_NAMES,  # OLMoE names its modules alike.
        ignored_tensors=(_ROTARY_FREQUENCIES,),
    ),
    mixtral.ARCHITECTURE: ModelFamily(
        module=Decoder,
        read_config=mixtral.read_model_config,
        parameters=mixtral.checkpoint_parameters,
        module_names=MIXTRAL_NAMES,
        ignored_tensors=(_ROTARY_FREQUENCIES,),
    ),
    gpt_oss.ARCHITECTURE: ModelFamily(
        module=Decoder,
        read_config=gpt_oss.read_model_config,
        parameters=gpt_oss.checkpoint_parameters,
        module_names=GPT_OSS_NAMES,
    ),
    deepseek_v2.ARCHITECTURE: ModelFamily(
        module=Decoder,
        read_config=deepseek_v2.read_model_config,
        parameters=deepseek_v2.checkpoint_parameters,
        module_names=DEEPSEEK_NAMES,
        ignored_tensors=(_ROTARY_FREQUENCIES,),
    ),
    deepseek_v3.ARCHITECTURE: ModelFamily(
        module=Decoder,
        read_config=deepseek_v3.read_model_config,
        parameters=deepseek_v3.checkpoint_parameters,
        module_names=DEEPSEEK_NAMES,
        ignored_tensors=(_ROTARY_FREQUENCIES, _NEXT_TOKENS),
    ),
}


def family_of(raw: Mapping[str, Any]) -> ModelFamily:
    """The family of a checkpoint, from its config.json.

    Raises:
        CheckpointError: the architecture is not supported.
    """
    architectures = raw.get("architectures") or []
    for name, family in FAMILIES.items():
        if isinstance(architectures, list) and name in architectures:
            return family
    raise CheckpointError(
        f"config.json: architectures {architectures} are not supported; "
        f"supported are {', '.join(sorted(FAMILIES))}"
    )


def read_model_config(folder: str | Path) -> tuple[ModelFamily, ModelConfig]:
    """The family and the description of the model in a checkpoint folder.

    Raises:
        CheckpointError: config.json is missing, damaged or of an unsupported model.
    """
    raw = read_config(folder)
    # ModelOpt quantizes weights and leaves config.json as it is.
    if (Path(folder) / _MODELOPT).exists():
        raise CheckpointError(
            f"{folder}: {_MODELOPT}: quantized weights are not supported; use a bf16 model"
        )
    try:
        family = family_of(raw)
        return family, family.read_config(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except ValueError as error:  # A description that contradicts itself.
        raise CheckpointError(f"{folder}: config.json: {error}") from error


def load_model(
    folder: str | Path, dtype: DTypeLike, *, progress: bool = False
) -> tuple[nnx.Module, ModelConfig, ModelFamily]:
    """Read a checkpoint folder: one of transformers, or a copy that was converted from one.

    Args:
        folder: config.json and safetensors, sharded or not; or what :func:`convert_checkpoint`
            wrote.
        dtype: compute dtype; parameters of transformers are rounded to it, converted ones have it.
        progress: show a progress bar.

    Raises:
        CheckpointError: the folder is incomplete, damaged or of an unsupported model.
    """
    family, config = read_model_config(folder)
    parameters = family.parameters(config)
    if is_orbax(folder):
        arrays = load_orbax(folder, parameters, dtype)
    else:
        ignored = [name.format(num_layers=config.num_layers) for name in family.ignored_tensors]
        same = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {}
        arrays = load_parameters(
            folder, parameters, dtype, ignore=ignored, same=same, progress=progress
        )
    return build_model(family, config, arrays, dtype), config, family


def convert_checkpoint(
    source: str | Path, destination: str | Path, dtype: DTypeLike, *, progress: bool = False
) -> None:
    """Write a copy of a checkpoint with orbax, in the stacked form that the models use.

    Other programs in JAX can read it. It does not load faster: on two cores, 2.7 GB took 8 s from
    the files of transformers and 37 s from the copy.

    Args:
        source: a checkpoint folder of transformers.
        destination: a folder that does not exist yet; :func:`load_model` reads it.
        dtype: compute dtype.
        progress: show a progress bar.

    Raises:
        CheckpointError: the source cannot be read, or the destination exists.
    """
    model, _, _ = load_model(source, dtype, progress=progress)
    save_orbax(destination, model_arrays(model), read_config(source))


def build_model(
    family: ModelFamily, config: ModelConfig, arrays: Mapping[str, jax.Array], dtype: DTypeLike
) -> nnx.Module:
    """A module around given parameters.

    Args:
        family: the model's family.
        config: the model's description.
        arrays: every parameter by its dotted path in the module.
        dtype: dtype of the arrays.
    """
    skeleton = nnx.eval_shape(lambda: family.module(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(skeleton)
    flat = nnx.to_flat_state(state)
    paths = {".".join(map(str, path)) for path, _ in flat}
    if paths != set(arrays):
        raise CheckpointError(
            f"parameters of {config.architecture} do not match its module: "
            f"{sorted(paths ^ set(arrays))}"
        )
    filled = [(path, variable.replace(arrays[".".join(map(str, path))])) for path, variable in flat]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def model_arrays(model: nnx.Module) -> dict[str, jax.Array]:
    """Every parameter of a module by its dotted path: the inverse of :func:`build_model`."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable[...] for path, variable in flat}
