"""What runs next: pure bookkeeping on the host, without JAX.

A sequence waits until a seat, cache blocks for its tokens and its adapter are there. Then its
prompt runs in chunks beside the others that decode, one token each per step. Blocks for generated
tokens are taken as they are needed. When none is left, the youngest sequence of the lowest priority
gives up its blocks, waits, and is computed again.

Steps are planned one ahead of the device: a step may be planned while the tokens that the last one
samples are not known yet. The device keeps them by seat, and the next step takes them from there.
"""

import heapq
import itertools
from bisect import insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from moelora_jax.adapters.registry import AdapterVersion
from moelora_jax.buckets import Kind
from moelora_jax.config import BucketConfig, CacheConfig
from moelora_jax.engine.blocks import BlockPool, block_keys
from moelora_jax.engine.sequence import EndReason, Sequence
from moelora_jax.engine.waiting import WaitingQueue
from moelora_jax.errors import MoeLoraError


class Chunk(NamedTuple):
    """The tokens of one sequence in a step.

    Attributes:
        sequence: whose.
        start: position of the first one.
        num_tokens: how many.
        samples: whether the step samples the sequence's next token.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """One step: what kind of program, and the tokens in it, one chunk after another."""

    kind: Kind
    chunks: tuple[Chunk, ...]


@runtime_checkable
class Adapters(Protocol):
    """What the scheduler needs to know of adapters."""

    def ready(self, name: str) -> AdapterVersion | None:
        """The version that a new sequence would run with, if it is on the device.

        Raises:
            MoeLoraError: it is not loaded, or will never fit.
        """

    def hold(self, version: AdapterVersion) -> None:
        """Count one more sequence that runs with it: it must stay on the device."""

    def release(self, version: AdapterVersion) -> None:
        """Count one sequence less."""


class Scheduler:
    """Plans steps and keeps the books of all sequences.

    Args:
        buckets: shapes of the programs.
        cache: the KV cache.
        adapters: which adapters are on the device.
        reuse_prefixes: whether sequences that begin alike share cache blocks.

    Attributes:
        waiting: sequences without a seat.
        running: sequences with a seat, in the order in which they are served.
        blocks: the cache blocks.
        wanted: adapters that waiting sequences need on the device, the most urgent first.
        ended: sequences that ended and were not collected yet, by :meth:`collect_ended`.
        finished: sequences ended so far, by reason.
        steps: steps planned so far, by kind.
        preemptions: how often a sequence gave up its blocks.
        prefix_hits: tokens that were found in the cache.
    """

    def __init__(
        self,
        buckets: BucketConfig,
        cache: CacheConfig,
        adapters: Adapters,
        *,
        reuse_prefixes: bool = True,
    ) -> None:
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.blocks = BlockPool(cache.total_blocks(buckets.max_sequences))
        self.wanted: list[str] = []
        self.ended: list[Sequence] = []
        self.finished: Counter[str] = Counter()
        self.steps: Counter[str] = Counter()
        self.preemptions = 0
        self.prefix_hits = 0
        self._adapters = adapters
        self._block_size = cache.block_size
        self._reuse_prefixes = reuse_prefixes
        self._largest = max(buckets.prefill_buckets())
        self._seats = list(range(buckets.max_sequences - 1, -1, -1))
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._arrivals = itertools.count()
        self._decodes_next = False

    @property
    def is_idle(self) -> bool:
        """Whether no sequence waits or runs."""
        return not self.running and not self.waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.arrival = next(self._arrivals)
        if sequence.deadline is not None:
            heapq.heappush(self._deadlines, (sequence.deadline, sequence.arrival, sequence))
        self.waiting.add(sequence)

    def end(self, sequence: Sequence, reason: EndReason, error: MoeLoraError | None = None) -> None:
        """End a sequence, wherever it stands; nothing happens if it has ended."""
        if sequence.end_reason:
            return
        if sequence.seat >= 0:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)
        if sequence.version is not None:
            self._adapters.release(sequence.version)
            sequence.version = None
        sequence.end_reason, sequence.error = reason, error
        self.finished[reason] += 1
        self.ended.append(sequence)

    def end_all(self, reason: EndReason, error: MoeLoraError | None = None) -> None:
        """End every sequence, and trust nothing that is in the cache."""
        for sequence in [*self.running, *self.waiting]:
            self.end(sequence, reason, error)
        self.blocks.forget()

    def collect_ended(self) -> list[Sequence]:
        """The sequences that have ended since the last call."""
        ended, self.ended = self.ended, []
        return ended

    def plan(self, now: float) -> Plan | None:
        """The next step, or None if nothing can run.

        Args:
            now: what deadlines are compared with.
        """
        while self._deadlines and (
            self._deadlines[0][0] <= now or self._deadlines[0][2].end_reason
        ):
            self.end(heapq.heappop(self._deadlines)[2], "timeout")
        self._admit()
        plan = self._scores() or self._mixed()
        if plan is not None:
            self.steps[plan.kind] += 1
        return plan

    def sampled(self, chunk: Chunk, token: int) -> bool:
        """Take in the token that a step has sampled for a sequence.

        Returns:
            Whether the sequence wants it; one that has ended meanwhile does not.
        """
        sequence = chunk.sequence
        sequence.num_in_flight -= 1
        if sequence.end_reason:
            return False
        sequence.tokens.append(token)
        self._remember(sequence)
        if token in sequence.stop_tokens:
            self.end(sequence, "stop")
        elif len(sequence.tokens) == sequence.num_prompt + sequence.max_new_tokens:
            self.end(sequence, "length")
        return True

    def scored(self, chunk: Chunk, logits: np.ndarray) -> None:
        """Take in the logits of a chunk of a scored prompt."""
        sequence = chunk.sequence
        if sequence.end_reason:
            return
        sequence.logits.append(logits)
        if chunk.start + chunk.num_tokens == sequence.num_prompt:
            self.end(sequence, "scored")

    # Admission.

    def _admit(self) -> None:
        """Seat waiting sequences while there is room, passing over those without their adapter."""
        admitted = True
        while admitted:
            self.wanted, admitted, has_room = [], False, True
            for sequence in self.waiting.heads():
                if sequence.num_in_flight:
                    continue  # It was preempted, and its last token is not known yet.
                version = sequence.version
                if sequence.adapter is not None and version is None:
                    try:
                        version = self._adapters.ready(sequence.adapter)
                    except MoeLoraError as error:
                        self.end(sequence, "error", error)
                        admitted = True  # Look at the next one of that adapter.
                        break
                    if version is None:
                        if sequence.adapter not in self.wanted:
                            self.wanted.append(sequence.adapter)
                        continue
                # The first one that lacks room keeps what becomes free; only adapters are prepared.
                has_room = has_room and self._seat(sequence, version)
                if has_room:
                    admitted = True
                    break

    def _seat(self, sequence: Sequence, version: AdapterVersion | None) -> bool:
        """Give a waiting sequence a seat and blocks for its tokens, if there is room."""
        while not (self._seats and self._take_blocks(sequence, version)):
            if not self.running or self.running[-1].priority >= sequence.priority:
                return False
            self._preempt(self.running[-1])
        if version is not None and sequence.version is None:
            self._adapters.hold(version)
            sequence.version = version
        self.waiting.take(sequence)
        sequence.seat = self._seats.pop()
        insort(self.running, sequence, key=lambda s: s.rank)
        return True

    def _take_blocks(self, sequence: Sequence, version: AdapterVersion | None) -> bool:
        """Blocks for all known tokens, remembered ones as far as there are any."""
        matched: list[int] = []
        if self._reuse_prefixes and not sequence.scores:
            # The last token is computed in any case, because its logits are needed.
            last = (len(sequence.tokens) - 1) // self._block_size
            matched = self.blocks.match(self._keys(sequence, version)[:last])
        missing = -(-len(sequence.tokens) // self._block_size) - len(matched)
        # Each running sequence may need one more block soon. Without any, all blocks are free.
        if missing + len(self.running) > self.blocks.num_free:
            self.blocks.release(matched)
            return False
        sequence.blocks = matched + self.blocks.allocate(missing)
        sequence.num_remembered = len(matched)
        sequence.num_computed = len(matched) * self._block_size
        self.prefix_hits += sequence.num_computed
        return True

    def _keys(self, sequence: Sequence, version: AdapterVersion | None) -> list[bytes]:
        """Keys of all full blocks of the known tokens."""
        weights = 0 if version is None else version.number
        if sequence.keys_weights != weights:  # New, or its adapter was reloaded while it waited.
            sequence.keys, sequence.keys_weights = [], weights
        known = len(sequence.keys)
        if known < len(sequence.tokens) // self._block_size:
            parent = sequence.keys[-1] if known else weights.to_bytes(8, "little")
            rest = sequence.tokens[known * self._block_size :]
            sequence.keys = sequence.keys + block_keys(parent, rest, self._block_size)
        return sequence.keys

    def _preempt(self, sequence: Sequence) -> None:
        """Take seat and blocks from a sequence; it keeps its tokens and its adapter's version."""
        self._leave(sequence)
        self.waiting.add(sequence, first=True)
        self.preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._seats.append(sequence.seat)
        self.blocks.release(sequence.blocks)
        sequence.seat, sequence.blocks = -1, []
        sequence.num_computed = sequence.num_remembered = 0

    # Steps.

    def _scores(self) -> Plan | None:
        """Chunks of the prompts that are scored, if there are any."""
        sequences = [s for s in self.running if s.scores and s.num_pending]
        if not sequences:
            return None
        return Plan("score", tuple(self._prompt_chunks(sequences, self._largest.tokens)))

    def _mixed(self) -> Plan | None:
        """One token of each sequence that decodes, and chunks of prompts beside them."""
        prompts: list[Sequence] = []
        decodes: list[Sequence] = []
        for sequence in self.running:
            if not sequence.scores and not sequence.is_sampled_out:
                (prompts if sequence.num_pending > 1 else decodes).append(sequence)
        if prompts and len(decodes) >= self._largest.tokens:
            # No bucket holds all decodes and a prompt: they take turns.
            self._decodes_next = not self._decodes_next
            if self._decodes_next:
                prompts = []
            else:
                decodes = []
        chunks = [self._chunk(s, 1) for s in decodes if self._has_block(s)]
        # What was preempted for them has left.
        prompts = [s for s in prompts if s.seat >= 0]
        kind: Kind = "prefill" if prompts else "decode"
        chunks += self._prompt_chunks(prompts, self._largest.tokens - len(chunks))
        return Plan(kind, tuple(chunks)) if chunks else None

    def _has_block(self, sequence: Sequence) -> bool:
        """Whether a sequence has a block for its next token, taking one from others if need be."""
        if sequence.seat < 0:
            return False  # It was preempted for one before it.
        while len(sequence.blocks) * self._block_size <= sequence.num_computed:
            if self.blocks.num_free:
                sequence.blocks += self.blocks.allocate(1)
                continue
            # The last one is this one, or comes after it: it has no token in this step.
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _prompt_chunks(self, sequences: Iterable[Sequence], room: int) -> list[Chunk]:
        """As many pending tokens as there is room for, in order."""
        chunks: list[Chunk] = []
        for sequence in sequences:
            if room == 0:
                break
            chunks.append(self._chunk(sequence, min(room, sequence.num_pending)))
            room -= chunks[-1].num_tokens
        return chunks

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        """Plan the next tokens of a sequence."""
        start = sequence.num_computed
        samples = not sequence.scores and count == sequence.num_pending
        sequence.num_computed += count
        sequence.num_in_flight += samples
        self._remember(sequence)
        return Chunk(sequence, start, count, samples)

    def _remember(self, sequence: Sequence) -> None:
        """Let others find the full blocks whose tokens are known and were planned to be computed.

        Steps run in the order of their plans, so what one writes is there for all later ones.
        """
        if not self._reuse_prefixes or sequence.scores:
            return
        full = min(sequence.num_computed, len(sequence.tokens)) // self._block_size
        if full > sequence.num_remembered:
            keys = self._keys(sequence, sequence.version)
            for index in range(sequence.num_remembered, full):
                self.blocks.remember(sequence.blocks[index], keys[index])
            sequence.num_remembered = full
