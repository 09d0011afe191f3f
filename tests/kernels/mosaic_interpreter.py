"""The Mosaic kernels under Pallas' interpreter, with its search for races; a process of its own.

Their list of steps, and the rest of the layer, are Triton's, under Triton's interpreter: see
``triton_interpreter``.
"""

import functools
from typing import Any

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from moelora_kernels.combine import triton as combine
from moelora_kernels.expert_lora import mosaic, triton_gather, triton_shrink
from moelora_kernels.expert_lora import triton as expert_lora
from moelora_kernels.sort import triton as sort
from moelora_kernels.tuning.tiles import MoeTiles, MosaicTiles
from tests.kernels.cases import Shape
from tests.kernels.triton_interpreter import RUNS, check_layer, interpret

#: The one expert has a tile of 80 rows, and one of 52, which a smaller loop multiplies.
#: The widths are no multiples of a block of columns.
SHAPE = Shape(132, 1, 1, 192, 192, 5, 2)


def main() -> None:
    for module in (combine, expert_lora, sort, triton_gather, triton_shrink):
        module.launch = interpret  # type: ignore[attr-defined]
    params = plgpu.InterpretGPUParams(detect_races=True)
    product: Any = mosaic.grouped_product
    mosaic.grouped_product = functools.partial(product, interpret=params)  # type: ignore[assignment]
    # Few processors, so that each has many tiles and each slot is used again.
    tiles = MosaicTiles(RUNS, order=2, processors=2)
    check_layer(SHAPE, "float16", None, MoeTiles(96, tiles, tiles))
    assert not gpu_callbacks.get_races().races_found


if __name__ == "__main__":
    main()
