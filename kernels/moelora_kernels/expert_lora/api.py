"""Expert projections with LoRA: gate_up with activation, down, and the shrink that both contain.

The math of one pair (token with hidden state x, expert e) whose token has adapter a with scaling s:

    gate = Wg[e]·x + s·Bg[a,e]·(Ag[a,e]·x)        up likewise
    h    = activation(gate, up)
    y    = Wd[e]·h + s·Bd[a,e]·(Ad[a,e]·h)

Products accumulate in float32. Rank activations are scaled in float32 and rounded once to the
compute dtype. A row without an adapter takes exactly the path of the base model.
"""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int32

from moelora_kernels.backend import Implementation, choose
from moelora_kernels.buffers import read, result
from moelora_kernels.expert_lora import reference
from moelora_kernels.tuning.tiles import (
    GemmTiles,
    MosaicTiles,
    ShrinkTiles,
    gemm_rule,
    shrink_rule,
)
from moelora_kernels.types import Buffer, SitePages, TokenSort

Activation = Literal["silu", "clamped_swiglu"]


def shrink(
    x: Buffer,
    sort: TokenSort,
    sites: Sequence[SitePages],
    layer: Int32[Array, ""],
    *,
    pairs: int,
    tile_rows: int,
    top_k: int | None = None,
    out: Buffer | None = None,
    tiles: ShrinkTiles | None = None,
    implementation: Implementation | None = None,
) -> Buffer:
    """Rank activations: ``scaling · (A · x)`` of every row's own adapter.

    Args:
        x: with ``top_k``, hidden states of tokens ``[tokens, in]``; without, sorted rows ``[pairs,
            in]``.
        sort: the token sort.
        sites: one or two sites that read the same ``x``, of equal ``max_rank``.
        layer: row of the page tables.
        pairs: rows of this batch, ``tokens * top_k``.
        tile_rows: what the sort was made with.
        top_k: choices per token, where ``x`` has one row per token.
        out: ``[sites, >= pairs, >= max_rank]`` in the dtype of ``x``.
        tiles: launch parameters of the Triton kernel; None chooses by a rule.
        implementation: None chooses by the default device.

    Returns:
        ``[sites, pairs, max_rank]`` in sorted order. Rows without an adapter are not defined; rank
        columns past an adapter's last page are zero.
    """
    if len({site.max_rank for site in sites}) != 1:
        raise ValueError(f"sites of one shrink differ in max_rank: {[s.max_rank for s in sites]}")
    if choose(implementation) == "triton":
        from moelora_kernels.expert_lora import triton_shrink

        experts = sites[0].table.shape[4]
        return triton_shrink.shrink(
            x,
            sort,
            sites,
            layer,
            pairs=pairs,
            top_k=top_k,
            tiles=tiles or shrink_rule(pairs / experts, x.dtype),
            out=out,
        )
    rows = read(x, pairs) if top_k is None else reference.gather_rows(x, sort, pairs, top_k)
    return result(out, reference.shrink(rows, sort, sites, layer, tile_rows))


def gate_up(
    x: Buffer,
    weight: Float[Array, "layers experts 2 intermediate hidden"],
    sort: TokenSort,
    layer: Int32[Array, ""],
    *,
    top_k: int,
    tile_rows: int,
    activation: Activation = "silu",
    bias: Float[Array, "layers experts 2 intermediate"] | None = None,
    sites: tuple[SitePages, SitePages] | None = None,
    rank_activations: Buffer | None = None,
    signals: Buffer | None = None,
    out: Buffer | None = None,
    sorted_x: Buffer | None = None,
    tiles: GemmTiles | MosaicTiles | None = None,
    implementation: Implementation | None = None,
) -> Buffer:
    """Gate and up projections of every pair, LoRA added, and the gated activation.

    Args:
        x: hidden states ``[tokens, hidden]`` in the compute dtype.
        weight: gate (index 0) and up (1) projections of all layers.
        sort: the token sort.
        layer: row of ``weight`` and of the page tables.
        top_k: choices per token.
        tile_rows: what the sort was made with.
        activation: ``silu``: silu(gate)·up. ``clamped_swiglu``: (clip(up, ±7) + 1)·g·sigmoid(1.702
            g) with g = min(gate, 7), as in gpt-oss.
        bias: added before the activation.
        sites: pages of gate and up, or None for the base model.
        rank_activations: reference ``[2, >= pairs, >= max_rank]`` in the dtype of ``x`` that the
            rank activations are written to; for Mosaic's kernel of ``RANK_PADDING`` more rows. None
            allocates it.
        signals: reference int32 ``SIGNALS``, zero before and after; None allocates it.
        out: ``[>= pairs, intermediate]`` in the dtype of ``x``.
        sorted_x: ``[>= pairs, hidden]`` in the dtype of ``x``, which Mosaic's kernel may overwrite.
        tiles: launch parameters of Triton's or Mosaic's kernel; None chooses Triton's by a rule.
        implementation: None chooses by the default device.

    Returns:
        ``[pairs, intermediate]`` in sorted order; rows past the last real pair are not defined.
    """
    pairs = x.shape[0] * top_k
    if choose(implementation) == "triton":
        if isinstance(tiles, MosaicTiles):
            from moelora_kernels.expert_lora import mosaic

            return mosaic.gate_up(
                x,
                weight,
                bias,
                sort,
                layer,
                top_k=top_k,
                tile_rows=tile_rows,
                activation=activation,
                sites=sites,
                rank_activations=rank_activations,
                tiles=tiles,
                sorted_x=sorted_x,
                out=out,
            )
        from moelora_kernels.expert_lora import triton

        return triton.gate_up(
            x,
            weight,
            bias,
            sort,
            layer,
            top_k=top_k,
            tile_rows=tile_rows,
            activation=activation,
            sites=sites,
            rank_activations=rank_activations,
            signals=signals,
            tiles=tiles or gemm_rule(pairs / weight.shape[1], x.dtype)[1],
            out=out,
        )
    rows = reference.gather_rows(x, sort, pairs, top_k)
    ranks = _shrink(rows, sort, sites or (), layer, tile_rows, rank_activations)
    value = reference.gate_up(
        rows, weight, bias, sort, layer, ranks, sites or (), activation, tile_rows
    )
    return result(out, value)


