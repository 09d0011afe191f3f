"""Files and folders that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from moelora_jax.errors import AdapterError, MoeLoraError
from moelora_jax.files import new_file, new_folder

NUMBERS = {"a": np.zeros(3, np.float32)}


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """What a new file may be used for by whom, in three users' ways."""
    old = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(old)


def test_others_can_read_what_they_can_read_elsewhere(mode: int, tmp_path: Path) -> None:
    """Safetensors makes files that only their owner can read: a server may be another user."""
    with new_folder(tmp_path / "adapter", AdapterError) as new:
        save_file(NUMBERS, new / "weights.safetensors")
        (new / "inner").mkdir()
        save_file(NUMBERS, new / "inner" / "weights.safetensors")
    with new_file(tmp_path / "logits.safetensors") as new:
        save_file(NUMBERS, new)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert [path.stat().st_mode & 0o777 for path in files] == [mode] * 3


def test_what_fails_leaves_nothing_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyError), new_file(tmp_path / "file") as new:
        new.write_text("half")
        raise KeyError
    with pytest.raises(KeyError), new_folder(tmp_path / "folder", AdapterError) as new:
        (new / "file").write_text("half")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Neither a full disk nor safetensors says which file it is, and the latter's is no OSError."""
    for name, inner in (("file", ""), ("folder", "inner")):

        def make(path: Path, name: str = name) -> AbstractContextManager[Path]:
            return new_file(path) if name == "file" else new_folder(path, MoeLoraError)

        full = rf"{name}: cannot be written: .*No space left on device"
        with pytest.raises(MoeLoraError, match=full), make(tmp_path / name) as new:
            (new / inner).symlink_to("/dev/full")
            (new / inner).write_text("text")
        missing = rf"{name}: cannot be written: .*No such file"
        with pytest.raises(MoeLoraError, match=missing), make(tmp_path / name) as new:
            save_file(NUMBERS, new / "no folder" / "file")
    assert not list(tmp_path.iterdir())
