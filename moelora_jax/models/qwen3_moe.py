"""Qwen3-MoE: attention with normalised heads, routed experts, some layers dense."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from moelora_jax.buckets import Batch
from moelora_jax.config import ModelConfig, MoeConfig
from moelora_jax.errors import CheckpointError
from moelora_jax.models.checkpoint import Parameter, single, stacked
from moelora_jax.models.layers import (
    Attention,
    DenseMlp,
    Experts,
    Pages,
    Step,
    prepare_step,
    random_param,
    rms_norm,
)
from moelora_jax.moe import linear
from moelora_jax.workspace import KVCache, Workspace

ARCHITECTURE = "Qwen3MoeForCausalLM"


class Qwen3Moe(nnx.Module):
    """The whole model, parameters stacked over layers.

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
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = nnx.Param(jnp.ones((layers, hidden), dtype))
        self.experts = Experts(config, dtype=dtype, rngs=rngs) if config.moe_layers else None
        self.mlp = DenseMlp(config, dtype=dtype, rngs=rngs) if config.dense_layers else None
        self.final_norm = nnx.Param(jnp.ones((hidden,), dtype))
        tied = config.tie_embeddings
        self.head = None if tied else random_param(rngs, (config.vocab_size, hidden), dtype)

    def __call__(
        self, batch: Batch, cache: KVCache, workspace: Workspace, pages: Pages | None
    ) -> Float[Array, "tokens hidden"]:
        """Hidden states after the final norm; keys and values of the batch are added to the cache.

        Args:
            batch: packed tokens of several sequences.
            cache: references to the KV cache.
            workspace: references to the workspaces.
            pages: resident adapters by site; None runs the base model.
        """
        step = prepare_step(batch, cache, workspace, pages)
        x = self.embedding[batch.tokens]
        # Equal layers in a row are one loop; most models are a single one.
        for is_moe, layers in groupby(range(self.config.num_layers), self._is_moe):
            members = list(layers)
            x = lax.fori_loop(
                members[0],
                members[-1] + 1,
                lambda layer, x, is_moe=is_moe, first=members[0]: self._layer(
                    jnp.int32(layer), x, step, is_moe=is_moe, first=first
                ),
                x,
            )
        return rms_norm(x, self.final_norm[...], self.config.norm_eps)

    def logits(self, hidden: Float[Array, "rows hidden"]) -> Float[Array, "rows vocab"]:
        """Scores of the next token, float32."""
        head = self.embedding if self.head is None else self.head
        return linear(hidden, head[...], dtype=jnp.float32)

    def _is_moe(self, layer: int) -> bool:
        return layer in self.config.moe_layers

    def _layer(self, layer: Array, x: Array, step: Step, *, is_moe: bool, first: int) -> Array:
        """One decoder layer of the run of equal layers that starts at layer ``first``."""
        epsilon = self.config.norm_eps
        normed = rms_norm(x, self.attention_norm[layer], epsilon)
        x = x + self.attention(normed, layer, step)
        normed = rms_norm(x, self.feed_forward_norm[layer], epsilon)
        if is_moe:
            assert self.experts is not None
            index = layer - first + self.config.moe_layers.index(first)
            return x + self.experts(normed, index, step)
        assert self.mlp is not None
        return x + self.mlp(normed, layer - first + self.config.dense_layers.index(first))


