"""One MoE layer with LoRA, built from the kernels: a function, and a flax module for research."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int32

from moelora_jax.config import MoeConfig
from moelora_jax.errors import MoeLoraError
from moelora_kernels import (
    PAGE_ROWS,
    RANK_PADDING,
    SIGNALS,
    Buffer,
    ExpertPages,
    LinearMap,
    SitePages,
    TokenSort,
    combine,
    down,
    fused_experts,
    gate_up,
    linear_lora,
    route,
    sort_tokens,
    token_sort_shapes,
)
from moelora_kernels.backend import Implementation, choose
from moelora_kernels.tuning.tiles import MoeTiles, moe_tiles


class MoeParams(NamedTuple):
    """Weights of the routed layers, stacked over layers, in the compute dtype.

    Attributes:
        router: ``[layers, experts, hidden]``.
        gate_up: ``[layers, experts, 2, intermediate, hidden]``; index 0 is gate, 1 is up.
        down: ``[layers, experts, hidden, intermediate]``.
        router_bias: ``[layers, experts]``, or None where the model has none; so are the others.
        correction_bias: ``[layers, experts]``, float32 whatever the compute dtype.
        gate_up_bias: ``[layers, experts, 2, intermediate]``.
        down_bias: ``[layers, experts, hidden]``.
    """

    router: Array
    gate_up: Array
    down: Array
    router_bias: Array | None = None
    correction_bias: Array | None = None
    gate_up_bias: Array | None = None
    down_bias: Array | None = None


class MoeWorkspace(NamedTuple):
    """Every intermediate of an MoE layer that outlives a kernel, shared by all layers and buckets.

    Attributes:
        sort: the token sort.
        gate_up_ranks: ``[2, pairs + RANK_PADDING, max_rank]``, rank activations of gate and up;
            None without LoRA.
        hidden: ``[pairs, intermediate]``, after the activation.
        down_ranks: ``[1, pairs + RANK_PADDING, max_rank]``; None without LoRA.
        expert_out: ``[pairs, hidden]``.
        signals: int32, by which programs of one launch wait for each other; zero between launches.
    """

    sort: TokenSort
    gate_up_ranks: Buffer | None
    hidden: Buffer
    down_ranks: Buffer | None
    expert_out: Buffer
    signals: Buffer


def tile_rows(pairs: int, num_experts: int) -> int:
    """Rows of a tile of the reference: small enough that few rows of a tile are empty."""
    mean_rows = pairs / num_experts
    return 16 if mean_rows <= 16 else 32 if mean_rows <= 64 else 64


def moe_workspace_shapes(
    config: MoeConfig, tokens: int, *, num_adapters: int, max_rank: int, dtype: DTypeLike
) -> MoeWorkspace:
    """What a workspace must hold for a batch of ``tokens`` tokens.

    Args:
        config: the layer.
        tokens: tokens of the largest bucket.
        num_adapters: adapter slots; 0 for a model without LoRA.
        max_rank: largest rank, a multiple of the page's rows.
        dtype: compute dtype.
    """
    pairs = tokens * config.top_k
    sort = token_sort_shapes(
        tokens,
        config.top_k,
        num_experts=config.num_experts,
        num_adapters=num_adapters,
        tile_rows=16,
    )

    def shape(*sizes: int, dtype: DTypeLike = dtype) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    return MoeWorkspace(
        sort=sort,
        gate_up_ranks=shape(2, pairs + RANK_PADDING, max_rank) if num_adapters else None,
        hidden=shape(pairs, config.intermediate_size),
        down_ranks=shape(1, pairs + RANK_PADDING, max_rank) if num_adapters else None,
        expert_out=shape(pairs, config.hidden_size),
        signals=shape(*SIGNALS, dtype="int32"),
    )


def moe_router(
    x: Float[Array, "tokens hidden"],
    params: MoeParams,
    layer: Int32[Array, ""],
    config: MoeConfig,
    *,
    pages: SitePages | None = None,
    sort: TokenSort | None = None,
    sort_tile_rows: int = 0,
    signals: Buffer | None = None,
    implementation: Implementation | None = None,
) -> tuple[
    Float[Array, "tokens experts"], Int32[Array, "tokens top_k"], Float[Array, "tokens top_k"]
]:
    """The first half of :func:`moe_lora`: router logits, chosen experts and their weights.

    Args:
        x: hidden states in the compute dtype, after the norm.
        params: stacked weights.
        layer: which of the stacked layers.
        config: the layer's description.
        pages: of the router's own site; None where adapters do not change it.
        sort: tokens sorted by adapter; with the two below as in
            :func:`moelora_kernels.linear_lora`. Only with ``pages``.
        sort_tile_rows: what the sort was made with.
        signals: counters.
        implementation: of all kernels; None chooses by the default device.

    Returns:
        Float32 logits, then as :func:`moelora_kernels.route`.

    Raises:
        MoeLoraError: an array has another shape or dtype than ``config`` and ``x`` ask for.
    """
    _check_router(x, params, config)
    logits = linear_lora(
        x,
        [LinearMap(params.router, params.router_bias, pages)],
        layer,
        sort=None if pages is None else sort,
        tile_rows=sort_tile_rows,
        signals=signals,
        dtype=jnp.float32,
        implementation=implementation,
    )
    # Programs with and without adapters must round the same from here on, so XLA may not fuse what
    # made the logits with what follows.
    logits = lax.optimization_barrier(logits)
    bias = params.correction_bias
    experts, weights = route(
        logits,
        top_k=config.top_k,
        scoring=config.scoring,
        renormalize=config.renormalize,
        correction_bias=None if bias is None else bias[layer],
        groups=config.groups,
        implementation=implementation,
    )
    return logits, experts, weights


def moe_lora(
    x: Float[Array, "tokens hidden"],
    params: MoeParams,
    layer: Int32[Array, ""],
    config: MoeConfig,
    *,
    num_tokens: Int32[Array, ""] | None = None,
    adapter_of_token: Int32[Array, " tokens"] | None = None,
    pages: ExpertPages | None = None,
    workspace: MoeWorkspace | None = None,
    out: Buffer | None = None,
    implementation: Implementation | None = None,
    tiles: MoeTiles | None = None,
) -> Buffer:
    """Route tokens to experts and sum the experts' outputs, each token with its own adapter.

    It runs alone or within ``jax.jit`` and ``jax.lax.scan``. It is for inference: the kernels have
    no gradients, and a batch of batches is one batch of more tokens, not a ``jax.vmap``. Numbers
    are not checked: a layer or adapter slot that does not exist gives numbers without meaning.

    Args:
        x: hidden states in the compute dtype, after the norm.
        params: stacked weights.
        layer: which of the stacked layers.
        config: the layer's description.
        num_tokens: tokens that are real; None means all. Others cost nothing and give zeros.
        adapter_of_token: adapter slot of each token, -1 for the base model. Only with ``pages``.
        pages: resident adapters, as :meth:`PagePool.device_state
            <moelora_jax.adapters.pages.PagePool.device_state>` has them; None runs the base model.
        workspace: references that intermediates are written to; None allocates them.
        out: reference ``[>= tokens, hidden]`` that the output is written to.
        implementation: of all kernels; None chooses by the default device.
        tiles: launch parameters of Triton's kernels; None takes them from the measured table.

    Returns:
        The layer's output in the dtype of ``x``, without the residual.

    Raises:
        MoeLoraError: an array has another shape or dtype than ``config`` and ``x`` ask for, or the
            call is differentiated or vmapped.
    """
    x, params, pages = _forward_only((x, params, pages))
    _, experts, weights = moe_router(x, params, layer, config, implementation=implementation)
    return moe_experts(
        x,
        experts,
        weights,
        params,
        layer,
        config,
        num_tokens=num_tokens,
        adapter_of_token=adapter_of_token,
        pages=pages,
        workspace=workspace,
        out=out,
        implementation=implementation,
        tiles=tiles,
    )


def moe_experts(
    x: Float[Array, "tokens hidden"],
    experts: Int32[Array, "tokens top_k"],
    weights: Float[Array, "tokens top_k"],
    params: MoeParams,
    layer: Int32[Array, ""],
    config: MoeConfig,
    *,
    num_tokens: Int32[Array, ""] | None = None,
    adapter_of_token: Int32[Array, " tokens"] | None = None,
    pages: ExpertPages | None = None,
    workspace: MoeWorkspace | None = None,
    out: Buffer | None = None,
    implementation: Implementation | None = None,
    tiles: MoeTiles | None = None,
) -> Buffer:
    """The second half of :func:`moe_lora`: ``experts`` and their float32 ``weights`` are given."""
    _check_experts(x, params, config, adapter_of_token, pages)
    tokens, top_k = experts.shape
    pairs = tokens * top_k
    if num_tokens is None:
        num_tokens = jnp.int32(tokens)
    if workspace is None:
        nothing: Any = None
        workspace = MoeWorkspace(*[nothing] * len(MoeWorkspace._fields))
    implementation = choose(implementation)
    if implementation == "reference":
        rows = tile_rows(pairs, config.num_experts)
    else:
        tiles = tiles or moe_tiles(
            num_experts=config.num_experts,
            top_k=top_k,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            tokens=tokens,
            dtype=x.dtype,
        )
        if tiles.one_launch or tokens == 1:
            return fused_experts(
                x,
                experts,
                weights,
                num_tokens,
                params.gate_up,
                params.down,
                layer,
                gate_up_bias=params.gate_up_bias,
                down_bias=params.down_bias,
                activation=config.activation,
                scaling=config.routed_scaling,
                adapter_of_token=adapter_of_token,
                pages=pages,
                sort=workspace.sort,
                gate_up_ranks=workspace.gate_up_ranks,
                hidden=workspace.hidden,
                down_ranks=workspace.down_ranks,
                expert_out=workspace.expert_out,
                signals=workspace.signals,
                out=out,
                tiles=tiles,
                implementation=implementation,
            )
        rows = tiles.tile_rows

    sort = sort_tokens(
        experts,
        adapter_of_token,
        num_tokens,
        num_experts=config.num_experts,
        num_adapters=0 if pages is None else pages.gate.num_adapters,
        tile_rows=rows,
        out=workspace.sort,
        implementation=implementation,
    )
    hidden = gate_up(
        x,
        params.gate_up,
        sort,
        layer,
        top_k=top_k,
        tile_rows=rows,
        activation=config.activation,
        bias=params.gate_up_bias,
        sites=None if pages is None else (pages.gate, pages.up),
        rank_activations=workspace.gate_up_ranks,
        signals=workspace.signals,
        out=workspace.hidden,
        # Free until the down projection.
        sorted_x=workspace.expert_out,
        tiles=None if tiles is None else tiles.gate_up,
        implementation=implementation,
    )
    expert_out = down(
        hidden,
        params.down,
        sort,
        layer,
        pairs=pairs,
        tile_rows=rows,
        bias=params.down_bias,
        site=None if pages is None else pages.down,
        rank_activations=workspace.down_ranks,
        signals=workspace.signals,
        dtype=x.dtype,
        out=workspace.expert_out,
        tiles=None if tiles is None else tiles.down,
        implementation=implementation,
    )
    return combine(
        expert_out,
        weights,
        sort,
        scaling=config.routed_scaling,
        dtype=x.dtype,
        out=out,
        implementation=implementation,
    )


#: A name, the array that was given, and the shape and dtype that it must have.
type _Expected = tuple[str, Array | None, tuple[int, ...], DTypeLike]


def _check_router(x: Array, params: MoeParams, config: MoeConfig) -> None:
    """Check what :func:`moe_router` reads."""
    layers, experts, hidden = params.gate_up.shape[0], config.num_experts, config.hidden_size
    _check(
        x,
        hidden,
        [
            ("params.router", params.router, (layers, experts, hidden), x.dtype),
            ("params.router_bias", params.router_bias, (layers, experts), x.dtype),
            ("params.correction_bias", params.correction_bias, (layers, experts), jnp.float32),
        ],
    )


def _check_experts(
    x: Array,
    params: MoeParams,
    config: MoeConfig,
    adapter_of_token: Array | None,
    pages: ExpertPages | None,
) -> None:
    """Check what :func:`moe_experts` reads."""
    if (adapter_of_token is None) != (pages is None):
        raise MoeLoraError("adapter_of_token and pages must be given together")
    layers, experts = params.gate_up.shape[0], config.num_experts
    hidden, inner = config.hidden_size, config.intermediate_size
    expected: list[_Expected] = [
        ("params.gate_up", params.gate_up, (layers, experts, 2, inner, hidden), x.dtype),
        ("params.down", params.down, (layers, experts, hidden, inner), x.dtype),
        ("params.gate_up_bias", params.gate_up_bias, (layers, experts, 2, inner), x.dtype),
        ("params.down_bias", params.down_bias, (layers, experts, hidden), x.dtype),
    ]
    if adapter_of_token is not None and pages is not None:
        expected.append(("adapter_of_token", adapter_of_token, (x.shape[0],), jnp.int32))
        widths = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
        for name, site in zip(widths, pages, strict=True):
            for side, pool, width in zip(("a", "b"), site[:2], widths[name], strict=True):
                page = (pool.shape[0], PAGE_ROWS, width)
                expected.append((f"pages.{name}.{side}_pool", pool, page, x.dtype))
            table = (*site.table.shape[:4], experts)
            expected.append((f"pages.{name}.table", site.table, table, jnp.int32))
    _check(x, hidden, expected)


def _check(x: Array, hidden: int, expected: Iterable[_Expected]) -> None:
    """Refuse shapes and dtypes that contradict each other: kernels would read what is elsewhere."""
    if x.ndim != 2 or x.shape[0] < 1:
        raise MoeLoraError(f"x must be [tokens, hidden] of some tokens, not {list(x.shape)}")
    for name, array, shape, dtype in [("x", x, (x.shape[0], hidden), x.dtype), *expected]:
        if array is not None and (array.shape != shape or array.dtype != dtype):
            raise MoeLoraError(
                f"{name} is {array.dtype}{list(array.shape)}; with this config and x it must be "
                f"{jnp.dtype(dtype)}{list(shape)}"
            )


@jax.custom_batching.custom_vmap
def _one_batch(arrays: Any) -> Any:
    return arrays


@_one_batch.def_vmap
def _no_vmap(*_: Any) -> Any:
    raise MoeLoraError(
        "moe_lora cannot be vmapped: its tokens are one batch already. Reshape x to "
        "[tokens, hidden], and give each token its adapter"
    )


@jax.custom_jvp
def _forward_only[Arrays](arrays: Arrays) -> Arrays:
    """The same arrays, to be differentiated or vmapped by nobody: JAX's errors name no layer."""
    return _one_batch(arrays)


