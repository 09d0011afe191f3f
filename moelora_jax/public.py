"""The public names. ``moelora_jax`` hands them out, and imports this when first asked for one."""

from moelora_jax.adapters.adapter import Adapter, LowRankUpdate, Target
from moelora_jax.config import (
    BucketConfig,
    CacheConfig,
    LoraConfig,
    ModelConfig,
    MoeConfig,
    RuntimeConfig,
)
from moelora_jax.engine.async_engine import AsyncEngine
from moelora_jax.engine.llm import LLM, Completion, Prompt
from moelora_jax.engine.requests import EngineStats, Request, TokenOutput
from moelora_jax.engine.sampling import Sampling
from moelora_jax.engine.stream import Stream
from moelora_jax.engine.trace import Trace
from moelora_jax.errors import (
    AdapterError,
    CapacityError,
    CheckpointError,
    LayoutError,
    MoeLoraError,
    QueueFullError,
    RequestError,
)
from moelora_jax.moe import MoeLoraLayer, MoeParams, moe_experts, moe_lora

__all__ = [
    "LLM",
    "Adapter",
    "AdapterError",
    "AsyncEngine",
    "BucketConfig",
    "CacheConfig",
    "CapacityError",
    "CheckpointError",
    "Completion",
    "EngineStats",
    "LayoutError",
    "LoraConfig",
    "LowRankUpdate",
    "ModelConfig",
    "MoeConfig",
    "MoeLoraError",
    "MoeLoraLayer",
    "MoeParams",
    "Prompt",
    "QueueFullError",
    "Request",
    "RequestError",
    "RuntimeConfig",
    "Sampling",
    "Stream",
    "Target",
    "TokenOutput",
    "Trace",
    "moe_experts",
    "moe_lora",
]
