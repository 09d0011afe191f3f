"""Checkpoints of base models: Hugging Face folders, and copies that orbax writes.

A model keeps its weights stacked: one array holds a projection of all layers, another all routed
experts. Hugging Face stores one tensor per layer and expert. A table of :class:`Parameter` says how
the two correspond, and everything else here follows from that table::

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
    arrays = load_parameters(folder, table, jnp.bfloat16)

Every tensor of a checkpoint is consumed, or ignored by name, or loading fails. Names, shapes and
dtypes are checked from the files' headers, before any weight is read.
"""

import functools
import itertools
import json
import math
import string
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from safetensors.numpy import save_file

from moelora_jax.errors import CheckpointError, MoeLoraError
from moelora_jax.files import new_folder
from moelora_jax.models import mxfp4
from moelora_jax.safetensors_file import FLOAT_DTYPES, SafetensorsFile

#: Dtypes that parameters can have on the device.
PARAMETER_DTYPES = tuple(np.dtype(dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16))

_CONFIG = "config.json"
_SINGLE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
#: The folder that orbax writes, inside of ours.
_ORBAX = "parameters"
#: Files of pickled tensors, which can run code when they are opened.
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")

# Dtypes of quantised tensors.
_BYTES = {"U8": np.dtype(np.uint8)}
# Host memory that tensors pass through, unless two of the largest take more.
_MEMORY_BYTES = 256 * 2**20
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
                f"the tensors {_some(self.pieces)} do not fill the leading axes {leading_shape} of "
                f"the shape {self.shape}, each place once"
            )
        for axes in (self.axes, self.mxfp4_axes):
            if axes is not None and sorted(_order(axes)) != list(range(len(self.piece_shape))):
                raise ValueError(f"{axes} are not the axes of pieces of shape {self.piece_shape}")

    def dtype_in(self, model: np.dtype) -> np.dtype:
        """Dtype of the array in a model of that dtype."""
        return model if self.dtype is None else _parameter_dtype(self.dtype)

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """Shape of every piece."""
        index = next(iter(self.pieces.values()))
        return self.shape[len(index) :]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of every tensor, where it is not quantised."""
        return _merged_shape(self.piece_shape, self.axes)

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


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the ``config.json`` of a checkpoint.

    Raises:
        CheckpointError: if the folder or the file is missing, or does not hold one JSON object.
    """
    path = _existing_folder(folder) / _CONFIG
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; is this a checkpoint folder?")
    return _read_json_object(path)


def load_parameters(
    folder: str | Path,
    parameters: Mapping[str, Parameter],
    dtype: DTypeLike,
    *,
    ignore: Sequence[str] = (),
    progress: bool = False,
) -> dict[str, jax.Array]:
    """Load a Hugging Face checkpoint of safetensors files onto the default device.

    Tensors are read one by one; the device casts them and puts them in their places. Host memory
    holds a few of them, however large the model.

    Args:
        folder: holds ``model.safetensors``, or shards and their ``model.safetensors.index.json``.
        parameters: what to load, by name.
        dtype: of the result: float32, bfloat16 or float16.
        ignore: shell-style patterns of tensors that may be there and are not read, such as
            ``"*.rotary_emb.inv_freq"``. A tensor that a parameter names is always read.
        progress: whether to show a progress bar on stderr.

    Returns:
        For each parameter, in the order of the table, an array of its shape, and of ``dtype``
        unless it has one of its own.

    Raises:
        CheckpointError: if anything is missing, unexpected, misshapen, of an unsupported dtype,
            inconsistent or damaged, or a value is NaN or infinite (after the cast).
        ValueError: if ``dtype`` is not supported, or two parameters name the same tensor.
    """
    target = _parameter_dtype(dtype)
    _check_table(parameters)
    folder = _existing_folder(folder)
    with _open_tensors(folder) as files:
        _check_tensors(folder, parameters, files, ignore)
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not progress,
        )
        with bar:
            title = f"Loading {folder.resolve().name}"
            sizes = _sizes(parameters.values(), files)
            task = bar.add_task(title, total=sum(sizes.values()))
            advance = functools.partial(bar.advance, task)
            with _Loader(files, parameters.values(), sizes, advance) as loader:
                return {
                    name: loader.load(parameter, parameter.dtype_in(target))
                    for name, parameter in parameters.items()
                }


