"""Router top-k: from router logits to each token's experts and weights."""

from typing import Literal

from jax import Array
from jaxtyping import Float, Int32

from moelora_kernels.backend import Implementation, choose
from moelora_kernels.router import reference


def route(
    logits: Float[Array, "tokens experts"],
    *,
    top_k: int,
    scoring: Literal["softmax", "sigmoid"] = "softmax",
    renormalize: bool = True,
    implementation: Implementation | None = None,
) -> tuple[Int32[Array, "tokens top_k"], Float[Array, "tokens top_k"]]:
    """Choose ``top_k`` experts for every token.

    Scores are computed in float32. Among equal scores the lower expert index wins.

    Args:
        logits: router logits.
        top_k: experts per token.
        scoring: ``softmax`` over all experts, or ``sigmoid`` of each.
        renormalize: divide the chosen scores by their sum.
        implementation: None chooses by the default device.

    Returns:
        Experts in descending order of score, int32, and their weights, float32.

    Raises:
        ValueError: ``top_k`` is not between 1 and the number of experts.
    """
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k is {top_k}, but there are {logits.shape[1]} experts")
    if choose(implementation) == "triton":
        from moelora_kernels.router import triton

        return triton.route(logits, top_k=top_k, scoring=scoring, renormalize=renormalize)
    return reference.route(logits, top_k=top_k, scoring=scoring, renormalize=renormalize)
