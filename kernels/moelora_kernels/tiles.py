"""Loops over the tiles of a tile map, in plain ``jax.numpy``."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from moelora_kernels.types import Buffer


class TileRows:
    """The rows of one tile as a window of static size.

    A window that would reach past the last row starts earlier instead, so windows overlap;
    ``valid`` says which rows belong to the tile.

    Attributes:
        start: int32 scalar, first row of the window.
        size: rows of the window, static.
        valid: bool ``[size]``.
    """

    def __init__(self, first: Array, end: Array, size: int, num_rows: int) -> None:
        self.size = min(size, num_rows)
        self.start = jnp.minimum(first, num_rows - self.size)
        rows = self.start + jnp.arange(self.size, dtype=jnp.int32)
        self.valid = (rows >= first) & (rows < end)

    def take(self, array: Array) -> Array:
        """The window's rows of ``array``, along its first axis."""
        return lax.dynamic_slice_in_dim(array, self.start, self.size)


def max_tiles(rows: int, groups: int, tile_rows: int) -> int:
    """Entries of a tile map at worst: every group that can have rows has a partly filled tile.

    Args:
        rows: of all groups.
        groups: that no tile spans two of.
        tile_rows: rows of a full tile.
    """
    return rows // tile_rows + min(rows, groups)


def even_tile_rows(counts: Array, tile_rows: int) -> Array:
    """Rows of a full tile of each group, int32 ``[groups]``, multiples of 16.

    There are as many tiles as if they had ``tile_rows`` rows, but of about equal size.
    """
    tiles = jnp.maximum(-(-counts // tile_rows), 1)
    even = -(-counts // tiles)
    return jnp.clip(-(-even // 16) * 16, 1, tile_rows)


def group_tiles(
    counts: Array, tile_rows: int | Array, num_tiles: int
) -> tuple[Array, Array, Array]:
    """Cut consecutive groups of rows into tiles that span one group each.

    Args:
        counts: int32 ``[groups]``, rows of each group; the groups lie one after another.
        tile_rows: rows of a full tile, or of a full tile of each group.
        num_tiles: entries of the map, at least the sum of ``ceil(counts / tile_rows)``.

    Returns:
        group, first row and end row of each tile, int32 ``[num_tiles]`` each; -1 in unused entries.
    """
    tile_rows = jnp.broadcast_to(tile_rows, counts.shape)
    group_end = jnp.cumsum(counts, dtype=jnp.int32)
    tiles_of_group = -(-counts // tile_rows)
    tile_end = jnp.cumsum(tiles_of_group, dtype=jnp.int32)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    # Comparing all is one kernel on a GPU; a search is a loop, which is better for thousands.
    method = "compare_all" if counts.shape[0] * num_tiles <= 2**16 else "scan"
    group = jnp.searchsorted(tile_end, tile, side="right", method=method).astype(jnp.int32)
    used = group < counts.shape[0]
    group = jnp.where(used, group, 0)
    first_tile = tile_end[group] - tiles_of_group[group]
    first = group_end[group] - counts[group] + (tile - first_tile) * tile_rows[group]
    end = jnp.minimum(first + tile_rows[group], group_end[group])
    return jnp.where(used, group, -1), jnp.where(used, first, -1), jnp.where(used, end, -1)


def for_each_tile(tiles: Buffer, body: Callable[[Array], None]) -> None:
    """Call ``body`` with each used entry of a tile map, in order.

    ``body`` works by writing references.
    """
    entries = tiles[...]
    used = jnp.sum(entries[:, 0] >= 0, dtype=jnp.int32)
    lax.fori_loop(0, used, lambda i, _: body(entries[i]), None)
