"""The bucketing layer: static batch shapes, and one ahead-of-time compiled program for each.

A batch is padded to the smallest bucket that holds it and travels to the device as one int32
vector. Programs are compiled before the first batch; a batch that fits no bucket must be split, it
is never compiled for.
"""

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.monitoring
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moelora_jax.config import Bucket, BucketConfig
from moelora_jax.errors import MoeLoraError, RequestError
from moelora_jax.workspace import MAX_BIASES

Kind = Literal["prefill", "decode", "score"]


class Batch(NamedTuple):
    """One packed step, as the model sees it inside a program.

    Tokens of a sequence lie together, and sequences one after another. Everything is int32 unless
    said otherwise; T and R are the bucket's tokens and sequences.

    Attributes:
        tokens: ``[T]`` token ids. -1 - s stands for the token that was last sampled for seat s: the
            host may pack a step before it knows that token.
        positions: ``[T]`` position of each token in its sequence.
        adapter_of_token: ``[T]`` adapter slot, or -1 for the base model and for padding.
        sequence_of_token: ``[T]`` row of the block table.
        query_counts: ``[R]`` tokens of each sequence in this step.
        last_token: ``[R]`` index into ``tokens`` of each sequence's last one.
        block_table: ``[R, blocks_per_sequence]`` cache blocks of each sequence.
        num_tokens: ``[]`` tokens that are real; padding comes behind them.
        temperature: float32 ``[R]``; 0 is greedy.
        top_k: ``[R]`` tokens to sample from; 0 means all.
        top_p: float32 ``[R]`` probability mass to sample from.
        min_p: float32 ``[R]`` least probability, as a share of the greatest; 0 means none.
        seed: ``[R]`` random seed of each sequence.
        seat: ``[R]`` where the sampled token is kept for later steps; one past the last seat for
            rows that sample nothing.
        logprobs: ``[]`` 1 if any row wants log-probabilities.
        adjusts: ``[]`` 1 if any row wants its logits adjusted, by what follows.
        num_prompt: ``[R]`` tokens of each sequence that are its prompt.
        frequency_penalty: float32 ``[R]``; 0 is none.
        presence_penalty: float32 ``[R]``; 0 is none.
        repetition_penalty: float32 ``[R]``; 1 is none.
        first_bias: ``[R]`` from which on the biases of the row's seat apply; ``MAX_BIASES`` for
            none of them.
    """

    tokens: Any
    positions: Any
    adapter_of_token: Any
    sequence_of_token: Any
    query_counts: Any
    last_token: Any
    block_table: Any
    num_tokens: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    seed: Any
    seat: Any
    logprobs: Any
    adjusts: Any
    num_prompt: Any
    frequency_penalty: Any
    presence_penalty: Any
    repetition_penalty: Any
    first_bias: Any


@dataclass(frozen=True)
class BatchLayout:
    """Where each field of a :class:`Batch` lies in the packed int32 vector of a bucket."""

    bucket: Bucket
    blocks_per_sequence: int

    def shapes(self) -> Batch:
        """Shape and dtype of every field."""
        tokens, sequences = (self.bucket.tokens,), (self.bucket.sequences,)
        of_fields = Batch(
            tokens=tokens,
            positions=tokens,
            adapter_of_token=tokens,
            sequence_of_token=tokens,
            query_counts=sequences,
            last_token=sequences,
            block_table=(self.bucket.sequences, self.blocks_per_sequence),
            num_tokens=(),
            temperature=sequences,
            top_k=sequences,
            top_p=sequences,
            min_p=sequences,
            seed=sequences,
            seat=sequences,
            logprobs=(),
            adjusts=(),
            num_prompt=sequences,
            frequency_penalty=sequences,
            presence_penalty=sequences,
            repetition_penalty=sequences,
            first_bias=sequences,
        )
        return Batch(
            *(
                jax.ShapeDtypeStruct(shape, _dtype(name))
                for name, shape in of_fields._asdict().items()
            )
        )

    @property
    def size(self) -> int:
        """Length of the packed vector."""
        return _parts(self)[-1][0].stop

    def padding(self) -> np.ndarray:
        """A new vector of padding alone; what :meth:`unpack` makes of it is there to be filled in.

        It is copied to the device as it is; floats keep their bits.
        """
        return _padding(self).copy()

    def unpack(self, packed: Any) -> Batch:
        """The fields of a packed vector: inside a program, or of NumPy as views of it."""
        return Batch(
            *(
                # XLA sees nothing of a view of the same dtype.
                packed[where].reshape(field.shape).view(field.dtype)
                for where, field in _parts(self)
            )
        )


