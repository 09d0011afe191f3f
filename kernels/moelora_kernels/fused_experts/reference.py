"""The layer of a small batch in plain ``jax.numpy``: the general kernels, one after another."""

from jax import Array

from moelora_kernels.combine.api import combine
from moelora_kernels.expert_lora.api import Activation, down, gate_up
from moelora_kernels.sort.api import sort_tokens
from moelora_kernels.types import Buffer, ExpertPages, TokenSort

#: Rows of a tile: few, as there are few rows of an expert.
TILE_ROWS = 16


def fused_experts(
    x: Array,
    experts: Array,
    weights: Array,
    num_tokens: Array,
    gate_up_weight: Array,
    down_weight: Array,
    layer: Array,
    *,
    gate_up_bias: Array | None,
    down_bias: Array | None,
    activation: Activation,
    scaling: float,
    adapter_of_token: Array | None,
    pages: ExpertPages | None,
    sort: TokenSort | None,
    gate_up_ranks: Buffer | None,
    hidden: Buffer | None,
    down_ranks: Buffer | None,
    expert_out: Buffer | None,
    out: Buffer | None,
) -> Buffer:
    """See :func:`moelora_kernels.fused_experts`."""
    num_experts, top_k = gate_up_weight.shape[1], experts.shape[1]
    sort = sort_tokens(
        experts,
        adapter_of_token,
        num_tokens,
        num_experts=num_experts,
        num_adapters=0 if pages is None else pages.gate.num_adapters,
        tile_rows=TILE_ROWS,
        out=sort,
        implementation="reference",
    )
    rows = gate_up(
        x,
        gate_up_weight,
        sort,
        layer,
        top_k=top_k,
        tile_rows=TILE_ROWS,
        activation=activation,
        bias=gate_up_bias,
        sites=None if pages is None else (pages.gate, pages.up),
        rank_activations=gate_up_ranks,
        out=hidden,
        implementation="reference",
    )
    outputs = down(
        rows,
        down_weight,
        sort,
        layer,
        pairs=experts.size,
        tile_rows=TILE_ROWS,
        bias=down_bias,
        site=None if pages is None else pages.down,
        rank_activations=down_ranks,
        dtype=x.dtype,
        out=expert_out,
        implementation="reference",
    )
    return combine(
        outputs,
        weights,
        sort,
        scaling=scaling,
        dtype=x.dtype,
        out=out,
        implementation="reference",
    )
