"""The layouts of expert adapters: each is read exactly, told from the others, or refused."""

import dataclasses
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from moelora_jax.adapters.adapter import Adapter, Target
from moelora_jax.adapters.layouts import EXPERT_LAYOUTS
from moelora_jax.adapters.module_names import QWEN3_MOE_NAMES, ModuleNames
from moelora_jax.adapters.pages import PagePool
from moelora_jax.adapters.reader import read_adapter
from moelora_jax.adapters.writer import save_adapter
from moelora_jax.config import LoraConfig, ModelConfig
from moelora_jax.errors import AdapterError
from tests.adapter_files import (
    ATTENTION,
    EXPERTS,
    PREFIX,
    TARGET_PARAMETERS,
    Deltas,
    Tensors,
    adapter_options,
    assert_describes,
    exchange_fused,
    fused_tensors,
    linear_tensors,
    per_expert_tensors,
    save_peft_adapter,
    stacked_tensors,
    tiny_model_config,
    tiny_torch_model,
    write_adapter,
)
from tests.tiny_llm import tiny_llm

CONFIG = tiny_model_config()
#: One parameter of these is square, so that its shape does not tell the version of PEFT.
SQUARE_GATE_UP = tiny_model_config(hidden_size=40, intermediate_size=20)
SQUARE_DOWN = tiny_model_config(hidden_size=24, intermediate_size=24)
SQUARE = [(SQUARE_GATE_UP, "gate_up_proj"), (SQUARE_DOWN, "down_proj")]

W = ("w1", "w3", "w2")
MERGED = ("gate_up_proj", "down_proj")
PAIRS_OF_LAYOUTS = [("peft_fused", "peft_fused_0_18"), ("stacked", "shared_outer")]

#: Products of the factors are taken in float64 on both sides.
EXACT = 1e-12


def read(
    folder: Path,
    config: ModelConfig = CONFIG,
    *,
    layout: str | None = None,
    names: ModuleNames = QWEN3_MOE_NAMES,
) -> Adapter:
    return read_adapter(folder, config.lora_sites(), module_names=names, layout=layout)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def tensors_of(
    layout: str, config: ModelConfig = CONFIG, *, rank: int = 4, parameters: Sequence[str] = MERGED
) -> tuple[Tensors, Deltas]:
    """A file with experts of one layout; ``parameters`` matters to those of PEFT only."""
    if layout == "per_expert":
        return per_expert_tensors(config, rng(), rank=rank, scaling=8 / rank)
    if layout.startswith("peft_fused"):
        tensors, deltas = fused_tensors(
            config, rng(), rank=rank, scaling=8 / rank, parameters=parameters
        )
        old = layout == "peft_fused_0_18"
        return (exchange_fused(tensors, config) if old else tensors), deltas
    return stacked_tensors(
        config, rng(), rank=rank, scaling=8 / rank, shared_outer=layout == "shared_outer"
    )


def options_of(layout: str, **changes: Any) -> dict[str, Any]:
    """The config of a file with experts of one layout."""
    version = "0.18.1" if layout == "peft_fused_0_18" else "0.21.2"
    return adapter_options(peft_version=version, **changes)


def has_oblong_parameter(config: ModelConfig, parameters: Sequence[str]) -> bool:
    """Whether a parameter is not square, so that its shape tells the version of PEFT."""
    inner = {
        "gate_up_proj": 2 * config.moe.intermediate_size,
        "down_proj": config.moe.intermediate_size,
    }
    return any(inner[parameter] != config.moe.hidden_size for parameter in parameters)


# Every layout, exactly.


@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("asked", [False, True], ids=["told by shape", "asked for"])
@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_every_layout(tmp_path: Path, layout: str, asked: bool, rank: int) -> None:
    tensors, deltas = tensors_of(layout, rank=rank)
    write_adapter(tmp_path, tensors, options_of(layout, r=rank))
    adapter = read(tmp_path, layout=layout if asked else None)
    assert adapter.layout == layout
    assert adapter.updates.keys() == deltas.keys()
    assert adapter.max_rank == rank
    assert_describes(adapter, deltas, tolerance=EXACT)


