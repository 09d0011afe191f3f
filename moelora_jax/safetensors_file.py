"""Safetensors files as NumPy arrays, with errors that name the file and the tensor.

Safetensors is the only tensor format that this package reads: a file is a header of names, dtypes,
shapes and offsets followed by raw numbers, so opening one can never run code.
"""

import functools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

from moelora_jax.errors import MoeLoraError

#: Dtypes that can be read, by their names in safetensors headers.
FLOAT_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    # Importing ml_dtypes is also what teaches NumPy, and so safetensors, the name "bfloat16".
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


# Bytes that one thread reads at a time.
_CHUNK_BYTES = 16 * 2**20


class TensorHeader(NamedTuple):
    """What a file's header says of one tensor.

    Attributes:
        dtype: the dtype's name in safetensors: ``F32``, ``BF16``, ``F8_E4M3``.
        shape: its dimensions, outermost first.
    """

    dtype: str
    shape: tuple[int, ...]


class SafetensorsFile:
    """A safetensors file, open for reading; a context manager that closes it.

    Opening reads and checks the header only; :meth:`read` copies one tensor. The file is mapped
    into memory: should it shrink meanwhile, the system ends the process. A file that others may
    change while a server reads it is opened with ``in_memory``, which reads all of it at once.

    ::

        with SafetensorsFile(path, CheckpointError) as file:
            for name, header in file.headers.items():
                print(name, header.dtype, header.shape)
            embedding = file.read("model.embed_tokens.weight")

    Attributes:
        path: the file.
        headers: name to dtype and shape of every tensor, in the order in which they are stored.

    Args:
        path: the file to open.
        error: the exception class of every failure, here and in :meth:`read`.
        in_memory: read the whole file now.

    Raises:
        error: if the file is missing, unreadable or truncated, its header contradicts itself or
            the file's size, or with ``in_memory`` it changed while it was read.
    """

    def __init__(
        self, path: str | Path, error: type[MoeLoraError], *, in_memory: bool = False
    ) -> None:
        self.path = Path(path)
        self._error = error
        if not self.path.is_file():
            raise error(f"{self.path}: no such file")
        self._file: Any = None
        self._raw: Any = None
        self._tensors: dict[str, Any] = {}  # With in_memory, in place of the file.
        try:
            if in_memory:
                self._tensors = _deserialize(self._read_bytes())
                self.headers = {
                    name: TensorHeader(tensor["dtype"], tuple(tensor["shape"]))
                    for name, tensor in self._tensors.items()
                }
            else:
                self._file = safe_open(self.path, framework="np")
                self._raw = self.path.open("rb", buffering=0)
                self.headers = {name: self._header(name) for name in self._file.offset_keys()}
        except (SafetensorError, OSError) as cause:
            raise error(f"{self.path}: not a readable safetensors file: {cause}") from cause

    def _read_bytes(self) -> bytes:
        with self.path.open("rb") as file:
            before = os.fstat(file.fileno())
            data = file.read()
            after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise self._error(
                f"{self.path}: changed while it was read; write a new folder and rename it instead"
            )
        return data

    def _header(self, name: str) -> TensorHeader:
        # A slice is a handle: nothing is read before it is indexed.
        handle = self._file.get_slice(name)
        return TensorHeader(handle.get_dtype(), tuple(handle.get_shape()))

    @functools.cached_property
    def _starts(self) -> dict[str, int]:
        """Where the bytes of each tensor begin in the file."""
        length = int.from_bytes(os.pread(self._raw.fileno(), 8, 0), "little")
        header = json.loads(os.pread(self._raw.fileno(), length, 8))
        return {name: 8 + length + header[name]["data_offsets"][0] for name in self.headers}

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._tensors = {}
        if self._file is not None:
            self._raw.close()
            self._file.__exit__(kind, value, traceback)

    def read(self, name: str) -> np.ndarray:
        """Read one tensor, in the dtype of the file (bfloat16 as ``ml_dtypes.bfloat16``).

        Args:
            name: the tensor.

        Returns:
            A C-contiguous array of its own memory.

        Raises:
            error: if the file has no tensor of that name, or its dtype is not in ``FLOAT_DTYPES``.
        """
        if name not in self.headers:
            raise self._error(f"{self.path}: no tensor {name!r}")
        dtype = self.headers[name].dtype
        if dtype not in FLOAT_DTYPES:
            raise self._error(
                f"{self.path}: tensor {name!r} has dtype {dtype}; "
                f"supported are {', '.join(FLOAT_DTYPES)}"
            )
        if self._file is None:
            values = np.frombuffer(self._tensors[name]["data"], FLOAT_DTYPES[dtype])
            return values.reshape(self.headers[name].shape)
        try:
            tensor: np.ndarray = self._file.get_tensor(name)
        except (SafetensorError, OSError) as cause:
            raise self._error(f"{self.path}: tensor {name!r} cannot be read: {cause}") from cause
        return tensor

    def read_bytes_into(self, memory: np.ndarray, name: str, threads: ThreadPoolExecutor) -> None:
        """Read the bytes of a tensor into memory that is there, which is faster than new memory.

        Not of a file that was opened with ``in_memory``.

        Args:
            memory: uint8, as long as the tensor.
            name: the tensor.
            threads: read parts of it side by side.

        Raises:
            error: if the file is shorter than it was, or cannot be read.
        """
        start, view = self._starts[name], memoryview(memory)

        def read(at: int) -> None:
            while at < (stop := min(len(view), (at // _CHUNK_BYTES + 1) * _CHUNK_BYTES)):
                count = os.preadv(self._raw.fileno(), [view[at:stop]], start + at)
                if count == 0:
                    raise self._error(f"{self.path}: tensor {name!r} is cut short")
                at += count

        try:
            list(threads.map(read, range(0, len(view), _CHUNK_BYTES)))
        except OSError as cause:
            raise self._error(f"{self.path}: tensor {name!r} cannot be read: {cause}") from cause


def _deserialize(data: bytes) -> dict[str, Any]:
    """Dtype, shape and bytes of the tensors of a file, in the order in which they are stored."""
    tensors = dict(deserialize(data))  # In no order, but the header is proven to be sound.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {
        name: tensors[name] for name in sorted(tensors, key=lambda n: header[n]["data_offsets"])
    }
