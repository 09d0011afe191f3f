"""What the MoE layers compute for a batch, layer by layer: for research, not for serving."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moelora_jax.buckets import BatchLayout
from moelora_jax.config import BucketConfig, ModelConfig, RuntimeConfig
from moelora_jax.engine.runner import Runner
from moelora_jax.models.layers import Pages, Taps
from moelora_jax.workspace import allocate, device_state_shapes, open_state


@dataclass(frozen=True, eq=False)
class Trace:
    """What a model computed for one prompt, as NumPy arrays.

    Everything but ``experts`` is float32, in which every compute dtype has its exact value. The
    arrays of layers have one entry for each MoE layer; ``moe_layers`` tells which layer it is.

    Attributes:
        tokens: the prompt.
        adapter: its adapter, or None.
        moe_layers: the model's layer indices that have experts.
        moe_input: ``[layers, tokens, hidden]``, after the norm.
        router_logits: ``[layers, tokens, experts]``.
        experts: int32 ``[layers, tokens, top_k]``, those that each token chose.
        weights: ``[layers, tokens, top_k]``, the factors on the outputs of these experts, the
            model's ``routed_scaling`` included.
        moe_output: ``[layers, tokens, hidden]``, the weighted sum of these experts' outputs.
        hidden: ``[tokens, hidden]``, after the final norm.
        logits: ``[tokens, vocabulary]``.
    """

    tokens: tuple[int, ...]
    adapter: str | None
    moe_layers: tuple[int, ...]
    moe_input: np.ndarray
    router_logits: np.ndarray
    experts: np.ndarray
    weights: np.ndarray
    moe_output: np.ndarray
    hidden: np.ndarray
    logits: np.ndarray


class _Computed(NamedTuple):
    """Of all tokens of a batch."""

    taps: Taps
    hidden: Array
    logits: Array


def trace_rows(runner: Runner, rows: Sequence[tuple[Sequence[int], str | None]]) -> list[Trace]:
    """See :meth:`~moelora_jax.engine.llm.LLM.trace`.

    Args:
        runner: the model and its adapters; its state and programs are left alone.
        rows: valid tokens and the name of a loaded adapter, or None.
    """
    slots = runner.registry.acquire([adapter for _, adapter in rows])
    lengths = [len(tokens) for tokens, _ in rows]
    # Powers of two, so that batches of similar size share a program.
    runtime = replace(
        runner.runtime,
        buckets=BucketConfig(
            decode=(_power_of_two(len(rows)),), prefill=(max(16, _power_of_two(sum(lengths))),)
        ),
        cache=replace(
            runner.runtime.cache, max_length=_power_of_two(max(lengths)), num_blocks=None
        ),
    )
    layout = _layout(runtime)
    packed = layout.padding()
    batch = layout.unpack(packed)
    ends = np.cumsum(lengths)
    for row, ((tokens, _), slot, end) in enumerate(zip(rows, slots, ends, strict=True)):
        part = slice(end - len(tokens), end)
        batch.tokens[part] = tokens
        batch.positions[part] = range(len(tokens))
        batch.adapter_of_token[part] = slot
        batch.sequence_of_token[part] = row
        batch.query_counts[row] = len(tokens)
        batch.last_token[row] = end - 1
        # Block 0 is for padding.
        first = 1 + row * layout.blocks_per_sequence
        batch.block_table[row] = range(first, first + layout.blocks_per_sequence)
    batch.num_tokens[...] = ends[-1]

    graph, params = nnx.split(runner.model)
    pages = runner.pool.device_state() if max(slots) >= 0 else None
    computed = jax.device_get(
        _run(graph, params, pages, packed, config=runner.config, runtime=runtime)
    )
    traces = []
    for (tokens, adapter), end in zip(rows, ends, strict=True):
        part = slice(end - len(tokens), end)
        traces.append(
            Trace(
                tokens=tuple(tokens),
                adapter=adapter,
                moe_layers=runner.config.moe_layers,
                **{name: tap[:, part] for name, tap in computed.taps._asdict().items()},
                hidden=computed.hidden[part],
                logits=computed.logits[part],
            )
        )
    return traces


def _layout(runtime: RuntimeConfig) -> BatchLayout:
    (bucket,) = runtime.buckets.prefill_buckets()
    return BatchLayout(bucket, runtime.cache.blocks_per_sequence)


@partial(jax.jit, static_argnames=("graph", "config", "runtime"))
def _run(
    graph: Any,
    params: Any,
    pages: Pages | None,
    packed: Array,
    *,
    config: ModelConfig,
    runtime: RuntimeConfig,
) -> _Computed:
    """The model over a batch, in memory of its own."""
    model: Any = nnx.merge(graph, params)
    dtype = model.embedding.dtype
    state = open_state(allocate(device_state_shapes(config, runtime, dtype)))
    batch = _layout(runtime).unpack(packed)
    taps = _new_taps(config, runtime.buckets.max_tokens)
    hidden = model(batch, state.cache, state.workspace, pages, taps)
    return _Computed(
        taps=jax.tree.map(jax.freeze, taps),
        hidden=hidden.astype(jnp.float32),
        logits=model.logits(hidden, batch, state.workspace, pages),
    )


def _new_taps(config: ModelConfig, tokens: int) -> Taps:
    layers, moe = len(config.moe_layers), config.moe

    def new(width: int, dtype: Any = jnp.float32) -> Any:
        return jax.new_ref(jnp.zeros((layers, tokens, width), dtype))

    return Taps(
        moe_input=new(moe.hidden_size),
        router_logits=new(moe.num_experts),
        experts=new(moe.top_k, jnp.int32),
        weights=new(moe.top_k),
        moe_output=new(moe.hidden_size),
    )


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()