@given(
    st.sampled_from(EXPERT_LAYOUTS),
    st.fixed_dictionaries(
        {
            "hidden_size": st.sampled_from([2, 4, 6, 8]),
            "intermediate_size": st.sampled_from([1, 2, 3, 4, 8]),
            "num_experts": st.integers(2, 4),
            "num_layers": st.integers(1, 2),
        }
    ),
    st.integers(1, 4),
    st.sampled_from([MERGED, ("gate_up_proj",), ("down_proj",)]),
)
def test_no_coincidence_of_sizes_misleads(
    layout: str, sizes: dict[str, int], rank: int, parameters: Sequence[str]
) -> None:
    config = tiny_model_config(**sizes)
    tensors, deltas = tensors_of(layout, config, rank=rank, parameters=parameters)
    targets = [f"experts.{name}" for name in parameters] if layout.startswith("peft") else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapter(folder, tensors, options_of(layout, r=rank, target_parameters=targets))
        assert_describes(read(folder, config), deltas, tolerance=EXACT)
        assert_describes(read(folder, config, layout=layout), deltas, tolerance=EXACT)

        # Without the version: the same, or refused as in doubt.
        options = adapter_options(r=rank, target_parameters=targets, peft_version=None)
        write_adapter(folder, tensors, options)
        try:
            adapter = read(folder, config)
        except AdapterError as error:
            assert "peft_version" in str(error)
            assert layout.startswith("peft") and not has_oblong_parameter(config, parameters)
        else:
            assert_describes(adapter, deltas, tolerance=EXACT)

        # Asked for another one: refused, or nothing but square parameters.
        for other in EXPERT_LAYOUTS:
            if other == layout:
                continue
            try:
                adapter = read(folder, config, layout=other)
            except AdapterError as error:
                assert f"{other}, which was asked for" in str(error)
            else:
                assert {layout, other} == set(PAIRS_OF_LAYOUTS[0])
                assert not has_oblong_parameter(config, parameters)


@pytest.mark.parametrize("shared_outer", [False, True])
@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("names", [EXPERTS, W, MERGED], ids="-".join)
def test_spellings_of_stacked_experts(
    tmp_path: Path, names: Sequence[str], suffix: str, shared_outer: bool
) -> None:
    tensors, deltas = stacked_tensors(CONFIG, rng(), names=names, shared_outer=shared_outer)
    spelled = {name.removesuffix(".weight") + suffix: t for name, t in tensors.items()}
    write_adapter(tmp_path, spelled, adapter_options(target_modules=list(names)))
    adapter = read(tmp_path)
    assert adapter.layout == ("shared_outer" if shared_outer else "stacked")
    assert_describes(adapter, deltas, tolerance=EXACT)
    assert adapter.num_parameters == sum(tensor.size for tensor in tensors.values())


def test_patterns_decide_rank_and_scaling_of_stacked_experts(tmp_path: Path) -> None:
    tensors, _ = stacked_tensors(CONFIG, rng())
    odd = f"{PREFIX}.1.mlp.experts.up_proj"
    tensors[f"{odd}.lora_A.weight"] = np.ones((6, 9, 48), np.float32)
    tensors[f"{odd}.lora_B.weight"] = np.ones((6, 20, 9), np.float32)
    pattern = r"layers\.1\..*up_proj"
    options = adapter_options(
        rank_pattern={pattern: 9}, alpha_pattern={pattern: 6}, use_rslora=True
    )
    updates = read(write_adapter(tmp_path, tensors, options)).updates
    for expert in range(6):
        assert updates[Target(1, "up_proj", expert)].scaling == 6 / 9**0.5
        assert updates[Target(0, "up_proj", expert)].scaling == 8 / 4**0.5


def test_interleaved_rows_of_stacked_experts(tmp_path: Path) -> None:
    tensors, deltas = stacked_tensors(CONFIG, rng(), names=MERGED)
    for name, tensor in tensors.items():
        if "gate_up_proj.lora_B" in name:
            gate, up = np.split(tensor, 2, axis=1)
            tensors[name] = np.stack([gate, up], axis=2).reshape(tensor.shape)
    write_adapter(tmp_path, tensors, adapter_options())
    names = dataclasses.replace(QWEN3_MOE_NAMES, interleaved=True)
    assert_describes(read(tmp_path, names=names), deltas, tolerance=EXACT)


