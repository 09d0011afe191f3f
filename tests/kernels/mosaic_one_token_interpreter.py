"""One token in Mosaic GPU under Pallas' interpreter; a process of its own.

Needs ``NPROC=16`` (more threads for XLA than a small machine has processors: warpgroups that wait
keep theirs). The search for races is off: it reports reads that come before the arrival at the
barrier that the load waits for.
"""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

import moelora_jax.moe as moe
from moelora_kernels.fused_experts import mosaic_one_token
from tests.kernels.triton_interpreter import TILES, Shape, check_layer

SHAPE = Shape(1, 2, 3, 256, 256, 2, 2)


def main() -> None:
    reference = moe.fused_experts

    def fused_experts(*arguments: Any, implementation: Any, **options: Any) -> Any:
        if implementation == "reference":
            return reference(*arguments, implementation=implementation, **options)
        for name in ("sort", "expert_out", "tiles"):
            options.pop(name)
        # One processor: the interpreter has no counters by which processors could wait.
        interpret = plgpu.InterpretGPUParams()
        return mosaic_one_token.one_token(*arguments, processors=1, interpret=interpret, **options)

    moe.fused_experts = fused_experts  # type: ignore[assignment]
    check_layer(SHAPE, "float16", None, TILES[0])


if __name__ == "__main__":
    main()
