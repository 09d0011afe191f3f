"""Tile sizes of the kernels: a measured table per GPU, and a rule for what is not in it.

The choice follows from shapes alone, never from a batch, and is the same with and without LoRA: a
row of the base model is summed in the same order in both programs.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moelora_kernels.types import PAGE_ROWS

#: Bytes of shared memory that one program can have, by compute capability.
SHARED_MEMORY = {
    "8.0": 163 * 1024,
    "8.6": 99 * 1024,
    "8.9": 99 * 1024,
    "9.0": 227 * 1024,
    "10.0": 227 * 1024,
    "12.0": 99 * 1024,
}


#: Processors of a large GPU, of which none should be idle.
PROCESSORS = 132

#: Pairs up to which a layer is one launch, by the rule.
ONE_LAUNCH_PAIRS = 256


@dataclass(frozen=True)
class ShrinkTiles:
    """Launch parameters of a shrink.

    Attributes:
        block_k: summed columns of one step, of up to two pages; of runs alone.
        num_warps: warps per program.
        num_stages: steps whose loads are in flight; of runs alone.
        run_rows: rows of a run at most, which are multiplied at once; 0 for one program per row.
        programs: that share the list of runs, at most.
    """

    block_k: int
    num_warps: int
    num_stages: int
    run_rows: int = 0
    programs: int = 6 * PROCESSORS


@dataclass(frozen=True)
class GemmTiles:
    """Launch parameters of a grouped matrix product.

    Attributes:
        block_n: output columns of a program.
        block_k: summed columns of one step.
        num_warps: warps per program.
        num_stages: steps whose loads are in flight.
        stack: pages of adapters that are multiplied at once in tiles of 16 rows.
        shrink: of the launch before that makes the rank activations; None has programs of the same
            launch make them, one for each row, which is best for few rows.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    stack: int = 4
    shrink: ShrinkTiles | None = None

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "GemmTiles":
        shrink = fields["shrink"]
        return cls(**fields | {"shrink": shrink and ShrinkTiles(**shrink)})


