"""From a plan to the arrays of a batch."""

from typing import NamedTuple

import numpy as np

from moelora_jax.buckets import Batch, BatchLayout
from moelora_jax.config import BucketConfig, CacheConfig
from moelora_jax.engine.scheduler import Chunk, Plan
from moelora_jax.engine.sequence import Sequence
from moelora_jax.workspace import MAX_BIASES

#: Fields of a batch that are those of a row's :class:`~moelora_jax.engine.sampling.Sampling`:
#: always, and only where logits are adjusted.
_CHOICE = np.dtype(
    [(name, np.float32) for name in ("temperature", "top_p", "min_p")]
    + [(name, np.int32) for name in ("top_k", "seed")]
)
_PENALTIES = np.dtype(
    [(f"{name}_penalty", np.float32) for name in ("frequency", "presence", "repetition")]
)


class SeatBiases(NamedTuple):
    """New biases of a seat, as :meth:`~moelora_jax.engine.runner.Runner.write_biases` has them."""

    seat: int
    biases: np.ndarray


class Packer:
    """Fills in batches; what does not change from step to step is kept by seat.

    Args:
        buckets: shapes of the programs.
        cache: the KV cache.
    """

    def __init__(self, buckets: BucketConfig, cache: CacheConfig) -> None:
        seats = buckets.max_sequences
        self._blocks_of_seat: list[list[int] | None] = [None] * seats
        self._num_blocks = [0] * seats
        self._block_table = np.zeros((seats, cache.blocks_per_sequence), np.int32)
        self._choice = np.zeros(seats, _CHOICE)
        self._penalties = np.zeros(seats, _PENALTIES)
        self._has_penalties = np.zeros(seats, bool)
        self._adjusts = np.zeros(seats, bool)
        self._num_prompt = np.zeros(seats, np.int32)
        self._min_tokens = np.zeros(seats, np.int32)
        self._first_bias = np.full(seats, MAX_BIASES, np.int32)
        self._new_biases: list[SeatBiases] = []

    def new_biases(self) -> list[SeatBiases]:
        """What the device must be told before it runs the last batch; each is given once."""
        new, self._new_biases = self._new_biases, []
        return new

    def pack(self, layout: BatchLayout, plan: Plan) -> np.ndarray:
        """The batch of a plan as one int32 vector, in the layout of its program.

        It comes with :meth:`new_biases`.
        """
        packed, chunks = layout.padding(), plan.chunks
        batch = layout.unpack(packed)
        for chunk in chunks:
            self._update(chunk.sequence)
        rows, seats = len(chunks), np.array([chunk.sequence.seat for chunk in chunks])
        counts = np.array([chunk.num_tokens for chunk in chunks], np.int32)
        ends = np.cumsum(counts, dtype=np.int32)
        total = int(ends[-1])
        slots = [-1 if (v := chunk.sequence.version) is None else v.slot for chunk in chunks]

        batch.tokens[:total] = [token for chunk in chunks for token in _tokens(chunk)]
        starts = np.array([chunk.start for chunk in chunks], np.int32)
        offset = np.arange(total, dtype=np.int32) - np.repeat(ends - counts, counts)
        batch.positions[:total] = np.repeat(starts, counts) + offset
        batch.adapter_of_token[:total] = np.repeat(np.array(slots, np.int32), counts)
        batch.sequence_of_token[:total] = np.repeat(np.arange(rows, dtype=np.int32), counts)
        batch.query_counts[:rows] = counts
        batch.last_token[:rows] = ends - 1
        batch.block_table[:rows] = self._block_table[seats]
        batch.num_tokens[...] = total
        _fill(batch, self._choice[seats])
        samples = np.array([chunk.samples for chunk in chunks])
        batch.seat[:rows][samples] = seats[samples]
        batch.logprobs[...] = wants_logprobs(plan)
        if self._adjusts[seats].any():
            self._adjust(batch, seats, samples, starts + counts)
        return packed

    def _adjust(
        self, batch: Batch, seats: np.ndarray, samples: np.ndarray, ends: np.ndarray
    ) -> None:
        """Fill in how logits are adjusted, as some rows may want it.

        Args:
            batch: to be filled in.
            seats: of its rows.
            samples: which rows sample a token.
            ends: position of that token.
        """
        _fill(batch, self._penalties[seats])
        batch.num_prompt[: len(seats)] = num_prompt = self._num_prompt[seats]
        is_early = ends - num_prompt < self._min_tokens[seats]
        batch.first_bias[: len(seats)] = first = np.where(is_early, 0, self._first_bias[seats])
        adjusts = self._has_penalties[seats] | (first < MAX_BIASES)
        batch.adjusts[...] = np.any(adjusts & samples)

    def _update(self, sequence: Sequence) -> None:
        """Tell the seat of a sequence all if it is new there, else what blocks were added."""
        seat, blocks = sequence.seat, sequence.blocks
        if self._blocks_of_seat[seat] is not blocks:  # Each admission makes a new list.
            self._blocks_of_seat[seat], self._num_blocks[seat] = blocks, 0
            self._seat(sequence)
        known = self._num_blocks[seat]
        if known < len(blocks):
            self._block_table[seat, known : len(blocks)] = blocks[known:]
            self._num_blocks[seat] = len(blocks)

    def _seat(self, sequence: Sequence) -> None:
        """Tell the seat of a sequence how its tokens are chosen."""
        seat, sampling = sequence.seat, sequence.sampling
        self._choice[seat] = tuple(getattr(sampling, name) for name in _CHOICE.names or ())
        self._penalties[seat] = tuple(getattr(sampling, name) for name in _PENALTIES.names or ())
        self._num_prompt[seat] = sequence.num_prompt
        stops = sorted(sequence.stop_tokens) if sampling.min_tokens else []
        biases = sampling.logit_bias
        self._min_tokens[seat] = sampling.min_tokens if stops else 0
        self._first_bias[seat] = len(stops) if biases else MAX_BIASES
        self._has_penalties[seat] = sampling.has_penalties
        self._adjusts[seat] = bool(sampling.has_penalties or biases or stops)
        if biases or stops:  # Others do not look at what the seat has.
            tokens = [*stops, *biases]
            added = np.array([-np.inf] * len(stops) + [*biases.values()], np.float32)
            table = np.full((2, MAX_BIASES), np.iinfo(np.int32).max, np.int32)  # No token.
            table[:, : len(tokens)] = tokens, added.view(np.int32)
            self._new_biases.append(SeatBiases(seat, table))


def _fill(batch: Batch, options: np.ndarray) -> None:
    """Copy the fields of a structured array, one entry for each row, to those of a batch."""
    for name in options.dtype.names or ():
        getattr(batch, name)[: len(options)] = options[name]


def wants_logprobs(plan: Plan) -> bool:
    """Whether any sequence that samples in this step wants log-probabilities."""
    return any(chunk.samples and chunk.sequence.num_logprobs is not None for chunk in plan.chunks)


def _tokens(chunk: Chunk) -> list[int]:
    """The tokens of a chunk; one that is in flight is named by its seat."""
    sequence, start = chunk.sequence, chunk.start
    if start == len(sequence.tokens):
        return [-1 - sequence.seat]
    return sequence.tokens[start : start + chunk.num_tokens]
