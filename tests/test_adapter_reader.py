"""Adapter files: what PEFT saves is read exactly, and nothing else is ever let through."""

import dataclasses
import itertools
import json
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from moelora_jax.adapters import reader
from moelora_jax.adapters.adapter import Adapter, Target
from moelora_jax.adapters.module_names import (
    GPT_OSS_NAMES,
    MIXTRAL_NAMES,
    QWEN3_MOE_NAMES,
    ModuleNames,
)
from moelora_jax.adapters.reader import read_adapter
from moelora_jax.config import ModelConfig
from moelora_jax.errors import AdapterError, CheckpointError
from moelora_jax.safetensors_file import SafetensorsFile
from tests.adapter_files import (
    ATTENTION,
    EXPERTS,
    PREFIX,
    TARGET_PARAMETERS,
    Tensors,
    adapter_options,
    assert_describes,
    dense_delta,
    exchange_fused,
    fused_tensors,
    linear_tensors,
    per_expert_tensors,
    save_peft_adapter,
    stacked_tensors,
    tiny_model_config,
    tiny_torch_model,
    write_adapter,
    write_per_expert_adapter,
)

CONFIG = tiny_model_config()
#: gate_up of these is square, so that its shape does not tell the version of PEFT.
SQUARE_GATE_UP = tiny_model_config(hidden_size=40, intermediate_size=20)
SQUARE_DOWN = tiny_model_config(hidden_size=24, intermediate_size=24)


def read(folder: Path, config: ModelConfig = CONFIG) -> Adapter:
    return read_adapter(folder, config.lora_sites(), module_names=QWEN3_MOE_NAMES)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def partner_of(tensor: str) -> str:
    """The other factor of the same module."""
    a, b = "lora_A", "lora_B"
    return tensor.replace(a, b) if a in tensor else tensor.replace(b, a)


# What PEFT saves.


@pytest.fixture(scope="session")
def torch_model() -> Any:
    pytest.importorskip("peft")
    return tiny_torch_model(CONFIG)


@pytest.mark.parametrize("rank", [1, 3, 8, 16])
def test_reads_attention_and_experts_of_every_rank(
    torch_model: Any, tmp_path: Path, rank: int
) -> None:
    deltas = save_peft_adapter(
        torch_model,
        tmp_path,
        r=rank,
        lora_alpha=5,
        target_modules=list(ATTENTION),
        target_parameters=TARGET_PARAMETERS,
    )
    adapter = read(tmp_path)
    assert adapter.layout == "linear+peft_fused"
    assert adapter.updates.keys() == deltas.keys()
    assert adapter.max_rank == rank
    assert_describes(adapter, deltas)


