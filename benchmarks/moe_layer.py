"""Times one MoE layer with and without LoRA, beside other engines and the roofline.

    python -m benchmarks.moe_layer --model qwen3-30b-a3b --tokens 1,8,32 --rank 16 --json FILE
    python -m benchmarks.moe_layer --points anchors --workers 12 --json FILE

A program holds many chained layers with different weights, adapters and routing, writes donated
workspaces in place, and is called many times without waiting in between; the figure is the median
over repetitions of time per layer. Points run in worker processes, which compile side by side and
have the device to themselves while they measure.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device import Device
from benchmarks.results_file import how_made, write
from benchmarks.workload import MODELS, Point, Workload, anchor_of, anchors, auto_adapters
from moelora_jax.moe import MoeWorkspace, moe_experts, moe_lora
from moelora_kernels import backend

Program = Callable[..., Any]


def layers_program(
    work: Workload, *, lora: bool, router: bool = False, launches: str = "table"
) -> Program:
    """The workload's chain of layers, all on the same hidden states, unrolled."""
    config = work.point.config
    tiles = work.point.tiles
    if launches != "table":
        tiles = replace(tiles, one_launch=launches == "one")

    def program(state: Any, x: Any, params: Any, pages: Any, batches: Any, adapters: Any) -> Any:
        refs, out = jax.tree.map(jax.new_ref, state)
        for step, batch in enumerate(batches):
            options = {
                "adapter_of_token": adapters if lora else None,
                "pages": pages if lora else None,
                "workspace": refs,
                "out": out,
                "tiles": tiles,
            }
            index = jnp.int32(step % work.layers)
            if router:
                moe_lora(x, params, index, config, **options)
            else:
                moe_experts(x, *batch, params, index, config, **options)
        return jax.tree.map(jax.freeze, (refs, out))

    return jax.jit(program, donate_argnums=0)


def new_state(work: Workload, lora: bool) -> tuple[MoeWorkspace, jax.Array]:
    return work.workspace(lora), jnp.zeros_like(work.x)


def arguments(work: Workload, lora: bool) -> tuple[Any, ...]:
    pages = work.pages if lora else None
    return (work.x, work.params, pages, work.batches, jnp.asarray(work.adapter_of_token))


def argument_shapes(point: Point, layers: int, lora: bool) -> tuple[Any, ...]:
    """What a program of :func:`layers_program` is called with, without any of it in memory."""

    def build() -> tuple[Any, ...]:
        work = Workload(point, layers)
        return new_state(work, lora), *arguments(work, lora)

    return jax.eval_shape(build)


def time_program(
    compiled: Program, state: Any, args: Sequence[Any], layers: int, budget_s: float
) -> tuple[dict[str, float], Any]:
    """Microseconds per layer, pipelined and synchronised, and the last state."""

    def run(state: Any, calls: int) -> tuple[float, Any]:
        start = time.perf_counter()
        for _ in range(calls):
            state = compiled(state, *args)
        jax.block_until_ready(state)
        return time.perf_counter() - start, state

    _, state = run(state, 3)
    once, state = run(state, 3)
    calls = int(np.clip(budget_s / 7 / max(once / 3, 1e-6), 3, 100))
    times = []
    for _ in range(7):
        elapsed, state = run(state, calls)
        times.append(elapsed / calls / layers * 1e6)
    single = []
    for _ in range(5):
        elapsed, state = run(state, 1)
        single.append(elapsed * 1e6)
    return {
        "us": statistics.median(times),
        "us_min": min(times),
        "us_max": max(times),
        "one_call_us": statistics.median(single),  # of all chained layers
    }, state


def relative_error(
    work: Workload, out: np.ndarray, lora: bool, device: Device, tokens: int = 2
) -> float:
    """Of the last layer's output for some tokens, against float64."""

    def read(array: jax.Array) -> np.ndarray:
        with device.shared():  # Not while the host computes, which would keep others waiting.
            return np.asarray(array)

    chosen = np.linspace(0, work.point.tokens - 1, min(tokens, work.point.tokens)).astype(int)
    step = work.chained - 1
    expected = np.stack([work.expected_token(step, int(t), lora, read) for t in chosen])
    actual = out[chosen].astype(np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def measure(
    point: Point, layers: int, device: Device, budget_s: float, router: bool, launches: str
) -> dict[str, Any]:
    """One point: base time, LoRA time, error, roofline."""
    work = Workload(point, layers)
    chained = work.chained
    variants = {"base": (False, False), "lora": (True, False)}
    if router:
        variants["lora_and_router"] = (True, True)

    def compile_one(name: str) -> Any:
        lora, router = variants[name]
        program = layers_program(work, lora=lora, router=router, launches=launches)
        return program.lower(*argument_shapes(point, layers, lora)).compile()

    start = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(variants, pool.map(compile_one, variants), strict=True))
    row: dict[str, Any] = {**point.describe(), "layers": layers, "chained": chained}
    row["compile_s"] = round(time.perf_counter() - start, 1)
    outputs = {}
    with device.shared():
        inputs = {name: arguments(work, lora) for name, (lora, _) in variants.items()}
        states = {name: new_state(work, lora) for name, (lora, _) in variants.items()}
        jax.block_until_ready((inputs, states))
    with device.alone():
        for name in variants:
            row[name], state = time_program(
                compiled[name], states.pop(name), inputs[name], chained, budget_s
            )
            outputs[name] = np.asarray(state[1])
    for name in ("base", "lora"):
        row[name]["error"] = relative_error(work, outputs[name], name == "lora", device)
    base_rows = work.adapter_of_token < 0
    row["base_rows_equal"] = bool(
        (
            outputs["base"][base_rows].view(np.int16) == outputs["lora"][base_rows].view(np.int16)
        ).all()
    )
    row["roofline_us"] = work.roofline_us()
    row["base_roofline_us"] = work.roofline_us(lora=False)
    row["launches"] = launches_per_layer(compiled["lora"], chained)
    anchor = anchor_of(point)
    if anchor:
        row["anchor_us"], row["anchor_roofline_us"] = anchor["us"], anchor["roofline_us"]
    return row


