"""Times one MoE layer with and without LoRA against other engines and the roofline.

    python -m benchmarks.moe_layer --model qwen3-30b-a3b --tokens 1,8,32 --rank 16 --json FILE
    python -m benchmarks.moe_layer --points anchors --json FILE

A program holds several chained layers with different weights, adapters and routing, writes donated
workspaces in place, and is called many times without waiting in between; the figure is the median over
repetitions of time per layer. Points run in worker processes, which compile side by side and take turns
to measure.
"""

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from moelora_kernels import backend

from benchmarks.workload import MODELS, Point, Workload, anchor_of, anchors, auto_adapters
from moelora_jax.moe import MoeWorkspace, moe_experts, moe_lora

Program = Callable[..., Any]


def layers_program(
    work: Workload, *, lora: bool, router: bool = False, chained: int | None = None
) -> Program:
    """``chained`` layers one after another on the same hidden states, unrolled."""
    chained = chained or work.layers
    config = work.point.config

    def program(state: Any, x: Any, params: Any, pages: Any, batches: Any, adapters: Any) -> Any:
        refs, out = jax.tree.map(jax.new_ref, state)
        for layer in (index % work.layers for index in range(chained)):
            batch = batches[layer]
            options = {
                "adapter_of_token": adapters if lora else None,
                "pages": pages if lora else None,
                "workspace": refs,
                "out": out,
            }
            index = jnp.int32(layer)
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
    work: Workload, layer: int, out: jax.Array, lora: bool, tokens: int = 3
) -> float:
    """Of one layer's output for some tokens, against float64."""
    chosen = np.linspace(0, work.point.tokens - 1, min(tokens, work.point.tokens)).astype(int)
    expected = np.stack([work.expected_token(layer, int(t), lora) for t in chosen])
    actual = np.asarray(out)[chosen].astype(np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def chained_layers(work: Workload) -> int:
    """Enough that the device is busy for longer than a call takes to dispatch."""
    return int(np.clip(np.ceil(3000 / work.roofline_us()), work.layers, 64))


def measure(point: Point, layers: int, turn: Callable[[], Any], budget_s: float) -> dict[str, Any]:
    """One point: base time, LoRA time, error, roofline."""
    work = Workload(point, layers)
    chained = chained_layers(work)
    variants = {"base": (False, False), "lora": (True, False), "lora_and_router": (True, True)}

    def compile_one(name: str) -> Any:
        lora, router = variants[name]
        program = layers_program(work, lora=lora, router=router, chained=chained)
        return program.lower(*argument_shapes(point, layers, lora)).compile()

    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(variants, pool.map(compile_one, variants), strict=True))
    row: dict[str, Any] = {**point.describe(), "layers": layers, "chained": chained}
    outputs = {}
    with turn():
        for name, (lora, _) in variants.items():
            state, args = new_state(work, lora), arguments(work, lora)
            row[name], state = time_program(compiled[name], state, args, chained, budget_s)
            if name != "lora_and_router":
                outputs[name] = np.asarray(state[1])
                row[name]["error"] = relative_error(work, (chained - 1) % layers, state[1], lora)
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
    return compiled.as_text().count('custom_call_target="triton_kernel_call_ffi"') / layers


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
    """Enough that a program outlasts its dispatch and its weights the L2 cache."""
    return 8 if point.tokens <= 32 and point.model != "mixtral-8x7b" else 4


def format_row(row: dict[str, Any]) -> str:
    anchor = row.get("anchor_us", {})
    others = {key: value for key, value in anchor.items() if not key.endswith("base")}
    base = {key: value for key, value in anchor.items() if key.endswith("base")}
    best, best_base = (min(group.values(), default=float("nan")) for group in (others, base))
    return (
        f"{row['model']:14} {row['tokens']:5} {row['rank']:3} {row['layout']:10} {row['mix']:7} "
        f"base {row['base']['us']:7.1f} /{best_base:7.1f}   lora {row['lora']['us']:7.1f} /{best:7.1f}   "
        f"router {row['lora_and_router']['us']:7.1f}   "
        f"roofline {row['roofline_us']:6.1f} = x{row['lora']['us'] / row['roofline_us']:.2f}   "
        f"error {row['base']['error']:.1e} {row['lora']['error']:.1e} "
        f"{'same' if row['base_rows_equal'] else 'BASE ROWS DIFFER'}   {row['launches']:.0f} launches"
    )


@contextmanager
def locked(path: str) -> Iterator[None]:
    """One process at a time uses the device for timing."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def work_on(points: Sequence[Point], lock: str, budget_s: float) -> None:
    """A worker process: one JSON line per point on standard output."""
    for point in points:
        try:
            row = measure(point, layers_of(point), lambda: locked(lock), budget_s)
        except Exception as error:  # one point that fails must not cost the others
            row = {**point.describe(), "failed": f"{type(error).__name__}: {error}"[:2000]}
        print("ROW " + json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", choices=["anchors"], help="all points of the anchors file")
    parser.add_argument("--only", type=int, help="of those, the ones of this token count")
    parser.add_argument("--model", default="qwen3-30b-a3b", help=",".join(MODELS))
    parser.add_argument("--tokens", default="1,8,32")
    parser.add_argument("--rank", default="16")
    parser.add_argument("--adapters", default="auto")
    parser.add_argument("--layout", default="per_expert", choices=["per_expert", "shared"])
    parser.add_argument("--mix", default="token", choices=["token", "request"])
    parser.add_argument("--max-rank", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--budget", type=float, default=0.3, help="seconds per timing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    points = points_of(arguments)
    if arguments.worker:
        specs = json.loads(Path(arguments.worker).read_text())
        work_on([Point(**spec) for spec in specs["points"]], specs["lock"], arguments.budget)
        return
    rows = []
    for row in run_workers(points, arguments.workers, arguments.budget):
        if "failed" in row:
            print(
                f"{row['model']} {row['tokens']} {row['rank']} FAILED {row['failed']}", flush=True
            )
            continue
        print(format_row(row), flush=True)
        rows.append(row)
    if arguments.json:
        report = {
            "device": jax.devices()[0].device_kind,
            "setup": backend.describe(),
            "date": time.strftime("%Y-%m-%d"),
            "command": "python -m benchmarks.moe_layer " + " ".join(sys.argv[1:]),
            "rows": sorted(
                rows, key=lambda row: (row["model"], row["layout"], row["rank"], row["tokens"])
            ),
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def run_workers(points: Sequence[Point], workers: int, budget_s: float) -> Iterator[dict[str, Any]]:
    """Spread points over processes that take turns on the device; yields their rows."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for index in range(min(workers, len(points))):
            spec = Path(folder) / f"{index}.json"
            mine = [asdict(point) for point in points[index::workers]]
            spec.write_text(json.dumps({"points": mine, "lock": f"{folder}/lock"}))
            command = [sys.executable, "-m", "benchmarks.moe_layer", "--worker", str(spec)]
            command += ["--budget", str(budget_s)]
            processes.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            )
        with ThreadPoolExecutor(len(processes)) as pool:
            for lines in pool.map(lambda process: process.communicate()[0], processes):
                for line in lines.splitlines():
                    if line.startswith("ROW "):
                        yield json.loads(line[4:])


if __name__ == "__main__":
    main()
