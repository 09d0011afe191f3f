"""How far two traces of the same prompts are apart."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moelora_jax.engine.trace import Trace


@dataclass(frozen=True)
class LayerErrors:
    """Differences in one MoE layer, over all tokens of all rows.

    Inputs, router logits and outputs are compared by the largest difference of two numbers, divided
    by the largest number of the reference.

    Attributes:
        layer: the model's layer index.
        moe_input: relative.
        router_logits: relative.
        equal_choices: share of the reference's choices of an expert that were made here, too.
        weights: largest absolute difference of the weights of experts that both chose.
        moe_output: relative.
    """

    layer: int
    moe_input: float
    router_logits: float
    equal_choices: float
    weights: float
    moe_output: float


@dataclass(frozen=True)
class AdapterErrors:
    """Differences of what comes out of the model, over the rows of one adapter or over all.

    Attributes:
        adapter: its name; None for the base model.
        rows: prompts.
        tokens: tokens in them.
        hidden: largest difference of the final hidden states, divided by their largest number.
        logits: largest absolute difference of two logits.
        largest_logit: absolute, of the reference.
        log_probabilities: ``0.5 · mean(Δ log p²)`` over the prompt tokens that follow another one,
            in nats squared; 0 where there is none.
    """

    adapter: str | None
    rows: int
    tokens: int
    hidden: float
    logits: float
    largest_logit: float
    log_probabilities: float


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        layers: by MoE layer, in order.
        adapters: by adapter, in order of their first rows.
        total: over all rows; its ``adapter`` is None.
    """

    layers: tuple[LayerErrors, ...]
    adapters: tuple[AdapterErrors, ...]
    total: AdapterErrors


@dataclass(frozen=True)
class GreedyTokens:
    """The best token of each position, and how far it is ahead of the second best.

    Attributes:
        tokens: of the largest logits.
        margins: differences of the two largest logits.
    """

    tokens: tuple[int, ...]
    margins: tuple[float, ...]

    @classmethod
    def of(cls, logits: np.ndarray) -> "GreedyTokens":
        """Of logits ``[positions, vocabulary]``."""
        second, best = np.partition(logits, -2, axis=-1)[:, -2:].T
        return cls(tuple(logits.argmax(-1).tolist()), tuple((best - second).tolist()))


@dataclass(frozen=True)
class Agreement:
    """How often the best tokens of two implementations are the same.

    Attributes:
        decided: positions at which the reference's margin exceeds the noise.
        different: those of them at which the tokens differ.
    """

    decided: int
    different: int


def logit_noise(traces: Sequence[Trace], references: Sequence[Trace]) -> float:
    """What a dtype does to logits: at 99 of 100 positions all errors are at most this.

    Not the largest one of all, because at a few positions rounding makes a token choose another
    expert.

    Args:
        traces: of an implementation in the dtype.
        references: of the same one in a finer dtype.
    """
    largest = [
        np.abs(trace.logits - reference.logits).max(axis=-1)
        for trace, reference in zip(traces, references, strict=True)
    ]
    return float(np.quantile(np.concatenate(largest), 0.99))


def count_agreement(
    rows: Iterable[tuple[Sequence[int], GreedyTokens]], noise: float, *, generated: bool
) -> Agreement:
    """Compare best tokens with those of a reference.

    Args:
        rows: tokens of one implementation, and of the reference.
        noise: a smaller margin decides nothing.
        generated: whether each token follows those before it, so that nothing can be compared
            behind the first difference of a row.
    """
    decided = different = 0
    for tokens, reference in rows:
        for token, expected, margin in zip(
            tokens, reference.tokens, reference.margins, strict=True
        ):
            decided += margin > noise
            different += margin > noise and token != expected
            if generated and token != expected:
                break
    return Agreement(decided, different)


def compare(traces: Sequence[Trace], references: Sequence[Trace]) -> Comparison:
    """Compare traces of the same prompts, row by row.

    Args:
        traces: of one implementation.
        references: of the other, which is taken to be right.

    Raises:
        ValueError: the rows are not of the same prompts, adapters and layers.
    """
    for trace, reference in zip(traces, references, strict=True):
        for name in ("tokens", "adapter", "moe_layers"):
            ours, theirs = getattr(trace, name), getattr(reference, name)
            if ours != theirs:
                raise ValueError(f"{name} of a row are {ours}, but {theirs} in the reference")
    pairs = list(zip(traces, references, strict=True))
    names = dict.fromkeys(trace.adapter for trace in traces)
    return Comparison(
        layers=tuple(
            _layer_errors(index, layer, pairs) for index, layer in enumerate(traces[0].moe_layers)
        ),
        adapters=tuple(
            _output_errors(name, [pair for pair in pairs if pair[0].adapter == name])
            for name in names
        ),
        total=_output_errors(None, pairs),
    )


_Pairs = Sequence[tuple[Trace, Trace]]


def _layer_errors(index: int, layer: int, pairs: _Pairs) -> LayerErrors:
    def of_layer(name: str) -> tuple[np.ndarray, np.ndarray]:
        return (
            np.concatenate([getattr(trace, name)[index] for trace, _ in pairs]),
            np.concatenate([getattr(reference, name)[index] for _, reference in pairs]),
        )

    num_experts = pairs[0][0].router_logits.shape[-1]
    (experts, their_experts), (weights, their_weights) = of_layer("experts"), of_layer("weights")
    ours = _by_expert(experts, weights, num_experts)
    theirs = _by_expert(their_experts, their_weights, num_experts)
    both = ~np.isnan(ours) & ~np.isnan(theirs)
    return LayerErrors(
        layer=layer,
        moe_input=_relative_error(*of_layer("moe_input")),
        router_logits=_relative_error(*of_layer("router_logits")),
        equal_choices=float(np.count_nonzero(both) / their_experts.size),
        weights=float(np.abs(ours - theirs)[both].max(initial=0.0)),
        moe_output=_relative_error(*of_layer("moe_output")),
    )


def _by_expert(experts: np.ndarray, weights: np.ndarray, num_experts: int) -> np.ndarray:
    """Weights ``[tokens, experts]``, NaN where an expert was not chosen; in no order."""
    dense = np.full((len(experts), num_experts), np.nan, np.float32)
    np.put_along_axis(dense, experts, weights, axis=1)
    return dense


def _output_errors(adapter: str | None, pairs: _Pairs) -> AdapterErrors:
    logits = [np.abs(trace.logits - reference.logits).max() for trace, reference in pairs]
    largest = [np.abs(reference.logits).max() for _, reference in pairs]
    changes = np.concatenate(
        [log_probabilities(trace) - log_probabilities(reference) for trace, reference in pairs]
    )
    return AdapterErrors(
        adapter=adapter,
        rows=len(pairs),
        tokens=sum(len(trace.tokens) for trace, _ in pairs),
        hidden=max(_relative_error(t.hidden, r.hidden) for t, r in pairs),
        logits=float(max(logits)),
        largest_logit=float(max(largest)),
        log_probabilities=float(0.5 * np.mean(changes**2)) if changes.size else 0.0,
    )


def log_probabilities(trace: Trace) -> np.ndarray:
    """Of each prompt token but the first, given those before it: float64 ``[tokens - 1]``."""
    logits = trace.logits[:-1].astype(np.float64)
    highest = logits.max(axis=-1, keepdims=True)
    log_sums = highest[:, 0] + np.log(np.exp(logits - highest).sum(axis=-1))
    chosen: np.ndarray = logits[np.arange(len(logits)), list(trace.tokens[1:])]
    return chosen - log_sums


def _relative_error(values: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(values - reference).max() / np.abs(reference).max())
