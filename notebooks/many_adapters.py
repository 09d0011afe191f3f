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
# # Many adapters over one model
#
# One checkpoint, five adapters from files of different layouts, one mixed batch. Then the questions
# of a researcher: where does an adapter change the weights, which experts do tokens choose because
# of it, and how far does it move the predictions?
#
# The model is a tiny Qwen3-MoE with random weights, so that this runs anywhere in seconds; with
# the folder of a real checkpoint in its place, nothing else changes.

# %%
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from safetensors.numpy import load_file, save_file

from moelora_jax import LLM, BucketConfig, CacheConfig, LoraConfig, Prompt, RuntimeConfig
from moelora_jax.cli.demo_files import write_demo

plt.rcParams["figure.dpi"] = 80
folder = tempfile.TemporaryDirectory(prefix="moelora-")  # Goes with the kernel.
demo = Path(folder.name)
write_demo(demo, rows=1, seed=0)
print("model:   ", *sorted(path.name for path in (demo / "model").iterdir()))
print("adapters:", *sorted(path.name for path in (demo / "adapters").iterdir()))

# %% [markdown]
# ## Layouts
#
# Trainers do not agree on how the factors of experts are written. The demo's adapters are in two
# layouts: one pair of factors for each projection of each expert, and PEFT's fused parameters. We
# add a third by hand, `stacked`, as Megatron and SGLang write it: `lora_A` is `[experts, rank, in]`
# and `lora_B` is `[experts, out, rank]`. Our adapter changes the experts of the last two layers
# only, and expert 5 more than the others.