def launches_per_layer(compiled: Any, layers: int) -> float:
    text = compiled.as_text()
    targets = ("triton_kernel_call_ffi", "mosaic_gpu_v2")
    return sum(text.count(f'custom_call_target="{target}"') for target in targets) / layers


def points_of(arguments: argparse.Namespace) -> list[Point]:
    if arguments.points == "anchors":
        names = ("model", "tokens", "rank", "adapters", "layout")
        points = [Point(**{name: anchor[name] for name in names}) for anchor in anchors()]
        return [p for p in points if arguments.only in (None, p.tokens)]
    return [
        Point(
            model,
            int(tokens),
            int(rank),
            auto_adapters(int(tokens)) if arguments.adapters == "auto" else int(arguments.adapters),
            arguments.layout,
            arguments.mix,
            arguments.max_rank,
        )
        for model in arguments.model.split(",")
        for rank in arguments.rank.split(",")
        for tokens in arguments.tokens.split(",")
    ]


def layers_of(point: Point) -> int:
    """Enough that the weights of one round are several times the L2 cache."""
    return 2 if point.model == "mixtral-8x7b" else 4


def format_row(row: dict[str, Any]) -> str:
    """A line for people: ours / best of the others, and ours as a multiple of the roofline."""
    anchor = row.get("anchor_us", {})
    best = {
        kind: min((us for name, us in anchor.items() if name.endswith("base") == kind), default=0)
        for kind in (True, False)
    }
    parts = [
        f"{row['model']:14} {row['tokens']:5} rank {row['rank']:3} {row['layout']:10}",
        f"{row['mix']:7}",
        f"base {row['base']['us']:7.1f} /{best[True]:7.1f}",
        f"lora {row['lora']['us']:7.1f} /{best[False]:7.1f}",
        f"roofline {row['roofline_us']:6.1f} x {row['lora']['us'] / row['roofline_us']:.2f}",
        f"error {row['base']['error']:.1e} {row['lora']['error']:.1e}",
        "base rows equal" if row["base_rows_equal"] else "BASE ROWS DIFFER",
        f"{row['launches']:.0f} launches",
    ]
    if "lora_and_router" in row:
        parts.append(f"with router {row['lora_and_router']['us']:.1f}")
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", choices=["anchors"], help="all points of the anchors file")
    parser.add_argument("--only", type=int, help="of those, the ones of this token count")
    parser.add_argument("--model", default="qwen3-30b-a3b", help=",".join(MODELS))
    parser.add_argument("--tokens", default="1,8,32")
    parser.add_argument("--rank", default="16")
    parser.add_argument("--adapters", default="auto")
    parser.add_argument("--layout", default="per_expert", choices=["per_expert", "shared"])
    parser.add_argument("--mix", default="token", choices=["token", "request", "none"])
    parser.add_argument("--max-rank", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--budget", type=float, default=0.3, help="seconds per timing")
    parser.add_argument("--router", action="store_true", help="also time it with the router")
    parser.add_argument("--launches", default="table", choices=["table", "one", "several"])
    parser.add_argument("--lock", help="file that processes which share the device measure under")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    points = points_of(arguments)
    if arguments.worker:
        spec = json.loads(arguments.worker)
        point = Point(**spec["point"])
        try:
            row = measure(
                point,
                layers_of(point),
                Device(spec["lock"]),
                arguments.budget,
                arguments.router,
                arguments.launches,
            )
        except Exception as error:  # one point that fails must not cost the others
            row = {**point.describe(), "failed": f"{type(error).__name__}: {error}"[:2000]}
        print("ROW " + json.dumps(row), flush=True)
        return
    rows = []
    for row in run_workers(points, arguments):
        if "failed" in row:
            print(
                f"{row['model']} {row['tokens']} {row['rank']} FAILED {row['failed']}", flush=True
            )
            continue
        print(format_row(row), flush=True)
        rows.append(row)
        if arguments.json:  # After each point, so that what was measured outlives an interruption.
            write_report(rows, arguments.json)


def write_report(rows: list[dict[str, Any]], file: Path) -> None:
    report = {
        "device": jax.devices()[0].device_kind,
        "setup": backend.describe(),
        **how_made(),
        "rows": sorted(
            rows, key=lambda row: (row["model"], row["layout"], row["rank"], row["tokens"])
        ),
    }
    write(report, file)


def run_workers(points: Sequence[Point], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A process for each point; they compile side by side and take turns to measure."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.NamedTemporaryFile() as lock:

        def run(point: Point) -> str:
            spec = json.dumps({"point": asdict(point), "lock": arguments.lock or lock.name})
            command = [sys.executable, "-m", "benchmarks.moe_layer", "--worker", spec]
            command += ["--budget", str(arguments.budget)]
            command += ["--launches", arguments.launches]
            command += ["--router"] if arguments.router else []
            return subprocess.run(
                command, stdout=subprocess.PIPE, text=True, env=environment, check=False
            ).stdout

        with ThreadPoolExecutor(arguments.workers) as pool:
            # Many tokens take longest to compile: not last.
            ordered = sorted(points, key=lambda point: -point.tokens)
            for done in as_completed([pool.submit(run, point) for point in ordered]):
                for line in done.result().splitlines():
                    if line.startswith("ROW "):
                        yield json.loads(line[4:])


if __name__ == "__main__":
    main()
