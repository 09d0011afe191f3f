"""LoRA of dense linear layers in plain ``jax.numpy``: the expert kernels with one expert."""

import jax
import jax.numpy as jnp
from jax import Array

from moelora_kernels.expert_lora.reference import add_expand, gather_rows, shrink
from moelora_kernels.types import SitePages, TokenSort


def dense_lora(
    x: Array, y: Array, pages: SitePages, sort: TokenSort, layer: Array, tile_rows: int
) -> Array:
    """See :func:`moelora_kernels.dense_lora`."""
    rank_activations = shrink(gather_rows(x, sort, len(x), 1), sort, (pages,), layer, tile_rows)
    return add_expand_rows(rank_activations, y, pages, sort, layer, tile_rows)


def add_expand_rows(
    rank_activations: Array,
    y: Array,
    pages: SitePages,
    sort: TokenSort,
    layer: Array,
    tile_rows: int,
) -> Array:
    """``y`` with ``rank_activations [1, tokens, max_rank] · B`` of sorted rows added to it."""
    tokens = y.shape[0]
    total = jax.new_ref(gather_rows(y, sort, tokens, 1).astype(jnp.float32)[None])
    add_expand(total, 0, rank_activations[0], sort, pages, layer, tile_rows)
    row = sort.row_of_pair[:tokens]
    # Padding tokens have no row and keep what they were.
    return jnp.where((row >= 0)[:, None], total[0][row].astype(y.dtype), y)