# %%
rng = np.random.default_rng(1)
experts, rank, hidden, inner = 8, 4, 64, 48
strength = np.where(np.arange(experts) == 5, 0.2, 0.06)[:, None, None]
tensors = {}
for layer in (2, 3):
    for name, (wide, out) in {
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }.items():
        module = f"base_model.model.model.layers.{layer}.mlp.experts.{name}"
        a = rng.normal(scale=wide**-0.5, size=(experts, rank, wide))
        b = rng.normal(size=(experts, out, rank)) * strength
        tensors[f"{module}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = b.astype(np.float32)

late = demo / "adapters" / "late-r4"
late.mkdir()
save_file(tensors, late / "adapter_model.safetensors")
options = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none"}
options["target_modules"] = ["gate_proj", "up_proj", "down_proj"]
(late / "adapter_config.json").write_text(json.dumps(options))
print(f"{len(tensors)} tensors in late-r4")

# %% [markdown]
# Reading tells the layout by names and shapes. Every tensor of a file must be used: one that the
# reader does not understand is an error that names it, never silently dropped.

# %%
llm = LLM.load(
    demo / "model",
    runtime=RuntimeConfig(
        lora=LoraConfig(max_adapters=5, max_rank=32),
        buckets=BucketConfig(decode=(8,), prefill=(256,)),
        cache=CacheConfig(max_length=64),
    ),
)
names = ["attention-r3", "experts-r8", "both-r16", "experts-r24", "late-r4"]
for name in names:
    llm.load_adapter(name, demo / "adapters" / name)
for info in llm.adapters():
    print(f"{info.name:13} rank {info.rank:2}  {info.layout}")

# %% [markdown]
# ## A mixed batch
#
# Each row names its adapter, or none. All rows run in the same steps of the same program. The
# prompt is the same, so what differs is the adapter's doing. A row's tokens do not depend on its
# neighbours: alone they are the same.

# %%
text = "Many adapters share one model"
tokens = list(text.encode())  # The demo's tokens are bytes.
batch = [Prompt(tokens, name) for name in (None, *names)]
completions = llm.generate(batch, max_new_tokens=12)
for completion in completions:
    print(f"{completion.adapter or 'base model':13}", *completion.tokens)

alone = [llm.generate([prompt], max_new_tokens=12)[0] for prompt in batch]
assert alone == completions
assert len({completion.tokens for completion in completions}) == len(batch)

# %% [markdown]
# ## Where the weights change
#
# An adapter adds $\Delta W = s B A$ to a matrix. The norm of $\Delta W$ relative to that of $W$
# says how much. `read_adapter` gives the factors of any layout in one form, so the code below need
# not know which file they came from. Above are all projections, for experts the mean over them;
# below is one of them, `gate_proj`, expert by expert.

# %%
weights = load_file(demo / "model" / "model.safetensors")
sites = [site for site in llm.config.lora_sites() if not site.optional]


def base_weight(layer: int, site: str, expert: int) -> np.ndarray:
    if site in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return weights[f"model.layers.{layer}.self_attn.{site}.weight"]
    return weights[f"model.layers.{layer}.mlp.experts.{expert}.{site}.weight"]


def relative_norms(name: str) -> dict[str, np.ndarray]:
    """For each site ``[layers, experts]``."""
    adapter = llm.read_adapter(demo / "adapters" / name)
    norms = {s.name: np.zeros((llm.config.num_layers, s.table_experts)) for s in sites}
    for target, update in adapter.updates.items():
        delta = update.scaling * update.b @ update.a
        norms[target.site][target.layer, target.expert] = np.linalg.norm(delta) / np.linalg.norm(
            base_weight(*target)
        )
    return norms


norms = {name: relative_norms(name) for name in names}
figure, panels = plt.subplots(
    2, len(names), figsize=(11, 5), sharey="row", layout="constrained", height_ratios=(7, 4)
)
for (upper, lower), name in zip(panels.T, names, strict=True):
    by_site = np.stack([norms[name][site.name].mean(axis=1) for site in sites])
    for panel, grid in ((upper, by_site), (lower, norms[name]["gate_proj"])):
        image = panel.imshow(grid, vmin=0, vmax=0.9, cmap="viridis", aspect="auto")
    upper.set(title=name, xlabel="layer", xticks=range(llm.config.num_layers))
    lower.set(xlabel="expert", xticks=range(experts), yticks=range(llm.config.num_layers))
panels[0, 0].set_yticks(range(len(sites)), [site.name for site in sites])
panels[1, 0].set_ylabel("gate_proj: layer")
figure.colorbar(image, ax=panels, label="‖ΔW‖ / ‖W‖")
plt.show()

assert norms["attention-r3"]["gate_proj"].max() == 0
assert norms["late-r4"]["gate_proj"][:2].max() == 0
assert norms["late-r4"]["gate_proj"][2:].argmax(axis=1).tolist() == [5, 5]

# %% [markdown]
# ## Which experts the tokens choose
#
# `LLM.trace` runs rows as one batch and keeps what the MoE layers compute: their inputs, router
# logits, choices, weights and outputs. None of these adapters changes a router. But a router sees
# hidden states, and what an adapter changed in earlier layers, or in the attention of its own,
# changes those. Here are 4 random prompts of 40 tokens, each with every adapter.

# %%
prompts = [rng.integers(256, size=40) for _ in range(4)]
choosers = (None, *names)
traces = llm.trace([Prompt(prompt, name) for name in choosers for prompt in prompts])
chosen = {
    name: np.concatenate([trace.experts for trace in traces if trace.adapter == name], axis=1)
    for name in choosers
}  # int32 [layers, tokens, top_k]


def usage(name: str | None) -> np.ndarray:
    """Share of a layer's choices that fall on each expert, ``[layers, experts]``."""
    return np.stack([np.bincount(c.ravel(), minlength=experts) / c.size for c in chosen[name]])


shifts = {name: 100 * (usage(name) - usage(None)) for name in names}
limit = max(abs(shift).max() for shift in shifts.values())
figure, panels = plt.subplots(1, len(names), figsize=(11, 2.8), sharey=True, layout="constrained")
for panel, name in zip(panels, names, strict=True):
    image = panel.imshow(shifts[name], vmin=-limit, vmax=limit, cmap="RdBu_r", aspect="auto")
    panel.set(title=name, xlabel="expert", xticks=range(experts), yticks=range(4))
panels[0].set_ylabel("layer")
figure.colorbar(image, ax=panels, label="share of choices against\nbase, percentage points")
plt.show()

# %% [markdown]
# Shares can stay while tokens trade places. So here is also how many of a token's choices are
# other experts than in the base model.

# %%
same = (chosen[None][..., :, None] == np.stack([chosen[n] for n in names])[..., None, :]).any(-1)
changed = 100 * (1 - same.mean(axis=(2, 3)))  # [adapters, layers]

figure, panel = plt.subplots(figsize=(8, 3.2), layout="constrained")
for name, line in zip(names, changed, strict=True):
    panel.plot(line, "o-", label=name)
panel.set(xlabel="layer", ylabel="choices that differ, %", xticks=range(4), ylim=(-2, None))
panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
plt.show()

# What comes before the first router is only attention; late-r4 acts after the router of layer 2.
assert changed[names.index("experts-r8"), 0] == changed[names.index("experts-r24"), 0] == 0
assert (changed[names.index("late-r4"), :3] == 0).all()
assert changed[names.index("late-r4"), 3] > 0
assert changed[names.index("attention-r3"), 0] > 0

# %% [markdown]
# Adapters of experts cannot change the choices of the first layer, as nothing before its router is
# theirs; `late-r4` changes those of the last layer alone. What an adapter does early, all later
# routers see.
#
# ## How far the predictions move
#
# The Kullback-Leibler divergence $\sum_v p(v) \log (p(v) / q(v))$ of the adapter's next-token
# distribution $q$ from that of the base model $p$, token by token.

# %%
base, *tuned = llm.trace(batch)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


p = log_softmax(base.logits)
divergence = np.stack([(np.exp(p) * (p - log_softmax(t.logits))).sum(-1) for t in tuned])

figure, panel = plt.subplots(figsize=(11, 2.6), layout="constrained")
image = panel.imshow(divergence, cmap="magma", vmin=0, aspect="auto")
panel.set_xticks(range(len(text)), list(text.replace(" ", "␣")))
panel.set_yticks(range(len(names)), names)
panel.set(xlabel="token of the prompt", title="KL from the base model's next-token distribution")
figure.colorbar(image, ax=panel, label="nats")
plt.show()

for name, values in zip(names, divergence, strict=True):
    print(f"{name:13} mean {values.mean():.3f} nats, largest {values.max():.3f}")
assert (divergence > 0).all()
