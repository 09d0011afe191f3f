"""Measures tile sizes on the GPU at hand and writes the table that ships with the kernels.

    python -m benchmarks.tune --model qwen3-30b-a3b --tokens 8,32,128,512,4096 --workers 4

Every candidate of every kernel is compiled into one program per tile height, which is traced by
the profiler: kernel durations, without gaps. The table is written as each point is done, and points
that it has are skipped, so an interrupted run can be continued.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

import jax
import jax.numpy as jnp

import moelora_kernels
from benchmarks.device import Device
from benchmarks.workload import MODELS, Point, Workload, auto_adapters
from moelora_kernels import backend, down, gate_up, shrink, sort_tokens
from moelora_kernels.expert_lora.mosaic import MAX_TILE_ROWS
from moelora_kernels.tuning.tiles import (
    PROCESSORS,
    GemmTiles,
    MoeTiles,
    MosaicTiles,
    ShrinkTiles,
)

FOLDER = Path(moelora_kernels.__file__).parent / "tuning"
#: Layers in memory, so that no candidate finds the weights of the one before in the cache.
LAYERS = 2
#: Bytes of shared memory that one program may use, less what the compiler adds.
SHARED_MEMORY = 220 * 1024


def table_path() -> Path:
    return FOLDER / (jax.devices()[0].device_kind.lower().replace(" ", "_") + ".json")


def tile_heights(rows_per_expert: float) -> list[int]:
    if rows_per_expert <= 16:
        return [16]
    if rows_per_expert <= 48:
        return [32, 64]
    return [64, 128]


def mosaic_heights(rows_per_expert: float) -> list[int]:
    """Rows of a tile of Mosaic's kernels, where experts have many rows.

    The rows of an expert make one tile, or a few of equal size, with room for the spread of a
    random routing.
    """
    if rows_per_expert < 32 or getattr(jax.devices()[0], "compute_capability", None) != "9.0":
        return []
    most = rows_per_expert + 3 * rows_per_expert**0.5
    fewest = math.ceil(most / MAX_TILE_ROWS)
    return sorted({16 * math.ceil(most / tiles / 16) for tiles in (fewest, fewest + 1)})


def gemm_candidates(tile_rows: int, halves: int, tokens: int) -> list[GemmTiles]:
    """Tiles for a product with ``halves`` weight matrices, that fit into shared memory."""
    sizes: Any
    if tile_rows <= 16:
        blocks = (32, 64) if halves == 2 else (64, 128)
        sizes = itertools.product(blocks, (128, 256), (4,), (3, 4))
    elif tile_rows <= 32:
        sizes = itertools.product((64, 128), (64, 128), (4,), (3, 4))
    elif halves == 2:
        sizes = [(64, 64, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4)]
    else:
        sizes = [
            (128, 64, 4, 3),
            (128, 64, 4, 4),
            (128, 64, 8, 4),
            (256, 64, 8, 3),
            (256, 64, 8, 4),
        ]
    stacks = (4,) if tokens < 128 else (8,) if tokens < 4096 else (4, 8)
    return [
        GemmTiles(block_n, block_k, num_warps, num_stages, stack)
        for (block_n, block_k, num_warps, num_stages), stack in itertools.product(sizes, stacks)
        if num_stages * block_k * 2 * (max(tile_rows, 16) + halves * block_n) <= SHARED_MEMORY
        # The sums must leave registers for the rest.
        and max(tile_rows, 16) * block_n * halves <= 128 * 32 * num_warps
    ]


def shrink_candidates(rows_per_expert: float, tile_rows: int) -> list[ShrinkTiles]:
    """Tiles of a shrink in a launch of its own; none where the product's launch shrinks as well."""
    if rows_per_expert < 4:
        return []
    sizes = ((128, 2, 3), (128, 2, 4), (128, 4, 4), (256, 2, 3), (512, 2, 4), (512, 4, 3))
    return [
        ShrinkTiles(*size, run_rows, per_processor * PROCESSORS)
        for size, run_rows, per_processor in itertools.product(sizes, (16, 32, 64), (4, 8))
        if run_rows <= tile_rows
    ]


class Run(NamedTuple):
    """One measurement: a shrink, or a product with or without LoRA."""

    op: str
    tiles: ShrinkTiles | GemmTiles | MosaicTiles
    lora: bool

    @property
    def kernels(self) -> int:
        """Launches, of which the last is measured."""
        product = not isinstance(self.tiles, ShrinkTiles)
        return 2 if product and self.lora and self.tiles.shrink else 1

    @property
    def base(self) -> "Run":
        """The same product without LoRA."""
        if isinstance(self.tiles, GemmTiles):
            return Run(self.op, replace(self.tiles, shrink=None), False)
        return self._replace(lora=False)


