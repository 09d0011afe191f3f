"""What adapters add to the outputs of linear maps, in plain ``jax.numpy``."""

import jax.numpy as jnp
from jax import Array, lax

from moelora_kernels.types import LinearUpdate


def add_update(y: Array, update: LinearUpdate | None) -> Array:
    """``y`` and what is left to add to it, summed in float32 and rounded once more."""
    if update is None:
        return y
    ranks, parts, start = jnp.sum(update.ranks, 0), [], 0
    maps = zip(ranks, update.pool_rows, update.b_pools, update.outputs, strict=True)
    for z, pool_row, b_pool, out in maps:
        part = y[:, start : start + out]
        start += out
        if b_pool is not None:
            exists = pool_row >= 0
            z = z.reshape(*pool_row.shape, -1).astype(b_pool.dtype).astype(jnp.float32)
            b = jnp.where(exists[..., None, None], b_pool[jnp.maximum(pool_row, 0)], 0)
            z = jnp.where(exists[..., None], z, 0.0)
            added = jnp.einsum(
                "tpr,tpro->to", z, b.astype(jnp.float32), precision=lax.Precision.HIGHEST
            )
            total = (part.astype(jnp.float32) + added).astype(y.dtype)
            part = jnp.where(exists[:, :1], total, part)
        parts.append(part)
    return jnp.concatenate(parts, axis=1)