PEFT_OPTIONS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": list(ATTENTION)},
    "some attention": {"target_modules": "model.layers.1.self_attn.[qv]_proj"},
    "attention as parameters": {"target_parameters": ["self_attn.q_proj.weight"]},
    "experts": {"target_parameters": TARGET_PARAMETERS},
    "gate_up": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "down": {"target_parameters": ["mlp.experts.down_proj"]},
    "one parameter in each layer": {
        "target_parameters": [
            "model.layers.0.mlp.experts.down_proj",
            "model.layers.1.mlp.experts.gate_up_proj",
        ]
    },
    "rslora": {
        "target_modules": ["q_proj"],
        "target_parameters": TARGET_PARAMETERS,
        "use_rslora": True,
    },
    "patterns": {
        "target_modules": list(ATTENTION),
        "target_parameters": TARGET_PARAMETERS,
        "rank_pattern": {"down_proj": 3, r"layers\.0\..*q_proj": 2, "[ko]_proj": 5, ".*v_proj": 1},
        "alpha_pattern": {r"experts\.gate_up_proj": 7, "^model.layers.1.self_attn.o_proj": 3},
        "use_rslora": True,
    },
    "per-expert modules that PEFT converts": {"target_modules": ["v_proj", *EXPERTS]},
    "names that the model has no modules for": {"target_modules": ["q_proj", "w1", "c_attn"]},
    "names that are all excluded": {
        "target_modules": [*ATTENTION],
        "exclude_modules": ["o_proj"],
    },
    "an expression with exclusions": {
        "target_modules": r".*self_attn\.(q|k|v|o)_proj",
        "exclude_modules": r".*layers\.0\..*",
    },
    "one layer": {
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "another initialisation": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("options", PEFT_OPTIONS.values(), ids=PEFT_OPTIONS.keys())
def test_reads_what_peft_saves(torch_model: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    deltas = save_peft_adapter(torch_model, tmp_path, r=4, lora_alpha=6, **options)
    adapter = read(tmp_path)
    assert adapter.updates
    assert_describes(adapter, deltas)


@pytest.mark.parametrize("config", [SQUARE_GATE_UP, SQUARE_DOWN], ids=["gate_up", "down"])
def test_reads_square_parameters(tmp_path: Path, config: ModelConfig) -> None:
    pytest.importorskip("peft")
    deltas = save_peft_adapter(
        tiny_torch_model(config), tmp_path, r=3, target_parameters=TARGET_PARAMETERS
    )
    assert_describes(read(tmp_path, config), deltas)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "use_dora: DoRA.*merge_and_unload"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["gate"]}, "modules_to_save"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "trainable_token"),
        ({"target_modules": ["q_proj"], "bias": "all"}, "bias: the adapter replaces biases"),
    ],
)
def test_refuses_what_else_peft_saves(
    torch_model: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    save_peft_adapter(torch_model, tmp_path, r=4, **options)
    with pytest.raises(AdapterError, match=message):
        read(tmp_path)


# Files written by hand.


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_keeps_the_dtype(tmp_path: Path, dtype: Any) -> None:
    deltas = write_per_expert_adapter(tmp_path, CONFIG, rng(), attention=True, dtype=dtype)
    adapter = read(tmp_path)
    assert adapter.layout == "linear+per_expert"
    assert adapter.source == str(tmp_path)
    assert {update.a.dtype for update in adapter.updates.values()} == {np.dtype(dtype)}
    assert adapter.updates.keys() == deltas.keys()
    assert_describes(adapter, deltas, tolerance=1e-12)


def test_fused_tensors_written_by_hand(tmp_path: Path) -> None:
    tensors, deltas = fused_tensors(CONFIG, rng())
    write_adapter(tmp_path, tensors, adapter_options(target_parameters=TARGET_PARAMETERS))
    assert_describes(read(tmp_path), deltas, tolerance=1e-12)


def test_gate_and_up_share_a(tmp_path: Path) -> None:
    tensors, deltas = per_expert_tensors(CONFIG, rng(), fuse_gate_up=True)
    adapter = read(write_adapter(tmp_path, tensors, adapter_options()))
    assert_describes(adapter, deltas, tolerance=1e-12)
    assert adapter.updates.keys() == deltas.keys()
    for (layer, site, expert), update in adapter.updates.items():
        if site == "gate_proj":
            assert adapter.updates[Target(layer, "up_proj", expert)].a is update.a
    assert adapter.num_parameters == sum(tensor.size for tensor in tensors.values())


def test_interleaved_rows(tmp_path: Path) -> None:
    tensors, deltas = per_expert_tensors(CONFIG, rng(), fuse_gate_up=True)
    for name, tensor in tensors.items():
        if "gate_up_proj.lora_B" in name:
            gate, up = np.split(tensor, 2)
            tensors[name] = np.stack([gate, up], axis=1).reshape(tensor.shape)
    write_adapter(tmp_path, tensors, adapter_options())
    names = dataclasses.replace(QWEN3_MOE_NAMES, interleaved=True)
    adapter = read_adapter(tmp_path, CONFIG.lora_sites(), module_names=names)
    assert_describes(adapter, deltas, tolerance=1e-12)


def test_missing_layers_experts_and_projections_are_not_changed(tmp_path: Path) -> None:
    tensors, deltas = per_expert_tensors(CONFIG, rng(), sites=["down_proj"], experts=[0, 5])
    tensors = {name: tensor for name, tensor in tensors.items() if ".layers.1." in name}
    adapter = read(write_adapter(tmp_path, tensors, adapter_options()))
    assert adapter.updates.keys() == {Target(1, "down_proj", 0), Target(1, "down_proj", 5)}
    assert_describes(adapter, {target: deltas[target] for target in adapter.updates})


@pytest.mark.parametrize("suffix", [".weight", ".default.weight", "", ".default"])
@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.model.layers",
        "model.layers",
        "base_model.model.model.language_model.layers",
        "base_model.model.language_model.model.layers",
    ],
)
def test_spellings_of_names(tmp_path: Path, prefix: str, suffix: str) -> None:
    tensors, deltas = linear_tensors(CONFIG, rng())
    renamed = {
        name.replace(PREFIX, prefix).removesuffix(".weight") + suffix: tensor
        for name, tensor in tensors.items()
    }
    adapter = read(write_adapter(tmp_path, renamed, adapter_options(target_modules=["q_proj"])))
    assert_describes(adapter, deltas, tolerance=1e-12)


