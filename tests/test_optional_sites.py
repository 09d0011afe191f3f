"""Adapter files on router, embedding and head: what is read, shared, compared, refused, written."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moelora_jax import LoraConfig
from moelora_jax.adapters import adapter_config
from moelora_jax.adapters.adapter import Adapter, Target
from moelora_jax.adapters.module_names import QWEN3_MOE_NAMES, ModuleNames
from moelora_jax.adapters.pages import PagePool
from moelora_jax.adapters.reader import read_adapter
from moelora_jax.adapters.writer import save_adapter
from moelora_jax.cli.limits import derive_lora
from moelora_jax.config import ModelConfig, RuntimeConfig
from moelora_jax.errors import AdapterError
from moelora_jax.models import FAMILIES
from tests.adapter_files import (
    PREFIX,
    Tensors,
    adapter_options,
    stacked_tensors,
    tiny_model_config,
    write_adapter,
)
from tests.test_adapter_writer import assert_same
from tests.test_families import TESTED, raw_config, torch_model
from tests.tiny_llm import TINY_RUNTIME, random_adapter, tiny_llm

OPTIONAL_SITES = ("router", "embed_tokens", "lm_head")
CONFIG = tiny_model_config()
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
VOCABULARY, HIDDEN, RANK = CONFIG.vocab_size, CONFIG.hidden_size, 4
EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
WIDE = LoraConfig(max_adapters=2, max_rank=16, optional_sites=OPTIONAL_SITES)


def tied_tensors() -> Tensors:
    """What PEFT saves of an adapter on both with ``ensure_weight_tying``."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(RANK, VOCABULARY)).astype(np.float32)
    b = rng.normal(size=(HIDDEN, RANK)).astype(np.float32)
    return {
        f"{EMBEDDING}.lora_embedding_A": a,
        f"{EMBEDDING}.lora_embedding_B": b,
        f"{HEAD}.lora_A.weight": b.T.copy(),
        f"{HEAD}.lora_B.weight": a.T.copy(),
    }


def read(
    folder: Path,
    tensors: Tensors,
    config: ModelConfig = CONFIG,
    names: ModuleNames = QWEN3_MOE_NAMES,
    **options: Any,
) -> Adapter:
    write_adapter(folder, tensors, adapter_options(r=RANK, **options))
    return read_adapter(folder, config.lora_sites(), module_names=names)


# Embedding and head of one matrix.


def test_what_is_tied_takes_pages_once(tmp_path: Path) -> None:
    pages = {}
    for tying in (False, True):
        adapter = read(tmp_path, tied_tensors(), TIED, ensure_weight_tying=tying)
        assert adapter.updates.keys() == {Target(0, s, 0) for s in ("embed_tokens", "lm_head")}
        pool = PagePool(TIED.lora_sites(), WIDE, np.float32)
        packed = pool.pack(adapter)
        pages[tying] = [packed.pages_by_width[width] for width in (VOCABULARY, HIDDEN)]
        # Nothing is lost on the way through pages, and what was shared is.
        again = pool.unpack(packed)
        assert_same(again, adapter)
        assert pool.pack(again).pages_by_width == packed.pages_by_width
    assert pages == {False: [2, 2], True: [1, 1]}


@pytest.mark.parametrize("gone", ["embed_tokens", "lm_head"])
def test_what_is_tied_needs_both(tmp_path: Path, gone: str) -> None:
    tensors = {name: tensor for name, tensor in tied_tensors().items() if gone not in name}
    with pytest.raises(AdapterError, match=f"tensor .*no counterpart for {gone}, and ensure_w"):
        read(tmp_path, tensors, TIED, ensure_weight_tying=True)
    # PEFT ties nothing where the model does not, or without the option.
    assert len(read(tmp_path, tensors, CONFIG, ensure_weight_tying=True).updates) == 1
    assert len(read(tmp_path, tensors, TIED).updates) == 1


