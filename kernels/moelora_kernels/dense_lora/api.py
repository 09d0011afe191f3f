"""LoRA of dense linear layers: attention projections, shared experts, and so on."""

from jax import Array
from jaxtyping import Float, Int32

from moelora_kernels.backend import Implementation, choose
from moelora_kernels.buffers import result
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

        tokens, width = x.shape
        shrink_tiles, tiles = dense_tiles(tokens, width, x.dtype)
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
