"""Checkpoints: round trips, what transformers writes, and every damage that must be refused."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from moelora_jax.errors import CheckpointError
from moelora_jax.models import checkpoint
from moelora_jax.models.checkpoint import load_parameters, read_config, save_checkpoint
from moelora_jax.models.orbax_checkpoint import load_orbax, save_orbax
from moelora_jax.models.parameters import Parameter, single, stacked
from moelora_jax.safetensors_file import SafetensorsFile

CONFIG = {"architectures": ["TestForCausalLM"], "hidden_size": 4}
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

TABLE = {
    "embedding": single((6, 4), "embed.weight"),
    "norm": stacked((3, 4), "layers.{layer}.norm.weight", layer=range(3)),
    "gate_up": stacked(
        (2, 2, 2, 5, 4),
        "layers.{layer}.experts.{expert}.{projection}.weight",
        layer=(0, 2),
        expert=range(2),
        projection=("gate", "up"),
    ),
}


def random_arrays(table: Mapping[str, Parameter], dtype: Any, seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {
        name: jnp.asarray(generator.standard_normal(parameter.shape, np.float32).astype(dtype))
        for name, parameter in table.items()
    }


def assert_equal(actual: Mapping[str, jax.Array], expected: Mapping[str, Any]) -> None:
    assert list(actual) == list(expected)
    for name, array in actual.items():
        assert isinstance(array, jax.Array)
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[name]), strict=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid checkpoint in a single file, float32."""
    save_checkpoint(tmp_path / "model", CONFIG, TABLE, random_arrays(TABLE, np.float32))
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A valid checkpoint in three shards, float32."""
    arrays = random_arrays(TABLE, np.float32)
    save_checkpoint(tmp_path / "sharded", CONFIG, TABLE, arrays, max_shard_bytes=350)
    assert (tmp_path / "sharded" / "model-00003-of-00003.safetensors").exists()
    return tmp_path / "sharded"


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if any weight is read: a bad checkpoint must be refused by its headers."""

    def read_bytes_into(self: SafetensorsFile, memory: object, name: str, threads: object) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafetensorsFile, "read_bytes_into", read_bytes_into)


def edit_tensors(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :])


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# The table


