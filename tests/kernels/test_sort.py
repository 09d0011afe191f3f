"""Token sort: order, inverse and tile maps."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from moelora_kernels import TokenSort, sort_tokens, token_sort_shapes
from moelora_kernels.expert_lora import reference
from tests.kernels.cases import (
    POISON,
    assert_same_bits,
    compiled,
    oracle_order,
    oracle_tiles,
    poisoned,
    poisoned_like,
)


class SortShape(NamedTuple):
    tokens: int
    top_k: int
    num_experts: int
    num_adapters: int
    tile_rows: int
    run_rows: int | None
    #: Entries by which the given buffers are larger than needed.
    extra: int


SHAPES = (
    SortShape(1, 2, 6, 3, 16, None, 0),
    SortShape(7, 8, 8, 5, 4, 4, 5),
    SortShape(33, 2, 6, 4, 8, 3, 40),
    SortShape(12, 3, 40, 2, 1, None, 1),
    SortShape(33, 1, 3, 0, 16, 16, 3),
)


class SortCase(NamedTuple):
    shape: SortShape
    num_tokens: int
    experts: np.ndarray
    adapter_of_token: np.ndarray


@st.composite
def sort_cases(draw: st.DrawFn, shapes: Sequence[SortShape] = SHAPES) -> SortCase:
    shape = draw(st.sampled_from(shapes))
    num_tokens = draw(st.integers(0, shape.tokens) | st.just(shape.tokens))
    # From a random upper bound on, so that skewed routing and a single adapter are common.
    expert = st.integers(0, draw(st.integers(0, shape.num_experts - 1)))
    adapter = st.integers(-1, draw(st.integers(-1, shape.num_adapters - 1)))
    experts = draw(st_numpy.arrays(np.int32, (shape.tokens, shape.top_k), elements=expert))
    adapter_of_token = draw(st_numpy.arrays(np.int32, shape.tokens, elements=adapter))
    experts[num_tokens:] = adapter_of_token[num_tokens:] = POISON
    return SortCase(shape, num_tokens, experts, adapter_of_token)


def run(case: SortCase, out: TokenSort | None) -> TokenSort:
    _, _, num_experts, num_adapters, tile_rows, run_rows, _ = case.shape
    program = compiled(
        sort_tokens,
        num_experts=num_experts,
        num_adapters=num_adapters,
        tile_rows=tile_rows,
        run_rows=run_rows,
    )
    return program(
        out,
        jnp.asarray(case.experts),
        jnp.asarray(case.adapter_of_token),
        jnp.int32(case.num_tokens),
    )


def shapes_of(shape: SortShape) -> TokenSort:
    return token_sort_shapes(
        shape.tokens,
        shape.top_k,
        num_experts=shape.num_experts,
        num_adapters=shape.num_adapters,
        tile_rows=shape.tile_rows,
        run_rows=shape.run_rows,
    )


def buffers(shape: SortShape) -> TokenSort:
    """Poisoned buffers, larger than needed."""
    needed = shapes_of(shape)
    return TokenSort(
        *(poisoned((leaf.shape[0] + shape.extra, *leaf.shape[1:]), "int32") for leaf in needed)
    )


def assert_tiles(
    tiles: np.ndarray, group_of_row: list[tuple[int, ...]], rows: list[int], tile_rows: int
) -> None:
    """Used entries come first and cut ``rows`` into as few tiles as possible, of one group each."""
    used = int(np.sum(tiles[:, 0] >= 0))
    assert (tiles[used:] == -1).all()
    covered = []
    for *group, first, end in tiles[:used].tolist():
        assert 0 < end - first <= tile_rows
        assert {group_of_row[row] for row in range(first, end)} == {tuple(group)}
        covered += range(first, end)
    assert sorted(covered) == rows
    # The cost of a kernel is the number of its tiles.
    groups = [group_of_row[row] for row in rows]
    assert used == sum(-(-groups.count(group) // tile_rows) for group in set(groups))


def test_tiles_of_an_expert_are_about_equal() -> None:
    """Not full ones and a rest, which would keep one processor waiting for another."""
    experts = jnp.array([[0]] * 300 + [[1]] * 20 + [[3]] * 144, jnp.int32)
    sort = sort_tokens(experts, None, jnp.int32(464), num_experts=4, num_adapters=0, tile_rows=144)
    sizes = [
        (expert, end - first) for expert, first, end in sort.expert_tiles.tolist() if expert >= 0
    ]
    assert sizes == [(0, 112), (0, 112), (0, 76), (1, 20), (3, 144)]


@settings(max_examples=80)
@given(case=sort_cases())
def test_order_and_tiles(case: SortCase) -> None:
    sort = TokenSort(*map(np.asarray, run(case, buffers(case.shape))))
    pairs, tile_rows = case.experts.size, case.shape.tile_rows
    rows = oracle_order(case.experts, case.adapter_of_token, case.num_tokens)
    assert sort.order[:pairs].tolist() == rows + [-1] * (pairs - len(rows))

    row_of_pair = [-1] * pairs
    for row, pair in enumerate(rows):
        row_of_pair[pair] = row
    assert sort.row_of_pair[:pairs].tolist() == row_of_pair

    expert = [int(case.experts.flat[pair]) for pair in rows]
    adapter = [int(case.adapter_of_token[pair // case.shape.top_k]) for pair in rows]
    group_of_row = [
        e * (case.shape.num_adapters + 1) + a + 1 for e, a in zip(expert, adapter, strict=True)
    ]
    assert sort.group_of_row[:pairs].tolist() == group_of_row + [-1] * (pairs - len(rows))

    every_row = list(range(len(rows)))
    adapter_rows = [row for row in every_row if adapter[row] >= 0]
    assert_tiles(sort.expert_tiles, [(e,) for e in expert], every_row, tile_rows)
    run_rows = case.shape.run_rows or tile_rows
    assert_tiles(sort.run_tiles, list(zip(expert, adapter, strict=True)), adapter_rows, run_rows)


@settings(max_examples=20)
@given(case=sort_cases(SHAPES[1:3]))
def test_given_buffers_make_no_difference(case: SortCase) -> None:
    fresh = run(case, None)
    needed = shapes_of(case.shape)
    assert [leaf.shape for leaf in fresh] == [leaf.shape for leaf in needed]
    written = run(case, buffers(case.shape))
    for one, other in zip(fresh, written, strict=True):
        assert_same_bits(one, np.asarray(other)[: len(one)])


@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_a_smaller_batch_leaves_no_entry_of_a_larger_one(shape: SortShape) -> None:
    rng = np.random.default_rng(0)
    experts = rng.integers(0, shape.num_experts, (shape.tokens, shape.top_k)).astype(np.int32)
    adapters = rng.integers(-1, shape.num_adapters, shape.tokens).astype(np.int32)
    small = shape._replace(tokens=max(shape.tokens // 2, 1))
    case = SortCase(small, 1, experts[: small.tokens], adapters[: small.tokens])

    used = run(SortCase(shape, shape.tokens, experts, adapters), buffers(shape))
    after = TokenSort(*map(np.asarray, run(case, used)))
    clean = TokenSort(*map(np.asarray, run(case, buffers(shape))))
    pairs = small.tokens * small.top_k
    for name in ("order", "row_of_pair", "group_of_row"):
        assert_same_bits(getattr(after, name)[:pairs], getattr(clean, name)[:pairs])
    assert_same_bits(after.expert_tiles, clean.expert_tiles)
    assert_same_bits(after.run_tiles, clean.run_tiles)


def test_no_adapters_is_the_same_as_all_base() -> None:
    experts = np.random.default_rng(0).integers(0, 6, (33, 2)).astype(np.int32)
    base_only = np.full(33, -1, np.int32)

    def run_with(num_adapters: int, adapter_of_token: np.ndarray | None) -> TokenSort:
        program = compiled(sort_tokens, num_experts=6, num_adapters=num_adapters, tile_rows=8)
        return program(None, experts, adapter_of_token, np.int32(30))

    none, no_slots, slots = run_with(0, None), run_with(0, base_only), run_with(4, base_only)
    assert none.run_tiles.shape == (0, 4)
    assert (np.asarray(slots.run_tiles) == -1).all()
    assert_same_bits(none, no_slots)
    # All but what names adapters.
    assert_same_bits(none[:3], slots[:3])


def test_tile_maps_are_large_enough_for_every_routing() -> None:
    num_experts = num_adapters = 2
    for tokens, tile_rows in itertools.product(range(1, 8), (1, 2, 3)):
        shapes = token_sort_shapes(
            tokens, 1, num_experts=num_experts, num_adapters=num_adapters, tile_rows=tile_rows
        )
        groups = list(itertools.product(range(num_experts), range(num_adapters)))
        for rows in itertools.combinations_with_replacement(groups, tokens):
            assert len(oracle_tiles(rows, tile_rows)) <= shapes.run_tiles.shape[0]
            by_expert = [(expert,) for expert, _ in rows]
            assert len(oracle_tiles(by_expert, tile_rows)) <= shapes.expert_tiles.shape[0]


def test_repeated_calls_give_the_same_bits() -> None:
    rng = np.random.default_rng(1)
    shape = SHAPES[1]
    experts = rng.integers(0, 8, (7, 8)).astype(np.int32)
    case = SortCase(shape, 7, experts, rng.integers(-1, 5, 7).astype(np.int32))
    assert_same_bits(run(case, buffers(shape)), run(case, buffers(shape)))


@pytest.mark.parametrize("tile_rows", [0, -16])
def test_tiles_without_rows_raise(tile_rows: int) -> None:
    with pytest.raises(ValueError, match=f"tile_rows must be at least 1, not {tile_rows}"):
        sort_tokens(
            jnp.zeros((2, 1), jnp.int32),
            None,
            jnp.int32(2),
            num_experts=3,
            num_adapters=0,
            tile_rows=tile_rows,
        )


@pytest.mark.parametrize("run_rows", [-1, 17])
def test_runs_longer_than_a_tile_raise(run_rows: int) -> None:
    with pytest.raises(ValueError, match=f"at most tile_rows, 16, not {run_rows}"):
        sort_tokens(
            jnp.zeros((2, 1), jnp.int32),
            None,
            jnp.int32(2),
            num_experts=3,
            num_adapters=0,
            tile_rows=16,
            run_rows=run_rows,
        )


def test_a_sort_without_runs_says_so_to_a_shrink() -> None:
    shape = SHAPES[2]
    case = SortCase(
        shape._replace(run_rows=0), 33, np.zeros((33, 2), np.int32), np.zeros(33, np.int32)
    )
    sort = run(case, None)
    assert sort.run_tiles is None
    with pytest.raises(ValueError, match="this sort has no runs"):
        reference.run_tiles(sort)


@pytest.mark.parametrize("field", TokenSort._fields)
def test_buffers_that_are_too_small_raise(field: str) -> None:
    shape = SHAPES[1]._replace(extra=0)
    full = buffers(shape)
    case = SortCase(shape, 7, np.zeros((7, 8), np.int32), np.zeros(7, np.int32))
    with pytest.raises(ValueError, match="too small"):
        run(case, full._replace(**{field: getattr(full, field)[1:]}))


def test_buffers_of_another_dtype_raise() -> None:
    shape = SHAPES[0]
    case = SortCase(shape, 1, np.zeros((1, 2), np.int32), np.zeros(1, np.int32))
    out = poisoned_like(shapes_of(shape))._replace(order=poisoned((2,), "float32"))
    with pytest.raises(ValueError, match=r"out is float32"):
        run(case, out)