@pytest.mark.parametrize("factor", ["A", "B"])
def test_what_is_tied_must_be_alike(tmp_path: Path, factor: str) -> None:
    tensors = tied_tensors()
    tensors[f"{HEAD}.lora_{factor}.weight"][1, 1] += 1
    with pytest.raises(AdapterError, match=r"lm_head\.lora_A.*not the transpose of embed_tokens"):
        read(tmp_path, tensors, TIED, ensure_weight_tying=True)
    assert len(read(tmp_path, tensors, TIED).updates) == 2


# Copies of base weights.


@pytest.mark.parametrize("name", [".base_layer", ""])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_copies_of_base_weights_are_compared(tmp_path: Path, dtype: Any, name: str) -> None:
    ours = np.random.default_rng(1).normal(size=(VOCABULARY, HIDDEN)).astype(np.float32)
    copy = {f"{HEAD}{name}.weight": ours.astype(dtype)}
    adapter = read(tmp_path, tied_tensors() | copy)
    pool = PagePool(CONFIG.lora_sites(), WIDE, np.float32)
    with pytest.raises(AdapterError, match="copy of the base model's lm_head"):
        pool.pack(adapter)
    compared = adapter.compared({"lm_head": ours}.__getitem__)
    assert pool.pack(compared).rank == RANK
    other = ours.copy()
    other[3, 5] += 0.25
    with pytest.raises(
        AdapterError, match=r"copy of the base model's lm_head differs from the model"
    ):
        adapter.compared({"lm_head": other}.__getitem__)


def test_added_vocabulary_is_refused(tmp_path: Path) -> None:
    name = f"{EMBEDDING}.base_layer.weight"
    copy = {name: np.zeros((VOCABULARY + 1, HIDDEN), np.float32)}
    with pytest.raises(AdapterError, match=rf"tensor '{name}' has shape .* adds vocabulary"):
        read(tmp_path, tied_tensors() | copy)


def test_llm_compares_copies() -> None:
    runtime = dataclasses.replace(TINY_RUNTIME, lora=WIDE)
    llm = tiny_llm(runtime)
    weight = np.asarray(llm.runner.model.base_weight("lm_head"))  # type: ignore[attr-defined]
    adapter = random_adapter(llm.config, 0, sites=["lm_head"])
    llm.load_adapter("same", dataclasses.replace(adapter, base_weights={"lm_head": weight}))
    with pytest.raises(AdapterError, match="differs from the model"):
        llm.load_adapter("other", dataclasses.replace(adapter, base_weights={"lm_head": -weight}))
    assert [info.name for info in llm.adapters()] == ["same"]
    # The plan shows what pages as wide as the vocabulary take: A of the one, B of the other.
    plan = llm.memory_plan()
    assert plan.vocabulary_pages == 2 * WIDE.max_adapters * 16 * VOCABULARY * 4
    assert tiny_llm(RuntimeConfig(buckets=runtime.buckets)).memory_plan().vocabulary_pages == 0


# Names.


def test_factors_of_an_embedding_have_names_of_their_own(tmp_path: Path) -> None:
    tensors = tied_tensors()
    a, b = f"{EMBEDDING}.lora_embedding_A", f"{EMBEDDING}.lora_embedding_B"
    plain = {f"{EMBEDDING}.lora_A.weight": tensors[a], f"{EMBEDDING}.lora_B.weight": tensors[b]}
    with pytest.raises(AdapterError, match=r"lora_A.*should be called lora_embedding_A"):
        read(tmp_path, plain)
    # PEFT can adapt the weight as a parameter, [vocabulary, hidden].
    turned = {
        f"{EMBEDDING}.lora_A.weight": np.ascontiguousarray(tensors[b].T),
        f"{EMBEDDING}.lora_B.weight": np.ascontiguousarray(tensors[a].T),
    }
    adapter = read(tmp_path, turned, target_parameters=["embed_tokens.weight"])
    (update,) = adapter.updates.values()
    np.testing.assert_array_equal(update.a, tensors[a])
    np.testing.assert_array_equal(update.b, tensors[b])


