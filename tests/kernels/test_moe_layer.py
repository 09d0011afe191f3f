"""The whole layer, as moelora_jax builds it from the kernels, against NumPy float64."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moelora_jax.config import MoeConfig
from moelora_jax.errors import MoeLoraError
from moelora_jax.moe import (
    MoeLoraLayer,
    MoeParams,
    MoeWorkspace,
    moe_experts,
    moe_lora,
    moe_workspace_shapes,
    tile_rows,
)
from moelora_kernels import ExpertPages, token_sort_shapes
from tests.kernels.cases import (
    DTYPES,
    LAYER,
    LAYERS,
    SQUARE,
    TOP_8,
    WIDE,
    LayerCase,
    LayerSpec,
    assert_close,
    assert_same_bits,
    layer_specs,
    poisoned_like,
    to_device,
)

SCALING = 2.5
#: Where it is not SiLU.
ACTIVATION = {SQUARE: "clamped_swiglu"}


def config_of(case: LayerCase, **options: object) -> MoeConfig:
    return MoeConfig(
        num_experts=case.shape.experts,
        top_k=case.shape.top_k,
        hidden_size=case.shape.hidden,
        intermediate_size=case.shape.intermediate,
        routed_scaling=SCALING,
        activation=ACTIVATION.get(case.shape, "silu"),
        **options,
    )


def params_of(case: LayerCase, router: np.ndarray | None = None) -> MoeParams:
    routers = np.full((LAYERS, case.shape.experts, case.shape.hidden), np.nan)
    if router is not None:
        routers[int(case.layer)] = router
    return MoeParams(case.cast(routers), case.cast(case.gate_up), case.cast(case.down))


def workspace_of(case: LayerCase, config: MoeConfig, more_tokens: int = 3) -> MoeWorkspace:
    """A poisoned workspace for a larger batch than the case's."""
    shapes = moe_workspace_shapes(
        config,
        case.shape.tokens + more_tokens,
        num_adapters=case.shape.adapters,
        max_rank=case.shape.max_rank,
        dtype=jnp.dtype(case.dtype),
    )
    return poisoned_like(shapes)


def _run(
    workspace: MoeWorkspace | None, config: MoeConfig, *args: object, **kwargs: object
) -> tuple[jax.Array, MoeWorkspace | None]:
    refs = None if workspace is None else jax.tree.map(jax.new_ref, workspace)
    x, *routing, params, layer = args
    function = moe_experts if routing else moe_lora
    result = function(x, *routing, params, layer, config, **kwargs, workspace=refs)
    return result, None if refs is None else jax.tree.map(jax.freeze, refs)


program = jax.jit(_run, static_argnums=1, donate_argnums=0)


def run(
    case: LayerCase,
    workspace: MoeWorkspace | None = None,
    *,
    lora: bool = True,
    page_seed: int = 0,
) -> tuple[np.ndarray, MoeWorkspace | None]:
    """The layer's output with the routing of the case, and the workspace."""
    adapters = {}
    if lora:
        adapters["adapter_of_token"] = jnp.asarray(case.adapter_of_token)
        adapters["pages"] = case.pages(page_seed)
    result, workspace = program(
        workspace,
        config_of(case),
        case.cast(case.x),
        jnp.asarray(case.experts),
        to_device(case.weights, "float32"),
        params_of(case),
        case.layer,
        num_tokens=case.device_num_tokens,
        **adapters,
    )
    return np.asarray(result), workspace


def expected_output(case: LayerCase, lora: bool = True) -> np.ndarray:
    config = config_of(case)
    return case.layer_output(lora=lora, activation=config.activation, scaling=SCALING)


def check(spec: LayerSpec) -> None:
    case = LayerCase(spec)
    result, _ = run(case, workspace_of(case, config_of(case)))
    assert_close(result, expected_output(case), case.dtype)
    assert not result[case.num_tokens :].any()


@settings(max_examples=40)
@given(spec=layer_specs(dtypes=["float32"]))
def test_layer_float32(spec: LayerSpec) -> None:
    check(spec)


@settings(max_examples=20)
@given(spec=layer_specs(shapes=[WIDE], dtypes=["bfloat16"]))
def test_layer_bfloat16(spec: LayerSpec) -> None:
    check(spec)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15)
