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
# # The MoE-LoRA layer from scratch
#
# A batch of tokens goes through one Mixture-of-Experts layer. Every token names the LoRA adapter
# that it wants, or none. This notebook makes a random layer and three adapters of different ranks,
# draws the two ideas that let one program serve all of them, **pages** and the **sort**, runs the
# batch in one jitted call, and compares each token with a plain PyTorch loop.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from moelora_jax import Adapter, LoraConfig, LowRankUpdate, MoeConfig, MoeLoraLayer, Target
from moelora_jax.adapters.pages import PagePool
from moelora_jax.config import LoraSite
from moelora_kernels import ExpertPages, sort_tokens

config = MoeConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=32)
layer = MoeLoraLayer(config, rngs=nnx.Rngs(0))

# %% [markdown]
# ## Adapters of any rank
#
# An adapter changes the weight matrix of expert $e$ by a low-rank update,
# $W_e + s \, B_e A_e$ with $A_e$ of shape `[rank, in]` and $B_e$ of shape `[out, rank]`. Ours have
# ranks 4, 24 and 16. The third one uses one $A$ for all experts, as some trainers do.

# %%
hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
sites = (
    LoraSite("gate_proj", hidden, inner, layers=(0,), num_experts=experts),
    LoraSite("up_proj", hidden, inner, layers=(0,), num_experts=experts),
    LoraSite("down_proj", inner, hidden, layers=(0,), num_experts=experts),
)
rng = np.random.default_rng(0)


def factor(*shape: int) -> np.ndarray:
    return rng.normal(scale=0.2, size=shape).astype(np.float32)


def make_adapter(rank: int, shared_a: bool = False) -> Adapter:
    updates = {}
    for site in sites:
        a = factor(rank, site.in_features)
        for expert in range(experts):
            if not shared_a:
                a = factor(rank, site.in_features)
            b = factor(site.out_features, rank)
            updates[Target(0, site.name, expert)] = LowRankUpdate(a, b, scaling=0.5)
    return Adapter(layout="memory", updates=updates)


adapters = [make_adapter(4), make_adapter(24), make_adapter(16, shared_a=True)]
names = ["rank 4", "rank 24", "rank 16, shared A"]
colors = ["tab:blue", "tab:orange", "tab:green"]

# %% [markdown]
# ## Pages
#
# A jitted program wants fixed shapes, but adapters differ in rank and in what they change. Padding
# all of them to the largest rank would waste memory and time. So factors are cut into **pages** of
# 16 rank rows, and a factor of rank $r$ takes $\lceil r / 16 \rceil$ pages. All pages of one width
# lie in one pool, whichever expert or projection they belong to.

# %%
pool = PagePool(sites, LoraConfig(max_adapters=3, max_rank=32, pool_rank=32), jnp.float32)
for slot, adapter in enumerate(adapters):
    packed = pool.pack(adapter)
    pool.write(slot, packed)
    print(f"slot {slot}: {names[slot]:17} pages by width {packed.pages_by_width}")
state = pool.device_state()


# %%
def owners(width: int) -> np.ndarray:
    """The slot that each row of a pool belongs to, -1 for free rows."""
    owner = np.full(len(pool.pools[width]), -1)
    for site in sites:
        for factor, features in enumerate((site.in_features, site.out_features)):
            if features == width:
                for slot in range(len(adapters)):
                    rows = np.asarray(state[site.name].table)[0, factor, slot]
                    owner[rows[rows >= 0]] = slot
    return owner


owner_colors = ListedColormap(["#eeeeee", *colors])
figure, panels = plt.subplots(2, 1, figsize=(8.5, 4.2), layout="constrained")
for panel, width in zip(panels, (hidden, inner), strict=True):
    columns = 24
    grid = owners(width).reshape(-1, columns)
    panel.pcolormesh(grid, cmap=owner_colors, vmin=-1.5, vmax=2.5, edgecolors="white", linewidth=1)
    panel.set_yticks(np.arange(len(grid)) + 0.5, [str(row * columns) for row in range(len(grid))])
    panel.set(title=f"pool of width {width}: {grid.size} pages of [16, {width}]", xticks=[])
    panel.set_ylabel("first pool row")
    panel.invert_yaxis()
handles = [Patch(color=color, label=name) for color, name in zip(colors, names, strict=True)]
handles.append(Patch(color="#eeeeee", label="free"))
figure.legend(handles=handles, loc="outside lower center", ncol=4, frameon=False)
plt.show()

