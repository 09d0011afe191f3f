"""Device memory before anything is allocated: from the model's description and the sizes alone."""

from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from moelora_jax.adapters.pages import pool_bytes
from moelora_jax.config import ModelConfig, RuntimeConfig
from moelora_jax.errors import CapacityError
from moelora_jax.models import ModelFamily
from moelora_jax.workspace import MemoryPlan, device_state_shapes, num_bytes


def plan_memory(
    family: ModelFamily, config: ModelConfig, runtime: RuntimeConfig, dtype: DTypeLike
) -> MemoryPlan:
    """What serving a model will take; all but the temporaries is exact.

    Args:
        family: the model's family.
        config: its description.
        runtime: adapter limits, buckets and cache.
        dtype: compute dtype.
    """
    model = nnx.eval_shape(lambda: family.module(config, dtype=dtype, rngs=nnx.Rngs(0)))
    pools, tables = pool_bytes(config.lora_sites(), runtime.lora, dtype)
    vocabulary_pages = pools.pop(config.vocab_size, 0)
    state = device_state_shapes(config, runtime, dtype)
    return MemoryPlan(
        weights=num_bytes(nnx.state(model)),
        adapter_pages=sum(pools.values()),
        vocabulary_pages=vocabulary_pages,
        adapter_tables=tables,
        workspaces=num_bytes((state.workspace, state.sampled)),
        temporaries=estimate_temporaries(config, runtime, dtype),
        kv_cache=num_bytes(state.cache),
    )


def fit_cache(
    family: ModelFamily,
    config: ModelConfig,
    runtime: RuntimeConfig,
    dtype: DTypeLike,
    budget: int,
) -> RuntimeConfig:
    """The same sizes with as many cache blocks as the memory has room for.

    Never more than all sequences can fill at once, nor more than ``CacheConfig.num_blocks``.

    Args:
        family: the model's family.
        config: its description.
        runtime: adapter limits, buckets and cache.
        dtype: compute dtype.
        budget: bytes of device memory that may be used.

    Raises:
        CapacityError: there is no room for one sequence of ``max_length``.
    """
    plan = plan_memory(family, config, runtime, dtype)
    blocks = runtime.cache.total_blocks(runtime.buckets.max_sequences)
    room = (budget - (plan.total - plan.kv_cache)) * blocks // plan.kv_cache
    least = runtime.cache.blocks_per_sequence + 1
    if room < least:
        needed = plan.total - plan.kv_cache + plan.kv_cache // blocks * least
        sizes = ", ".join(
            f"{name.replace('_', ' ')} {size:,}"
            for name, size in plan
            if size and name != "kv_cache"
        )
        raise CapacityError(
            f"{budget:,} bytes of device memory are too few, {needed:,} are the least: {sizes}, "
            f"and the cache of one sequence of max_length {runtime.cache.max_length} "
            f"{needed - plan.total + plan.kv_cache:,}; lower pool_rank, max_adapters, the buckets "
            "or max_length"
        )
    return replace(runtime, cache=replace(runtime.cache, num_blocks=min(blocks, room)))


def estimate_temporaries(config: ModelConfig, runtime: RuntimeConfig, dtype: DTypeLike) -> int:
    """About the most that one program needs besides workspaces, arguments and results.

    XLA decides that when it compiles. It needs, one after the other, activations between kernels
    with a copy of one layer's attention weights, and the logits of all rows while they are sorted.
    Compiled for an H200 without one, with the widths of Qwen3-30B-A3B, 2,048 tokens and 128 rows,
    it was 321 MB (here 467), and with a vocabulary of 8,192 tokens 119 MB (here 105).
    """
    hidden, item = config.hidden_size, jnp.dtype(dtype).itemsize
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    per_token = 3 * hidden + 2 * queries + 4 * keys
    weights = 2 * hidden * (queries + keys)
    layer = (runtime.buckets.max_tokens * per_token + weights) * item
    # Scores, their order, and both again sorted; scaled scores, probabilities and their sums.
    sampling = 6 * runtime.buckets.max_sequences * config.vocab_size * 4
    return max(layer, sampling)
