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
# # How fast it is
#
# First what a MoE layer with LoRA *must* cost on an H200, from bytes and operations alone. Then
# what was measured there, beside SGLang and vLLM on the same kind of card. Nothing is measured
# here: the notebook reads the committed results, and says where others are faster.

# %%
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import moelora_jax

plt.rcParams["figure.dpi"] = 72
root = Path(moelora_jax.__file__).parent.parent
sys.path.append(str(root))
from benchmarks.workload import BASE_FRACTION, MODELS, PEAK_BYTES, PEAK_FLOPS, auto_adapters

# %% [markdown]
# ## The roofline of a layer
#
# A layer can be no faster than its bytes take from memory, and no faster than its operations take
# on the tensor cores. An H200 was measured to reach 4.3 TB/s and 790 TFLOP/s in bfloat16.
#
# **Bytes.** The weights of every expert that a token of the batch chose are read once: gate, up and
# down, each `hidden * intermediate` numbers of 2 bytes. Each token chooses $k$ of $E$ experts, so
# under uniform routing $T$ tokens touch $E \, (1 - (1 - k/E)^T)$ experts: 8 of 128 at one token,
# nearly all at 64. LoRA adds the factors of every pair (adapter, expert) that some token meets,
# each `3 * rank * (hidden + intermediate)` numbers. With $n$ adapters drawn per token and a
# fraction $f$ of tokens without one, that is $n E \, (1 - (1 - (1-f) k / (n E))^T)$ pairs.
#
# **Operations.** Each of the $T k$ pairs (token, expert) takes `2 * 3 * hidden * intermediate`; the
# rank activations and their expansion take `2 * 3 * rank * (hidden + intermediate)` more.

# %%
config = MODELS["qwen3-30b-a3b"]
experts, top_k = config.num_experts, config.top_k
hidden, inner = config.hidden_size, config.intermediate_size


def roofline(tokens, adapters: int, rank: int):
    """Microseconds of the weights' bytes, the factors' bytes, and all operations."""
    tokens = np.asarray(tokens, float)
    adapted = 1 - BASE_FRACTION
    touched = experts * (1 - (1 - top_k / experts) ** tokens)
    all_pairs = adapters * experts
    pairs = all_pairs * (1 - (1 - adapted * top_k / all_pairs) ** tokens)
    weight_bytes = 2 * touched * 3 * hidden * inner
    factor_bytes = 2 * pairs * 3 * rank * (hidden + inner)
    numbers = hidden * inner + adapted * rank * (hidden + inner)
    operations = 2 * tokens * top_k * 3 * numbers
    return (
        weight_bytes / PEAK_BYTES * 1e6,
        factor_bytes / PEAK_BYTES * 1e6,
        operations / PEAK_FLOPS * 1e6,
    )


tokens = np.unique(np.logspace(0, 13, 60, base=2).round())
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained")
weights_us, factors_us, operations_us = roofline(tokens, 16, 16)
left.stackplot(
    tokens,
    weights_us,
    factors_us,
    labels=["bytes of experts", "bytes of 16 adapters, rank 16"],
    colors=["#9ecae1", "#fdae6b"],
)
left.plot(tokens, operations_us, color="black", label="operations")
left.set(ylabel="µs per layer", title="Qwen3-30B-A3B: what takes how long", ylim=(0, 800))
for rank, color in ((16, "tab:orange"), (64, "tab:red")):
    weights_us, factors_us, operations_us = roofline(tokens, 16, rank)
    total = np.maximum(weights_us + factors_us, operations_us)
    alone = np.maximum(weights_us, roofline(tokens, 1, 0)[2])
    right.plot(tokens, 100 * (total / alone - 1), color=color, label=f"16 adapters, rank {rank}")
right.set(ylabel="LoRA adds to the roofline, %", title="what adapters must cost", ylim=(0, None))
for panel in (left, right):
    panel.set(xlabel="tokens of the batch", xscale="log")
    panel.set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4096"])
    panel.minorticks_off()
    panel.legend(frameon=False, loc="upper left")
plt.show()

