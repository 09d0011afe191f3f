"""Combine in Triton: one program per token and block of columns."""

import jax
import triton
import triton.language as tl
from jax import Array
from jax.typing import DTypeLike

from moelora_kernels.backend import Launch, launch
from moelora_kernels.types import Buffer, TokenSort


def combine(
    expert_out: Buffer,
    weights: Array,
    sort: TokenSort,
    *,
    scaling: float,
    dtype: DTypeLike,
    out: Buffer | None,
) -> Buffer:
    """See :func:`moelora_kernels.combine`."""
    tokens, top_k = weights.shape
    width = expert_out.shape[1]
    block = min(triton.next_power_of_2(width), 512)
    return launch(
        combine_token,
        (expert_out, weights, sort.row_of_pair),
        [jax.ShapeDtypeStruct((tokens, width), dtype)],
        None if out is None else [out],
        Launch((tokens, triton.cdiv(width, block)), num_warps=1),
        WIDTH=width,
        TOP_K=top_k,
        SCALING=float(scaling),
        BLOCK=block,
    )[0]


@triton.jit
def combine_token(
    expert_out_ptr,
    weights_ptr,
    row_of_pair_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    SCALING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token and block of columns per program."""
    sum_experts(
        tl.program_id(0), tl.program_id(1), expert_out_ptr, weights_ptr, row_of_pair_ptr, out_ptr,
        WIDTH, TOP_K, SCALING, BLOCK,
    )  # fmt: skip


@triton.jit
def sum_experts(
    token,
    block,
    expert_out_ptr,
    weights_ptr,
    row_of_pair_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    SCALING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum over the experts of a token in float32, in the order of the choices."""
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(row_of_pair_ptr + token * TOP_K + choice)
        real = row >= 0
        weight = tl.load(weights_ptr + token * TOP_K + choice, mask=real, other=0.0)
        value = tl.load(
            expert_out_ptr + row.to(tl.int64) * WIDTH + column, mask=inside & real, other=0.0
        )
        total += weight * value.to(tl.float32)
    tl.store(
        out_ptr + token.to(tl.int64) * WIDTH + column,
        (total * SCALING).to(out_ptr.dtype.element_ty),
        mask=inside,
    )
