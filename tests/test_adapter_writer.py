"""Adapter folders that are written: they read back bit by bit, here and in PEFT."""

import inspect
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelora_jax.adapters.adapter import Adapter, LowRankUpdate, Target
from moelora_jax.adapters.module_names import QWEN3_MOE_NAMES, ModuleNames
from moelora_jax.adapters.reader import read_adapter
from moelora_jax.adapters.writer import Layout, save_adapter
from moelora_jax.config import ModelConfig
from moelora_jax.errors import AdapterError, LayoutError
from moelora_jax.models import FAMILIES
from tests.adapter_files import ATTENTION, EXPERTS, tiny_model_config, tiny_torch_model
from tests.test_families import TESTED, raw_config, torch_model

CONFIG = tiny_model_config()
SQUARE = tiny_model_config(hidden_size=32, intermediate_size=16)  # 2I == H


def make_adapter(
    config: ModelConfig = CONFIG,
    *,
    sites: Sequence[str] = (*ATTENTION, *EXPERTS),
    rank: int = 4,
    scaling: float = 2.0,
    layers: Sequence[int] | None = None,
    dtype: Any = np.float32,
) -> Adapter:
    """An adapter of one rank, in which gate and up of an expert share their A."""
    rng = np.random.default_rng(0)
    updates: dict[Target, LowRankUpdate] = {}
    for site in config.lora_sites():
        if site.name not in sites:
            continue
        for layer in site.layers if layers is None else layers:
            for expert in range(site.table_experts):
                a = rng.normal(size=(rank, site.in_features)).astype(dtype)
                b = rng.normal(size=(site.out_features, rank)).astype(dtype)
                gate = updates.get(Target(layer, "gate_proj", expert))
                if site.name == "up_proj" and gate is not None:
                    a = gate.a
                updates[Target(layer, site.name, expert)] = LowRankUpdate(a, b, scaling)
    return Adapter("memory", updates)


def changed(adapter: Adapter, target: Target, **changes: Any) -> Adapter:
    """The adapter with another update in one place."""
    old = adapter.updates[target]
    update = LowRankUpdate(**{"a": old.a, "b": old.b, "scaling": old.scaling} | changes)
    return Adapter("memory", {**adapter.updates, target: update})


def reread(
    folder: Path, config: ModelConfig = CONFIG, names: ModuleNames = QWEN3_MOE_NAMES
) -> Adapter:
    return read_adapter(folder, config.lora_sites(), module_names=names)


def assert_same(actual: Adapter, expected: Adapter) -> None:
    """The same bits everywhere; targets that only ``actual`` has change nothing."""
    for target, update in expected.updates.items():
        read = actual.updates[target]
        for mine, theirs in ((read.a, update.a), (read.b, update.b)):
            assert mine.dtype == theirs.dtype, target
            assert mine.shape == theirs.shape, target
            assert mine.tobytes() == theirs.tobytes(), target
        assert read.scaling == update.scaling, target
    for target in actual.updates.keys() - expected.updates.keys():
        assert not actual.updates[target].b.any(), target


@pytest.mark.parametrize("layout", ["per_expert", "peft_fused"])
@pytest.mark.parametrize("sites", [ATTENTION, EXPERTS, (*ATTENTION, *EXPERTS)])
@pytest.mark.parametrize("config", [CONFIG, SQUARE], ids=["unequal", "square"])
def test_reads_back_bit_by_bit(
    tmp_path: Path, layout: Layout, sites: Sequence[str], config: ModelConfig
) -> None:
    adapter = make_adapter(config, sites=sites)
    save_adapter(tmp_path / "new", adapter, config.lora_sites(), layout=layout)
    read = reread(tmp_path / "new", config)
    assert_same(read, adapter)
    assert read.updates.keys() == adapter.updates.keys()
    expected = {"linear"} if sites == ATTENTION else {layout, "linear"}
    assert set(read.layout.split("+")) == (expected if sites != EXPERTS else {layout})


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    save = inspect.unwrap(save_adapter)  # Without the tests' own checks of types.
    with pytest.raises(LayoutError, match="'stacked' is not one of per_expert, peft_fused"):
        save(tmp_path / "new", make_adapter(), CONFIG.lora_sites(), layout="stacked")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_keeps_the_dtype(tmp_path: Path, dtype: Any) -> None:
    adapter = make_adapter(dtype=dtype)
    save_adapter(tmp_path / "new", adapter, CONFIG.lora_sites(), layout="peft_fused")
    assert_same(reread(tmp_path / "new"), adapter)


@pytest.mark.parametrize("sites", [("down_proj",), ("gate_proj", "up_proj"), ("gate_proj",)])
def test_fused_with_one_parameter(tmp_path: Path, sites: Sequence[str]) -> None:
    adapter = make_adapter(sites=sites)
    save_adapter(tmp_path / "new", adapter, CONFIG.lora_sites(), layout="peft_fused")
    assert_same(reread(tmp_path / "new"), adapter)


