"""From a plan to the arrays of a batch."""

import numpy as np

from moelora_jax.buckets import BatchLayout
from moelora_jax.config import BucketConfig, CacheConfig
from moelora_jax.engine.scheduler import Chunk, Plan
from moelora_jax.engine.sequence import Sequence


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
        self._temperature = np.zeros(seats, np.float32)
        self._top_k = np.zeros(seats, np.int32)
        self._top_p = np.ones(seats, np.float32)
        self._seed = np.zeros(seats, np.int32)

    def pack(self, layout: BatchLayout, plan: Plan) -> np.ndarray:
        """The batch of a plan as one int32 vector, in the layout of its program."""
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
        batch.temperature[:rows] = self._temperature[seats]
        batch.top_k[:rows] = self._top_k[seats]
        batch.top_p[:rows] = self._top_p[seats]
        batch.seed[:rows] = self._seed[seats]
        samples = np.array([chunk.samples for chunk in chunks])
        batch.seat[:rows][samples] = seats[samples]
        batch.logprobs[...] = wants_logprobs(plan)
        return packed

    def _update(self, sequence: Sequence) -> None:
        """Tell the seat of a sequence all if it is new there, else what blocks were added."""
        seat, blocks = sequence.seat, sequence.blocks
        if self._blocks_of_seat[seat] is not blocks:  # Each admission makes a new list.
            self._blocks_of_seat[seat], self._num_blocks[seat] = blocks, 0
            sampling = sequence.sampling
            self._temperature[seat] = sampling.temperature
            self._top_k[seat] = sampling.top_k
            self._top_p[seat] = sampling.top_p
            self._seed[seat] = sampling.seed
        known = self._num_blocks[seat]
        if known < len(blocks):
            self._block_table[seat, known : len(blocks)] = blocks[known:]
            self._num_blocks[seat] = len(blocks)


def wants_logprobs(plan: Plan) -> bool:
    """Whether any sequence that samples in this step wants log-probabilities."""
    return any(chunk.samples and chunk.sequence.num_logprobs is not None for chunk in plan.chunks)


def _tokens(chunk: Chunk) -> list[int]:
    """The tokens of a chunk; one that is in flight is named by its seat."""
    sequence, start = chunk.sequence, chunk.start
    if start == len(sequence.tokens):
        return [-1 - sequence.seat]
    return sequence.tokens[start : start + chunk.num_tokens]