@functools.cache
def _parts(layout: BatchLayout) -> tuple[tuple[slice, jax.ShapeDtypeStruct], ...]:
    """Where each field lies."""
    ends = np.cumsum([prod(field.shape) for field in layout.shapes()]).tolist()
    where = map(slice, [0, *ends[:-1]], ends)
    return tuple(zip(where, layout.shapes(), strict=True))


@functools.cache
def _padding(layout: BatchLayout) -> np.ndarray:
    packed = np.zeros(layout.size, np.int32)
    batch = layout.unpack(packed)
    batch.adapter_of_token[:] = -1
    batch.top_p[:] = 1.0
    batch.seat[:] = np.iinfo(np.int32).max
    batch.repetition_penalty[:] = 1.0
    batch.first_bias[:] = MAX_BIASES
    return packed


#: Fields of a batch that are no integers.
_FLOATS = {
    "temperature",
    "top_p",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
}


def _dtype(name: str) -> np.dtype:
    return np.dtype(np.float32 if name in _FLOATS else np.int32)


@dataclass(frozen=True, order=True)
class ProgramKey:
    """Names one compiled program.

    Attributes:
        kind: ``prefill`` and ``decode`` sample each sequence's next token; ``score`` returns the
            logits of every token. ``decode`` has one token per sequence.
        bucket: the batch shape.
        lora: whether any token may have an adapter. The host knows, so the device is never asked.
    """

    kind: Kind
    bucket: Bucket
    lora: bool


def program_keys(buckets: BucketConfig, kinds: Iterable[Kind]) -> list[ProgramKey]:
    """All programs of the given kinds.

    Raises:
        MoeLoraError: there is no such kind.
    """
    shapes: Mapping[Kind, Callable[[], Iterable[Bucket]]] = {
        "prefill": buckets.prefill_buckets,
        "decode": buckets.decode_buckets,
        "score": buckets.prefill_buckets,
    }
    listed = list(kinds)
    if isinstance(kinds, str) or not shapes.keys() >= set(listed):
        raise MoeLoraError(f"kinds of programs are some of {tuple(shapes)}, not {kinds!r}")
    return [
        ProgramKey(kind, bucket, lora)
        for kind in listed
        for bucket in shapes[kind]()
        for lora in (False, True)
    ]


def choose_bucket(buckets: Iterable[Bucket], tokens: int, sequences: int) -> Bucket:
    """The smallest bucket that holds a batch.

    Raises:
        RequestError: none does; the batch must be split.
    """
    fitting = [b for b in buckets if b.tokens >= tokens and b.sequences >= sequences]
    if not fitting:
        raise RequestError(
            f"no bucket holds {tokens} tokens of {sequences} sequences; split the batch"
        )
    return min(fitting)


def use_compilation_cache(folder: str | Path | None = None) -> Path:
    """Keep compiled programs on disk, for all of this process, so that the next start is fast.

    Args:
        folder: where to. Unless given, what JAX is set to (``JAX_COMPILATION_CACHE_DIR``), or else
            ``~/.cache/moelora_jax/programs``, under ``XDG_CACHE_HOME`` where that is set.

    Returns:
        The folder.
    """
    folder = folder or jax.config.jax_compilation_cache_dir
    if folder is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "moelora_jax" / "programs"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return Path(folder)