def test_stacked_expands_the_axes_in_order() -> None:
    assert TABLE["gate_up"].pieces == {
        "layers.0.experts.0.gate.weight": (0, 0, 0),
        "layers.0.experts.0.up.weight": (0, 0, 1),
        "layers.0.experts.1.gate.weight": (0, 1, 0),
        "layers.0.experts.1.up.weight": (0, 1, 1),
        "layers.2.experts.0.gate.weight": (1, 0, 0),
        "layers.2.experts.0.up.weight": (1, 0, 1),
        "layers.2.experts.1.gate.weight": (1, 1, 0),
        "layers.2.experts.1.up.weight": (1, 1, 1),
    }
    assert TABLE["gate_up"].tensor_shape == (5, 4)
    assert TABLE["embedding"].tensor_shape == (6, 4)
    # The order of the arguments counts, not that in the name.
    assert stacked((1, 2, 4), "{b}.{a}", a=["x"], b=["y", "z"]).pieces == {
        "y.x": (0, 0),
        "z.x": (0, 1),
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stacked((2, 4), "a.{layer}", expert=range(2)), "axes ['layer'], not ['expert']"),
        (lambda: stacked((2, 4), "a", layer=range(2)), "axes [], not ['layer']"),
        (lambda: stacked((2, 4), "a.{layer}", layer=range(3)), "lengths (3,) do not lead"),
        (lambda: stacked((2, 4), "a.{layer}", layer=(1, 1)), "do not fill"),
        (lambda: single((0, 4), "a"), "axes of at least 1"),
        (lambda: single((), "a"), "axes of at least 1"),
        (lambda: Parameter((2, 4), {}), "at least one tensor"),
        (lambda: Parameter((2, 4), {"a": (0,)}), "do not fill"),
        (lambda: Parameter((2, 4), {"a": (0,), "b": (0,)}), "do not fill"),
        (lambda: Parameter((2, 4), {"a": (0,), "b": (2,)}), "do not fill"),
        (lambda: Parameter((2, 4), {"a": (0,), "b": (1, 2)}), "do not fill"),
        (lambda: Parameter((2, 4), {"a": (0, 0, 0)}), "do not fill"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_tensor_in_two_parameters_is_refused(folder: Path) -> None:
    table = {**TABLE, "head": single((6, 4), "embed.weight")}
    message = "'embed.weight' is in two parameters, 'embedding' and 'head'"
    with pytest.raises(ValueError, match=message):
        load_parameters(folder, table, jnp.float32)
    with pytest.raises(ValueError, match=message):
        save_checkpoint(folder, CONFIG, table, random_arrays(table, np.float32))


# Round trips


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("max_shard_bytes", [300, 10**9])
def test_safetensors_round_trip(tmp_path: Path, dtype: Any, max_shard_bytes: int) -> None:
    arrays = random_arrays(TABLE, dtype)
    save_checkpoint(tmp_path / "a" / "b", CONFIG, TABLE, arrays, max_shard_bytes=max_shard_bytes)
    assert read_config(tmp_path / "a" / "b") == CONFIG
    assert_equal(load_parameters(tmp_path / "a" / "b", TABLE, dtype), arrays)
    assert (tmp_path / "a" / "b" / INDEX).exists() == (max_shard_bytes == 300)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_orbax_round_trip(tmp_path: Path, dtype: Any) -> None:
    arrays = random_arrays(TABLE, dtype)
    save_orbax(tmp_path / "model", arrays, CONFIG)
    assert read_config(tmp_path / "model") == CONFIG
    restored = load_orbax(tmp_path / "model", TABLE, dtype)
    assert_equal(restored, arrays)
    assert all(array.sharding == jnp.zeros(()).sharding for array in restored.values())


SIZES = st.integers(1, 3)
#: For each parameter, the lengths of its leading axes, and the shape of its tensors.
LAYOUTS = st.lists(
    st.tuples(st.lists(SIZES, max_size=3), st.lists(SIZES, max_size=2)).filter(any),
    min_size=1,
    max_size=3,
)


def table_of(layout: list[tuple[list[int], list[int]]]) -> dict[str, Parameter]:
    table = {}
    for number, (lengths, tensor_shape) in enumerate(layout):
        axes = {f"axis{i}": range(length) for i, length in enumerate(lengths)}
        pattern = ".".join([f"tensor{number}", *(f"{{{axis}}}" for axis in axes)])
        table[f"parameter.{number}"] = stacked((*lengths, *tensor_shape), pattern, **axes)
    return table


@settings(max_examples=25)
@given(
    layout=LAYOUTS,
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    max_shard_bytes=st.integers(1, 200),
    memory_bytes=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_any_table_round_trips(
    tmp_path_factory: pytest.TempPathFactory,
    layout: list[tuple[list[int], list[int]]],
    dtype: Any,
    max_shard_bytes: int,
    memory_bytes: int,
    seed: int,
) -> None:
    table = table_of(layout)
    arrays = random_arrays(table, dtype, seed)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, CONFIG, table, arrays, max_shard_bytes=max_shard_bytes)
    with mock.patch.object(checkpoint, "_MEMORY_BYTES", memory_bytes):
        assert_equal(load_parameters(folder, table, dtype), arrays)


def test_pieces_are_placed_by_index(folder: Path) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    loaded = load_parameters(folder, TABLE, jnp.float32)
    for name, parameter in TABLE.items():
        for tensor, index in parameter.pieces.items():
            np.testing.assert_array_equal(np.asarray(loaded[name][index]), tensors[tensor])


@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes_are_cast(tmp_path: Path, stored: Any, dtype: Any) -> None:
    values = np.random.default_rng(0).standard_normal((8, 8)).astype(stored)
    save_file({"w": values}, tmp_path / SINGLE_FILE)
    loaded = load_parameters(tmp_path, {"w": single((8, 8), "w")}, dtype)
    assert_equal(loaded, {"w": values.astype(dtype)})


def test_an_unsupported_target_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="int8; supported are float32, bfloat16, float16"):
        load_parameters(folder, TABLE, jnp.int8)
    with pytest.raises(ValueError, match="int8"):
        load_orbax(folder, TABLE, jnp.int8)


