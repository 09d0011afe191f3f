"""Token sort in plain ``jax.numpy``."""

import jax.numpy as jnp
from jax import Array

from moelora_kernels.tiles import even_tile_rows, group_tiles


def sort_tokens(
    experts: Array,
    adapter_of_token: Array | None,
    num_tokens: Array,
    *,
    num_experts: int,
    num_adapters: int,
    tile_rows: int,
    run_rows: int,
    num_expert_tiles: int,
    num_run_tiles: int,
) -> tuple[Array, Array, Array, Array, Array]:
    """See :func:`moelora_kernels.sort_tokens`."""
    tokens, top_k = experts.shape
    pairs = tokens * top_k
    token = jnp.arange(tokens, dtype=jnp.int32)
    if adapter_of_token is None:
        adapter_of_token = jnp.full(tokens, -1, jnp.int32)
    # Groups are (expert, adapter), rows without an adapter first; padding sorts behind all of them.
    groups_per_expert = num_adapters + 1
    group = experts * groups_per_expert + adapter_of_token[:, None] + 1
    last = num_experts * groups_per_expert
    group = jnp.where((token < num_tokens)[:, None], group, last).reshape(pairs)

    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    row = jnp.arange(pairs, dtype=jnp.int32)
    row_of_pair = jnp.zeros(pairs, jnp.int32).at[order].set(row)
    num_rows = num_tokens * top_k
    group_of_row = jnp.where(row < num_rows, group[order], -1)
    order = jnp.where(row < num_rows, order, -1)
    row_of_pair = jnp.where(row_of_pair < num_rows, row_of_pair, -1)

    counts = jnp.zeros(last + 1, jnp.int32).at[group].add(1)[:last]
    by_expert = counts.reshape(num_experts, groups_per_expert)
    of_expert = by_expert.sum(axis=1, dtype=jnp.int32)
    expert_tiles = group_tiles(of_expert, even_tile_rows(of_expert, tile_rows), num_expert_tiles)

    run_tiles = _run_tiles(by_expert, run_rows, num_run_tiles)
    return order, row_of_pair, jnp.stack(expert_tiles, axis=1), run_tiles, group_of_row


def _run_tiles(by_expert: Array, tile_rows: int, num_tiles: int) -> Array:
    """Tiles of the groups ``by_expert[:, 1:]``, that is of the rows that have an adapter."""
    num_adapters = by_expert.shape[1] - 1
    if num_adapters == 0:
        return jnp.full((num_tiles, 4), -1, jnp.int32)
    run, first, end = group_tiles(by_expert[:, 1:].reshape(-1), tile_rows, num_tiles)
    expert, adapter = run // num_adapters, run % num_adapters
    # These rows were counted without the base rows of this and of earlier experts.
    base_rows = jnp.cumsum(by_expert[:, 0], dtype=jnp.int32)[expert]
    tiles = jnp.stack([expert, adapter, first + base_rows, end + base_rows], axis=1)
    return jnp.where(run[:, None] < 0, -1, tiles)
