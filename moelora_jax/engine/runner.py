"""The device side: parameters, adapter pages, donated state, and the compiled programs."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from moelora_jax.adapters.pages import PagePool
from moelora_jax.adapters.registry import AdapterRegistry
from moelora_jax.buckets import (
    BatchLayout,
    CompileReport,
    Kind,
    ProgramKey,
    Programs,
    program_keys,
)
from moelora_jax.config import ModelConfig, RuntimeConfig
from moelora_jax.engine.adjusting import adjusted
from moelora_jax.engine.sampling import Sampled, log_probabilities, sample
from moelora_jax.errors import CapacityError
from moelora_jax.workspace import (
    DeviceState,
    MemoryPlan,
    addresses,
    allocate,
    close_state,
    device_state_shapes,
    num_bytes,
    open_state,
)


class Runner:
    """Runs packed batches of one model.

    Args:
        model: a model of :mod:`moelora_jax.models`; its parameters stay where they are.
        config: the model's description.
        runtime: adapter limits, buckets and cache.
        dtype: compute dtype, that of the parameters.

    Attributes:
        registry: the adapters, resident or not.
        state: workspaces and KV cache; donated to every program and returned by it.
        programs: the compiled programs.

    Raises:
        CapacityError: the cache is longer than the positions that the model was made for.
    """

    def __init__(
        self, model: nnx.Module, config: ModelConfig, runtime: RuntimeConfig, dtype: DTypeLike
    ) -> None:
        if runtime.cache.max_length > config.max_position:
            raise CapacityError(
                f"CacheConfig.max_length is {runtime.cache.max_length}, but the model was made for "
                f"at most {config.max_position} positions"
            )
        self.config = config
        self.runtime = runtime
        self._graph, self._params = nnx.split(model)
        self.pool = PagePool(config.lora_sites(), runtime.lora, dtype)
        self.pool.warm_up()
        self.registry = AdapterRegistry(self.pool, max_host_bytes=runtime.lora.max_host_bytes)
        self._state_shapes = device_state_shapes(config, runtime, dtype)
        self.state = allocate(self._state_shapes)
        self.programs = Programs(self._step_function, self._arguments)
        biases = self._state_shapes.biases
        row = jax.ShapeDtypeStruct(biases.shape[1:], biases.dtype)
        self._write_biases = _write_biases.lower(biases, np.int32(0), row).compile()

    @property
    def model(self) -> nnx.Module:
        """The model, around the parameters that all programs use."""
        return nnx.merge(self._graph, self._params)

    def layout(self, key: ProgramKey) -> BatchLayout:
        """How batches of a program are packed."""
        return BatchLayout(key.bucket, self.runtime.cache.blocks_per_sequence)

    def warm_up(
        self, kinds: Iterable[Kind] = ("prefill", "decode"), *, progress: bool = False
    ) -> CompileReport:
        """Compile all programs of the given kinds; nothing is compiled for a batch after that."""
        return self.programs.compile(program_keys(self.runtime.buckets, kinds), progress=progress)

    def run(self, key: ProgramKey, packed: np.ndarray) -> Sampled | Array:
        """Run one step; returns before the device has run it.

        Args:
            key: the program.
            packed: a batch in the program's layout; it must not be changed after that.

        Returns:
            On the device: each row's next token, or for ``score`` float32 ``[tokens, vocab]``
            logits.
        """
        pages = self.pool.device_pages() if key.lora else None
        # As it is: jax.device_put before it would take about as long again.
        self.state, out = self.programs[key](self.state, self._params, pages, packed)
        if isinstance(out, Sampled):
            # Now, or the copy would queue behind the next step. It is the one read that is planned.
            with jax.transfer_guard_device_to_host("allow"):
                out.tokens.copy_to_host_async()
        return out

    def write_biases(self, seat: int, biases: np.ndarray) -> None:
        """Set the biases of a seat, for all steps that are run from now on.

        Args:
            seat: of a sequence.
            biases: int32 ``[2, MAX_BIASES]``, as the device state has them.
        """
        written = self._write_biases(self.state.biases, np.int32(seat), biases)
        self.state = self.state._replace(biases=written)

    def recover(self) -> None:
        """Make the device state anew if a step has failed and taken it along."""
        try:
            if not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
                jax.block_until_ready(self.state)
                return
        except RuntimeError:
            pass  # The step that returned this state has failed on the device.
        self.state = allocate(self._state_shapes)

    def memory_plan(self) -> MemoryPlan:
        """Bytes on the device, by what they are for, as allocated and compiled so far."""
        pools = {pool.width: pool.total_bytes for pool in self.pool.usage()}
        vocabulary_pages = pools.pop(self.config.vocab_size, 0)
        return MemoryPlan(
            weights=num_bytes(self._params),
            adapter_pages=sum(pools.values()),
            vocabulary_pages=vocabulary_pages,
            adapter_tables=self.pool.table_bytes,
            workspaces=num_bytes((self.state.workspace, self.state.sampled, self.state.biases)),
            temporaries=self.programs.temporary_bytes,
            kv_cache=num_bytes(self.state.cache),
        )

    def addresses(self) -> dict[str, tuple[int, ...]]:
        """Device addresses of everything that is updated in place."""
        return {
            "workspaces": addresses((self.state.workspace, self.state.biases)),
            "kv_cache": addresses(self.state.cache),
            "adapter_pages": addresses(self.pool.device_pages()),
        }

    def _step_function(self, key: ProgramKey) -> Callable[..., Any]:
        layout, graph, pool = self.layout(key), self._graph, self.pool

        def step(
            state: DeviceState, params: Any, pages: Any, packed: Array
        ) -> tuple[DeviceState, Sampled | Array]:
            opened, batch = open_state(state), layout.unpack(packed)
            kept = opened.sampled[...]
            tokens = jnp.where(batch.tokens < 0, kept[-1 - batch.tokens], batch.tokens)
            batch = batch._replace(tokens=tokens)
            model: Any = nnx.merge(graph, params)
            by_site = None if pages is None else pool.by_site(pages)
            hidden = model(batch, opened.cache, opened.workspace, by_site)
            last_only = key.kind != "score"
            logits = model.logits(hidden, batch, opened.workspace, by_site, last_only=last_only)
            if not last_only:
                return close_state(opened), logits
            cached, biases = opened.cache.tokens[...], opened.biases[...]

            def choose(logits: Array, *, adjust: bool) -> Array:
                batch = layout.unpack(packed)  # Here, or every step would copy each field.
                if adjust:
                    # Behind the barrier the choice is compiled as it is without adjusting.
                    logits = adjusted(logits, cached, biases, batch)
                    logits = lax.optimization_barrier(logits)
                return sample(
                    logits,
                    batch.temperature,
                    batch.top_k,
                    batch.top_p,
                    batch.min_p,
                    batch.seed,
                    batch.positions[batch.last_token],
                )

            # A choice in each branch: logits that come out of one would be copied in every step.
            chosen = lax.cond(
                batch.adjusts > 0,
                partial(choose, adjust=True),
                partial(choose, adjust=False),
                logits,
            )
            opened.sampled[...] = kept.at[batch.seat].set(chosen, mode="drop")
            return close_state(opened), log_probabilities(logits, chosen, batch.logprobs)

        return step

    def _arguments(self, key: ProgramKey) -> tuple[Any, ...]:
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
            (self._params, self.pool.device_pages() if key.lora else None),
        )
        packed = jax.ShapeDtypeStruct((self.layout(key).size,), jnp.int32)
        return (self._state_shapes, *shapes, packed)


@partial(jax.jit, donate_argnums=0)
def _write_biases(biases: Array, seat: Array, of_seat: Array) -> Array:
    return biases.at[seat].set(of_seat)
