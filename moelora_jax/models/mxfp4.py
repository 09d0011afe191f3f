"""MXFP4, the 4-bit floating-point numbers of gpt-oss: 32 of them share one power of two.

A tensor is stored as two arrays of bytes. A byte of the *blocks* holds two numbers, the first one
in its lower half; a byte of the *scales* holds an exponent, with 127 added.
"""

import numpy as np

#: Numbers that share a scale.
BLOCK = 32

_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
#: What the 16 codes mean; the highest of the four bits is the sign.
VALUES = np.concatenate([_VALUES, -_VALUES])


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
    # One leading row after the other, as float32 takes more memory than the result.
    for row, codes, exponents in zip(result, blocks, scales, strict=True):
        values = np.stack([VALUES[codes & 15], VALUES[codes >> 4]], axis=-1)
        values = values.reshape(row.shape)
        row[...] = np.ldexp(values, exponents.astype(np.int32)[..., None] - 127)
    return result.reshape(*scales.shape[:-1], -1)