# %% [markdown]
# The adapter of rank 24 takes two pages for each factor, that of rank 4 one, and the shared $A$
# of the third is stored once, so it takes the fewest. What is free is there for any other adapter.
#
# ## Page tables
#
# A kernel finds a page through a **page table**: one per projection, indexed by adapter slot, page
# and expert. Its entries are pool rows; -1 means that there is no page. Here is the table of
# `gate_proj`. The shared factor is nothing special: all experts name the same row. A kernel that
# reads the table pays for each adapter's own rank, and needs to know nothing else.

# %%
table = np.asarray(state["gate_proj"].table)[0]  # [2, adapters, pages, experts]
figure, panels = plt.subplots(2, 3, figsize=(10, 3.6), sharex=True, layout="constrained")
for index, factor_name in enumerate("AB"):
    for slot, panel in enumerate(panels[index]):
        rows = table[index, slot]
        colormap = ListedColormap(["#eeeeee", colors[slot]])
        panel.imshow(rows >= 0, cmap=colormap, vmin=0, vmax=1, aspect="auto", alpha=0.6)
        for (page, expert), row in np.ndenumerate(rows):
            panel.text(expert, page, row, ha="center", va="center", fontsize=8)
        panel.set(xticks=range(experts), yticks=[0, 1])
        if index == 0:
            panel.set_title(f"slot {slot}: {names[slot]}", fontsize=10)
        else:
            panel.set_xlabel("expert")
    width = hidden if factor_name == "A" else inner
    panels[index, 0].set_ylabel(f"{factor_name}: page")
figure.suptitle("page table of gate_proj: pool rows of A (width 64) and of B (width 32)")
plt.show()

# %% [markdown]
# ## The sort
#
# Each token goes to `top_k` experts, so there are `tokens * top_k` pairs. They are sorted by
# expert, then by adapter. An expert's rows are then neighbours, so its weights are read once and
# multiplied with all of them; so are, within an expert, the rows of one adapter. Kernels walk over
# *tiles* of these rows, and no tile spans two experts.

# %%
tokens, tile_rows = 12, 4
adapter_of_token = jnp.asarray([2, 2, -1, 0, 1, 2, 0, -1, 1, 0, -1, 1], jnp.int32)
x = jnp.asarray(rng.normal(size=(tokens, hidden)), jnp.float32)
router_logits = np.asarray(x) @ np.asarray(layer.router[0]).T
chosen = np.argsort(-router_logits, axis=1, stable=True)[:, : config.top_k].astype(np.int32)

sort = sort_tokens(
    jnp.asarray(chosen),
    adapter_of_token,
    jnp.int32(tokens),
    num_experts=experts,
    num_adapters=3,
    tile_rows=tile_rows,
)
order, tiles = np.asarray(sort.order), np.asarray(sort.expert_tiles)
tiles = tiles[tiles[:, 0] >= 0]
print("tiles (expert, first row, end row):", *map(tuple, tiles.tolist()))

# %%
expert_of_pair = chosen.reshape(-1)
adapter_of_pair = np.repeat(np.asarray(adapter_of_token), config.top_k)
token_of_pair = np.repeat(np.arange(tokens), config.top_k)
strip_colors = ListedColormap(["#dddddd", *colors])


def draw_strip(panel: plt.Axes, pairs: np.ndarray, title: str) -> None:
    """Pairs as columns, colored by adapter; their token and expert are written into them."""
    strip = np.stack([adapter_of_pair[pairs]] * 2)
    panel.imshow(strip, cmap=strip_colors, vmin=-1.5, vmax=2.5, aspect="auto", alpha=0.6)
    for column, pair in enumerate(pairs):
        panel.text(column, 0, token_of_pair[pair], ha="center", va="center", fontsize=9)
        panel.text(column, 1, expert_of_pair[pair], ha="center", va="center", fontsize=9)
    panel.set_yticks([0, 1], ["token", "expert"])
    panel.set_xticks(range(0, len(pairs), 2))
    panel.set_title(title, fontsize=10)


figure, panels = plt.subplots(2, 1, figsize=(10, 3.4), layout="constrained")
draw_strip(panels[0], np.arange(len(order)), "pairs as they come; color is the adapter")
draw_strip(panels[1], order, "the same pairs as sorted rows; lines are the borders of tiles")
for _, first, _ in tiles[1:]:
    panels[1].axvline(first - 0.5, color="black", linewidth=1.5)