@pytest.mark.parametrize(
    ("part", "wrapped"),
    [
        ("model.layers", "model._orig_mod.layers"),
        ("self_attn", "_orig_mod.self_attn"),
        ("base_model", "_fsdp_wrapped_module.base_model"),
        ("self_attn", "_checkpoint_wrapped_module.self_attn"),
    ],
)
def test_names_of_wrapped_modules(tmp_path: Path, part: str, wrapped: str) -> None:
    tensors, deltas = linear_tensors(CONFIG, rng())
    renamed = {name.replace(part, wrapped, 1): tensor for name, tensor in tensors.items()}
    adapter = read(write_adapter(tmp_path, renamed, adapter_options()))
    assert_describes(adapter, deltas, tolerance=1e-12)
    write_adapter(tmp_path, tensors | renamed, adapter_options())
    with pytest.raises(AdapterError, match="is the same factor as"):
        read(tmp_path)


def test_names_that_tinker_writes(tmp_path: Path) -> None:
    """The head is called after the embedding, and gpt-oss's attention as in its first code."""
    head = {
        "base_model.model.model.unembed_tokens.lora_A.weight": np.ones((4, 48), np.float32),
        "base_model.model.model.unembed_tokens.lora_B.weight": np.ones((64, 4), np.float32),
    }
    attention, deltas = linear_tensors(CONFIG, rng())
    renamed = {name.replace("self_attn", "attn"): tensor for name, tensor in attention.items()}
    folder = write_adapter(tmp_path, head | renamed, adapter_options(target_modules="all-linear"))
    adapter = read_adapter(folder, CONFIG.lora_sites(), module_names=GPT_OSS_NAMES)
    np.testing.assert_allclose(dense_delta(adapter.updates[Target(0, "lm_head", 0)]), 8.0)
    of_attention = {t: update for t, update in adapter.updates.items() if t.site != "lm_head"}
    assert_describes(dataclasses.replace(adapter, updates=of_attention), deltas)


#: What trainers list by default, whatever the model.
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", *EXPERTS]


@pytest.mark.parametrize(
    ("names", "lost"),
    [(QWEN3_MOE_NAMES, "gate_proj"), (GPT_OSS_NAMES, None), (MIXTRAL_NAMES, None)],
    ids=["Qwen3-MoE", "gpt-oss", "Mixtral"],
)
def test_targets_that_the_model_never_had(
    tmp_path: Path, names: ModuleNames, lost: str | None
) -> None:
    """gpt-oss has no modules of these names, and Mixtral's are w1, w3 and w2."""
    tensors, deltas = linear_tensors(CONFIG, rng())
    write_adapter(tmp_path, tensors, adapter_options(target_modules=SEVEN))
    sites = CONFIG.lora_sites()
    if lost is None:
        assert_describes(read_adapter(tmp_path, sites, module_names=names), deltas)
        return
    with pytest.raises(
        AdapterError, match=f"target_modules: .*no tensors for '{lost}'; take it out"
    ):
        read_adapter(tmp_path, sites, module_names=names)


def test_per_expert_patterns_decide_rank_and_scaling(tmp_path: Path) -> None:
    tensors, _ = per_expert_tensors(CONFIG, rng(), rank=4)
    odd = f"{PREFIX}.1.mlp.experts.3.up_proj"
    tensors[f"{odd}.lora_A.weight"] = np.ones((9, 48), np.float32)
    tensors[f"{odd}.lora_B.weight"] = np.ones((20, 9), np.float32)
    pattern = r"layers\.1\..*\.3\.up_proj"
    options = adapter_options(
        rank_pattern={pattern: 9}, alpha_pattern={pattern: 6}, use_rslora=True
    )
    updates = read(write_adapter(tmp_path, tensors, options)).updates
    assert updates[Target(1, "up_proj", 3)].scaling == 6 / 9**0.5
    assert updates[Target(0, "up_proj", 3)].scaling == 8 / 4**0.5
    np.testing.assert_allclose(dense_delta(updates[Target(1, "up_proj", 3)]), 18.0)


# Which parameter.


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_shape_tells_the_parameter_if_the_config_does_not(tmp_path: Path, parameter: str) -> None:
    tensors, deltas = fused_tensors(CONFIG, rng(), parameters=[parameter])
    adapter = read(write_adapter(tmp_path, tensors, adapter_options()))
    assert_describes(adapter, deltas, tolerance=1e-12)


@pytest.mark.parametrize(
    ("slot", "targets", "message"),
    [
        ("experts.base_layer", TARGET_PARAMETERS, "no counterpart for down_proj"),
        ("experts", TARGET_PARAMETERS, "no counterpart for gate_up_proj"),
        ("experts.base_layer", TARGET_PARAMETERS[:1], "no counterpart for down_proj"),
        (None, TARGET_PARAMETERS[:1], "only gate_up_proj is targeted"),
    ],
)
def test_refuses_parameters_that_the_config_contradicts(
    tmp_path: Path, slot: str | None, targets: list[str], message: str
) -> None:
    tensors, _ = fused_tensors(CONFIG, rng())
    kept = {
        name: tensor for name, tensor in tensors.items() if slot is None or f"{slot}.lora" in name
    }
    write_adapter(tmp_path, kept, adapter_options(target_parameters=targets))
    with pytest.raises(AdapterError, match=message):
        read(tmp_path)


