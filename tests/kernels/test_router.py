"""Router top-k against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from moelora_kernels import ExpertGroups, route
from tests.kernels.cases import to_device

route_jit = jax.jit(route, static_argnames=("top_k", "scoring", "renormalize", "groups"))

#: Tokens, experts, top_k.
SHAPES = [(1, 6, 2), (7, 8, 8), (33, 6, 1)]


def oracle(
    logits: np.ndarray,
    top_k: int,
    scoring: str,
    renormalize: bool,
    bias: np.ndarray | None = None,
    groups: ExpertGroups | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    tokens = len(logits)
    experts, weights = np.zeros((tokens, top_k), np.int32), np.zeros((tokens, top_k))
    for token in range(tokens):
        row = logits[token]
        if scoring == "softmax":
            scores = np.exp(row - row.max()) / np.sum(np.exp(row - row.max()))
        else:
            scores = 1 / (1 + np.exp(-row))
        choice = scores if bias is None else scores + bias
        candidates = list(range(len(row)))
        if groups is not None:
            size = len(row) // groups.count
            parts = [candidates[start : start + size] for start in range(0, len(row), size)]
            worth = [sum(sorted(choice[part])[-groups.summed :]) for part in parts]
            best = sorted(range(groups.count), key=lambda g: (-worth[g], g))[: groups.chosen]
            candidates = [expert for group in sorted(best) for expert in parts[group]]
        experts[token] = sorted(candidates, key=lambda e: (-choice[e], e))[:top_k]
        weights[token] = scores[experts[token]]
        if renormalize:
            weights[token] /= weights[token].sum()
    return experts, weights


@st.composite
def routings(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    tokens, experts, top_k = draw(st.sampled_from(SHAPES))
    # Quarters: two logits are equal, or so far apart that float32 scores keep their order. Few
    # values, so that ties are the rule. bfloat16 represents all of them.
    quarters = draw(st_numpy.arrays(np.int32, (tokens, experts), elements=st.integers(-16, 16)))
    return quarters / 4, top_k


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@settings(max_examples=20)
@given(routing=routings(), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_route(
    scoring: str, renormalize: bool, routing: tuple[np.ndarray, int], dtype: str
) -> None:
    logits, top_k = routing
    options = {"top_k": top_k, "scoring": scoring, "renormalize": renormalize}
    experts, weights = route_jit(to_device(logits, dtype), **options)
    expected_experts, expected_weights = oracle(logits, top_k, scoring, renormalize)
    assert (experts.dtype, weights.dtype) == (jnp.int32, jnp.float32)
    np.testing.assert_array_equal(experts, expected_experts)
    # Exponential, sum and two divisions in float32, whose unit roundoff is 6e-8.
    np.testing.assert_allclose(np.asarray(weights, np.float64), expected_weights, rtol=2e-6)


#: Groups, experts and top_k: also groups of no power of 2, and all groups.
GROUPS = [
    (ExpertGroups(4, 2, 2), 8, 3),
    (ExpertGroups(3, 1, 1), 15, 4),
    (ExpertGroups(8, 4, 1), 16, 6),
    (ExpertGroups(2, 2, 2), 6, 5),
]


@pytest.mark.parametrize(("groups", "num_experts", "top_k"), GROUPS)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
def test_groups_and_correction_bias(
    groups: ExpertGroups, num_experts: int, top_k: int, scoring: str, biased: bool
) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, num_experts)).astype(np.float32).astype(np.float64)
    # About as large as the scores' differences, and some scores become negative.
    bias = rng.normal(scale=0.3, size=num_experts).astype(np.float32).astype(np.float64)
    experts, weights = route_jit(
        jnp.asarray(logits, jnp.float32),
        top_k=top_k,
        scoring=scoring,
        renormalize=scoring == "sigmoid",
        correction_bias=jnp.asarray(bias, jnp.float32) if biased else None,
        groups=groups,
    )
    expected_experts, expected_weights = oracle(
        logits, top_k, scoring, scoring == "sigmoid", bias if biased else None, groups
    )
    np.testing.assert_array_equal(experts, expected_experts)
    # As in test_route.
    np.testing.assert_allclose(np.asarray(weights, np.float64), expected_weights, rtol=2e-6)
    # Groups and bias matter, or this test says nothing.
    free, _ = oracle(logits, top_k, scoring, scoring == "sigmoid")
    if groups.chosen < groups.count or biased:
        assert (np.sort(free) != np.sort(expected_experts)).any()


def test_equal_groups_prefer_the_lower_index() -> None:
    logits = jnp.array([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0]])
    experts, _ = route_jit(logits, top_k=3, scoring="sigmoid", groups=ExpertGroups(3, 2, 2))
    assert experts.tolist() == [[1, 2, 0]]


def test_sigmoids_that_all_underflow_give_zeros() -> None:
    logits = jnp.full((1, 4), -200.0)
    _, weights = route_jit(logits, top_k=2, scoring="sigmoid", renormalize=True)
    assert weights.tolist() == [[0.0, 0.0]]


def test_order_of_random_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(33, 6)).astype(np.float32)
    experts, weights = route_jit(jnp.asarray(logits), top_k=3, scoring="softmax", renormalize=True)
    np.testing.assert_array_equal(experts, oracle(logits.astype(np.float64), 3, "softmax", True)[0])
    assert (np.diff(weights, axis=1) <= 0).all()


@pytest.mark.parametrize(
    ("scoring", "logits", "expected"),
    [
        ("softmax", [0.0, 0.0, 0.0, 0.0], [0, 1, 2]),
        ("softmax", [-300.0, -200.0, 0.0, -250.0], [2, 0, 1]),  # three scores underflow to 0
        ("sigmoid", [40.0, 50.0, 60.0, 0.0], [0, 1, 2]),  # three scores are rounded to 1
    ],
)
def test_equal_scores_prefer_the_lower_index(
    scoring: str, logits: list[float], expected: list[int]
) -> None:
    experts, _ = route_jit(jnp.asarray([logits]), top_k=3, scoring=scoring)
    assert experts.tolist() == [expected]


@pytest.mark.parametrize("top_k", [-1, 0, 7])
def test_a_wrong_top_k_raises(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k}, but there are 6 experts"):
        route(jnp.zeros((2, 6)), top_k=top_k)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (ExpertGroups(4, 1), "6 experts cannot be divided into 4 groups"),
        (ExpertGroups(0, 1), "6 experts cannot be divided into 0 groups"),
        (ExpertGroups(3, 4), "4 groups cannot be chosen of 3"),
        (ExpertGroups(3, 0), "0 groups cannot be chosen of 3"),
        (ExpertGroups(3, 2, 3), "3 best scores cannot be taken of groups of 2"),
        (ExpertGroups(3, 1), "top_k is 3, but 1 groups have too few experts"),
    ],
)
def test_groups_that_do_not_fit_raise(groups: ExpertGroups, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(jnp.zeros((2, 6)), top_k=3, groups=groups)
