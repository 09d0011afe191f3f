"""The measured tables of tiles, and what Mosaic's kernels refuse."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

import moelora_kernels.tuning
from moelora_kernels.tuning.tiles import MoeTiles, MosaicTiles

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


def require_sizes(tile_rows: int, dtype: str, hidden: int, width: int, bias: bool = False) -> None:
    mosaic = pytest.importorskip("moelora_kernels.expert_lora.mosaic")
    mosaic.require_sizes(tile_rows, dtype, width, hidden, jnp.zeros(1) if bias else None)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((64, "bfloat16", 64, 64), "128 rows, not 64"),
        ((128, "float32", 64, 64), "16 bits, not float32"),
        ((128, "bfloat16", 41, 64), "8 divides, not 41 and 64"),
        ((128, "bfloat16", 64, 72, True), "64 must divide the width, 72"),
    ],
)
def test_what_mosaic_refuses(sizes: tuple, message: str) -> None:
    require_sizes(128, "bfloat16", 72, 64, True)
    with pytest.raises(ValueError, match=message):
        require_sizes(*sizes)
