"""Linear maps with LoRA in plain ``jax.numpy``."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from moelora_kernels.dense_lora.reference import dense_lora
from moelora_kernels.types import LinearMap, TokenSort


def linear_lora(
    x: Array,
    maps: Sequence[LinearMap],
    layer: Array,
    sort: TokenSort | None,
    tile_rows: int,
    dtype: jnp.dtype,
) -> Array:
    """See :func:`moelora_kernels.linear_lora`."""
    outputs = []
    for m in maps:
        y = linear(x, m.weight[layer], None if m.bias is None else m.bias[layer], dtype=dtype)
        if sort is not None and m.pages is not None:
            y = dense_lora(x, y, m.pages, sort, layer, tile_rows)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1)


def linear(
    x: Float[Array, "tokens in"],
    weight: Float[Array, "out in"],
    bias: Float[Array, " out"] | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "tokens out"]:
    """``x · weightᵀ + bias``, summed in float32 and rounded once, by XLA.

    Args:
        x: in the compute dtype.
        weight: in the compute dtype.
        bias: likewise; None for none.
        dtype: of the result; that of ``x`` unless given.
    """
    # A GPU would round float32 operands to TF32, which has the precision of float16.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jnp.einsum("ti,oi->to", x, weight, precision=precision, preferred_element_type=jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(dtype or x.dtype)
