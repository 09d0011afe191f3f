"""Reading and writing workspaces.

A kernel that is given ``out`` writes the leading rows of that reference in place and returns it;
without ``out`` it returns a new array. Inputs may be arrays or references.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from moelora_kernels.types import Buffer


def read(buffer: Buffer, rows: int | None = None) -> Array:
    """The values of ``buffer``, or of its first ``rows`` rows."""
    return buffer[...] if rows is None else buffer[:rows]


def result(out: Buffer | None, value: Array) -> Buffer:
    """Store ``value`` in the leading corner of ``out`` where there is one, else pass it on."""
    if out is None:
        return value
    if out.dtype != value.dtype or out.ndim != value.ndim:
        raise ValueError(f"out is {out.dtype}{out.shape}, the result is {value.dtype}{value.shape}")
    if any(have < need for have, need in zip(out.shape, value.shape, strict=True)):
        raise ValueError(f"out has shape {out.shape}, too small for a result of {value.shape}")
    out[tuple(slice(size) for size in value.shape)] = value
    return out


def given_or_new(given: Buffer | None, shape: Sequence[int], dtype: DTypeLike) -> Any:
    """The reference that a kernel was given to write, or else a temporary one."""
    return new_buffer(shape, dtype) if given is None else given


def new_buffer(shape: Sequence[int], dtype: DTypeLike) -> jax.Ref:
    """A zeroed temporary that a loop can update in place."""
    return jax.new_ref(jnp.zeros(shape, dtype))
