"""LoRA of dense linear layers: attention projections, shared experts, and so on; of embeddings."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from moelora_kernels.backend import Implementation, choose
from moelora_kernels.buffers import read, result
from moelora_kernels.dense_lora import reference
from moelora_kernels.tuning.tiles import dense_tiles
from moelora_kernels.types import Buffer, SitePages, TokenSort


def dense_lora(
    x: Float[Array, "tokens in"],
    y: Float[Array, "tokens out"],
    pages: SitePages,
    sort: TokenSort,
    layer: Int32[Array, ""],
    *,
    tile_rows: int,
    out: Buffer | None = None,
    implementation: Implementation | None = None,
) -> Buffer:
    """Add each token's own update to a linear layer's output: ``y + scaling · B · (A · x)``.

    Args:
        x: input of the linear layer, in the compute dtype.
        y: output of the linear layer; the sum is formed in float32 and rounded to this dtype.
            Tokens without an adapter keep their values bitwise.
        pages: pages of this site; its table has one expert.
        sort: tokens sorted by adapter: :func:`sort_tokens` with one expert and one choice.
        layer: row of the page table.
        tile_rows: what the sort was made with.
        out: ``[>= tokens, out]`` in the dtype of ``y``.
        implementation: None chooses by the default device.

    Returns:
        ``[tokens, out]`` in the dtype of ``y``.
    """
    if pages.table.shape[4] != 1:
        raise ValueError(f"a dense site has one expert in its table, not {pages.table.shape[4]}")
    if choose(implementation) == "triton":
        from moelora_kernels.dense_lora import triton

        shrink_tiles, tiles = dense_tiles(x.shape[0], x.dtype)
        return triton.dense_lora(
            x,
            y,
            pages,
            sort,
            layer,
            tile_rows=tile_rows,
            shrink_tiles=shrink_tiles,
            tiles=tiles,
            out=out,
        )
    return result(out, reference.dense_lora(x, y, pages, sort, layer, tile_rows))


def embedding_lora(
    tokens: Int32[Array, " tokens"],
    y: Float[Array, "tokens out"],
    pages: SitePages,
    sort: TokenSort,
    *,
    tile_rows: int,
    out: Buffer | None = None,
    implementation: Implementation | None = None,
) -> Buffer:
    """Add each token's own update to its embedding: ``y + scaling · B · A[:, token]``.

    A product of A with a one-hot vector is a column of A, so nothing is multiplied to shrink.

    Args:
        tokens: token ids, within the columns of A.
        y: embeddings in the compute dtype, as in :func:`dense_lora`.
        pages: pages of this site, whose A is as wide as the vocabulary; its table has one expert
            and one layer is used, the first.
        sort: tokens sorted by adapter, as in :func:`dense_lora`.
        tile_rows: what the sort was made with.
        out: ``[>= tokens, out]`` in the dtype of ``y``.
        implementation: None chooses by the default device.

    Returns:
        ``[tokens, out]`` in the dtype of ``y``.
    """
    if pages.table.shape[4] != 1:
        raise ValueError(f"a dense site has one expert in its table, not {pages.table.shape[4]}")
    rank_activations = _look_up(tokens, pages, sort)
    first = jnp.int32(0)
    if choose(implementation) == "triton":
        from moelora_kernels.dense_lora import triton

        _, tiles = dense_tiles(y.shape[0], y.dtype)
        return triton.add_expand_rows(
            rank_activations, y, pages, sort, first, tile_rows=tile_rows, tiles=tiles, out=out
        )
    return result(
        out, reference.add_expand_rows(rank_activations, y, pages, sort, first, tile_rows)
    )


def _look_up(
    tokens: Int32[Array, " tokens"], pages: SitePages, sort: TokenSort
) -> Float[Array, "1 tokens max_rank"]:
    """Rank activations of sorted rows; zeros where there is no page."""
    if sort.group_of_row is None:
        raise ValueError("the sort has no group_of_row")
    count = tokens.shape[0]
    token = tokens[jnp.maximum(read(sort.order, count), 0)]
    adapter = read(sort.group_of_row, count) - 1  # Of one expert; negative where there is none.
    has_adapter, adapter = adapter >= 0, jnp.maximum(adapter, 0)
    page = pages.table[0, 0, adapter, :, 0]
    columns = pages.a_pool[jnp.maximum(page, 0), :, token[:, None]]
    scaled = columns.astype(jnp.float32) * pages.scaling[0, adapter, 0][:, None, None]
    exists = has_adapter[:, None] & (page >= 0)
    values = jnp.where(exists[:, :, None], scaled, 0.0).astype(pages.a_pool.dtype)
    return values.reshape(1, count, pages.max_rank)
