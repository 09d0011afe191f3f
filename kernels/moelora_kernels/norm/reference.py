"""The RMS norm in plain ``jax.numpy``."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def rms_norm(
    x: Float[Array, "... width"], weight: Float[Array, " width"], epsilon: float
) -> Float[Array, "... width"]:
    """``weight · x / sqrt(mean(x²) + epsilon)``, normalised in float32."""
    values = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(values), axis=-1, keepdims=True)
    return weight * (values * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)
