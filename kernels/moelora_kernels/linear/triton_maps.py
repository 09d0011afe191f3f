"""The maps of one launch, in Triton.

A launch of linear maps has parameters for :data:`MAX_MAPS` maps. Those of a map that there is not
are None, as is what a map does not have, a bias or pages. A kernel puts pointers of one kind into a
tuple, and a program picks those of its map by the map's number.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from moelora_kernels.types import LinearMap

#: Maps that one launch has parameters for.
MAX_MAPS = tl.constexpr(3)


def map_parameters(arrays: Sequence[Sequence[Any]]) -> list[Any]:
    """Arguments for a launch: the arrays of one map after another, None for maps there are not."""
    missing = MAX_MAPS.value - len(arrays)
    if missing < 0:
        raise ValueError(f"at most {MAX_MAPS.value} maps can share a launch, not {len(arrays)}")
    return [*itertools.chain.from_iterable(arrays), *[None] * (missing * len(arrays[0]))]


def map_outputs(maps: Sequence[LinearMap]) -> dict[str, int]:
    """Compile-time parameters ``OUT_0`` to ``OUT_2``: the outputs of each map, or 0."""
    outputs = [m.weight.shape[1] for m in maps] + [0] * (MAX_MAPS.value - len(maps))
    return {f"OUT_{number}": size for number, size in enumerate(outputs)}


@triton.jit
def of_map(number, pointers):
    """The pointer of a map; of a map that has none, any; None if no map has one."""
    pointer = None
    for other in tl.static_range(MAX_MAPS):
        if pointers[other] is not None:
            if pointer is None:
                pointer = pointers[other]
            else:
                pointer = tl.where(number == other, pointers[other], pointer)
    return pointer


@triton.jit
def is_given(number, pointers):
    """Whether a map has such a pointer."""
    given = number < 0
    for other in tl.static_range(MAX_MAPS):
        if pointers[other] is not None:
            given = given | (number == other)
    return given


@triton.jit
def find_block(
    block,
    OUT_0: tl.constexpr,
    OUT_1: tl.constexpr,
    OUT_2: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The map of a block of columns, the block's number in it, its outputs, the first of them."""
    BLOCKS_0: tl.constexpr = (OUT_0 + BLOCK_N - 1) // BLOCK_N
    BLOCKS_1: tl.constexpr = (OUT_1 + BLOCK_N - 1) // BLOCK_N
    number = (block >= BLOCKS_0).to(tl.int32) + (block >= BLOCKS_0 + BLOCKS_1).to(tl.int32)
    block -= tl.where(number == 0, 0, tl.where(number == 1, BLOCKS_0, BLOCKS_0 + BLOCKS_1))
    out = tl.where(number == 0, OUT_0, tl.where(number == 1, OUT_1, OUT_2))
    start = tl.where(number == 0, 0, tl.where(number == 1, OUT_0, OUT_0 + OUT_1))
    if OUT_0 % 8 == 0 and OUT_1 % 8 == 0 and OUT_2 % 8 == 0:
        # The compiler does not see it through a choice, and would load pages number by number.
        out, start = tl.multiple_of(out, 8), tl.multiple_of(start, 8)
    return number, block, out, start
