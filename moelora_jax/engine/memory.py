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

# Percent of the memory that no cache takes: while XLA compiles, it tries products in memory of its
# own. On an H200 that was 2.1 percent beside a model of 96 GB, and 2.4 beside one of 51.
_PERCENT_FOR_COMPILATION = 3


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
        workspaces=num_bytes((state.workspace, state.sampled, state.biases)),
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
        budget: bytes of device memory that may be used; 3 percent of it are left to compilation.

    Raises:
        CapacityError: there is no room for one sequence of ``max_length``.
    """
    plan = plan_memory(family, config, runtime, dtype)
    blocks = runtime.cache.total_blocks(runtime.buckets.max_sequences)
    usable = budget * (100 - _PERCENT_FOR_COMPILATION) // 100
    room = (usable - (plan.total - plan.kv_cache)) * blocks // plan.kv_cache
    least = runtime.cache.blocks_per_sequence + 1
    if room < least:
        cache = plan.kv_cache // blocks * least
        needed = plan.total - plan.kv_cache + cache
        needed += -(-needed * _PERCENT_FOR_COMPILATION // (100 - _PERCENT_FOR_COMPILATION))
        sizes = ", ".join(
            f"{name.replace('_', ' ')} {size:,}"
            for name, size in plan
            if size and name != "kv_cache"
        )
        raise CapacityError(
            f"{budget:,} bytes of device memory are too few, {needed:,} are the least: {sizes}, "
            f"the cache of one sequence of max_length {runtime.cache.max_length} {cache:,}, and "
            f"{_PERCENT_FOR_COMPILATION} % for compilation; lower pool_rank, max_adapters, the "
            "buckets or max_length"
        )
    return replace(runtime, cache=replace(runtime.cache, num_blocks=min(blocks, room)))


def estimate_temporaries(config: ModelConfig, runtime: RuntimeConfig, dtype: DTypeLike) -> int:
    """About the most that one program needs besides workspaces, arguments and results.

    XLA decides that when it compiles. It needs, one after the other, activations between kernels
    with a copy of one layer's attention weights, and several arrays as large as the logits of all
    rows while tokens are chosen. On an H200 it was 314 MB for 128 rows of Qwen3-30B-A3B (here 467)
    and 104 MB for 32 of gpt-oss-20b (here 154); the first is 392 since logits may be adjusted, too.
    """
    hidden, item = config.hidden_size, jnp.dtype(dtype).itemsize
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    per_token = 3 * hidden + 2 * queries + 4 * keys
    weights = 2 * hidden * (queries + keys)
    layer = (runtime.buckets.max_tokens * per_token + weights) * item
    # Scores, scaled scores, their probabilities, and what of them is kept; and room for two more.
    sampling = 6 * runtime.buckets.max_sequences * config.vocab_size * 4
    return max(layer, sampling)