def save_checkpoint(
    folder: str | Path,
    config: Mapping[str, Any],
    parameters: Mapping[str, Parameter],
    arrays: Mapping[str, jax.Array | np.ndarray],
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a Hugging Face checkpoint: the inverse of :func:`load_parameters`.

    The folder appears complete or not at all.

    Args:
        folder: must not exist, or be empty.
        config: becomes ``config.json``.
        parameters: how the arrays are cut into tensors.
        arrays: one for each parameter, in any dtype that can be loaded.
        max_shard_bytes: more than this is split into shards, with an index. Host memory holds one
            shard. A larger tensor has a shard of its own.

    Raises:
        CheckpointError: if the folder is not empty, or the arrays are not those of the table.
        ValueError: if two parameters name the same tensor.
    """
    _check_table(parameters)
    _check_arrays("the arrays to save", parameters, arrays, None)

    # Of which array each tensor is a part, and where.
    parts = {
        tensor: (parameter, arrays[name], index)
        for name, parameter in parameters.items()
        for tensor, index in parameter.pieces.items()
    }
    sizes = {
        tensor: math.prod(parameter.tensor_shape) * arrays[name].dtype.itemsize
        for name, parameter in parameters.items()
        for tensor in parameter.pieces
    }
    shards = _split_into_shards(sizes, max_shard_bytes)
    with new_folder(folder, CheckpointError) as new:
        _write_json(new / _CONFIG, config)
        weight_map = {}
        for number, names in enumerate(shards, start=1):
            file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            if len(shards) == 1:
                file_name = _SINGLE_FILE
            tensors = {}
            for name in names:
                parameter, array, index = parts[name]
                tensor = parameter.to_tensor(np.asarray(array[index]))
                tensors[name] = np.asarray(tensor, order="C")
            # Some versions of transformers refuse a file without this tag.
            save_file(tensors, new / file_name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(names, file_name))
        if len(shards) > 1:
            metadata = {"total_size": sum(sizes.values())}
            _write_json(new / _INDEX, {"metadata": metadata, "weight_map": weight_map})


def save_orbax(
    folder: str | Path,
    arrays: Mapping[str, jax.Array],
    config: Mapping[str, Any],
) -> None:
    """Write stacked parameters as they are, to be read by :func:`load_orbax`.

    The folder appears complete or not at all. Orbax copies all arrays to host memory first.

    Args:
        folder: must not exist, or be empty.
        arrays: the parameters by name, as :func:`load_parameters` returns them.
        config: becomes ``config.json``.

    Raises:
        CheckpointError: if the folder is not empty.
    """
    import orbax.checkpoint as ocp  # Slow to import, and most programs never need it.

    with new_folder(folder, CheckpointError) as new:
        _write_json(new / _CONFIG, config)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(new / _ORBAX, dict(arrays))


def is_orbax(folder: str | Path) -> bool:
    """Whether :func:`save_orbax` wrote the folder."""
    return (Path(folder) / _ORBAX).is_dir()


def load_orbax(
    folder: str | Path, parameters: Mapping[str, Parameter], dtype: DTypeLike
) -> dict[str, jax.Array]:
    """Restore onto the default device what :func:`save_orbax` wrote.

    Host memory holds up to a gigabyte more than the largest parameter.

    Args:
        folder: holds ``config.json`` and the orbax checkpoint.
        parameters: what to restore; the tensors' names do not matter here.
        dtype: in which the parameters were saved. They are never cast.

    Returns:
        For each parameter, in the order of the table, an array of its shape, and of ``dtype``
        unless it has one of its own.

    Raises:
        CheckpointError: if the folder is not such a checkpoint, is damaged, or its parameters have
            other names, shapes or another dtype.
        ValueError: if ``dtype`` is not supported.
    """
    import orbax.checkpoint as ocp  # Slow to import, and most programs never need it.

    target = _parameter_dtype(dtype)
    path = _existing_folder(folder).resolve() / _ORBAX
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; was {folder} written by save_orbax?")

    # What orbax may hold on the host at once. It refuses a parameter that is not below this.
    largest = max(math.prod(parameter.shape) for parameter in parameters.values()) * target.itemsize
    with ocp.StandardCheckpointer(restore_concurrent_gb=1 + largest // 10**9) as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        if metadata is None or not isinstance(metadata.tree, dict):
            raise CheckpointError(f"{path}: not a readable orbax checkpoint of named arrays")
        _check_arrays(path, parameters, metadata.tree, target)
        device = jnp.zeros(()).sharding
        abstract = {
            name: jax.ShapeDtypeStruct(parameter.shape, parameter.dtype_in(target), sharding=device)
            for name, parameter in parameters.items()
        }
        with _damage_reported(path):
            restored = checkpointer.restore(path, abstract)
    return {name: restored[name] for name in parameters}


def _check_table(parameters: Mapping[str, Parameter]) -> None:
    """Refuse a table that names a tensor twice."""
    owners: dict[str, str] = {}
    for parameter_name, parameter in parameters.items():
        for name in parameter.pieces:
            if name in owners:
                raise ValueError(
                    f"tensor {name!r} is in two parameters, {owners[name]!r} and {parameter_name!r}"
                )
            owners[name] = parameter_name


def _parameter_dtype(dtype: DTypeLike) -> np.dtype:
    supported = ", ".join(map(str, PARAMETER_DTYPES))
    try:
        result = np.dtype(jnp.dtype(dtype))
    except TypeError as error:
        raise MoeLoraError(f"there is no dtype {dtype!r}; supported are {supported}") from error
    if result not in PARAMETER_DTYPES:
        raise MoeLoraError(f"parameters cannot be of dtype {result}; supported are {supported}")
    return result


def _existing_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; a checkpoint of the Hugging Face Hub must be downloaded "
            "before: hf download NAME --local-dir FOLDER"
        )
    return folder


@contextmanager
def _open_tensors(folder: Path) -> Iterator[dict[str, SafetensorsFile]]:
    """For each tensor of the checkpoint, the open file that holds it; in the order of the files."""
    paths, weight_map = _find_files(folder)
    files: dict[str, SafetensorsFile] = {}
    with ExitStack() as stack:
        for path in paths:
            file = stack.enter_context(SafetensorsFile(path, CheckpointError))
            for name in file.headers:
                if name in files:
                    raise CheckpointError(
                        f"{folder}: tensor {name!r} is in two files, "
                        f"{files[name].path.name} and {path.name}"
                    )
                files[name] = file
        if weight_map is not None:
            _check_index(folder / _INDEX, weight_map, files)
        yield files


def _find_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a checkpoint and, if they are shards, the file name per tensor."""
    single_file, index = folder / _SINGLE_FILE, folder / _INDEX
    if single_file.exists() and index.exists():
        raise CheckpointError(
            f"{folder}: holds both {_SINGLE_FILE} and {_INDEX}; remove the one that is not meant"
        )
    if single_file.exists():
        return [single_file], None
    if index.exists():
        weight_map = _read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
        ):
            raise CheckpointError(f"{index}: weight_map must name a file of the folder per tensor")
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise CheckpointError(f"{index}: names files that are missing: {_some(missing)}")
        return [folder / shard for shard in shards], weight_map
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder}: has only pickled weights ({_some(pickles)}); pickle can run code and is "
            "never read; convert the checkpoint to safetensors"
        )
    raise CheckpointError(f"{folder}: neither {_SINGLE_FILE} nor {_INDEX} is there")


