"""A request on its way through the engine."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from moelora_jax.adapters.registry import AdapterVersion
from moelora_jax.engine.sampling import Sampling
from moelora_jax.errors import MoeLoraError

EndReason = Literal["stop", "length", "scored", "cancelled", "timeout", "error"]


@dataclass(eq=False, slots=True)
class Sequence:
    """A request on its way through the engine; validated by whoever makes it.

    Attributes:
        tokens: token ids, prompt first; generated ones are appended as they become known.
        num_prompt: how many of them are the prompt.
        adapter: name of a loaded adapter, or None for the base model.
        max_new_tokens: when to stop generating; 0 scores the prompt instead.
        sampling: how tokens are chosen.
        stop_tokens: ids that end the sequence; the stop token is kept.
        num_logprobs: as in :class:`~moelora_jax.engine.requests.Request`.
        priority: higher goes first.
        deadline: when to give up, in the scheduler's time; None for never.
        logits: of a scored prompt, float32 ``[tokens, vocab]`` parts.
        end_reason: None until the sequence has ended.
        error: why it failed, if it did.
        arrival: its number; lower is older.
        version: the weights that it runs with, from its first step to its end.
        seat: where the device keeps its last token while it runs.
        blocks: its cache blocks, in order.
        keys: of its leading full blocks, as far as they were needed.
        keys_weights: number of the version that the keys are for, 0 for the base model.
        num_remembered: leading blocks that others can find.
        num_computed: tokens whose keys and values are in the cache, or will be after the steps that
            were planned so far.
        num_in_flight: sampled tokens that are not known yet.
    """

    tokens: list[int]
    num_prompt: int
    adapter: str | None
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    num_logprobs: int | None = None
    priority: int = 0
    deadline: float | None = None

    logits: list[np.ndarray] = field(default_factory=list)
    end_reason: EndReason | None = None
    error: MoeLoraError | None = None
    arrival: int = -1
    version: AdapterVersion | None = None
    seat: int = -1
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    keys_weights: int = -1
    num_remembered: int = 0
    num_computed: int = 0
    num_in_flight: int = 0

    @property
    def generated(self) -> list[int]:
        """Tokens chosen so far."""
        return self.tokens[self.num_prompt :]

    @property
    def scores(self) -> bool:
        return self.max_new_tokens == 0

    @property
    def num_pending(self) -> int:
        """Tokens that exist, known or in flight, and were not planned to be computed."""
        return len(self.tokens) + self.num_in_flight - self.num_computed

    @property
    def is_sampled_out(self) -> bool:
        """Whether all tokens that it may generate are known or in flight."""
        return len(self.tokens) + self.num_in_flight >= self.num_prompt + self.max_new_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts sequences: those that go first come first."""
        return -self.priority, self.arrival
