"""Router top-k in plain ``jax.numpy``."""

import jax
import jax.numpy as jnp
from jax import Array, lax


def route(logits: Array, *, top_k: int, scoring: str, renormalize: bool) -> tuple[Array, Array]:
    """See :func:`moelora_kernels.route`."""
    logits = logits.astype(jnp.float32)
    scores = jax.nn.softmax(logits, axis=-1) if scoring == "softmax" else jax.nn.sigmoid(logits)
    weights, experts = lax.top_k(scores, top_k)
    if renormalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return experts.astype(jnp.int32), weights
