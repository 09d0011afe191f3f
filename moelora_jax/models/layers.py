"""Parts that the models share: norms, rotary positions, linear layers with LoRA, attention, MLP.

Parameters are stacked over layers, and a part is called with the index of the layer to use, so that
one loop over layers is the whole model.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int32

from moelora_jax.buckets import Batch
from moelora_jax.config import ModelConfig, RopeConfig
from moelora_jax.moe import MoeParams, moe_experts, moe_router
from moelora_jax.workspace import DENSE_TILE_ROWS, KVCache, Workspace
from moelora_kernels import (
    Buffer,
    ExpertPages,
    LinearMap,
    SitePages,
    TokenSort,
    linear_lora,
    paged_attention,
    prepare_heads,
    query_tile_rows,
    query_tiles,
    rms_norm,
    sort_tokens,
)

#: Page tables and pools of every enabled site, by site name.
Pages = dict[str, SitePages]


class Taps(NamedTuple):
    """References that a forward pass writes what its MoE layers compute to, for research.

    Attributes:
        moe_input: float32 ``[moe layers, tokens, hidden]``, after the norm.
        router_logits: float32 ``[moe layers, tokens, experts]``.
        experts: int32 ``[moe layers, tokens, top_k]``, chosen by each token.
        weights: float32 ``[moe layers, tokens, top_k]``, of the chosen experts.
        moe_output: float32 ``[moe layers, tokens, hidden]``, of the routed experts alone.
    """

    moe_input: Buffer
    router_logits: Buffer
    experts: Buffer
    weights: Buffer
    moe_output: Buffer


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
        rotation: float32 cosine and sine of the angle of each pair of features, of each token.
        taps: where MoE layers write what they compute; None, as in serving, writes nothing.
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
    rotation: tuple[Array, Array]
    taps: Taps | None


def prepare_step(
    config: ModelConfig,
    batch: Batch,
    cache: KVCache,
    workspace: Workspace,
    pages: Pages | None,
    taps: Taps | None = None,
) -> Step:
    """Derive from a batch, once, what all layers use; its tokens are added to the cache.

    Args:
        config: the model.
        batch: the packed batch.
        cache: references to the KV cache.
        workspace: references to the workspaces.
        pages: resident adapters; None runs the base model.
        taps: references for what the MoE layers compute; None for none.
    """
    tokens, sequences = batch.tokens.shape[0], batch.query_counts.shape[0]
    # In decode every tile has one token.
    is_decode = tokens == sequences
    tile_rows = 1 if is_decode else query_tile_rows(tokens, config.num_heads, config.num_kv_heads)
    block_size = cache.keys.shape[2]
    adapter_sort = None
    if pages:
        adapter_sort = sort_by_adapter(batch.adapter_of_token, batch.num_tokens, workspace, pages)
    real = jnp.arange(tokens, dtype=jnp.int32) < batch.num_tokens
    block = batch.block_table[batch.sequence_of_token, batch.positions // block_size]
    block = jnp.where(real, block, 0)  # Block 0 belongs to no sequence.
    offset = batch.positions % block_size
    cache.tokens[block, offset] = batch.tokens
    return Step(
        batch=batch,
        pages=pages,
        workspace=workspace,
        cache=cache,
        adapter_sort=adapter_sort,
        query_tiles=query_tiles(batch.query_counts, tokens, tile_rows),
        query_tile_rows=tile_rows,
        block_of_token=block,
        offset_of_token=offset,
        rotation=rotation(batch.positions, config.rope, config.rotated_features),
        taps=taps,
    )


def sort_by_adapter(
    adapter_of_row: Int32[Array, " rows"],
    num_rows: Int32[Array, ""],
    workspace: Workspace,
    pages: Pages,
) -> TokenSort:
    """Rows sorted by adapter, for dense LoRA, in the workspace: the next sort ends this one.

    Args:
        adapter_of_row: adapter slot of each row, or -1.
        num_rows: rows that are real; the others come behind them.
        workspace: references to the workspaces.
        pages: resident adapters, at one site at least.
    """
    return sort_tokens(
        jnp.zeros((adapter_of_row.shape[0], 1), jnp.int32),
        adapter_of_row,
        num_rows,
        num_experts=1,
        num_adapters=next(iter(pages.values())).num_adapters,
        tile_rows=DENSE_TILE_ROWS,
        out=workspace.adapter_sort,
    )


def rotation(
    positions: Int32[Array, " tokens"], rope: RopeConfig, width: int
) -> tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]:
    """Cosine and sine of the angle of each pair of ``width`` features, for :func:`rotate`."""
    angle = positions.astype(jnp.float32)[:, None] * rope_frequencies(rope, width)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if rope.yarn is not None:
        cos, sin = cos * rope.yarn.attention_factor, sin * rope.yarn.attention_factor
    return cos, sin


def rope_frequencies(rope: RopeConfig, width: int) -> np.ndarray:
    """By how many radians each pair of ``width`` features turns per position, ``[width // 2]``."""
    pair = np.arange(width // 2)
    frequency = rope.theta ** (-2 * pair / width)
    yarn = rope.yarn
    if yarn is not None:

        def pair_of(turns: float) -> float:
            """The pair, in fractions, that turns so often within the original length."""
            wavelength = yarn.original_length / (turns * 2 * math.pi)
            return width * math.log(wavelength) / (2 * math.log(rope.theta))

        low, high = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        slowed = np.clip((pair - low) / (high - low or 1e-3), 0, 1)
        frequency = frequency * (1 - slowed) + frequency / yarn.factor * slowed
    return frequency.astype(np.float32)


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
        return project(x, [self], layer, step)


def project(
    x: Float[Array, "tokens in"], maps: Sequence[LinearStack], layer: Array, step: Step
) -> Float[Array, "tokens out"]:
    """The outputs of linear layers of one input, with each token's adapter, side by side."""
    linear_maps = [
        LinearMap(
            m.weight[...],
            None if m.bias is None else m.bias[...],
            None if step.pages is None else step.pages.get(m.site),
        )
        for m in maps
    ]
    return linear_lora(
        x,
        linear_maps,
        layer,
        sort=step.adapter_sort,
        tile_rows=DENSE_TILE_ROWS,
        signals=step.workspace.moe.signals,
    )


def attention_projections(
    config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> dict[str, LinearStack]:
    """The linear maps of attention in every layer, by name."""
    return {
        name: LinearStack(
            name, config.num_layers, in_features, out_features, bias=bias, dtype=dtype, rngs=rngs
        )
        for name, in_features, out_features, bias in config.attention_projections()
    }


def attend(
    query: Float[Array, "tokens heads head_dim"],
    layer: Array,
    step: Step,
    *,
    scale: float,
    window: Array | None = None,
    sinks: Array | None = None,
) -> Float[Array, "tokens out"]:
    """Attend to the cached positions, those of this batch included.

    Args:
        query: of each token.
        layer: the model's layer index.
        step: the batch.
        scale: factor on the scores.
        window: see :func:`moelora_kernels.paged_attention`.
        sinks: likewise.

    Returns:
        The heads of each token, one after another.
    """
    attended = paged_attention(
        query,
        step.cache.keys,
        step.cache.values,
        layer,
        step.batch.block_table,
        step.batch.positions,
        step.query_tiles,
        tile_rows=step.query_tile_rows,
        scale=scale,
        window=window,
        sinks=sinks,
    )
    return attended.reshape(query.shape[0], -1)


class Attention(nnx.Module):
    """Grouped-query attention of every layer, with rotary positions and what the config asks for.

    Attributes:
        q_norm: ``[layers, width]`` of one head or of the whole projection; likewise ``k_norm``.
            None without ``qk_norm``.
        sinks: ``[layers, heads]``; None without ``attention_sinks``.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        layers = config.num_layers

        def norm(projection: LinearStack) -> nnx.Param[Array] | None:
            if config.qk_norm is None:
                return None
            width = config.head_dim if config.qk_norm == "head" else projection.weight.shape[1]
            return nnx.Param(jnp.ones((layers, width), dtype))

        projections = attention_projections(config, dtype=dtype, rngs=rngs)
        self.q_proj = projections["q_proj"]
        self.k_proj = projections["k_proj"]
        self.v_proj = projections["v_proj"]
        self.o_proj = projections["o_proj"]
        self.q_norm = norm(self.q_proj)
        self.k_norm = norm(self.k_proj)
        sinks = nnx.Param(jnp.zeros((layers, config.num_heads), dtype))
        self.sinks = sinks if config.attention_sinks else None

    def __call__(self, x: Float[Array, "tokens hidden"], layer: Array, step: Step) -> Array:
        """Attend to the cached positions, these tokens included; ``[tokens, hidden]``."""
        config = self.config
        projected = project(x, [self.q_proj, self.k_proj, self.v_proj], layer, step)
        in_head = config.qk_norm == "head"
        query = prepare_heads(
            projected if in_head else self._normalised(projected, layer),
            step.cache.keys,
            step.cache.values,
            layer,
            step.block_of_token,
            step.offset_of_token,
            *step.rotation,
            query_norm=self.q_norm[...] if in_head and self.q_norm is not None else None,
            key_norm=self.k_norm[...] if in_head and self.k_norm is not None else None,
            epsilon=config.norm_eps,
        )
        attended = attend(
            query,
            layer,
            step,
            scale=config.head_dim**-0.5,
            window=self._window(layer),
            sinks=None if self.sinks is None else self.sinks[layer],
        )
        return self.o_proj(attended, layer, step)

    def _normalised(self, projected: Array, layer: Array) -> Float[Array, "tokens features"]:
        """Queries, keys and values where the model normalises whole projections, or clips."""
        config = self.config
        if self.q_norm is not None and self.k_norm is not None:
            ends = [config.num_heads * config.head_dim, -config.num_kv_heads * config.head_dim]
            query, key, value = jnp.split(projected, ends, axis=1)
            query = rms_norm(query, self.q_norm[layer], config.norm_eps)
            key = rms_norm(key, self.k_norm[layer], config.norm_eps)
            projected = jnp.concatenate([query, key, value], axis=1)
        if config.clip_qkv is None:
            return projected
        return jnp.clip(projected, -config.clip_qkv, config.clip_qkv)

    def _window(self, layer: Array) -> Int32[Array, ""] | None:
        """Positions that a token of this layer attends to; None if no layer has a limit."""
        window = self.config.sliding_window
        if window is None:
            return None
        windows = np.full(self.config.num_layers, np.iinfo(np.int32).max, np.int32)
        windows[list(self.config.sliding_layers)] = window
        return jnp.asarray(windows)[layer]


class GatedMlp(nnx.Module):
    """A gated MLP for all tokens, in some layers: a dense one, or the experts that all share.

    Args:
        prefix: of the names of its sites.
        layers: how many layers have it.
        hidden: width of the residual stream.
        inner: width inside.
    """

    def __init__(
        self,
        prefix: str,
        layers: int,
        hidden: int,
        inner: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        def projection(name: str, in_features: int, out_features: int) -> LinearStack:
            site = f"{prefix}.{name}"
            return LinearStack(site, layers, in_features, out_features, dtype=dtype, rngs=rngs)

        self.gate_proj = projection("gate_proj", hidden, inner)
        self.up_proj = projection("up_proj", hidden, inner)
        self.down_proj = projection("down_proj", inner, hidden)

    def __call__(self, x: Float[Array, "tokens hidden"], index: Array, step: Step) -> Array:
        """The MLP of the ``index``-th layer that has it."""
        gate, up = jnp.split(project(x, [self.gate_proj, self.up_proj], index, step), 2, axis=1)
        hidden = jax.nn.silu(gate) * up
        return self.down_proj(hidden, index, step)


class Experts(nnx.Module):
    """Router and routed experts of the MoE layers, with LoRA.

    Attributes:
        router: ``[moe layers, experts, hidden]``.
        router_bias: ``[moe layers, experts]``; None where the model has none; so are the others.
        correction_bias: float32 ``[moe layers, experts]``.
        gate_up: ``[moe layers, experts, 2, intermediate, hidden]``; index 0 is gate, 1 is up.
        gate_up_bias: ``[moe layers, experts, 2, intermediate]``.
        down: ``[moe layers, experts, hidden, intermediate]``.
        down_bias: ``[moe layers, experts, hidden]``.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config.moe
        layers, experts = len(config.moe_layers), config.moe.num_experts
        hidden, inner = config.hidden_size, config.moe.intermediate_size

        def bias(exists: bool, *shape: int) -> nnx.Param[Array] | None:
            return nnx.Param(jnp.zeros((layers, experts, *shape), dtype)) if exists else None

        self.router = random_param(rngs, (layers, experts, hidden), dtype)
        self.router_bias = bias(config.moe.router_bias)
        # The choice among scores that are close to each other needs more than bfloat16.
        correction_bias = nnx.Param(jnp.zeros((layers, experts), jnp.float32))
        self.correction_bias = correction_bias if config.moe.correction_bias else None
        self.gate_up = random_param(rngs, (layers, experts, 2, inner, hidden), dtype)
        self.gate_up_bias = bias(config.moe.expert_bias, 2, inner)
        self.down = random_param(rngs, (layers, experts, hidden, inner), dtype)
        self.down_bias = bias(config.moe.expert_bias, hidden)

    def __call__(
        self, x: Float[Array, "tokens hidden"], index: Array, step: Step, out: Buffer
    ) -> None:
        """The ``index``-th MoE layer, written to ``out``."""
        pages = None
        if step.pages and "gate_proj" in step.pages:
            pages = ExpertPages(
                step.pages["gate_proj"], step.pages["up_proj"], step.pages["down_proj"]
            )
        params = self._params()
        logits, experts, weights = moe_router(
            x,
            params,
            index,
            self.config,
            pages=None if step.pages is None else step.pages.get("router"),
            sort=step.adapter_sort,
            sort_tile_rows=DENSE_TILE_ROWS,
            signals=step.workspace.moe.signals,
        )
        y = moe_experts(
            x,
            experts,
            weights,
            params,
            index,
            self.config,
            num_tokens=step.batch.num_tokens,
            adapter_of_token=None if pages is None else step.batch.adapter_of_token,
            pages=pages,
            workspace=step.workspace.moe,
            out=out,
        )
        if step.taps is not None:
            values = Taps(x, logits, experts, weights * self.config.routed_scaling, y[...])
            for tap, value in zip(step.taps, values, strict=True):
                tap[index] = value.astype(tap.dtype)

    def _params(self) -> MoeParams:
        def values(param: nnx.Param[Array] | None) -> Array | None:
            return None if param is None else param[...]

        return MoeParams(
            router=self.router[...],
            gate_up=self.gate_up[...],
            down=self.down[...],
            router_bias=values(self.router_bias),
            correction_bias=values(self.correction_bias),
            gate_up_bias=values(self.gate_up_bias),
            down_bias=values(self.down_bias),
        )


def random_param(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param[Array]:
    """Normal weights whose products keep the variance of their input."""
    values = jax.random.normal(rngs.params(), shape, jnp.float32) * shape[-1] ** -0.5
    return nnx.Param(values.astype(dtype))
