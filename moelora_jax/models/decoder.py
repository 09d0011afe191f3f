"""The decoder that the models share, and where its parameters are in a checkpoint of transformers.

Layers are attention and experts, or a dense MLP, each behind a norm and added to the residual
stream. What differs between the models is in :class:`~moelora_jax.config.ModelConfig`, and in the
names of their tensors.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from moelora_jax.buckets import Batch
from moelora_jax.config import ModelConfig
from moelora_jax.models.latent_attention import LatentAttention
from moelora_jax.models.layers import (
    Attention,
    Experts,
    GatedMlp,
    Pages,
    Step,
    Taps,
    prepare_step,
    random_param,
    sort_by_adapter,
)
from moelora_jax.models.parameters import Parameter, single, stacked
from moelora_jax.workspace import DENSE_TILE_ROWS, KVCache, Workspace
from moelora_kernels import Buffer, add_rms_norm, dense_lora, embedding_lora, linear, rms_norm

#: What the tensors of a layer are called.
LAYER = "model.layers.{layer}."


class Decoder(nnx.Module):
    """A whole model, parameters stacked over layers.

    Attributes:
        embedding: ``[vocab, hidden]``.
        attention_norm: ``[layers, hidden]``; likewise ``feed_forward_norm``.
        final_norm: ``[hidden]``.
        head: ``[vocab, hidden]``; None where the embedding is used.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        layers, hidden = config.num_layers, config.hidden_size
        self.embedding = random_param(rngs, (config.vocab_size, hidden), dtype)
        self.attention_norm = nnx.Param(jnp.ones((layers, hidden), dtype))
        attention = Attention if config.latent is None else LatentAttention
        self.attention = attention(config, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = nnx.Param(jnp.ones((layers, hidden), dtype))
        self.experts = Experts(config, dtype=dtype, rngs=rngs) if config.moe_layers else None

        def gated_mlp(prefix: str, layers: tuple[int, ...], inner: int) -> GatedMlp | None:
            if not (layers and inner):
                return None
            return GatedMlp(prefix, len(layers), hidden, inner, dtype=dtype, rngs=rngs)

        self.shared_experts = gated_mlp(
            "shared_experts", config.moe_layers, config.shared_intermediate_size
        )
        self.mlp = gated_mlp("mlp", config.dense_layers, config.dense_intermediate_size)
        self.final_norm = nnx.Param(jnp.ones((hidden,), dtype))
        tied = config.tie_embeddings
        self.head = None if tied else random_param(rngs, (config.vocab_size, hidden), dtype)

    def __call__(
        self,
        batch: Batch,
        cache: KVCache,
        workspace: Workspace,
        pages: Pages | None,
        taps: Taps | None = None,
    ) -> Float[Array, "tokens hidden"]:
        """Hidden states after the final norm; the batch is added to the cache.

        Args:
            batch: packed tokens of several sequences.
            cache: references to the KV cache.
            workspace: references to the workspaces.
            pages: resident adapters by site; None runs the base model.
            taps: references that the MoE layers write what they compute to; None for none.
        """
        step = prepare_step(self.config, batch, cache, workspace, pages, taps)
        x = self.embedding[batch.tokens]
        if pages and "embed_tokens" in pages and step.adapter_sort is not None:
            x = embedding_lora(
                batch.tokens,
                x,
                pages["embed_tokens"],
                step.adapter_sort,
                tile_rows=DENSE_TILE_ROWS,
            )
        # What the second half of a layer adds; the next layer begins with the sum.
        delta: Any = jax.new_ref(jnp.zeros_like(x))
        # Equal layers in a row are one loop; most models are a single one.
        for is_moe, layers in groupby(range(self.config.num_layers), self._is_moe):
            members = list(layers)
            x = lax.fori_loop(
                members[0],
                members[-1] + 1,
                lambda layer, x, is_moe=is_moe, first=members[0]: self._layer(
                    jnp.int32(layer), x, delta, step, is_moe=is_moe, first=first
                ),
                x,
            )
        return rms_norm(x + delta[...], self.final_norm[...], self.config.norm_eps)

    def logits(
        self,
        hidden: Float[Array, "tokens hidden"],
        batch: Batch,
        workspace: Workspace,
        pages: Pages | None,
        *,
        last_only: bool = False,
    ) -> Float[Array, "rows vocab"]:
        """Scores of the next token, float32.

        Args:
            hidden: what calling the model returned.
            batch: the same batch.
            workspace: references to the workspaces.
            pages: the same adapters.
            last_only: rows are the last tokens of the sequences; otherwise, all tokens.
        """
        adapter_of_row, num_rows = batch.adapter_of_token, batch.num_tokens
        if last_only:
            hidden = hidden[batch.last_token]
            adapter_of_row = adapter_of_row[batch.last_token]
            num_rows = jnp.sum(batch.query_counts > 0, dtype=jnp.int32)
        y = linear(hidden, self.base_weight("lm_head"), dtype=jnp.float32)
        if not pages or "lm_head" not in pages:
            return y
        sort = sort_by_adapter(adapter_of_row, num_rows, workspace, pages)
        first = jnp.int32(0)
        return dense_lora(hidden, y, pages["lm_head"], sort, first, tile_rows=DENSE_TILE_ROWS)

    def base_weight(self, site: str) -> Float[Array, "vocab hidden"]:
        """The matrix of a site outside of the layers: ``embed_tokens`` or ``lm_head``."""
        head = self.embedding if self.head is None else self.head
        return {"embed_tokens": self.embedding, "lm_head": head}[site][...]

    def _is_moe(self, layer: int) -> bool:
        return layer in self.config.moe_layers

    def _layer(
        self, layer: Array, x: Array, delta: Buffer, step: Step, *, is_moe: bool, first: int
    ) -> Array:
        """One decoder layer of the run of equal layers that starts at layer ``first``."""
        epsilon = self.config.norm_eps
        x, normed = add_rms_norm(x, delta, self.attention_norm[...], layer, epsilon=epsilon)
        attended = self.attention(normed, layer, step)
        norm = self.feed_forward_norm[...]
        x, normed = add_rms_norm(x, attended, norm, layer, epsilon=epsilon)
        if is_moe:
            assert self.experts is not None
            index = layer - first + self.config.moe_layers.index(first)
            self.experts(normed, index, step, delta)
            if self.shared_experts is not None:
                delta[...] += self.shared_experts(normed, index, step)
        else:
            assert self.mlp is not None
            index = layer - first + self.config.dense_layers.index(first)
            delta[...] = self.mlp(normed, index, step)
        return x


def each_layer(shape: tuple[int, ...], name: str, layers: Sequence[int]) -> Parameter:
    """A parameter ``[layers, *shape]`` that is the tensor ``name`` of each of the layers."""
    return stacked((len(layers), *shape), f"{LAYER}{name}", layer=layers)


def shared_parameters(config: ModelConfig) -> Iterator[tuple[str, Parameter]]:
    """What all models call alike: embedding, norms, head and attention."""
    hidden, layers = config.hidden_size, range(config.num_layers)

    yield "embedding", single((config.vocab_size, hidden), "model.embed_tokens.weight")
    yield "final_norm", single((hidden,), "model.norm.weight")
    if not config.tie_embeddings:
        yield "head", single((config.vocab_size, hidden), "lm_head.weight")
    yield "attention_norm", each_layer((hidden,), "input_layernorm.weight", layers)
    yield "feed_forward_norm", each_layer((hidden,), "post_attention_layernorm.weight", layers)

    for name, in_features, out_features, bias in config.attention_projections():
        path, source = f"attention.{name}", f"self_attn.{name}"
        yield f"{path}.weight", each_layer((out_features, in_features), f"{source}.weight", layers)
        if bias:
            yield f"{path}.bias", each_layer((out_features,), f"{source}.bias", layers)
    for name, width in _attention_norms(config):
        yield f"attention.{name}", each_layer((width,), f"self_attn.{name}.weight", layers)
    if config.attention_sinks:
        yield "attention.sinks", each_layer((config.num_heads,), "self_attn.sinks", layers)


def _attention_norms(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Names and widths of the norms inside of attention."""
    if config.latent is not None:
        if config.latent.query_rank is not None:
            yield "q_a_layernorm", config.latent.query_rank
        yield "kv_a_layernorm", config.latent.key_value_rank
    elif config.qk_norm is not None:
        for name, heads in (("q_norm", config.num_heads), ("k_norm", config.num_kv_heads)):
            yield name, config.head_dim * (1 if config.qk_norm == "head" else heads)


def gated_mlp_parameters(
    path: str, block: str, layers: Sequence[int], hidden: int, inner: int
) -> Iterator[tuple[str, Parameter]]:
    """A gated MLP that some layers have; nothing if none has it.

    Args:
        path: of the MLP in the module.
        block: path inside a layer of a checkpoint.
        layers: the layers that have it.
        hidden: width of the residual stream.
        inner: width inside; 0 if no layer has it.
    """
    if not (layers and inner):
        return
    for name, shape in (
        ("gate_proj", (inner, hidden)),
        ("up_proj", (inner, hidden)),
        ("down_proj", (hidden, inner)),
    ):
        yield f"{path}.{name}.weight", each_layer(shape, f"{block}.{name}.weight", layers)


def per_expert_parameters(
    config: ModelConfig, block: str, gate: str, up: str, down: str
) -> Iterator[tuple[str, Parameter]]:
    """Router and experts, stored as one tensor for each projection of each expert.

    Args:
        config: the model.
        block: path inside a layer of what holds the router ``gate`` and the ``experts``.
        gate: name of an expert's gate projection.
        up: of its up projection.
        down: of its down projection.
    """
    layers, experts = config.moe_layers, range(config.moe.num_experts)
    hidden, inner = config.hidden_size, config.moe.intermediate_size
    leading = (len(layers), len(experts))
    yield "experts.router", each_layer((len(experts), hidden), f"{block}.gate.weight", layers)
    yield (
        "experts.gate_up",
        stacked(
            (*leading, 2, inner, hidden),
            f"{LAYER}{block}.experts.{{expert}}.{{projection}}.weight",
            layer=layers,
            expert=experts,
            projection=(gate, up),
        ),
    )
    yield (
        "experts.down",
        stacked(
            (*leading, hidden, inner),
            f"{LAYER}{block}.experts.{{expert}}.{down}.weight",
            layer=layers,
            expert=experts,
        ),
    )
