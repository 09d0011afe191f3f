"""Continuous batching: sequences wait, run their prompt in chunks, then decode, and finish."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from moelora_jax.buckets import Batch, Kind, ProgramKey, choose_bucket
from moelora_jax.engine.runner import Runner
from moelora_jax.engine.sampling import Sampling
from moelora_jax.errors import CapacityError

FinishReason = Literal["length", "stop", "scored"]


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine.

    Attributes:
        prompt: token ids.
        adapter: name of a loaded adapter, or None for the base model.
        max_new_tokens: when to stop generating; 0 scores the prompt instead.
        sampling: how tokens are chosen.
        stop_tokens: ids that end the sequence; the stop token is kept.
        generated: tokens chosen so far.
        logits: with ``max_new_tokens`` 0, float32 ``[tokens, vocab]`` parts of the prompt's logits.
        finish_reason: None while the sequence runs.
    """

    prompt: list[int]
    adapter: str | None
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    generated: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    blocks: list[int] = field(default_factory=list)
    num_cached: int = 0

    @property
    def length(self) -> int:
        """Tokens known so far, prompt and generated."""
        return len(self.prompt) + len(self.generated)

    @property
    def max_length(self) -> int:
        return len(self.prompt) + self.max_new_tokens

    @property
    def num_pending(self) -> int:
        """Known tokens whose keys and values are not in the cache yet."""
        return self.length - self.num_cached

    def pending_tokens(self, count: int) -> list[int]:
        """The next ``count`` tokens to run."""
        if self.num_cached >= len(self.prompt):
            start = self.num_cached - len(self.prompt)
            return self.generated[start : start + count]
        return self.prompt[self.num_cached : self.num_cached + count]


class Engine:
    """Runs any number of sequences through the programs of a :class:`Runner`.

    Cache blocks for a sequence's whole length are reserved when it is admitted, so a running
    sequence always finishes. Sequences are admitted in order of arrival.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        buckets, cache = runner.runtime.buckets, runner.runtime.cache
        self._prefill_buckets = tuple(buckets.prefill_buckets())
        self._decode_buckets = tuple(buckets.decode_buckets())
        self._block_size = cache.block_size
        # Block 0 takes what padding tokens write. The list is used from its end: low blocks first.
        self._free_blocks = list(range(cache.total_blocks(buckets.max_sequences) - 1, 0, -1))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the caller has validated it."""
        self.waiting.append(sequence)

    def run_until_done(self) -> None:
        """Step until no sequence is left. If a step fails, all sequences are dropped."""
        try:
            while self.waiting or self.running:
                self.step()
        except BaseException:
            self.waiting.clear()
            for sequence in list(self.running):
                self._release(sequence)
            raise

    def step(self) -> list[Sequence]:
        """Run one program: a batch of prompt chunks where there are any, else a decode step.

        Returns:
            The sequences that finished.
        """
        self._admit()
        scoring = [s for s in self.running if s.max_new_tokens == 0]
        prompts = [s for s in self.running if s.max_new_tokens and s.num_cached < len(s.prompt)]
        if scoring:
            self._run("score", self._chunks(scoring))
        elif prompts:
            self._run("prefill", self._chunks(prompts))
        elif self.running:
            self._run("decode", [(sequence, 1) for sequence in self.running])
        finished = [s for s in self.running if s.finish_reason]
        for sequence in finished:
            self._release(sequence)
        return finished

    def _admit(self) -> None:
        """Move waiting sequences to the running ones while blocks, rows and adapter slots last."""
        while self.waiting and len(self.running) < self.runner.runtime.buckets.max_sequences:
            sequence = self.waiting[0]
            num_blocks = -(-sequence.max_length // self._block_size)
            if num_blocks > len(self._free_blocks):
                return
            try:
                names = [s.adapter for s in self.running]
                self.runner.registry.acquire([*names, sequence.adapter])
            except CapacityError:
                if self.running:
                    return  # Its adapter fits once others have finished.
                raise
            sequence.blocks = [self._free_blocks.pop() for _ in range(num_blocks)]
            self.running.append(self.waiting.popleft())

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free_blocks.extend(reversed(sequence.blocks))
        sequence.blocks = []

    def _chunks(self, sequences: Iterable[Sequence]) -> list[tuple[Sequence, int]]:
        """As many pending tokens as the largest prefill bucket holds, in order."""
        largest = self._prefill_buckets[-1]
        room = largest.tokens
        chunks: list[tuple[Sequence, int]] = []
        for sequence in sequences:
            if room == 0 or len(chunks) == largest.sequences:
                break
            count = min(room, sequence.num_pending)
            chunks.append((sequence, count))
            room -= count
        return chunks

    def _run(self, kind: Kind, chunks: list[tuple[Sequence, int]]) -> None:
        """Run the next tokens of some sequences and take in what comes back."""
        buckets = self._decode_buckets if kind == "decode" else self._prefill_buckets
        bucket = choose_bucket(buckets, sum(count for _, count in chunks), len(chunks))
        slots = self.runner.registry.acquire([sequence.adapter for sequence, _ in chunks])
        key = ProgramKey(kind, bucket, lora=any(slot >= 0 for slot in slots))
        out = self.runner.run(key, self._pack(key, chunks, slots))

        if kind == "score":
            self._take_logits(np.asarray(out), chunks)
        else:
            self._take_tokens(np.asarray(out), chunks)

    def _pack(self, key: ProgramKey, chunks: list[tuple[Sequence, int]], slots: list[int]) -> Batch:
        batch = self.runner.layout(key).empty()
        start = 0
        for row, ((sequence, count), slot) in enumerate(zip(chunks, slots, strict=True)):
            end = start + count
            batch.tokens[start:end] = sequence.pending_tokens(count)
            batch.positions[start:end] = range(sequence.num_cached, sequence.num_cached + count)
            batch.adapter_of_token[start:end] = slot
            batch.sequence_of_token[start:end] = row
            batch.query_counts[row] = count
            batch.last_token[row] = end - 1
            batch.block_table[row, : len(sequence.blocks)] = sequence.blocks
            batch.temperature[row] = sequence.sampling.temperature
            batch.top_k[row] = sequence.sampling.top_k
            batch.top_p[row] = sequence.sampling.top_p
            batch.seed[row] = sequence.sampling.seed
            start = end
        batch.num_tokens[...] = start
        return batch

    def _take_logits(self, logits: np.ndarray, chunks: list[tuple[Sequence, int]]) -> None:
        start = 0
        for sequence, count in chunks:
            sequence.logits.append(logits[start : start + count].copy())
            sequence.num_cached += count
            start += count
            if sequence.num_pending == 0:
                sequence.finish_reason = "scored"

    def _take_tokens(self, tokens: np.ndarray, chunks: list[tuple[Sequence, int]]) -> None:
        for row, (sequence, count) in enumerate(chunks):
            sequence.num_cached += count
            if sequence.num_pending:
                continue  # A prompt chunk that is not the last one: its token means nothing.
            token = int(tokens[row])
            sequence.generated.append(token)
            if token in sequence.stop_tokens:
                sequence.finish_reason = "stop"
            elif len(sequence.generated) == sequence.max_new_tokens:
                sequence.finish_reason = "length"