def test_saved_arrays_need_not_be_contiguous(tmp_path: Path) -> None:
    table = {"w": single((3, 4), "w")}
    array = np.arange(12, dtype=np.float32).reshape(4, 3).T
    save_checkpoint(tmp_path / "model", CONFIG, table, {"w": array})
    assert_equal(load_parameters(tmp_path / "model", table, jnp.float32), {"w": array})


def test_progress_is_shown_on_stderr_if_asked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_parameters(folder, TABLE, jnp.float32)
    assert capsys.readouterr() == ("", "")
    load_parameters(folder, TABLE, jnp.float32, progress=True)
    output = capsys.readouterr()
    # 24 + 12 + 160 numbers of four bytes.
    assert "Loading model" in output.err and "784/784 bytes" in output.err
    assert output.out == ""


# Memory


def test_loading_updates_the_device_array_in_place() -> None:
    array = jnp.zeros((4, 2, 1024), jnp.bfloat16)
    address = array.unsafe_buffer_pointer()
    piece = np.ones((1024, 2), np.float32)
    updated, is_finite = checkpoint._place(
        array, piece, np.array([1], np.int32), (2, 1024), ((1,), (0,))
    )
    assert updated.unsafe_buffer_pointer() == address
    assert array.is_deleted()
    np.testing.assert_array_equal(np.asarray(updated[:, 1, 0], np.float32), [0, 1, 0, 0])
    assert is_finite