@_forward_only.defjvp
def _no_gradients(*_: Any) -> Any:
    raise MoeLoraError(
        "moe_lora has no gradients: it is for inference. Train adapters elsewhere, and load them "
        "from their files or arrays"
    )


class MoeLoraLayer(nnx.Module):
    """A single MoE layer for research: weights in a module, adapters given at the call.

    Args:
        config: the layer.
        dtype: dtype of the weights and of the computation.
        rngs: source of the random initial weights.
    """

    def __init__(
        self, config: MoeConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        def normal(*shape: int) -> nnx.Param[Array]:
            scale = shape[-1] ** -0.5
            values = jax.random.normal(rngs.params(), (1, *shape), jnp.float32)
            return nnx.Param((values * scale).astype(dtype))

        experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.config = config
        self.router = normal(experts, hidden)
        self.gate_up = normal(experts, 2, inner, hidden)
        self.down = normal(experts, hidden, inner)

    def __call__(
        self,
        x: Float[Array, "tokens hidden"],
        adapter_of_token: Int32[Array, " tokens"] | None = None,
        pages: ExpertPages | None = None,
    ) -> Float[Array, "tokens hidden"]:
        """See :func:`moe_lora`."""
        params = MoeParams(self.router[...], self.gate_up[...], self.down[...])
        return moe_lora(
            x,
            params,
            jnp.int32(0),
            self.config,
            adapter_of_token=adapter_of_token,
            pages=pages,
        )