def measure_height(
    work: Workload, tile_rows: int, device: Device, *, mosaic: bool
) -> dict[str, list[tuple[float, float, GemmTiles | MosaicTiles]]]:
    """Microseconds with LoRA and of the base model, and tiles, of every candidate."""
    point, config = work.point, work.point.config
    pairs, rows = point.tokens * config.top_k, point.tokens * config.top_k / config.num_experts
    shrinks = shrink_candidates(rows, tile_rows)
    # A product with a shrink before it takes the same time after every shrink.
    forms = [None] * (rows < 16) + shrinks[:1]
    runs = []
    for op, halves in (("gate_up", 2), ("down", 1)):
        runs += [Run(op, tiles, True) for tiles in shrinks]
        if mosaic:
            products = [Run(op, MosaicTiles(shrinks[0], order), True) for order in (8, 32)]
        else:
            candidates = gemm_candidates(tile_rows, halves, point.tokens)
            products = [
                Run(op, replace(tiles, shrink=form), True) for tiles in candidates for form in forms
            ]
        runs += products + list(dict.fromkeys(run.base for run in products))

    def program(state: Any, x: Any, params: Any, pages: Any, experts: Any, adapters: Any) -> Any:
        refs = jax.tree.map(jax.new_ref, state)
        gate, up, last = pages
        sorts = {
            run_rows: sort_tokens(
                experts,
                adapters,
                jnp.int32(point.tokens),
                num_experts=config.num_experts,
                num_adapters=point.adapters,
                tile_rows=tile_rows,
                run_rows=run_rows,
            )
            for run_rows in {0, *(tiles.run_rows for tiles in shrinks)}
        }
        common = {"tile_rows": tile_rows}
        for op, tiles, lora in runs:
            form = tiles if isinstance(tiles, ShrinkTiles) else tiles.shrink
            sort = sorts[form.run_rows if form else 0]
            for layer in map(jnp.int32, range(LAYERS)):
                if isinstance(tiles, ShrinkTiles):
                    x_rows, sites, top_k, out = (
                        (x, (gate, up), config.top_k, refs.gate_up_ranks)
                        if op == "gate_up"
                        else (refs.hidden, (last,), None, refs.down_ranks)
                    )
                    shrink(x_rows, sort, sites, layer, pairs=pairs, top_k=top_k, tiles=tiles,
                           out=out, **common)  # fmt: skip
                elif op == "gate_up":
                    gate_up(x, params.gate_up, sort, layer, top_k=config.top_k,
                            activation=config.activation, sites=(gate, up) if lora else None,
                            rank_activations=refs.gate_up_ranks, signals=refs.signals,
                            sorted_x=refs.expert_out, tiles=tiles, out=refs.hidden,
                            **common)  # fmt: skip
                else:
                    down(refs.hidden, params.down, sort, layer, pairs=pairs, dtype=jnp.bfloat16,
                         site=last if lora else None, rank_activations=refs.down_ranks,
                         signals=refs.signals, tiles=tiles, out=refs.expert_out,
                         **common)  # fmt: skip
        return jax.tree.map(jax.freeze, refs)

    with device.shared():
        arguments = (
            work.x,
            work.params,
            tuple(work.pages),
            work.batches[0].experts,
            jnp.asarray(work.adapter_of_token),
        )
        state = jax.block_until_ready(work.workspace(lora=True))
    compiled = jax.jit(program, donate_argnums=0).lower(state, *arguments).compile()
    with device.alone():
        state = jax.block_until_ready(compiled(state, *arguments))
        durations = trace(lambda: jax.block_until_ready(compiled(state, *arguments)))
    kernels = iter(durations_of_launches(durations))
    times = {}
    for run in runs:
        layers = [[next(kernels) for _ in range(run.kernels)] for _ in range(LAYERS)]
        times[run] = statistics.median(launches[-1] for launches in layers)
    assert next(kernels, None) is None, "more launches than expected"
    results: dict[str, list[tuple[float, float, GemmTiles | MosaicTiles]]] = {}
    for run, us in times.items():
        if isinstance(run.tiles, ShrinkTiles) or not run.lora:
            continue
        tiles, base = run.tiles, times[run.base]
        if tiles.shrink:
            best = min(shrinks, key=lambda tiles: times[Run(run.op, tiles, True)])
            us, tiles = us + times[Run(run.op, best, True)], replace(tiles, shrink=best)
        results.setdefault(run.op, []).append((us, base, tiles))
    return results