def test_fused_with_another_parameter_in_each_layer(tmp_path: Path) -> None:
    first = make_adapter(layers=[0], sites=("down_proj", "q_proj"))
    second = make_adapter(layers=[1], sites=EXPERTS)
    adapter = Adapter("memory", {**first.updates, **second.updates})
    save_adapter(tmp_path / "new", adapter, CONFIG.lora_sites(), layout="peft_fused")
    assert_same(reread(tmp_path / "new"), adapter)


def test_fused_writes_missing_experts_as_zeros(tmp_path: Path) -> None:
    full = make_adapter()
    adapter = Adapter("memory", {t: u for t, u in full.updates.items() if t.expert != 3})
    save_adapter(tmp_path / "new", adapter, CONFIG.lora_sites(), layout="peft_fused")
    read = reread(tmp_path / "new")
    assert_same(read, adapter)
    assert not read.updates[Target(1, "down_proj", 3)].b.any()


@given(data=st.data(), use_rslora=st.booleans())
def test_any_mixture_of_ranks_and_scalings(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, use_rslora: bool
) -> None:
    """Per expert, every matrix may have its own rank and alpha, or be left out."""
    places = [
        (Target(layer, site.name, expert), site)
        for site in CONFIG.lora_sites()
        for layer in site.layers
        for expert in range(site.table_experts)
    ]
    chosen = data.draw(st.lists(st.sampled_from(places), min_size=1, unique_by=lambda p: p[0]))
    rng = np.random.default_rng(0)
    updates = {}
    for target, site in chosen:
        rank = data.draw(st.sampled_from([1, 3, 5, 8]))
        alpha = data.draw(st.sampled_from([0.1, 1.0, 7.0, 16.0]))
        updates[target] = LowRankUpdate(
            rng.normal(size=(rank, site.in_features)).astype(np.float32),
            rng.normal(size=(site.out_features, rank)).astype(np.float32),
            alpha / (rank**0.5 if use_rslora else rank),
        )
    adapter = Adapter("memory", updates)
    folder = tmp_path_factory.mktemp("adapters") / "new"
    save_adapter(folder, adapter, CONFIG.lora_sites(), layout="per_expert")
    read = reread(folder)
    assert_same(read, adapter)
    assert read.updates.keys() == adapter.updates.keys()


def test_patterns_are_short(tmp_path: Path) -> None:
    """A rank of a whole projection is one line, one of single experts another."""
    adapter = make_adapter(sites=("gate_proj", "up_proj"), rank=8)
    down = make_adapter(sites=("down_proj",), rank=2)
    more = make_adapter(sites=("gate_proj",), rank=3).updates
    odd = {t: u for t, u in more.items() if t.layer == 1 and t.expert in (2, 5)}
    adapter = Adapter("memory", {**adapter.updates, **down.updates, **odd})
    save_adapter(tmp_path / "new", adapter, CONFIG.lora_sites(), layout="per_expert")
    options = json.loads((tmp_path / "new/adapter_config.json").read_text())
    assert options["r"] == 8
    assert options["rank_pattern"] == {
        r"model\.layers\.1\.mlp\.experts\.(2|5)\.gate_proj": 3,
        "down_proj": 2,
    }
    assert_same(reread(tmp_path / "new"), adapter)


@pytest.mark.parametrize("sites", [EXPERTS, ("down_proj",), (*ATTENTION, *EXPERTS)])
def test_peft_reads_the_fused_layout(tmp_path: Path, sites: Sequence[str]) -> None:
    """What PEFT has loaded, saved again by PEFT, is the same adapter."""
    peft = pytest.importorskip("peft")
    adapter = make_adapter(sites=sites, rank=3, scaling=5 / 3)
    down = make_adapter(sites=("down_proj",), rank=5, scaling=0.5)
    adapter = Adapter("memory", {**adapter.updates, **down.updates})
    save_adapter(tmp_path / "ours", adapter, CONFIG.lora_sites(), layout="peft_fused")
    with warnings.catch_warnings():
        # PEFT 0.21 looks for patterns among modules only, though it applies them to parameters.
        warnings.filterwarnings("ignore", r"The following \w+_pattern keys did not", RuntimeWarning)
        loaded = peft.PeftModel.from_pretrained(tiny_torch_model(CONFIG), str(tmp_path / "ours"))
    loaded.save_pretrained(str(tmp_path / "theirs"))
    read = reread(tmp_path / "theirs")
    assert_same(read, adapter)
    assert read.updates.keys() == adapter.updates.keys()