@pytest.mark.parametrize("name", TESTED)
def test_stacked_experts_by_every_name_of_the_family(tmp_path: Path, name: str) -> None:
    family = FAMILIES[TESTED[name].architecture]
    config, names = family.read_config(raw_config(name)), family.module_names
    spellings = [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")]
    found = []
    for path in names.experts:
        for projections in spellings:
            if not set(projections) <= names.projections.keys():
                continue
            tensors, deltas = stacked_tensors(config, np.random.default_rng(0), names=projections)
            tensors = {n.replace("mlp.experts", path): tensor for n, tensor in tensors.items()}
            adapter = read(tmp_path, tensors, config, names)
            assert adapter.updates.keys() == deltas.keys()
            found.append(tensors)
    if len(found) > 1:
        with pytest.raises(AdapterError, match="changes the same as"):
            read(tmp_path, found[0] | found[-1], config, names)


@pytest.mark.parametrize("path", ["block_sparse_moe.gate", "mlp.gate"])
def test_both_names_of_the_router_of_mixtral(tmp_path: Path, path: str) -> None:
    family = FAMILIES["MixtralForCausalLM"]
    config = family.read_config(raw_config("Mixtral"))
    experts = config.moe.num_experts
    factors = {"A": np.ones((RANK, config.hidden_size)), "B": np.ones((experts, RANK))}
    tensors = {f"{PREFIX}.1.{path}.lora_{f}.weight": t for f, t in factors.items()}
    adapter = read(tmp_path, tensors, config, family.module_names, target_modules=["gate"])
    assert adapter.updates.keys() == {Target(1, "router", 0)}
    with pytest.raises(AdapterError, match=r"mlp\.router\.lora_A\.weight"):
        renamed = {n.replace(path, "mlp.router"): tensor for n, tensor in tensors.items()}
        read(tmp_path, renamed, config, family.module_names)


# Pools.


def test_optional_sites_have_no_pools_unless_asked_for() -> None:
    pool = PagePool(CONFIG.lora_sites(), LoraConfig(max_adapters=1), np.float32)
    assert VOCABULARY not in pool.pools
    assert not set(pool.tables) & set(OPTIONAL_SITES)
    for site in OPTIONAL_SITES:
        adapter = random_adapter(CONFIG, 0, sites=[site])
        with pytest.raises(AdapterError, match=rf"{site}.*add it to LoraConfig\.optional_sites"):
            pool.pack(adapter)
        limits = derive_lora(CONFIG.lora_sites(), [adapter])
        assert limits.sites == (site,)
        assert PagePool(CONFIG.lora_sites(), limits, np.float32).pack(adapter).rank == 8
    with pytest.raises(ValueError, match=r"LoraConfig\.optional_sites: no site 'head'"):
        LoraConfig(optional_sites=("head",)).select(CONFIG.lora_sites())


# Options.


def test_every_option_of_peft_is_known() -> None:
    """None is refused as unknown, and so without a reason."""
    peft = pytest.importorskip("peft")
    known = {
        *adapter_config._VALID,
        *adapter_config._WITHOUT_EFFECT,
        *adapter_config._REFUSED,
        "peft_type",
    }
    saved = peft.LoraConfig(target_modules=["q_proj"]).to_dict()
    assert saved.keys() <= known


# Writing.


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Mixtral", "gpt-oss", "DeepSeek-V3"])
def test_peft_reads_what_is_written(tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    family = FAMILIES[TESTED[name].architecture]
    config, names = family.read_config(raw_config(name)), family.module_names
    sites, model = config.lora_sites(), torch_model(name)
    written = random_adapter(config, 0, rank=3, sites=[*OPTIONAL_SITES, "o_proj"])
    alike = {t: dataclasses.replace(u, scaling=2.0) for t, u in written.updates.items()}
    weight = model.lm_head.weight.detach().numpy()
    written = Adapter("memory", alike, base_weights={"lm_head": weight})
    save_adapter(tmp_path / "ours", written, sites, layout="peft_fused", module_names=names)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
        loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours"))
        loaded.save_pretrained(str(tmp_path / "theirs"))
    for folder in ("ours", "theirs"):
        again = read_adapter(tmp_path / folder, sites, module_names=names)
        assert_same(again, written)
        assert again.updates.keys() == written.updates.keys()
        assert again.base_weights["lm_head"].tobytes() == weight.tobytes()
