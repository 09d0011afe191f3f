# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Parity with PyTorch and PEFT
#
# Fast kernels are worth little if they compute something else. Here the same prompts go through
# this library, all in one mixed batch, and through transformers with PEFT in float32, each alone.
# They are compared layer by layer, so that an error is found where it is made. `moelora parity`
# does the same from the command line, with a model and adapters of yours.
#
# This notebook needs the extra `torch`.

# %%
import json
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from safetensors.numpy import load_file, save_file

from moelora_jax import LLM, BucketConfig, CacheConfig, LoraConfig, Prompt, RuntimeConfig
from moelora_jax.cli.demo_files import MODEL_CONFIG, write_demo
from moelora_jax.parity import compare, trace_torch_rows

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "IProgress not found")  # No widgets are needed here.
    from transformers.utils import logging
logging.disable_progress_bar()
logging.set_verbosity_error()

plt.rcParams["figure.dpi"] = 80
folder = tempfile.TemporaryDirectory(prefix="moelora-")  # Goes with the kernel.
demo = Path(folder.name)
write_demo(demo, rows=1, seed=0)
adapters = demo / "adapters"

# %% [markdown]
# ## One adapter, all layouts
#
# The demo's adapter `both-r16` changes attention and experts, and is in the layout of PEFT 0.19.
# That file is what PyTorch reads. From it we make the other layouts that are in use, by moving
# numbers about: what was trained is the same, so what comes out must be, too.
#
# In PEFT's fused layout, $A$ is expert-major, `[experts * rank, in]`, but $B$ is expert-*minor*,
# `[out, rank * experts]`. Read the other way round, the shapes fit and the numbers are wrong; that
# is a mistake that only parity finds.

# %%
experts, rank = MODEL_CONFIG["num_experts"], 16
source = load_file(adapters / "both-r16" / "adapter_model.safetensors")
options = json.loads((adapters / "both-r16" / "adapter_config.json").read_text())
# The inner parameter that PEFT wraps is gate_up_proj, the outer one down_proj.
PARAMETERS = {"experts.base_layer.": "gate_up_proj", "experts.": "down_proj"}


def factors():
    """Of each expert parameter: A ``[experts, rank, in]`` and B ``[experts, out, rank]``."""
    for layer in range(MODEL_CONFIG["num_hidden_layers"]):
        prefix = f"base_model.model.model.layers.{layer}.mlp."
        for module, parameter in PARAMETERS.items():
            a = source[f"{prefix}{module}lora_A.weight"]
            b = source[f"{prefix}{module}lora_B.weight"]
            a = a.reshape(experts, rank, -1)
            b = b.reshape(len(b), rank, experts).transpose(2, 0, 1)
            yield prefix, module, parameter, a, b


def projections(parameter, a, b):
    """The same for each projection; gate and up have one A."""
    if parameter == "down_proj":
        return {"down_proj": (a, b)}
    gate, up = np.split(b, 2, axis=1)
    return {"gate_proj": (a, gate), "up_proj": (a, up)}


def write(name: str, tensors: dict[str, np.ndarray], **changes) -> None:
    attention = {key: value for key, value in source.items() if "experts" not in key}
    everything = attention | {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    (adapters / name).mkdir()
    save_file(everything, adapters / name / "adapter_model.safetensors")
    (adapters / name / "adapter_config.json").write_text(json.dumps(options | changes))


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MODULES = {
    "target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"],
    "target_parameters": None,
}
per_expert, stacked, fused_0_18 = {}, {}, {}
for prefix, module, parameter, a, b in factors():
    for projection, (its_a, its_b) in projections(parameter, a, b).items():
        stacked[f"{prefix}experts.{projection}.lora_A.weight"] = its_a
        stacked[f"{prefix}experts.{projection}.lora_B.weight"] = its_b
        for expert in range(experts):
            name = f"{prefix}experts.{expert}.{projection}"
            per_expert[f"{name}.lora_A.weight"] = its_a[expert]
            per_expert[f"{name}.lora_B.weight"] = its_b[expert]
    # PEFT 0.18 took the other dimension for the input, so A and B are exchanged.
    turned = b.transpose(0, 2, 1).reshape(experts * rank, -1)
    fused_0_18[f"{prefix}{module}lora_A.weight"] = turned
    fused_0_18[f"{prefix}{module}lora_B.weight"] = a.transpose(2, 1, 0).reshape(-1, rank * experts)
write("per_expert", per_expert, **MODULES)
write("stacked", stacked, **MODULES)
write("peft_fused_0_18", fused_0_18, peft_version="0.18.1")

# %% [markdown]
# The sixth layout, *shared outer*, has fewer numbers: all experts share the $A$ of gate and up, and
# the $B$ of down. It is another adapter, so PyTorch gets its own: PEFT cannot read it, and
# `LLM.save_adapter` writes it once more as `peft_fused`.

# %%
shared = {}
for prefix, _, parameter, a, b in factors():
    for projection, (its_a, its_b) in projections(parameter, a, b).items():
        is_down = projection == "down_proj"
        shared[f"{prefix}experts.{projection}.lora_A.weight"] = its_a if is_down else its_a[:1]
        shared[f"{prefix}experts.{projection}.lora_B.weight"] = its_b[:1] if is_down else its_b
write("shared_outer", shared, **MODULES)

