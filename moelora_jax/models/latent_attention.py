"""Multi-head latent attention (MLA), the attention of DeepSeek-V2 and -V3, with LoRA."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from moelora_jax.config import ModelConfig
from moelora_jax.models.layers import Step, attend, attention_projections
from moelora_kernels import rms_norm, rotate, write_cache

#: Added to the variance of latent vectors, as transformers does whatever ``rms_norm_eps`` says.
LATENT_NORM_EPS = 1e-6


class LatentAttention(nnx.Module):
    """Multi-head latent attention of every layer: see :class:`~moelora_jax.config.LatentConfig`.

    The cache holds keys and values of all heads, expanded with the adapter of their own token. The
    latent vectors would take ``key_value_rank + rope_dim`` numbers per token, 1/9 of that in
    DeepSeek-V2-Lite and 1/71 in DeepSeek-V3.

    Attributes:
        q_proj: None where queries have a latent vector; else ``q_a_proj``, ``q_a_layernorm`` and
            ``q_b_proj`` are.
        q_a_layernorm: ``[layers, query_rank]``.
        kv_a_layernorm: ``[layers, key_value_rank]``.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        assert config.latent is not None
        self.config, self.latent = config, config.latent
        rank = config.latent.query_rank
        projections = attention_projections(config, dtype=dtype, rngs=rngs)
        self.q_proj = projections.get("q_proj")
        self.q_a_proj = projections.get("q_a_proj")
        self.q_b_proj = projections.get("q_b_proj")
        self.kv_a_proj_with_mqa = projections["kv_a_proj_with_mqa"]
        self.kv_b_proj = projections["kv_b_proj"]
        self.o_proj = projections["o_proj"]
        self.q_a_layernorm = nnx.Param(jnp.ones((config.num_layers, rank), dtype)) if rank else None
        self.kv_a_layernorm = nnx.Param(
            jnp.ones((config.num_layers, config.latent.key_value_rank), dtype)
        )

    def __call__(self, x: Float[Array, "tokens hidden"], layer: Array, step: Step) -> Array:
        """Attend to the cached positions, these tokens included; ``[tokens, hidden]``."""
        config, latent = self.config, self.latent
        tokens, heads = x.shape[0], config.num_heads
        plain_dim = config.head_dim - latent.rope_dim

        query = self._queries(x, layer, step).reshape(tokens, heads, -1)
        compressed = self.kv_a_proj_with_mqa(x, layer, step)
        vector, shared_key = jnp.split(compressed, [latent.key_value_rank], axis=-1)
        vector = rms_norm(vector, self.kv_a_layernorm[layer], LATENT_NORM_EPS)
        expanded = self.kv_b_proj(vector, layer, step).reshape(tokens, heads, -1)

        plain_query, turned_query = jnp.split(query, [plain_dim], axis=-1)
        plain_key, value = jnp.split(expanded, [plain_dim], axis=-1)
        interleaved = config.rope.interleaved
        turned_query = rotate(turned_query, *step.rotation, interleaved=interleaved)
        turned_key = rotate(shared_key[:, None], *step.rotation, interleaved=interleaved)
        turned_key = jnp.broadcast_to(turned_key, turned_query.shape)

        key = jnp.concatenate([plain_key, turned_key], axis=-1)
        for cache, values in zip((step.cache.keys, step.cache.values), (key, value), strict=True):
            write_cache(cache, values, layer, step.block_of_token, step.offset_of_token)
        yarn = config.rope.yarn
        attended = attend(
            jnp.concatenate([plain_query, turned_query], axis=-1),
            layer,
            step,
            scale=config.head_dim**-0.5 * (1.0 if yarn is None else yarn.score_factor),
        )
        return self.o_proj(attended, layer, step)

    def _queries(self, x: Array, layer: Array, step: Step) -> Float[Array, "tokens queries"]:
        if self.q_proj is not None:
            return self.q_proj(x, layer, step)
        assert self.q_a_proj is not None
        assert self.q_a_layernorm is not None
        assert self.q_b_proj is not None
        vector = self.q_a_proj(x, layer, step)
        vector = rms_norm(vector, self.q_a_layernorm[layer], LATENT_NORM_EPS)
        return self.q_b_proj(vector, layer, step)
