"""Run in a process of its own: layers that read and write slices, compiled for an H200.

Prints one JSON object: for each kind of layer, how many launches there are, and how many of them
XLA has fused with a slice although they write over their operands, which such a fusion forgets.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tests.h200_compiler import compile_for_h200  # noqa: E402, I001

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import moelora_kernels.backend as backend  # noqa: E402
from moelora_jax.config import MoeConfig  # noqa: E402
from moelora_jax.moe import MoeParams, moe_experts  # noqa: E402
from moelora_kernels import LinearMap, SitePages, linear_lora, sort_tokens  # noqa: E402

CONFIG = MoeConfig(num_experts=8, top_k=2, hidden_size=256, intermediate_size=128)
LAYERS, ADAPTERS = 4, 2


def experts(xs: jax.Array, chosen: jax.Array, weights: jax.Array, params: MoeParams) -> jax.Array:
    """Every layer with an input of its own; the outputs are stacked."""

    def layer(_: None, index: jax.Array) -> tuple[None, jax.Array]:
        return None, moe_experts(xs[index], chosen[index], weights[index], params, index, CONFIG)

    return jax.lax.scan(layer, None, jnp.arange(LAYERS))[1]


def linear(xs: jax.Array, maps: LinearMap, adapters: jax.Array) -> jax.Array:
    """The same of a linear map with LoRA, which has counters that are written."""
    tokens = xs.shape[1]
    one_expert = jnp.zeros((tokens, 1), jnp.int32)

    def layer(_: None, index: jax.Array) -> tuple[None, jax.Array]:
        sort = sort_tokens(
            one_expert,
            adapters,
            jnp.int32(tokens),
            num_experts=1,
            num_adapters=ADAPTERS,
            tile_rows=16,
        )
        return None, linear_lora(xs[index], [maps], index, sort=sort, tile_rows=16)

    return jax.lax.scan(layer, None, jnp.arange(LAYERS))[1]


def array(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def main() -> None:
    backend.default_implementation = lambda: "triton"  # There is no GPU to see.
    hidden, inner = CONFIG.hidden_size, CONFIG.intermediate_size
    params = MoeParams(
        array(LAYERS, 8, hidden),
        array(LAYERS, 8, 2, inner, hidden),
        array(LAYERS, 8, hidden, inner),
    )
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    for tokens in (1, 8, 128):
        choices = (array(LAYERS, tokens, 2, dtype=dtype) for dtype in ("int32", "float32"))
        programs[f"{tokens} tokens"] = (experts, (array(LAYERS, tokens, hidden), *choices, params))
    pages = SitePages(
        array(32, 16, hidden),
        array(32, 16, inner),
        array(LAYERS, 2, ADAPTERS, 1, 1, dtype="int32"),
        array(LAYERS, ADAPTERS, 1, dtype="float32"),
    )
    maps = LinearMap(array(LAYERS, inner, hidden), None, pages)
    programs["linear"] = (linear, (array(LAYERS, 8, hidden), maps, array(8, dtype="int32")))
    report = {}
    for name, (program, arguments) in programs.items():
        text = compile_for_h200(program, *arguments).as_text()
        computations = re.split(r"\n\n", text)
        fused = [c for c in computations if c.lstrip().startswith("%dynamic-slice-fusion")]
        report[name] = {
            "launches": text.count('custom_call_target="triton_kernel_call_ffi"'),
            "fused": sum(c.count("output_to_operand_aliasing") for c in fused),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
