"""Change one tensor of a valid file, of every family and layout: an error names it.

What formats allow to be missing is not an error, and is then really not there: a layer, an expert
or a projection without a pair of factors is not changed; a copy of the base model's embedding or
head, which PEFT saves beside their factors, is only compared. But what the config says was adapted
must be there. And no reader can see a change that leaves names and shapes as they were: a square
matrix that was transposed, or two equal shapes exchanged.
"""

import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from moelora_jax import CheckpointError, LoraConfig, Prompt
from moelora_jax.adapters.adapter import Adapter, LowRankUpdate
from moelora_jax.adapters.layouts import EXPERT_LAYOUTS
from moelora_jax.adapters.pages import PagePool
from moelora_jax.adapters.reader import read_adapter
from moelora_jax.config import ModelConfig
from moelora_jax.errors import AdapterError
from moelora_jax.models import FAMILIES, ModelFamily
from moelora_jax.models.checkpoint import load_parameters, save_checkpoint
from tests.adapter_files import (
    Tensors,
    adapter_options,
    exchange_fused,
    fused_tensors,
    per_expert_tensors,
    stacked_tensors,
    write_adapter,
)
from tests.test_convert import interleaved
from tests.test_families import TESTED, raw_config, renamed
from tests.tiny_llm import random_adapter, tiny_llm

RANK, ALPHA = 4, 8
PREFIX = "base_model.model."
#: The layouts of experts: the five that are told apart, the sixth (what PEFT makes of per-expert
#: target_modules, with another rank of gate_up), and two more spellings.
KINDS = (*EXPERT_LAYOUTS, "converted", "per_expert_gate_up", "stacked_gate_up")


class AdapterFile(NamedTuple):
    """A valid adapter of a family."""

    config: ModelConfig
    tensors: Tensors
    options: dict[str, Any]


@functools.cache
def config_of(family: str) -> ModelConfig:
    return model_family(family).read_config(raw_config(family))


def model_family(family: str) -> ModelFamily:
    return FAMILIES[TESTED[family].architecture]


def kinds_of(family: str) -> list[str]:
    """All versions of PEFT save parameters with the in features first alike."""
    both = model_family(family).module_names.in_features_first
    return [kind for kind in KINDS if not (both and kind == "peft_fused_0_18")]


CASES = [(family, kind) for family in TESTED for kind in kinds_of(family)]


