"""Safetensors files as NumPy arrays, with errors that name the file and the tensor.

Safetensors is the only tensor format that this package reads: a file is a header of names, dtypes,
shapes and offsets followed by raw numbers, so opening one can never run code.
"""

from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

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

    Opening reads and checks the header only; :meth:`read` copies one tensor.

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

    Raises:
        error: if the file is missing, unreadable or truncated, or its header contradicts itself or
            the file's size.
    """

    def __init__(self, path: str | Path, error: type[MoeLoraError]) -> None:
        self.path = Path(path)
        self._error = error
        if not self.path.is_file():
            raise error(f"{self.path}: no such file")
        self._file: Any
        try:
            self._file = safe_open(self.path, framework="np")
            self.headers = {name: self._header(name) for name in self._file.offset_keys()}
        except (SafetensorError, OSError) as cause:
            raise error(f"{self.path}: not a readable safetensors file: {cause}") from cause

    def _header(self, name: str) -> TensorHeader:
        # A slice is a handle: nothing is read before it is indexed.
        handle = self._file.get_slice(name)
        return TensorHeader(handle.get_dtype(), tuple(handle.get_shape()))

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, value, traceback)

    def read(self, name: str, dtypes: Collection[str] = FLOAT_DTYPES.keys()) -> np.ndarray:
        """Read one tensor, in the dtype of the file (bfloat16 as ``ml_dtypes.bfloat16``).

        Args:
            name: the tensor.
            dtypes: those that it may have, as headers call them.

        Returns:
            A C-contiguous array of its own memory.

        Raises:
            error: if the file has no tensor of that name, or its dtype is not in ``dtypes``.
        """
        if name not in self.headers:
            raise self._error(f"{self.path}: no tensor {name!r}")
        dtype = self.headers[name].dtype
        if dtype not in dtypes:
            raise self._error(
                f"{self.path}: tensor {name!r} has dtype {dtype}; supported are {', '.join(dtypes)}"
            )
        try:
            tensor: np.ndarray = self._file.get_tensor(name)
        except (SafetensorError, OSError) as cause:
            raise self._error(f"{self.path}: tensor {name!r} cannot be read: {cause}") from cause
        return tensor
