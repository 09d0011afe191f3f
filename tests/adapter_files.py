"""Writes adapter folders for tests, and says which dense changes they describe.

Two sources: PEFT itself, which needs PyTorch, and files written here by hand from NumPy.
"""

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from moelora_jax.adapters.adapter import Adapter, LowRankUpdate, Target
from moelora_jax.config import LoraSite, ModelConfig, MoeConfig

#: Dense changes ``[out, in]``; a target that is missing is not changed.
Deltas = dict[Target, np.ndarray]
Tensors = dict[str, np.ndarray]

PREFIX = "base_model.model.model.layers"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_proj", "up_proj", "down_proj")
#: The expert parameters of transformers v5, and the modules that PEFT saves their factors under.
PARAMETERS = {"gate_up_proj": "experts.base_layer", "down_proj": "experts"}
TARGET_PARAMETERS = [f"mlp.experts.{parameter}" for parameter in PARAMETERS]


def tiny_model_config(
    *, hidden_size: int = 48, intermediate_size: int = 20, num_experts: int = 6, num_layers: int = 2
) -> ModelConfig:
    """A Qwen3-MoE whose dimensions all differ, so that no transposition goes unseen."""
    return ModelConfig(
        architecture="Qwen3MoeForCausalLM",
        vocab_size=64,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        moe=MoeConfig(
            num_experts=num_experts,
            top_k=2,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
        ),
        moe_layers=tuple(range(num_layers)),
        qk_norm="head",
    )


def tiny_torch_model(config: ModelConfig, seed: int = 0) -> Any:
    """The Qwen3MoeForCausalLM of PyTorch with these dimensions and random weights."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            moe_intermediate_size=config.moe.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_experts=config.moe.num_experts,
            num_experts_per_tok=config.moe.top_k,
            norm_topk_prob=config.moe.renormalize,
        )
    ).eval()


def save_peft_adapter(model: Any, folder: Path, *, seed: int = 0, **options: Any) -> Deltas:
    """Save an adapter with random factors by PEFT.

    Args:
        model: a Qwen3MoeForCausalLM, left as it is.
        folder: where to save.
        seed: of the factors.
        **options: of ``peft.LoraConfig``.

    Returns:
        By how much PEFT's merging changes every matrix of the model, unchanged ones included.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    before = _torch_weights(model)
    with warnings.catch_warnings():
        # PEFT 0.21 looks for patterns among modules only, though it applies them to parameters.
        warnings.filterwarnings("ignore", r"The following \w+_pattern keys did not", RuntimeWarning)
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1, generator=generator)
    adapted.save_pretrained(str(folder))
    after = _torch_weights(adapted.merge_and_unload())
    return {target: after[target] - before[target] for target in before}


def _torch_weights(model: Any) -> Deltas:
    """Every matrix of a Qwen3MoeForCausalLM that adapters may change, as float64."""
    weights: Deltas = {}
    for layer, block in enumerate(model.model.layers):
        for site in ATTENTION:
            weight = getattr(block.self_attn, site).weight
            weights[Target(layer, site, 0)] = weight.detach().double().numpy().copy()
        experts = block.mlp.experts
        gate_up = experts.gate_up_proj.detach().double().numpy().copy()
        down = experts.down_proj.detach().double().numpy().copy()
        for expert, matrix in enumerate(gate_up):
            gate, up = np.split(matrix, 2)
            weights[Target(layer, "gate_proj", expert)] = gate
            weights[Target(layer, "up_proj", expert)] = up
            weights[Target(layer, "down_proj", expert)] = down[expert]
    return weights


def adapter_options(**changes: Any) -> dict[str, Any]:
    """The content of an ``adapter_config.json``."""
    return {
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "use_dora": False,
        "target_modules": None,
        "target_parameters": None,
    } | changes


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray], options: Any) -> Path:
    """Write an adapter folder of these tensors and options."""
    folder.mkdir(parents=True, exist_ok=True)
    # save_file writes the memory as it lies, so a transposed view must be copied first.
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(options))
    return folder


