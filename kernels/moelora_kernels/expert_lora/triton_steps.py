"""Lists of the steps in which a product adds what adapters add, in Triton.

Products in Mosaic GPU read them; programs of the shrink's launch make them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from moelora_kernels.expert_lora.triton_expand import find_adapters, tile_adapters
from moelora_kernels.tiles import max_tiles
from moelora_kernels.types import SitePages

#: Pages that are multiplied in one step.
STEP_PAGES = 4

#: Numbers of one step in the list of steps: for each page the first of its rows in the tile, the
#: end of its rows, and where it begins in the pool.
STEP_FIELDS = 3 * STEP_PAGES
STARTS, ENDS, PAGES = 0, STEP_PAGES, 2 * STEP_PAGES


class StepLists(NamedTuple):
    """The steps of every tile, int32.

    Attributes:
        ends: ``[tiles, sites * pages]``, the end of the steps of each site's pages of each number.
        steps: ``[tiles, > most, STEP_FIELDS]``.
    """

    ends: jax.Array
    steps: jax.Array

    @classmethod
    def shapes(cls, sites: Sequence[SitePages], pairs: int, tile_rows: int) -> list[Any]:
        _, _, adapters, pages, experts = sites[0].table.shape
        num_tiles = max_tiles(pairs, experts, tile_rows)
        # One more, which may be read.
        most = len(sites) * pages * triton.cdiv(min(adapters, tile_rows), STEP_PAGES) + 1
        return [
            jax.ShapeDtypeStruct((num_tiles, len(sites) * pages), jnp.int32),
            jax.ShapeDtypeStruct((num_tiles, most, STEP_FIELDS), jnp.int32),
        ]


@triton.jit
def list_steps(
    tile,
    tiles_ptr,
    group_ptr,
    layer,
    table_0_ptr,
    table_1_ptr,
    ends_ptr,
    steps_ptr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    MOST: tl.constexpr,
    LANES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    STEP_PAGES: tl.constexpr,
    SITES: tl.constexpr,
    POOL_0: tl.constexpr,
    POOL_1: tl.constexpr,
):
    """The steps of one tile.

    A step has the pages of one site and of one number that adapters next to each other in the tile
    have.
    """
    expert = tl.load(tiles_ptr + tile * 3)
    if expert >= 0:
        first, end = tl.load(tiles_ptr + tile * 3 + 1), tl.load(tiles_ptr + tile * 3 + 2)
        lane = tl.arange(0, LANES)
        rows = first + lane
        adapter, slot, num_slots = tile_adapters(
            first, rows, rows < end, expert, group_ptr, NUM_ADAPTERS
        )
        table = (layer * 2 + 1) * NUM_ADAPTERS * MAX_PAGES * NUM_EXPERTS + expert
        ends_ptr += tile * SITES * MAX_PAGES
        steps_ptr += tile * MOST * (3 * STEP_PAGES)
        count = list_site_steps(
            tl.full([], 0, tl.int32), lane, adapter, slot, num_slots, table_0_ptr + table, ends_ptr,
            steps_ptr, NUM_EXPERTS, MAX_PAGES, LANES, PAGE_ROWS, STEP_PAGES, POOL_0,
        )  # fmt: skip
        if table_1_ptr is not None:
            list_site_steps(
                count, lane, adapter, slot, num_slots, table_1_ptr + table, ends_ptr + MAX_PAGES,
                steps_ptr, NUM_EXPERTS, MAX_PAGES, LANES, PAGE_ROWS, STEP_PAGES, POOL_1,
            )  # fmt: skip


@triton.jit
def list_site_steps(
    count,
    lane,
    adapter,
    slot,
    num_slots,
    table_ptr,
    ends_ptr,
    steps_ptr,
    NUM_EXPERTS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    LANES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    STEP_PAGES: tl.constexpr,
    POOL: tl.constexpr,
):
    """Add the steps of one site to ``count`` others, and return how many there are then.

    Where an adapter has no page, one past the pool is named, which loads find zeros in.
    """
    number = tl.arange(0, STEP_PAGES)
    for page in range(MAX_PAGES):
        for first_slot in range(0, num_slots, STEP_PAGES):
            step_adapter, mine = find_adapters(first_slot, adapter, slot, STEP_PAGES)
            entry_ptrs = table_ptr + (step_adapter * MAX_PAGES + page) * NUM_EXPERTS
            pool_row = tl.load(entry_ptrs, mask=step_adapter >= 0, other=-1)
            if tl.max(pool_row, 0) >= 0:
                start = tl.min(tl.where(mine, lane[:, None], LANES), 0)
                stop = tl.max(tl.where(mine, lane[:, None] + 1, 0), 0)
                step_ptrs = steps_ptr + count * (3 * STEP_PAGES) + number
                tl.store(step_ptrs, start)
                tl.store(step_ptrs + STEP_PAGES, tl.where(pool_row >= 0, stop, start))
                pool_row = tl.where(pool_row >= 0, pool_row, POOL)
                tl.store(step_ptrs + 2 * STEP_PAGES, pool_row * PAGE_ROWS)
                count += 1
        tl.store(ends_ptr + page, count)
    return count
