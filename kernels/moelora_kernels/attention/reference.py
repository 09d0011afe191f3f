"""Causal attention over a paged KV cache in plain ``jax.numpy``."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from moelora_kernels.buffers import new_buffer
from moelora_kernels.tiles import TileRows, for_each_tile
from moelora_kernels.types import Buffer


def paged_attention(
    queries: Array,
    k_cache: Buffer,
    v_cache: Buffer,
    layer: Array,
    block_table: Array,
    positions: Array,
    query_tiles: Array,
    tile_rows: int,
    scale: float,
    window: Array | None = None,
    sinks: Array | None = None,
) -> Array:
    """See :func:`moelora_kernels.paged_attention`."""
    tokens, heads, head_dim = queries.shape
    *_, kv_heads, value_dim = v_cache.shape
    group = heads // kv_heads
    out = new_buffer((tokens, heads, value_dim), queries.dtype)

    def tile(entry: Array) -> None:
        sequence, first, end = entry
        rows = TileRows(first, end, tile_rows, tokens)
        blocks = block_table[sequence]
        keys = k_cache[layer, blocks].reshape(-1, kv_heads, head_dim)
        values = v_cache[layer, blocks].reshape(-1, kv_heads, value_dim)
        query = rows.take(queries).reshape(rows.size, kv_heads, group, head_dim)
        position = jnp.where(rows.valid, rows.take(positions), 0)
        context = jnp.arange(keys.shape[0], dtype=jnp.int32)

        scores = _einsum("qhgd,khd->hgqk", query, keys) * jnp.float32(scale)
        visible = context[None, :] <= position[:, None]
        if window is not None:
            visible &= context[None, :] > position[:, None] - window
        scores = jnp.where(visible, scores, -jnp.inf)
        weights = _softmax(scores, sinks).astype(queries.dtype)
        # A zero weight does not undo a NaN in a position that was never written.
        values = jnp.where((context <= jnp.max(position))[:, None, None], values, 0)
        value = _einsum("hgqk,khd->qhgd", weights, values).reshape(-1, heads, value_dim)
        where = jax.ds(rows.start, rows.size)
        out[where] = jnp.where(rows.valid[:, None, None], value.astype(out.dtype), out[where])

    for_each_tile(query_tiles, tile)
    return out[...]


def _einsum(subscripts: str, a: Array, b: Array) -> Array:
    """In float32; on a GPU, float32 operands would otherwise be rounded to TF32."""
    return jnp.einsum(
        subscripts, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _softmax(scores: Array, sinks: Array | None) -> Array:
    """Softmax over the last axis of ``[kv_heads, group, queries, context]``, sinks included."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    column = sinks.astype(jnp.float32).reshape(*scores.shape[:2], 1, 1)
    column = jnp.broadcast_to(column, (*scores.shape[:3], 1))
    return jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
