"""Sampling on the device, against distributions computed in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from moelora_jax import RequestError, Sampling
from moelora_jax.engine.sampling import (
    _most_probable,
    _order,
    _threshold,
    log_probabilities,
    sample,
)

DRAWS = 4000
run = jax.jit(sample)


def draw(
    logits: list[float],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> np.ndarray:
    """Relative frequency of each token over many seeds."""
    tokens = run(
        jnp.tile(jnp.asarray(logits, jnp.float32), (DRAWS, 1)),
        jnp.full(DRAWS, temperature, jnp.float32),
        jnp.full(DRAWS, top_k, jnp.int32),
        jnp.full(DRAWS, top_p, jnp.float32),
        jnp.full(DRAWS, min_p, jnp.float32),
        jnp.arange(DRAWS, dtype=jnp.int32),
        jnp.full(DRAWS, 5, jnp.int32),
    )
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / DRAWS


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max())
    return weights / weights.sum()


LOGITS = [0.5, 2.0, -1.0, 1.5, 0.0]
# Four standard deviations of a frequency of one half.
NOISE = 4 * 0.5 / np.sqrt(DRAWS)


def test_frequencies_follow_the_temperature() -> None:
    for temperature in (0.5, 1.0, 3.0):
        expected = softmax(np.array(LOGITS) / temperature)
        np.testing.assert_allclose(draw(LOGITS, temperature=temperature), expected, atol=NOISE)


def test_top_k_keeps_the_most_probable() -> None:
    expected = np.where(np.isin(np.arange(5), (1, 3)), softmax(np.array(LOGITS)), 0)
    actual = draw(LOGITS, temperature=1.0, top_k=2)
    np.testing.assert_allclose(actual, expected / expected.sum(), atol=NOISE)
    assert draw(LOGITS, temperature=1.0, top_k=1)[1] == 1.0
    assert (draw(LOGITS, temperature=5.0, top_k=99) > 0).all()


def test_top_p_keeps_the_fewest_tokens_that_have_the_mass() -> None:
    probability = softmax(np.array(LOGITS))
    assert probability[1] < 0.6 < probability[1] + probability[3]
    actual = draw(LOGITS, temperature=1.0, top_p=0.6)
    expected = np.where(np.isin(np.arange(5), (1, 3)), probability, 0)
    np.testing.assert_allclose(actual, expected / expected.sum(), atol=NOISE)
    assert draw(LOGITS, temperature=1.0, top_p=1e-6)[1] == 1.0


def test_top_p_applies_to_what_top_k_left() -> None:
    # Of the two tokens that top_k leaves, the first alone has more than half.
    actual = draw(LOGITS, temperature=1.0, top_k=2, top_p=0.55)
    assert actual[1] == 1.0


def test_min_p_keeps_a_share_of_the_greatest_probability() -> None:
    """After the temperature, and before top-k counts what is left."""
    probability = softmax(np.array(LOGITS) / 2)
    kept = probability >= 0.4 * probability.max()
    assert kept.tolist() == [True, True, False, True, False]
    actual = draw(LOGITS, temperature=2.0, min_p=0.4)
    expected = np.where(kept, probability, 0)
    np.testing.assert_allclose(actual, expected / expected.sum(), atol=NOISE)
    assert draw(LOGITS, temperature=2.0, min_p=1.0)[1] == 1.0


def test_greedy_rows_beside_sampled_ones() -> None:
    logits = jnp.asarray([LOGITS, LOGITS], jnp.float32)
    for seed in range(20):
        tokens = run(
            logits,
            jnp.asarray([0.0, 9.0], jnp.float32),
            jnp.zeros(2, jnp.int32),
            jnp.ones(2, jnp.float32),
            jnp.zeros(2, jnp.float32),
            jnp.full(2, seed, jnp.int32),
            jnp.zeros(2, jnp.int32),
        )
        assert tokens[0] == 1


FINITE = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
SCORES = npst.arrays(np.float32, 37, elements=FINITE | st.just(-np.inf))


@given(SCORES, st.integers(1, 40))
def test_the_threshold_of_a_count(scores: np.ndarray, count: int) -> None:
    order = np.asarray(_order(jnp.asarray(scores)))
    threshold = jax.jit(_threshold)(order, np.ones(37, np.float32), np.float32(count))
    expected = np.sort(order)[-count] if count <= 37 else 0
    assert threshold == expected
    # Sorted by these integers is sorted by score.
    in_order = scores[np.argsort(order, kind="stable")]
    assert (in_order[1:] >= in_order[:-1]).all()


@given(SCORES, npst.arrays(np.int32, 37, elements=st.integers(0, 9)), st.integers(1, 400))
def test_the_threshold_of_a_weight(scores: np.ndarray, weights: np.ndarray, target: int) -> None:
    # Sums of small integers are exact.
    order = np.asarray(_order(jnp.asarray(scores)))
    threshold = jax.jit(_threshold)(order, weights.astype(np.float32), np.float32(target))
    reached = [v for v in order if weights[order >= v].sum() >= target]
    if not reached:
        assert (order >= threshold).all()
    else:
        assert (order[order >= threshold] >= max(reached)).all()
        assert weights[order >= threshold].sum() >= target


@given(SCORES, st.integers(1, 37))
def test_the_most_probable_tokens(scores: np.ndarray, count: int) -> None:
    values, tokens = _most_probable(jnp.asarray(scores), count)
    expected = np.lexsort((np.arange(37), -scores.astype(np.float64)))[:count]
    # The order of the bits tells 0 from -0, which are equal numbers.
    np.testing.assert_array_equal(np.asarray(values), scores[expected])
    assert len(set(np.asarray(tokens).tolist())) == count


def test_equally_probable_tokens_stay_together() -> None:
    frequencies = draw([2.0, 1.0, 1.0, 0.0], temperature=1.0, top_k=2)
    assert (frequencies[:3] > 0).all() and frequencies[3] == 0


def test_log_probabilities_of_a_wide_vocabulary() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 5000)).astype(np.float32)
    chosen = jnp.asarray([4, 0, 4999], jnp.int32)
    out = jax.jit(log_probabilities)(logits, chosen, jnp.int32(1))
    expected = np.log([softmax(row.astype(np.float64)) for row in logits])
    # Float32 rounds numbers of about 10, the normaliser, to 1e-6.
    np.testing.assert_allclose(out.logprobs, expected[np.arange(3), chosen], atol=5e-6)
    best = np.argsort(-expected, axis=1)[:, :20]
    np.testing.assert_array_equal(out.top_tokens, best)
    np.testing.assert_allclose(out.top_logprobs, np.take_along_axis(expected, best, 1), atol=5e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"logit_bias": {3: 101.0}}, "logit_bias of token 3"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias of token 3"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "at most 300"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Sampling(**options)  # type: ignore[arg-type]
