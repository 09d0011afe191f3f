"""Norms, rotation and the cache in Triton: one launch, a program for some heads of a token."""

import jax
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, scalar
from moelora_kernels.linear import triton_update
from moelora_kernels.linear.triton import is_given, of_map
from moelora_kernels.linear.triton_update import find_update
from moelora_kernels.types import Buffer, LinearUpdate

#: Of a program. With one, what adapters add would take it longer than waiting for pages of B.
NUM_WARPS = 4


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
    update: LinearUpdate | None,
) -> Array:
    """See :func:`moelora_kernels.prepare_heads`."""
    tokens, features = projected.shape
    _, num_blocks, block_size, kv_heads, head_dim = k_cache.shape
    heads = features // head_dim - 2 * kv_heads
    (query,) = launch(
        prepare_group,
        (
            *(projected, k_cache, v_cache, scalar(layer), block_of_token, offset_of_token),
            *(cos, sin, query_norm, key_norm, *triton_update.operands(update)),
        ),
        [jax.ShapeDtypeStruct((tokens, heads, head_dim), projected.dtype)],
        None,
        Launch((tokens, heads // kv_heads + 2), num_warps=NUM_WARPS),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        NUM_BLOCKS=num_blocks,
        BLOCK_SIZE=block_size,
        EPSILON=float(epsilon),
        GROUP=triton.next_power_of_2(kv_heads),
        HALF=triton.next_power_of_2(head_dim // 2),
        TOKENS=tokens,
        **triton_update.constants(update),
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
    z_ptr,
    pool_rows_ptr,
    b_0_ptr,
    b_1_ptr,
    b_2_ptr,
    query_ptr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EPSILON: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    Z_PARTS: tl.constexpr,
    MAPS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """As many heads of one token as there are key heads: queries first, then keys, then values."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, pair = tl.arange(0, GROUP), tl.arange(0, HALF)
    exists = (head < KV_HEADS)[:, None] & (pair < HEAD_DIM // 2)[None, :]
    feature = head[:, None] * HEAD_DIM + pair[None, :]
    x_ptrs = projected_ptr + token * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    x_ptrs += group * (KV_HEADS * HEAD_DIM) + feature
    first = tl.load(x_ptrs, mask=exists, other=0.0)
    second = tl.load(x_ptrs + HEAD_DIM // 2, mask=exists, other=0.0)
    layer = tl.load(layer_ptr)
    QUERIES: tl.constexpr = HEADS // KV_HEADS
    if z_ptr is not None:
        number = tl.maximum(group - QUERIES + 1, 0)
        if is_given(number, b_0_ptr, b_1_ptr, b_2_ptr):
            b_ptr = of_map(number, b_0_ptr, b_1_ptr, b_2_ptr)
            width = tl.where(number == 0, HEADS, KV_HEADS) * HEAD_DIM
            column = tl.where(number == 0, group, 0) * (KV_HEADS * HEAD_DIM) + feature
            first_added, second_added, is_changed = find_update(
                number * TOKENS + token, column, exists, z_ptr, pool_rows_ptr, b_ptr, width,
                HEAD_DIM // 2, TOKENS, Z_PARTS, MAPS, MAX_PAGES, PAGE_ROWS, RANKS,
            )  # fmt: skip
            dtype: tl.constexpr = first.dtype
            changed = (first.to(tl.float32) + first_added).to(dtype)
            first = tl.where(is_changed, changed, first)
            changed = (second.to(tl.float32) + second_added).to(dtype)
            second = tl.where(is_changed, changed, second)
    if group < QUERIES:
        first, second = normalised_and_rotated(
            first, second, token, layer, pair, query_norm_ptr, cos_ptr, sin_ptr, HEAD_DIM, EPSILON
        )
        out_ptrs = query_ptr + (token * HEADS + group * KV_HEADS) * HEAD_DIM + feature
        tl.store(out_ptrs, first, mask=exists)
        tl.store(out_ptrs + HEAD_DIM // 2, second, mask=exists)
    else:
        row = (layer.to(tl.int64) * NUM_BLOCKS + tl.load(block_ptr + token)) * BLOCK_SIZE
        row += tl.load(offset_ptr + token)
        if group == QUERIES:
            first, second = normalised_and_rotated(
                first, second, token, layer, pair, key_norm_ptr, cos_ptr, sin_ptr, HEAD_DIM, EPSILON
            )
            out_ptrs = key_ptr + row * (KV_HEADS * HEAD_DIM) + feature
            tl.store(out_ptrs, first.to(key_ptr.dtype.element_ty), mask=exists)
            tl.store(out_ptrs + HEAD_DIM // 2, second.to(key_ptr.dtype.element_ty), mask=exists)
        else:
            out_ptrs = value_ptr + row * (KV_HEADS * HEAD_DIM) + feature
            tl.store(out_ptrs, first.to(value_ptr.dtype.element_ty), mask=exists)
            tl.store(out_ptrs + HEAD_DIM // 2, second.to(value_ptr.dtype.element_ty), mask=exists)


@triton.jit
def normalised_and_rotated(
    first,
    second,
    token,
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
    exists = pair < HEAD_DIM // 2
    first, second = first.to(tl.float32), second.to(tl.float32)
    if norm_ptr is not None:
        squares = tl.sum(first * first + second * second, 1)
        scale = tl.rsqrt(squares / HEAD_DIM + EPSILON)[:, None]
        norm_ptrs = norm_ptr + layer * HEAD_DIM + pair
        weight = tl.load(norm_ptrs, mask=exists, other=0.0).to(tl.float32)[None, :]
        first = (weight * (first * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        weight = tl.load(norm_ptrs + HEAD_DIM // 2, mask=exists, other=0.0)
        weight = weight.to(tl.float32)[None, :]
        second = (weight * (second * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    angle = token * (HEAD_DIM // 2) + pair
    cos = tl.load(cos_ptr + angle, mask=exists, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=exists, other=0.0)[None, :]
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)