@pytest.mark.parametrize("layout", ["stacked", "shared_outer"])
def test_missing_layers_and_projections_are_not_changed(tmp_path: Path, layout: str) -> None:
    tensors, deltas = tensors_of(layout)
    kept = {name: tensor for name, tensor in tensors.items() if ".1.mlp.experts.down_proj" in name}
    adapter = read(write_adapter(tmp_path, kept, adapter_options()))
    assert adapter.layout == layout
    assert adapter.updates.keys() == {Target(1, "down_proj", expert) for expert in range(6)}
    assert_describes(adapter, {target: deltas[target] for target in adapter.updates})


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_keeps_the_bits(tmp_path: Path, layout: str, dtype: Any) -> None:
    tensors, _ = tensors_of(layout)
    rounded = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    write_adapter(tmp_path, rounded, options_of(layout))
    updates = read(tmp_path).updates
    factors = {id(factor): factor for u in updates.values() for factor in (u.a, u.b)}.values()
    assert {factor.dtype for factor in factors} == {np.dtype(dtype)}
    written = np.concatenate([tensor.ravel() for tensor in rounded.values()])
    read_back = np.concatenate([factor.ravel() for factor in factors])
    np.testing.assert_array_equal(np.sort(written), np.sort(read_back))


# PEFT 0.17 and 0.18.


@pytest.mark.parametrize(
    "parameters", [MERGED, MERGED[:1], MERGED[1:]], ids=["both", "gate_up", "down"]
)
@pytest.mark.parametrize(
    "config", [CONFIG, SQUARE_GATE_UP, SQUARE_DOWN], ids=["oblong", "gate_up", "down"]
)
def test_reads_what_peft_0_18_saves(
    tmp_path: Path, config: ModelConfig, parameters: Sequence[str]
) -> None:
    """Made from what the present PEFT saves, whose merging tells what it should change."""
    pytest.importorskip("peft")
    deltas = save_peft_adapter(
        tiny_torch_model(config),
        tmp_path,
        r=3,
        lora_alpha=5,
        target_modules=["q_proj"],
        target_parameters=[f"mlp.experts.{parameter}" for parameter in parameters],
    )
    exchanged = exchange_fused(load_file(tmp_path / "adapter_model.safetensors"), config)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    old = write_adapter(tmp_path / "old", exchanged, options | {"peft_version": "0.18.1"})
    adapter = read(old, config)
    assert adapter.layout == "linear+peft_fused_0_18"
    # PEFT merges in float32: a rounding of weights of magnitude 0.1.
    assert_describes(adapter, deltas, tolerance=1e-6)


def test_the_formula_of_peft_0_18(tmp_path: Path) -> None:
    random, experts, rank = rng(), 6, 4
    module = f"{PREFIX}.1.mlp.experts"
    shapes = {"base_layer.": (40, 48), "": (48, 20)}  # [out, in]
    tensors = {}
    for prefix, (out_features, in_features) in shapes.items():
        for factor, shape in (
            ("A", (experts * rank, out_features)),
            ("B", (in_features, rank * experts)),
        ):
            tensors[f"{module}.{prefix}lora_{factor}.weight"] = random.normal(size=shape)
    write_adapter(tmp_path, tensors, adapter_options(peft_version="0.17.1"))
    changes = {
        prefix: 2.0
        * np.einsum(
            "erd,Dre->edD",
            tensors[f"{module}.{prefix}lora_A.weight"].reshape(experts, rank, -1),
            tensors[f"{module}.{prefix}lora_B.weight"].reshape(-1, rank, experts),
        )
        for prefix in shapes
    }
    deltas = {}
    for expert in range(experts):
        deltas[Target(1, "gate_proj", expert)] = changes["base_layer."][expert, :20]
        deltas[Target(1, "up_proj", expert)] = changes["base_layer."][expert, 20:]
        deltas[Target(1, "down_proj", expert)] = changes[""][expert]
    assert_describes(read(tmp_path), deltas, tolerance=EXACT)


