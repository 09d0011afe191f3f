"""Router top-k in Triton: one program per token."""

import jax
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch


def route(logits: Array, *, top_k: int, scoring: str, renormalize: bool) -> tuple[Array, Array]:
    """See :func:`moelora_kernels.route`."""
    tokens, experts = logits.shape
    return launch(
        route_token,
        (logits,),
        [
            jax.ShapeDtypeStruct((tokens, top_k), "int32"),
            jax.ShapeDtypeStruct((tokens, top_k), "float32"),
        ],
        None,
        Launch((tokens,), num_warps=1),
        NUM_EXPERTS=experts,
        TOP_K=top_k,
        SCORING=scoring,
        RENORMALIZE=renormalize,
        EXPERTS_POW2=triton.next_power_of_2(experts),
        TOP_K_POW2=triton.next_power_of_2(top_k),
    )  # type: ignore[return-value]


@triton.jit
def route_token(
    logits_ptr,
    experts_ptr,
    weights_ptr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
):
    """Take the best expert ``TOP_K`` times."""
    token = tl.program_id(0)
    expert = tl.arange(0, EXPERTS_POW2)
    inside = expert < NUM_EXPERTS
    logits = tl.load(logits_ptr + token * NUM_EXPERTS + expert, mask=inside, other=-float("inf"))
    logits = logits.to(tl.float32)
    if SCORING == "softmax":
        scores = tl.exp(logits - tl.max(logits, 0))
        scores = scores / tl.sum(scores, 0)
    else:
        scores = tl.sigmoid(logits)
    # Scores are not negative.
    scores = tl.where(inside, scores, -1.0)
    choice = tl.arange(0, TOP_K_POW2)
    chosen = tl.zeros([TOP_K_POW2], tl.int32)
    weights = tl.zeros([TOP_K_POW2], tl.float32)
    for number in tl.static_range(TOP_K):
        best, index = tl.max(scores, 0, return_indices=True, return_indices_tie_break_left=True)
        chosen = tl.where(choice == number, index, chosen)
        weights = tl.where(choice == number, best, weights)
        scores = tl.where(expert == index, -2.0, scores)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, 0)
    tl.store(experts_ptr + token * TOP_K + choice, chosen, mask=choice < TOP_K)
    tl.store(weights_ptr + token * TOP_K + choice, weights, mask=choice < TOP_K)