# Strictness: change one thing of a valid file.


def _valid_files() -> dict[str, tuple[Tensors, dict[str, Any]]]:
    attention = linear_tensors(CONFIG, rng())[0]
    per_expert = per_expert_tensors(CONFIG, rng())[0]
    fused_gate_up = per_expert_tensors(CONFIG, rng(), fuse_gate_up=True)[0]
    fused = fused_tensors(CONFIG, rng())[0]
    of_parameters = adapter_options(
        target_modules=list(ATTENTION), target_parameters=TARGET_PARAMETERS
    )
    targets = list(ATTENTION)
    return {
        "per_expert": (
            attention | per_expert,
            adapter_options(target_modules=[*targets, *EXPERTS]),
        ),
        "fused_gate_up": (attention | fused_gate_up, adapter_options(target_modules=targets)),
        "peft_fused": (attention | fused, of_parameters),
        "peft_fused_0_18": (
            attention | exchange_fused(fused, CONFIG),
            of_parameters | {"peft_version": "0.18.1"},
        ),
        "stacked": (
            attention | stacked_tensors(CONFIG, rng())[0],
            adapter_options(target_modules=[*targets, *EXPERTS]),
        ),
        "shared_outer": (
            attention | stacked_tensors(CONFIG, rng(), shared_outer=True)[0],
            adapter_options(target_modules=[*targets, *EXPERTS]),
        ),
        "shared_outer_gate_up": (
            stacked_tensors(CONFIG, rng(), names=("gate_up_proj", "down_proj"), shared_outer=True)[
                0
            ],
            adapter_options(),
        ),
    }


VALID = _valid_files()
valid_files = st.sampled_from(sorted(VALID))


@st.composite
def tensors_of_valid_files(draw: st.DrawFn) -> tuple[str, str]:
    kind = draw(valid_files)
    return kind, draw(st.sampled_from(sorted(VALID[kind][0])))


def other_parameter_of(tensor: str) -> str:
    """The same factor of the other expert parameter, or the tensor itself if it is of none."""
    inner, outer = "experts.base_layer.lora_", "experts.lora_"
    return tensor.replace(inner, outer) if inner in tensor else tensor.replace(outer, inner)


def read_changed(kind: str, change: Callable[[Tensors], object]) -> Adapter:
    """Read a valid file after a change of its tensors."""
    tensors, options = VALID[kind]
    changed = dict(tensors)
    change(changed)
    with tempfile.TemporaryDirectory() as folder:
        return read(write_adapter(Path(folder), changed, options))


def assert_refused(kind: str, change: Callable[[Tensors], object], *names: str) -> None:
    """The error must name the file and one of these tensors."""
    with pytest.raises(AdapterError) as caught:
        read_changed(kind, change)
    message = str(caught.value)
    assert "adapter_model.safetensors" in message
    assert any(repr(name) in message for name in names), message


@pytest.mark.parametrize("kind", VALID)
def test_unchanged_files_are_valid(kind: str) -> None:
    adapter = read_changed(kind, lambda tensors: None)
    assert adapter.num_parameters == sum(tensor.size for tensor in VALID[kind][0].values())


@given(tensors_of_valid_files())
def test_deleting_a_tensor_is_refused(choice: tuple[str, str]) -> None:
    kind, name = choice
    assert_refused(kind, lambda tensors: tensors.pop(name), name, partner_of(name))


@given(tensors_of_valid_files())
def test_deleting_a_pair_leaves_all_others(choice: tuple[str, str]) -> None:
    kind, name = choice

    def change(tensors: Tensors) -> None:
        del tensors[name], tensors[partner_of(name)]

    other = other_parameter_of(name)
    if other != name:
        # The config targets two parameters of these experts.
        assert_refused(kind, change, other, partner_of(other))
        return
    deleted = VALID[kind][0][name].size + VALID[kind][0][partner_of(name)].size
    adapter = read_changed(kind, change)
    assert adapter.num_parameters == read_changed(kind, lambda _: None).num_parameters - deleted


