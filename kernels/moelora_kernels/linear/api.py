"""Linear maps whose weights are stacked over layers, with LoRA."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int32

from moelora_kernels.backend import Implementation, choose
from moelora_kernels.dense_lora.api import dense_lora
from moelora_kernels.tuning.tiles import linear_tiles, loads_blocks
from moelora_kernels.types import Buffer, LinearMap, TokenSort

#: Rows up to which reading the weights takes most of the time, so that one launch is best.
MAX_ROWS = 128
#: Columns from which on each sum of more rows is one program's; with fewer, programs share sums.
MIN_OUTPUTS = 512


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
    they are in the stack. So does that of more, behind another for the shrink. What this one is not
    for has the launch of the base model, behind which :func:`moelora_kernels.dense_lora` adds what
    adapters do. XLA's product would not do: it may choose another algorithm for each program.

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
    dtype = jnp.dtype(dtype or x.dtype)
    outputs = [m.weight.shape[1] for m in maps]
    if choose(implementation) == "triton":
        from moelora_kernels.linear import triton, triton_many_rows

        tokens, width = x.shape
        tiles = linear_tiles(tokens, width, outputs, x.dtype)
        if tokens <= MAX_ROWS:
            return triton.linear_lora(x, maps, layer, sort, signals, dtype, tiles)
        if suits_descriptors(x, outputs):
            return triton_many_rows.linear_lora(x, maps, layer, sort, dtype, tiles)
        y = triton.linear_lora(x, maps, layer, None, signals, dtype, tiles)
        if sort is None or all(m.pages is None for m in maps):
            return y
        products = jnp.split(y, list(itertools.accumulate(outputs))[:-1], axis=1)
    else:
        products = [
            linear(x, weight[layer], None if bias is None else bias[layer], dtype=dtype)
            for weight, bias, _ in maps
        ]
    if sort is not None:
        options: Any = {"tile_rows": tile_rows, "implementation": implementation}
        products = [
            y if m.pages is None else dense_lora(x, y, m.pages, sort, layer, **options)
            for y, m in zip(products, maps, strict=True)
        ]
    return products[0] if len(products) == 1 else jnp.concatenate(products, axis=1)


def suits_descriptors(x: Array, outputs: Sequence[int]) -> bool:
    """Whether the launches for many rows are for such maps."""
    # The tensor memory accelerator wants rows of whole 16 bytes.
    can_load = loads_blocks() and x.dtype.itemsize == 2 and x.shape[1] % 8 == 0
    return can_load and sum(outputs) >= MIN_OUTPUTS


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
