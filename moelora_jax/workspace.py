"""The donated device state: workspaces and the KV cache, allocated once, and the memory plan.

Every array here goes into each program as a donated argument and comes back at the same address.
Inside a program they are opened as references, which kernels write in place. All layers and all
programs share them; a smaller bucket uses the leading rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moelora_jax.config import ModelConfig, RuntimeConfig
from moelora_jax.moe import MoeWorkspace, moe_workspace_shapes
from moelora_kernels import Buffer, TokenSort, token_sort_shapes

#: Rows of a tile of tokens that have the same adapter, for dense LoRA.
DENSE_TILE_ROWS = 16

#: Tokens whose logits a sequence may change by numbers of its own; as many as OpenAI takes.
MAX_BIASES = 300


class Workspace(NamedTuple):
    """Intermediates of a forward pass.

    Attributes:
        moe: intermediates of one MoE layer.
        adapter_sort: tokens sorted by adapter, for dense LoRA; made once per step. None without
            LoRA.
    """

    moe: MoeWorkspace
    adapter_sort: TokenSort | None


class KVCache(NamedTuple):
    """Keys and values of all layers, as attention sees them, and the tokens that they are of.

    Attributes:
        keys: ``[layers, blocks, block_size, kv_heads, head_dim]``.
        values: ``[layers, blocks, block_size, kv_heads, value_dim]``.
        tokens: int32 ``[blocks, block_size]``.
    """

    keys: Buffer
    values: Buffer
    tokens: Buffer


class DeviceState(NamedTuple):
    """All that a program updates in place.

    Attributes:
        workspace: intermediates.
        cache: the KV cache.
        sampled: int32 ``[max_sequences]``, the token that was last sampled for each seat.
        biases: int32 ``[max_sequences, 2, MAX_BIASES]``, tokens of each seat, and the bits of the
            float32 numbers that are added to their logits.
    """

    workspace: Workspace
    cache: KVCache
    sampled: Buffer
    biases: Buffer


def device_state_shapes(
    model: ModelConfig, runtime: RuntimeConfig, dtype: DTypeLike
) -> DeviceState:
    """Shapes and dtypes of the device state, sized for the largest bucket."""
    tokens = runtime.buckets.max_tokens
    adapters = runtime.lora.max_adapters
    moe = moe_workspace_shapes(
        model.moe,
        tokens,
        num_adapters=adapters,
        max_rank=runtime.lora.rank_columns,
        dtype=dtype,
    )
    adapter_sort = token_sort_shapes(
        tokens, 1, num_experts=1, num_adapters=adapters, tile_rows=DENSE_TILE_ROWS
    )
    blocks = runtime.cache.total_blocks(runtime.buckets.max_sequences)
    heads = (model.num_layers, blocks, runtime.cache.block_size, model.num_kv_heads)
    keys: Any = jax.ShapeDtypeStruct((*heads, model.head_dim), jnp.dtype(dtype))
    values: Any = jax.ShapeDtypeStruct((*heads, model.value_dim), jnp.dtype(dtype))
    tokens_of_cache: Any = jax.ShapeDtypeStruct((blocks, runtime.cache.block_size), jnp.int32)
    seats = runtime.buckets.max_sequences
    sampled: Any = jax.ShapeDtypeStruct((seats,), jnp.int32)
    biases: Any = jax.ShapeDtypeStruct((seats, 2, MAX_BIASES), jnp.int32)
    return DeviceState(
        Workspace(moe, adapter_sort), KVCache(keys, values, tokens_of_cache), sampled, biases
    )


def allocate(shapes: DeviceState) -> DeviceState:
    """Zeroed arrays of the given shapes."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def open_state(state: DeviceState) -> DeviceState:
    """Inside a program: references to the donated arrays."""
    return jax.tree.map(jax.new_ref, state)


def close_state(state: DeviceState) -> DeviceState:
    """Inside a program: the arrays that leave it, in the places of those that came in."""
    return jax.tree.map(jax.freeze, state)


def addresses(tree: object) -> tuple[int, ...]:
    """Device addresses of all arrays of a pytree, to show that they never move."""
    return tuple(leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree))


def num_bytes(tree: object) -> int:
    """Bytes of all arrays, or shapes, of a pytree."""
    return sum(prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device while the model is served.

    Attributes:
        weights: parameters of the base model.
        adapter_pages: page pools, resident adapters or not.
        vocabulary_pages: the pool whose pages are as wide as the vocabulary, for adapters on the
            embedding and the head; 0 where these sites are not enabled.
        adapter_tables: page tables and scaling.
        workspaces: intermediates of the largest bucket.
        temporaries: the most that one program needs besides, while it runs.
        kv_cache: keys, values and their tokens.
    """

    weights: int
    adapter_pages: int
    vocabulary_pages: int
    adapter_tables: int
    workspaces: int
    temporaries: int
    kv_cache: int

    @property
    def total(self) -> int:
        return sum(size for _, size in self)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        for name in self.__dataclass_fields__:
            yield name, getattr(self, name)