@pytest.mark.parametrize("version", ["0.17.1", "0.21.2", None])
@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("parameters", [MERGED, MERGED[:1], MERGED[1:]], ids="-".join)
@pytest.mark.parametrize("layout", PAIRS_OF_LAYOUTS[0])
def test_shape_tells_before_the_version(
    tmp_path: Path, layout: str, parameters: Sequence[str], targeted: bool, version: str | None
) -> None:
    tensors, deltas = tensors_of(layout, parameters=parameters)
    targets = [f"mlp.experts.{name}" for name in parameters] if targeted else None
    write_adapter(
        tmp_path, tensors, adapter_options(peft_version=version, target_parameters=targets)
    )
    adapter = read(tmp_path)
    assert adapter.layout == layout
    assert_describes(adapter, deltas, tolerance=EXACT)


@pytest.mark.parametrize(("config", "parameter"), SQUARE)
@pytest.mark.parametrize(
    ("version", "layout"),
    [
        ("0.19.0", "peft_fused"),
        ("0.19.1.dev0", "peft_fused"),
        ("0.21.2", "peft_fused"),
        ("1.0.0", "peft_fused"),
        ("0.18.1", "peft_fused_0_18"),
        ("0.17.0", "peft_fused_0_18"),
    ],
)
def test_version_tells_if_the_shape_does_not(
    tmp_path: Path, config: ModelConfig, parameter: str, version: str, layout: str
) -> None:
    tensors, deltas = tensors_of(layout, config, parameters=[parameter])
    write_adapter(tmp_path, tensors, adapter_options(peft_version=version))
    adapter = read(tmp_path, config)
    assert adapter.layout == layout
    assert_describes(adapter, deltas, tolerance=EXACT)


@pytest.mark.parametrize(("config", "parameter"), SQUARE)
@pytest.mark.parametrize("version", ["0.18.2.dev0", "newest", "", None])
@pytest.mark.parametrize("layout", PAIRS_OF_LAYOUTS[0])
def test_the_caller_tells_if_the_version_does_not(
    tmp_path: Path, config: ModelConfig, parameter: str, version: str | None, layout: str
) -> None:
    tensors, deltas = tensors_of(layout, config, parameters=[parameter])
    write_adapter(tmp_path, tensors, adapter_options(peft_version=version))
    with pytest.raises(AdapterError, match=r"experts\.lora_A.*peft_version.*must tell.*layout"):
        read(tmp_path, config)
    adapter = read(tmp_path, config, layout=layout)
    assert adapter.layout == layout
    assert_describes(adapter, deltas, tolerance=EXACT)


@pytest.mark.parametrize(("config", "parameter"), SQUARE)
def test_the_caller_overrules_the_version(
    tmp_path: Path, config: ModelConfig, parameter: str
) -> None:
    tensors, deltas = tensors_of("peft_fused_0_18", config, parameters=[parameter])
    write_adapter(tmp_path, tensors, adapter_options(peft_version="0.21.2"))
    assert_describes(read(tmp_path, config, layout="peft_fused_0_18"), deltas, tolerance=EXACT)


@pytest.mark.parametrize("layout", PAIRS_OF_LAYOUTS[0])
@pytest.mark.parametrize("config", [SQUARE_GATE_UP, SQUARE_DOWN], ids=["gate_up", "down"])
def test_another_parameter_tells_if_one_is_square(
    tmp_path: Path, config: ModelConfig, layout: str
) -> None:
    tensors, deltas = tensors_of(layout, config)
    write_adapter(tmp_path, tensors, adapter_options(peft_version=None))
    adapter = read(tmp_path, config)
    assert adapter.layout == layout
    assert_describes(adapter, deltas, tolerance=EXACT)


