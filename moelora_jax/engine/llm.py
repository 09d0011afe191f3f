"""The Python API: a model with many adapters, for notebooks, tests and the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from moelora_jax.adapters.adapter import Adapter
from moelora_jax.adapters.pages import PackedAdapter
from moelora_jax.adapters.reader import read_adapter
from moelora_jax.adapters.registry import AdapterInfo
from moelora_jax.adapters.writer import Layout, save_adapter
from moelora_jax.buckets import CompileReport, Kind
from moelora_jax.config import ModelConfig, RuntimeConfig
from moelora_jax.engine.engine import Engine
from moelora_jax.engine.requests import (
    FinishReason,
    check_max_new_tokens,
    check_sampling,
    check_tokens,
)
from moelora_jax.engine.runner import Runner
from moelora_jax.engine.sampling import Sampling
from moelora_jax.engine.sequence import Sequence as EngineSequence
from moelora_jax.engine.trace import Trace, trace_rows
from moelora_jax.errors import AdapterError, MoeLoraError, RequestError
from moelora_jax.models import ModelFamily, load_model
from moelora_jax.workspace import MemoryPlan


@dataclass(frozen=True)
class Prompt:
    """One row of a batch.

    Attributes:
        tokens: token ids, at least one.
        adapter: name of a loaded adapter, or None for the base model.
    """

    tokens: Sequence[int] | np.ndarray
    adapter: str | None = None


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt.

    Attributes:
        tokens: the new token ids; a stop token is the last one.
        adapter: what the prompt asked for.
        finish_reason: ``length`` or ``stop``.
    """

    tokens: tuple[int, ...]
    adapter: str | None
    finish_reason: FinishReason