def linear_tensors(
    config: ModelConfig,
    rng: np.random.Generator,
    *,
    sites: Sequence[str] = ATTENTION,
    rank: int = 4,
    scaling: float = 2.0,
    dtype: Any = np.float32,
) -> tuple[Tensors, Deltas]:
    """Factors for linear layers, wherever the model has them."""
    tensors: Tensors = {}
    deltas: Deltas = {}
    for layer in range(config.num_layers):
        for site in _sites(config, sites):
            if layer in site.layers:
                a, b = _factors(rng, rank, site.in_features, site.out_features, dtype)
                _add(tensors, f"{PREFIX}.{layer}.{linear_module(site.name)}", a, b)
                deltas[Target(layer, site.name, 0)] = _product(a, b, scaling)
    return tensors, deltas


def linear_module(site: str) -> str:
    """What transformers calls the linear layer of a site, inside a decoder layer."""
    prefix = {"mlp": "", "shared_experts": "mlp."}.get(site.partition(".")[0], "self_attn.")
    return f"{prefix}{site}"


def per_expert_tensors(
    config: ModelConfig,
    rng: np.random.Generator,
    *,
    sites: Sequence[str] = EXPERTS,
    rank: int = 4,
    scaling: float = 2.0,
    fuse_gate_up: bool = False,
    experts: Sequence[int] | None = None,
    dtype: Any = np.float32,
) -> tuple[Tensors, Deltas]:
    """Factors for each projection of each expert, or of the given experts.

    Args:
        config: the model.
        rng: draws the factors.
        sites: the projections to change.
        rank: of every factor.
        scaling: alpha/rank of the config that goes with the tensors.
        fuse_gate_up: whether gate and up are one ``gate_up_proj`` with one A.
        experts: the experts to change; all if None.
        dtype: of the factors.
    """
    tensors: Tensors = {}
    deltas: Deltas = {}
    groups = [[site] for site in _sites(config, sites)]
    if fuse_gate_up:
        groups = [_sites(config, EXPERTS[:2]), *([site] for site in _sites(config, EXPERTS[2:]))]
    for layer in config.moe_layers:
        for expert in range(config.moe.num_experts) if experts is None else experts:
            for group in groups:
                name = group[0].name if len(group) == 1 else "gate_up_proj"
                out_features = sum(site.out_features for site in group)
                a, b = _factors(rng, rank, group[0].in_features, out_features, dtype)
                _add(tensors, f"{PREFIX}.{layer}.mlp.experts.{expert}.{name}", a, b)
                for site, rows in zip(group, np.split(b, len(group)), strict=True):
                    deltas[Target(layer, site.name, expert)] = _product(a, rows, scaling)
    return tensors, deltas


def fused_tensors(
    config: ModelConfig,
    rng: np.random.Generator,
    *,
    parameters: Sequence[str] = tuple(PARAMETERS),
    rank: int = 4,
    scaling: float = 2.0,
    dtype: Any = np.float32,
) -> tuple[Tensors, Deltas]:
    """Factors for expert parameters, as PEFT >= 0.19 saves ``target_parameters``."""
    tensors: Tensors = {}
    deltas: Deltas = {}
    gate, up, down = _sites(config, EXPERTS)
    sites_of = {"gate_up_proj": [gate, up], "down_proj": [down]}
    for layer in config.moe_layers:
        for parameter in parameters:
            sites = sites_of[parameter]
            out_features = sum(site.out_features for site in sites)
            each = [
                _factors(rng, rank, sites[0].in_features, out_features, dtype)
                for _ in range(config.moe.num_experts)
            ]
            a = np.concatenate([a for a, _ in each])
            b = np.stack([b for _, b in each], axis=-1).reshape(out_features, -1)
            module = PARAMETERS[parameter] if len(parameters) == 2 else "experts"
            _add(tensors, f"{PREFIX}.{layer}.mlp.{module}", a, b)
            for expert, (a, b) in enumerate(each):
                for site, rows in zip(sites, np.split(b, len(sites)), strict=True):
                    deltas[Target(layer, site.name, expert)] = _product(a, rows, scaling)
    return tensors, deltas