def test_parameters_with_in_features_first_are_alike_in_all_versions(tmp_path: Path) -> None:
    """As in gpt-oss, where down is square."""
    names = dataclasses.replace(QWEN3_MOE_NAMES, in_features_first=True)
    for version in ("0.18.1", "0.21.2", None):
        tensors, deltas = tensors_of("peft_fused", SQUARE_DOWN, parameters=["down_proj"])
        write_adapter(tmp_path, tensors, adapter_options(peft_version=version))
        assert_describes(read(tmp_path, SQUARE_DOWN, names=names), deltas, tolerance=EXACT)
    with pytest.raises(AdapterError, match=r"cannot be of the layout peft_fused_0_18"):
        read(tmp_path, SQUARE_DOWN, names=names, layout="peft_fused_0_18")


@pytest.mark.parametrize("version", ["0.18.1", "0.21.2", None])
@pytest.mark.parametrize("layout", PAIRS_OF_LAYOUTS[0])
def test_parameters_of_another_model_are_not_taken_for_square(
    tmp_path: Path, layout: str, version: str | None
) -> None:
    """Neither features nor their exchange fit, so that the shapes are equally far from both."""
    tensors, _ = tensors_of(layout, tiny_model_config(hidden_size=52, intermediate_size=22))
    options = adapter_options(peft_version=version, target_parameters=TARGET_PARAMETERS)
    write_adapter(tmp_path, tensors, options)
    with pytest.raises(AdapterError, match=r"experts.*lora_A.*another model"):
        read(tmp_path)


# Shared outer experts.


@pytest.mark.parametrize("names", [EXPERTS, MERGED], ids="-".join)
def test_shared_factors_are_one_array(tmp_path: Path, names: Sequence[str]) -> None:
    tensors, _ = stacked_tensors(CONFIG, rng(), names=names, shared_outer=True)
    updates = read(write_adapter(tmp_path, tensors, adapter_options())).updates
    for layer in range(CONFIG.num_layers):
        first = {site: updates[Target(layer, site, 0)] for site in EXPERTS}
        for expert in range(1, CONFIG.moe.num_experts):
            each = {site: updates[Target(layer, site, expert)] for site in EXPERTS}
            assert each["gate_proj"].a is first["gate_proj"].a
            assert each["up_proj"].a is first["up_proj"].a
            assert each["down_proj"].b is first["down_proj"].b
            assert each["down_proj"].a is not first["down_proj"].a
            assert each["gate_proj"].b is not first["gate_proj"].b
        assert (first["gate_proj"].a is first["up_proj"].a) == (names == MERGED)


@pytest.mark.parametrize("pages_of_factor", [1, 2])
@pytest.mark.parametrize(
    ("names", "shared_outer", "hidden_factors"),
    [
        # In each layer: A of gate, A of up, B of down; of one expert or of all.
        (EXPERTS, False, 3 * 6),
        (EXPERTS, True, 3),
        # Gate and up have one A.
        (MERGED, False, 2 * 6),
        (MERGED, True, 2),
    ],
)
def test_pages_of_stacked_experts(
    tmp_path: Path,
    names: Sequence[str],
    shared_outer: bool,
    hidden_factors: int,
    pages_of_factor: int,
) -> None:
    rank = 16 * pages_of_factor - 1
    tensors, deltas = stacked_tensors(
        CONFIG, rng(), names=names, shared_outer=shared_outer, rank=rank, scaling=8 / rank
    )
    adapter = read(write_adapter(tmp_path, tensors, adapter_options(r=rank)))
    pool = PagePool(CONFIG.lora_sites(), LoraConfig(max_adapters=1, max_rank=32), np.float32)
    packed = pool.pack(adapter)
    assert packed.pages_by_width == {
        48: CONFIG.num_layers * hidden_factors * pages_of_factor,
        # B of gate, B of up, A of down of each expert.
        20: CONFIG.num_layers * 3 * 6 * pages_of_factor,
        32: 0,
        16: 0,
    }
    for (layer, site, expert), delta in deltas.items():
        table, width = packed.tables[site], 20 if site == "down_proj" else 48
        numbers = table.pages[layer, :, :pages_of_factor, expert]
        a = packed.pages[width][numbers[0]].reshape(-1, width)
        b = packed.pages[68 - width][numbers[1]].reshape(-1, 68 - width)
        scaling = float(table.scaling[layer, expert])
        # Scalings are rounded to float32 in the tables.
        np.testing.assert_allclose(
            scaling * (b.astype(np.float64).T @ a.astype(np.float64)), delta, rtol=0, atol=1e-7
        )