def default_dtype() -> np.dtype:
    """The compute dtype unless one is given: float32 on a CPU and bfloat16 elsewhere."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


class LLM:
    """A Mixture-of-Experts model and its adapters.

    Example::

        llm = LLM.load("path/to/checkpoint")
        llm.load_adapter("french", "path/to/adapter")
        llm.generate([Prompt([1, 2, 3], "french"), Prompt([1, 2, 3])], max_new_tokens=16)

    Args:
        model: a model of :mod:`moelora_jax.models`.
        config: its description.
        family: its family, for reading adapters.
        runtime: adapter limits, buckets and cache.
        dtype: compute dtype, that of the model's parameters.

    Attributes:
        runner: the device: parameters, adapters, programs.
        engine: continuous batching over it.
    """

    def __init__(
        self,
        model: nnx.Module,
        config: ModelConfig,
        family: ModelFamily,
        *,
        runtime: RuntimeConfig | None = None,
        dtype: DTypeLike,
    ) -> None:
        if runtime is not None and not isinstance(runtime, RuntimeConfig):
            raise MoeLoraError(f"runtime must be a RuntimeConfig, not {runtime!r}")
        self.config = config
        self.runtime = runtime or RuntimeConfig()
        self._family = family
        self.runner = Runner(model, config, self.runtime, dtype)
        self.engine = Engine(self.runner)

    def __repr__(self) -> str:
        return f"LLM({self.config.architecture}, {len(self.adapters())} adapters)"

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        runtime: RuntimeConfig | None = None,
        dtype: DTypeLike | None = None,
        progress: bool = False,
    ) -> "LLM":
        """Read a checkpoint folder of transformers.

        Args:
            folder: config.json and safetensors.
            runtime: adapter limits, buckets and cache; the default suits a laptop.
            dtype: compute dtype; float32 on a CPU and bfloat16 elsewhere unless given.
            progress: show progress bars.

        Raises:
            CheckpointError: the folder is incomplete, damaged or of an unsupported model.
        """
        dtype = default_dtype() if dtype is None else dtype
        model, config, family = load_model(folder, dtype, progress=progress)
        return cls(model, config, family, runtime=runtime, dtype=dtype)

    def load_adapter(
        self,
        name: str,
        adapter: str | Path | Adapter,
        *,
        layout: str | None = None,
        pin: bool = False,
    ) -> None:
        """Load an adapter, or replace the one of that name.

        Args:
            name: what prompts call it.
            adapter: a folder, or an adapter made in memory.
            layout: of the experts in the folder; needed only if reading asks for one.
            pin: keep it on the device.

        Raises:
            AdapterError: the files are incomplete, damaged, unsupported or of another model.
            CapacityError: its rank or size exceeds the limits. Nothing is changed on any error.
        """
        self.runner.registry.load(name, self._as_adapter(name, adapter, layout), pin=pin)

    def read_adapter(self, folder: str | Path, *, layout: str | None = None) -> Adapter:
        """Read and check an adapter folder without loading it.

        Args:
            folder: ``adapter_config.json`` and ``adapter_model.safetensors``.
            layout: of the experts; needed only if reading asks for one.
        """
        return read_adapter(
            folder,
            self.config.lora_sites(),
            module_names=self._family.module_names,
            layout=layout,
        )

    def save_adapter(
        self, name: str, folder: str | Path, *, layout: Layout, base_model: str | None = None
    ) -> None:
        """Write a loaded adapter to a folder, from the pages that it is held in.

        Factors have the compute dtype, to which loading rounded them; loaded again they are the
        same bits. :func:`~moelora_jax.adapters.writer.save_adapter` says what each layout does.

        Args:
            name: of the loaded adapter.
            folder: must not exist, or be empty.
            layout: of the experts, ``per_expert`` or ``peft_fused``.
            base_model: name or path of the base model, which other tools show to their users.

        Raises:
            RequestError: the adapter is not loaded.
            AdapterError: the folder is not empty, or the layout cannot express the adapter.
        """
        save_adapter(
            folder,
            self.runner.registry.adapter(name),
            self.config.lora_sites(),
            layout=layout,
            module_names=self._family.module_names,
            base_model=base_model,
        )

    def _compared(self, adapter: Adapter) -> Adapter:
        """The adapter, whose copies of base weights, if it has any, are those of this model."""
        model: Any = self.runner.model if adapter.base_weights else None
        return adapter.compared(lambda site: np.asarray(model.base_weight(site)))

    def pack_adapter(
        self, name: str, adapter: str | Path | Adapter, *, layout: str | None = None
    ) -> PackedAdapter:
        """Read and pack an adapter without loading it; the only method for any thread.

        Args:
            name: for messages.
            adapter: a folder, or an adapter made in memory.
            layout: as :meth:`load_adapter`; it raises the same errors.
        """
        return self.runner.pool.pack(self._as_adapter(name, adapter, layout))

    def _as_adapter(self, name: str, adapter: str | Path | Adapter, layout: str | None) -> Adapter:
        if not isinstance(adapter, Adapter):
            adapter = self.read_adapter(adapter, layout=layout)
        elif layout is not None:
            raise AdapterError(f"layout {layout!r} is of folders; {name!r} is in memory already")
        return self._compared(adapter)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; RequestError if it is not loaded."""
        self.runner.registry.unload(name)

    def adapters(self) -> list[AdapterInfo]:
        """The loaded adapters, least recently used first."""
        registry = self.runner.registry
        return [registry.info(name) for name in registry.names()]

    def memory_plan(self) -> MemoryPlan:
        """Bytes on the device, by what they are for."""
        return self.runner.memory_plan()

    def warm_up(
        self, kinds: Sequence[Kind] = ("prefill", "decode"), *, progress: bool = False
    ) -> CompileReport:
        """Compile the programs for :meth:`generate`, or with ``("score",)`` for :meth:`score`.

        Without it each program is compiled when it is first needed. Returns how long it took.
        """
        return self.runner.warm_up(kinds, progress=progress)

    def score(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """Logits of every position of every prompt.

        Args:
            prompts: rows of one mixed batch; run in several steps if no bucket holds them.

        Returns:
            float32 ``[len(tokens), vocab]`` for each prompt.

        Raises:
            RequestError: the batch is empty, or a row is invalid; nothing was run.
            CapacityError: a row is longer than the cache.
        """
        sequences = self._sequences(prompts, 0, Sampling(), frozenset())
        self._run(sequences)
        return [np.concatenate(sequence.logits) for sequence in sequences]

    def trace(self, prompts: Sequence[Prompt]) -> list[Trace]:
        """Run prompts and keep what the MoE layers compute, for research.

        Which experts each token chooses with an adapter, and which without::

            tuned, base = llm.trace([Prompt(tokens, "french"), Prompt(tokens)])
            tuned.experts, base.experts  # int32 [layers, tokens, top_k]

        All rows run as one batch. The program has memory of its own and is compiled for each new
        size; the programs that serve know nothing of it.

        Args:
            prompts: rows of one mixed batch.

        Raises:
            RequestError: the batch is empty, or a row is invalid; nothing was run.
            CapacityError: a row is longer than the cache, or there are more adapters than slots.
        """
        sequences = self._sequences(prompts, 0, Sampling(), frozenset())
        return trace_rows(self.runner, [(s.tokens, s.adapter) for s in sequences])

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 16,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Continue every prompt.

        Args:
            prompts: rows of one mixed batch; more rows than fit wait for others to finish.
            max_new_tokens: tokens to generate for each prompt.
            sampling: how tokens are chosen; greedy unless given.
            stop_tokens: ids that end a completion; the checkpoint's own unless given.

        Raises:
            RequestError: the batch is empty, or an option or a row is invalid; nothing was run.
            CapacityError: a prompt and its new tokens are longer than the cache.
        """
        check_max_new_tokens(max_new_tokens)
        if sampling is not None and not isinstance(sampling, Sampling):
            raise RequestError(f"sampling must be a Sampling, not {sampling!r}")
        stop = self.config.eos_tokens if stop_tokens is None else stop_tokens
        if not isinstance(stop, Sequence) or not all(isinstance(s, Integral) for s in stop):
            raise RequestError(f"stop_tokens must be a sequence of token ids, not {stop!r}")
        sampling, stops = sampling or Sampling(), frozenset(stop)
        check_sampling(sampling, stops, max_new_tokens, self.config)
        sequences = self._sequences(prompts, max_new_tokens, sampling, stops)
        self._run(sequences)
        return [
            Completion(
                tuple(sequence.generated),
                sequence.adapter,
                "stop" if sequence.end_reason == "stop" else "length",
            )
            for sequence in sequences
        ]

    def _run(self, sequences: Sequence[EngineSequence]) -> None:
        for sequence in sequences:
            self.engine.add(sequence)
        self.engine.run_until_done()
        for sequence in sequences:
            if sequence.error is not None:
                raise sequence.error

    def _sequences(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling,
        stop_tokens: frozenset[int],
    ) -> list[EngineSequence]:
        if isinstance(prompts, Prompt):
            raise RequestError("prompts is a sequence of rows; write [Prompt(...)]")
        if not prompts:
            raise RequestError("the batch is empty: give at least one prompt")
        sequences = []
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, Prompt):
                raise RequestError(
                    f"row {row}: is of type {type(prompt).__name__}; write Prompt(tokens, adapter)"
                )
            try:
                tokens = check_tokens(
                    prompt.tokens, max_new_tokens, self.config, self.runtime.cache
                )
                if prompt.adapter is not None:
                    self.runner.registry.current(prompt.adapter)
            except MoeLoraError as error:
                raise type(error)(f"row {row}: {error}") from error
            sequences.append(
                EngineSequence(
                    tokens=tokens,
                    num_prompt=len(tokens),
                    adapter=prompt.adapter,
                    max_new_tokens=max_new_tokens,
                    sampling=sampling,
                    stop_tokens=stop_tokens,
                )
            )
        return sequences
