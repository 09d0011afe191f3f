"""Many LoRA adapters over one Mixture-of-Experts model, in one jitted program."""

from moelora_jax.adapters.adapter import Adapter, LowRankUpdate, Target
from moelora_jax.config import (
    BucketConfig,
    CacheConfig,
    LoraConfig,
    ModelConfig,
    MoeConfig,
    RuntimeConfig,
)
from moelora_jax.engine.llm import LLM, Completion, Prompt
from moelora_jax.engine.sampling import Sampling
from moelora_jax.errors import (
    AdapterError,
    CapacityError,
    CheckpointError,
    MoeLoraError,
    RequestError,
)
from moelora_jax.moe import MoeLoraLayer, MoeParams, moe_experts, moe_lora

__all__ = [
    "LLM",
    "Adapter",
    "AdapterError",
    "BucketConfig",
    "CacheConfig",
    "CapacityError",
    "CheckpointError",
    "Completion",
    "LoraConfig",
    "LowRankUpdate",
    "ModelConfig",
    "MoeConfig",
    "MoeLoraError",
    "MoeLoraLayer",
    "MoeParams",
    "Prompt",
    "RequestError",
    "RuntimeConfig",
    "Sampling",
    "Target",
    "moe_experts",
    "moe_lora",
]
