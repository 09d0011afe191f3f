"""The measured tables of tiles, and what Mosaic's kernels refuse."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import moelora_kernels.tuning.tiles
from moelora_kernels.tuning.tiles import MoeTiles, MosaicTiles, moe_tiles

TABLES = sorted(Path(moelora_kernels.tuning.__file__).parent.glob("*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_are_read_as_they_are_written(path: Path) -> None:
    for shape, counts in json.loads(path.read_text())["tiles"].items():
        _, _, hidden, intermediate = map(int, shape.split("x"))
        for fields in counts.values():
            tiles = MoeTiles.from_json(fields)
            assert tiles.to_json() == fields
            for product in (tiles.gate_up, tiles.down):
                if isinstance(product, MosaicTiles):
                    assert not tiles.one_launch
                    require_sizes(tiles.tile_rows, "bfloat16", hidden, intermediate)


@pytest.mark.parametrize(("version", "rows"), [((0, 11, 2), 176), ((0, 12, 0), 128)])
def test_tiles_fit_the_registers_that_jax_gives(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], rows: int
) -> None:
    device = SimpleNamespace(device_kind="NVIDIA H200", compute_capability="9.0")
    jax = SimpleNamespace(__version_info__=version, devices=lambda: [device])
    monkeypatch.setattr(moelora_kernels.tuning.tiles, "jax", jax)
    mixtral = {"num_experts": 8, "top_k": 2, "hidden": 4096, "intermediate": 14336}
    assert moe_tiles(**mixtral, tokens=4096, dtype="bfloat16").tile_rows == rows


def require_sizes(tile_rows: int, dtype: str, hidden: int, width: int) -> None:
    mosaic = pytest.importorskip("moelora_kernels.expert_lora.mosaic")
    mosaic.require_sizes(tile_rows, dtype, width, hidden)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((40, "bfloat16", 128, 128), "176 rows, not 40"),
        ((192, "bfloat16", 128, 128), "176 rows, not 192"),
        ((128, "float32", 128, 128), "16 bits, not float32"),
        ((128, "bfloat16", 160, 128), "multiples of 64 above it, not 160"),
        ((128, "bfloat16", 128, 96), "multiples of 64 above it, not 96"),
        ((128, "bfloat16", 128, 64), "multiples of 64 above it, not 64"),
    ],
)
def test_what_mosaic_refuses(sizes: tuple, message: str) -> None:
    require_sizes(128, "bfloat16", 192, 128)
    with pytest.raises(ValueError, match=message):
        require_sizes(*sizes)
