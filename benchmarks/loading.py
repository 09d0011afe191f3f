"""Loads a sharded checkpoint and adapters from files, and compares memory with the plan.

    python -m benchmarks.loading FOLDER --json FILE

``FOLDER`` is of ``benchmarks.random_files``. Reported are the seconds that each part took, a mixed
batch that is generated, and the device's memory beside what ``moelora plan`` says.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results_file import how_made, write
from moelora_jax import LLM, BucketConfig, CacheConfig, LoraConfig, Prompt, RuntimeConfig
from moelora_jax.engine.memory import plan_memory
from moelora_jax.models import read_model_config
from moelora_kernels import backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = options.folder / "model"
    adapters = sorted((options.folder / "adapters").iterdir())
    family, config = read_model_config(model)
    runtime = RuntimeConfig(
        lora=LoraConfig(len(adapters), max_rank=options.rank, pool_rank=options.rank),
        buckets=BucketConfig(decode=(options.rows,), prefill=(512,)),
        cache=CacheConfig(max_length=1024),
    )
    planned = plan_memory(family, config, runtime, jnp.bfloat16)
    files = [*model.glob("*.safetensors")]
    report: dict[str, Any] = {
        **how_made(),
        "setup": backend.describe(),
        "cores": os.cpu_count(),
        "model": config.architecture,
        "layers": config.num_layers,
        "shards": len(files),
        "checkpoint_bytes": sum(file.stat().st_size for file in files),
        "adapters": len(adapters),
    }

    def lap(name: str, start: float) -> None:
        report[name] = round(time.perf_counter() - start, 2)
        print(f"{name}: {report[name]} s", flush=True)

    start = time.perf_counter()
    llm = LLM.load(model, runtime=runtime, dtype=jnp.bfloat16)
    jax.block_until_ready(llm.runner.state)
    lap("load_model_s", start)
    start = time.perf_counter()
    for folder in adapters:
        llm.load_adapter(folder.name, folder)
    jax.block_until_ready(llm.runner.pool.device_pages())
    lap("load_adapters_s", start)
    start = time.perf_counter()
    report["programs"] = str(llm.warm_up())
    lap("compile_s", start)

    rng = np.random.default_rng(0)
    names = [None, *(folder.name for folder in adapters)]
    prompts = [
        Prompt(rng.integers(config.vocab_size, size=rng.integers(16, 128)), names[row % len(names)])
        for row in range(2 * options.rows)
    ]
    start = time.perf_counter()
    completions = llm.generate(prompts, max_new_tokens=options.new_tokens, stop_tokens=())
    lap("generate_s", start)
    report["generated_tokens"] = sum(len(completion.tokens) for completion in completions)

    # Peak and plan hold temporaries, of the one program that needs the most.
    memory = jax.devices()[0].memory_stats() or {}
    actual = llm.memory_plan()
    report["planned"] = dict(planned) | {"total": planned.total}
    report["allocated"] = dict(actual) | {"total": actual.total}
    report["device"] = {n: memory.get(n) for n in ("bytes_in_use", "peak_bytes_in_use")}
    if memory:
        standing = planned.total - planned.temporaries
        report["in_use_over_plan"] = memory["bytes_in_use"] / standing - 1
        report["peak_over_plan"] = memory["peak_bytes_in_use"] / planned.total - 1
    print(json.dumps(report, indent=1))
    write(report, options.json)


if __name__ == "__main__":
    main()
