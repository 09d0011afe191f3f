"""Linear maps whose weights are stacked over layers, with LoRA."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int32

from moelora_kernels.backend import Implementation, choose
from moelora_kernels.dense_lora.api import dense_lora
from moelora_kernels.tuning.tiles import linear_tiles
from moelora_kernels.types import Buffer, LinearMap, TokenSort

#: Rows up to which reading the weights takes most of the time, so that one launch is best.
MAX_ROWS = 128


def linear_lora(
    x: Float[Array, "tokens in"],
    maps: Sequence[LinearMap],
    layer: Int32[Array, ""],
    *,
    sort: TokenSort | None = None,
    tile_rows: int = 0,
    signals: Buffer | None = None,
    dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "tokens out"]:
    """Linear maps of one input, each token with its own adapter: ``W · x + bias + s · B · (A · x)``.

    In Triton up to ``MAX_ROWS`` tokens are one launch for all maps: the weights are read where they
    are in the stack, and the first programs shrink while the others read weights. More tokens are
    one product of XLA's for each map, and :func:`moelora_kernels.dense_lora`.

    Args:
        x: in the compute dtype.
        maps: their weights in the compute dtype; at most three.
        layer: row of all stacks, and of the page tables.
        sort: tokens sorted by adapter, as :func:`moelora_kernels.dense_lora` needs; None for the
            base model, which leaves the maps' pages alone.
        tile_rows: what the sort was made with.
        signals: int32 counters, zero before and after; None makes new ones. Only with a sort.
        dtype: of the results; that of ``x`` unless given. Sums are in float32.
        implementation: None chooses by the default device.

    Returns:
        The maps' outputs side by side. Tokens without an adapter have the same bits with a sort and
        without; rows of padding are not defined.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    implementation = choose(implementation)
    if implementation == "triton" and len(x) <= MAX_ROWS:
        from moelora_kernels.linear import triton

        outputs = sum(m.weight.shape[1] for m in maps)
        tiles = linear_tiles(len(x), x.shape[1], outputs, x.dtype)
        return triton.linear_lora(x, maps, layer, sort, signals, dtype, tiles)
    results = []
    for weight, bias, pages in maps:
        y = linear(x, weight[layer], None if bias is None else bias[layer], dtype=dtype)
        if sort is not None and pages is not None:
            y = dense_lora(
                x, y, pages, sort, layer, tile_rows=tile_rows, implementation=implementation
            )
        results.append(y)
    return results[0] if len(results) == 1 else jnp.concatenate(results, axis=1)


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
