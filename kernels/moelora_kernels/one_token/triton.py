"""The experts of one token in Triton: matrix-vector products on the ordinary units.

All rows are pairs in the order of the router's choices. Down sums over the experts in float32, so
there is no combine.
"""

import jax
import triton
import triton.language as tl
from jax import Array

from moelora_kernels.backend import Launch, launch, scalar
from moelora_kernels.expert_lora.triton import activate, shrink_row
from moelora_kernels.types import PAGE_ROWS, Buffer, ExpertPages, SitePages


def one_token_experts(
    x: Array,
    experts: Array,
    weights: Array,
    num_tokens: Array,
    gate_up_weight: Array,
    down_weight: Array,
    layer: Array,
    *,
    activation: str,
    scaling: float,
    adapter_of_token: Array | None,
    pages: ExpertPages | None,
    gate_up_ranks: Buffer | None,
    hidden: Buffer | None,
    down_ranks: Buffer | None,
    out: Buffer | None,
) -> Buffer:
    """See :func:`moelora_kernels.one_token_experts`."""
    top_k = experts.shape[1]
    _, num_experts, _, inner, width = gate_up_weight.shape
    token = (experts, adapter_of_token, scalar(num_tokens), scalar(layer))

    def shrink(source: Buffer, sites: tuple[SitePages, ...], step: int, z: Buffer | None) -> Buffer:
        """``step`` is 0 where all pairs read the token's row, and 1 where each has its own."""
        shape = (len(sites), top_k, sites[0].max_rank) if z is None else z.shape
        # Few programs: each must have many loads in flight.
        block_k = min(triton.next_power_of_2(source.shape[1]), 2048)
        second = sites[1] if len(sites) == 2 else None
        return launch(
            shrink_token,
            (
                source,
                *token,
                *(sites[0].a_pool, sites[0].table, sites[0].scaling),
                *((None,) * 3 if second is None else (second.a_pool, second.table, second.scaling)),
            ),
            [jax.ShapeDtypeStruct(shape, x.dtype)],
            None if z is None else [z],
            Launch((top_k, sites[0].table.shape[3], len(sites)), num_warps=max(4, block_k // 128)),
            WIDTH=source.shape[1],
            STEP=step,
            NUM_EXPERTS=num_experts,
            NUM_ADAPTERS=sites[0].num_adapters,
            MAX_PAGES=sites[0].table.shape[3],
            PAGE_ROWS=PAGE_ROWS,
            Z_ROWS=shape[1],
            Z_COLUMNS=shape[2],
            BLOCK_K=block_k,
        )[0]

    def expand_constants(site: SitePages | None, z: Buffer | None) -> dict[str, int]:
        return {
            "NUM_EXPERTS": num_experts,
            "NUM_ADAPTERS": 0 if site is None else site.num_adapters,
            "MAX_PAGES": 0 if site is None else site.table.shape[3],
            "PAGE_ROWS": PAGE_ROWS,
            "Z_ROWS": 0 if z is None else z.shape[1],
            "Z_COLUMNS": 0 if z is None else z.shape[2],
        }

    gate = down = z = None
    factors: tuple[Array | None, ...] = (None,) * 4
    if pages is not None:
        gate, up, down = pages
        z = shrink(x, (gate, up), 0, gate_up_ranks)
        factors = (gate.table, gate.b_pool, up.table, up.b_pool)
    hidden = launch(
        gate_up_token,
        (x, gate_up_weight, *token, z, *factors),
        [jax.ShapeDtypeStruct((top_k, inner), x.dtype)],
        None if hidden is None else [hidden],
        Launch((triton.cdiv(inner, 8), top_k), num_warps=4),
        HIDDEN=width,
        INTERMEDIATE=inner,
        ACTIVATION=activation,
        BLOCK_N=8,
        BLOCK_K=min(triton.next_power_of_2(width), 512),
        **expand_constants(gate, z),
    )[0]
    z, factors = None, (None,) * 2
    if down is not None:
        z = shrink(hidden, (down,), 1, down_ranks)
        factors = (down.table, down.b_pool)
    return launch(
        down_token,
        (hidden, down_weight, weights, *token, z, *factors),
        [jax.ShapeDtypeStruct((1, width), x.dtype)],
        None if out is None else [out],
        Launch((triton.cdiv(width, 8),), num_warps=4),
        HIDDEN=width,
        INTERMEDIATE=inner,
        TOP_K=top_k,
        SCALING=float(scaling),
        BLOCK_N=8,
        BLOCK_K=min(triton.next_power_of_2(inner), 256 if inner % 512 else 512),
        **expand_constants(down, z),
    )[0]


@triton.jit
def shrink_token(
    x_ptr,
    experts_ptr,
    adapter_ptr,
    num_tokens_ptr,
    layer_ptr,
    pool_0_ptr,
    table_0_ptr,
    scaling_0_ptr,
    pool_1_ptr,
    table_1_ptr,
    scaling_1_ptr,
    z_ptr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One pair, page and site per program: ``z = scaling · A · x[STEP * pair]``."""
    pair, page, site = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    adapter = tl.load(adapter_ptr)
    if (tl.load(num_tokens_ptr) > 0) & (adapter >= 0):
        layer, expert = tl.load(layer_ptr), tl.load(experts_ptr + pair)
        x_ptr += pair * STEP * WIDTH
        z_ptr += (site * Z_ROWS + pair) * Z_COLUMNS + page * PAGE_ROWS
        entry = ((layer * 2 * NUM_ADAPTERS + adapter) * MAX_PAGES + page) * NUM_EXPERTS + expert
        factor = (layer * NUM_ADAPTERS + adapter) * NUM_EXPERTS + expert
        if site == 0:
            shrink_row(
                x_ptr, pool_0_ptr, table_0_ptr + entry, scaling_0_ptr + factor, z_ptr,
                WIDTH, PAGE_ROWS, BLOCK_K,
            )  # fmt: skip
        elif pool_1_ptr is not None:
            shrink_row(
                x_ptr, pool_1_ptr, table_1_ptr + entry, scaling_1_ptr + factor, z_ptr,
                WIDTH, PAGE_ROWS, BLOCK_K,
            )  # fmt: skip


@triton.jit
def expand_pair(
    z_ptr,
    table_ptr,
    pool_ptr,
    columns,
    expert,
    adapter,
    layer,
    WIDTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
):
    """Products of ``z · B`` of one pair, ``[PAGE_ROWS, columns]``, to be summed over the rows.

    No branches: all loads are in flight together, and without an adapter all products are zero.
    """
    rank = tl.arange(0, PAGE_ROWS)
    inside = (columns < WIDTH)[None, :]
    products = tl.zeros([PAGE_ROWS, columns.shape[0]], tl.float32)
    entry_ptr = table_ptr + ((layer * 2 + 1) * NUM_ADAPTERS + adapter) * MAX_PAGES * NUM_EXPERTS
    for page in tl.static_range(MAX_PAGES):
        pool_row = tl.load(entry_ptr + page * NUM_EXPERTS + expert, mask=adapter >= 0, other=-1)
        exists = pool_row >= 0
        z = tl.load(z_ptr + page * PAGE_ROWS + rank, mask=exists & (rank >= 0), other=0.0)
        b_row = pool_row.to(tl.int64) * PAGE_ROWS + rank
        b = tl.load(
            pool_ptr + b_row[:, None] * WIDTH + columns[None, :], mask=exists & inside, other=0.0
        )
        products += z.to(tl.float32)[:, None] * b.to(tl.float32)
    return products


@triton.jit
def gate_up_token(
    x_ptr,
    weight_ptr,
    experts_ptr,
    adapter_ptr,
    num_tokens_ptr,
    layer_ptr,
    z_ptr,
    gate_table_ptr,
    gate_pool_ptr,
    up_table_ptr,
    up_pool_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
):
    """``BLOCK_N`` intermediate columns of one pair per program."""
    block, pair = tl.program_id(0), tl.program_id(1)
    if tl.load(num_tokens_ptr) > 0:
        layer, expert = tl.load(layer_ptr), tl.load(experts_ptr + pair)
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        column = tl.minimum(columns, INTERMEDIATE - 1)
        depth = tl.arange(0, BLOCK_K)
        half = INTERMEDIATE * HIDDEN
        weight_ptr += (layer * NUM_EXPERTS + expert).to(tl.int64) * (2 * half)
        gate_ptrs = weight_ptr + column[:, None] * HIDDEN + depth[None, :]
        gate_products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        up_products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for k in tl.range(0, HIDDEN, BLOCK_K, loop_unroll_factor=4):
            left = k + depth < HIDDEN
            x = tl.load(x_ptr + k + depth, mask=left, other=0.0).to(tl.float32)[None, :]
            gate_weight = tl.load(gate_ptrs + k, mask=left[None, :], other=0.0)
            up_weight = tl.load(gate_ptrs + half + k, mask=left[None, :], other=0.0)
            gate_products += gate_weight.to(tl.float32) * x
            up_products += up_weight.to(tl.float32) * x
        gate, up = tl.sum(gate_products, 1), tl.sum(up_products, 1)
        if z_ptr is not None:
            adapter = tl.load(adapter_ptr)
            z_ptr += pair * Z_COLUMNS
            gate += tl.sum(
                expand_pair(
                    z_ptr, gate_table_ptr, gate_pool_ptr, columns, expert, adapter, layer,
                    INTERMEDIATE, NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS,
                ),
                0,
            )  # fmt: skip
            up += tl.sum(
                expand_pair(
                    z_ptr + Z_ROWS * Z_COLUMNS, up_table_ptr, up_pool_ptr, columns, expert,
                    adapter, layer,
                    INTERMEDIATE, NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS,
                ),
                0,
            )  # fmt: skip
        hidden = activate(gate, up, ACTIVATION).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + pair * INTERMEDIATE + columns, hidden, mask=columns < INTERMEDIATE)


@triton.jit
def down_token(
    hidden_ptr,
    weight_ptr,
    weights_ptr,
    experts_ptr,
    adapter_ptr,
    num_tokens_ptr,
    layer_ptr,
    z_ptr,
    table_ptr,
    pool_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    SCALING: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ADAPTERS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
):
    """``BLOCK_N`` hidden columns per program, summed over the experts in order of the choices."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.minimum(columns, HIDDEN - 1)
    depth = tl.arange(0, BLOCK_K)
    products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    lora_products = tl.zeros([PAGE_ROWS, BLOCK_N], tl.float32)
    if tl.load(num_tokens_ptr) > 0:
        layer = tl.load(layer_ptr)
        for pair in tl.static_range(TOP_K):
            expert, router_weight = tl.load(experts_ptr + pair), tl.load(weights_ptr + pair)
            expert_ptr = weight_ptr + (layer * NUM_EXPERTS + expert).to(tl.int64) * (
                HIDDEN * INTERMEDIATE
            )
            tile_ptrs = expert_ptr + column[:, None] * INTERMEDIATE + depth[None, :]
            for k in tl.range(0, INTERMEDIATE, BLOCK_K, loop_unroll_factor=4):
                left = k + depth < INTERMEDIATE
                hidden = tl.load(hidden_ptr + pair * INTERMEDIATE + k + depth, mask=left, other=0.0)
                weight = tl.load(tile_ptrs + k, mask=left[None, :], other=0.0)
                products += weight.to(tl.float32) * (hidden.to(tl.float32) * router_weight)[None, :]
        if z_ptr is not None:
            adapter = tl.load(adapter_ptr)
            for pair in tl.static_range(TOP_K):
                lora_products += tl.load(weights_ptr + pair) * expand_pair(
                    z_ptr + pair * Z_COLUMNS, table_ptr, pool_ptr, columns,
                    tl.load(experts_ptr + pair), adapter, layer,
                    HIDDEN, NUM_EXPERTS, NUM_ADAPTERS, MAX_PAGES, PAGE_ROWS,
                )  # fmt: skip
    total = tl.sum(products, 1)
    if z_ptr is not None:
        total += tl.sum(lora_products, 0)
    total = (total * SCALING).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + columns, total, mask=columns < HIDDEN)