panels[0].set_xlabel("pair")
panels[1].set_xlabel("row")
handles = [Patch(color=color, label=name) for color, name in zip(colors, names, strict=True)]
handles.append(Patch(color="#dddddd", label="base model"))
figure.legend(handles=handles, loc="outside lower center", ncol=4, frameon=False)
plt.show()

rows = [(expert_of_pair[pair], adapter_of_pair[pair], pair) for pair in order]
assert rows == sorted(rows), "sorted by expert, then adapter, and stable"
assert all(end - first <= tile_rows for _, first, end in tiles)
assert all((expert_of_pair[order[first:end]] == e).all() for e, first, end in tiles)

# %% [markdown]
# ## One call for the whole batch
#
# Routing, sort, products and the weighted sum are one jitted function. Adapters, ranks and routing
# are data, so another batch runs the same program.

# %%
pages = ExpertPages(state["gate_proj"], state["up_proj"], state["down_proj"])
apply = nnx.jit(lambda layer, *arguments: layer(*arguments))
mixed = np.asarray(apply(layer, x, adapter_of_token, pages))
base = np.asarray(apply(layer, x))

# %% [markdown]
# ## The same in a PyTorch loop
#
# One token at a time, in float64, with its adapter's update added to the weights: as plain as it
# gets, and nothing in common with the code above but the numbers.

# %%
import torch


def as_torch(array: jax.Array | np.ndarray) -> torch.Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float64)


router, gate_up, down = (as_torch(w[0]) for w in (layer.router, layer.gate_up, layer.down))
weights_of = {"gate_proj": gate_up[:, 0], "up_proj": gate_up[:, 1], "down_proj": down}


def weight(site: str, expert: int, slot: int) -> torch.Tensor:
    matrix = weights_of[site][expert]
    if slot < 0:
        return matrix
    update = adapters[slot].updates[Target(0, site, expert)]
    return matrix + update.scaling * as_torch(update.b) @ as_torch(update.a)


def plain(token: int) -> torch.Tensor:
    slot, vector = int(adapter_of_token[token]), as_torch(x[token])
    best, choice = (router @ vector).topk(config.top_k)
    total = torch.zeros(hidden, dtype=torch.float64)
    for expert, share in zip(choice.tolist(), best.softmax(0), strict=True):
        gate = torch.nn.functional.silu(weight("gate_proj", expert, slot) @ vector)
        activated = gate * (weight("up_proj", expert, slot) @ vector)
        total += share * (weight("down_proj", expert, slot) @ activated)
    return total


expected = torch.stack([plain(token) for token in range(tokens)]).numpy()
error = np.abs(mixed - expected).max(axis=1)
change = np.abs(mixed - base).max(axis=1)

figure, panel = plt.subplots(figsize=(8.5, 3.2), layout="constrained")
for slot, name, color in zip((-1, 0, 1, 2), ["base model", *names], ["gray", *colors], strict=True):
    mine = np.flatnonzero(np.asarray(adapter_of_token) == slot)
    panel.scatter(mine, error[mine], color=color, label=name)
    panel.scatter(mine, np.maximum(change[mine], 1e-9), color=color, marker="x")
panel.axhline(1e-5, color="black", linestyle=":", linewidth=1)
panel.text(tokens - 0.6, 1.4e-5, "bound 1e-5", ha="right", fontsize=9)
panel.set(yscale="log", ylim=(3e-10, 10), xticks=range(tokens), xlabel="token")
panel.set(
    ylabel="largest difference in a row", title="dots: to PyTorch;  crosses: to the base model"
)
panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
plt.show()

without = np.asarray(adapter_of_token) < 0
print(f"largest error against PyTorch: {error.max():.1e}, of numbers up to {abs(mixed).max():.1f}")
print("rows without an adapter have the bits of the base model:", (mixed == base)[without].all())
assert error.max() < 1e-5  # float32 has 24 bits; the sums are of 64 products at most
assert (mixed == base)[without].all() and without.any()
assert (change[~without] > 0.01).all()

# %% [markdown]
# Crosses at the bottom ($10^{-9}$ stands for zero) are tokens without an adapter: not merely close
# to the base model, but bitwise equal to it, although they share tiles with rows of adapters.