def test_host_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Large pieces, beside which Python's own objects, some 300 KB, are few.
    table = {"w": stacked((64, 64, 2048), "layers.{layer}.w", layer=range(64))}
    save_checkpoint(tmp_path / "model", CONFIG, table, random_arrays(table, np.float32))
    load_parameters(tmp_path / "model", table, jnp.bfloat16)  # Compiles.

    piece = 64 * 2048 * 4
    monkeypatch.setattr(checkpoint, "_MEMORY_BYTES", 4 * piece)
    # Of what Python and NumPy allocate, which does not include JAX's device arrays.
    tracemalloc.start()
    load_parameters(tmp_path / "model", table, jnp.bfloat16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * piece


# Checkpoints that must be refused before anything is read


def _move_between_shards(folder: Path) -> None:
    edit_json(
        folder / INDEX,
        lambda index: index["weight_map"].update(
            {"embed.weight": "model-00003-of-00003.safetensors"}
        ),
    )


def _repeat_in_another_shard(folder: Path) -> None:
    edit_tensors(
        folder / "model-00003-of-00003.safetensors",
        lambda tensors: tensors.update({"embed.weight": np.zeros((6, 4), np.float32)}),
    )


def _truncate(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def _set_shape(header: dict[str, Any]) -> None:
    header["embed.weight"]["shape"] = [7, 4]


def _set_offsets(header: dict[str, Any]) -> None:
    header["embed.weight"]["data_offsets"][1] += 4


#: What is wrong: the damage, and the message that it must cause.
SINGLE_FILE_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (
        lambda folder: edit_tensors(folder / SINGLE_FILE, lambda t: t.pop("embed.weight")),
        "missing tensors: embed.weight$",
    ),
    "many missing tensors": (
        lambda folder: edit_tensors(
            folder / SINGLE_FILE, lambda t: [t.pop(name) for name in list(t) if "experts" in name]
        ),
        r"missing tensors: layers.0.experts.0.gate.weight, .* and 3 more$",
    ),
    "unexpected tensor": (
        lambda folder: edit_tensors(
            folder / SINGLE_FILE, lambda t: t.update(bias=np.ones(4, np.float32))
        ),
        "unexpected tensors, which the model has no place for: bias$",
    ),
    "wrong shape": (
        lambda folder: edit_tensors(
            folder / SINGLE_FILE, lambda t: t.update({"embed.weight": np.ones((4, 6), np.float32)})
        ),
        r"'embed.weight' has shape \(4, 6\), expected \(6, 4\)$",
    ),
    "unsupported dtype": (
        lambda folder: edit_header(
            folder / SINGLE_FILE, lambda header: header["embed.weight"].update(dtype="I32")
        ),
        "'embed.weight' has dtype I32; supported are F64, F32, F16, BF16",
    ),
    "truncated data": (lambda folder: _truncate(folder / SINGLE_FILE, -4), "not a readable"),
    "truncated header": (lambda folder: _truncate(folder / SINGLE_FILE, 100), "not a readable"),
    "empty file": (lambda folder: _truncate(folder / SINGLE_FILE, 0), "not a readable"),
    "header with a wrong shape": (
        lambda folder: edit_header(folder / SINGLE_FILE, _set_shape),
        "not a readable",
    ),
    "header with wrong offsets": (
        lambda folder: edit_header(folder / SINGLE_FILE, _set_offsets),
        "not a readable",
    ),
    "header longer than the file": (
        lambda folder: (folder / SINGLE_FILE).write_bytes(struct.pack("<Q", 10**6) + b"{}"),
        "not a readable",
    ),
    "only pickle": (
        lambda folder: (folder / SINGLE_FILE).rename(folder / "pytorch_model.bin"),
        r"only pickled weights \(pytorch_model.bin\); .* convert the checkpoint to safetensors",
    ),
    "no weights": (
        lambda folder: (folder / SINGLE_FILE).unlink(),
        "neither model.safetensors nor model.safetensors.index.json",
    ),
    "both layouts": (lambda folder: (folder / INDEX).write_text("{}"), "remove the one"),
}
SHARDED_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (
        lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
        "index.json: names files that are missing: model-00002-of-00003.safetensors",
    ),
    "truncated shard": (
        lambda folder: _truncate(folder / "model-00002-of-00003.safetensors", -1),
        "model-00002-of-00003.safetensors: not a readable",
    ),
    "index with another shard": (
        _move_between_shards,
        "says that model-00003-of-00003.safetensors has tensor 'embed.weight', but it has not",
    ),
    "index with an unknown tensor": (
        lambda folder: edit_json(
            folder / INDEX,
            lambda index: index["weight_map"].update(x="model-00001-of-00003.safetensors"),
        ),
        "says that model-00001-of-00003.safetensors has tensor 'x', but it has not",
    ),
    "index without a tensor": (
        lambda folder: edit_json(
            folder / INDEX, lambda index: index["weight_map"].pop("embed.weight")
        ),
        "does not list tensor 'embed.weight' of model-00001-of-00003.safetensors",
    ),
    "tensor in two shards": (
        _repeat_in_another_shard,
        "'embed.weight' is in two files, model-00001-of-00003.safetensors and "
        "model-00003-of-00003.safetensors",
    ),
    "index without weight_map": (
        lambda folder: (folder / INDEX).write_text("{}"),
        "weight_map must name a file",
    ),
    "index that leaves the folder": (
        lambda folder: edit_json(
            folder / INDEX, lambda index: index["weight_map"].update(x="../x.safetensors")
        ),
        "weight_map must name a file of the folder",
    ),
    "index that is not JSON": (
        lambda folder: (folder / INDEX).write_text("{"),
        "not a readable JSON file",
    ),
    "index that is a list": (
        lambda folder: (folder / INDEX).write_text("[]"),
        "must hold a JSON object, not a list",
    ),
}


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize(
    ("damage", "message"), SINGLE_FILE_DAMAGE.values(), ids=SINGLE_FILE_DAMAGE.keys()
)
def test_damage_of_a_single_file_is_refused(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load_parameters(folder, TABLE, jnp.float32)
    assert str(folder) in str(error.value)


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize(("damage", "message"), SHARDED_DAMAGE.values(), ids=SHARDED_DAMAGE.keys())
def test_damage_of_shards_is_refused(
    sharded: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(sharded)
    with pytest.raises(CheckpointError, match=message) as error:
        load_parameters(sharded, TABLE, jnp.float32)
    assert str(sharded) in str(error.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    for load in (
        lambda: read_config(missing),
        lambda: load_parameters(missing, TABLE, jnp.float32),
        lambda: load_orbax(missing, TABLE, jnp.float32),
    ):
        with pytest.raises(CheckpointError, match="nothing: no such folder"):
            load()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json: no such file"),
        (b"{", "not a readable JSON file"),
        (b"\xff\xfe", "not a readable JSON file"),
        (b"3", "must hold a JSON object, not a int"),
    ],
)
def test_a_bad_config_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_ignored_tensors_are_not_read(folder: Path) -> None:
    expected = load_parameters(folder, TABLE, jnp.float32)
    names = ("layers.0.rotary.inv_freq", "layers.1.rotary.inv_freq")
    edit_tensors(folder / SINGLE_FILE, lambda t: t.update({name: np.arange(2) for name in names}))
    with pytest.raises(
        CheckpointError, match=r"unexpected tensors.*: layers.0.rotary.inv_freq, lay"
    ):
        load_parameters(folder, TABLE, jnp.float32, ignore=["rotary.inv_freq"])
    # What the table names is read, even if a pattern matches it.
    loaded = load_parameters(folder, TABLE, jnp.float32, ignore=["*.inv_freq", "embed.*"])
    assert_equal(loaded, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("memory_bytes", [1, 10**9])
def test_weights_that_are_not_finite_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, value: float, memory_bytes: int
) -> None:
    monkeypatch.setattr(checkpoint, "_MEMORY_BYTES", memory_bytes)
    name = "layers.2.experts.1.up.weight"
    edit_tensors(folder / SINGLE_FILE, lambda t: t[name].__setitem__((4, 3), value))
    with pytest.raises(CheckpointError, match=f"'{name}' has values that are NaN or infinite"):
        load_parameters(folder, TABLE, jnp.bfloat16)


def test_weights_that_the_dtype_cannot_hold_are_refused(folder: Path) -> None:
    edit_tensors(folder / SINGLE_FILE, lambda t: t["embed.weight"].__setitem__((0, 0), 1e6))
    load_parameters(folder, TABLE, jnp.bfloat16)
    with pytest.raises(CheckpointError, match=r"'embed.weight' has values .* infinite in float16"):
        load_parameters(folder, TABLE, jnp.float16)


# Saving


def test_saving_never_overwrites(folder: Path, tmp_path: Path) -> None:
    arrays = random_arrays(TABLE, np.float32)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    file = tmp_path / "file"
    file.touch()
    for taken in (folder, file):
        with pytest.raises(CheckpointError, match="already exists"):
            save_checkpoint(taken, CONFIG, TABLE, arrays)
        with pytest.raises(CheckpointError, match="already exists"):
            save_orbax(taken, arrays, CONFIG)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", CONFIG, TABLE, arrays)
    assert_equal(load_parameters(tmp_path / "empty", TABLE, jnp.float32), arrays)


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(CheckpointError, match="model: cannot be written: disk full"):
        save_checkpoint(tmp_path / "model", CONFIG, TABLE, random_arrays(TABLE, np.float32))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": None}, "missing parameters: norm"),
        ({"extra": np.ones(3, np.float32)}, "unexpected parameters: extra"),
        ({"norm": np.ones((3, 5), np.float32)}, r"'norm' has shape \(3, 5\), expected \(3, 4\)"),
        ({"norm": np.ones((3, 4), np.int32)}, "'norm' has dtype int32"),
    ],
)
def test_saving_other_arrays_than_the_table_says_is_refused(
    tmp_path: Path, change: dict[str, np.ndarray | None], message: str
) -> None:
    arrays = random_arrays(TABLE, np.float32) | change
    arrays = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path / "model", CONFIG, TABLE, arrays)
    assert not (tmp_path / "model").exists()