def _check_index(
    index: Path, weight_map: Mapping[str, str], files: Mapping[str, SafetensorsFile]
) -> None:
    for name, shard in weight_map.items():
        if name not in files or files[name].path.name != shard:
            raise CheckpointError(f"{index}: says that {shard} has tensor {name!r}, but it has not")
    for name, file in files.items():
        if name not in weight_map:
            raise CheckpointError(f"{index}: does not list tensor {name!r} of {file.path.name}")


def _check_tensors(
    folder: Path,
    parameters: Mapping[str, Parameter],
    files: Mapping[str, SafetensorsFile],
    ignore: Sequence[str],
) -> None:
    """Compare the files' headers with the table."""
    owners = {
        tensor: expected
        for parameter in parameters.values()
        for name in parameter.pieces
        for tensor, expected in _tensors_of_piece(name, parameter, files).items()
    }
    missing = [name for name in owners if name not in files]
    if missing:
        raise CheckpointError(f"{folder}: missing tensors: {_some(missing)}")
    for name, expected in owners.items():
        file = files[name]
        dtype, shape = file.headers[name]
        if dtype not in expected.dtypes:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} has dtype {dtype}; "
                f"supported are {', '.join(expected.dtypes)}"
            )
        if shape != expected.shape:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} has shape {shape}, expected {expected.shape}"
            )
    unexpected = [
        name
        for name in files
        if name not in owners and not any(fnmatchcase(name, pattern) for pattern in ignore)
    ]
    if unexpected:
        raise CheckpointError(
            f"{folder}: unexpected tensors, which the model has no place for: {_some(unexpected)}"
        )