class CompilationCounter:
    """Counts every program that XLA compiles in this process while the counter is open.

    Use as a context manager, or call :meth:`close` in the end. ``count`` is live.
    """

    _EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: object) -> None:
        if event == self._EVENT:
            self.count += 1

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def __enter__(self) -> "CompilationCounter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _count_cache_hits() -> Iterator[Callable[[], int]]:
    """Counts programs that come from the compilation cache; gives a function that says how many."""
    hits: list[str] = []  # Appending is atomic: several threads compile.

    def listen(event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield lambda: len(hits)
    finally:
        jax.monitoring.unregister_event_listener(listen)


@dataclass(frozen=True)
class CompileReport:
    """What it took to have programs ready.

    Attributes:
        programs: how many were made.
        from_cache: how many of them were compiled earlier and kept on disk.
        seconds: from the first to the last, tracing included.
    """

    programs: int
    from_cache: int
    seconds: float

    def __str__(self) -> str:
        start = "warm" if self.programs == self.from_cache else "cold"
        return (
            f"{self.programs} programs, {self.from_cache} of them from the cache, in "
            f"{self.seconds:.1f} s ({start} start)"
        )


class Programs:
    """The compiled programs of a model, by key.

    Args:
        build: makes the function of a key; its first argument is the donated device state.
        arguments: shapes of the function's arguments for a key.
    """

    def __init__(
        self,
        build: Callable[[ProgramKey], Callable[..., Any]],
        arguments: Callable[[ProgramKey], tuple[Any, ...]],
    ) -> None:
        self._build = build
        self._arguments = arguments
        self._compiled: dict[ProgramKey, jax.stages.Compiled] = {}

    def compile(self, keys: Iterable[ProgramKey], *, progress: bool = False) -> CompileReport:
        """Compile the programs of ``keys`` that are not compiled yet, largest bucket first.

        One program is traced after another; XLA compiles as many at once as there are cores.

        Args:
            keys: which programs.
            progress: show a progress bar.

        Returns:
            How many there were, and how long it took.
        """
        missing = sorted({key for key in keys if key not in self._compiled}, reverse=True)
        columns = (
            TextColumn("Compiling programs"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
        )
        console = Console(stderr=True)
        start = time.perf_counter()
        with (
            _count_cache_hits() as hits,
            Progress(*columns, console=console, disable=not progress or not missing) as bar,
            ThreadPoolExecutor(os.cpu_count(), "compile") as threads,
        ):
            task = bar.add_task("", total=len(missing))
            compiling: list[Future[jax.stages.Compiled]] = []
            for key in missing:
                adapters = "with adapters" if key.lora else "base only"
                bar.update(task, description=f"{key.kind} {key.bucket.tokens} tokens, {adapters}")
                function = jax.jit(self._build(key), donate_argnums=0)
                lowered = function.lower(*self._arguments(key))
                compiling.append(threads.submit(lowered.compile))
                compiling[-1].add_done_callback(lambda _: bar.advance(task))
            bar.update(task, description="")
            for key, future in zip(missing, compiling, strict=True):
                self._compiled[key] = future.result()
        return CompileReport(len(missing), hits(), time.perf_counter() - start)

    def __getitem__(self, key: ProgramKey) -> jax.stages.Compiled:
        """The program of ``key``; compiled now if :meth:`compile` was not called for it."""
        if key not in self._compiled:
            self.compile([key])
        return self._compiled[key]

    @property
    def temporary_bytes(self) -> int:
        """The most that one of the compiled programs needs besides its arguments and results."""
        analyses = (program.memory_analysis() for program in self._compiled.values())
        return max((a.temp_size_in_bytes for a in analyses if a is not None), default=0)

    def __contains__(self, key: ProgramKey) -> bool:
        return key in self._compiled

    def __len__(self) -> int:
        return len(self._compiled)