# Orbax


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({"extra": single((3,), "extra")}, jnp.float32, "missing parameters: extra"),
        ({"norm": None}, jnp.float32, "unexpected parameters: norm"),
        ({"norm": single((3, 5), "norm")}, jnp.float32, r"shape \(3, 4\), expected \(3, 5\)"),
        ({}, jnp.bfloat16, "'embedding' has dtype float32, expected bfloat16"),
    ],
)
def test_orbax_checkpoints_of_another_table_are_refused(
    tmp_path: Path, change: dict[str, Parameter | None], dtype: Any, message: str
) -> None:
    save_orbax(tmp_path / "model", random_arrays(TABLE, np.float32), CONFIG)
    table = {name: parameter for name, parameter in (TABLE | change).items() if parameter}
    with pytest.raises(CheckpointError, match=message):
        load_orbax(tmp_path / "model", table, dtype)


def test_orbax_subtrees_are_refused(tmp_path: Path) -> None:
    table = {"layer": single((3,), "layer")}
    save_orbax(tmp_path / "model", {"layer": jnp.ones(3)}, CONFIG)
    shutil.rmtree(tmp_path / "model" / "parameters")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model" / "parameters", {"layer": {"norm": jnp.ones(3)}})
    with pytest.raises(CheckpointError, match="'layer' has shape None"):
        load_orbax(tmp_path / "model", table, jnp.float32)