@functools.cache
def valid_file(family: str, kind: str) -> AdapterFile:
    """An adapter of everything that is not an expert, and of experts in one layout."""
    config, tested = config_of(family), TESTED[family]
    rng = np.random.default_rng(0)
    options: dict[str, Any] = {"rank": RANK, "scaling": ALPHA / RANK}
    changes: dict[str, Any] = {}
    if kind in ("per_expert", "per_expert_gate_up"):
        fuse = kind == "per_expert_gate_up"
        experts = per_expert_tensors(config, rng, fuse_gate_up=fuse, **options)[0]
        # Mixtral has other names for single projections alone.
        experts = experts if fuse else renamed(experts, tested.expert_names)
    elif kind.startswith("stacked"):
        names = ["gate_proj", "up_proj", "down_proj"]
        names = ["gate_up_proj", "down_proj"] if kind == "stacked_gate_up" else names
        experts = stacked_tensors(config, rng, names=names, **options)[0]
    elif kind == "shared_outer":
        experts = stacked_tensors(config, rng, shared_outer=True, **options)[0]
    else:
        experts = fused_tensors(config, rng, **options)[0]
        changes["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    if kind == "peft_fused_0_18":
        experts = exchange_fused(experts, config)
        changes["peft_version"] = "0.18.1"
    if kind == "converted":
        wide = fused_tensors(config, rng, rank=2 * RANK, scaling=ALPHA / RANK)[0]
        experts = {name: wide[name] if "base_layer" in name else experts[name] for name in experts}
        changes["rank_pattern"] = {"gate_up_proj": 2 * RANK}
        changes["alpha_pattern"] = {"gate_up_proj": 2 * ALPHA}
    if tested.interleaved:
        experts = interleaved(experts)
    dense = dict(dense_tensors(family, rng))
    changes["target_modules"] = sorted({module_of(name).rpartition(".")[2] for name in dense})
    return AdapterFile(
        config, dense | experts, adapter_options(r=RANK, lora_alpha=ALPHA, **changes)
    )


def dense_tensors(family: str, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Factors of every site but the experts; copies of embedding and head."""
    config, names = config_of(family), model_family(family).module_names
    for site in config.lora_sites():
        if site.num_experts or not site.layers:
            continue
        outside = [path for path, of in names.outside.items() if of == site.name]
        inside = [path for path, of in names.linear.items() if of == site.name]
        kind, suffix = ("lora_embedding_", "") if site.is_embedding else ("lora_", ".weight")
        for layer in site.layers:
            module = outside[0] if outside else f"{names.layers[0]}.{layer}.{inside[0]}"
            for factor, shape in (
                ("A", (RANK, site.in_features)),
                ("B", (site.out_features, RANK)),
            ):
                values = rng.normal(size=shape).astype(np.float32)
                yield f"{PREFIX}{module}.{kind}{factor}{suffix}", values
        if outside:
            shape = (config.vocab_size, config.hidden_size)
            yield f"{PREFIX}{outside[0]}.base_layer.weight", np.zeros(shape, np.float32)


def module_of(name: str) -> str:
    return re.split(r"\.(?:lora_|base_layer\.weight)", name)[0]


def is_copy(name: str) -> bool:
    return name.endswith(".base_layer.weight")


def partner_of(name: str) -> str:
    """The other factor of the same module."""
    return re.sub(r"(lora_(?:embedding_)?)([AB])", lambda m: m[1] + "BA"["AB".index(m[2])], name)


def read(family: str, kind: str, change: Callable[[Tensors], object]) -> Adapter:
    """Read a valid file after a change of its tensors."""
    file = valid_file(family, kind)
    tensors = dict(file.tensors)
    change(tensors)
    names = model_family(family).module_names
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), tensors, file.options)
        return read_adapter(folder, file.config.lora_sites(), module_names=names)


def assert_refused(case: tuple[str, str], change: Callable[[Tensors], object], *names: str) -> None:
    """The error must name the file and one of these tensors."""
    with pytest.raises(AdapterError) as caught:
        read(*case, change)
    message = str(caught.value)
    assert "adapter_model.safetensors" in message
    assert any(repr(name) in message for name in names), message


# Made before Hypothesis draws from them, because checked types draw random numbers of their own.
VALID = {case: valid_file(*case) for case in CASES}


@st.composite
def tensors_of_files(draw: st.DrawFn) -> tuple[tuple[str, str], str]:
    """A family and a layout, and the name of a tensor."""
    case = draw(st.sampled_from(CASES))
    tensors = VALID[case].tensors
    # Most tensors are of experts, so that the kind of module is drawn first.
    kind = draw(st.sampled_from(sorted({re.sub(r"\d+", "*", name) for name in tensors})))
    return case, draw(st.sampled_from([n for n in tensors if re.sub(r"\d+", "*", n) == kind]))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_unchanged_files_are_valid(case: tuple[str, str]) -> None:
    adapter, tensors = read(*case, lambda _: None), valid_file(*case).tensors
    assert adapter.num_parameters == sum(t.size for n, t in tensors.items() if not is_copy(n))
    assert adapter.base_weights.keys() == {"embed_tokens", "lm_head"}


@given(tensors_of_files())
def test_deleting_a_tensor(choice: tuple[tuple[str, str], str]) -> None:
    case, name = choice
    if is_copy(name):
        assert len(read(*case, lambda tensors: tensors.pop(name)).base_weights) == 1
    else:
        assert_refused(case, lambda tensors: tensors.pop(name), name, partner_of(name))


@given(tensors_of_files())
def test_deleting_a_pair(choice: tuple[tuple[str, str], str]) -> None:
    """Nothing else changes, and pages hold no update; unless the config names what is missing."""
    case, name = choice
    if is_copy(name):
        return
    file = valid_file(*case)

    def change(tensors: Tensors) -> None:
        del tensors[name], tensors[partner_of(name)]

    if re.search(r"experts\.(base_layer\.)?lora_", name):
        # Without its counterpart, a parameter of the experts could be either of the two.
        inner, outer = "experts.base_layer.lora_", "experts.lora_"
        other = name.replace(inner, outer) if inner in name else name.replace(outer, inner)
        assert_refused(case, change, other, partner_of(other))
        return
    module = module_of(name).rpartition(".")[2]
    others = [n for n in file.tensors if n not in (name, partner_of(name)) and not is_copy(n)]
    is_target = module in file.options["target_modules"]
    if is_target and all(module_of(n).rpartition(".")[2] != module for n in others):
        with pytest.raises(AdapterError, match=f"target_modules.*no tensors for '{module}'"):
            read(*case, change)
        return
    before, after = read(*case, lambda _: None), read(*case, change)
    deleted = file.tensors[name].size + file.tensors[partner_of(name)].size
    assert after.num_parameters == before.num_parameters - deleted
    for target, update in after.updates.items():
        assert update.a.tobytes() == before.updates[target].a.tobytes()
        assert update.b.tobytes() == before.updates[target].b.tobytes()
    sites = file.config.lora_sites()
    optional = tuple(site.name for site in sites if site.optional)
    pool = PagePool(sites, LoraConfig(1, 16, 16, optional_sites=optional), jnp.float32)
    tables = pool.pack(after.compared(lambda site: after.base_weights[site])).tables
    removed = before.updates.keys() - after.updates.keys()
    assert removed
    for layer, site, expert in removed:
        row = next(s for s in sites if s.name == site).layers.index(layer)
        assert (tables[site].pages[row, ..., expert] == -1).all()
        assert not tables[site].scaling[row, expert]


RENAMES = [
    (r"layers\.\d", "layers.7"),
    (r"layers\.(\d)", r"layers.0\1"),
    (r"layers\.\d", "layers.-1"),
    (r"experts\.\d", "experts.6"),
    (r"_proj|w\d\.", "_projection."),
    (r"experts", "experts.0"),
    (r"(self_attn|mlp|block_sparse_moe)", "cross_attn"),
    (r"lora_", "lora_C_"),
    (r"lora_(embedding_)?[AB]", "lora_magnitude_vector"),
    (r"lora_(?=[AB])", "lora_embedding_"),
    (r"lora_embedding_", "lora_"),
    (r"(lora_(embedding_)?[AB])", r"\1.other"),
    (r"(base_layer)\.weight", r"\1.bias"),
    (r"base_layer\.weight", "weight"),
    (r"(.*)\.lora_[AB].*", r"\1.weight"),
    (r"(.*)\.lora_[AB].*", r"\1.bias"),
    (r"(.*)\.lora_[AB].*", r"\1.base_layer.weight"),
    (r"^", "base_model.model."),
    (r"^", "vision."),
    (r"model\.layers", "model.encoder.layers"),
    (r"lm_head|embed_tokens", "norm"),
    (r"mlp\.(gate|router)\.", "mlp.switch."),
    (r"block_sparse_moe", "mlp"),
    (r"experts(?=\.lora)", "experts.base_layer"),
]


@given(tensors_of_files(), st.sampled_from(RENAMES))
def test_renaming_a_tensor(choice: tuple[tuple[str, str], str], rule: tuple[str, str]) -> None:
    case, name = choice
    new = re.sub(*rule, name, count=1)
    if new == name or new in valid_file(*case).tensors:
        return

    def change(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(name)

    assert_refused(case, change, name, new, partner_of(name), partner_of(new))


@given(tensors_of_files(), st.data())
def test_transposing_a_tensor(choice: tuple[tuple[str, str], str], data: st.DataObject) -> None:
    case, name = choice
    tensor = valid_file(*case).tensors[name]
    turned = tensor.transpose(data.draw(st.permutations(range(tensor.ndim))))
    if turned.shape != tensor.shape:
        assert_refused(case, lambda tensors: tensors.update({name: turned}), name)


@given(tensors_of_files(), st.integers(0, 2), st.booleans())
def test_truncating_or_extending_a_tensor(
    choice: tuple[tuple[str, str], str], axis: int, longer: bool
) -> None:
    case, name = choice
    tensor = valid_file(*case).tensors[name]
    axis %= tensor.ndim
    first = np.take(tensor, [0], axis)
    cut = np.concatenate([tensor, first], axis) if longer else np.delete(tensor, -1, axis)
    # A factor with a wrong number of experts or ranks may be told by the one that it has beside it.
    assert_refused(case, lambda tensors: tensors.update({name: cut}), name, partner_of(name))


@given(tensors_of_files(), st.data())
def test_adding_a_tensor(choice: tuple[tuple[str, str], str], data: st.DataObject) -> None:
    case, name = choice
    layer = f"{PREFIX}model.layers.0."
    unknown = [
        "x",
        f"{PREFIX}lm_head.weight",
        f"{PREFIX}model.embed_tokens.weight",
        f"{PREFIX}model.norm.weight",
        f"{PREFIX}model.norm.lora_A.weight",
        f"{layer}input_layernorm.lora_A.weight",
        f"{layer}self_attn.q_proj.weight",
        f"{layer}self_attn.o_proj.bias",
        f"{layer}self_attn.o_proj.lora_B.bias",
        f"{layer}self_attn.o_proj.base_layer.weight",
        f"{layer}self_attn.o_proj.lora_magnitude_vector",
        f"{layer}mlp.experts.gate_up_proj_bias",
        f"{layer}mlp.experts.lora_magnitude_vector.default.weight",
        f"{layer}mlp.experts.0.lora_A.weight",
        "base_model.model.model.language_model.layers.0.self_attn.o_proj.lora_A.weight",
        # The same tensor by another name.
        name.removeprefix(PREFIX),
        name.removesuffix(".weight") + ".default.weight" if ".lora_" in name else "y",
    ]
    added = data.draw(st.sampled_from(unknown))
    assert added not in valid_file(*case).tensors
    tensor = valid_file(*case).tensors[name]
    assert_refused(case, lambda tensors: tensors.update({added: tensor}), added, name)


def test_a_missing_expert_is_a_zero() -> None:
    """Rows of an adapter without some expert are those of the adapter that has zeros there."""
    llm = tiny_llm()
    whole = random_adapter(llm.config, 0)
    gone = {target for target in whole.updates if target.expert == 3 and target.layer == 1}
    kept = {target: u for target, u in whole.updates.items() if target not in gone}
    zeros = {
        target: LowRankUpdate(u.a, np.zeros_like(u.b), u.scaling)
        for target, u in whole.updates.items()
        if target in gone
    }
    llm.load_adapter("missing", Adapter("memory", kept))
    llm.load_adapter("zeros", Adapter("memory", kept | zeros))
    llm.load_adapter("whole", whole)
    tokens = list(range(1, 16))
    missing, zero, full = (
        llm.score([Prompt(tokens, name)])[0] for name in ("missing", "zeros", "whole")
    )
    assert missing.tobytes() == zero.tobytes()
    assert np.abs(full - missing).max() > 0.01


# Checkpoints of base models.


@functools.cache
def checkpoint(family: str) -> Tensors:
    """The tensors of a random checkpoint of a family."""
    rng = np.random.default_rng(0)
    table = model_family(family).parameters(config_of(family))
    arrays = {name: rng.normal(size=p.shape).astype(np.float32) for name, p in table.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        save_checkpoint(folder, {}, table, arrays)
        return load_file(folder / "model.safetensors")


def delete(tensors: Tensors, name: str) -> str:
    del tensors[name]
    return name


def rename(tensors: Tensors, name: str) -> str:
    tensors[name + ".default"] = tensors.pop(name)
    return name


def transpose(tensors: Tensors, name: str) -> str | None:
    turned = np.ascontiguousarray(tensors[name].T)
    same = turned.shape == tensors[name].shape
    tensors[name] = turned
    return None if same else name


def truncate(tensors: Tensors, name: str) -> str:
    tensors[name] = np.delete(tensors[name], 0, axis=0)
    return name


def truncate_columns(tensors: Tensors, name: str) -> str:
    tensors[name] = np.ascontiguousarray(tensors[name][..., 1:])
    return name


def extend(tensors: Tensors, name: str) -> str:
    tensors[name] = np.concatenate([tensors[name], tensors[name][:1]])
    return name


def add(tensors: Tensors, name: str) -> str:
    added = f"{name}.lora_A"
    tensors[added] = tensors[name]
    return added


@given(
    st.sampled_from(sorted(TESTED)),
    st.sampled_from([delete, rename, transpose, truncate, truncate_columns, extend, add]),
    st.integers(0, 10_000),
)
def test_a_changed_checkpoint_is_refused(
    family: str,
    mutate: Callable[[Tensors, str], str | None],
    number: int,
) -> None:
    tensors = dict(checkpoint(family))
    names = sorted(tensors)
    named = mutate(tensors, names[number % len(names)])
    if named is None:
        return
    model = model_family(family)
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "model.safetensors")
        with pytest.raises(CheckpointError, match=re.escape(named)):
            load_parameters(
                folder,
                model.parameters(config_of(family)),
                jnp.float32,
                ignore=model.ignored_tensors,
            )