@given(
    tensors_of_valid_files(),
    st.sampled_from(
        [
            (r"layers\.\d", "layers.2"),
            (r"layers\.(\d)", r"layers.0\1"),
            (r"layers\.\d", "layers.-1"),
            (r"experts\.\d", "experts.6"),
            (r"proj", "projection"),
            (r"gate_proj", "w1"),
            (r"experts", "experts.0"),
            (r"(self_attn|mlp)", "cross_attn"),
            (r"lora_[AB]", "lora_C"),
            (r"lora_[AB]", "lora_magnitude_vector"),
            (r"(lora_[AB])", r"lora_embedding_A"),
            (r"(lora_[AB])", r"\1.other"),
            (r"weight", "bias"),
            (r"(.*)lora_[AB]\.weight", r"\1weight"),
            (r"^", "base_model.model."),
            (r"^", "vision."),
            (r"model\.layers", "model.encoder.layers"),
            (r"$", ".weight"),
            (r"experts", "experts.base_layer"),
        ]
    ),
)
def test_renaming_a_tensor_is_refused(choice: tuple[str, str], rule: tuple[str, str]) -> None:
    kind, name = choice
    renamed = re.sub(rule[0], rule[1], name, count=1)
    if renamed == name or renamed in VALID[kind][0]:
        return

    def change(tensors: Tensors) -> None:
        tensors[renamed] = tensors.pop(name)

    assert_refused(kind, change, name, renamed, partner_of(name), partner_of(renamed))


@given(tensors_of_valid_files(), st.data())
def test_transposing_a_tensor_is_refused(choice: tuple[str, str], data: st.DataObject) -> None:
    kind, name = choice
    axes = list(range(VALID[kind][0][name].ndim))
    order = data.draw(st.permutations(axes).filter(lambda order: order != axes))
    assert_refused(
        kind, lambda tensors: tensors.update({name: tensors[name].transpose(order)}), name
    )


@given(tensors_of_valid_files())
def test_exchanging_the_factors_of_a_pair_is_refused(choice: tuple[str, str]) -> None:
    kind, name = choice
    partner = partner_of(name)

    def change(tensors: Tensors) -> None:
        tensors[name], tensors[partner] = tensors[partner], tensors[name]

    assert_refused(kind, change, name, partner)


@given(tensors_of_valid_files(), st.integers(0, 2), st.booleans())
def test_resizing_a_tensor_is_refused(choice: tuple[str, str], axis: int, larger: bool) -> None:
    kind, name = choice

    def change(tensors: Tensors) -> None:
        tensor, place = tensors[name], axis % tensors[name].ndim
        extra = np.take(tensor, [0], place)
        smaller = np.delete(tensor, -1, place)
        tensors[name] = np.concatenate([tensor, extra], place) if larger else smaller

    assert_refused(kind, change, name)


@given(tensors_of_valid_files(), st.sampled_from([(), (0,), (3,), (2, 3, 4)]))
def test_other_numbers_of_dimensions_are_refused(
    choice: tuple[str, str], shape: tuple[int, ...]
) -> None:
    kind, name = choice
    assert_refused(kind, lambda tensors: tensors.update({name: np.zeros(shape)}), name)


def test_a_shard_that_was_not_gathered_is_refused() -> None:
    name = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"
    empty = np.zeros(0, np.float32)
    with pytest.raises(AdapterError, match="is empty, as DeepSpeed and FSDP save what was not"):
        read_changed("per_expert", lambda tensors: tensors.update({name: empty}))


@given(tensors_of_valid_files())
def test_rank_zero_is_refused(choice: tuple[str, str]) -> None:
    kind, name = choice

    def change(tensors: Tensors) -> None:
        for factor in (name, partner_of(name)):
            axis = -2 if "lora_A" in factor else -1
            tensors[factor] = np.take(tensors[factor], [], axis)

    assert_refused(kind, change, name, partner_of(name))


@given(tensors_of_valid_files(), st.data())
def test_values_that_are_not_finite_are_refused(
    choice: tuple[str, str], data: st.DataObject
) -> None:
    kind, name = choice
    dtype = data.draw(st.sampled_from([np.float64, np.float32, np.float16, ml_dtypes.bfloat16]))
    value = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].astype(dtype)
        place = data.draw(st.tuples(*(st.integers(0, size - 1) for size in tensors[name].shape)))
        tensors[name][place] = value

    assert_refused(kind, change, name)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint16, np.bool_, ml_dtypes.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    name = f"{PREFIX}.1.self_attn.q_proj.lora_B.weight"
    assert_refused("peft_fused", lambda t: t.update({name: t[name].astype(dtype)}), name)


