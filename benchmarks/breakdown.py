"""Time of every kernel of one MoE-LoRA layer: ``python -m benchmarks.breakdown --tokens 32``.

Kernels are traced outside command buffers: the durations are those of production, the gaps not.
"""

import argparse
import os
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

import jax

from benchmarks.moe_layer import arguments, layers_program, new_state
from benchmarks.workload import Point, Workload, auto_adapters

LAYERS = 4


def kernel_times(point: Point, lora: bool) -> dict[str, tuple[float, float]]:
    """Median microseconds and launches per layer of every kernel, by its name."""
    work = Workload(point, LAYERS)
    program = layers_program(work, lora=lora)
    state, args = new_state(work, lora), arguments(work, lora)
    for _ in range(3):
        state = program(state, *args)
    jax.block_until_ready(state)
    calls = 5
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                state = program(state, *args)
            jax.block_until_ready(state)
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    durations = defaultdict(list)
    for plane in data.planes:
        if plane.name.startswith("/device:GPU"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        durations[event.name].append(event.duration_ns / 1000)
    return {
        name: (statistics.median(times), len(times) / calls / work.chained)
        for name, times in durations.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--tokens", default="32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layout", default="per_expert")
    options = parser.parse_args()
    for model in options.model.split(","):
        for tokens in map(int, options.tokens.split(",")):
            point = Point(model, tokens, options.rank, auto_adapters(tokens), options.layout)
            for lora in (True, False):
                times = kernel_times(point, lora)
                total = sum(us * launches for us, launches in times.values())
                parts = "  ".join(
                    f"{name} {us:.1f}" + (f" x{launches:.0f}" if launches > 1.5 else "")
                    for name, (us, launches) in times.items()
                    if launches > 0.5
                )
                name = f"{model} {tokens} {'lora' if lora else 'base'}"
                print(f"{name:28} total {total:7.1f}: {parts}", flush=True)


if __name__ == "__main__":
    main()
