"""Router top-k in Triton: one program per token."""

import jax
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch
from moelora_kernels.router.reference import TINY_SUM
from moelora_kernels.types import ExpertGroups

#: Of an expert that is chosen already, or must not be: :func:`sortable` makes it of no number.
LOWEST = tl.constexpr(-(2**31))


def route(
    logits: Array,
    *,
    top_k: int,
    scoring: str,
    renormalize: bool,
    correction_bias: Array | None,
    groups: ExpertGroups | None,
) -> tuple[Array, Array]:
    """See :func:`moelora_kernels.route`."""
    tokens, experts = logits.shape
    groups = groups or ExpertGroups(1, 1)
    return launch(
        route_token,
        (logits, correction_bias),
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
        NUM_GROUPS=groups.count,
        CHOSEN_GROUPS=groups.chosen,
        SUMMED=groups.summed,
        TINY_SUM=TINY_SUM,
        EXPERTS_POW2=triton.next_power_of_2(experts),
        TOP_K_POW2=triton.next_power_of_2(top_k),
        GROUPS_POW2=triton.next_power_of_2(groups.count),
    )  # type: ignore[return-value]


@triton.jit
def route_token(
    logits_ptr,
    bias_ptr,
    experts_ptr,
    weights_ptr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    CHOSEN_GROUPS: tl.constexpr,
    SUMMED: tl.constexpr,
    TINY_SUM: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    GROUPS_POW2: tl.constexpr,
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
    choice = scores
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + expert, mask=inside, other=0.0)
    choice = tl.where(inside, sortable(choice), LOWEST)
    if CHOSEN_GROUPS < NUM_GROUPS:
        group_of_expert = expert // (NUM_EXPERTS // NUM_GROUPS)
        group = tl.arange(0, GROUPS_POW2)
        group_scores = tl.full([GROUPS_POW2], -float("inf"), tl.float32)
        for number in tl.static_range(NUM_GROUPS):
            members = tl.where(group_of_expert == number, choice, LOWEST)
            total = 0.0
            for _ in tl.static_range(SUMMED):
                best, index = first_of_largest(members, expert)
                total += unsortable(best)
                members = tl.where(expert == index, LOWEST, members)
            group_scores = tl.where(group == number, total, group_scores)
        group_choice = sortable(group_scores)
        is_best = expert < 0
        for _ in tl.static_range(CHOSEN_GROUPS):
            _, index = first_of_largest(group_choice, group)
            is_best = is_best | (group_of_expert == index)
            group_choice = tl.where(group == index, LOWEST, group_choice)
        choice = tl.where(is_best, choice, LOWEST)
    position = tl.arange(0, TOP_K_POW2)
    chosen = tl.zeros([TOP_K_POW2], tl.int32)
    weights = tl.zeros([TOP_K_POW2], tl.float32)
    for number in tl.static_range(TOP_K):
        _, index = first_of_largest(choice, expert)
        # Scores are not negative, so that their bits sort like them.
        weight = tl.max(tl.where(expert == index, scores.to(tl.int32, bitcast=True), 0), 0)
        chosen = tl.where(position == number, index, chosen)
        weights = tl.where(position == number, weight.to(tl.float32, bitcast=True), weights)
        choice = tl.where(expert == index, LOWEST, choice)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, 0) + TINY_SUM)
    tl.store(experts_ptr + token * TOP_K + position, chosen, mask=position < TOP_K)
    tl.store(weights_ptr + token * TOP_K + position, weights, mask=position < TOP_K)


@triton.jit
def sortable(value):
    """int32 numbers that sort like float32 ``value``: finding their largest is one instruction."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unsortable(key):
    """The inverse of :func:`sortable`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def first_of_largest(key, index):
    """The largest of ``key``, and the least ``index`` that has it."""
    best = tl.max(key, 0)
    return best, tl.min(tl.where(key == best, index, 2147483647), 0)
