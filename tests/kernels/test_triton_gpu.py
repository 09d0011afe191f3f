"""The Triton kernels on a GPU, against oracles in float64 and the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moelora_jax.config import MoeConfig
from moelora_jax.moe import MoeParams, moe_experts, moe_workspace_shapes
from moelora_kernels import (
    ExpertGroups,
    dense_lora,
    route,
    shrink,
    sort_tokens,
    token_sort_shapes,
)
from moelora_kernels.tuning.tiles import ShrinkTiles
from tests.kernels import cases

pytestmark = pytest.mark.gpu

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}

SHAPES = {
    "one token": cases.Shape(1, 2, 6, 48, 20, 3, 1),
    # In gate_up more steps than loads in flight; in down a step that is not full.
    "one wide token": cases.Shape(1, 3, 4, 2304, 320, 3, 4),
    "all experts": cases.Shape(7, 8, 8, 40, 20, 5, 4),
    "odd widths": cases.Shape(33, 2, 6, 41, 23, 10, 4),
    "many experts": cases.Shape(90, 10, 512, 64, 48, 64, 1),
    "rank 128": cases.Shape(64, 4, 16, 160, 96, 4, 8),
    "large tiles": cases.Shape(700, 4, 8, 320, 192, 16, 2),
    "large sort": cases.Shape(1500, 8, 24, 72, 56, 12, 2),
}


def run(case, *, lora: bool = True, dirty: bool = False, activation: str = "silu") -> np.ndarray:
    """The layer with poisoned workspaces that are larger than this batch needs."""
    shape = case.shape
    config = MoeConfig(
        shape.experts, shape.top_k, shape.hidden, shape.intermediate, activation=activation
    )
    params = MoeParams(
        jnp.zeros((2, shape.experts, shape.hidden), case.dtype),
        case.cast(case.gate_up),
        case.cast(case.down),
    )
    shapes = moe_workspace_shapes(
        config,
        shape.tokens + 5,
        num_adapters=shape.adapters if lora else 0,
        max_rank=shape.max_rank,
        dtype=case.dtype,
    )

    def program(workspace, x, params, pages):
        refs = jax.tree.map(jax.new_ref, workspace)
        out = moe_experts(
            x,
            jnp.asarray(case.experts),
            jnp.asarray(case.weights, jnp.float32),
            params,
            case.layer,
            config,
            num_tokens=case.device_num_tokens,
            adapter_of_token=jnp.asarray(case.adapter_of_token) if lora else None,
            pages=pages,
            workspace=refs,
            implementation="triton",
        )
        return jax.tree.map(jax.freeze, refs), out

    workspace = cases.poisoned_like(shapes)
    workspace, out = jax.jit(program, donate_argnums=0)(
        workspace, case.cast(case.x), params, case.pages(int(dirty)) if lora else None
    )
    # Zero for the next launch.
    assert not lora or not np.asarray(workspace.signals).any()
    return np.asarray(out)


@pytest.mark.parametrize("assignment", ["mixed", "base", "one", "runs"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_layer_against_float64(name: str, dtype: str, assignment: str) -> None:
    shape = SHAPES[name]
    for padding in (0, shape.tokens // 3):
        spec = cases.LayerSpec(
            shape, dtype=dtype, num_tokens=shape.tokens - padding, assignment=assignment, seed=7
        )
        case = cases.LayerCase(spec)
        expected = case.layer_output()
        out = run(case)
        error = cases.relative_error(out, expected)
        assert error <= TOLERANCE[dtype], error
        # Other pool rows, the same bits; and base rows are those of the base-only program.
        assert out.tobytes() == run(case, dirty=True).tobytes()
        base_rows = case.adapter_of_token < 0
        base_rows[case.num_tokens :] = True
        base = run(case, lora=False)
        assert out[base_rows].tobytes() == base[base_rows].tobytes()


@pytest.mark.parametrize("max_pages", [1, 4])
def test_runs_of_any_length_sum_a_row_alike(max_pages: int) -> None:
    """A token's rank activations do not depend on how many others have its adapter."""
    shape = cases.Shape(300, 2, 4, 320, 192, 16, max_pages)
    case = cases.LayerCase(cases.LayerSpec(shape, dtype="bfloat16"))
    pages = case.pages()
    tiles = ShrinkTiles(block_k=128, num_warps=2, num_stages=3, run_rows=32)

    @jax.jit
    def ranks(adapter_of_token):
        sort = sort_tokens(
            jnp.asarray(case.experts),
            adapter_of_token,
            case.device_num_tokens,
            num_experts=shape.experts,
            num_adapters=shape.adapters,
            tile_rows=32,
            run_rows=32,
        )
        sites, numbers = (pages.gate, pages.up), {"pairs": shape.pairs, "tile_rows": 32}
        x = case.cast(case.x)
        z = shrink(x, sort, sites, case.layer, top_k=shape.top_k, tiles=tiles, **numbers)
        # Of pairs in their own order.
        return z[:, sort.row_of_pair]

    mixed = jnp.arange(shape.tokens, dtype=jnp.int32) % shape.adapters
    among_others = np.asarray(ranks(mixed))
    for adapter in range(shape.adapters):
        # Runs of about nine rows in the mixed batch, and of more than a tile here.
        alone = np.asarray(ranks(jnp.full_like(mixed, adapter)))
        own = np.repeat(np.asarray(mixed) == adapter, shape.top_k)
        assert among_others[:, own].tobytes() == alone[:, own].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clamped_swiglu(dtype: str) -> None:
    case = cases.LayerCase(cases.LayerSpec(SHAPES["odd widths"], dtype=dtype))
    out = run(case, activation="clamped_swiglu")
    expected = case.layer_output(activation="clamped_swiglu")
    assert cases.relative_error(out, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [1, 5, 64, 1000, 3000])