@given(
    valid_files,
    st.sampled_from(
        [
            "x",
            "base_model.model.lm_head.weight",
            "base_model.model.lm_head.lora_A.weight",
            f"{PREFIX}.0.mlp.gate.lora_A.weight",
            f"{PREFIX}.0.self_attn.q_proj.lora_B.bias",
            f"{PREFIX}.0.self_attn.q_proj.lora_A.default.weight",
            f"{PREFIX}.0.self_attn.q_proj.lora_magnitude_vector",
            f"{PREFIX}.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            f"{PREFIX}.0.mlp.experts.lora_A.default.weight.lora_A.weight",
            f"{PREFIX}.0.mlp.experts.w3.lora_A",
            f"{PREFIX}.1.mlp.experts.1.w2.lora_B",
        ]
    ),
)
def test_adding_a_tensor_is_refused(kind: str, name: str) -> None:
    added = np.zeros((4, 48), np.float32)
    original = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"
    assert_refused(kind, lambda tensors: tensors.update({name: added}), name, original)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        (
            "base_model.model.model.layers.0.self_attn.q_proj",
            "base_model.model.model.language_model.layers.0.self_attn.q_proj",
        ),
    ],
)
def test_two_names_of_one_module_are_refused(tmp_path: Path, first: str, second: str) -> None:
    factors = {"lora_A": np.zeros((4, 48)), "lora_B": np.zeros((32, 4))}
    tensors = {
        f"{module}.{factor}.weight": tensor
        for module, (factor, tensor) in itertools.product((first, second), factors.items())
    }
    write_adapter(tmp_path, tensors, adapter_options())
    with pytest.raises(AdapterError, match="same") as caught:
        read(tmp_path)
    assert first in str(caught.value) and second in str(caught.value)


@pytest.mark.parametrize("other", ["gate_proj", "up_proj"])
def test_a_projection_beside_its_fused_form_is_refused(other: str) -> None:
    name = f"{PREFIX}.0.mlp.experts.2.{other}"
    factors = {
        f"{name}.lora_A.weight": np.zeros((4, 48)),
        f"{name}.lora_B.weight": np.zeros((20, 4)),
    }
    assert_refused("fused_gate_up", lambda tensors: tensors.update(factors), *factors)


# Files that are incomplete or damaged.


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"nowhere.*adapter_config\.json: no such file"):
        read(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_options()))
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: no such file"):
        read(tmp_path)
    other = tmp_path / "adapter_model-00001-of-00002.safetensors"
    other.touch()
    with pytest.raises(AdapterError, match=r"no such file, but adapter_model-00001-of-00002"):
        read(tmp_path)
    other.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin: a pickle"):
        read(tmp_path)


def test_added_vocabulary_is_refused(tmp_path: Path) -> None:
    write_per_expert_adapter(tmp_path, CONFIG, rng())
    (tmp_path / "new_embeddings.safetensors").write_bytes(save({"x": np.zeros(1)}))
    with pytest.raises(AdapterError, match=r"new_embeddings\.safetensors.*vocabulary"):
        read(tmp_path)


def test_an_empty_file_of_tensors_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, {}, adapter_options())
    with pytest.raises(AdapterError, match="holds no tensors"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable JSON"),
        (b"{", "not a readable JSON"),
        (b"\xff", "not a readable JSON"),
        (b"[" * 100_000, "not a readable JSON"),
        (b"[]", "one JSON object"),
        (b'{"r": 4, "r": 8}', "occurs twice"),
    ],
)
def test_damaged_config_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    write_per_expert_adapter(tmp_path, CONFIG, rng())
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: .*{message}"):
        read(tmp_path)


