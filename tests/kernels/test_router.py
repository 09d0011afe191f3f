"""Router top-k against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from moelora_kernels import route
from tests.kernels.cases import to_device

route_jit = jax.jit(route, static_argnames=("top_k", "scoring", "renormalize"))

#: Tokens, experts, top_k.
SHAPES = [(1, 6, 2), (7, 8, 8), (33, 6, 1)]


def oracle(
    logits: np.ndarray, top_k: int, scoring: str, renormalize: bool
) -> tuple[np.ndarray, np.ndarray]:
    tokens = len(logits)
    experts, weights = np.zeros((tokens, top_k), np.int32), np.zeros((tokens, top_k))
    for token in range(tokens):
        row = logits[token]
        if scoring == "softmax":
            scores = np.exp(row - row.max()) / np.sum(np.exp(row - row.max()))
        else:
            scores = 1 / (1 + np.exp(-row))
        experts[token] = sorted(range(len(row)), key=lambda e: (-scores[e], e))[:top_k]
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
