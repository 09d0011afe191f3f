"""The Mosaic kernels on a Hopper GPU, against oracles in float64 and the reference."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moelora_jax.config import MoeConfig
from moelora_jax.moe import MoeParams, moe_experts, moe_workspace_shapes
from moelora_kernels.tuning.tiles import MoeTiles, MosaicTiles, ShrinkTiles
from tests.kernels import cases


def is_hopper() -> bool:
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


pytestmark = [pytest.mark.gpu, pytest.mark.skipif("not is_hopper()", reason="needs a Hopper GPU")]

#: Shapes, and rows of a tile. No width is a multiple of a block of columns, 128 and 256. Less than
#: a tile: there are fewer rows than one load has, in the buffers too.
SHAPES = {
    "less than a tile": (cases.Shape(33, 2, 6, 320, 192, 10, 4), 96),
    "several tiles": (cases.Shape(700, 4, 8, 320, 192, 16, 2), 176),
    "rank 128": (cases.Shape(300, 4, 16, 192, 320, 4, 8), 48),
    "64 adapters": (cases.Shape(520, 2, 4, 192, 192, 64, 1), 80),
}
SHRINK = ShrinkTiles(block_k=256, num_warps=2, num_stages=3, run_rows=16)
#: More items than processors, so that a processor has several.
GEMM = MosaicTiles(SHRINK, order=3, processors=10)


@functools.cache
def program(
    shape: cases.Shape, tile_rows: int, activation: str, implementation: Any = "triton"
) -> Callable:
    config = MoeConfig(
        shape.experts, shape.top_k, shape.hidden, shape.intermediate, activation=activation
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def layer(workspace, x, experts, weights, params, layer, num_tokens, adapters, pages):
        refs = None if workspace is None else jax.tree.map(jax.new_ref, workspace)
        out = moe_experts(
            x,
            experts,
            weights,
            params,
            layer,
            config,
            num_tokens=num_tokens,
            adapter_of_token=adapters,
            pages=pages,
            workspace=refs,
            implementation=implementation,
            tiles=MoeTiles(tile_rows, GEMM, GEMM),
        )
        return None if refs is None else jax.tree.map(jax.freeze, refs), out

    return layer


def arguments(case: cases.LayerCase, lora: bool, dirty: bool) -> tuple[Any, ...]:
    params = MoeParams(
        jnp.zeros((2, case.shape.experts, case.shape.hidden), case.dtype),
        case.cast(case.gate_up),
        case.cast(case.down),
    )
    return (
        case.cast(case.x),
        jnp.asarray(case.experts),
        jnp.asarray(case.weights, jnp.float32),
        params,
        case.layer,
        case.device_num_tokens,
        jnp.asarray(case.adapter_of_token) if lora else None,
        case.pages(int(dirty)) if lora else None,
    )


def run(
    case: cases.LayerCase,
    tile_rows: int,
    *,
    lora: bool = True,
    dirty: bool = False,
    activation: str = "silu",
) -> np.ndarray:
    """The layer with poisoned workspaces that are larger than this batch needs."""
    shape = case.shape
    shapes = moe_workspace_shapes(
        MoeConfig(shape.experts, shape.top_k, shape.hidden, shape.intermediate),
        shape.tokens + 5,
        num_adapters=shape.adapters if lora else 0,
        max_rank=shape.max_rank,
        dtype=case.dtype,
    )
    layer = program(shape, tile_rows, activation)
    _, out = layer(cases.poisoned_like(shapes), *arguments(case, lora, dirty))
    return np.asarray(out)


@pytest.mark.parametrize("name", SHAPES)
def test_layer_against_float64(name: str) -> None:
    shape, tile_rows = SHAPES[name]
    for assignment in ("mixed", "base", "one", "runs"):
        for padding in (0, shape.tokens // 3):
            case = cases.LayerCase(
                cases.LayerSpec(
                    shape,
                    dtype="bfloat16",
                    num_tokens=shape.tokens - padding,
                    assignment=assignment,
                    seed=7,
                )
            )
            out = run(case, tile_rows)
            error = cases.relative_error(out, case.layer_output())
            assert error <= cases.TOLERANCE["bfloat16"], (assignment, padding, error)
            # Other pool rows, the same bits; and base rows are those of the base-only program.
            assert out.tobytes() == run(case, tile_rows, dirty=True).tobytes()
            base_rows = case.adapter_of_token < 0
            base_rows[case.num_tokens :] = True
            assert out[base_rows].tobytes() == run(case, tile_rows, lora=False)[base_rows].tobytes()


def test_clamped_swiglu_and_biases() -> None:
    shape = cases.Shape(300, 2, 4, 192, 128, 8, 2)
    case = cases.LayerCase(cases.LayerSpec(shape, dtype="bfloat16"))
    expected = case.layer_output(activation="clamped_swiglu")
    error = cases.relative_error(run(case, 64, activation="clamped_swiglu"), expected)
    assert error <= cases.TOLERANCE["bfloat16"], error
    x, experts, weights, params, *rest = arguments(case, True, False)
    keys = jax.random.split(jax.random.key(0))
    params = params._replace(
        gate_up_bias=jax.random.normal(keys[0], (2, 4, 2, 128), "bfloat16"),
        down_bias=jax.random.normal(keys[1], (2, 4, 192), "bfloat16"),
    )
    expected, actual = (
        np.asarray(
            program(shape, 64, "clamped_swiglu", name)(None, x, experts, weights, params, *rest)[1]
        )
        for name in ("reference", "triton")
    )
    error = cases.relative_error(actual, expected.astype(np.float64))
    assert error <= cases.TOLERANCE["bfloat16"], error