def exchange_fused(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Tensors:
    """What PEFT 0.18 would have saved where PEFT 0.19 and later save these tensors.

    In ``lora_A [experts·rank, out]`` and ``lora_B [in, rank·experts]``, A and B are exchanged; they
    change the same matrices by the same.
    """
    experts = config.moe.num_experts
    exchanged = dict(tensors)
    for name, a in tensors.items():
        if ".mlp.experts." in name and "lora_A" in name:
            partner = name.replace("lora_A", "lora_B")
            b = tensors[partner]
            by_expert_a = a.reshape(experts, -1, a.shape[1])
            by_expert_b = b.reshape(b.shape[0], -1, experts)
            exchanged[name] = by_expert_b.transpose(2, 1, 0).reshape(-1, b.shape[0])
            exchanged[partner] = by_expert_a.transpose(2, 1, 0).reshape(a.shape[1], -1)
    return exchanged


def stacked_tensors(
    config: ModelConfig,
    rng: np.random.Generator,
    *,
    names: Sequence[str] = EXPERTS,
    rank: int = 4,
    scaling: float = 2.0,
    shared_outer: bool = False,
    dtype: Any = np.float32,
) -> tuple[Tensors, Deltas]:
    """Factors for all experts in one tensor each, as Megatron and SGLang have them.

    Args:
        config: the model.
        rng: draws the factors.
        names: of the gate, up and down projection; or two names, the first of gate and up in one.
        rank: of every factor.
        scaling: alpha/rank of the config that goes with the tensors.
        shared_outer: whether all experts share the A of gate and up, and the B of down.
        dtype: of the factors.
    """
    tensors: Tensors = {}
    deltas: Deltas = {}
    gate, up, down = _sites(config, EXPERTS)
    groups = [[gate, up], [down]] if len(names) == 2 else [[gate], [up], [down]]
    experts = config.moe.num_experts
    for layer in config.moe_layers:
        for name, group in zip(names, groups, strict=True):
            shared_a = shared_outer and group != [down]
            shared_b = shared_outer and group == [down]
            each = [
                _factors(rng, rank, group[0].in_features, sum(s.out_features for s in group), dtype)
                for _ in range(experts)
            ]
            a = np.stack([a for a, _ in each[: 1 if shared_a else experts]])
            b = np.stack([b for _, b in each[: 1 if shared_b else experts]])
            _add(tensors, f"{PREFIX}.{layer}.mlp.experts.{name}", a, b)
            for expert in range(experts):
                its_a, its_b = a[0 if shared_a else expert], b[0 if shared_b else expert]
                for site, rows in zip(group, np.split(its_b, len(group)), strict=True):
                    deltas[Target(layer, site.name, expert)] = _product(its_a, rows, scaling)
    return tensors, deltas


def write_per_expert_adapter(
    folder: Path,
    config: ModelConfig,
    rng: np.random.Generator,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    attention: bool = False,
    dtype: Any = np.float32,
) -> Deltas:
    """Write an adapter folder with factors for every expert and, if asked, for attention."""
    scaling = alpha / rank
    tensors, deltas = per_expert_tensors(config, rng, rank=rank, scaling=scaling, dtype=dtype)
    if attention:
        more = linear_tensors(config, rng, rank=rank, scaling=scaling, dtype=dtype)
        tensors, deltas = tensors | more[0], deltas | more[1]
    targets = [*EXPERTS, *(ATTENTION if attention else ())]
    options = adapter_options(r=rank, lora_alpha=alpha, target_modules=targets)
    write_adapter(folder, tensors, options)
    return deltas


def dense_delta(update: LowRankUpdate) -> np.ndarray:
    """The change of the weight matrix, as float64 ``[out, in]``."""
    return _product(update.a, update.b, update.scaling)


def assert_describes(adapter: Adapter, deltas: Deltas, *, tolerance: float = 1e-6) -> None:
    """Check every matrix: those that the adapter leaves out must not change."""
    assert adapter.updates.keys() <= deltas.keys()
    for target, expected in deltas.items():
        update = adapter.updates.get(target)
        actual = np.zeros_like(expected) if update is None else dense_delta(update)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance, err_msg=str(target))


def _sites(config: ModelConfig, names: Sequence[str]) -> list[LoraSite]:
    sites = {site.name: site for site in config.lora_sites()}
    return [sites[name] for name in names]


def _factors(
    rng: np.random.Generator, rank: int, in_features: int, out_features: int, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    a = rng.normal(scale=0.1, size=(rank, in_features)).astype(dtype)
    b = rng.normal(scale=0.1, size=(out_features, rank)).astype(dtype)
    return a, b


def _add(tensors: Tensors, module: str, a: np.ndarray, b: np.ndarray) -> None:
    tensors[f"{module}.lora_A.weight"] = a
    tensors[f"{module}.lora_B.weight"] = b


def _product(a: np.ndarray, b: np.ndarray, scaling: float) -> np.ndarray:
    delta: np.ndarray = scaling * (b.astype(np.float64) @ a.astype(np.float64))
    return delta