@dataclass(frozen=True)
class LinearTiles:
    """Launch parameters of linear maps.

    Attributes:
        block_m: rows of a program; 1 for the one row of a batch, on the ordinary units.
        block_n: output columns of a program.
        block_k: summed columns of one step.
        num_warps: warps per program.
        num_stages: steps whose loads are in flight.
        parts: programs that share the sums of a tile, at most; not of one row.
        stack: pages of adapters that are multiplied at once.
        lora: stages, and registers of a thread at most, of a launch with adapters, where it is
            worth more that all of its programs are there at once; None for no others.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int = 1
    stack: int = 8
    lora: tuple[int, int] | None = None


@dataclass(frozen=True)
class LinearShrinkTiles:
    """Launch parameters of the shrink of linear maps with many rows.

    Attributes:
        rows: rows of a program.
        block_k: summed columns of one step of a warp.
        num_warps: warps per program, each of which sums columns of its own.
        parts: programs that share the columns of a tile of rows.
    """

    rows: int
    block_k: int
    num_warps: int
    parts: int


@dataclass(frozen=True)
class MosaicTiles:
    """Launch parameters of a grouped matrix product in Mosaic GPU: for Hopper, and many rows.

    Attributes:
        shrink: of the launch before that makes the rank activations.
        order: tiles of rows that share a block of columns before the next block begins.
        processors: programs, one for each processor of the GPU.
    """

    shrink: ShrinkTiles
    order: int = 8
    processors: int = 132

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "MosaicTiles":
        return cls(**fields | {"shrink": ShrinkTiles(**fields["shrink"])})


@dataclass(frozen=True)
class MoeTiles:
    """All that one MoE layer needs.

    Attributes:
        tile_rows: rows of a tile of the sort.
        gate_up: of :func:`moelora_kernels.gate_up`.
        down: of :func:`moelora_kernels.down`.
        one_launch: whether the layer is one launch, :func:`moelora_kernels.fused_experts`. It has
            the warps and stages of ``gate_up``. One token has a form, and tiles, of its own.
    """

    tile_rows: int
    gate_up: GemmTiles | MosaicTiles
    down: GemmTiles | MosaicTiles
    one_launch: bool = False

    @property
    def run_rows(self) -> int:
        """Rows of a tile of a run, for the sort: what each shrink of runs can do; 0 for none."""
        shrinks = (self.gate_up.shrink, self.down.shrink)
        rows = (shrink.run_rows for shrink in shrinks if shrink and shrink.run_rows)
        return min(rows, default=0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "MoeTiles":
        return cls(
            fields["tile_rows"],
            _product_from_json(fields["gate_up"]),
            _product_from_json(fields["down"]),
            fields["one_launch"],
        )


def _product_from_json(fields: dict[str, Any]) -> GemmTiles | MosaicTiles:
    return (MosaicTiles if "order" in fields else GemmTiles).from_json(fields)


def moe_tiles(
    *, num_experts: int, top_k: int, hidden: int, intermediate: int, tokens: int, dtype: DTypeLike
) -> MoeTiles:
    """Tiles for one MoE layer on the default device.

    The table is asked for this layer shape and the nearest token count at or below ``tokens``, or
    the smallest that it has.
    """
    rows = tokens * top_k / num_experts
    if jnp.dtype(dtype) != jnp.float32:
        shape = f"{num_experts}x{top_k}x{hidden}x{intermediate}"
        measured = _table(jax.devices()[0].device_kind).get(shape)
        if measured:
            counts = sorted(map(int, measured))
            nearest = max((count for count in counts if count <= tokens), default=counts[0])
            tiles = MoeTiles.from_json(measured[str(nearest)])
            if isinstance(tiles.gate_up, MosaicTiles) and jax.__version_info__ >= (0, 12):
                # From that version on the assembler ignores ``setmaxnreg``, and the sums of more
                # rows do not fit into registers.
                tiles = replace(tiles, tile_rows=min(tiles.tile_rows, 128))
            return tiles
    return MoeTiles(*gemm_rule(rows, dtype), one_launch=tokens * top_k <= ONE_LAUNCH_PAIRS)


def gemm_rule(rows_per_expert: float, dtype: DTypeLike) -> tuple[int, GemmTiles, GemmTiles]:
    """Tile rows, and tiles of gate_up and down, by the mean rows of an expert."""
    if jnp.dtype(dtype) == jnp.float32:
        # Products of float32 run on the ordinary units, from smaller tiles.
        tiles = GemmTiles(block_n=32, block_k=32, num_warps=4, num_stages=2)
        return 16 if rows_per_expert <= 16 else 32, tiles, tiles
    if rows_per_expert <= 16:
        # Weights are read once, so only loads in flight count: three programs fit on a processor.
        stack = 4 if rows_per_expert <= 4 else 8
        tile_rows, gate_up = 16, GemmTiles(64, 128, 4, 3, stack)
        down = GemmTiles(128, 128, 4, 3, stack)
    elif rows_per_expert <= 48:
        tile_rows, gate_up = 32, GemmTiles(64, 64, 4, 4, stack=8)
        down = GemmTiles(128, 64, 4, 4, stack=8)
    else:
        tile_rows = 64 if rows_per_expert <= 96 else 128
        gate_up, down = GemmTiles(128, 64, 8, 4, stack=8), GemmTiles(256, 64, 8, 4, stack=8)
    if rows_per_expert > 12:
        shrink = _shrink_of_runs(rows_per_expert)
        gate_up, down = replace(gate_up, shrink=shrink), replace(down, shrink=shrink)
    return tile_rows, _fit(gate_up, tile_rows, 2), _fit(down, tile_rows, 1)


def _fit(tiles: GemmTiles, tile_rows: int, matrices: int) -> GemmTiles:
    """The tiles with as many stages as the shared memory of the GPU holds, at 16 bits a number."""
    stage = 2 * tiles.block_k * (tile_rows + matrices * tiles.block_n)
    stages = _shared_memory() // stage
    return replace(tiles, num_stages=max(1, min(tiles.num_stages, stages)))


def shrink_rule(rows_per_expert: float, dtype: DTypeLike) -> ShrinkTiles:
    """Tiles of a shrink."""
    if rows_per_expert > 12 and jnp.dtype(dtype) != jnp.float32:
        return _shrink_of_runs(rows_per_expert)
    return ShrinkTiles(block_k=128, num_warps=4, num_stages=1)


def _shrink_of_runs(rows_per_expert: float) -> ShrinkTiles:
    if rows_per_expert < 128:
        return ShrinkTiles(block_k=128, num_warps=2, num_stages=4, run_rows=16)
    return ShrinkTiles(block_k=128, num_warps=2, num_stages=3, run_rows=32)


def dense_tiles(tokens: int, dtype: DTypeLike) -> tuple[ShrinkTiles, GemmTiles]:
    """Tiles of the shrink and of the expand."""
    # A dense layer has few rows of each adapter at a time, as an expert with them has.
    shrink = shrink_rule(tokens / 8, dtype)
    # Sorts of tokens by adapter have tiles of 16 rows.
    shrink = replace(shrink, run_rows=min(shrink.run_rows, 16))
    return shrink, GemmTiles(block_n=128, block_k=64, num_warps=4, num_stages=1)


def linear_tiles(tokens: int, width: int, outputs: Sequence[int], dtype: DTypeLike) -> LinearTiles:
    """Tiles of linear maps of ``width`` columns, which have so many outputs each.

    Measured with the shapes of Qwen3-30B-A3B on an H200. What counts is how many bytes are on
    their way from all processors, so narrow maps have the sums of a tile shared by programs.
    """

    def blocks(block_n: int) -> int:
        return sum(-(-out // block_n) for out in outputs)

    def parts(block_m: int, block_n: int, programs: int) -> int:
        return max(1, programs // (blocks(block_n) * -(-tokens // block_m)))

    if jnp.dtype(dtype) == jnp.float32:
        if tokens > 128:
            return LinearTiles(64, 64, 16, num_warps=4, num_stages=2)
        block_m = 1 if tokens == 1 else 16 if tokens <= 16 else 32
        return LinearTiles(block_m, 32, 32, num_warps=4, num_stages=2)
    if tokens == 1:
        if blocks(8) < PROCESSORS:
            return LinearTiles(1, 1, 2048, num_warps=4, num_stages=1)
        if blocks(8) >= 2 * PROCESSORS and width <= 2048:
            # One step, whose loads are all on their way at once.
            return LinearTiles(1, 4, 2048, num_warps=4, num_stages=1)
        return LinearTiles(1, 8, 512, num_warps=4, num_stages=5)
    if blocks(16) < 64 and tokens <= 128:
        # Little to read, so that one step each is soonest done.
        block_m = 16 if tokens <= 16 else 32
        return LinearTiles(block_m, 16, 256, num_warps=4, num_stages=2, parts=8)
    if tokens <= 16:
        if blocks(16) >= 2 * PROCESSORS:
            return LinearTiles(16, 16, 128, num_warps=1, num_stages=6)
        return LinearTiles(16, 32, 256, 4, 3, parts(16, 32, 320))
    if tokens <= 32:
        return LinearTiles(32, 64, 64, 4, 4, parts(32, 64, 264), lora=(3, 128))
    if tokens <= 64:
        shared = parts(64, 64, 170)
        return LinearTiles(64, 64, 64, 4, 6, shared, lora=(3, 128) if shared > 2 else None)
    if tokens <= 128:
        shared = parts(64, 64, 264)
        return LinearTiles(64, 64, 64, 4, 5, shared, lora=(3, 128) if shared > 2 else (4, 160))
    if blocks(64) < 8:
        # One wave, and sums of few parts to add up.
        return LinearTiles(32, 64, 128, 4, 4, parts(32, 64, PROCESSORS))
    large, small = blocks(256) * -(-tokens // 128), blocks(128) * -(-tokens // 128)
    # Rounds of tiles shall leave few processors idle in the last one.
    if large > 0.9 * -(-large // PROCESSORS) * PROCESSORS:
        tiles = LinearTiles(128, 256, 64, num_warps=8, num_stages=3)
    elif small <= PROCESSORS // 2:
        tiles = LinearTiles(64, 128, 128, num_warps=4, num_stages=4)
    else:
        # With three stages two programs share a processor.
        all_at_once = PROCESSORS < small <= 2 * PROCESSORS
        tiles = LinearTiles(128, 128, 64, num_warps=8, num_stages=3 if all_at_once else 4)
    stages = _shared_memory() // (2 * tiles.block_k * (tiles.block_m + tiles.block_n))
    return replace(tiles, num_stages=min(tiles.num_stages, stages))


def linear_shrink_tiles(tokens: int, width: int, sites: int, dtype: DTypeLike) -> LinearShrinkTiles:
    """Tiles of the shrink of ``sites`` linear maps with many rows."""
    rows, warps, size = 16 if tokens <= 1024 else 32, 4, jnp.dtype(dtype).itemsize
    # Three stages of rows and of a page of each map, whose number is rounded up to a power of two.
    lines = rows + PAGE_ROWS * (1 << (sites - 1).bit_length())
    columns = _shared_memory() // (3 * lines * warps * size)
    # Products of float32 run on the ordinary units, which have few registers for them.
    block_k = next(k for k in ((64, 32, 16) if size < 4 else (16,)) if k <= max(columns, 16))
    # All processors have work, of at least a step.
    parts = max(1, min(PROCESSORS // -(-tokens // rows), width // (warps * block_k)))
    return LinearShrinkTiles(rows, block_k, warps, parts)


def loads_blocks() -> bool:
    """Whether the default device has a tensor memory accelerator, as Hopper and its successors."""
    return float(_compute_capability()) >= 9


def _shared_memory() -> int:
    """Bytes of shared memory that one program can have on the default device."""
    return SHARED_MEMORY.get(_compute_capability(), min(SHARED_MEMORY.values()))


def _compute_capability() -> str:
    return getattr(jax.devices()[0], "compute_capability", "9.0")


@functools.cache
def _table(device_kind: str) -> dict[str, dict[str, Any]]:
    """Layer shape -> tokens -> tiles, or nothing for a GPU that was not measured."""
    name = device_kind.lower().replace(" ", "_") + ".json"
    file = resources.files(__package__).joinpath(name)
    return json.loads(file.read_text(encoding="utf-8"))["tiles"] if file.is_file() else {}
