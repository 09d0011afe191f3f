"""The experts of a batch of one token: nothing to sort, and few bytes, so every launch counts."""

from jax import Array
from jaxtyping import Float, Int32

from moelora_kernels.backend import Implementation, choose
from moelora_kernels.expert_lora.api import Activation
from moelora_kernels.one_token import reference
from moelora_kernels.types import Buffer, ExpertPages


def one_token_experts(
    x: Float[Array, "1 hidden"],
    experts: Int32[Array, "1 top_k"],
    weights: Float[Array, "1 top_k"],
    num_tokens: Int32[Array, ""],
    gate_up_weight: Float[Array, "layers experts 2 intermediate hidden"],
    down_weight: Float[Array, "layers experts hidden intermediate"],
    layer: Int32[Array, ""],
    *,
    activation: Activation = "silu",
    scaling: float = 1.0,
    adapter_of_token: Int32[Array, " 1"] | None = None,
    pages: ExpertPages | None = None,
    gate_up_ranks: Buffer | None = None,
    hidden: Buffer | None = None,
    down_ranks: Buffer | None = None,
    out: Buffer | None = None,
    implementation: Implementation | None = None,
) -> Buffer:
    """``scaling · Σ_k weights[k] · expert_k(x)`` with LoRA, in four launches; in two without.

    Args:
        x: hidden state of the token in the compute dtype.
        experts: chosen experts.
        weights: router weights, float32.
        num_tokens: 1, or 0 where the token is padding.
        gate_up_weight: gate (index 0) and up (1) projections of all layers.
        down_weight: down projections of all layers.
        layer: row of the weights and of the page tables.
        activation: see :func:`moelora_kernels.gate_up`.
        scaling: factor on the sum.
        adapter_of_token: adapter slot or -1; needed with ``pages``.
        pages: resident adapters; None runs the base model.
        gate_up_ranks: reference ``[2, >= top_k, >= max_rank]`` for rank activations.
        hidden: reference ``[>= top_k, intermediate]`` for hidden activations.
        down_ranks: reference ``[1, >= top_k, >= max_rank]`` for rank activations.
        out: reference ``[>= 1, hidden]`` in the dtype of ``x``.
        implementation: None chooses by the default device.

    Returns:
        ``[1, hidden]`` in the dtype of ``x``; zeros for padding.
    """
    if (adapter_of_token is None) != (pages is None):
        raise ValueError("adapter_of_token and pages must be given together")
    run = reference.one_token_experts
    if choose(implementation) == "triton":
        from moelora_kernels.one_token import triton

        run = triton.one_token_experts
    return run(
        x,
        experts,
        weights,
        num_tokens,
        gate_up_weight,
        down_weight,
        layer,
        activation=activation,
        scaling=scaling,
        adapter_of_token=adapter_of_token,
        pages=pages,
        gate_up_ranks=gate_up_ranks,
        hidden=hidden,
        down_ranks=down_ranks,
        out=out,
    )
