"""Run in a process of its own: the Triton kernels under Triton's interpreter, against the reference.

Triton decides at import whether kernels are interpreted, so a test process cannot do both. Launches are
replaced by calls on torch tensors; everything else is the code that runs on a GPU.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "kernels")]

import jax
import jax.numpy as jnp
import numpy as np
import torch
from cases import LayerCase, LayerSpec, Shape, relative_error

from moelora_jax.config import MoeConfig
from moelora_jax.moe import MoeParams, moe_experts


def to_torch(value: Any) -> Any:
    return None if value is None else torch.from_numpy(np.array(value))


def to_jax(tensor: torch.Tensor) -> jax.Array:
    return jnp.asarray(tensor.numpy())


def poison(shape: jax.ShapeDtypeStruct) -> torch.Tensor:
    dtype = getattr(torch, str(shape.dtype))
    return torch.full(shape.shape, float("nan") if dtype.is_floating_point else -7, dtype=dtype)


def interpret(kernel: Any, inputs: Any, outputs: Any, refs: Any, how: Any, **constants: Any) -> Any:
    """What :func:`moelora_kernels.backend.launch` does, with torch tensors in the place of memory."""
    tensors = [to_torch(ref[...]) for ref in refs] if refs else [poison(out) for out in outputs]
    kernel[how.grid](*map(to_torch, inputs), *tensors, **constants)
    if not refs:
        return tuple(map(to_jax, tensors))
    for ref, tensor in zip(refs, tensors, strict=True):
        ref[...] = to_jax(tensor)
    return tuple(refs)


SHAPES = (
    Shape(1, 2, 6, 48, 20, 3, 1),
    Shape(7, 8, 8, 40, 20, 5, 4),
    Shape(33, 2, 6, 48, 24, 10, 2),
)


def layer(case: LayerCase, implementation: str, lora: bool = True) -> jax.Array:
    shape = case.shape
    config = MoeConfig(shape.experts, shape.top_k, shape.hidden, shape.intermediate)
    params = MoeParams(
        jnp.zeros((2, shape.experts, shape.hidden)), case.cast(case.gate_up), case.cast(case.down)
    )
    return moe_experts(
        case.cast(case.x),
        jnp.asarray(case.experts),
        jnp.asarray(case.weights, jnp.float32),
        params,
        case.layer,
        config,
        num_tokens=case.device_num_tokens,
        adapter_of_token=jnp.asarray(case.adapter_of_token) if lora else None,
        pages=case.pages() if lora else None,
        implementation=implementation,  # type: ignore[arg-type]
    )


def main() -> None:
    from moelora_kernels.combine import triton as combine
    from moelora_kernels.dense_lora import triton as dense_lora
    from moelora_kernels.expert_lora import triton as expert_lora
    from moelora_kernels.router import triton as router
    from moelora_kernels.sort import triton as sort

    for module in (combine, dense_lora, expert_lora, router, sort):
        module.launch = interpret
    for shape in SHAPES:
        # The interpreter cannot multiply bfloat16.
        for dtype, tolerance in (("float32", 1e-5), ("float16", 2e-3)):
            for num_tokens in (None, shape.tokens // 2):
                case = LayerCase(LayerSpec(shape, dtype=dtype, num_tokens=num_tokens, seed=3))
                expected = np.asarray(layer(case, "reference")).astype(np.float64)
                actual = layer(case, "triton")
                error = relative_error(actual, expected)
                print(shape, dtype, num_tokens, error, flush=True)
                assert error <= tolerance


if __name__ == "__main__":
    main()