@pytest.fixture(scope="module")
def damaged() -> Iterator[Callable[[bytes], Adapter]]:
    """Reads a valid folder whose file of tensors is replaced by other bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_adapter(Path(name), *VALID["per_expert"])

        def read_bytes(content: bytes) -> Adapter:
            (folder / "adapter_model.safetensors").write_bytes(content)
            return read(folder)

        yield read_bytes


def _bytes_of(kind: str) -> bytes:
    content: bytes = save(VALID[kind][0])
    return content


CONTENT = _bytes_of("per_expert")
HEADER_SIZE = struct.unpack("<Q", CONTENT[:8])[0]


@given(st.one_of(st.integers(0, HEADER_SIZE + 64), st.integers(0, len(CONTENT) - 1)))
def test_truncated_file_is_refused(damaged: Callable[[bytes], Adapter], size: int) -> None:
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: not a readable"):
        damaged(CONTENT[:size])


@given(st.integers(0, HEADER_SIZE + 7), st.integers(1, 255))
def test_damaged_header_is_refused(
    damaged: Callable[[bytes], Adapter], place: int, flip: int
) -> None:
    content = bytearray(CONTENT)
    content[place] ^= flip
    try:
        adapter = damaged(bytes(content))
    except AdapterError as error:
        assert "adapter_model.safetensors" in str(error)
    else:
        # Another kind of white space.
        assert adapter.num_parameters == sum(t.size for t in VALID["per_expert"][0].values())


@pytest.mark.parametrize(
    "lie",
    [
        {"dtype": "F16"},
        {"dtype": "F33"},
        {"shape": [4, 49]},
        {"shape": [2**40, 2**40]},
        {"shape": [-4, -48]},
        {"data_offsets": [0, 767]},
        {"data_offsets": [0, 2**40]},
        {"data_offsets": [768, 0]},
        {"data_offsets": [4, 772]},
        {"dtype": None},
    ],
)
def test_lying_header_is_refused(
    damaged: Callable[[bytes], Adapter], lie: dict[str, object]
) -> None:
    name = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"
    honest = {"dtype": "F32", "shape": [4, 48], "data_offsets": [0, 768]}
    header = json.dumps({name: honest | lie}).encode()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: not a readable"):
        damaged(struct.pack("<Q", len(header)) + header + bytes(768))


@pytest.mark.parametrize("in_memory", [False, True])
def test_safetensors_file_raises_the_given_error(tmp_path: Path, in_memory: bool) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        SafetensorsFile(path, CheckpointError, in_memory=in_memory)
    path.write_bytes(save({"b": np.ones((2, 3), ml_dtypes.bfloat16), "i": np.ones(2, np.int32)}))
    with SafetensorsFile(path, CheckpointError, in_memory=in_memory) as file:
        assert {name: tuple(header) for name, header in file.headers.items()} == {
            "b": ("BF16", (2, 3)),
            "i": ("I32", (2,)),
        }
        assert file.read("b").dtype == ml_dtypes.bfloat16
        with pytest.raises(CheckpointError, match="'i' has dtype I32"):
            file.read("i")
        with pytest.raises(CheckpointError, match="no tensor 'c'"):
            file.read("c")


def test_a_file_in_memory_may_change(tmp_path: Path) -> None:
    """It is not looked at any more."""
    path = tmp_path / "model.safetensors"
    value = np.arange(10_000, dtype=np.float32)
    path.write_bytes(save({"a": value}))
    with SafetensorsFile(path, AdapterError, in_memory=True) as file:
        path.write_bytes(b"")
        np.testing.assert_array_equal(file.read("a"), value)


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    """A mapped file would end the process."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"a": np.ones(10_000, np.float32)}))
    with SafetensorsFile(path, AdapterError) as file:
        os.truncate(path, path.stat().st_size - 10_000)
        with pytest.raises(AdapterError, match="is cut short"):
            file.read("a")


