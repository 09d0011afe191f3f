"""Linear maps whose weights are stacked over layers, with LoRA."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int32

from moelora_kernels.backend import Implementation, choose
from moelora_kernels.dense_lora.reference import dense_lora
from moelora_kernels.tuning.tiles import linear_tiles
from moelora_kernels.types import Buffer, LinearMap, LinearUpdate, TokenSort

#: Rows up to which reading the weights takes most of the time, so that one launch is best. With 0
#: all products are XLA's.
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
    """Linear maps of one input, each token with its adapter: ``W · x + bias + s · B · (A · x)``.

    In Triton up to ``MAX_ROWS`` tokens are one launch for all maps, which reads the weights where
    they are in the stack; what adapters add takes one more. More tokens are one product of XLA's,
    to which two launches add LoRA in place.

    Args:
        x: in the compute dtype.
        maps: their weights in the compute dtype; at most three.
        layer: row of all stacks, and of the page tables.
        sort: tokens sorted by adapter, as :func:`moelora_kernels.dense_lora` needs; None for the
            base model, which leaves the maps' pages alone.
        tile_rows: what the sort was made with.
        signals: int32 counters, zero before and after; None makes new ones.
        dtype: of the results; that of ``x`` unless given. Sums are in float32.
        implementation: None chooses by the default device.

    Returns:
        The maps' outputs side by side. Tokens without an adapter, and padding, have the same bits
        with a sort and without.
    """
    y, update = linear_lora_deferred(
        x,
        maps,
        layer,
        sort=sort,
        tile_rows=tile_rows,
        signals=signals,
        dtype=dtype,
        implementation=implementation,
    )
    if update is None:
        return y
    from moelora_kernels.linear import triton_update

    return triton_update.add_update(y, update)


def linear_lora_deferred(
    x: Float[Array, "tokens in"],
    maps: Sequence[LinearMap],
    layer: Int32[Array, ""],
    *,
    sort: TokenSort | None = None,
    tile_rows: int = 0,
    signals: Buffer | None = None,
    dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "tokens out"], LinearUpdate | None]:
    """As :func:`linear_lora`, for a reader that can add what adapters add as it reads the outputs.

    So nothing waits for the rank activations, which are made beside the outputs.

    Args:
        x: this and all others as for :func:`linear_lora`.
        maps: likewise.
        layer: likewise.
        sort: likewise.
        tile_rows: likewise.
        signals: likewise.
        dtype: likewise.
        implementation: likewise.

    Returns:
        The maps' outputs side by side, and what is left to add to them; None where they are
        complete.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if choose(implementation) == "triton":
        from moelora_kernels.linear import triton, triton_many_rows

        if len(x) <= MAX_ROWS:
            outputs = [m.weight.shape[1] for m in maps]
            tiles = linear_tiles(len(x), outputs, x.dtype)
            return triton.linear_lora(x, maps, layer, sort, signals, dtype, tiles)
        # One copy from the stacks, and one product whose results lie side by side.
        weight = jnp.concatenate([m.weight[layer] for m in maps])
        biases = [
            jnp.zeros(m.weight.shape[1], x.dtype) if m.bias is None else m.bias[layer] for m in maps
        ]
        bias = None if all(m.bias is None for m in maps) else jnp.concatenate(biases)
        y = linear(x, weight, bias, dtype=dtype)
        if sort is not None:
            y = triton_many_rows.add_lora(x, y, maps, layer, sort)
        return y, None
    products = [
        linear(x, weight[layer], None if bias is None else bias[layer], dtype=dtype)
        for weight, bias, _ in maps
    ]
    if sort is not None:
        products = [
            y if m.pages is None else dense_lora(x, y, m.pages, sort, layer, tile_rows)
            for y, m in zip(products, maps, strict=True)
        ]
    return products[0] if len(products) == 1 else jnp.concatenate(products, axis=1), None


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
