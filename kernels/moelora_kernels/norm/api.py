"""The RMS norm before each half of a layer, with the residual sum that comes before it."""

from jax import Array
from jaxtyping import Float, Int32

from moelora_kernels.backend import Implementation, choose
from moelora_kernels.linear.reference import add_update
from moelora_kernels.norm import reference
from moelora_kernels.types import Buffer, LinearUpdate


def add_rms_norm(
    x: Float[Array, "tokens width"],
    delta: Buffer,
    weight: Float[Array, "layers width"],
    layer: Int32[Array, ""],
    *,
    epsilon: float,
    update: LinearUpdate | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "tokens width"], Float[Array, "tokens width"]]:
    """The residual stream after a half of a layer, and its RMS norm for the next.

    Args:
        x: residual stream.
        delta: what is added to it, ``[>= tokens, width]`` in its dtype.
        weight: of the norms of all layers.
        layer: whose norm.
        epsilon: added to the mean of squares.
        update: what adapters have yet to add to ``delta``; None for nothing.
        implementation: None chooses by the default device.

    Returns:
        ``x + delta``, rounded; and its norm, which is computed in float32.
    """
    if choose(implementation) == "triton":
        from moelora_kernels.norm import triton

        return triton.add_rms_norm(x, delta, weight, layer, epsilon, update)
    total = x + add_update(delta[: len(x)], update)
    return total, reference.rms_norm(total, weight[layer], epsilon)
