"""Kernels for Mixture-of-Experts layers with many LoRA adapters: arrays in, arrays out.

One folder per operation: ``api.py`` has the public function, ``reference.py`` the specification in
plain ``jax.numpy``. Nothing here knows of adapter files, models or servers.
"""

from moelora_kernels.attention.api import paged_attention, query_tile_rows, query_tiles, write_cache
from moelora_kernels.combine.api import combine
from moelora_kernels.dense_lora.api import dense_lora, embedding_lora
from moelora_kernels.expert_lora.api import down, gate_up, shrink
from moelora_kernels.fused_experts.api import fused_experts
from moelora_kernels.heads.api import prepare_heads
from moelora_kernels.heads.reference import rotate
from moelora_kernels.linear.api import linear_lora
from moelora_kernels.linear.reference import linear
from moelora_kernels.norm.api import add_rms_norm
from moelora_kernels.norm.reference import rms_norm
from moelora_kernels.router.api import route
from moelora_kernels.sort.api import sort_tokens, token_sort_shapes
from moelora_kernels.types import (
    PAGE_ROWS,
    RANK_PADDING,
    SIGNALS,
    Buffer,
    ExpertGroups,
    ExpertPages,
    LinearMap,
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
    "LinearMap",
    "SitePages",
    "TokenSort",
    "add_rms_norm",
    "combine",
    "dense_lora",
    "down",
    "embedding_lora",
    "fused_experts",
    "gate_up",
    "linear",
    "linear_lora",
    "paged_attention",
    "prepare_heads",
    "query_tile_rows",
    "query_tiles",
    "rms_norm",
    "rotate",
    "route",
    "shrink",
    "sort_tokens",
    "token_sort_shapes",
    "write_cache",
]
