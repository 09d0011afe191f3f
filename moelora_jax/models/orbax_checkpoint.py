"""Checkpoints as orbax writes them: parameters stacked as the models use them, in one dtype."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moelora_jax.errors import CheckpointError
from moelora_jax.files import new_folder
from moelora_jax.models.checkpoint import CONFIG, existing_folder, write_json
from moelora_jax.models.parameters import Parameter, check_arrays, parameter_dtype

#: The folder that orbax writes, inside of ours.
_ORBAX = "parameters"


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
        write_json(new / CONFIG, config)
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

    target = parameter_dtype(dtype)
    path = existing_folder(folder).resolve() / _ORBAX
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; was {folder} written by save_orbax?")

    # What orbax may hold on the host at once. It refuses a parameter that is not below this.
    largest = max(math.prod(parameter.shape) for parameter in parameters.values()) * target.itemsize
    with ocp.StandardCheckpointer(restore_concurrent_gb=1 + largest // 10**9) as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        if metadata is None or not isinstance(metadata.tree, dict):
            raise CheckpointError(f"{path}: not a readable orbax checkpoint of named arrays")
        check_arrays(path, parameters, metadata.tree, target)
        device = jnp.zeros(()).sharding
        abstract = {
            name: jax.ShapeDtypeStruct(parameter.shape, parameter.dtype_in(target), sharding=device)
            for name, parameter in parameters.items()
        }
        with _damage_reported(path):
            restored = checkpointer.restore(path, abstract)
    return {name: restored[name] for name in parameters}


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
