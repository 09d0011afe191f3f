"""Expert projections with LoRA in plain ``jax.numpy``.

Loops over the tile maps, so that the cost follows the rows that exist: no product with an expert
that has no token, none with a page that does not exist.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from moelora_kernels.buffers import new_buffer, read
from moelora_kernels.tiles import TileRows, for_each_tile
from moelora_kernels.types import PAGE_ROWS, Buffer, SitePages, TokenSort


def matmul(a: Array, b: Array) -> Array:
    """``a · b`` in float32; on a GPU, float32 operands would otherwise be rounded to TF32."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def activate(gate: Array, up: Array, activation: str) -> Array:
    """The gated activation, in float32."""
    if activation == "silu":
        return jax.nn.silu(gate) * up
    # gpt-oss: both halves are clamped, and the linear half is shifted by one.
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return (up + 1.0) * gate * jax.nn.sigmoid(1.702 * gate)


def shrink(
    rows: Array, sort: TokenSort, sites: Sequence[SitePages], layer: Array, tile_rows: int
) -> Array:
    """Rank activations of sorted ``rows`` ``[pairs, in]``: ``[sites, pairs, max_rank]``."""
    num_rows = rows.shape[0]
    out = new_buffer((len(sites), num_rows, sites[0].max_rank), rows.dtype)

    def tile(entry: Array) -> None:
        expert, adapter, first, end = entry
        window = TileRows(first, end, tile_rows, num_rows)
        x = window.take(rows)
        for index, site in enumerate(sites):
            scaling = site.scaling[layer, adapter, expert]

            def page(
                number: Array,
                _: None,
                index: int = index,
                site: SitePages = site,
                scaling: Array = scaling,
            ) -> None:
                a = site.a_pool[site.table[layer, 0, adapter, number, expert]]
                value = matmul(x, a.T) * scaling
                where = (
                    index,
                    jax.ds(window.start, window.size),
                    jax.ds(number * PAGE_ROWS, PAGE_ROWS),
                )
                out[where] = jnp.where(window.valid[:, None], value.astype(out.dtype), out[where])

            lax.fori_loop(0, _num_pages(site, layer, adapter, expert), page, None)

    for_each_tile(run_tiles(sort), tile)
    return out[...]


def add_expand(
    accumulator: jax.Ref,
    index: int,
    rank_activations: Array,
    sort: TokenSort,
    site: SitePages,
    layer: Array,
    tile_rows: int,
) -> None:
    """Add ``rank_activations[pairs, max_rank] · B`` to ``accumulator[index]``, in float32.

    The accumulator has ``[pairs, out]`` for each index. Rows without an adapter are not touched.
    """
    num_rows = rank_activations.shape[0]

    def tile(entry: Array) -> None:
        expert, adapter, first, end = entry
        window = TileRows(first, end, tile_rows, num_rows)
        where = (index, jax.ds(window.start, window.size))
        rank_rows = window.take(rank_activations)

        def page(number: Array, total: Array) -> Array:
            b = site.b_pool[site.table[layer, 1, adapter, number, expert]]
            z = lax.dynamic_slice_in_dim(rank_rows, number * PAGE_ROWS, PAGE_ROWS, axis=1)
            return total + matmul(z, b)

        before = accumulator[where]
        after = lax.fori_loop(0, _num_pages(site, layer, adapter, expert), page, before)
        accumulator[where] = jnp.where(window.valid[:, None], after, before)

    for_each_tile(run_tiles(sort), tile)


def grouped_matmul(
    accumulator: jax.Ref, rows: Array, weight: Array, sort: TokenSort, layer: Array, tile_rows: int
) -> None:
    """Write ``rows · Wᵀ`` of each row's expert to ``accumulator``, float32 ``[parts, pairs, out]``.

    Args:
        accumulator: one part for each of the matrices that an expert has.
        rows: sorted rows ``[pairs, in]``.
        weight: ``[layers, experts, parts, out, in]``.
        sort: the token sort.
        layer: int32 scalar.
        tile_rows: rows of a full tile.
    """
    num_rows = rows.shape[0]

    def tile(entry: Array) -> None:
        expert, first, end = entry
        window = TileRows(first, end, tile_rows, num_rows)
        x = window.take(rows)
        for part in range(weight.shape[2]):
            value = matmul(x, weight[layer, expert, part].T)
            where = (part, jax.ds(window.start, window.size))
            accumulator[where] = jnp.where(window.valid[:, None], value, accumulator[where])

    for_each_tile(sort.expert_tiles, tile)


def gate_up(
    rows: Array,
    weight: Array,
    bias: Array | None,
    sort: TokenSort,
    layer: Array,
    rank_activations: Array | None,
    sites: Sequence[SitePages],
    activation: str,
    tile_rows: int,
) -> Array:
    """Gated hidden activations of sorted ``rows``, in their dtype: ``[pairs, intermediate]``."""
    halves = new_buffer((2, rows.shape[0], weight.shape[3]), jnp.float32)
    grouped_matmul(halves, rows, weight, sort, layer, tile_rows)
    if bias is not None:
        halves[...] += _bias_rows(bias[layer], sort, rows.shape[0], tile_rows)
    if rank_activations is not None:
        for index, site in enumerate(sites):
            add_expand(halves, index, rank_activations[index], sort, site, layer, tile_rows)
    return activate(halves[0], halves[1], activation).astype(rows.dtype)


def down(
    rows: Array,
    weight: Array,
    bias: Array | None,
    sort: TokenSort,
    layer: Array,
    rank_activations: Array | None,
    site: SitePages | None,
    tile_rows: int,
) -> Array:
    """Expert outputs of sorted ``rows`` in float32: ``[pairs, hidden]``."""
    out = new_buffer((1, rows.shape[0], weight.shape[2]), jnp.float32)
    grouped_matmul(out, rows, weight[:, :, None], sort, layer, tile_rows)
    if bias is not None:
        out[...] += _bias_rows(bias[layer, :, None], sort, rows.shape[0], tile_rows)
    if rank_activations is not None and site is not None:
        add_expand(out, 0, rank_activations[0], sort, site, layer, tile_rows)
    return out[0]


def run_tiles(sort: TokenSort) -> Buffer:
    """The sort's map of runs."""
    if sort.run_tiles is None:
        raise ValueError("this sort has no runs: sort without run_rows=0")
    return sort.run_tiles


def gather_rows(x: Buffer, sort: TokenSort, pairs: int, top_k: int) -> Array:
    """The token's row of ``x`` ``[tokens, width]`` for each sorted row; anything past the last."""
    return read(x)[jnp.maximum(read(sort.order, pairs), 0) // top_k]


def _num_pages(site: SitePages, layer: Array, adapter: Array, expert: Array) -> Array:
    return jnp.sum(site.table[layer, 0, adapter, :, expert] >= 0, dtype=jnp.int32)


def _bias_rows(bias: Array, sort: TokenSort, num_rows: int, tile_rows: int) -> Array:
    """``bias`` ``[experts, parts, out]`` of each row's expert, float32 ``[parts, pairs, out]``."""
    out = new_buffer((bias.shape[1], num_rows, bias.shape[2]), jnp.float32)

    def tile(entry: Array) -> None:
        expert, first, end = entry
        window = TileRows(first, end, tile_rows, num_rows)
        where = (slice(None), jax.ds(window.start, window.size))
        value = bias[expert].astype(jnp.float32)[:, None]
        out[where] = jnp.where(window.valid[None, :, None], value, out[where])

    for_each_tile(sort.expert_tiles, tile)
    return out[...]
