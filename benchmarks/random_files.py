"""Checkpoint and adapter folders of real widths with random weights, written quickly.

    python -m benchmarks.random_files --model qwen3-30b-a3b --layers 4 --adapters 4 FOLDER

writes ``FOLDER/model``, in shards as large models have them, and ``FOLDER/adapters/NAME``. The
numbers of all weights repeat those of one block, each tensor from another place of it.
"""

import argparse
import functools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from benchmarks.whole_model import MODELS as WHOLE_MODELS
from moelora_jax.adapters.adapter import Adapter, LowRankUpdate, Target
from moelora_jax.adapters.writer import Layout, save_adapter
from moelora_jax.cli.demo_files import write_tokenizer
from moelora_jax.config import LoraSite, ModelConfig
from moelora_jax.errors import CheckpointError
from moelora_jax.files import new_folder
from moelora_jax.models import ModelFamily, family_of
from moelora_jax.models.parameters import Parameter

_YARN = {
    "rope_type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 4096,
}
_LATENT = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 163840,
}

#: What decides the shapes, from the models' config.json. DeepSeek-V3 has 32 of its 256 experts: one
#: layer of all has 11 billion parameters.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {"model_type": "qwen3_moe"} | WHOLE_MODELS["qwen3-30b-a3b"],
    "gpt-oss-20b": {"model_type": "gpt_oss"} | WHOLE_MODELS["gpt-oss-20b"],
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
    },
    "olmoe-1b-7b": {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
    },
    "deepseek-v2-lite": _LATENT
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "routed_scaling_factor": 1.0,
        "rope_theta": 10000.0,
        "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek-v3": _LATENT
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "n_routed_experts": 32,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "topk_method": "noaux_tc",
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "rope_theta": 10000.0,
        "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
}

#: Widths for trying these programs on a CPU.
_TINY = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_attention_heads": 4,
    "head_dim": 16,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
}


def model_config(
    name: str, *, layers: int | None = None, vocabulary: int | None = None, tiny: bool = False
) -> dict[str, Any]:
    """A config.json of a model, with fewer layers, a smaller vocabulary, or of tiny widths."""
    raw = dict(MODELS[name])
    if tiny:
        raw |= {key: value for key, value in _TINY.items() if raw.get(key) is not None}
        heads = raw["num_attention_heads"]
        raw["num_key_value_heads"] = heads if "kv_lora_rank" in raw else heads // 2
    if layers is not None:
        raw["num_hidden_layers"] = layers
        if "layer_types" in raw:
            raw["layer_types"] = raw["layer_types"][:layers]
    if vocabulary is not None:
        raw["vocab_size"] = min(vocabulary, raw["vocab_size"])
    return raw | {"torch_dtype": "bfloat16", "tie_word_embeddings": False}


class Numbers:
    """Normal numbers of one block, over and over; cheap, however many are taken.

    The block's length is prime, so that rows of a matrix repeat none of those near them.
    """

    _LENGTH = 16_777_213

    def __init__(self, seed: int) -> None:
        self._normal = np.random.default_rng(seed).standard_normal(self._LENGTH, np.float32)
        self._scaled = functools.cache(self._scale)

    def _scale(self, scale: float, mean: float, dtype: np.dtype) -> np.ndarray:
        return (mean + scale * self._normal).astype(dtype)

    def pieces(
        self, name: str, count: int, scale: float, mean: float = 0.0, dtype: Any = jnp.bfloat16
    ) -> Iterator[np.ndarray]:
        """Arrays of ``count`` numbers together, from a place of the block that the name decides."""
        block = self._scaled(scale, mean, np.dtype(dtype))
        start = zlib.crc32(name.encode()) % block.size
        while count:
            piece = block[start : start + count]
            yield piece
            count -= piece.size
            start = 0

    def take(self, name: str, shape: tuple[int, ...], scale: float) -> np.ndarray:
        """A bfloat16 array of its own."""
        pieces = self.pieces(name, math.prod(shape), scale)
        return np.concatenate([*pieces]).reshape(shape)


