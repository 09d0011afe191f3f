"""Router top-k in plain ``jax.numpy``."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from moelora_kernels.types import ExpertGroups

#: Added to the sum that weights are divided by, as in transformers: sigmoids may all underflow.
TINY_SUM = 1e-20


def route(
    logits: Array,
    *,
    top_k: int,
    scoring: str,
    renormalize: bool,
    correction_bias: Array | None,
    groups: ExpertGroups | None,
) -> tuple[Array, Array]:
    """See :func:`moelora_kernels.route`."""
    logits = logits.astype(jnp.float32)
    scores = jax.nn.softmax(logits, axis=-1) if scoring == "softmax" else jax.nn.sigmoid(logits)
    choice = scores if correction_bias is None else scores + correction_bias
    if groups is not None:
        choice = _only_best_groups(choice, groups)
    _, experts = lax.top_k(choice, top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if renormalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + TINY_SUM)
    return experts.astype(jnp.int32), weights


def _only_best_groups(choice: Array, groups: ExpertGroups) -> Array:
    """``choice`` with -inf for the experts of all but the best groups."""
    grouped = choice.reshape(choice.shape[0], groups.count, -1)
    group_scores = jnp.sum(lax.top_k(grouped, groups.summed)[0], axis=-1)
    _, best = lax.top_k(group_scores, groups.chosen)
    is_best = jnp.any(best[:, :, None] == jnp.arange(groups.count), axis=1)
    return jnp.where(is_best[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
