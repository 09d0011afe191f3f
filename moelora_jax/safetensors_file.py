"""Safetensors files as NumPy arrays, with errors that name the file and the tensor.

Safetensors is the only tensor format that this package reads: a file is a header of names, dtypes,
shapes and offsets followed by raw numbers, so opening one can never run code.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

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
# What the format allows.
_MAX_HEADER_BYTES = 100 * 10**6


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

    Opening reads and checks the header only; :meth:`read` reads one tensor. Nothing is mapped into
    memory: should a mapped file shrink, the system would end the process. A file that others may
    change while it is read is opened with ``in_memory``, which reads all of it at once.

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
        error: the exception class of every failure, here and in the methods.
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
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as cause:
            raise error(f"{self.path}: cannot be opened: {cause}") from cause
        try:
            self._memory = self._read_all() if in_memory else None
            self.headers, self._places = self._read_header()
        except (SafetensorError, OSError) as cause:
            self._file.close()
            raise error(f"{self.path}: not a readable safetensors file: {cause}") from cause
        except MoeLoraError:
            self._file.close()
            raise

    def _read_all(self) -> np.ndarray:
        before = os.fstat(self._file.fileno())
        memory = np.empty(before.st_size, np.uint8)
        with ThreadPoolExecutor() as threads:
            is_whole = self._read_into(memory, 0, threads)
        after = os.fstat(self._file.fileno())
        if not is_whole or (after.st_size, after.st_mtime_ns) != (len(memory), before.st_mtime_ns):
            raise self._error(
                f"{self.path}: changed while it was read; write a new folder and rename it instead"
            )
        memory.flags.writeable = False
        return memory

    def _read_header(self) -> tuple[dict[str, TensorHeader], dict[str, slice]]:
        """What the header says of each tensor, and where its bytes are in the file."""
        start = self._bytes(0, 8)
        length = int.from_bytes(start, "little")
        text = self._bytes(8, min(length, _MAX_HEADER_BYTES))
        # The library checks the header, but maps what it opens: it gets a file of the same size
        # that has no numbers, and that nobody else can change.
        copy = os.memfd_create("header")
        try:
            os.truncate(copy, self._num_bytes())
            os.pwrite(copy, start + text, 0)
            with safe_open(f"/proc/self/fd/{copy}", framework="np") as checked:
                # A slice is a handle: nothing is read before it is indexed.
                handles = {name: checked.get_slice(name) for name in checked.offset_keys()}
                headers = {
                    name: TensorHeader(handle.get_dtype(), tuple(handle.get_shape()))
                    for name, handle in handles.items()
                }
        finally:
            os.close(copy)
        entries = json.loads(text)
        offsets = {name: entries[name]["data_offsets"] for name in headers}
        first = 8 + length
        return headers, {n: slice(first + at, first + end) for n, (at, end) in offsets.items()}

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._memory = None
        self._file.close()

    def read(self, name: str) -> np.ndarray:
        """Read one tensor, in the dtype of the file (bfloat16 as ``ml_dtypes.bfloat16``).

        Args:
            name: the tensor.

        Returns:
            A C-contiguous array; with ``in_memory`` a read-only view of all that was read.

        Raises:
            error: if the file has no tensor of that name, its dtype is not in ``FLOAT_DTYPES``, or
                the file is shorter than it was.
        """
        if name not in self.headers:
            raise self._error(f"{self.path}: no tensor {name!r}")
        dtype, shape = self.headers[name]
        if dtype not in FLOAT_DTYPES:
            raise self._error(
                f"{self.path}: tensor {name!r} has dtype {dtype}; "
                f"supported are {', '.join(FLOAT_DTYPES)}"
            )
        place = self._places[name]
        if self._memory is not None:
            memory = self._memory[place]
        else:
            memory = np.empty(place.stop - place.start, np.uint8)
            with ThreadPoolExecutor() as threads:
                self.read_bytes_into(memory, name, threads)
        return memory.view(FLOAT_DTYPES[dtype]).reshape(shape)

    def read_bytes_into(self, memory: np.ndarray, name: str, threads: ThreadPoolExecutor) -> None:
        """Read the bytes of a tensor into memory that is there, which is faster than new memory.

        Args:
            memory: uint8, as long as the tensor.
            name: the tensor.
            threads: read parts of it side by side.

        Raises:
            error: if the file is shorter than it was, or cannot be read.
        """
        try:
            is_whole = self._read_into(memory, self._places[name].start, threads)
        except OSError as cause:
            raise self._error(f"{self.path}: tensor {name!r} cannot be read: {cause}") from cause
        if not is_whole:
            raise self._error(f"{self.path}: tensor {name!r} is cut short")

    def _num_bytes(self) -> int:
        if self._memory is not None:
            return len(self._memory)
        return os.fstat(self._file.fileno()).st_size

    def _bytes(self, start: int, count: int) -> bytes:
        """Bytes of the file, fewer than ``count`` where it ends before."""
        if self._memory is not None:
            return self._memory[start : start + count].tobytes()
        return os.pread(self._file.fileno(), count, start)

    def _read_into(self, memory: np.ndarray, start: int, threads: ThreadPoolExecutor) -> bool:
        """Fill ``memory`` from the file's byte ``start`` on; False where the file ends before."""
        view = memoryview(memory)

        def read(at: int) -> bool:
            stop = min(len(view), at + _CHUNK_BYTES)
            while at < stop:
                count = os.preadv(self._file.fileno(), [view[at:stop]], start + at)
                if count == 0:
                    return False
                at += count
            return True

        return all(threads.map(read, range(0, len(view), _CHUNK_BYTES)))