def _distribution(tensor: str, shape: tuple[int, ...], transposed: bool) -> tuple[float, float]:
    """Standard deviation and mean of a tensor's numbers: hidden states stay near 1.

    Router logits are a few units apart, as those of trained models are.
    """
    if "norm" in tensor:
        return 0.1, 1.0
    if tensor.endswith(("bias", "sinks")):
        return 0.1, 0.0
    if "embed_tokens" in tensor:
        return 1.0, 0.0
    gain = 2.0 if tensor.endswith((".gate.weight", ".router.weight")) else 1.0
    return gain * shape[-2 if transposed else -1] ** -0.5, 0.0


def write_checkpoint(
    folder: Path, raw: dict[str, Any], *, seed: int = 0, shard_bytes: int = 10**9
) -> int:
    """Write a checkpoint of transformers with random weights, and return its bytes.

    It is written piece by piece, while the library of the format wants each file as a whole in
    memory: JSON with the place of each tensor, then the tensors.

    Args:
        folder: must not exist.
        raw: becomes config.json.
        seed: of the weights.
        shard_bytes: of a file, about.
    """
    family = family_of(raw)
    numbers = Numbers(seed)
    tensors = {
        tensor: parameter
        for parameter in family.parameters(family.read_config(raw)).values()
        for tensor in parameter.pieces
    }
    shards: list[dict[str, Parameter]] = [{}]
    room = shard_bytes
    for tensor, parameter in tensors.items():
        if shards[-1] and _num_bytes(parameter) > room:
            shards.append({})
            room = shard_bytes
        shards[-1][tensor] = parameter
        room -= _num_bytes(parameter)
    with new_folder(folder, CheckpointError) as new:
        (new / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
        files = {}
        with ThreadPoolExecutor() as threads:
            written = []
            for number, shard in enumerate(shards, start=1):
                name = f"model-{number:05}-of-{len(shards):05}.safetensors"
                written.append(threads.submit(_write_shard, new / name, shard, numbers))
                files |= dict.fromkeys(shard, name)
            for one in written:
                one.result()
        total = sum(map(_num_bytes, tensors.values()))
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (new / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _dtype(parameter: Parameter) -> np.dtype:
    return parameter.dtype_in(np.dtype(jnp.bfloat16))


def _num_bytes(parameter: Parameter) -> int:
    return math.prod(parameter.tensor_shape) * _dtype(parameter).itemsize


def _write_shard(path: Path, shard: dict[str, Parameter], numbers: Numbers) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, parameter in shard.items():
        start, end = end, end + _num_bytes(parameter)
        kind = {2: "BF16", 4: "F32"}[_dtype(parameter).itemsize]
        header[tensor] = {
            "dtype": kind,
            "shape": parameter.tensor_shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, parameter in shard.items():
            shape = parameter.tensor_shape
            scale, mean = _distribution(tensor, shape, parameter.axes is not None)
            count = math.prod(shape)
            for piece in numbers.pieces(tensor, count, scale, mean, _dtype(parameter)):
                file.write(piece.view(np.uint8).data)


# Adapters: about a quarter to a half as large as what they change, in bfloat16.


def made_adapter(
    sites: Iterable[LoraSite], rank: int, numbers: Numbers, *, one_a: bool = False
) -> Adapter:
    """An adapter of every layer and expert of some sites.

    Args:
        sites: to change.
        rank: of each factor.
        numbers: its numbers.
        one_a: whether gate and up have one A.
    """
    updates: dict[Target, LowRankUpdate] = {}
    for site in sites:
        for layer in site.layers:
            for expert in range(site.table_experts):
                target = Target(layer, site.name, expert)
                gate = updates.get(target._replace(site="gate_proj"))
                if one_a and gate is not None and site.name == "up_proj":
                    a = gate.a
                else:
                    shape = rank, site.in_features
                    a = numbers.take(f"{target} a", shape, site.in_features**-0.5)
                b = numbers.take(f"{target} b", (site.out_features, rank), 0.125 * rank**-0.5)
                updates[target] = LowRankUpdate(a, b, scaling=2.0)
    return Adapter("memory", updates)


def write_adapter(
    folder: Path,
    family: ModelFamily,
    config: ModelConfig,
    numbers: Numbers,
    *,
    rank: int,
    layout: Layout,
    changes: Callable[[LoraSite], bool] = lambda site: not site.optional,
) -> None:
    """Write an adapter of the sites that ``changes`` accepts."""
    sites = [site for site in config.lora_sites() if changes(site)]
    save_adapter(
        folder,
        made_adapter(sites, rank, numbers, one_a=layout == "peft_fused"),
        config.lora_sites(),
        layout=layout,
        module_names=family.module_names,
    )


def write_shared_outer(folder: Path, config: ModelConfig, numbers: Numbers, *, rank: int) -> None:
    """Write an adapter as Megatron does: stacked experts that share the outer factors."""
    tensors = {}
    for site in config.lora_sites():
        if not site.num_experts:
            continue
        is_down = site.name == "down_proj"
        for layer in site.layers:
            name = f"base_model.model.model.layers.{layer}.mlp.experts.{site.name}"
            tensors[f"{name}.lora_A.weight"] = numbers.take(
                f"{name} a",
                (site.num_experts if is_down else 1, rank, site.in_features),
                site.in_features**-0.5,
            )
            tensors[f"{name}.lora_B.weight"] = numbers.take(
                f"{name} b",
                (1 if is_down else site.num_experts, site.out_features, rank),
                0.125 * rank**-0.5,
            )
    options = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(options), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")


def write_adapters(
    folder: Path, family: ModelFamily, config: ModelConfig, *, count: int, rank: int, mixed: bool
) -> None:
    """Write adapters ``a00``, ``a01`` and so on; from the ninth on they are links to those before.

    Args:
        folder: where to.
        family: of the model.
        config: of the model.
        count: how many.
        rank: of all factors.
        mixed: whether half of them change attention alone, a quarter experts alone.
    """

    def is_attention(site: LoraSite) -> bool:
        return not site.optional and site.name.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))

    def write(number: int) -> None:
        experts_only, attention_only = mixed and number % 4 == 1, mixed and number % 4 > 1
        write_adapter(
            folder / f"a{number:02}",
            family,
            config,
            Numbers(1 + number),
            rank=rank,
            layout="per_expert" if experts_only else "peft_fused",
            changes=lambda site: (
                bool(site.num_experts)
                if experts_only
                else is_attention(site)
                if attention_only
                else not site.optional
            ),
        )

    distinct = min(count, 8)
    with ThreadPoolExecutor() as threads:
        list(threads.map(write, range(distinct)))
    for number in range(distinct, count):
        link, original = folder / f"a{number:02}", folder / f"a{number % distinct:02}"
        link.mkdir()
        for file in original.iterdir():
            (link / file.name).hardlink_to(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="qwen3-30b-a3b", choices=MODELS)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--mixed", action="store_true", help="some change experts or attention only"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny widths, for a CPU")
    options = parser.parse_args()
    raw = model_config(
        options.model, layers=options.layers, vocabulary=options.vocabulary, tiny=options.tiny
    )
    size = write_checkpoint(options.folder / "model", raw)
    write_tokenizer(options.folder / "model")
    print(f"model: {size:,} bytes", flush=True)
    family = family_of(raw)
    write_adapters(
        options.folder / "adapters",
        family,
        family.read_config(raw),
        count=options.adapters,
        rank=options.rank,
        mixed=options.mixed,
    )
    print(f"adapters: {options.adapters}", flush=True)


if __name__ == "__main__":
    main()
