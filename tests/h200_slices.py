"""Run in a process of its own: layers that read and write slices, compiled for an H200.

Prints one JSON object: for each number of tokens, how many launches there are, and how many of them
XLA has fused with a slice although they write over their operands, which such a fusion forgets.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tests.h200_compiler import compile_for_h200  # noqa: E402, I001

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import moelora_kernels.backend as backend  # noqa: E402
from moelora_jax.config import MoeConfig  # noqa: E402
from moelora_jax.moe import MoeParams, moe_experts  # noqa: E402

CONFIG = MoeConfig(num_experts=8, top_k=2, hidden_size=256, intermediate_size=128)
LAYERS = 4


def layers(xs: jax.Array, experts: jax.Array, weights: jax.Array, params: MoeParams) -> jax.Array:
    """Every layer with an input of its own; the outputs are stacked."""

    def layer(_: None, index: jax.Array) -> tuple[None, jax.Array]:
        return None, moe_experts(xs[index], experts[index], weights[index], params, index, CONFIG)

    return jax.lax.scan(layer, None, jnp.arange(LAYERS))[1]


def main() -> None:
    backend.default_implementation = lambda: "triton"  # There is no GPU to see.
    hidden, inner = CONFIG.hidden_size, CONFIG.intermediate_size

    def array(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((LAYERS, *shape), dtype)

    params = MoeParams(array(8, hidden), array(8, 2, inner, hidden), array(8, hidden, inner))
    report = {}
    for tokens in (1, 8, 128):
        choices = (array(tokens, 2, dtype="int32"), array(tokens, 2, dtype="float32"))
        text = compile_for_h200(layers, array(tokens, hidden), *choices, params).as_text()
        computations = re.split(r"\n\n", text)
        fused = [c for c in computations if c.lstrip().startswith("%dynamic-slice-fusion")]
        report[tokens] = {
            "launches": text.count('custom_call_target="triton_kernel_call_ffi"'),
            "fused": sum(c.count("output_to_operand_aliasing") for c in fused),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