def read_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The model's description from a checkpoint's config.json, as transformers 4 or 5 writes it.

    Raises:
        CheckpointError: a key is missing, or asks for something that is not supported.
    """
    raw = dict(raw)
    raw.setdefault("num_experts", raw.get("num_local_experts"))  # as transformers 5 writes it
    required = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
    )
    missing = [key for key in required if raw.get(key) is None]
    if missing:
        raise CheckpointError(f"config.json: {', '.join(missing)} missing")
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported")
    if raw.get("use_sliding_window"):
        raise CheckpointError("config.json: use_sliding_window is not supported for Qwen3-MoE")
    if raw.get("quantization_config"):
        raise CheckpointError("config.json: quantization_config is not supported; use a bf16 model")

    layers = raw["num_hidden_layers"]
    sparse_step = raw.get("decoder_sparse_step", 1)
    dense = set(raw.get("mlp_only_layers") or ())
    moe_layers = tuple(
        layer for layer in range(layers) if layer not in dense and (layer + 1) % sparse_step == 0
    )
    eos = raw.get("eos_token_id")
    return ModelConfig(
        architecture=ARCHITECTURE,
        vocab_size=raw["vocab_size"],
        num_layers=layers,
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        moe=MoeConfig(
            num_experts=raw["num_experts"],
            top_k=raw["num_experts_per_tok"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["moe_intermediate_size"],
            renormalize=bool(raw.get("norm_topk_prob", False)),
        ),
        moe_layers=moe_layers,
        dense_intermediate_size=raw.get("intermediate_size") or 0,
        rope_theta=_rope_theta(raw),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        attention_bias=bool(raw.get("attention_bias", False)),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_position=raw.get("max_position_embeddings", 32768),
        eos_tokens=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )


def _rope_theta(raw: Mapping[str, Any]) -> float:
    """``rope_parameters`` is transformers 5, ``rope_theta`` and ``rope_scaling`` are 4."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"config.json: rope_type {kind!r} is not supported for Qwen3-MoE")
    return float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)


def checkpoint_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Where each stacked parameter comes from in a checkpoint of transformers."""
    return dict(_parameters(config))


def _parameters(config: ModelConfig) -> Iterator[tuple[str, Parameter]]:
    hidden, layers, moe = config.hidden_size, range(config.num_layers), config.moe
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    prefix = "model.layers.{layer}."

    def each_layer(shape: tuple[int, ...], name: str, of: Sequence[int] = layers) -> Parameter:
        return stacked((len(of), *shape), f"{prefix}{name}", layer=of)

    yield "embedding", single((config.vocab_size, hidden), "model.embed_tokens.weight")
    yield "final_norm", single((hidden,), "model.norm.weight")
    if not config.tie_embeddings:
        yield "head", single((config.vocab_size, hidden), "lm_head.weight")
    yield "attention_norm", each_layer((hidden,), "input_layernorm.weight")
    yield "feed_forward_norm", each_layer((hidden,), "post_attention_layernorm.weight")

    for name, out_features, in_features in (
        ("q_proj", queries, hidden),
        ("k_proj", keys, hidden),
        ("v_proj", keys, hidden),
        ("o_proj", hidden, queries),
    ):
        path, source = f"attention.{name}", f"self_attn.{name}"
        yield f"{path}.weight", each_layer((out_features, in_features), f"{source}.weight")
        if config.attention_bias:
            yield f"{path}.bias", each_layer((out_features,), f"{source}.bias")
    yield "attention.q_norm", each_layer((config.head_dim,), "self_attn.q_norm.weight")
    yield "attention.k_norm", each_layer((config.head_dim,), "self_attn.k_norm.weight")

    if config.dense_layers:
        dense, inner = config.dense_layers, config.dense_intermediate_size
        yield "mlp.gate_proj", each_layer((inner, hidden), "mlp.gate_proj.weight", dense)
        yield "mlp.up_proj", each_layer((inner, hidden), "mlp.up_proj.weight", dense)
        yield "mlp.down_proj", each_layer((hidden, inner), "mlp.down_proj.weight", dense)
    if config.moe_layers:
        sparse, experts, inner = config.moe_layers, moe.num_experts, moe.intermediate_size
        yield "experts.router", each_layer((experts, hidden), "mlp.gate.weight", sparse)
        yield (
            "experts.gate_up",
            stacked(
                (len(sparse), experts, 2, inner, hidden),
                f"{prefix}mlp.experts.{{expert}}.{{projection}}.weight",
                layer=sparse,
                expert=range(experts),
                projection=("gate_proj", "up_proj"),
            ),
        )
        yield (
            "experts.down",
            stacked(
                (len(sparse), experts, hidden, inner),
                f"{prefix}mlp.experts.{{expert}}.down_proj.weight",
                layer=sparse,
                expert=range(experts),
            ),
        )
