"""Norms, rotation and the cache in plain ``jax.numpy``."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from moelora_kernels.linear.reference import add_update
from moelora_kernels.norm.reference import rms_norm
from moelora_kernels.types import Buffer, LinearUpdate


def prepare_heads(
    projected: Array,
    k_cache: Buffer,
    v_cache: Buffer,
    layer: Array,
    block_of_token: Array,
    offset_of_token: Array,
    cos: Array,
    sin: Array,
    query_norm: Array | None,
    key_norm: Array | None,
    epsilon: float,
    update: LinearUpdate | None,
) -> Array:
    """See :func:`moelora_kernels.prepare_heads`."""
    *_, kv_heads, head_dim = k_cache.shape
    heads = add_update(projected, update).reshape(len(projected), -1, head_dim)
    query, key, value = jnp.split(heads, [heads.shape[1] - 2 * kv_heads, -kv_heads], axis=1)
    if query_norm is not None:
        query = rms_norm(query, query_norm[layer], epsilon)
    if key_norm is not None:
        key = rms_norm(key, key_norm[layer], epsilon)
    place = (layer, block_of_token, offset_of_token)
    k_cache[place] = rotate(key, cos, sin).astype(k_cache.dtype)
    v_cache[place] = value.astype(v_cache.dtype)
    return rotate(query, cos, sin)


def rotate(
    x: Float[Array, "tokens heads head_dim"],
    cos: Float[Array, "tokens half"],
    sin: Float[Array, "tokens half"],
    *,
    interleaved: bool = False,
) -> Float[Array, "tokens heads head_dim"]:
    """Rotary position embedding, in float32.

    The first features of all pairs come first in the result, interleaved or not: queries and keys
    are reordered alike, which changes no score.

    Args:
        x: heads.
        cos: of the angle of each pair of features.
        sin: likewise.
        interleaved: pairs are neighbours; otherwise a pair's second feature is half a head behind.
    """
    cos, sin = cos[:, None], sin[:, None]
    values = x.astype(jnp.float32)
    if interleaved:
        first, second = values[..., 0::2], values[..., 1::2]
    else:
        first, second = jnp.split(values, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