# %% [markdown]
# ## Everything in one batch here
#
# One row of the base model, and one for each file; rows take different lengths, and all of them are
# one program's work.

# %%
llm = LLM.load(
    demo / "model",
    runtime=RuntimeConfig(
        lora=LoraConfig(max_adapters=8, max_rank=32),
        buckets=BucketConfig(decode=(8,), prefill=(256,)),
        cache=CacheConfig(max_length=64),
    ),
)
same = ["both-r16", "per_expert", "stacked", "peft_fused_0_18"]
names = [*same, "shared_outer", "attention-r3", "experts-r8"]
for name in names:
    llm.load_adapter(name, adapters / name)
for info in llm.adapters():
    print(f"{info.name:16} rank {info.rank:2}  {info.layout}")

rng = np.random.default_rng(0)
tokens = rng.integers(256, size=32)
prompts = [Prompt(tokens[: 32 - 2 * i], name) for i, name in enumerate((None, *names))]
traces = llm.trace(prompts)
full = [Prompt(tokens, name) for name in same]
logits_of_layouts = llm.score(full)

# %% [markdown]
# Files of different layouts with the same numbers give the same *bits*: after reading they are
# the same pages, so there is nothing left that could differ.

# %%
for name, logits in zip(same, logits_of_layouts, strict=True):
    print(f"{name:16} equals both-r16 bit by bit: {np.array_equal(logits, logits_of_layouts[0])}")
    assert np.array_equal(logits, logits_of_layouts[0])

# %% [markdown]
# ## Each row alone in PyTorch
#
# Adapters that PEFT reads go there as they are. The others are converted, those of the same
# numbers to the file they were made from.

# %%
readable = {name: adapters / "both-r16" for name in same}
readable["attention-r3"] = adapters / "attention-r3"
for name in ("shared_outer", "experts-r8"):
    readable[name] = adapters / f"{name}-converted"
    llm.save_adapter(name, readable[name], layout="peft_fused")
references = trace_torch_rows(demo / "model", readable, prompts)
found = compare(traces, references)

# %% [markdown]
# ## Layer by layer
#
# Errors are relative to the largest number of a layer. They begin at the rounding of float32
# ($6 \cdot 10^{-8}$) and grow slowly with depth, as each layer inherits those before. A mistake in
# a layout would be a step of many orders of magnitude in the first layer that it touches; the last
# picture makes one.

# %%
quantities = ("moe_input", "router_logits", "weights", "moe_output")


def plot_layers(panel, comparison, title: str) -> None:
    layers = [errors.layer for errors in comparison.layers]
    for name in quantities:
        values = [getattr(errors, name) for errors in comparison.layers]
        panel.plot(layers, values, "o-", label=name.replace("_", " ").replace("moe", "MoE"))
    panel.axhline(1e-5, color="black", linestyle=":", label="bound of the tests")
    panel.set(yscale="log", ylim=(3e-8, 10), xticks=layers, xlabel="layer", title=title)


for errors in found.layers:
    print(f"layer {errors.layer}: {errors.equal_choices:.0%} of the experts chosen are the same")

figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 3.4), layout="constrained", width_ratios=(1, 1.3)
)
plot_layers(left, found, "errors against PyTorch")
left.set_ylabel("largest error")
left.legend(frameon=False, fontsize=8, ncol=2)
labels = [errors.adapter or "base model" for errors in found.adapters]
places = np.arange(len(labels))
right.bar(places, [errors.logits for errors in found.adapters], color="tab:blue")
right.axhline(2e-5, color="black", linestyle=":", label="bound of the tests, 2e-5")
right.set_xticks(places, labels, rotation=30, ha="right")
right.set(
    ylabel="largest error of a logit", title=f"logits, of up to {found.total.largest_logit:.1f}"
)
right.legend(frameon=False)
plt.show()

assert found.total.logits <= 2e-5  # some tens of the spacing of float32 at this magnitude
for errors in found.layers:
    assert errors.equal_choices == 1
    assert max(getattr(errors, name) for name in quantities) < 1e-5

# %% [markdown]
# ## Would a mistake be seen?
#
# We read $B$ expert-major, on purpose: every shape fits, loading succeeds, and text would come out.

# %%
wrong = {}
for prefix, module, _, a, b in factors():
    wrong[f"{prefix}{module}lora_A.weight"] = a.reshape(experts * rank, -1)
    # [out, experts * rank] where [out, rank * experts] is meant.
    wrong[f"{prefix}{module}lora_B.weight"] = b.transpose(1, 0, 2).reshape(b.shape[1], -1)
write("wrong", wrong)
llm.load_adapter("wrong", adapters / "wrong")
reference = references[names.index("both-r16") + 1]
(mistaken,) = llm.trace([Prompt(reference.tokens, "wrong")])
mistaken = replace(mistaken, adapter="both-r16")  # Rows are compared under one name.
compared = compare([mistaken], [reference])

figure, panel = plt.subplots(figsize=(6, 3.2), layout="constrained")
plot_layers(panel, compared, "B read expert-major")
panel.set_ylabel("largest error")
panel.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
assert compared.layers[0].moe_input < 1e-5 and compared.layers[0].moe_output > 1e-2

# %% [markdown]
# The comparison says where: what goes into the first MoE layer is right, so attention and its
# adapter are, and so are the router's choices there. What comes out of it is wrong by as much as
# it is large, and then everything after it.
