"""Writing files and folders that appear whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from moelora_jax.errors import MoeLoraError


@contextmanager
def new_folder(folder: str | Path, error: type[MoeLoraError]) -> Iterator[Path]:
    """A folder to write into, which takes the name ``folder`` if the block succeeds.

    Raises:
        MoeLoraError: of the class ``error``, if something is there already, or cannot be written.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise error(f"{folder}: already exists and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, as only a rename within one file system is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new = Path(temporary, folder.name)
        new.mkdir()
        with _named(folder, error):
            yield new
            _share(new)
            new.rename(folder)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the name ``path`` if the block succeeds, whatever was there.

    Raises:
        MoeLoraError: it cannot be written.
    """
    path = path.absolute()
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        new = Path(temporary, path.name)
        with _named(path, MoeLoraError):
            yield new
            _share(new)
            new.replace(path)


@contextmanager
def _named(path: Path, error: type[MoeLoraError]) -> Iterator[None]:
    """A full disk says neither what it was that could not be written, nor where."""
    try:
        yield
    except (OSError, SafetensorError) as cause:
        raise error(f"{path}: cannot be written: {cause}") from cause


def _share(new: Path) -> None:
    """Give files the permissions of any new file; those of safetensors are for their owner."""
    probe = new.with_name(f"{new.name}.probe")
    probe.touch()
    mode = probe.stat().st_mode
    for path in (new, *new.rglob("*")):
        if path.is_file():
            path.chmod(mode)
