"""A tiny random model and random adapters, for tests that need no files."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from moelora_jax import LLM, BucketConfig, CacheConfig, LoraConfig, ModelConfig, RuntimeConfig
from moelora_jax.adapters.adapter import Adapter, LowRankUpdate, Target
from moelora_jax.models import FAMILIES
from tests.adapter_files import tiny_model_config

#: One bucket of each kind, so that tests compile little.
TINY_RUNTIME = RuntimeConfig(
    lora=LoraConfig(max_adapters=4, max_rank=32),
    buckets=BucketConfig(decode=(4,), prefill=(16,)),
    cache=CacheConfig(max_length=48, block_size=8),
)


def tiny_llm(
    runtime: RuntimeConfig = TINY_RUNTIME,
    config: ModelConfig | None = None,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> LLM:
    """A random Qwen3-MoE."""
    config = config or tiny_model_config()
    family = FAMILIES[config.architecture]
    model = family.module(config, dtype=dtype, rngs=nnx.Rngs(seed))
    return LLM(model, config, family, runtime=runtime, dtype=dtype)


def random_adapter(
    config: ModelConfig, seed: int, *, rank: int = 8, sites: Sequence[str] | None = None
) -> Adapter:
    """Random factors at every layer and expert of the given sites, or of all but optional ones."""
    rng = np.random.default_rng(seed)
    updates = {}
    for site in config.lora_sites():
        if site.optional if sites is None else site.name not in sites:
            continue
        for layer in site.layers:
            for expert in range(site.table_experts):
                updates[Target(layer, site.name, expert)] = LowRankUpdate(
                    a=rng.normal(scale=0.3, size=(rank, site.in_features)).astype(np.float32),
                    b=rng.normal(scale=0.3, size=(site.out_features, rank)).astype(np.float32),
                    scaling=float(rng.uniform(0.5, 2.0)),
                )
    return Adapter(layout="memory", updates=updates)