def test_folders_that_orbax_did_not_write_are_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"was .* written by save_orbax"):
        load_orbax(folder, TABLE, jnp.float32)
    (folder / "parameters").mkdir()
    with pytest.raises(CheckpointError, match="not a readable orbax checkpoint"):
        load_orbax(folder, TABLE, jnp.float32)


@pytest.mark.parametrize("damaged", ["_METADATA", "manifest.ocdbt"])
def test_damaged_orbax_checkpoints_are_refused(tmp_path: Path, damaged: str) -> None:
    save_orbax(tmp_path / "model", random_arrays(TABLE, np.float32), CONFIG)
    path = tmp_path / "model" / "parameters" / damaged
    _truncate(path, path.stat().st_size // 2)
    # In its own process: orbax leaves reads in flight, whose failures would disturb later tests.
    script = (
        "import sys, jax.numpy as jnp\n"
        "from moelora_jax import CheckpointError\n"
        "from moelora_jax.models.orbax_checkpoint import load_orbax\n"
        "from tests.test_checkpoint import TABLE\n"
        "try:\n"
        "    load_orbax(sys.argv[1], TABLE, jnp.float32)\n"
        "except CheckpointError as error:\n"
        "    print('refused:', error)\n"
    )
    root = Path(__file__).parent.parent
    loaded = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert loaded.stdout.startswith("refused:"), loaded.stderr
    assert "not a readable orbax checkpoint" in loaded.stdout


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ValueError("DATA_LOSS"), CheckpointError),
        (FileNotFoundError("DATA_LOSS"), CheckpointError),
        (Exception("DATA_LOSS"), CheckpointError),
        (RuntimeError("out of memory"), RuntimeError),
    ],
    ids=repr,
)
def test_only_damage_is_blamed_on_an_orbax_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    expected: type[Exception],
) -> None:
    # No real damage: orbax would leave reads in flight, and their failures disturb later tests.
    save_orbax(tmp_path / "model", random_arrays(TABLE, np.float32), CONFIG)
    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", mock.Mock(side_effect=raised))
    with pytest.raises(expected, match=str(raised)):
        load_orbax(tmp_path / "model", TABLE, jnp.float32)