@given(data=st.data())
def test_rows_without_adapter_are_bitwise_those_of_the_base_program(
    dtype: str, data: st.DataObject
) -> None:
    case = LayerCase(data.draw(layer_specs(shapes=[WIDE], dtypes=[dtype])))
    mixed, _ = run(case, workspace_of(case, config_of(case)))
    base, _ = run(case, workspace_of(case, config_of(case)), lora=False)
    without = np.flatnonzero(case.adapter_of_token[: case.num_tokens] < 0)
    assert_same_bits(mixed[without], base[without])
    assert_close(base, expected_output(case, lora=False), case.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_again(dtype: str) -> None:
    case = LayerCase(LayerSpec(WIDE, dtype=dtype, num_tokens=31))
    config = config_of(case)
    first, used = run(case, workspace_of(case, config))
    # Again, in a workspace that the last call and a call with other numbers have used.
    again, used = run(case, used)
    assert_same_bits(again, first)
    other = LayerCase(LayerSpec(WIDE, dtype=dtype, assignment="one", seed=5))
    _, used = run(other, used)
    again, _ = run(case, used)
    assert_same_bits(again, first)
    # With the pages in other rows of the pools.
    moved, _ = run(case, workspace_of(case, config), page_seed=1)
    assert_same_bits(moved, first)


def test_a_workspace_makes_no_difference() -> None:
    case = LayerCase(LayerSpec(WIDE, dtype="bfloat16", num_tokens=31))
    assert_same_bits(run(case)[0], run(case, workspace_of(case, config_of(case)))[0])


def test_a_donated_workspace_stays_where_it_is() -> None:
    """Also when a smaller batch, and one without adapters, uses it in between."""
    large = LayerCase(LayerSpec(WIDE))
    small = LayerCase(LayerSpec(WIDE._replace(tokens=7), num_tokens=5))
    workspace = workspace_of(large, config_of(large))
    addresses = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(workspace)]
    assert len(set(addresses)) == len(addresses)
    for case, lora in ((large, True), (small, True), (large, False), (large, True)):
        result, workspace = run(case, workspace, lora=lora)
        assert_close(result, expected_output(case, lora), "float32")
        after = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(workspace)]
        assert after == addresses


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_layer_with_router(seed: int) -> None:
    case = LayerCase(LayerSpec(TOP_8, num_tokens=6, seed=seed))
    router, logits = case.router()
    real = slice(0, case.num_tokens)
    scores = 1 / (1 + np.exp(-logits[real]))
    chosen = np.take_along_axis(scores, case.experts[real], axis=1)
    case.weights[real] = chosen / chosen.sum(axis=1, keepdims=True)
    result, _ = program(
        None,
        config_of(case, scoring="sigmoid"),
        case.cast(case.x),
        params_of(case, router),
        case.layer,
        num_tokens=case.device_num_tokens,
        adapter_of_token=jnp.asarray(case.adapter_of_token),
        pages=case.pages(),
    )
    assert_close(np.asarray(result), expected_output(case), "float32")


def test_adapters_and_pages_come_together() -> None:
    case = LayerCase(LayerSpec(SQUARE))
    arguments = (
        case.cast(case.x),
        jnp.asarray(case.experts),
        to_device(case.weights, "float32"),
        params_of(case),
        case.layer,
        config_of(case),
    )
    message = "adapter_of_token and pages must be given together"
    with pytest.raises(MoeLoraError, match=message):
        moe_experts(*arguments, adapter_of_token=jnp.asarray(case.adapter_of_token))
    with pytest.raises(MoeLoraError, match=message):
        moe_experts(*arguments, pages=case.pages())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "change"),
    {
        "x": lambda a: {"x": a["x"][:, 1:]},
        r"x must be \[tokens, hidden\]": lambda a: {"x": a["x"][None]},
        r"x must be \[tokens, hidden\] of some": lambda a: {"x": a["x"][:0]},
        "params.router": lambda a: {"params": a["params"]._replace(router=a["params"].down)},
        "params.gate_up": lambda a: {"config": replace(a["config"], intermediate_size=1)},
        "params.down": lambda a: {"params": a["params"]._replace(down=a["params"].down[:1])},
        "params.router is bfloat16": lambda a: {
            "params": jax.tree.map(lambda p: p.astype("bfloat16"), a["params"])
        },
        "params.down_bias": lambda a: {"params": a["params"]._replace(down_bias=a["params"].down)},
        "adapter_of_token": lambda a: {"adapter_of_token": a["adapter_of_token"][1:]},
        "adapter_of_token is float32": lambda a: {
            "adapter_of_token": a["adapter_of_token"].astype("float32")
        },
        "pages.gate.a_pool": lambda a: {"pages": a["pages"]._replace(gate=a["pages"].down)},
        "pages.down.table": lambda a: {
            "pages": a["pages"]._replace(
                down=a["pages"].down._replace(table=a["pages"].down.table[..., 1:])
            )
        },
    }.items(),
)
def test_arguments_that_contradict_each_other_are_named(name: str, change: Any) -> None:
    case = LayerCase(LayerSpec(WIDE))
    arguments: dict[str, Any] = {
        "x": case.cast(case.x),
        "params": params_of(case),
        "layer": case.layer,
        "config": config_of(case),
        "adapter_of_token": jnp.asarray(case.adapter_of_token),
        "pages": case.pages(),
    }
    with pytest.raises(MoeLoraError, match=f"^{name}"):
        moe_lora(**arguments | change(arguments))


