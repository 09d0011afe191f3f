"""What happens to heads between their projections and attention: norms, rotation, the cache."""

from jax import Array
from jaxtyping import Float, Int32

from moelora_kernels.backend import Implementation, choose
from moelora_kernels.heads import reference
from moelora_kernels.types import Buffer, LinearUpdate


def prepare_heads(
    projected: Float[Array, "tokens features"],
    k_cache: Buffer,
    v_cache: Buffer,
    layer: Int32[Array, ""],
    block_of_token: Int32[Array, " tokens"],
    offset_of_token: Int32[Array, " tokens"],
    cos: Float[Array, "tokens half"],
    sin: Float[Array, "tokens half"],
    *,
    query_norm: Float[Array, "layers head_dim"] | None = None,
    key_norm: Float[Array, "layers head_dim"] | None = None,
    epsilon: float = 0.0,
    update: LinearUpdate | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "tokens heads head_dim"]:
    """Normalise and rotate queries and keys, and write keys and values to the cache, in place.

    Args:
        projected: heads of the queries, of the keys, and of the values of each token, side by side.
        k_cache: keys ``[layers, blocks, block_size, kv_heads, head_dim]``.
        v_cache: values, in the same shape.
        layer: layer of the caches and norms.
        block_of_token: cache block of each token; 0 for padding.
        offset_of_token: position within the block.
        cos: float32, of the angle of each pair of features; see :func:`rotate`.
        sin: likewise.
        query_norm: weights of an RMS norm over each query head; None for none.
        key_norm: likewise.
        epsilon: of the norms.
        update: what adapters have yet to add to ``projected``; None for nothing.
        implementation: None chooses by the default device.

    Returns:
        The queries, in the dtype of ``projected``.
    """
    *_, kv_heads, head_dim = k_cache.shape
    if (projected.shape[1] // head_dim - 2 * kv_heads) % kv_heads or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"{projected.shape[1]} features are not query heads grouped over {kv_heads} heads of "
            f"{head_dim} features for keys and for values"
        )
    inputs = (projected, k_cache, v_cache, layer, block_of_token, offset_of_token, cos, sin)
    if choose(implementation) == "triton":
        from moelora_kernels.heads import triton

        return triton.prepare_heads(*inputs, query_norm, key_norm, epsilon, update)
    return reference.prepare_heads(*inputs, query_norm, key_norm, epsilon, update)
