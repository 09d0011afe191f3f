"""Norms, rotation and the cache in Triton: one launch, a program for some heads of some tokens."""

import jax
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, scalar
from moelora_kernels.types import Buffer

#: Tokens from which on a program has several of them, one for each of its warps.
MANY_TOKENS = 1024
#: As many.
WARPS = 4


def prepare_heads(
    projected: Array,
    k_cache: Buffer,
    v_cache: Buffer,
    layer: Array,
    block_of_token: Array,
    offset_of_token: Array,
    cos: Array,
    sin: Array,
    query_norm: Array | None,
    key_norm: Array | None,
    epsilon: float,
) -> Array:
    """See :func:`moelora_kernels.prepare_heads`."""
    tokens, features = projected.shape
    _, num_blocks, block_size, kv_heads, head_dim = k_cache.shape
    heads = features // head_dim - 2 * kv_heads
    warps = WARPS if tokens >= MANY_TOKENS else 1
    (query,) = launch(
        prepare_group,
        (
            *(projected, k_cache, v_cache, scalar(layer), block_of_token, offset_of_token),
            *(cos, sin, query_norm, key_norm),
        ),
        [jax.ShapeDtypeStruct((tokens, heads, head_dim), projected.dtype)],
        None,
        Launch((triton.cdiv(tokens, warps), heads // kv_heads + 2), num_warps=warps),
        TOKENS=tokens,
        BLOCK_TOKENS=warps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        NUM_BLOCKS=num_blocks,
        BLOCK_SIZE=block_size,
        EPSILON=float(epsilon),
        GROUP=triton.next_power_of_2(kv_heads),
        HALF=triton.next_power_of_2(head_dim // 2),
    )
    return query


@triton.jit
def prepare_group(
    projected_ptr,
    key_ptr,
    value_ptr,
    layer_ptr,
    block_ptr,
    offset_ptr,
    cos_ptr,
    sin_ptr,
    query_norm_ptr,
    key_norm_ptr,
    query_ptr,
    TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EPSILON: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
):
    """As many heads of each token as there are key heads: queries first, then keys, then values."""
    group = tl.program_id(1)
    row, pair = tl.arange(0, BLOCK_TOKENS * GROUP), tl.arange(0, HALF)
    token, head = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + row // GROUP, row % GROUP
    inside = (head < KV_HEADS) & (token < TOKENS)
    exists = inside[:, None] & (pair < HEAD_DIM // 2)[None, :]
    feature = (head * HEAD_DIM)[:, None] + pair[None, :]
    x_ptrs = projected_ptr + (token * ((HEADS + 2 * KV_HEADS) * HEAD_DIM))[:, None]
    x_ptrs += group * (KV_HEADS * HEAD_DIM) + feature
    first = tl.load(x_ptrs, mask=exists, other=0.0)
    second = tl.load(x_ptrs + HEAD_DIM // 2, mask=exists, other=0.0)
    layer = tl.load(layer_ptr)
    QUERIES: tl.constexpr = HEADS // KV_HEADS
    if group < QUERIES:
        first, second = normalised_and_rotated(
            first, second, token, exists, layer, pair, query_norm_ptr, cos_ptr, sin_ptr,
            HEAD_DIM, EPSILON,
        )  # fmt: skip
        out_ptrs = query_ptr + ((token * HEADS + group * KV_HEADS) * HEAD_DIM)[:, None] + feature
        tl.store(out_ptrs, first, mask=exists)
        tl.store(out_ptrs + HEAD_DIM // 2, second, mask=exists)
    else:
        block = tl.load(block_ptr + token, mask=inside, other=0)
        cache_row = (layer.to(tl.int64) * NUM_BLOCKS + block) * BLOCK_SIZE
        cache_row += tl.load(offset_ptr + token, mask=inside, other=0)
        at = (cache_row * (KV_HEADS * HEAD_DIM))[:, None] + feature
        if group == QUERIES:
            first, second = normalised_and_rotated(
                first, second, token, exists, layer, pair, key_norm_ptr, cos_ptr, sin_ptr,
                HEAD_DIM, EPSILON,
            )  # fmt: skip
            tl.store(key_ptr + at, first.to(key_ptr.dtype.element_ty), mask=exists)
            at += HEAD_DIM // 2
            tl.store(key_ptr + at, second.to(key_ptr.dtype.element_ty), mask=exists)
        else:
            tl.store(value_ptr + at, first.to(value_ptr.dtype.element_ty), mask=exists)
            at += HEAD_DIM // 2
            tl.store(value_ptr + at, second.to(value_ptr.dtype.element_ty), mask=exists)


@triton.jit
def normalised_and_rotated(
    first,
    second,
    token,
    exists,
    layer,
    pair,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    HEAD_DIM: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Both halves of some heads, rounded where the reference rounds."""
    dtype: tl.constexpr = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    if norm_ptr is not None:
        squares = tl.sum(first * first + second * second, 1)
        scale = tl.rsqrt(squares / HEAD_DIM + EPSILON)[:, None]
        norm_ptrs = norm_ptr + layer * HEAD_DIM + pair
        weight = tl.load(norm_ptrs, mask=pair < HEAD_DIM // 2, other=0.0)
        weight = weight.to(tl.float32)[None, :]
        first = (weight * (first * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        weight = tl.load(norm_ptrs + HEAD_DIM // 2, mask=pair < HEAD_DIM // 2, other=0.0)
        weight = weight.to(tl.float32)[None, :]
        second = (weight * (second * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    angle = (token * (HEAD_DIM // 2))[:, None] + pair[None, :]
    cos = tl.load(cos_ptr + angle, mask=exists, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=exists, other=0.0)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)
