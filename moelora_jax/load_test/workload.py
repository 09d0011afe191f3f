"""What is sent when: an open-loop load, planned in advance and the same for the same seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moelora_jax.errors import RequestError


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts.

    Attributes:
        kind: ``fixed``, ``uniform`` or ``lognormal``.
        low: the count itself; the smallest; or the median.
        high: the count itself; the largest; or the largest, to which longer ones are cut.
        sigma: of the logarithm, for ``lognormal``.
    """

    kind: str
    low: int
    high: int
    sigma: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """Reads ``128``, ``uniform:16,512`` or ``lognormal:MEDIAN,SIGMA,MAX``.

        Raises:
            RequestError: it is none of these.
        """
        kind, _, rest = text.rpartition(":")
        numbers = rest.split(",")
        try:
            match kind or "fixed", numbers:
                case "fixed", [count]:
                    lengths = cls("fixed", int(count), int(count))
                case "uniform", [low, high]:
                    lengths = cls("uniform", int(low), int(high))
                case "lognormal", [median, sigma, high]:
                    lengths = cls("lognormal", int(median), int(high), float(sigma))
                case _:
                    raise ValueError
        except ValueError:
            raise RequestError(
                f"{text!r} is no distribution of lengths: write 128, uniform:16,512 or "
                "lognormal:MEDIAN,SIGMA,MAX"
            ) from None
        if not 1 <= lengths.low <= lengths.high or not 0 <= lengths.sigma < 10:
            raise RequestError(f"{text!r}: lengths must be at least 1 and ascend")
        return lengths

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """``count`` lengths, int64."""
        if self.kind == "lognormal":
            drawn = rng.lognormal(np.log(self.low), self.sigma, count)
            return np.clip(np.rint(drawn), 1, self.high).astype(np.int64)
        return rng.integers(self.low, self.high, count, endpoint=True)


@dataclass(frozen=True)
class PlannedRequest:
    """A request of the load.

    Attributes:
        time: seconds after the beginning when it is sent, whatever became of those before.
        adapter: name, or None for the base model.
        prompt: token ids.
        output_tokens: to be generated.
    """

    time: float
    adapter: str | None
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True)
class Workload:
    """A load.

    Attributes:
        rate: requests per second on average; their gaps are exponential (Poisson arrivals).
        num_requests: how many.
        input_lengths: of prompts.
        output_lengths: of completions.
        zipf: the k-th of the adapters is chosen with a probability proportional to 1/k^zipf; 0
            chooses all alike.
        base_share: of the requests that go to the base model; all, if there are no adapters.
        seed: of everything.
    """

    rate: float
    num_requests: int
    input_lengths: Lengths
    output_lengths: Lengths
    zipf: float = 1.0
    base_share: float = 0.0
    seed: int = 0

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt and completion together."""
        return self.input_lengths.high + self.output_lengths.high

    def plan(self, adapters: Sequence[str], vocab_size: int) -> list[PlannedRequest]:
        """The requests in the order of their times.

        Args:
            adapters: the most popular first.
            vocab_size: token ids are below this.
        """
        rng = np.random.default_rng(self.seed)
        times = np.cumsum(rng.exponential(1 / self.rate, self.num_requests))
        inputs = self.input_lengths.draw(rng, self.num_requests)
        outputs = self.output_lengths.draw(rng, self.num_requests)
        base = rng.random(self.num_requests) < (self.base_share if adapters else 1.0)
        weights = 1.0 / np.arange(1, len(adapters) + 1) ** self.zipf
        chosen = rng.choice(
            max(1, len(adapters)),
            self.num_requests,
            p=weights / weights.sum() if adapters else None,
        )
        return [
            PlannedRequest(
                time=float(times[i]),
                adapter=None if base[i] else adapters[int(chosen[i])],
                prompt=tuple(rng.integers(vocab_size, size=int(inputs[i])).tolist()),
                output_tokens=int(outputs[i]),
            )
            for i in range(self.num_requests)
        ]