# %% [markdown]
# Up to some three thousand tokens the layer is bound by memory. So the base model's weights should
# stream at full bandwidth, and everything about adapters should hide behind that stream; their own
# bytes are what cannot be hidden. They cost most around a thousand tokens, when every pair of
# adapter and expert occurs, but the operations do not dominate yet.
#
# ## What was measured
#
# One H200, bfloat16, routing given; sort, products, activation and combine; adapters drawn per
# token, which is the worst case. `benchmarks/anchors.jsonl` has medians of SGLang's newest MoE-LoRA
# engine and of vLLM. Routing is drawn at random and differs a little between their runs and ours,
# so each time is divided by the roofline of its own run.

# %%
results = sorted((root / "benchmarks" / "results").glob("h200_2*.json"))[-1]
report = json.loads(results.read_text())
rows = report["rows"]
print(f"{report['setup']}; {report['date']}; {len(rows)} points")

# The formula above, against the roofline of the routing that was really drawn.
for row in rows:
    if row["model"] == "qwen3-30b-a3b" and row["layout"] == "per_expert":
        expected = roofline(row["tokens"], auto_adapters(row["tokens"]), row["rank"])
        ratio = row["roofline_us"] / max(expected[0] + expected[1], expected[2])
        assert 0.9 < ratio < 1.1, row  # one random draw per layer against the mean of all draws


def best_of_others(row: dict) -> float:
    us = row["anchor_us"]
    return min(us[name] for name in us if not name.endswith("base")) / row["anchor_roofline_us"]


models = sorted({row["model"] for row in rows})
figure, panels = plt.subplots(1, len(models), figsize=(11, 3.4), sharey=True, layout="constrained")
for panel, model in zip(panels, models, strict=True):
    mine = [
        row
        for row in rows
        if (row["model"], row["rank"], row["layout"]) == (model, 16, "per_expert")
    ]
    mine.sort(key=lambda row: row["tokens"])
    batch = [row["tokens"] for row in mine]
    panel.plot(batch, [row["lora"]["us"] / row["roofline_us"] for row in mine], "o-")
    panel.plot(batch, [row["base"]["us"] / row["base_roofline_us"] for row in mine], "o:", ms=3)
    for name in ("sglang_new", "vllm"):
        known = [row for row in mine if name in row["anchor_us"]]
        ratio = [row["anchor_us"][name] / row["anchor_roofline_us"] for row in known]
        panel.plot([row["tokens"] for row in known], ratio, "x--")
    panel.axhline(1, color="gray", linewidth=1)
    panel.set(title=model, xlabel="tokens of the batch", xscale="log", ylim=(0, 4.7))
    panel.set_xticks(batch, map(str, batch), fontsize=8)
    panel.minorticks_off()
panels[0].set_ylabel("time / roofline, rank 16")
labels = ["LoRA here", "base only here", "LoRA in SGLang", "LoRA in vLLM", "roofline"]
figure.legend(labels, loc="outside lower center", ncol=5, frameon=False)
plt.show()

# %% [markdown]
# ## Where others are faster
#
# The best of the others at each point, against us. Above the line they are faster.

# %%
ratios = np.array([row["lora"]["us"] / row["roofline_us"] / best_of_others(row) for row in rows])
batches = sorted({row["tokens"] for row in rows})
figure, panel = plt.subplots(figsize=(9, 3.6), layout="constrained")
for place, batch in enumerate(batches):
    mine = [index for index, row in enumerate(rows) if row["tokens"] == batch]
    for index in mine:
        row = rows[index]
        color = f"C{models.index(row['model'])}"
        marker = {"per_expert": "o", "shared": "s"}[row["layout"]]
        size = {8: 25, 16: 45, 64: 90}[row["rank"]]
        offset = (models.index(row["model"]) - 1.5) * 0.15
        panel.scatter(place + offset, ratios[index], s=size, color=color, marker=marker, alpha=0.8)
panel.axhline(1, color="black", linewidth=1)
panel.set_xticks(range(len(batches)), map(str, batches))
panel.set(xlabel="tokens of the batch", ylabel="our time / best other, in rooflines")
for index, model in enumerate(models):
    panel.scatter([], [], color=f"C{index}", label=model)
