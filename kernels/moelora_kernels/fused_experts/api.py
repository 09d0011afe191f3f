"""The whole layer of a small batch in one launch, of one token in two: every launch counts."""

from collections.abc import Callable
from typing import Any

from jax import Array
from jaxtyping import Float, Int32

from moelora_kernels.backend import Implementation, choose
from moelora_kernels.expert_lora.api import Activation
from moelora_kernels.fused_experts import reference
from moelora_kernels.tuning.tiles import MoeTiles, moe_tiles
from moelora_kernels.types import Buffer, ExpertPages, TokenSort


def fused_experts(
    x: Float[Array, "tokens hidden"],
    experts: Int32[Array, "tokens top_k"],
    weights: Float[Array, "tokens top_k"],
    num_tokens: Int32[Array, ""],
    gate_up_weight: Float[Array, "layers experts 2 intermediate hidden"],
    down_weight: Float[Array, "layers experts hidden intermediate"],
    layer: Int32[Array, ""],
    *,
    gate_up_bias: Float[Array, "layers experts 2 intermediate"] | None = None,
    down_bias: Float[Array, "layers experts hidden"] | None = None,
    activation: Activation = "silu",
    scaling: float = 1.0,
    adapter_of_token: Int32[Array, " tokens"] | None = None,
    pages: ExpertPages | None = None,
    sort: TokenSort | None = None,
    gate_up_ranks: Buffer | None = None,
    hidden: Buffer | None = None,
    down_ranks: Buffer | None = None,
    expert_out: Buffer | None = None,
    signals: Buffer | None = None,
    out: Buffer | None = None,
    tiles: MoeTiles | None = None,
    implementation: Implementation | None = None,
) -> Buffer:
    """``scaling · Σ_k weights[t, k] · expert_k(x[t])`` with LoRA: sort, products and combine.

    Args:
        x: hidden states in the compute dtype.
        experts: chosen experts.
        weights: router weights, float32.
        num_tokens: tokens that are real; the others are padding.
        gate_up_weight: gate (index 0) and up (1) projections of all layers.
        down_weight: down projections of all layers.
        layer: row of the weights and of the page tables.
        gate_up_bias: added before the activation.
        down_bias: added to each expert's output.
        activation: see :func:`moelora_kernels.gate_up`.
        scaling: factor on the sum.
        adapter_of_token: adapter slots or -1; needed with ``pages``.
        pages: resident adapters; None runs the base model.
        sort: references for the token sort; see :func:`moelora_kernels.token_sort_shapes`. This and
            the following are allocated where None.
        gate_up_ranks: reference ``[2, >= pairs, >= max_rank]`` for rank activations.
        hidden: reference ``[>= pairs, intermediate]`` for hidden activations.
        down_ranks: reference ``[1, >= pairs, >= max_rank]`` for rank activations.
        expert_out: reference ``[>= pairs, hidden]`` for the experts' outputs.
        signals: reference int32 ``SIGNALS``, zero before and after.
        out: reference ``[>= tokens, hidden]`` in the dtype of ``x``.
        tiles: launch parameters of the Triton kernel; None takes them from the measured table.
        implementation: None chooses by the default device.

    Returns:
        ``[tokens, hidden]`` in the dtype of ``x``; zeros for padding.
    """
    if (adapter_of_token is None) != (pages is None):
        raise ValueError("adapter_of_token and pages must be given together")
    run: Callable[..., Buffer] = reference.fused_experts
    more: dict[str, Any] = {"sort": sort, "expert_out": expert_out}
    if choose(implementation) == "triton":
        from moelora_kernels.fused_experts import triton, triton_one_token

        run = triton.fused_experts
        _, num_experts, _, intermediate, width = gate_up_weight.shape
        more |= {
            "signals": signals,
            "tiles": tiles
            or moe_tiles(
                num_experts=num_experts,
                top_k=experts.shape[1],
                hidden=width,
                intermediate=intermediate,
                tokens=experts.shape[0],
                dtype=x.dtype,
            ),
        }
        if experts.shape[0] == 1:  # Nothing to sort, and no tiles of several rows.
            run, more = triton_one_token.one_token, {"signals": signals}
    return run(
        x,
        experts,
        weights,
        num_tokens,
        gate_up_weight,
        down_weight,
        layer,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        activation=activation,
        scaling=scaling,
        adapter_of_token=adapter_of_token,
        pages=pages,
        gate_up_ranks=gate_up_ranks,
        hidden=hidden,
        down_ranks=down_ranks,
        out=out,
        **more,
    )
