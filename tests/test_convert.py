"""Adapters that are written in another layout change the same, here and in PEFT."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

from moelora_jax import LLM, LoraConfig, RuntimeConfig
from moelora_jax.adapters.adapter import Adapter, Target
from moelora_jax.adapters.layouts import EXPERT_LAYOUTS
from moelora_jax.adapters.reader import read_adapter
from moelora_jax.adapters.writer import Layout
from moelora_jax.cli import app
from moelora_jax.models import FAMILIES
from tests.adapter_files import (
    EXPERTS,
    Deltas,
    Tensors,
    adapter_options,
    assert_describes,
    exchange_fused,
    fused_tensors,
    linear_tensors,
    per_expert_tensors,
    stacked_tensors,
    tiny_model_config,
    write_adapter,
)
from tests.test_adapter_writer import assert_same
from tests.test_families import TESTED, linear_sites, raw_config, renamed, torch_model
from tests.tiny_llm import tiny_llm

RANK, SCALING = 3, 5 / 3
# Products of three float32 numbers below 0.2, times the scaling.
TOLERANCE = 1e-7


def interleaved(tensors: Tensors) -> Tensors:
    """Gate and up alternate in the rows of B, not one after the other."""

    def alternate(name: str, tensor: np.ndarray) -> np.ndarray:
        if "lora_B" not in name or ("base_layer" not in name and "gate_up_proj" not in name):
            return tensor
        axis = tensor.ndim - 2
        return np.stack(np.split(tensor, 2, axis=axis), axis=axis + 1).reshape(tensor.shape)

    return {name: alternate(name, tensor) for name, tensor in tensors.items()}


def write_source(folder: Path, name: str, layout: str, dtype: Any = np.float32) -> Deltas:
    """An adapter of attention and experts, the experts in one layout; what it changes."""
    family = TESTED[name]
    config = FAMILIES[family.architecture].read_config(raw_config(name))
    rng = np.random.default_rng(0)
    options: dict[str, Any] = {"rank": RANK, "scaling": SCALING, "dtype": dtype}
    linear, deltas = linear_tensors(config, rng, sites=linear_sites(config), **options)
    if layout == "per_expert":
        experts, more = per_expert_tensors(config, rng, **options)
        experts = renamed(experts, family.expert_names)
    elif layout.startswith("peft_fused"):
        experts, more = fused_tensors(config, rng, **options)
        if layout == "peft_fused_0_18":
            experts = exchange_fused(experts, config)
    else:
        shared = layout == "shared_outer"
        names = ("gate_up_proj", "down_proj") if shared else ("gate_proj", "up_proj", "down_proj")
        experts, more = stacked_tensors(config, rng, names=names, shared_outer=shared, **options)
    if family.interleaved:
        experts = interleaved(experts)
    version = "0.18.1" if layout == "peft_fused_0_18" else "0.21.2"
    write_adapter(
        folder,
        linear | experts,
        adapter_options(
            r=RANK,
            lora_alpha=5,
            peft_version=version,
            base_model_name_or_path="somebody/a-model",
        ),
    )
    return deltas | more


def convert(source: Path, new: Path, name: str, layout: Layout) -> Adapter:
    """The adapter that ``moelora convert`` writes."""
    model = new.parent / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(raw_config(name)))
    arguments = ["convert", source, new, "--model", model, "--layout", layout]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    family = FAMILIES[TESTED[name].architecture]
    sites = family.read_config(raw_config(name)).lora_sites()
    return read_adapter(new, sites, module_names=family.module_names)


def peft_deltas(name: str, folder: Path) -> Deltas:
    """What PEFT adds to the weights once it has loaded an adapter."""
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(torch_model(name), str(folder))
    deltas: Deltas = {}
    for path, module in model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        delta = module.get_delta_weight("default").detach().double().numpy()
        layer, _, path = path.removeprefix("base_model.model.model.layers.").partition(".")
        layer = int(layer)
        if not path.startswith("mlp.experts"):
            site = path.removeprefix("self_attn.").removeprefix("mlp.")
            site = path if site in EXPERTS else site
            deltas[Target(layer, site, 0)] = delta
            continue
        if TESTED[name].interleaved:
            delta = delta.swapaxes(1, 2)  # [experts, out, in]
        for expert, matrix in enumerate(delta):
            if module.parameter_name == "down_proj":
                deltas[Target(layer, "down_proj", expert)] = matrix
                continue
            pairs = matrix.reshape(-1, 2, matrix.shape[1]).swapaxes(0, 1)
            gate, up = pairs if TESTED[name].interleaved else np.split(matrix, 2)
            deltas[Target(layer, "gate_proj", expert)] = gate
            deltas[Target(layer, "up_proj", expert)] = up
    return deltas


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not:RuntimeWarning")
@pytest.mark.parametrize("source", EXPERT_LAYOUTS)
@pytest.mark.parametrize("name", TESTED)
def test_every_layout_of_every_family(tmp_path: Path, name: str, source: str) -> None:
    pytest.importorskip("torch")
    if (
        source == "peft_fused_0_18"
        and FAMILIES[TESTED[name].architecture].module_names.in_features_first
    ):
        pytest.skip("all versions of PEFT save these alike")
    deltas = write_source(tmp_path / "source", name, source)
    per_expert = convert(tmp_path / "source", tmp_path / "single", name, "per_expert")
    assert set(per_expert.layout.split("+")) == {"linear", "per_expert"}
    assert_describes(per_expert, deltas, tolerance=TOLERANCE)

    fused = convert(tmp_path / "source", tmp_path / "fused", name, "peft_fused")
    assert set(fused.layout.split("+")) == {"linear", "peft_fused"}
    assert_describes(fused, deltas, tolerance=TOLERANCE)
    again = convert(tmp_path / "single", tmp_path / "again", name, "peft_fused")
    assert_same(again, fused)

    readable = {"fused": deltas}
    # PEFT converts adapters of single experts; of gpt-oss no model ever had such modules. It takes
    # linear layers that are called like projections of experts for these, and leaves them out.
    if name != "gpt-oss":
        readable["single"] = {t: d for t, d in deltas.items() if "." not in t.site}
    for folder, expected in readable.items():
        found = peft_deltas(name, tmp_path / folder)
        assert found.keys() == expected.keys()
        for target, delta in expected.items():
            np.testing.assert_allclose(found[target], delta, rtol=0, atol=TOLERANCE)


def test_the_base_models_name_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    write_source(tmp_path / "source", "OLMoE", "stacked")
    convert(tmp_path / "source", tmp_path / "new", "OLMoE", "per_expert")
    assert "somebody/a-model" in (tmp_path / "new" / "adapter_config.json").read_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("source", EXPERT_LAYOUTS)
def test_what_is_held_in_pages_is_saved_bit_by_bit(tmp_path: Path, source: str, dtype: Any) -> None:
    """From a file to pages to a file: on the device, and after it has left the device."""
    config = tiny_model_config()
    runtime = RuntimeConfig(lora=LoraConfig(max_adapters=1, max_rank=16))
    llm: LLM = tiny_llm(runtime, config, dtype=dtype)
    numpy_dtype = ml_dtypes.bfloat16 if dtype == jnp.bfloat16 else np.float32
    rng, options = np.random.default_rng(0), {"rank": RANK, "scaling": SCALING}
    if source == "per_expert":
        tensors, _ = per_expert_tensors(config, rng, dtype=numpy_dtype, **options)
    elif source.startswith("peft_fused"):
        tensors, _ = fused_tensors(config, rng, dtype=numpy_dtype, **options)
        tensors = exchange_fused(tensors, config) if source.endswith("0_18") else tensors
    else:
        shared = source == "shared_outer"
        tensors, _ = stacked_tensors(config, rng, dtype=numpy_dtype, shared_outer=shared, **options)
    linear, _ = linear_tensors(config, rng, dtype=numpy_dtype, **options)
    write_adapter(tmp_path / "file", tensors | linear, adapter_options(r=RANK, lora_alpha=5))
    original = llm.read_adapter(tmp_path / "file")
    assert source in original.layout
    llm.load_adapter("a", tmp_path / "file")
    for where in ("device", "host"):
        assert (llm.adapters()[0].slot is None) == (where == "host")
        llm.save_adapter("a", tmp_path / where, layout="per_expert", base_model="x")
        read = llm.read_adapter(tmp_path / where)
        assert_same(read, original)
        assert read.updates.keys() == original.updates.keys()
        llm.load_adapter("b", tmp_path / where)  # there is one slot, so "a" leaves it
    llm.save_adapter("a", tmp_path / "fused", layout="peft_fused")
    llm.load_adapter("a", tmp_path / "fused")
    llm.save_adapter("a", tmp_path / "fused again", layout="peft_fused")
    assert_same(llm.read_adapter(tmp_path / "fused again"), llm.read_adapter(tmp_path / "fused"))