panel.scatter([], [], color="gray", marker="s", label="factors shared by experts")
panel.scatter([], [], color="gray", s=90, label="rank 64 (large), 16, 8 (small)")
panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
plt.show()

mean = np.exp(np.log(ratios).mean())
worst = rows[int(ratios.argmax())]
print(f"geometric mean over {len(rows)} points: {mean:.2f}; ahead at {(ratios <= 1).sum()}")
print("farthest behind:", {key: worst[key] for key in ("model", "tokens", "rank", "layout")})
theirs = {name: us for name, us in worst["anchor_us"].items() if not name.endswith("base")}
print(f"there {worst['lora']['us']:.0f} µs here; others:", theirs)

# %% [markdown]
# ## What LoRA adds
#
# The difference between a layer with LoRA and without it is what the adapters cost. Against it
# stand the bytes of their factors: no kernel can add less while the layer is bound by memory.

# %%
mine = [
    row
    for row in rows
    if (row["model"], row["rank"], row["layout"]) == ("qwen3-30b-a3b", 16, "per_expert")
]
mine.sort(key=lambda row: row["tokens"])
places = np.arange(len(mine))
sglang = [row["anchor_us"]["sglang_new"] - row["anchor_us"]["sglang_base"] for row in mine]
vllm = [row["anchor_us"]["vllm"] - row["anchor_us"]["vllm_base"] for row in mine]
bars = {
    "here": [row["lora"]["us"] - row["base"]["us"] for row in mine],
    "SGLang": sglang,
    "vLLM": vllm,
    "roofline": [row["roofline_us"] - row["base_roofline_us"] for row in mine],
}
figure, panel = plt.subplots(figsize=(9, 3.4), layout="constrained")
for index, (name, values) in enumerate(bars.items()):
    color = "gray" if name == "roofline" else None
    panel.bar(places + (index - 1.5) * 0.2, values, 0.19, label=name, color=color)
panel.set_xticks(places, [str(row["tokens"]) for row in mine])
panel.set(yscale="log", xlabel="tokens of the batch", ylabel="µs that LoRA adds to a layer")
panel.set_title("Qwen3-30B-A3B, rank 16: LoRA minus base, each engine against itself")
panel.legend(frameon=False)
plt.show()

# %% [markdown]
# ## One launch
#
# Between two launches the memory is idle. So a small batch's layer can be a single launch, whose
# programs wait for each other by counters in memory. What each step towards that gains was measured
# in runs of their own, which compare two forms in one process; compare only within a panel. The
# second change makes the base model faster, too.

# %%
forms_file = root / "benchmarks" / "results" / "h200_forms_2026-11-22.json"
forms = json.loads(forms_file.read_text())
panels_of = {
    "shrink": ("a launch before", "within the product"),
    "launches": ("several", "one"),
}
figure, panels = plt.subplots(1, 2, figsize=(11, 3.4), sharey=True, layout="constrained")
for panel, (field, (before, after)) in zip(panels, panels_of.items(), strict=True):
    points = {}
    for row in forms[field]:
        points.setdefault((row["model"], row["tokens"]), {})[row[field]] = row
    points = {key: two for key, two in points.items() if key[1] in (8, 32)}
    places = np.arange(len(points))
    ends = [
        [two[form]["lora_us"] / two[form]["roofline_us"] for two in points.values()]
        for form in (before, after)
    ]
    panel.vlines(places, *ends, color="lightgray", linewidth=4)
    panel.plot(places, ends[0], "o", label=before)
    panel.plot(places, ends[1], "s", label=after)
    names = [f"{model}\n{tokens} tokens" for model, tokens in points]
    panel.set_xticks(places, names, fontsize=8, rotation=60)
    title = {"shrink": "where the shrink runs", "launches": "launches of a layer"}[field]
    panel.set_title(title)
    panel.legend(frameon=False)
panels[0].set_ylabel("LoRA time / roofline, rank 16")
plt.show()

# %% [markdown]
# One launch is not faster everywhere: for Mixtral, whose tiles are few and long, it was slower, and
# at 32 tokens the table of tiles keeps several. `docs/performance.md` says what was tried, what
# is missing and what was not measured; `python -m benchmarks.moe_layer --points anchors` measures
# all points again on a card of yours.
