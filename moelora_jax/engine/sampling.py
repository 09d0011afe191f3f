"""Choosing the next token on the device.

The order is vLLM's: logits are adjusted (:mod:`~moelora_jax.engine.adjusting`), divided by the
temperature, and cut by min-p, top-k and top-p, one after the other.

Nothing here sorts the vocabulary. XLA gives a sort of that size to a library whose launches cannot
be part of a command buffer, and the host would then wait in the middle of each step to learn which
branch of a conditional to launch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int32, UInt32

from moelora_jax.errors import RequestError
from moelora_jax.workspace import MAX_BIASES

#: Most probable tokens whose log-probabilities a request may ask for.
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    The most probable token, too, is chosen after penalties and biases.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: sample among this many most probable tokens, and those as probable as the last of
            them; 0 means all.
        top_p: sample among the fewest most probable tokens that together have this probability, and
            those as probable as the last of them; applied after ``top_k``.
        min_p: sample among tokens with at least this share of the greatest probability; applied
            before ``top_k``.
        seed: the same seed, prompt and adapter give the same tokens, whatever else is in the batch.
        frequency_penalty: is taken from the logit of a token for each time that it was generated.
        presence_penalty: is taken from the logit of a token once it was generated.
        repetition_penalty: divides the logits of tokens of the prompt and of generated ones where
            they are positive, and multiplies them where they are not.
        logit_bias: what is added to the logits of tokens, by token id.
        min_tokens: until so many tokens were generated, stop tokens are not.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature must be 0 or positive, not {self.temperature}")
        if self.top_k < 0:
            raise RequestError(f"top_k must be 0 or positive, not {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0.0 <= self.min_p <= 1.0:
            raise RequestError(f"min_p must be between 0 and 1, not {self.min_p}")
        if not 0 <= self.seed < 2**31:
            raise RequestError(f"seed must be between 0 and 2**31 - 1, not {self.seed}")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2.0 <= (penalty := getattr(self, name)) <= 2.0:
                raise RequestError(f"{name} must be between -2 and 2, not {penalty}")
        if not 0.01 <= self.repetition_penalty <= 100.0:
            raise RequestError(
                f"repetition_penalty must be between 0.01 and 100, not {self.repetition_penalty}"
            )
        for token, bias in self.logit_bias.items():
            if not isinstance(token, Integral):
                raise RequestError(f"logit_bias is by token id; {token!r} is none")
            if not -100.0 <= bias <= 100.0:
                raise RequestError(
                    f"logit_bias of token {token} must be between -100 and 100, not {bias}"
                )
        if len(self.logit_bias) > MAX_BIASES:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} tokens; at most {MAX_BIASES} are possible"
            )
        if not isinstance(self.min_tokens, Integral) or self.min_tokens < 0:
            raise RequestError(f"min_tokens must be 0 or positive, not {self.min_tokens}")

    @property
    def has_penalties(self) -> bool:
        """Whether tokens so far change what is chosen next."""
        return (self.frequency_penalty, self.presence_penalty, self.repetition_penalty) != (0, 0, 1)


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
        logits: float32 scores, before they are adjusted, and before temperature and cuts.
        tokens: the chosen tokens.
        wanted: 0 if no row needs them; nothing is computed then.
    """
    rows, most = tokens.shape[0], min(MAX_LOGPROBS, logits.shape[1])

    def compute() -> Sampled:
        scores = jax.nn.log_softmax(logits)
        top, which = jax.vmap(lambda row: _most_probable(row, most))(scores)
        chosen = jnp.take_along_axis(scores, tokens[:, None], axis=1)[:, 0]
        return Sampled(tokens, chosen, which, top)

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
    min_p: Float[Array, " rows"],
    seed: Int32[Array, " rows"],
    position: Int32[Array, " rows"],
) -> Int32[Array, " rows"]:
    """Choose a token for every row.

    Args:
        logits: float32 scores.
        temperature: 0 for greedy rows.
        top_k: 0 for all tokens.
        top_p: probability mass that is kept.
        min_p: least share of the greatest probability; 0 keeps all tokens.
        seed: per row; folded with ``position``, so that a draw does not depend on the batch.
        position: position of the row's last token in its sequence.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        drawn = jax.vmap(_draw)(logits, greedy, temperature, top_k, top_p, min_p, seed, position)
        return jnp.where(temperature > 0, drawn, greedy)

    # Thresholds and noise are skipped while all rows are greedy.
    return lax.cond(jnp.any(temperature > 0), draw, lambda: greedy)


def _draw(
    logits: Array,
    best: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    seed: Array,
    position: Array,
) -> Array:
    """Sample one row among the tokens that min-p, top-k and top-p, in this order, leave it."""
    scores = logits / jnp.where(temperature > 0, temperature, 1.0)
    # A share of the greatest probability is a distance from the greatest score.
    scores = jnp.where(scores >= scores[best] + jnp.log(min_p), scores, -jnp.inf)
    # Without a limit no count is enough, and all tokens stay.
    count = jnp.where(top_k == 0, jnp.inf, top_k.astype(jnp.float32))
    scores = _keep_best(scores, jnp.ones_like(scores), count)
    scores = _keep_best(scores, jax.nn.softmax(scores), top_p)
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.categorical(key, scores).astype(jnp.int32)


def _keep_best(
    scores: Float[Array, " vocab"], weights: Float[Array, " vocab"], target: Float[Array, ""]
) -> Float[Array, " vocab"]:
    """The fewest best tokens that have ``target`` in weight, and those equal to the last of them.

    All stay if they have less. The scores of the others become -inf.
    """
    order = _order(scores)
    return jnp.where(order >= _threshold(order, weights, target), scores, -jnp.inf)


def _order(scores: Float[Array, " vocab"]) -> UInt32[Array, " vocab"]:
    """Integers in the order of the scores, from their bits."""
    bits = lax.bitcast_convert_type(scores, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _threshold(
    order: UInt32[Array, " vocab"], weights: Float[Array, " vocab"], target: Float[Array, ""]
) -> UInt32[Array, ""]:
    """The largest number that tokens of at least ``target`` in weight reach; 0 if all have less.

    It is found four bits at a time.
    """
    threshold = jnp.uint32(0)
    for shift in range(28, -1, -4):
        candidates = threshold + (jnp.arange(1, 16, dtype=jnp.uint32) << shift)
        # One sum of the same shape for each, so rounding keeps them in order.
        reached = jnp.sum(jnp.where(order >= candidates[:, None], weights, 0.0), axis=1) >= target
        threshold += jnp.sum(reached, dtype=jnp.uint32) << shift
    return threshold


def _most_probable(
    scores: Float[Array, " vocab"], count: int
) -> tuple[Float[Array, " count"], Int32[Array, " count"]]:
    """The largest scores and their tokens, the best first; of equal ones the first token first."""
    order, token = _order(scores), jnp.arange(scores.shape[0], dtype=jnp.int32)
    found = [jnp.argmax(order).astype(jnp.int32)]
    while len(found) < count:
        last = found[-1]
        # No number is 0 but that of a NaN, so what came before is never chosen again.
        comes_later = (order < order[last]) | ((order == order[last]) & (token > last))
        found.append(jnp.argmax(jnp.where(comes_later, order, 0)).astype(jnp.int32))
    tokens = jnp.stack(found)
    return scores[tokens], tokens
