"""What a load has shown, as numbers and as a picture."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moelora_jax.errors import MissingPackageError, MoeLoraError
from moelora_jax.load_test.runner import Outcome

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Goal:
    """A service level: what a request must keep, in seconds; None for whatever.

    Attributes:
        time_to_first_token: at most.
        time_per_token: mean of the tokens after the first, at most.
    """

    time_to_first_token: float | None = None
    time_per_token: float | None = None

    def kept_by(self, outcome: Outcome) -> bool:
        """Whether a request finished and kept it."""
        if outcome.error is not None:
            return False
        first, each = self.time_to_first_token, self.time_per_token
        return (first is None or outcome.time_to_first_token <= first) and (
            each is None or outcome.time_per_token <= each
        )


def summarize(outcomes: Sequence[Outcome], goal: Goal) -> dict[str, Any]:
    """The results as JSON values; times in seconds.

    Args:
        outcomes: of all requests, failed ones included; at least one.
        goal: that they should keep.
    """
    finished = [outcome for outcome in outcomes if outcome.error is None]
    ends = [outcome.token_times[-1] for outcome in outcomes if outcome.token_times]
    duration = max(ends, default=0.0)
    kept = sum(map(goal.kept_by, outcomes))

    def per_second(count: int) -> float:
        return count / duration if duration else 0.0

    return {
        "requests": len(outcomes),
        "finished": len(finished),
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error)),
        "duration": duration,
        "offered_requests_per_second": len(outcomes) / outcomes[-1].planned.time,
        "finished_requests_per_second": per_second(len(finished)),
        "input_tokens_per_second": per_second(sum(len(o.planned.prompt) for o in finished)),
        "output_tokens_per_second": per_second(sum(o.num_tokens for o in finished)),
        # Above 1, the times of a server's tokens are those of some of them.
        "tokens_per_event": _mean_tokens(finished),
        "time_to_first_token": _statistics([o.time_to_first_token for o in finished]),
        "inter_token_latency": _statistics(
            [latency for o in finished for latency in o.inter_token_latencies]
        ),
        "time_per_token": _statistics(
            [o.time_per_token for o in finished if len(o.token_times) > 1]
        ),
        "request_duration": _statistics([o.duration for o in finished]),
        "goal": asdict(goal),
        "goal_kept": kept / len(outcomes),
        "goal_kept_requests_per_second": per_second(kept),
        # An open-loop client that falls behind measures itself.
        "largest_delay_of_client": max(o.sent - o.planned.time for o in outcomes),
        "requests_by_adapter": {
            name or "": count
            for name, count in Counter(o.planned.adapter for o in outcomes).most_common()
        },
    }


def _mean_tokens(finished: Sequence[Outcome]) -> float | None:
    events = sum(len(outcome.token_times) for outcome in finished)
    return sum(outcome.num_tokens for outcome in finished) / events if events else None


def _statistics(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    percentiles = np.percentile(values, PERCENTILES)
    return {
        "mean": float(np.mean(values)),
        **{f"p{p}": float(v) for p, v in zip(PERCENTILES, percentiles, strict=True)},
        "max": float(np.max(values)),
    }


def check_plot(path: Path) -> None:
    """See now, and not when the load has run, that :func:`plot` can draw a file.

    Raises:
        MissingPackageError: matplotlib is not installed.
        MoeLoraError: matplotlib does not know the format.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as cause:
        raise MissingPackageError(f"{cause}; plots need it", "bench") from cause

    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        endings = ", ".join(f".{name}" for name in formats)
        raise MoeLoraError(f"{path}: a plot's name must end in one of {endings}")


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw the distributions of both latencies, and tokens per second over time.

    Args:
        outcomes: of all requests.
        path: where to; its ending tells the format, such as ``.png`` or ``.svg``.

    Raises:
        MissingPackageError: matplotlib is not installed.
        MoeLoraError: matplotlib does not know the format.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    finished = [outcome for outcome in outcomes if outcome.error is None]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    first, between, rate = figure.subplots(1, 3)
    for axes, title, values in (
        (first, "time to first token", [o.time_to_first_token for o in finished]),
        (between, "inter-token latency", [x for o in finished for x in o.inter_token_latencies]),
    ):
        axes.ecdf(np.asarray(values or [0.0]) * 1000)
        axes.set(
            title=title, xlabel="ms", ylabel="share of all", xscale="log" if values else "linear"
        )
    times = [time for outcome in outcomes for time in outcome.token_times]
    seconds = np.arange(int(max(times, default=0.0)) + 2)
    rate.stairs(np.histogram(times, seconds)[0], seconds)
    rate.set(title="output", xlabel="s", ylabel="tokens/s")
    for axes in (first, between, rate):
        axes.grid(alpha=0.3)
    figure.savefig(path)