@pytest.mark.parametrize("layout", ["stacked", "shared_outer"])
@pytest.mark.parametrize("asked", [None, "stacked", "shared_outer"])
def test_one_expert_shares_with_itself(tmp_path: Path, layout: str, asked: str | None) -> None:
    config = dataclasses.replace(
        CONFIG, moe=dataclasses.replace(CONFIG.moe, num_experts=1, top_k=1)
    )
    tensors, deltas = tensors_of(layout, config)
    write_adapter(tmp_path, tensors, adapter_options())
    adapter = read(tmp_path, config, layout=asked)
    assert adapter.layout == (asked or "stacked")
    assert_describes(adapter, deltas, tolerance=EXACT)


@pytest.mark.parametrize(
    ("projection", "a_shape", "b_shape", "wrong"),
    [
        ("gate_proj", (6, 4, 48), (1, 20, 4), "B"),  # the inner side
        ("gate_proj", (1, 4, 48), (1, 20, 4), "B"),  # both sides
        ("down_proj", (1, 4, 20), (6, 48, 4), "A"),
        ("down_proj", (1, 4, 20), (1, 48, 4), "A"),
        ("gate_up_proj", (1, 4, 48), (1, 40, 4), "B"),
        ("gate_up_proj", (1, 4, 48), (8, 40, 4), "B"),  # another number of experts
        ("gate_up_proj", (8, 4, 48), (8, 40, 4), "A"),
        ("w1", (2, 4, 48), (6, 20, 4), "A"),
        ("w2", (6, 4, 20), (2, 48, 4), "B"),
    ],
)
def test_shapes_of_neither_layout_are_refused(
    tmp_path: Path,
    projection: str,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    wrong: str,
) -> None:
    module = f"{PREFIX}.0.mlp.experts.{projection}"
    tensors = {f"{module}.lora_A": np.zeros(a_shape), f"{module}.lora_B": np.zeros(b_shape)}
    write_adapter(tmp_path, tensors, adapter_options())
    with pytest.raises(AdapterError, match=rf"{module}\.lora_{wrong}.*another model"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("peft_fused_0_18", r"lora_A.*\(24, 40\), expected \(30, 40\).*gives .* rank 5"),
        ("stacked", r"lora_A.*\(6, 4, 20\), expected \(6, 5, 20\).*gives .* rank 5"),
        ("shared_outer", r"lora_A.*\(6, 4, 20\), expected \(6, 5, 20\).*gives .* rank 5"),
    ],
)
def test_a_rank_that_is_not_the_configs_is_refused(
    tmp_path: Path, layout: str, message: str
) -> None:
    tensors, _ = tensors_of(layout)
    write_adapter(tmp_path, tensors, options_of(layout, r=5))
    with pytest.raises(AdapterError, match=message):
        read(tmp_path)


# An empty projection, in files for models without a gate.

WITHOUT_GATE = dataclasses.replace(
    QWEN3_MOE_NAMES,
    projections={"w1": ("up_proj",), "w3": (), "w2": ("down_proj",)},
    expert_parameters=("w1", "w2"),
)


def read_without_gate(folder: Path, w3: tuple[int, ...], **options: Any) -> Adapter:
    tensors, _ = stacked_tensors(CONFIG, rng(), names=W, shared_outer=True)
    for name in tensors:
        if ".w3." in name:
            tensors[name] = np.zeros(w3, np.float32)
    write_adapter(folder, tensors, adapter_options(**options))
    sites = [site for site in CONFIG.lora_sites() if site.name != "gate_proj"]
    return read_adapter(folder, sites, module_names=WITHOUT_GATE)