def _check_arrays(
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
        raise CheckpointError(f"{where}: missing parameters: {_some(missing)}")
    unexpected = [name for name in arrays if name not in parameters]
    if unexpected:
        raise CheckpointError(f"{where}: unexpected parameters: {_some(unexpected)}")
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


@contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    """What orbax raises for damaged data, as a CheckpointError."""
    try:
        yield
    except Exception as cause:
        # Orbax raises ValueError, OSError, or Exception itself. Other classes, such as that of a
        # full device, are not the checkpoint's fault.
        if not isinstance(cause, ValueError | OSError) and type(cause) is not Exception:
            raise
        raise CheckpointError(f"{path}: cannot be restored: {cause}") from cause


class _Expected(NamedTuple):
    """What the header of a tensor must say: one of these dtypes, and this shape."""

    dtypes: Mapping[str, np.dtype]
    shape: tuple[int, ...]


def _tensors_of_piece(
    name: str, parameter: Parameter, files: Collection[str]
) -> dict[str, _Expected]:
    """The tensors that hold a piece: one, or in a quantised checkpoint two."""
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    if parameter.mxfp4_axes is None or blocks not in files:
        return {name: _Expected(FLOAT_DTYPES, parameter.tensor_shape)}
    shape = _merged_shape(parameter.piece_shape, parameter.mxfp4_axes)
    shapes = mxfp4.packed_shapes(shape)
    return {
        tensor: _Expected(_BYTES, packed)
        for tensor, packed in zip((blocks, scales), shapes, strict=True)
    }


def _sizes(parameters: Iterable[Parameter], files: Mapping[str, SafetensorsFile]) -> dict[str, int]:
    """Bytes of every tensor that is read."""
    return {
        tensor: math.prod(expected.shape)
        * expected.dtypes[files[tensor].headers[tensor].dtype].itemsize
        for parameter in parameters
        for name in parameter.pieces
        for tensor, expected in _tensors_of_piece(name, parameter, files).items()
    }


class _Loader:
    """Takes tensors from files to their places on the device, through host memory used in turns.

    Memory that is new to the process costs more time than reading does, so it is used again as
    soon as the device has taken what is in it.

    Args:
        files: the file of each tensor, in the order of the files.
        parameters: what will be loaded.
        sizes: bytes of every tensor of these.
        advance: is told of bytes that have arrived.
    """

    def __init__(
        self,
        files: Mapping[str, SafetensorsFile],
        parameters: Iterable[Parameter],
        sizes: Mapping[str, int],
        advance: Callable[[int], None],
    ) -> None:
        self._files, self._sizes, self._advance = files, sizes, advance
        # A quantised piece has the place of its first tensor.
        self._names = dict.fromkeys(
            name for tensor in files for name in (tensor, tensor.removesuffix("_blocks"))
        )
        pieces = [
            self._memory_of(_tensors_of_piece(name, parameter, files))
            for parameter in parameters
            for name in parameter.pieces
        ]
        # Two of the largest, so that one is read while the device takes the other.
        self._memory = np.empty(min(sum(pieces), max(_MEMORY_BYTES, 2 * max(pieces))), np.uint8)
        self._end = 0
        self._in_flight: deque[_Placed] = deque()
        self._threads = ThreadPoolExecutor()

    def __enter__(self) -> "_Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()

    def load(self, parameter: Parameter, dtype: np.dtype) -> jax.Array:
        """A parameter in ``dtype``; the device casts, turns and places what the files hold."""
        array = jnp.zeros(parameter.shape, dtype)
        for name in self._names:
            if name not in parameter.pieces:
                continue
            expected = _tensors_of_piece(name, parameter, self._files)
            start = self._reserve(self._memory_of(expected))
            tensors = [self._read(tensor, header) for tensor, header in expected.items()]
            values, axes = tensors[0], parameter.axes
            if len(tensors) == 2:
                blocks, scales = tensors
                values, axes = mxfp4.dequantize(blocks, scales, dtype), parameter.mxfp4_axes
            elif values.dtype == np.float64:
                # JAX has none; what does not fit into the dtype becomes infinite.
                with np.errstate(over="ignore"):
                    values = values.astype(dtype)
            index = np.array(parameter.pieces[name], np.int32)
            array, is_finite = _place(array, values, index, parameter.piece_shape, axes)
            read_bytes = sum(self._sizes[tensor] for tensor in expected)
            first = next(iter(expected))
            self._in_flight.append(_Placed(first, start, self._end, read_bytes, dtype, is_finite))
        while self._in_flight:
            self._wait()
        return array

    def _memory_of(self, tensors: Iterable[str]) -> int:
        """Bytes of memory that the tensors of a piece need."""
        return sum(_aligned(self._sizes[tensor]) for tensor in tensors)

    def _reserve(self, size: int) -> int:
        """Where in the memory the next ``size`` bytes go, once they are free there."""
        start = self._end if self._end + size <= len(self._memory) else 0
        while any(p.start < start + size and start < p.stop for p in self._in_flight):
            self._wait()
        self._end = start
        return start

    def _read(self, tensor: str, expected: _Expected) -> np.ndarray:
        """A tensor, in the memory that comes next."""
        start, size = self._end, self._sizes[tensor]
        self._end += _aligned(size)
        memory, file = self._memory[start : start + size], self._files[tensor]
        file.read_bytes_into(memory, tensor, self._threads)
        return memory.view(expected.dtypes[file.headers[tensor].dtype]).reshape(expected.shape)

    def _wait(self) -> None:
        """Until the device has the oldest tensor."""
        placed = self._in_flight.popleft()
        if not placed.is_finite:
            raise CheckpointError(
                f"{self._files[placed.tensor].path}: tensor {placed.tensor!r} has values that are "
                f"NaN or infinite in {placed.dtype}"
            )
        self._advance(placed.read_bytes)


def _aligned(size: int) -> int:
    """So that any dtype can begin behind it."""
    return -(-size // 64) * 64


class _Placed(NamedTuple):
    """A piece on its way to the device, and the host memory that it still needs."""

    tensor: str
    start: int
    stop: int
    read_bytes: int
    dtype: np.dtype
    is_finite: jax.Array


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _place(
    array: jax.Array,
    tensor: jax.Array,
    index: jax.Array,
    piece_shape: tuple[int, ...],
    axes: Axes | None,
) -> tuple[jax.Array, jax.Array]:
    """Overwrite a piece of ``array``, in place: it is donated; and whether all of it is finite."""
    piece = _piece(tensor, piece_shape, axes).astype(array.dtype)
    start = [index[axis] for axis in range(index.shape[0])] + [0] * piece.ndim
    rows = piece.reshape((1,) * index.shape[0] + piece.shape)
    return jax.lax.dynamic_update_slice(array, rows, start), jnp.isfinite(piece).all()


def _order(axes: Axes) -> tuple[int, ...]:
    return tuple(itertools.chain.from_iterable(axes))


def _merged_shape(piece_shape: tuple[int, ...], axes: Axes | None) -> tuple[int, ...]:
    if axes is None:
        return piece_shape
    return tuple(math.prod(piece_shape[axis] for axis in group) for group in axes)


def _piece(tensor: jax.Array, piece_shape: tuple[int, ...], axes: Axes | None) -> jax.Array:
    """The piece that a tensor holds."""
    if axes is None:
        return tensor
    order = _order(axes)
    return tensor.reshape([piece_shape[axis] for axis in order]).transpose(np.argsort(order))


def _split_into_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in their order, cut into runs whose sizes add up to ``max_bytes`` at most."""
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, size in sizes.items():
        if shards[-1] and shard_bytes + size > max_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += size
    return shards


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as cause:
        raise CheckpointError(f"{path}: no such file") from cause
    except (OSError, ValueError) as cause:  # ValueError: not UTF-8, or not JSON.
        raise CheckpointError(f"{path}: not a readable JSON file: {cause}") from cause
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not a {type(content).__name__}")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _some(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(itertools.islice(names, _NAMES_IN_ERRORS))
    more = len(names) - _NAMES_IN_ERRORS
    return f"{shown} and {more} more" if more > 0 else shown