@pytest.mark.parametrize("name", TESTED)
def test_peft_reads_the_fused_layout_of_every_family(tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    family = FAMILIES[TESTED[name].architecture]
    config = family.read_config(raw_config(name))
    adapter, names = make_adapter(config, rank=3), family.module_names
    save_adapter(
        tmp_path / "ours", adapter, config.lora_sites(), layout="peft_fused", module_names=names
    )
    model = torch_model(name)
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours"))
    loaded.save_pretrained(str(tmp_path / "theirs"))
    read = reread(tmp_path / "theirs", config, names)
    assert_same(read, adapter)
    assert read.updates.keys() == adapter.updates.keys()


def test_fused_stacks_and_fills_up(tmp_path: Path) -> None:
    """Where up has another A than gate, and experts have several ranks, zeros make up for it."""
    rng = np.random.default_rng(1)

    def factors(rank: int, in_features: int, out_features: int) -> dict[str, np.ndarray]:
        return {
            "a": rng.normal(size=(rank, in_features)).astype(np.float32),
            "b": rng.normal(size=(out_features, rank)).astype(np.float32),
        }

    up, down = Target(1, "up_proj", 2), Target(1, "down_proj", 2)
    adapter = changed(make_adapter(rank=4), up, **factors(2, 48, 20))
    adapter = changed(adapter, down, **factors(5, 20, 48))
    save_adapter(tmp_path / "new", adapter, CONFIG.lora_sites(), layout="peft_fused")
    read = reread(tmp_path / "new").updates
    assert read.keys() == adapter.updates.keys()
    for target, update in adapter.updates.items():
        its = read[target]
        # The two ranks of up come after the four of gate.
        start = 4 if target == up else 0
        part = slice(start, start + update.rank)
        assert its.scaling == update.scaling
        assert its.a[part].tobytes() == update.a.tobytes()
        assert its.b[:, part].tobytes() == update.b.tobytes()
        assert not np.delete(its.b, range(part.start, part.stop), axis=1).any()
        ranks = {"gate_proj": 6, "up_proj": 6, "down_proj": 5}
        expected = ranks.get(target.site, 4) if target.layer == 1 else 4
        assert its.rank == expected


def test_leaves_a_folder_with_files_alone(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(AdapterError, match="not an empty folder"):
        save_adapter(tmp_path, make_adapter(), CONFIG.lora_sites(), layout="per_expert")
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_an_empty_folder_may_exist(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    save_adapter(tmp_path / "new", make_adapter(), CONFIG.lora_sites(), layout="per_expert")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


UP = Target(1, "up_proj", 2)
DOWN = Target(1, "down_proj", 2)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (changed(make_adapter(), DOWN, scaling=3.0), "has scaling 3.0, but"),
        (changed(make_adapter(), DOWN, b=np.ones((48, 4), np.float16)), "has dtype float16, but"),
    ],
    ids=["scaling", "dtype"],
)
def test_what_fused_cannot_express(tmp_path: Path, adapter: Adapter, message: str) -> None:
    with pytest.raises(AdapterError, match=rf"layer 1, \w+, expert 2: .*{message}.*per_expert"):
        save_adapter(tmp_path / "new", adapter, CONFIG.lora_sites(), layout="peft_fused")
    assert not list(tmp_path.iterdir())
    save_adapter(tmp_path / "new", adapter, CONFIG.lora_sites(), layout="per_expert")
    assert_same(reread(tmp_path / "new"), adapter)


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({}, "changes nothing"),
        ({Target(0, "norm", 0): (48, 64)}, "no site of the model"),
        ({Target(2, "q_proj", 0): (48, 32)}, "layers \\(0, 1\\) only"),
        ({Target(0, "down_proj", 6): (20, 48)}, "has 6 experts"),
        ({Target(0, "q_proj", 0): (47, 32)}, r"A has shape \(2, 47\) .*\[rank, 48\]"),
        ({Target(0, "q_proj", 0): (48, 31)}, r"B \(31, 2\); .*\[32, rank\]"),
    ],
)
def test_refuses_what_the_reader_would(
    tmp_path: Path, updates: dict[Target, tuple[int, int]], message: str
) -> None:
    adapter = Adapter(
        "memory",
        {
            target: LowRankUpdate(
                np.ones((2, in_features), np.float32), np.ones((out_features, 2), np.float32), 1.0
            )
            for target, (in_features, out_features) in updates.items()
        },
    )
    with pytest.raises(AdapterError, match=message):
        save_adapter(tmp_path / "new", adapter, CONFIG.lora_sites(), layout="per_expert")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": np.full((4, 20), np.nan, np.float32)}, "not finite"),
        ({"a": np.ones((4, 20), np.int32)}, "dtype int32"),
        (
            {"a": np.ones((0, 20), np.float32), "b": np.ones((48, 0), np.float32)},
            "rank of at least 1",
        ),
        ({"scaling": float("inf")}, "scaling inf"),
    ],
)
def test_refuses_bad_numbers(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=rf"layer 1, down_proj, expert 2: .*{message}"):
        save_adapter(
            tmp_path / "new",
            changed(make_adapter(), DOWN, **changes),
            CONFIG.lora_sites(),
            layout="per_expert",
        )
