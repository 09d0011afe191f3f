"""The benchmarks' random files: they are read as those of transformers and PEFT are."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.parity import LAYERS, write_files
from benchmarks.random_files import MODELS, model_config, write_adapters, write_checkpoint
from moelora_jax.adapters.reader import read_adapter
from moelora_jax.models import family_of, load_model, model_arrays


def test_the_benchmark_compares_all_families() -> None:
    assert LAYERS.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_folders_are_read_strictly(tmp_path: Path, name: str) -> None:
    """Nothing is missing or left over, and numbers are of the size that they should be."""
    adapters = write_files(tmp_path, name, tiny=True)
    model, config, family = load_model(tmp_path / "model", jnp.bfloat16)
    for parameter, array in model_arrays(model).items():
        values = np.asarray(array, np.float32)
        assert 0 < np.abs(values).max() < 8, parameter
        # Rows, heads and experts are different ones, but for a few that chance has begin alike.
        rows = values.reshape(-1, values.shape[-1])
        assert len(np.unique(rows, axis=0)) > 0.95 * len(rows), parameter
    layouts = set()
    for adapter in adapters:
        read = read_adapter(
            tmp_path / adapter, config.lora_sites(), module_names=family.module_names
        )
        layouts |= set(read.layout.split("+"))
    assert layouts == {"linear", "per_expert", "peft_fused", "shared_outer"}


def test_shards_and_links(tmp_path: Path) -> None:
    raw = model_config("qwen3-30b-a3b", layers=2, tiny=True)
    size = write_checkpoint(tmp_path / "model", raw, shard_bytes=50_000)
    files = [*(tmp_path / "model").glob("*.safetensors")]
    assert len(files) > 5 and size <= sum(file.stat().st_size for file in files)
    _, config, family = load_model(tmp_path / "model", jnp.bfloat16)
    assert family is family_of(raw)
    write_adapters(tmp_path / "adapters", family, config, count=10, rank=3, mixed=True)
    read = [
        read_adapter(folder, config.lora_sites(), module_names=family.module_names)
        for folder in sorted((tmp_path / "adapters").iterdir())
    ]
    assert [adapter.layout for adapter in read[:4]] == [
        "linear+peft_fused", "per_expert", "linear", "linear",
    ]  # fmt: skip
    assert len(read) == 10
    first = [next(iter(adapter.updates.values())).a for adapter in (read[0], read[4], read[8])]
    assert not np.array_equal(first[0], first[1]) and np.array_equal(first[0], first[2])
