"""Residual sum and RMS norm in Triton, one token per program."""

import jax
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, scalar
from moelora_kernels.linear import triton_update
from moelora_kernels.linear.triton_update import find_update
from moelora_kernels.types import Buffer, LinearUpdate


def add_rms_norm(
    x: Array,
    delta: Buffer,
    weight: Array,
    layer: Array,
    epsilon: float,
    update: LinearUpdate | None,
) -> tuple[Array, Array]:
    """See :func:`moelora_kernels.add_rms_norm`."""
    tokens, width = x.shape
    block = triton.next_power_of_2(width)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    total, normed = launch(
        add_and_normalise,
        (x, delta, weight, scalar(layer), *triton_update.operands(update)[:3]),
        [shape, shape],
        None,
        Launch((tokens,), num_warps=min(8, max(1, block // 256))),
        WIDTH=width,
        BLOCK=block,
        EPSILON=float(epsilon),
        TOKENS=tokens,
        **triton_update.constants(update),
    )
    return total, normed


@triton.jit
def add_and_normalise(
    x_ptr,
    delta_ptr,
    weight_ptr,
    layer_ptr,
    z_ptr,
    pool_rows_ptr,
    b_ptr,
    total_ptr,
    normed_ptr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EPSILON: tl.constexpr,
    TOKENS: tl.constexpr,
    Z_PARTS: tl.constexpr,
    MAPS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Rounds where the reference rounds."""
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + tl.load(layer_ptr) * WIDTH + column, mask=inside, other=0.0)
    total = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
    if b_ptr is not None:
        added, _, exists = find_update(
            tl.program_id(0), column, inside, z_ptr, pool_rows_ptr, b_ptr, WIDTH,
            0, TOKENS, Z_PARTS, MAPS, MAX_PAGES, PAGE_ROWS, RANKS,
        )  # fmt: skip
        delta = tl.where(exists, (delta.to(tl.float32) + added).to(dtype), delta)
    total += delta.to(tl.float32)
    rounded = total.to(dtype)
    tl.store(total_ptr + at, rounded, mask=inside)
    values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / WIDTH + EPSILON)
    normed = (values * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(normed_ptr + at, normed.to(dtype), mask=inside)
