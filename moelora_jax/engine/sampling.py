"""Choosing the next token on the device."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int32

from moelora_jax.errors import RequestError

#: Most probable tokens whose log-probabilities a request may ask for.
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: sample among this many most probable tokens; 0 means all.
        top_p: sample among the most probable tokens that together have this probability, at least
            one; applied after ``top_k``.
        seed: the same seed, prompt and adapter give the same tokens, whatever else is in the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature must be 0 or positive, not {self.temperature}")
        if self.top_k < 0:
            raise RequestError(f"top_k must be 0 or positive, not {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.seed < 2**31:
            raise RequestError(f"seed must be between 0 and 2**31 - 1, not {self.seed}")


class Sampled(NamedTuple):
    """What a step returns for each row of its bucket.

    The three below the tokens are zeros unless a row of the step asked for log-probabilities.

    Attributes:
        tokens: int32 ``[rows]``, the chosen tokens.
        logprobs: float32 ``[rows]``, their log-probabilities.
        top_tokens: int32 ``[rows, n]``, the most probable tokens, best first; n is
            ``MAX_LOGPROBS``, or the vocabulary where that is smaller.
        top_logprobs: float32 ``[rows, n]``.
    """

    tokens: Array
    logprobs: Array
    top_tokens: Array
    top_logprobs: Array


def log_probabilities(
    logits: Float[Array, "rows vocab"], tokens: Int32[Array, " rows"], wanted: Int32[Array, ""]
) -> Sampled:
    """The chosen tokens with their log-probabilities and those of the most probable ones.

    Args:
        logits: float32 scores, before temperature, top-k and top-p.
        tokens: the chosen tokens.
        wanted: 0 if no row needs them; the vocabulary is then not sorted.
    """
    rows, most = tokens.shape[0], min(MAX_LOGPROBS, logits.shape[1])

    def compute() -> Sampled:
        scores = jax.nn.log_softmax(logits)
        top, which = lax.top_k(scores, most)
        chosen = jnp.take_along_axis(scores, tokens[:, None], axis=1)[:, 0]
        return Sampled(tokens, chosen, which.astype(jnp.int32), top)

    def skip() -> Sampled:
        return Sampled(
            tokens,
            jnp.zeros(rows, jnp.float32),
            jnp.zeros((rows, most), jnp.int32),
            jnp.zeros((rows, most), jnp.float32),
        )

    return lax.cond(wanted > 0, compute, skip)


def sample(
    logits: Float[Array, "rows vocab"],
    temperature: Float[Array, " rows"],
    top_k: Int32[Array, " rows"],
    top_p: Float[Array, " rows"],
    seed: Int32[Array, " rows"],
    position: Int32[Array, " rows"],
) -> Int32[Array, " rows"]:
    """Choose a token for every row.

    Args:
        logits: float32 scores.
        temperature: 0 for greedy rows.
        top_k: 0 for all tokens.
        top_p: probability mass that is kept.
        seed: per row; folded with ``position``, so that a draw does not depend on the batch.
        position: position of the row's last token in its sequence.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        drawn = jax.vmap(_draw)(logits, temperature, top_k, top_p, seed, position)
        return jnp.where(temperature > 0, drawn, greedy)

    # Sorting the vocabulary is skipped while all rows are greedy.
    return lax.cond(jnp.any(temperature > 0), draw, lambda: greedy)


def _draw(
    logits: Array, temperature: Array, top_k: Array, top_p: Array, seed: Array, position: Array
) -> Array:
    tokens = jnp.argsort(-logits).astype(jnp.int32)
    scores = logits[tokens] / jnp.where(temperature > 0, temperature, 1.0)
    rank = jnp.arange(scores.shape[0], dtype=jnp.int32)
    scores = jnp.where((top_k == 0) | (rank < top_k), scores, -jnp.inf)
    probability = jax.nn.softmax(scores)
    more_probable = jnp.cumsum(probability) - probability
    scores = jnp.where((rank == 0) | (more_probable < top_p), scores, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(seed), position)
    return tokens[jax.random.categorical(key, scores)]
