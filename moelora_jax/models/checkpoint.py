"""Checkpoints of base models as Hugging Face has them: folders of safetensors, sharded or not.

A table of :class:`~moelora_jax.models.parameters.Parameter` says which tensors make up a parameter.
Every tensor of a checkpoint is consumed, or ignored by name, or loading fails. Names, shapes and
dtypes are checked from the files' headers, before any weight is read.
"""

import functools
import json
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
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

from moelora_jax.errors import CheckpointError
from moelora_jax.files import new_folder
from moelora_jax.models import mxfp4
from moelora_jax.models.parameters import (
    Axes,
    Parameter,
    check_arrays,
    check_table,
    merged_shape,
    parameter_dtype,
    piece_of,
    some,
)
from moelora_jax.safetensors_file import FLOAT_DTYPES, SafetensorsFile

CONFIG = "config.json"
_SINGLE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
#: Files of pickled tensors, which can run code when they are opened.
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")

# Dtypes of quantised tensors.
_BYTES = {"U8": np.dtype(np.uint8)}
# Host memory that tensors pass through, unless two of the largest take more.
_MEMORY_BYTES = 256 * 2**20


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the ``config.json`` of a checkpoint.

    Raises:
        CheckpointError: if the folder or the file is missing, or does not hold one JSON object.
    """
    path = existing_folder(folder) / CONFIG
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; is this a checkpoint folder?")
    return _read_json_object(path)


def load_parameters(
    folder: str | Path,
    parameters: Mapping[str, Parameter],
    dtype: DTypeLike,
    *,
    ignore: Sequence[str] = (),
    same: Mapping[str, str] | None = None,
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
        same: tensors of tied embeddings that may be there, and are not used: name to the name of
            the one that they must equal.
        progress: whether to show a progress bar on stderr.

    Returns:
        For each parameter, in the order of the table, an array of its shape, and of ``dtype``
        unless it has one of its own.

    Raises:
        CheckpointError: if anything is missing, unexpected, misshapen, of an unsupported dtype,
            inconsistent or damaged, or a value is NaN or infinite (after the cast).
        ValueError: if ``dtype`` is not supported, or two parameters name the same tensor.
    """
    target = parameter_dtype(dtype)
    check_table(parameters)
    folder = existing_folder(folder)
    with _open_tensors(folder) as files:
        same = {name: other for name, other in (same or {}).items() if name in files}
        _check_tensors(folder, parameters, files, [*ignore, *same])
        for name, other in same.items():
            if not np.array_equal(files[name].read(name), files[other].read(other)):
                raise CheckpointError(
                    f"{files[name].path}: tensor {name!r} is another one than {other!r}, but "
                    "tie_word_embeddings in config.json says that they are the same"
                )
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
    check_table(parameters)
    check_arrays("the arrays to save", parameters, arrays, None)

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
        write_json(new / CONFIG, config)
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
            write_json(new / _INDEX, {"metadata": metadata, "weight_map": weight_map})


def existing_folder(folder: str | Path) -> Path:
    """The folder, or a CheckpointError that says where checkpoints come from."""
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
            raise CheckpointError(f"{index}: names files that are missing: {some(missing)}")
        return [folder / shard for shard in shards], weight_map
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder}: has only pickled weights ({some(pickles)}); pickle can run code and is "
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
        raise CheckpointError(f"{folder}: missing tensors: {some(missing)}")
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
            f"{folder}: unexpected tensors, which the model has no place for: {some(unexpected)}"
        )


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
    shape = merged_shape(parameter.piece_shape, parameter.mxfp4_axes)
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
    piece = piece_of(tensor, piece_shape, axes).astype(array.dtype)
    start = [index[axis] for axis in range(index.shape[0])] + [0] * piece.ndim
    rows = piece.reshape((1,) * index.shape[0] + piece.shape)
    return jax.lax.dynamic_update_slice(array, rows, start), jnp.isfinite(piece).all()


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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON for people to read, too."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
