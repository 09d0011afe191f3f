"""The shrink of experts in Triton: ``z = scaling · A · x`` for rows of (token, expert).

Two forms. For few rows, one program per row: matrix-vector products with many loads in flight
(:mod:`moelora_kernels.expert_lora.triton_shrink_rows`). For many, programs take runs of rows that
share expert and adapter, and use the tensor cores
(:mod:`moelora_kernels.expert_lora.triton_shrink_runs`). Where all experts name the same A pages of
an adapter, a token is shrunk once for all of its experts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import triton
from jax import Array

from moelora_kernels.backend import Launch, launch, precision, scalar
from moelora_kernels.expert_lora.triton_shrink_rows import ShrinkSizes, shrink_rows
from moelora_kernels.expert_lora.triton_shrink_runs import RunSizes, shrink_runs
from moelora_kernels.tuning.tiles import ShrinkTiles
from moelora_kernels.types import Buffer, SitePages, TokenSort

#: Tokens of a chunk, those of one adapter of which are gathered to be shrunk once for all experts;
#: and programs that share the chunk.
CHUNK_TOKENS = 256
CHUNK_PROGRAMS = 32
#: Pages that a program of many rows multiplies at once, at most.
STACK_PAGES = 8


def shrink(
    x: Buffer,
    sort: TokenSort,
    sites: Sequence[SitePages],
    layer: Array,
    *,
    pairs: int,
    top_k: int | None,
    tiles: ShrinkTiles,
    out: Buffer | None,
) -> Buffer:
    """See :func:`moelora_kernels.shrink`."""
    shape = (len(sites), pairs, sites[0].max_rank) if out is None else out.shape
    outputs, refs = [jax.ShapeDtypeStruct(shape, x.dtype)], None if out is None else [out]
    sizes = shrink_sizes(x, sites, shape, top_k)
    order, layer = (sort.order, sort.group_of_row), scalar(layer)
    # A pool, table and scaling of one or two sites.
    factors: list[Any] = [
        array for site in sites for array in (site.a_pool, site.table, site.scaling)
    ]
    factors += [None] * (6 - len(factors))
    if tiles.run_rows == 0:
        how = Launch((pairs * len(sites),), tiles.num_warps, tiles.num_stages)
        inputs = (x, *order, layer, *factors)
        return launch(shrink_rows, inputs, outputs, refs, how, SIZES=sizes)[0]
    pages = min(triton.next_power_of_2(sizes.max_pages), STACK_PAGES // len(sites))
    if pages * len(sites) > 2:  # More pages make a step wider and give more warps work.
        tiles = replace(tiles, block_k=128, num_warps=4, num_stages=3)
    # Experts may share A of an adapter, which tokens are then multiplied with, not pairs.
    tokens = 0 if top_k is None or sizes.experts == 1 else pairs // top_k
    token_programs = triton.cdiv(tokens, CHUNK_TOKENS) * CHUNK_PROGRAMS
    window_programs = triton.cdiv(pairs, tiles.run_rows) * tiles.slots
    return launch(
        shrink_runs,
        (x, *order, sort.row_of_pair, layer, *factors),
        outputs,
        refs,
        Launch(
            (token_programs + window_programs, triton.cdiv(sizes.max_pages, pages)),
            tiles.num_warps,
            tiles.num_stages,
        ),
        SIZES=sizes,
        RUNS=RunSizes(
            pairs=pairs,
            run_rows=tiles.run_rows,
            slots=tiles.slots,
            pages=pages,
            block_k=min(tiles.block_k, triton.next_power_of_2(x.shape[1])),
            precision=precision(x.dtype),
            token_programs=token_programs,
            chunk_tokens=CHUNK_TOKENS,
            chunk_programs=CHUNK_PROGRAMS,
        ),
    )[0]


def shrink_sizes(
    x: Buffer, sites: Sequence[SitePages], z_shape: Sequence[int], top_k: int | None
) -> ShrinkSizes:
    """Sizes of a shrink of ``x`` whose rank activations have the shape ``z_shape``."""
    _, _, adapters, max_pages, experts = sites[0].table.shape
    return ShrinkSizes(
        width=x.shape[1],
        top_k=top_k or 0,
        sites=len(sites),
        experts=experts,
        adapters=adapters,
        max_pages=max_pages,
        z_rows=z_shape[1],
        z_columns=z_shape[2],
    )
