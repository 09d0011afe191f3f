"""Linear maps whose weights are stacked over layers, with LoRA."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int32

from moelora_kernels.backend import Implementation, choose
from moelora_kernels.dense_lora.api import dense_lora
from moelora_kernels.linear import reference
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

    Triton has three ways, and in all of them weights are read where they are in the stack:

    * Few rows, up to ``MAX_ROWS``: one launch for all maps, adapters included.
    * Many rows, where the tensor memory accelerator can load them: a launch that shrinks, and one
      for all maps, which adds what adapters do before it stores.
    * Many rows elsewhere: the launch for few rows as in the base model, and then
      :func:`moelora_kernels.dense_lora` for each map.

    XLA's product would not do: it may choose another algorithm in each program, and rows of the
    base model would have other bits beside adapters.

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
    if choose(implementation) == "reference":
        return reference.linear_lora(x, maps, layer, sort, tile_rows, dtype)
    from moelora_kernels.linear import triton, triton_many_rows

    tokens, width = x.shape
    outputs = [m.weight.shape[1] for m in maps]
    tiles = linear_tiles(tokens, width, outputs, x.dtype)
    if tokens <= MAX_ROWS:
        return triton.linear_lora(x, maps, layer, sort, signals, dtype, tiles)
    if _suits_descriptors(x, outputs):
        return triton_many_rows.linear_lora(x, maps, layer, sort, dtype, tiles)
    y = triton.linear_lora(x, maps, layer, None, signals, dtype, tiles)
    if sort is None or all(m.pages is None for m in maps):
        return y
    products = jnp.split(y, list(itertools.accumulate(outputs))[:-1], axis=1)
    for number, m in enumerate(maps):
        if m.pages is not None:
            products[number] = dense_lora(
                x,
                products[number],
                m.pages,
                sort,
                layer,
                tile_rows=tile_rows,
                implementation="triton",
            )
    return jnp.concatenate(products, axis=1)


def _suits_descriptors(x: Array, outputs: Sequence[int]) -> bool:
    """Whether the launches for many rows are for such maps."""
    # The tensor memory accelerator wants rows of whole 16 bytes.
    can_load = loads_blocks() and x.dtype.itemsize == 2 and x.shape[1] % 8 == 0
    return can_load and sum(outputs) >= MIN_OUTPUTS
