# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # One MoE layer, many adapters
#
# A batch of tokens goes through one Mixture-of-Experts layer. Every token names the LoRA adapter
# that it wants, or none. This notebook makes a random layer and three adapters of different ranks,
# runs them in one jitted call, and compares each token with a plain loop.
#
# Open it with `jupytext --to notebook notebooks/moe_lora_layer.py`, or run it as a script.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moelora_jax import Adapter, LoraConfig, LowRankUpdate, MoeConfig, MoeLoraLayer, Target
from moelora_jax.adapters.pages import PagePool
from moelora_jax.config import LoraSite
from moelora_kernels import ExpertPages, sort_tokens

config = MoeConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=32)
layer = MoeLoraLayer(config, rngs=nnx.Rngs(0))

# %% [markdown]
# ## Adapters become pages
#
# An adapter is a set of low-rank updates. In the pool a factor of rank `r` takes `ceil(r / 16)`
# pages of 16 rank rows, so memory follows each adapter's own rank. The third adapter uses one `A`
# for all experts: it is the same array, and is stored once.

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

pool = PagePool(sites, LoraConfig(max_adapters=3, max_rank=32, pool_rank=32), jnp.float32)
for slot, adapter in enumerate(adapters):
    packed = pool.pack(adapter)
    pool.write(slot, packed)
    print(f"slot {slot}: rank {adapter.max_rank:2}, pages by width {packed.pages_by_width}")
for usage in pool.usage():
    print(f"pool of width {usage.width}: {usage.used_pages} of {usage.total_pages} pages used")

# %% [markdown]
# ## The sort
#
# Pairs (token, expert) are sorted by expert, then by adapter. The kernels walk over tiles of these
# rows; no tile spans two experts.

# %%
tokens = 12
adapter_of_token = jnp.asarray(rng.integers(-1, 3, tokens), jnp.int32)
chosen = jnp.asarray(
    np.stack([rng.permutation(experts)[: config.top_k] for _ in range(tokens)]), jnp.int32
)
sort = sort_tokens(
    chosen, adapter_of_token, jnp.int32(tokens), num_experts=experts, num_adapters=3, tile_rows=4
)
print("adapter of each token:", adapter_of_token)
print("expert tiles (expert, first row, end row):")
print(sort.expert_tiles[sort.expert_tiles[:, 0] >= 0])
print("runs (expert, adapter, first row, end row):")
print(sort.run_tiles[sort.run_tiles[:, 0] >= 0])

# %% [markdown]
# ## One call for the whole batch

# %%
state = pool.device_state()
pages = ExpertPages(state["gate_proj"], state["up_proj"], state["down_proj"])
x = jnp.asarray(rng.normal(size=(tokens, hidden)), jnp.float32)

apply = nnx.jit(lambda layer, *arguments: layer(*arguments))
mixed = apply(layer, x, adapter_of_token, pages)
base = apply(layer, x)


# %% [markdown]
# ## The same in a plain loop


# %%
def plain(token: int) -> np.ndarray:
    """One token through the layer in float64, with its adapter's updates added to the weights."""
    slot = int(adapter_of_token[token])
    vector = np.asarray(x[token], np.float64)
    logits = np.asarray(layer.router[0], np.float64) @ vector
    best = np.argsort(-logits)[: config.top_k]
    weights = np.exp(logits[best]) / np.exp(logits[best]).sum()

    def weight(site: str, base: jax.Array, expert: int) -> np.ndarray:
        matrix = np.asarray(base, np.float64)
        if slot >= 0:
            update = adapters[slot].updates[Target(0, site, expert)]
            matrix = matrix + update.scaling * update.b.astype(np.float64) @ update.a
        return matrix

    total = np.zeros(hidden)
    for expert, share in zip(map(int, best), weights, strict=True):
        gate = weight("gate_proj", layer.gate_up[0, expert, 0], expert) @ vector
        up = weight("up_proj", layer.gate_up[0, expert, 1], expert) @ vector
        activated = gate / (1 + np.exp(-gate)) * up
        total += share * (weight("down_proj", layer.down[0, expert], expert) @ activated)
    return total


error = max(np.abs(plain(token) - np.asarray(mixed[token])).max() for token in range(tokens))
without = np.asarray(adapter_of_token) < 0
same = np.array_equal(np.asarray(mixed)[without], np.asarray(base)[without])
print(f"largest error against the loop: {error:.1e}")
print(f"rows without an adapter are bitwise those of the base model: {same}")
assert error < 1e-5
assert same
