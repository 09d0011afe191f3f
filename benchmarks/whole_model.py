"""Runs a whole model of real size with random weights and many adapters, and times its steps.

    python -m benchmarks.whole_model --model qwen3-30b-a3b --adapters 16 --json FILE

Weights are made on the device; adapters, of a rank at every expert and attention projection, in
host memory. It reports how long loading took, the device's memory beside the plan, a mixed batch
that is generated, and for each batch size a decode step with and without LoRA, back to back.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.workload import PEAK_BYTES
from moelora_jax import LLM, BucketConfig, CacheConfig, LoraConfig, Prompt, RuntimeConfig
from moelora_jax.adapters.adapter import Adapter, LowRankUpdate, Target
from moelora_jax.buckets import Batch, Kind, ProgramKey
from moelora_jax.config import Bucket, ModelConfig
from moelora_jax.models import ModelFamily, build_model, family_of
from moelora_kernels import backend

#: What decides the shapes, from the models' config.json.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "sliding_window": 128,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "max_position_embeddings": 131072,
    },
    # For trying this program on a CPU.
    "tiny": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 1024,
    },
}


def random_model(family: ModelFamily, config: ModelConfig) -> nnx.Module:
    """A model whose activations stay near 1, made on the device."""
    dtype = jnp.bfloat16
    skeleton = nnx.eval_shape(lambda: family.module(config, dtype=dtype, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(skeleton))

    @jax.jit(static_argnums=1)
    def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        # Row by row of the first axis: a whole stack of experts would need as much again.
        keys = jax.random.split(key, shape[0])
        scale = jnp.asarray(shape[-1] ** -0.5, dtype)
        return jax.lax.map(lambda k: jax.random.normal(k, shape[1:], dtype) * scale, keys)

    arrays = {}
    for number, (path, variable) in enumerate(flat):
        name, shape = ".".join(map(str, path)), variable.shape
        is_matrix = len(shape) > 2 or min(shape) > config.num_layers
        key = jax.random.fold_in(jax.random.key(0), number)
        arrays[name] = normal(key, shape) if is_matrix else jnp.ones(shape, dtype)
    return build_model(family, config, jax.block_until_ready(arrays), dtype)


def random_adapter(config: ModelConfig, rank: int, seed: int) -> Adapter:
    """An adapter of every site that is not optional; its numbers repeat, its memory does not."""
    rng = np.random.default_rng(seed)
    some = rng.normal(size=2**20).astype(jnp.bfloat16)

    def factor(rows: int, columns: int, scale: float) -> np.ndarray:
        start = int(rng.integers(some.size))
        size = rows * columns
        values = np.resize(np.roll(some, start)[: min(size, some.size)], size)
        return (values * np.asarray(scale, values.dtype)).reshape(rows, columns)

    updates = {
        Target(layer, site.name, expert): LowRankUpdate(
            factor(rank, site.in_features, site.in_features**-0.5),
            factor(site.out_features, rank, 0.1 * rank**-0.5),
            scaling=2.0,
        )
        for site in config.lora_sites()
        if not site.optional
        for layer in site.layers
        for expert in range(site.table_experts)
    }
    return Adapter("per_expert", updates)


def decode_batch(llm: LLM, key: ProgramKey, position: int, slots: list[int]) -> Batch:
    """One token of every sequence, all at one position, adapters in turn."""
    rows = key.bucket.sequences
    batch = llm.runner.layout(key).empty()
    row = np.arange(rows, dtype=np.int32)
    batch.tokens[:] = row % llm.config.vocab_size
    batch.positions[:] = position
    batch.adapter_of_token[:] = np.resize(slots, rows) if key.lora else -1
    batch.sequence_of_token[:] = row
    batch.query_counts[:] = 1
    batch.last_token[:] = row
    blocks = batch.block_table.shape[1]
    batch.block_table[:] = 1 + row[:, None] * blocks + np.arange(blocks)
    batch.num_tokens[...] = rows
    batch.top_p[:] = 1
    batch.seat[:] = row
    return batch


def time_steps(run: Callable[[], Any], calls: int = 20, repetitions: int = 5) -> float:
    """Microseconds of a step, when the host does not wait between steps."""
    times = []
    for repetition in range(repetitions + 1):
        start = time.perf_counter()
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)
        if repetition:  # The first one warms up.
            times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


def factor_bytes(config: ModelConfig, rank: int, adapters: int, tokens: int) -> float:
    """Expected bytes of the factors that a decode step touches, with uniform routing."""
    moe, total = config.moe, 0.0
    used = min(adapters, tokens)
    # Of one adapter, how many of a layer's experts some of its tokens choose.
    experts = moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** (tokens / used))
    for site in config.lora_sites():
        if not site.optional:
            per_layer = experts if site.num_experts else 1
            total += used * len(site.layers) * per_layer * (site.in_features + site.out_features)
    return total * rank * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3-30b-a3b", choices=MODELS)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sequences", default="1,8,32,64,128")
    parser.add_argument("--position", type=int, default=512, help="of the tokens that are decoded")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    raw = MODELS[options.model]
    family = family_of(raw)
    config = family.read_config(raw)
    sizes = tuple(int(size) for size in options.sequences.split(","))
    runtime = RuntimeConfig(
        lora=LoraConfig(options.adapters, max_rank=options.rank, pool_rank=options.rank),
        buckets=BucketConfig(decode=sizes, prefill=(512,)),
        cache=CacheConfig(max_length=options.position + 16),
    )
    report: dict[str, Any] = {"setup": backend.describe(), "date": time.strftime("%Y-%m-%d")}

    def lap(name: str, start: float) -> None:
        report[name] = round(time.perf_counter() - start, 2)
        print(f"{name}: {report[name]} s", flush=True)

    start = time.perf_counter()
    llm = LLM(random_model(family, config), config, family, runtime=runtime, dtype=jnp.bfloat16)
    lap("make_model_s", start)
    start = time.perf_counter()
    llm.warm_up(progress=False)
    lap("compile_s", start)
    names = [f"adapter{number}" for number in range(options.adapters)]
    adapters = [random_adapter(config, options.rank, seed) for seed in range(min(4, len(names)))]
    start = time.perf_counter()
    for number, name in enumerate(names):
        llm.load_adapter(name, adapters[number % len(adapters)])
    jax.block_until_ready(llm.runner.pool.device_pages())
    lap("load_adapters_s", start)

    start = time.perf_counter()
    rng = np.random.default_rng(0)
    rows = [None, *names] * 2
    prompts = [Prompt(rng.integers(config.vocab_size, size=64), name) for name in rows]
    completions = llm.generate(prompts, max_new_tokens=16, stop_tokens=())
    lap("generate_s", start)
    report["generated_tokens"] = sum(len(completion.tokens) for completion in completions)

    report["memory_plan"] = dict(llm.memory_plan()) | {"total": llm.memory_plan().total}
    memory = jax.devices()[0].memory_stats() or {}
    report["device_memory"] = {n: memory.get(n) for n in ("bytes_in_use", "peak_bytes_in_use")}
    print(json.dumps({n: report[n] for n in ("memory_plan", "device_memory")}), flush=True)

    slots = llm.runner.registry.acquire(names)
    report["decode"] = []
    kind: Kind = "decode"
    for size in sizes:
        times = {}
        for lora in (False, True):
            key = ProgramKey(kind, Bucket(size, size), lora)
            batch = decode_batch(llm, key, options.position, slots)
            times[lora] = time_steps(lambda key=key, batch=batch: llm.runner.run(key, batch))
        added = times[True] - times[False]
        touched = factor_bytes(config, options.rank, options.adapters, size)
        allowed = touched / PEAK_BYTES * 1e6 + 0.03 * times[False]
        row = {"sequences": size, "base_us": times[False], "lora_us": times[True]}
        row |= {"added_us": added, "factor_bytes": touched, "allowed_us": allowed}
        report["decode"].append(row)
        print(
            f"{size:4} sequences: base {times[False]:8.1f} us, LoRA {times[True]:8.1f} us, "
            f"added {added:7.1f} us (bytes and 3 %: {allowed:7.1f})",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