@pytest.mark.parametrize("shape", [(0,), (1, 0, 48), (6, 4, 0)])
def test_an_empty_projection_that_the_model_lacks(tmp_path: Path, shape: tuple[int, ...]) -> None:
    adapter = read_without_gate(tmp_path, shape, target_modules=list(W))
    assert adapter.layout == "shared_outer"
    assert {target.site for target in adapter.updates} == {"up_proj", "down_proj"}


def test_numbers_for_a_projection_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"w3\.lora_A.*\(1, 4, 48\).*no such projection"):
        read_without_gate(tmp_path, (1, 4, 48))


@pytest.mark.parametrize("name", ["layers.9.mlp.experts.w3", "layers.1.mlp.experts.2.w3"])
def test_an_empty_projection_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    module = f"base_model.model.model.{name}"
    tensors = {f"{module}.lora_A": np.zeros((0, 48)), f"{module}.lora_B": np.zeros((20, 0))}
    write_adapter(tmp_path, tensors, adapter_options())
    with pytest.raises(AdapterError, match=rf"{module}\.lora_A"):
        read(tmp_path, names=WITHOUT_GATE)


def test_an_adapter_of_empty_tensors_is_refused(tmp_path: Path) -> None:
    module = f"{PREFIX}.0.mlp.experts.w3"
    tensors = {f"{module}.lora_A": np.zeros((0,)), f"{module}.lora_B": np.zeros((0,))}
    write_adapter(tmp_path, tensors, adapter_options())
    with pytest.raises(AdapterError, match="holds no tensors that change the model"):
        read(tmp_path, names=WITHOUT_GATE)


@pytest.mark.parametrize("shape", [(0,), (1, 0, 48)])
def test_an_empty_projection_that_the_model_has_is_refused(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    tensors, _ = stacked_tensors(CONFIG, rng(), names=W, shared_outer=True)
    for name in tensors:
        if ".w3." in name:
            tensors[name] = np.zeros(shape, np.float32)
    write_adapter(tmp_path, tensors, adapter_options())
    with pytest.raises(AdapterError, match=r"w3\.lora_A"):
        read(tmp_path)


# Several layouts in one file.


def in_layer(layer: int, tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if f".layers.{layer}." in name}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("per_expert", "stacked"),
        ("per_expert", "peft_fused_0_18"),
        ("peft_fused", "shared_outer"),
        ("peft_fused_0_18", "stacked"),
    ],
)
def test_layouts_that_no_one_can_confuse(tmp_path: Path, first: str, second: str) -> None:
    (one, one_deltas), (other, other_deltas) = tensors_of(first), tensors_of(second)
    attention, deltas = linear_tensors(CONFIG, rng())
    tensors = attention | in_layer(0, one) | in_layer(1, other)
    write_adapter(tmp_path, tensors, adapter_options(target_modules=list(ATTENTION)))
    adapter = read(tmp_path)
    assert adapter.layout == f"linear+{first}+{second}"
    deltas |= {target: delta for target, delta in one_deltas.items() if target.layer == 0}
    deltas |= {target: delta for target, delta in other_deltas.items() if target.layer == 1}
    assert_describes(adapter, deltas, tolerance=EXACT)
    for layout in EXPERT_LAYOUTS:
        with pytest.raises(AdapterError, match=rf"layout {layout}, which was asked for"):
            read(tmp_path, layout=layout)


@pytest.mark.parametrize(("first", "second"), PAIRS_OF_LAYOUTS)
def test_layouts_that_are_easily_confused_are_refused(
    tmp_path: Path, first: str, second: str
) -> None:
    tensors = in_layer(0, tensors_of(first)[0]) | in_layer(1, tensors_of(second)[0])
    write_adapter(tmp_path, tensors, adapter_options())
    names = rf"({first}.*{second}|{second}.*{first})"
    with pytest.raises(AdapterError, match=rf"tensor '.*lora_A.*of the layout {names}"):
        read(tmp_path)