def down(
    hidden: Buffer,
    weight: Float[Array, "layers experts hidden intermediate"],
    sort: TokenSort,
    layer: Int32[Array, ""],
    *,
    pairs: int,
    tile_rows: int,
    bias: Float[Array, "layers experts hidden"] | None = None,
    site: SitePages | None = None,
    rank_activations: Buffer | None = None,
    signals: Buffer | None = None,
    dtype: DTypeLike = jnp.float32,
    out: Buffer | None = None,
    tiles: GemmTiles | MosaicTiles | None = None,
    implementation: Implementation | None = None,
) -> Buffer:
    """Down projection of every pair, LoRA added.

    Args:
        hidden: ``[>= pairs, intermediate]`` from :func:`gate_up`.
        weight: down projections of all layers.
        sort: the token sort.
        layer: row of ``weight`` and of the page table.
        pairs: rows of this batch, ``tokens * top_k``.
        tile_rows: what the sort was made with.
        bias: added to every pair's output.
        site: pages of down, or None for the base model.
        rank_activations: reference ``[1, >= pairs, >= max_rank]`` in the dtype of ``hidden`` that
            the rank activations are written to; for Mosaic's kernel of ``RANK_PADDING`` more rows.
            None allocates it.
        signals: reference int32 ``SIGNALS``, zero before and after; None allocates it.
        dtype: of the result. At thousands of tokens, writing and reading it takes as long in
            float32 as a third of the layer's products.
        out: ``[>= pairs, hidden]`` of that dtype.
        tiles: launch parameters of Triton's or Mosaic's kernel; None chooses Triton's by a rule.
        implementation: None chooses by the default device.

    Returns:
        ``[pairs, hidden]`` in sorted order; rows past the last real pair are not defined.
    """
    if choose(implementation) == "triton":
        if isinstance(tiles, MosaicTiles):
            from moelora_kernels.expert_lora import mosaic

            return mosaic.down(
                hidden,
                weight,
                bias,
                sort,
                layer,
                pairs=pairs,
                tile_rows=tile_rows,
                site=site,
                rank_activations=rank_activations,
                dtype=dtype,
                tiles=tiles,
                out=out,
            )
        from moelora_kernels.expert_lora import triton

        return triton.down(
            hidden,
            weight,
            bias,
            sort,
            layer,
            pairs=pairs,
            tile_rows=tile_rows,
            site=site,
            rank_activations=rank_activations,
            signals=signals,
            dtype=dtype,
            tiles=tiles or gemm_rule(pairs / weight.shape[1], hidden.dtype)[2],
            out=out,
        )
    rows = read(hidden, pairs)
    ranks = _shrink(rows, sort, () if site is None else (site,), layer, tile_rows, rank_activations)
    value = reference.down(rows, weight, bias, sort, layer, ranks, site, tile_rows)
    return result(out, value.astype(dtype))


def _shrink(
    rows: Array,
    sort: TokenSort,
    sites: Sequence[SitePages],
    layer: Array,
    tile_rows: int,
    out: Buffer | None,
) -> Array | None:
    """The reference's rank activations of sorted ``rows``, also stored in ``out``."""
    if not sites:
        return None
    ranks = reference.shrink(rows, sort, sites, layer, tile_rows)
    result(out, ranks)
    return ranks
