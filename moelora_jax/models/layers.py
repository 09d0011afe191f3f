"""Parts that the models share: norms, rotary positions, linear layers with LoRA, attention, MLP.

Parameters are stacked over layers, and a part is called with the index of the layer to use, so that
one loop over layers is the whole model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int32

from moelora_jax.buckets import Batch
from moelora_jax.config import ModelConfig
from moelora_jax.moe import MoeParams, linear, moe_lora
from moelora_jax.workspace import DENSE_TILE_ROWS, KVCache, Workspace
from moelora_kernels import (
    ExpertPages,
    SitePages,
    TokenSort,
    dense_lora,
    paged_attention,
    query_tiles,
    sort_tokens,
    write_cache,
)

#: Page tables and pools of every enabled site, by site name.
Pages = dict[str, SitePages]


class Step(NamedTuple):
    """What every layer of one forward pass needs to know about the batch.

    Attributes:
        batch: the packed batch.
        pages: resident adapters; None runs the base model.
        workspace: references to the workspaces.
        cache: references to the KV cache.
        adapter_sort: tokens sorted by adapter; None for the base model.
        query_tiles: tile map of the queries for attention.
        query_tile_rows: tokens of a full tile of that map.
        block_of_token: int32 ``[tokens]``, cache block that each token's keys go to.
        offset_of_token: int32 ``[tokens]``, position within that block.
    """

    batch: Batch
    pages: Pages | None
    workspace: Workspace
    cache: KVCache
    adapter_sort: TokenSort | None
    query_tiles: Array
    query_tile_rows: int
    block_of_token: Array
    offset_of_token: Array


def prepare_step(batch: Batch, cache: KVCache, workspace: Workspace, pages: Pages | None) -> Step:
    """Derive from a batch, once, what all layers use.

    Args:
        batch: the packed batch.
        cache: references to the KV cache.
        workspace: references to the workspaces.
        pages: resident adapters; None runs the base model.
    """
    tokens, sequences = batch.tokens.shape[0], batch.query_counts.shape[0]
    # In decode every tile has one token.
    tile_rows = 1 if tokens == sequences else 16
    block_size = cache.keys.shape[2]
    adapter_sort = None
    if pages:
        num_adapters = next(iter(pages.values())).num_adapters
        adapter_sort = sort_tokens(
            jnp.zeros((tokens, 1), jnp.int32),
            batch.adapter_of_token,
            batch.num_tokens,
            num_experts=1,
            num_adapters=num_adapters,
            tile_rows=DENSE_TILE_ROWS,
            out=workspace.adapter_sort,
        )
    real = jnp.arange(tokens, dtype=jnp.int32) < batch.num_tokens
    block = batch.block_table[batch.sequence_of_token, batch.positions // block_size]
    return Step(
        batch=batch,
        pages=pages,
        workspace=workspace,
        cache=cache,
        adapter_sort=adapter_sort,
        query_tiles=query_tiles(batch.query_counts, tokens, tile_rows),
        query_tile_rows=tile_rows,
        # Block 0 belongs to no sequence.
        block_of_token=jnp.where(real, block, 0),
        offset_of_token=batch.positions % block_size,
    )


def rms_norm(
    x: Float[Array, "... width"], weight: Float[Array, " width"], epsilon: float
) -> Float[Array, "... width"]:
    """``weight · x / sqrt(mean(x²) + epsilon)``, normalised in float32."""
    values = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(values), axis=-1, keepdims=True)
    return weight * (values * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)


def rotate(
    x: Float[Array, "tokens heads head_dim"], positions: Int32[Array, " tokens"], theta: float
) -> Float[Array, "tokens heads head_dim"]:
    """Rotary position embedding, in float32, of pairs half a head apart as in transformers."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class LinearStack(nnx.Module):
    """One linear layer of every decoder layer, with LoRA.

    Attributes:
        weight: ``[layers, out, in]``.
        bias: ``[layers, out]`` or None.
    """

    def __init__(
        self,
        site: str,
        layers: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.site = site
        self.weight = random_param(rngs, (layers, out_features, in_features), dtype)
        self.bias = nnx.Param(jnp.zeros((layers, out_features), dtype)) if bias else None

    def __call__(self, x: Float[Array, "tokens in"], layer: Array, step: Step) -> Array:
        """The layer's output with each token's adapter, ``[tokens, out]``."""
        y = linear(x, self.weight[layer])
        if self.bias is not None:
            y = y + self.bias[layer]
        if step.pages is None or step.adapter_sort is None or self.site not in step.pages:
            return y
        pages = step.pages[self.site]
        return dense_lora(x, y, pages, step.adapter_sort, layer, tile_rows=DENSE_TILE_ROWS)


class Attention(nnx.Module):
    """Grouped-query attention of every layer, with rotary positions and normalised heads.

    Attributes:
        q_norm: ``[layers, head_dim]``; likewise ``k_norm``.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        layers, hidden = config.num_layers, config.hidden_size
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

        def projection(site: str, in_features: int, out_features: int) -> LinearStack:
            return LinearStack(
                site,
                layers,
                in_features,
                out_features,
                bias=config.attention_bias,
                dtype=dtype,
                rngs=rngs,
            )

        self.q_proj = projection("q_proj", hidden, queries)
        self.k_proj = projection("k_proj", hidden, keys)
        self.v_proj = projection("v_proj", hidden, keys)
        self.o_proj = projection("o_proj", queries, hidden)
        self.q_norm = nnx.Param(jnp.ones((layers, config.head_dim), dtype))
        self.k_norm = nnx.Param(jnp.ones((layers, config.head_dim), dtype))

    def __call__(self, x: Float[Array, "tokens hidden"], layer: Array, step: Step) -> Array:
        """Attend to the cached positions, these tokens included; ``[tokens, hidden]``."""
        config, positions = self.config, step.batch.positions

        def heads(y: Array) -> Array:
            return y.reshape(x.shape[0], -1, config.head_dim)

        query = heads(self.q_proj(x, layer, step))
        key = heads(self.k_proj(x, layer, step))
        value = heads(self.v_proj(x, layer, step))
        query = rms_norm(query, self.q_norm[layer], config.norm_eps)
        key = rms_norm(key, self.k_norm[layer], config.norm_eps)
        query = rotate(query, positions, config.rope_theta)
        key = rotate(key, positions, config.rope_theta)

        keys, values = step.cache
        write_cache(keys, key, layer, step.block_of_token, step.offset_of_token)
        write_cache(values, value, layer, step.block_of_token, step.offset_of_token)
        attended = paged_attention(
            query,
            keys,
            values,
            layer,
            step.batch.block_table,
            positions,
            step.query_tiles,
            tile_rows=step.query_tile_rows,
            scale=config.head_dim**-0.5,
        )
        return self.o_proj(attended.reshape(x.shape[0], -1), layer, step)


class DenseMlp(nnx.Module):
    """The gated MLP of the layers that have no routed experts.

    Attributes:
        gate_proj: ``[dense layers, intermediate, hidden]``; likewise ``up_proj``.
        down_proj: ``[dense layers, hidden, intermediate]``.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        layers = len(config.dense_layers)
        hidden, inner = config.hidden_size, config.dense_intermediate_size
        self.gate_proj = random_param(rngs, (layers, inner, hidden), dtype)
        self.up_proj = random_param(rngs, (layers, inner, hidden), dtype)
        self.down_proj = random_param(rngs, (layers, hidden, inner), dtype)

    def __call__(self, x: Float[Array, "tokens hidden"], index: Array) -> Array:
        """The MLP of the ``index``-th dense layer."""
        gate = linear(x, self.gate_proj[index])
        hidden = jax.nn.silu(gate) * linear(x, self.up_proj[index])
        return linear(hidden, self.down_proj[index])


class Experts(nnx.Module):
    """Router and routed experts of the MoE layers, with LoRA.

    Attributes:
        router: ``[moe layers, experts, hidden]``.
        gate_up: ``[moe layers, experts, 2, intermediate, hidden]``; index 0 is gate, 1 is up.
        down: ``[moe layers, experts, hidden, intermediate]``.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config.moe
        layers, experts = len(config.moe_layers), config.moe.num_experts
        hidden, inner = config.hidden_size, config.moe.intermediate_size
        self.router = random_param(rngs, (layers, experts, hidden), dtype)
        self.gate_up = random_param(rngs, (layers, experts, 2, inner, hidden), dtype)
        self.down = random_param(rngs, (layers, experts, hidden, inner), dtype)

    def __call__(self, x: Float[Array, "tokens hidden"], index: Array, step: Step) -> Array:
        """The ``index``-th MoE layer."""
        pages = None
        if step.pages and "gate_proj" in step.pages:
            pages = ExpertPages(
                step.pages["gate_proj"], step.pages["up_proj"], step.pages["down_proj"]
            )
        return moe_lora(
            x,
            MoeParams(self.router[...], self.gate_up[...], self.down[...]),
            index,
            self.config,
            num_tokens=step.batch.num_tokens,
            adapter_of_token=None if pages is None else step.batch.adapter_of_token,
            pages=pages,
            workspace=step.workspace.moe,
        )


def random_param(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param[Array]:
    """Normal weights whose products keep the variance of their input."""
    values = jax.random.normal(rngs.params(), shape, jnp.float32) * shape[-1] ** -0.5
    return nnx.Param(values.astype(dtype))
