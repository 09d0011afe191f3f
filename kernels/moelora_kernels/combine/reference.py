"""Weighted sum over each token's experts in plain ``jax.numpy``."""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def combine(
    expert_out: Array, weights: Array, row_of_pair: Array, scaling: float, dtype: DTypeLike
) -> Array:
    """See :func:`moelora_kernels.combine`."""
    tokens, top_k = weights.shape
    row = row_of_pair.reshape(tokens, top_k)
    total = jnp.zeros((tokens, expert_out.shape[1]), jnp.float32)
    for choice in range(top_k):
        real = (row[:, choice] >= 0)[:, None]
        term = weights[:, choice, None] * expert_out[row[:, choice]].astype(jnp.float32)
        total = total + jnp.where(real, term, 0.0)
    return (scaling * total).astype(dtype)