def durations_of_launches(kernels: Sequence[tuple[str, float]]) -> list[float]:
    """Microseconds of the shrinks and products, in order.

    A product includes what it alone needs: x in sorted order, and lists of LoRA steps.
    """
    durations, before = [], 0.0
    for name, us in kernels:
        if name.startswith("shrink_"):
            durations.append(us)
        elif name.startswith(("gate_up", "down_")):
            durations.append(before + us)
            before = 0.0
        elif durations:  # Not the sort, which comes first.
            before += us
    return durations


def trace(run: Any) -> list[tuple[str, float]]:
    """Names and microseconds of the kernels of a call, in order."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    events = [
        (event.start_ns, event.name, event.duration_ns / 1000)
        for plane in data.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    return [(name, us) for _, name, us in sorted(events)]


def shape_of(point: Point) -> str:
    """The table's name of a layer."""
    config = point.config
    sizes = (config.num_experts, config.top_k, config.hidden_size, config.intermediate_size)
    return "x".join(map(str, sizes))


def tune_point(point: Point, device: Device) -> dict[str, Any]:
    """The best tiles of one point, and what was measured."""
    work = Workload(point, LAYERS)
    rows = point.tokens * point.config.top_k / point.config.num_experts
    best: tuple[float, Any] = (float("inf"), None)
    report: dict[str, Any] = {}
    forms = [(height, False) for height in tile_heights(rows)]
    for tile_rows, mosaic in forms + [(height, True) for height in mosaic_heights(rows)]:
        results = measure_height(work, tile_rows, device, mosaic=mosaic)
        chosen = {
            op: min(found, key=lambda result: result[0] + result[1])
            for op, found in results.items()
        }
        total = sum(lora + base for lora, base, _ in chosen.values())
        report[f"{'mosaic ' * mosaic}{tile_rows}"] = {
            op: [
                [round(lora, 2), round(base, 2), str(tiles)]
                for lora, base, tiles in sorted(found, key=lambda result: result[0] + result[1])
            ]
            for op, found in results.items()
        }
        if total < best[0]:
            tiles = MoeTiles(tile_rows, **{op: result[2] for op, result in chosen.items()})
            best = (total, tiles)
    return {
        "shape": shape_of(point),
        "tokens": point.tokens,
        "tiles": best[1].to_json(),
        "report": report,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=",".join(MODELS))
    parser.add_argument("--tokens", default="8,32,128,512,4096")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--table", type=Path, help="instead of the one that ships")
    parser.add_argument("--report", type=Path, help="JSON of all that was measured")
    parser.add_argument("--again", action="store_true", help="also points that the table has")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    points = [
        Point(model, tokens, adapters=auto_adapters(tokens))
        for tokens in map(int, options.tokens.split(","))
        for model in options.model.split(",")
    ]
    if options.worker:
        for point in points:
            try:
                print("ROW " + json.dumps(tune_point(point, Device(options.worker))), flush=True)
            except Exception as error:
                print(f"FAILED {point.model} {point.tokens}: {error!r}"[:1000], flush=True)
        return
    path = options.table or table_path()
    table = json.loads(path.read_text()) if path.is_file() else {"tiles": {}}
    if not options.again:
        points = [p for p in points if str(p.tokens) not in table["tiles"].get(shape_of(p), {})]
    table["measured_with"] = backend.describe()
    reports = {}
    done = 0
    with tempfile.NamedTemporaryFile() as lock:
        for row in run_workers(points, options.workers, lock.name):
            done += 1
            name = f"{row['shape']} {row['tokens']}"
            table["tiles"].setdefault(row["shape"], {})[str(row["tokens"])] = row["tiles"]
            path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
            reports[name] = row["report"]
            if options.report:
                options.report.write_text(json.dumps(reports, indent=0))
            print(f"[{done}/{len(points)}] {name}: {row['tiles']}", flush=True)


def run_workers(points: Sequence[Point], workers: int, lock: str) -> Iterator[dict[str, Any]]:
    """A process for every point, ``workers`` at a time."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    waiting, running = list(points), []
    while waiting or running:
        while waiting and len(running) < workers:
            point = waiting.pop(0)
            command = [sys.executable, "-m", "benchmarks.tune", "--worker", lock]
            command += ["--model", point.model, "--tokens", str(point.tokens)]
            running.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            )
        process = running.pop(0)
        for line in process.communicate()[0].splitlines():
            if line.startswith("ROW "):
                yield json.loads(line[4:])
            elif line.startswith("FAILED"):
                print(line, flush=True)


if __name__ == "__main__":
    main()
