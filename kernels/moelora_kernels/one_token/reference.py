"""The experts of one token in plain ``jax.numpy``: the general kernels, one after another."""

from jax import Array

from moelora_kernels.combine.api import combine
from moelora_kernels.expert_lora.api import Activation, down, gate_up, shrink
from moelora_kernels.sort.api import sort_tokens
from moelora_kernels.types import Buffer, ExpertPages


def one_token_experts(
    x: Array,
    experts: Array,
    weights: Array,
    num_tokens: Array,
    gate_up_weight: Array,
    down_weight: Array,
    layer: Array,
    *,
    activation: Activation,
    scaling: float,
    adapter_of_token: Array | None,
    pages: ExpertPages | None,
    gate_up_ranks: Buffer | None,
    hidden: Buffer | None,
    down_ranks: Buffer | None,
    out: Buffer | None,
) -> Buffer:
    """See :func:`moelora_kernels.one_token_experts`."""
    num_experts, top_k = gate_up_weight.shape[1], experts.shape[1]
    sort = sort_tokens(
        experts,
        adapter_of_token,
        num_tokens,
        num_experts=num_experts,
        num_adapters=0 if pages is None else pages.gate.num_adapters,
        tile_rows=1,
        implementation="reference",
    )
    z_gate_up = z_down = sites = None
    if pages is not None:
        sites = (pages.gate, pages.up)
        z_gate_up = shrink(
            x,
            sort,
            sites,
            layer,
            pairs=top_k,
            tile_rows=1,
            top_k=top_k,
            out=gate_up_ranks,
            implementation="reference",
        )
    rows = gate_up(
        x,
        gate_up_weight,
        sort,
        layer,
        top_k=top_k,
        tile_rows=1,
        activation=activation,
        rank_activations=z_gate_up,
        sites=sites,
        out=hidden,
        implementation="reference",
    )
    if pages is not None:
        z_down = shrink(
            rows,
            sort,
            (pages.down,),
            layer,
            pairs=top_k,
            tile_rows=1,
            out=down_ranks,
            implementation="reference",
        )
    outputs = down(
        rows,
        down_weight,
        sort,
        layer,
        pairs=top_k,
        tile_rows=1,
        rank_activations=z_down,
        site=None if pages is None else pages.down,
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