@pytest.mark.parametrize("num_adapters", [0, 3, 64])
@pytest.mark.parametrize("num_experts", [1, 60, 512])
@pytest.mark.parametrize("run_rows", [None, 5])
def test_sort(tokens: int, num_adapters: int, num_experts: int, run_rows: int | None) -> None:
    rng = np.random.default_rng(0)
    top_k = min(8, num_experts)
    experts = rng.integers(num_experts, size=(tokens, top_k)).astype(np.int32)
    adapters = rng.integers(-1, max(num_adapters, 1), size=tokens).astype(np.int32)
    sizes = {"num_experts": num_experts, "num_adapters": num_adapters, "tile_rows": 16}
    sizes |= {"run_rows": run_rows}
    shapes = token_sort_shapes(tokens + 3, top_k, **sizes)

    def program(implementation, experts, adapters, num_tokens):
        out = jax.tree.map(jax.new_ref, cases.poisoned_like(shapes))
        sort_tokens(
            experts,
            adapters if num_adapters else None,
            num_tokens,
            **sizes,
            out=out,
            implementation=implementation,
        )
        return jax.tree.map(jax.freeze, out)

    for num_tokens in {tokens, tokens // 2, 0}:
        arguments = (jnp.asarray(experts), jnp.asarray(adapters), jnp.int32(num_tokens))
        expected, actual = (
            jax.jit(program, static_argnums=0)(name, *arguments) for name in ("reference", "triton")
        )
        for field in expected._fields:
            assert np.array_equal(getattr(expected, field), getattr(actual, field)), field


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (60, 4), (128, 8), (512, 10)])
def test_route(num_experts: int, top_k: int, scoring: str) -> None:
    logits = jax.random.normal(jax.random.key(0), (77, num_experts))
    for renormalize in (True, False):
        options = {"top_k": top_k, "scoring": scoring, "renormalize": renormalize}
        expected = route(logits, **options, implementation="reference")
        actual = route(logits, **options, implementation="triton")
        assert np.array_equal(expected[0], actual[0])
        np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "scoring", "groups"),
    [
        (160, 6, "softmax", ExpertGroups(8, 3)),
        (256, 8, "sigmoid", ExpertGroups(8, 4, 2)),
        (64, 6, "sigmoid", None),
    ],
    ids=["DeepSeek-V2", "DeepSeek-V3", "bias alone"],
)
def test_route_with_groups_and_correction_bias(
    num_experts: int, top_k: int, scoring: str, groups: ExpertGroups | None
) -> None:
    logits = jax.random.normal(jax.random.key(0), (77, num_experts))
    bias = 0.3 * jax.random.normal(jax.random.key(1), (num_experts,))
    options = {"top_k": top_k, "scoring": scoring, "correction_bias": bias, "groups": groups}
    expected = route(logits, **options, implementation="reference")
    actual = route(logits, **options, implementation="triton")
    assert np.array_equal(expected[0], actual[0])
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 33, 300])
def test_dense_lora(tokens: int, dtype: str) -> None:
    shape = cases.Shape(tokens, 1, 1, 72, 40, 5, 3)
    case = cases.LayerCase(cases.LayerSpec(shape, dtype=dtype, num_tokens=tokens - tokens // 4))
    pages = case.pages().gate
    sizes = {"num_experts": 1, "num_adapters": 5, "tile_rows": 16}
    zeros = jnp.zeros((tokens, 1), jnp.int32)
    adapters = jnp.asarray(case.adapter_of_token)
    y = jax.random.normal(jax.random.key(0), (tokens, 40)).astype(dtype)

    def program(implementation, x, y):
        sort = sort_tokens(
            zeros, adapters, case.device_num_tokens, **sizes, implementation=implementation
        )
        return dense_lora(
            x, y, pages, sort, case.layer, tile_rows=16, implementation=implementation
        )

    with jax.default_matmul_precision("highest"):
        expected, actual = (
            np.asarray(jax.jit(program, static_argnums=0)(name, case.cast(case.x), y))
            for name in ("reference", "triton")
        )
    assert cases.relative_error(actual, expected.astype(np.float64)) <= TOLERANCE[dtype]
    unchanged = case.adapter_of_token < 0
    assert actual[unchanged].tobytes() == np.asarray(y)[unchanged].tobytes()
