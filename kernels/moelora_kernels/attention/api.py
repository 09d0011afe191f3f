"""Causal attention over a paged KV cache, and writing to that cache.

The cache of all layers is one array ``[layers, blocks, block_size, kv_heads, head_dim]`` for keys
and one for values, whose heads may have another width. A sequence's block table names the blocks
that hold its positions, in order. Block 0 is no sequence's: padding tokens write there.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from moelora_kernels.attention import reference
from moelora_kernels.backend import Implementation, choose
from moelora_kernels.buffers import result
from moelora_kernels.tiles import group_tiles
from moelora_kernels.tuning.tiles import PROCESSORS
from moelora_kernels.types import Buffer


def query_tile_rows(tokens: int, heads: int, kv_heads: int) -> int:
    """Tokens of a full tile of prompts, so that all heads of a group are 64 or 128 rows.

    Args:
        tokens: of the bucket.
        heads: query heads.
        kv_heads: key heads.
    """
    # Large tiles read keys less often, small ones are enough for all processors.
    rows = 128 if tokens * heads > PROCESSORS * 128 else 64
    return max(1, rows * kv_heads // heads)


def query_tiles(
    query_counts: Int32[Array, " sequences"], tokens: int, tile_rows: int
) -> Int32[Array, "tiles 3"]:
    """Tile map (sequence, first token, end token) of packed queries, unused entries -1.

    Args:
        query_counts: tokens of each sequence in this batch; the sequences lie one after another.
        tokens: tokens of the bucket.
        tile_rows: tokens of a full tile.
    """
    # Worst case: every sequence has one token more than full tiles.
    sequences = min(tokens, query_counts.shape[0])
    num_tiles = (tokens + sequences * (tile_rows - 1)) // tile_rows
    return jnp.stack(group_tiles(query_counts, tile_rows, num_tiles), axis=1)


def write_cache(
    cache: Buffer,
    values: Float[Array, "tokens kv_heads head_dim"],
    layer: Int32[Array, ""],
    block_of_token: Int32[Array, " tokens"],
    offset_of_token: Int32[Array, " tokens"],
) -> None:
    """Write keys or values of new tokens to one layer of the cache, in place.

    Args:
        cache: ``[layers, blocks, block_size, kv_heads, head_dim]``.
        values: what to write; rounded to the cache's dtype.
        layer: layer of the cache.
        block_of_token: block of each token; 0 for padding.
        offset_of_token: position within the block.
    """
    cache[layer, block_of_token, offset_of_token] = values.astype(cache.dtype)


def paged_attention(
    queries: Float[Array, "tokens heads head_dim"],
    k_cache: Buffer,
    v_cache: Buffer,
    layer: Int32[Array, ""],
    block_table: Int32[Array, "sequences blocks"],
    positions: Int32[Array, " tokens"],
    tiles: Int32[Array, "tiles 3"],
    *,
    tile_rows: int,
    scale: float,
    window: Int32[Array, ""] | None = None,
    sinks: Float[Array, " heads"] | None = None,
    out: Buffer | None = None,
    implementation: Implementation | None = None,
) -> Buffer:
    """Attention of packed queries to the cached positions of their own sequence, up to their own.

    Softmax and sums are in float32. Query heads are grouped over the key heads. With a window a
    query at position p sees the positions from p - window + 1 to p. With sinks the weights of a
    head are those of the softmax over its scores and its sink, so they sum up to less than one.

    Args:
        queries: packed queries; their keys and values are in the cache already.
        k_cache: keys ``[layers, blocks, block_size, kv_heads, head_dim]``.
        v_cache: values ``[layers, blocks, block_size, kv_heads, value_dim]``.
        layer: layer of the caches.
        block_table: blocks of each sequence; entries past its length are any valid block.
        positions: position of each token in its sequence, in ascending order.
        tiles: from :func:`query_tiles`.
        tile_rows: what the tiles were made with.
        scale: positive factor on the scores.
        window: positions that a query sees at most, its own included; None means all. It is data,
            so layers with different windows share one program.
        sinks: one more score for each query head, without a value; not multiplied by ``scale``.
        out: ``[>= tokens, heads, value_dim]`` in the dtype of ``queries``.
        implementation: None chooses by the default device.

    Returns:
        ``[tokens, heads, value_dim]``; not defined for tokens in no tile.
    """
    if queries.shape[1] % k_cache.shape[3]:
        raise ValueError(
            f"{queries.shape[1]} query heads cannot be grouped over {k_cache.shape[3]} key heads"
        )
    if choose(implementation) == "triton":
        from moelora_kernels.attention import triton

        return triton.paged_attention(
            queries,
            k_cache,
            v_cache,
            layer,
            block_table,
            positions,
            tiles,
            tile_rows=tile_rows,
            scale=scale,
            window=window,
            sinks=sinks,
            out=out,
        )
    value = reference.paged_attention(
        queries,
        k_cache,
        v_cache,
        layer,
        block_table,
        positions,
        tiles,
        tile_rows,
        scale,
        window,
        sinks,
    )
    return result(out, value)
