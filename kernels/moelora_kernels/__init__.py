"""Kernels for Mixture-of-Experts layers with many LoRA adapters: arrays in, arrays out.

One folder per operation: ``api.py`` has the public function, ``reference.py`` the specification in
plain ``jax.numpy``. Nothing here knows of adapter files, models or servers.
"""

from moelora_kernels.attention.api import paged_attention, query_tiles, write_cache
from moelora_kernels.combine.api import combine
from moelora_kernels.dense_lora.api import dense_lora, embedding_lora
from moelora_kernels.expert_lora.api import down, gate_up, shrink
from moelora_kernels.fused_experts.api import fused_experts
from moelora_kernels.router.api import route
from moelora_kernels.sort.api import sort_tokens, token_sort_shapes
from moelora_kernels.types import (
    PAGE_ROWS,
    RANK_PADDING,
    SIGNALS,
    Buffer,
    ExpertGroups,
    ExpertPages,
    SitePages,
    TokenSort,
)

__all__ = [
    "PAGE_ROWS",
    "RANK_PADDING",
    "SIGNALS",
    "Buffer",
    "ExpertGroups",
    "ExpertPages",
    "SitePages",
    "TokenSort",
    "combine",
    "dense_lora",
    "down",
    "embedding_lora",
    "fused_experts",
    "gate_up",
    "paged_attention",
    "query_tiles",
    "route",
    "shrink",
    "sort_tokens",
    "token_sort_shapes",
    "write_cache",
]
