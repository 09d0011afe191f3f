"""Combine: the weighted sum over each token's experts."""

from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from moelora_kernels.backend import Implementation, choose
from moelora_kernels.buffers import read, result
from moelora_kernels.combine import reference
from moelora_kernels.types import Buffer, TokenSort


def combine(
    expert_out: Buffer,
    weights: Float[Array, "tokens top_k"],
    sort: TokenSort,
    *,
    scaling: float = 1.0,
    dtype: DTypeLike,
    out: Buffer | None = None,
    implementation: Implementation | None = None,
) -> Buffer:
    """``scaling · Σ_k weights[t, k] · expert_out[row of (t, k)]``, a float32 sum in order of k.

    Args:
        expert_out: ``[>= pairs, hidden]`` in sorted order, from :func:`down`.
        weights: router weights, float32.
        sort: the token sort.
        scaling: factor on the sum.
        dtype: of the result; the only rounding.
        out: ``[>= tokens, hidden]`` of that dtype.
        implementation: None chooses by the default device.

    Returns:
        ``[tokens, hidden]``; zeros for padding tokens.
    """
    if choose(implementation) == "triton":
        from moelora_kernels.combine import triton

        return triton.combine(expert_out, weights, sort, scaling=scaling, dtype=dtype, out=out)
    pairs = weights.size
    value = reference.combine(
        read(expert_out, pairs), weights, read(sort.row_of_pair, pairs), scaling, dtype
    )
    return result(out, value)