def test_gradients_and_vmap_are_refused() -> None:
    module = MoeLoraLayer(MoeConfig(4, 2, 16, 16), rngs=nnx.Rngs(0))
    x = jnp.ones((3, 16))
    for differentiate in (jax.grad, jax.value_and_grad, jax.jacfwd):
        with pytest.raises(MoeLoraError, match="has no gradients"):
            differentiate(lambda x: module(x).sum())(x)
    with pytest.raises(MoeLoraError, match="has no gradients"):
        nnx.grad(lambda module: module(x).sum())(module)
    with pytest.raises(MoeLoraError, match="cannot be vmapped"):
        jax.vmap(module)(x[None])


def test_a_workspace_that_is_too_small_raises() -> None:
    case = LayerCase(LayerSpec(SQUARE))
    with pytest.raises(ValueError, match="too small"):
        run(case, workspace_of(case, config_of(case), more_tokens=-1))


def test_a_workspace_fits_every_smaller_batch() -> None:
    """Tiles get smaller with the batch, but the maps never need more entries."""
    config = MoeConfig(num_experts=8, top_k=2, hidden_size=4, intermediate_size=4)
    for tokens in (1, 60, 300):
        shapes = moe_workspace_shapes(
            config, tokens, num_adapters=3, max_rank=16, dtype=jnp.float32
        )
        for fewer in range(1, tokens + 1, 7):
            rows = tile_rows(fewer * config.top_k, config.num_experts)
            needed = token_sort_shapes(
                fewer, config.top_k, num_experts=8, num_adapters=3, tile_rows=rows
            )
            for have, need in zip(shapes.sort, needed, strict=True):
                assert have.shape[0] >= need.shape[0]


def test_a_workspace_without_adapters_has_no_rank_activations() -> None:
    config = MoeConfig(num_experts=8, top_k=2, hidden_size=4, intermediate_size=4)
    shapes = moe_workspace_shapes(config, 5, num_adapters=0, max_rank=16, dtype=jnp.float32)
    assert shapes.gate_up_ranks is None
    assert shapes.down_ranks is None
    assert shapes.sort.run_tiles.shape == (0, 4)


# The module ---------------------------------------------------------------------------------------


@nnx.jit
def call(module: MoeLoraLayer, *args: object) -> jax.Array:
    return module(*args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_of_the_module(dtype: str) -> None:
    config = MoeConfig(num_experts=3, top_k=1, hidden_size=32, intermediate_size=32)
    module = MoeLoraLayer(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    params = [module.router[...], module.gate_up[...], module.down[...]]
    assert [param.shape for param in params] == [(1, 3, 32), (1, 3, 2, 32, 32), (1, 3, 32, 32)]
    for param in params:
        assert param.dtype == dtype
        deviation = np.asarray(param, np.float64).std() * param.shape[-1] ** 0.5
        assert 0.7 < deviation < 1.3


def test_the_module_is_moe_lora() -> None:
    case = LayerCase(LayerSpec(SQUARE._replace(tokens=4)))
    config = config_of(case)
    module = MoeLoraLayer(config, rngs=nnx.Rngs(0))
    params = MoeParams(module.router[...], module.gate_up[...], module.down[...])
    x, adapters = case.cast(case.x), jnp.asarray(case.adapter_of_token)
    # The module has one layer.
    last = slice(LAYER, None)
    pages = ExpertPages(
        *(
            site._replace(table=site.table[last], scaling=site.scaling[last])
            for site in case.pages()
        )
    )

    @nnx.jit
    def call(module: MoeLoraLayer, *args: object) -> jax.Array:
        return module(*args)

    options = {"adapter_of_token": adapters, "pages": pages}
    lora, _ = program(None, config, x, params, jnp.int32(0), **options)
    base, _ = program(None, config, x, params, jnp.int32(0))
    assert (np.asarray(lora) != np.asarray(base)).any()
    assert_same_bits(call(module, x, adapters, pages), lora)
    # Without jit XLA fuses less, so the bits may differ.
    assert_close(np.asarray(module(x)), np.asarray(base, np.float64), "float32")