# What transformers writes and reads


LAYERS, EXPERTS, HIDDEN, INNER, VOCAB, HEAD, HEADS, KV_HEADS = 2, 3, 16, 8, 32, 4, 4, 2


def _layer_parameter(shape: tuple[int, ...], name: str) -> Parameter:
    return stacked((LAYERS, *shape), f"model.layers.{{layer}}.{name}.weight", layer=range(LAYERS))


QWEN3_MOE = {
    "embedding": single((VOCAB, HIDDEN), "model.embed_tokens.weight"),
    "final_norm": single((HIDDEN,), "model.norm.weight"),
    "head": single((VOCAB, HIDDEN), "lm_head.weight"),
    "attention_norm": _layer_parameter((HIDDEN,), "input_layernorm"),
    "moe_norm": _layer_parameter((HIDDEN,), "post_attention_layernorm"),
    "q_proj": _layer_parameter((HEADS * HEAD, HIDDEN), "self_attn.q_proj"),
    "k_proj": _layer_parameter((KV_HEADS * HEAD, HIDDEN), "self_attn.k_proj"),
    "v_proj": _layer_parameter((KV_HEADS * HEAD, HIDDEN), "self_attn.v_proj"),
    "o_proj": _layer_parameter((HIDDEN, HEADS * HEAD), "self_attn.o_proj"),
    "q_norm": _layer_parameter((HEAD,), "self_attn.q_norm"),
    "k_norm": _layer_parameter((HEAD,), "self_attn.k_norm"),
    "router": _layer_parameter((EXPERTS, HIDDEN), "mlp.gate"),
    "gate_up": stacked(
        (LAYERS, EXPERTS, 2, INNER, HIDDEN),
        "model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight",
        layer=range(LAYERS),
        expert=range(EXPERTS),
        projection=("gate", "up"),
    ),
    "down": stacked(
        (LAYERS, EXPERTS, HIDDEN, INNER),
        "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
        layer=range(LAYERS),
        expert=range(EXPERTS),
    ),
}


@pytest.fixture(scope="module")
def qwen3_moe() -> Any:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    return transformers.Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize("max_shard_size", ["5KB", "1GB"])
def test_checkpoints_of_transformers_load(
    qwen3_moe: Any, tmp_path: Path, max_shard_size: str
) -> None:
    qwen3_moe.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / INDEX).exists() == (max_shard_size == "5KB")
    assert read_config(tmp_path)["architectures"] == ["Qwen3MoeForCausalLM"]

    loaded = load_parameters(tmp_path, QWEN3_MOE, jnp.float32)

    # In memory, transformers stacks the experts of a layer itself: gate above up.
    weights = {name: tensor.numpy() for name, tensor in qwen3_moe.state_dict().items()}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        np.testing.assert_array_equal(
            np.asarray(loaded["gate_up"][layer]).reshape(EXPERTS, 2 * INNER, HIDDEN),
            weights[f"{prefix}mlp.experts.gate_up_proj"],
        )
        np.testing.assert_array_equal(
            np.asarray(loaded["down"][layer]), weights[f"{prefix}mlp.experts.down_proj"]
        )
        np.testing.assert_array_equal(
            np.asarray(loaded["q_proj"][layer]), weights[f"{prefix}self_attn.q_proj.weight"]
        )
    np.testing.assert_array_equal(np.asarray(loaded["head"]), weights["lm_head.weight"])


def test_transformers_loads_what_we_save(qwen3_moe: Any, tmp_path: Path) -> None:
    config = qwen3_moe.config.to_dict()
    arrays = random_arrays(QWEN3_MOE, np.float32)
    save_checkpoint(tmp_path / "model", config, QWEN3_MOE, arrays, max_shard_bytes=5000)

    model, report = type(qwen3_moe).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    np.testing.assert_array_equal(
        model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"].numpy(),
        np.asarray(arrays["gate_up"][1]).reshape(EXPERTS, 2 * INNER, HIDDEN),
    )
