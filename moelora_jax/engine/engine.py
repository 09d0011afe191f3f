"""Continuous batching on one device: plan a step, run it, take in the tokens of the one before."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from moelora_jax.buckets import ProgramKey, choose_bucket
from moelora_jax.engine.packing import Packer, wants_logprobs
from moelora_jax.engine.requests import TokenOutput
from moelora_jax.engine.residency import Residency
from moelora_jax.engine.runner import Runner
from moelora_jax.engine.sampling import Sampled
from moelora_jax.engine.scheduler import Chunk, Plan, Scheduler
from moelora_jax.engine.sequence import EndReason, Sequence


class Output(NamedTuple):
    """A token of a sequence."""

    sequence: Sequence
    token: TokenOutput


class _Step(NamedTuple):
    """A step that the device has not finished, or that nobody has read."""

    plan: Plan
    out: Sampled | Array


class Engine:
    """Runs any number of sequences through the programs of a :class:`Runner`.

    The host is one step ahead: while the device runs a step, the next one is planned, packed and
    enqueued, and only then are the tokens of the first one read. A sequence whose last token was a
    stop token is noticed one step late; the row that it had in that step is dropped.

    Calls must come from one thread.

    Args:
        runner: the device.
        reuse_prefixes: whether sequences that begin alike share cache blocks.
        ahead: whether the host is one step ahead; otherwise it waits for each step, for tests.
        clock: seconds; deadlines of sequences are compared with it.

    Attributes:
        scheduler: the books of all sequences.
        residency: which adapters are on the device.
        made_progress: whether the last step ran, read or wrote anything.
        unplanned_reads: steps that failed because something but their results was read from the
            device. On a CPU, where such a read costs nothing, JAX does not notice it.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        reuse_prefixes: bool = True,
        ahead: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self.residency = Residency(runner.registry)
        buckets, cache = runner.runtime.buckets, runner.runtime.cache
        self.scheduler = Scheduler(buckets, cache, self.residency, reuse_prefixes=reuse_prefixes)
        self.made_progress = True
        self.unplanned_reads = 0
        self._packer = Packer(buckets, cache)
        self._prefill_buckets = tuple(buckets.prefill_buckets())
        self._decode_buckets = tuple(buckets.decode_buckets())
        self._ahead = ahead
        self._clock = clock
        self._running: _Step | None = None

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return self.scheduler.is_idle and self._running is None

    @property
    def has_work(self) -> bool:
        """Whether a step would do something, be it only for adapters."""
        return not self.is_idle or self.residency.has_work

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the caller has validated it."""
        self.scheduler.add(sequence)

    def step(self) -> list[Output]:
        """Enqueue the next step, then wait for the one before it.

        If this raises, every sequence has ended with ``error``, and the engine can go on.

        Returns:
            The tokens that became known, in order. Sequences that have ended, with a token or
            without, are in ``scheduler.collect_ended()``.
        """
        try:
            # Results are copied in the open; any other read from the device is an error.
            with jax.transfer_guard_device_to_host("disallow"):
                return self._step()
        except BaseException as error:
            self.unplanned_reads += "device-to-host" in str(error)
            self.abort()
            raise

    def abort(self, reason: EndReason = "error") -> None:
        """End all sequences and drop what was enqueued for them."""
        self._running = None
        self.scheduler.end_all(reason)
        self.runner.recover()

    def run_until_done(self) -> None:
        """Step until no sequence is left. If a step fails, all sequences are dropped."""
        while not self.is_idle:
            self.step()
        self.scheduler.collect_ended()

    def _step(self) -> list[Output]:
        plan = self.scheduler.plan(self._clock())
        before, self._running = self._running, None if plan is None else self._enqueue(plan)
        is_idle = plan is None and before is None
        # While the device is at work, not between its tokens and those who wait for them.
        wrote = self.residency.advance(self.scheduler.wanted, is_idle=is_idle)
        self.made_progress = wrote or not is_idle
        outputs = [] if before is None else self._take(before)
        if not self._ahead and self._running is not None:
            before, self._running = self._running, None
            outputs += self._take(before)
        return outputs

    def _enqueue(self, plan: Plan) -> _Step:
        buckets = self._decode_buckets if plan.kind == "decode" else self._prefill_buckets
        tokens = sum(chunk.num_tokens for chunk in plan.chunks)
        bucket = choose_bucket(buckets, tokens, len(plan.chunks))
        lora = any(chunk.sequence.version is not None for chunk in plan.chunks)
        key = ProgramKey(plan.kind, bucket, lora)
        packed = self._packer.pack(self.runner.layout(key), plan)
        for seat, biases in self._packer.new_biases():
            self.runner.write_biases(seat, biases)
        out = self.runner.run(key, packed)
        return _Step(plan, out)

    def _take(self, step: _Step) -> list[Output]:
        """Wait for a step, and take in its results."""
        if not isinstance(step.out, Sampled):
            self._take_logits(step.plan, jax.device_get(step.out))
            return []
        logprobs = wants_logprobs(step.plan)
        read = jax.device_get(step.out if logprobs else step.out.tokens)
        sampled = read if isinstance(read, Sampled) else None
        tokens = (sampled.tokens if sampled else read).tolist()
        outputs = []
        for row, chunk in enumerate(step.plan.chunks):
            if chunk.samples and self.scheduler.sampled(chunk, tokens[row]):
                outputs.append(Output(chunk.sequence, _output(chunk, tokens[row], row, sampled)))
        return outputs

    def _take_logits(self, plan: Plan, logits: np.ndarray) -> None:
        start = 0
        for chunk in plan.chunks:
            self.scheduler.scored(chunk, logits[start : start + chunk.num_tokens].copy())
            start += chunk.num_tokens


def _output(chunk: Chunk, token: int, row: int, sampled: Sampled | None) -> TokenOutput:
    """A token with the log-probabilities that its sequence asked for."""
    sequence = chunk.sequence
    reason = sequence.end_reason
    finish_reason = reason if reason in ("stop", "length") else None
    count = sequence.num_logprobs
    if count is None or sampled is None:
        return TokenOutput(token, finish_reason=finish_reason)
    top = zip(
        sampled.top_tokens[row, :count].tolist(),
        sampled.top_logprobs[row, :count].tolist(),
        strict=True,
    )
    return TokenOutput(token, float(sampled.logprobs[row]), tuple(top), finish_reason)
