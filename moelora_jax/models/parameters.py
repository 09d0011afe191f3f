"""The parameters of a model as stacked arrays, and the tensors of a checkpoint that make them up.

A model keeps its weights stacked: one array holds a projection of all layers, another all routed
experts. Hugging Face stores one tensor per layer and expert. A table of :class:`Parameter` says how
the two correspond::

    table = {
        "embedding": single((V, H), "model.embed_tokens.weight"),
        "attention.q_proj": stacked(
            (L, Q, H), "model.layers.{layer}.self_attn.q_proj.weight", layer=range(L)
        ),
        "moe.gate_up": stacked(
            (L, E, 2, I, H),
            "model.layers.{layer}.mlp.experts.{expert}.{projection}.weight",
            layer=range(L),
            expert=range(E),
            projection=("gate_proj", "up_proj"),
        ),
    }
    arrays = checkpoint.load_parameters(folder, table, jnp.bfloat16)
"""

import itertools
import math
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moelora_jax.errors import CheckpointError, MoeLoraError
from moelora_jax.safetensors_file import FLOAT_DTYPES

#: Dtypes that parameters can have on the device.
PARAMETER_DTYPES = tuple(np.dtype(dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16))

# Names that an error spells out before it only counts.
_NAMES_IN_ERRORS = 5

#: For each axis of a tensor, the axes of a piece that it is made of.
Axes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Parameter:
    """One stacked array of a model, and the checkpoint tensors that it is made of.

    ``array[index] = tensor`` for each piece; together they fill the array, each place once.

    A file may have the axes of a piece in another order, and merge some of them: gpt-oss stores a
    piece ``[experts, 2, intermediate, hidden]`` as a tensor ``[experts, hidden, intermediate·2]``,
    where gate and up alternate. This is ``axes=((0,), (3,), (2, 1))``.

    Attributes:
        shape: of the stacked array.
        pieces: tensor name to index along the leading axes; the index ``()`` is the whole array.
        axes: for each axis of the tensors, the axes of a piece that it is made of, outermost first;
            None if tensors are like pieces.
        mxfp4_axes: the same for a checkpoint in MXFP4, where ``{name}_blocks`` and
            ``{name}_scales`` stand for a tensor; they are read where they are there, and never
            written. None if the model has no such checkpoints.
        dtype: of the array; None is that of the model.

    Raises:
        ValueError: if an axis is empty, or the pieces overlap, or leave a gap, or ``axes`` or
            ``mxfp4_axes`` do not name every axis of a piece once.
    """

    shape: tuple[int, ...]
    pieces: Mapping[str, tuple[int, ...]]
    axes: Axes | None = None
    mxfp4_axes: Axes | None = None
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"a parameter needs axes of at least 1, not the shape {self.shape}")
        if not self.pieces:
            raise ValueError("a parameter needs at least one tensor")
        leading_shape = self.shape[: len(self.shape) - len(self.piece_shape)]
        places = itertools.product(*map(range, leading_shape))
        if sorted(self.pieces.values()) != list(places):
            raise ValueError(
                f"the tensors {some(self.pieces)} do not fill the leading axes {leading_shape} of "
                f"the shape {self.shape}, each place once"
            )
        for axes in (self.axes, self.mxfp4_axes):
            if axes is not None and sorted(_order(axes)) != list(range(len(self.piece_shape))):
                raise ValueError(f"{axes} are not the axes of pieces of shape {self.piece_shape}")

    def dtype_in(self, model: np.dtype) -> np.dtype:
        """Dtype of the array in a model of that dtype."""
        return model if self.dtype is None else parameter_dtype(self.dtype)

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """Shape of every piece."""
        index = next(iter(self.pieces.values()))
        return self.shape[len(index) :]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of every tensor, where it is not quantised."""
        return merged_shape(self.piece_shape, self.axes)

    def to_tensor(self, piece: np.ndarray) -> np.ndarray:
        """The tensor that holds a piece."""
        if self.axes is None:
            return piece
        return piece.transpose(_order(self.axes)).reshape(self.tensor_shape)


def single(shape: tuple[int, ...], name: str) -> Parameter:
    """A parameter that is one tensor of the checkpoint."""
    return Parameter(shape, {name: ()})


def stacked(shape: tuple[int, ...], pattern: str, /, **axes: Sequence[object]) -> Parameter:
    """A parameter whose leading axes run over tensors with systematic names.

    Args:
        shape: of the stacked array, leading axes included.
        pattern: name of the tensors, with the leading axes in braces.
        axes: for each leading axis, outermost first, what stands in the names for its indices
            0, 1, 2, ...: numbers (``layer=range(48)``, or only the layers that have this tensor) or
            words (``projection=("gate_proj", "up_proj")``).

    Raises:
        ValueError: if the axes are not those of the pattern, do not have the lengths in ``shape``,
            or give two tensors the same name.
    """
    in_pattern = {
        field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None
    }
    if in_pattern != set(axes):
        raise ValueError(f"{pattern!r} has the axes {sorted(in_pattern)}, not {sorted(axes)}")
    lengths = tuple(len(values) for values in axes.values())
    if lengths != shape[: len(lengths)]:
        raise ValueError(f"{pattern!r}: axes of lengths {lengths} do not lead the shape {shape}")
    names = (
        pattern.format(**dict(zip(axes, values, strict=True)))
        for values in itertools.product(*axes.values())
    )
    indices = itertools.product(*map(range, lengths))
    return Parameter(shape, dict(zip(names, indices, strict=True)))


def check_table(parameters: Mapping[str, Parameter]) -> None:
    """Refuse a table that names a tensor twice."""
    owners: dict[str, str] = {}
    for parameter_name, parameter in parameters.items():
        for name in parameter.pieces:
            if name in owners:
                raise ValueError(
                    f"tensor {name!r} is in two parameters, {owners[name]!r} and {parameter_name!r}"
                )
            owners[name] = parameter_name


def parameter_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype, or a MoeLoraError if parameters cannot have it."""
    supported = ", ".join(map(str, PARAMETER_DTYPES))
    try:
        result = np.dtype(jnp.dtype(dtype))
    except TypeError as error:
        raise MoeLoraError(f"there is no dtype {dtype!r}; supported are {supported}") from error
    if result not in PARAMETER_DTYPES:
        raise MoeLoraError(f"parameters cannot be of dtype {result}; supported are {supported}")
    return result


