"""MXFP4, the 4-bit floating-point numbers of gpt-oss: 32 of them share one power of two.

A tensor is stored as two arrays of bytes. A byte of the *blocks* holds two numbers, the first one
in its lower half; a byte of the *scales* holds an exponent, with 127 added.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

#: Numbers that share a scale.
BLOCK = 32

_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
#: What the 16 codes mean; the highest of the four bits is the sign.
VALUES = np.concatenate([_VALUES, -_VALUES])
#: What the 256 bytes mean, ``[256, 2]``.
_PAIRS = np.stack([np.tile(VALUES, 16), np.repeat(VALUES, 16)], axis=1)


def packed_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the blocks and of the scales of a tensor."""
    *rows, width = shape
    return (*rows, width // BLOCK, BLOCK // 2), (*rows, width // BLOCK)


def dequantize(blocks: np.ndarray, scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The tensor, in ``dtype``; float32 and bfloat16 hold all numbers but the largest exactly.

    Args:
        blocks: uint8 ``[..., width / 32, 16]``.
        scales: uint8 ``[..., width / 32]``.
        dtype: of the result.
    """
    result = np.empty((*blocks.shape[:-1], BLOCK), dtype)

    def fill(row: int) -> None:
        values = _PAIRS[blocks[row]].reshape(result.shape[1:])
        exponents = scales[row].astype(np.int32)[..., None] - 127
        # The largest do not fit into every dtype; the caller looks for what became infinite.
        with np.errstate(over="ignore"):
            result[row] = np.ldexp(values, exponents)

    # One leading row after the other, as float32 takes more memory than the result; NumPy lets
    # other threads run meanwhile.
    with ThreadPoolExecutor() as threads:
        list(threads.map(fill, range(len(result))))
    return result.reshape(*scales.shape[:-1], -1)