def test_a_factor_that_lacks_one_of_two_experts_is_not_taken_for_shared(tmp_path: Path) -> None:
    config = tiny_model_config(num_experts=2)
    tensors, _ = tensors_of("stacked", config)
    name = f"{PREFIX}.0.mlp.experts.up_proj.lora_A.weight"
    tensors[name] = tensors[name][:1]
    write_adapter(tmp_path, tensors, adapter_options())
    with pytest.raises(AdapterError, match=r"up_proj\.lora_A.*shared_outer.*of stacked"):
        read(tmp_path, config)


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ("per_expert", "stacked", EXPERTS),
        ("peft_fused", "per_expert", EXPERTS),
        ("peft_fused_0_18", "stacked", EXPERTS),
        ("stacked", "stacked", W),
        ("stacked", "stacked", MERGED),
        ("shared_outer", "per_expert", EXPERTS),
        ("shared_outer", "shared_outer", W),
    ],
)
def test_two_changes_of_one_matrix_are_refused(
    tmp_path: Path, first: str, second: str, names: Sequence[str]
) -> None:
    tensors, _ = tensors_of(first)
    if second == "per_expert":
        more, _ = tensors_of(second)
    else:
        more, _ = stacked_tensors(CONFIG, rng(), names=names, shared_outer=second == "shared_outer")
    write_adapter(tmp_path, more | tensors, options_of(first))
    with pytest.raises(AdapterError, match="changes the same as"):
        read(tmp_path)


# Asking for a layout.


@pytest.mark.parametrize("layout", ["linear", "peft", "", "Stacked"])
def test_unknown_layouts_are_refused(tmp_path: Path, layout: str) -> None:
    write_adapter(tmp_path, tensors_of("stacked")[0], adapter_options())
    with pytest.raises(AdapterError, match=f"'{layout}' is not one of per_expert, .*shared_outer"):
        read(tmp_path, layout=layout)


@pytest.mark.parametrize(("actual", "asked"), list(itertools.permutations(EXPERT_LAYOUTS, 2)))
def test_asking_for_another_layout_is_refused(tmp_path: Path, actual: str, asked: str) -> None:
    tensors = linear_tensors(CONFIG, rng())[0] | tensors_of(actual)[0]
    write_adapter(tmp_path, tensors, options_of(actual))
    with pytest.raises(AdapterError, match=rf"experts.*layout {asked}, which was asked for"):
        read(tmp_path, layout=asked)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_linear_layers_are_of_no_layout_that_one_asks_for(tmp_path: Path, layout: str) -> None:
    tensors, deltas = linear_tensors(CONFIG, rng())
    write_adapter(tmp_path, tensors, adapter_options())
    adapter = read(tmp_path, layout=layout)
    assert adapter.layout == "linear"
    assert_describes(adapter, deltas, tolerance=EXACT)


def test_llm_passes_the_layout_on(tmp_path: Path) -> None:
    llm = tiny_llm(config=SQUARE_DOWN)
    tensors, deltas = tensors_of("peft_fused_0_18", SQUARE_DOWN, parameters=["down_proj"])
    write_adapter(tmp_path, tensors, adapter_options(peft_version=None))
    with pytest.raises(AdapterError, match="must tell"):
        llm.load_adapter("old", tmp_path)
    adapter = llm.read_adapter(tmp_path, layout="peft_fused_0_18")
    assert_describes(adapter, deltas, tolerance=EXACT)
    llm.load_adapter("old", tmp_path, layout="peft_fused_0_18")
    assert llm.adapters()[0].layout == "peft_fused_0_18"
    with pytest.raises(AdapterError, match="'new' is in memory already"):
        llm.load_adapter("new", adapter, layout="peft_fused_0_18")
    llm.load_adapter("new", adapter)


# Writing them again.


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_every_layout_can_be_written_as_per_expert(tmp_path: Path, layout: str) -> None:
    tensors, deltas = tensors_of(layout)
    write_adapter(tmp_path / "from", tensors, options_of(layout))
    adapter = read(tmp_path / "from")
    save_adapter(tmp_path / "to", adapter, CONFIG.lora_sites(), layout="per_expert")
    again = read(tmp_path / "to")
    assert again.layout == "per_expert"
    assert_describes(again, deltas, tolerance=EXACT)
    names = load_file(tmp_path / "to" / "adapter_model.safetensors")
    assert f"{PREFIX}.1.mlp.experts.5.gate_proj.lora_A.weight" in names
