"""Token sort: pairs (token, choice) grouped by expert and adapter, with tile maps."""

from typing import Any

import jax
from jax import Array
from jaxtyping import Int32

from moelora_kernels.backend import Implementation, choose
from moelora_kernels.buffers import result
from moelora_kernels.sort import reference
from moelora_kernels.tiles import max_tiles
from moelora_kernels.types import TokenSort


def token_sort_shapes(
    tokens: int,
    top_k: int,
    *,
    num_experts: int,
    num_adapters: int,
    tile_rows: int,
    run_rows: int | None = None,
) -> TokenSort:
    """Shapes of the arrays of a sort, all int32: what a workspace must hold.

    The maps are as long as the worst routing needs: one partly filled tile in every group that can
    have rows at all. ``run_rows`` of None or 0 is ``tile_rows``.
    """
    pairs, run_rows = tokens * top_k, run_rows or tile_rows
    expert_tiles = max_tiles(pairs, num_experts, tile_rows)
    run_tiles = max_tiles(pairs, num_experts * num_adapters, run_rows) if num_adapters else 0
    shapes = ((pairs,), (pairs,), (expert_tiles, 3), (run_tiles, 4), (pairs,))
    arrays: Any = (jax.ShapeDtypeStruct(shape, "int32") for shape in shapes)
    return TokenSort(*arrays)


def sort_tokens(
    experts: Int32[Array, "tokens top_k"],
    adapter_of_token: Int32[Array, " tokens"] | None,
    num_tokens: Int32[Array, ""],
    *,
    num_experts: int,
    num_adapters: int,
    tile_rows: int,
    run_rows: int | None = None,
    out: TokenSort | None = None,
    implementation: Implementation | None = None,
) -> TokenSort:
    """Sort pairs by (expert, adapter), stably, and cut the rows into tiles.

    Args:
        experts: chosen experts, each in ``[0, num_experts)``.
        adapter_of_token: adapter slot of each token in ``[0, num_adapters)``, or -1 for none; None
            when no token has an adapter.
        num_tokens: tokens that are real; the others are padding and get no row.
        num_experts: E.
        num_adapters: adapter slots; 0 is allowed.
        tile_rows: rows of a full tile.
        run_rows: rows of a full tile of a run, at most ``tile_rows``, which None is; 0 lists no
            runs, for products that find them themselves.
        out: references to write, at least as large as :func:`token_sort_shapes` says.
        implementation: None chooses by the default device.

    Returns:
        The sort; see :class:`TokenSort`. With ``out``, its references.
    """
    if tile_rows < 1:
        raise ValueError(f"tile_rows must be at least 1, not {tile_rows}")
    if run_rows is None:
        run_rows = tile_rows
    elif not 0 <= run_rows <= tile_rows:
        raise ValueError(f"run_rows must be at most tile_rows, {tile_rows}, not {run_rows}")
    shapes = token_sort_shapes(
        *experts.shape,
        num_experts=num_experts,
        num_adapters=num_adapters,
        tile_rows=tile_rows,
        run_rows=run_rows,
    )
    for name in shapes._fields if out is not None else ():
        have, need = getattr(out, name), getattr(shapes, name)
        if have is not None and any(h < n for h, n in zip(have.shape, need.shape, strict=True)):
            raise ValueError(f"out.{name} has shape {have.shape}, too small for {need.shape}")
    if choose(implementation) == "triton":
        from moelora_kernels.sort import triton

        return triton.sort_tokens(
            experts,
            adapter_of_token,
            num_tokens,
            num_experts=num_experts,
            num_adapters=num_adapters,
            tile_rows=tile_rows,
            run_rows=run_rows,
            shapes=shapes,
            out=out,
        )
    # The maps fill the whole workspace, so that no entry of an earlier, larger batch is left in
    # them.
    sizes = shapes if out is None else out
    run_tiles = shapes.run_tiles if sizes.run_tiles is None else sizes.run_tiles
    assert run_tiles is not None  # of the shapes
    values = reference.sort_tokens(
        experts,
        adapter_of_token,
        num_tokens,
        num_experts=num_experts,
        num_adapters=num_adapters,
        tile_rows=tile_rows,
        run_rows=run_rows or tile_rows,
        num_expert_tiles=sizes.expert_tiles.shape[0],
        num_run_tiles=run_tiles.shape[0],
    )
    sort = TokenSort(*values) if out is None else TokenSort(*map(result, out, values))
    return sort if run_rows else sort._replace(run_tiles=None)