def test_a_folder_that_is_replaced_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the tensors of the new folder would be scaled as the old config says."""
    for name, alpha in (("adapter", 8), ("new", 32)):
        tensors, _ = linear_tensors(CONFIG, rng())
        write_adapter(tmp_path / name, tensors, adapter_options(lora_alpha=alpha))
    weights = reader.adapter_weights

    def replace_folder(folder: Path) -> Path:
        folder.rename(tmp_path / "old")
        (tmp_path / "new").rename(folder)
        return weights(folder)

    with monkeypatch.context() as patch:
        patch.setattr(reader, "adapter_weights", replace_folder)
        with pytest.raises(AdapterError, match="was replaced while it was read"):
            read(tmp_path / "adapter")
    assert read(tmp_path / "adapter").updates


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"a": np.ones(10, np.float32)}))
    honest = os.fstat

    def fstat_and_write(descriptor: int) -> os.stat_result:
        found = honest(descriptor)
        path.write_bytes(save({"a": np.zeros(20, np.float32)}))
        return found

    monkeypatch.setattr(os, "fstat", fstat_and_write)
    with pytest.raises(AdapterError, match="changed while it was read"):
        SafetensorsFile(path, AdapterError, in_memory=True)


# The options.


def read_with_options(folder: Path, **changes: object) -> Adapter:
    options = adapter_options(target_modules=list(ATTENTION)) | changes
    tensors, _ = linear_tensors(CONFIG, rng())
    return read(write_adapter(folder, tensors, options))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "ADALORA"),
        ("peft_type", None),
        ("r", None),
        ("r", 0),
        ("r", -4),
        ("r", True),
        ("r", 4.0),
        ("r", "4"),
        ("lora_alpha", None),
        ("lora_alpha", 0),
        ("lora_alpha", "8"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", 10**400),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(": 4}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": None}),
        ("use_rslora", "yes"),
        ("use_rslora", 1),
        ("target_modules", ["q_proj", "lm_head"]),
        ("target_modules", ["proj"]),
        ("target_modules", ["q_proj", "model.layers.1.mlp.experts.3.up_proj"]),
        ("exclude_modules", 3),
        ("target_modules", "lm_head"),
        ("target_modules", "("),
        ("target_modules", [1]),
        ("target_modules", {"q_proj": 1}),
        ("target_parameters", ["mlp.experts.down_proj"]),
        ("target_parameters", "q_proj"),
        ("peft_version", 19),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("use_dora", True),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("use_qalora", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [3]),
        ("layer_replication", [[0, 1]]),
        ("alora_invocation_tokens", [1]),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1.0}),
        ("monteclora_config", {"num_samples": 2}),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("some_new_option", 1),
    ],
)
def test_options_that_are_refused(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {key}: "):
        read_with_options(tmp_path, **{key: value})


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_contradict_each_other_are_refused(tmp_path: Path, key: str) -> None:
    values = {"q_proj": 4, r"layers\.0\..*": 4, "o_proj": 4}
    assert len(read_with_options(tmp_path, **{key: values}).updates) == 8
    with pytest.raises(
        AdapterError, match=rf"{key}: gives model\.layers\.0\.self_attn\.o_proj several"
    ):
        read_with_options(tmp_path, **{key: values | {"o_proj": 8}})


@pytest.mark.parametrize(("key", "value"), [("r", 8), ("rank_pattern", {"q_proj": 8})])
def test_a_rank_that_is_not_the_configs_is_refused(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(AdapterError, match=r"[qk]_proj.*\(4, 48\), expected \(8, 48\).*rank 8"):
        read_with_options(tmp_path, **{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("some_new_option", None),
        ("some_new_option", False),
        ("some_new_option", []),
        ("init_lora_weights", True),
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "eva"),
        ("lora_dropout", 0.1),
        ("lora_alpha", 7.5),
        ("megatron_core", "megatron.core"),
        ("layers_to_transform", [0, 1]),
        ("runtime_config", {"ephemeral_gpu_offload": False}),
        ("target_modules", ["q_proj", "k_proj", "in_proj", "model.layers.0.self_attn.qkv_proj"]),
        ("exclude_modules", ["o_proj"]),
        ("target_modules", None),
        ("target_modules", "all-linear"),
        ("target_modules", r".*\.self_attn\.(q|k)_proj"),
        ("peft_version", None),
        ("rank_pattern", {"experts.*": 5}),
        ("rank_pattern", None),
    ],
)
def test_options_that_are_accepted(tmp_path: Path, key: str, value: object) -> None:
    assert len(read_with_options(tmp_path, **{key: value}).updates) == 8


# Another model.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny_model_config(hidden_size=64), r"shape \(48, 4\), expected \(64, 4\).*another model"),
        (
            tiny_model_config(intermediate_size=24),
            r"shape \(4, 20\), expected \(4, 24\).*another model",
        ),
        (tiny_model_config(num_experts=5), "expert 5 of 5"),
        (tiny_model_config(num_layers=1), "layer 1"),
    ],
)
def test_adapter_for_another_model_is_refused(
    tmp_path: Path, config: ModelConfig, message: str
) -> None:
    write_per_expert_adapter(tmp_path, CONFIG, rng())
    with pytest.raises(AdapterError, match=message):
        read(tmp_path, config)


def test_fused_experts_for_another_number_of_experts_are_refused(tmp_path: Path) -> None:
    tensors, _ = fused_tensors(CONFIG, rng())
    write_adapter(tmp_path, tensors, adapter_options(target_parameters=TARGET_PARAMETERS))
    with pytest.raises(AdapterError, match=r"shape \(24, 48\), expected \(32, 48\)"):
        read(tmp_path, tiny_model_config(num_experts=8))


def test_sites_that_are_switched_off_are_refused(tmp_path: Path) -> None:
    write_per_expert_adapter(tmp_path, CONFIG, rng(), attention=True)
    sites = [site for site in CONFIG.lora_sites() if site.name != "v_proj"]
    with pytest.raises(AdapterError, match=r"v_proj\.lora_A.*may not change here"):
        read_adapter(tmp_path, sites, module_names=QWEN3_MOE_NAMES)


def test_factors_of_one_tensor_are_views(tmp_path: Path) -> None:
    tensors, _ = fused_tensors(CONFIG, rng())
    write_adapter(tmp_path, tensors, adapter_options(target_parameters=TARGET_PARAMETERS))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    updates = read(tmp_path).updates
    first, second = updates[Target(0, "down_proj", 0)], updates[Target(0, "down_proj", 1)]
    assert np.shares_memory(first.b.base, second.b.base)
    name = f"{PREFIX}.0.mlp.experts.lora_A.weight"
    np.testing.assert_array_equal(first.a, saved[name][:4])
