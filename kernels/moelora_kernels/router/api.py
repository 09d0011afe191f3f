"""Router top-k: from router logits to each token's experts and weights."""

from typing import Literal

from jax import Array
from jaxtyping import Float, Int32

from moelora_kernels.backend import Implementation, choose
from moelora_kernels.router import reference
from moelora_kernels.types import ExpertGroups


def route(
    logits: Float[Array, "tokens experts"],
    *,
    top_k: int,
    scoring: Literal["softmax", "sigmoid"] = "softmax",
    renormalize: bool = True,
    correction_bias: Float[Array, " experts"] | None = None,
    groups: ExpertGroups | None = None,
    implementation: Implementation | None = None,
) -> tuple[Int32[Array, "tokens top_k"], Float[Array, "tokens top_k"]]:
    """Choose ``top_k`` experts for every token.

    Scores are computed in float32. Among equal scores the lower expert index wins.

    A correction bias balances the load of the experts, as in DeepSeek-V3 (arXiv 2412.19437,
    section 2.1.2): it changes which groups and experts are chosen, and no weight.

    Args:
        logits: router logits.
        top_k: experts per token.
        scoring: ``softmax`` over all experts, or ``sigmoid`` of each.
        renormalize: divide the chosen scores by their sum.
        correction_bias: added to the scores for the choice alone, float32; None adds nothing.
        groups: what limits the choice; None lets each token choose among all experts.
        implementation: None chooses by the default device.

    Returns:
        Experts in descending order of what they were chosen by, int32, and their weights, float32.

    Raises:
        ValueError: ``top_k`` is not between 1 and the number of experts, or the groups do not fit.
    """
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k is {top_k}, but there are {logits.shape[1]} experts")
    if groups is not None:
        groups.check(logits.shape[1], top_k)
    if choose(implementation) == "triton":
        from moelora_kernels.router import triton

        return triton.route(
            logits,
            top_k=top_k,
            scoring=scoring,
            renormalize=renormalize,
            correction_bias=correction_bias,
            groups=groups,
        )
    return reference.route(
        logits,
        top_k=top_k,
        scoring=scoring,
        renormalize=renormalize,
        correction_bias=correction_bias,
        groups=groups,
    )