def check_arrays(
    where: str | Path,
    parameters: Mapping[str, Parameter],
    arrays: Mapping[str, Any],
    model_dtype: np.dtype | None,
) -> None:
    """Compare names, shapes and dtypes of arrays, or of what stands for them, with the table.

    ``model_dtype`` None allows all dtypes that can be loaded.
    """
    missing = [name for name in parameters if name not in arrays]
    if missing:
        raise CheckpointError(f"{where}: missing parameters: {some(missing)}")
    unexpected = [name for name in arrays if name not in parameters]
    if unexpected:
        raise CheckpointError(f"{where}: unexpected parameters: {some(unexpected)}")
    for name, parameter in parameters.items():
        # A subtree of an orbax checkpoint has neither.
        shape = getattr(arrays[name], "shape", None)
        dtype = getattr(arrays[name], "dtype", None)
        if shape != parameter.shape:
            raise CheckpointError(
                f"{where}: parameter {name!r} has shape {shape}, expected {parameter.shape}"
            )
        dtypes = list(FLOAT_DTYPES.values())
        if model_dtype is not None:
            dtypes = [parameter.dtype_in(model_dtype)]
        if dtype not in dtypes:
            raise CheckpointError(
                f"{where}: parameter {name!r} has dtype {dtype}, "
                f"expected {' or '.join(map(str, dtypes))}"
            )


def _order(axes: Axes) -> tuple[int, ...]:
    return tuple(itertools.chain.from_iterable(axes))


def merged_shape(piece_shape: tuple[int, ...], axes: Axes | None) -> tuple[int, ...]:
    """Shape of the tensor that holds a piece."""
    if axes is None:
        return piece_shape
    return tuple(math.prod(piece_shape[axis] for axis in group) for group in axes)


def piece_of(tensor: jax.Array, piece_shape: tuple[int, ...], axes: Axes | None) -> jax.Array:
    """The piece that a tensor holds."""
    if axes is None:
        return tensor
    order = _order(axes)
    return tensor.reshape([piece_shape[axis] for axis in order]).transpose(np.argsort(order))


def some(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(itertools.islice(names, _NAMES_IN_ERRORS))
    more = len(names) - _NAMES_IN_ERRORS
    return f"{shown} and {more} more" if more > 0 else shown
