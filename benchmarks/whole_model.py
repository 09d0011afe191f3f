"""Runs a whole model of real size with random weights and many adapters, and times its steps.

    python -m benchmarks.whole_model --model qwen3-30b-a3b --adapters 16 --json FILE

Weights are made on the device; adapters, of a rank at every expert and attention projection, in
host memory. It reports cold and warm start, the device's memory beside the plan, and with and
without LoRA, back to back: decode steps, their kernels, prefill steps, and how busy the device is
while sequences are served. The file is written anew after each part, so a run that is cut short
still tells what it found.
"""

import argparse
import functools
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Weights, pages and cache of a model of real size leave little; must be set before JAX starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import moelora_kernels
from benchmarks.device import Device
from benchmarks.results_file import how_made, write
from benchmarks.workload import PEAK_BYTES
from moelora_jax import LLM, BucketConfig, CacheConfig, LoraConfig, Prompt, RuntimeConfig
from moelora_jax.adapters.adapter import Adapter, LowRankUpdate, Target
from moelora_jax.buckets import (
    Kind,
    ProgramKey,
    Programs,
    program_keys,
    use_compilation_cache,
)
from moelora_jax.config import Bucket, ModelConfig
from moelora_jax.engine.sequence import Sequence
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

#: Kinds of our own kernels, by the folder that they are in.
KIND_OF_FOLDER = {
    "attention": "attention",
    "combine": "experts",
    "dense_lora": "linear maps",
    "expert_lora": "experts",
    "fused_experts": "experts",
    "heads": "norms and heads",
    "linear": "linear maps",
    "norm": "norms and heads",
    "router": "router",
    "sort": "experts",
}

#: Kinds of all others, by what is found in their names. The first that matches counts.
KINDS = {
    "cache": "scatter",
    "copies": "memcpy|memset|copy|dynamic.slice",
    "matrix products": "gemm|gemv|nvjet|cutlass|cublas|splitk|dot",
    "other fusions": "fusion|condition",
    "unknown": "",
}

#: Steps of the engine that are timed, and of how many sequences: the fewer they are, the less the
#: device has to do while the host prepares the next step.
STEPS = 32
SERVED = (1, 8, 32, 128)


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
    """An adapter of every site that is not optional, whose factors overlap in host memory."""
    most = rank * max(max(site.in_features, site.out_features) for site in config.lora_sites())
    numbers = np.random.default_rng(seed).normal(size=2**20 + most)
    updates: dict[Target, LowRankUpdate] = {}
    scaled: dict[float, np.ndarray] = {}

    def factor(rows: int, columns: int, scale: float) -> np.ndarray:
        if scale not in scaled:
            scaled[scale] = (numbers * scale).astype(jnp.bfloat16)
        start = len(updates) * 37 % 2**20  # Two factors in the same place would be stored once.
        return scaled[scale][start : start + rows * columns].reshape(rows, columns)

    for site in config.lora_sites():
        for layer in () if site.optional else site.layers:
            for expert in range(site.table_experts):
                a = factor(rank, site.in_features, site.in_features**-0.5)
                b = factor(rank, site.out_features, 0.1 * rank**-0.5).T
                updates[Target(layer, site.name, expert)] = LowRankUpdate(a, b, scaling=2.0)
    return Adapter("per_expert", updates)


def step_batch(
    llm: LLM, key: ProgramKey, position: int, counts: list[int], slots: list[int]
) -> np.ndarray:
    """So many tokens of each sequence, which begin at ``position``; adapters in turn."""
    sequences = len(counts)
    layout = llm.runner.layout(key)
    packed = layout.padding()
    batch = layout.unpack(packed)
    row = np.arange(sequences, dtype=np.int32)
    ends = np.cumsum(counts)
    total = int(ends[-1])
    batch.tokens[:total] = np.arange(total) * 7919 % llm.config.vocab_size
    batch.positions[:total] = np.concatenate([position + np.arange(count) for count in counts])
    adapters = np.resize(slots, sequences) if key.lora else np.full(sequences, -1)
    batch.adapter_of_token[:total] = np.repeat(adapters, counts)
    batch.sequence_of_token[:total] = np.repeat(row, counts)
    batch.query_counts[:sequences] = counts
    batch.last_token[:sequences] = ends - 1
    blocks = batch.block_table.shape[1]
    batch.block_table[:sequences] = 1 + row[:, None] * blocks + np.arange(blocks)
    batch.num_tokens[...] = total
    batch.seat[:sequences] = row
    return packed


def time_steps(run: Callable[[], Any], repetitions: int = 5) -> float:
    """Microseconds of a step, when the host does not wait between steps."""

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls * 1e6

    timed(2)
    calls = min(20, max(2, int(1e5 / timed(2))))
    return statistics.median(timed(calls) for _ in range(repetitions))


def time_to_enqueue(run: Callable[[], Any], repetitions: int = 9) -> float:
    """Microseconds that this thread works to hand a step to an idle device."""

    def timed() -> float:
        start = time.thread_time()
        out = run()
        elapsed = time.thread_time() - start
        jax.block_until_ready(out)
        return elapsed * 1e6

    return statistics.median(timed() for _ in range(repetitions))


def trace_steps(run: Callable[[], Any], calls: int = 2) -> dict[str, tuple[float, float]]:
    """Microseconds and launches of a step, by the kernel's name, from a profiler's trace.

    XLA launches the kernels of a command buffer one by one while it is traced, so durations are
    those of production and gaps are not.
    """
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                out = run()
            jax.block_until_ready(out)
        (file,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines if plane.name.startswith("/device:GPU") else ():
                for event in line.events if line.name.startswith("Stream") else ():
                    found[event.name].append(event.duration_ns / 1000)
    return {name: (sum(us) / calls, len(us) / calls) for name, us in found.items()}


@functools.cache
def own_kernels() -> dict[str, str]:
    """Kind of each of our kernels, by the name that a profiler shows."""
    found = {}
    for file in sorted(Path(moelora_kernels.__file__).parent.glob("*/*.py")):
        text = file.read_text(encoding="utf-8")
        names = re.findall(r"^@triton\.jit.*\ndef (\w+)", text, re.MULTILINE)
        names += [f"{name}_mosaic_gpu_kernel" for name in re.findall(r'"(\w+_mosaic)"', text)]
        found |= {name: KIND_OF_FOLDER[file.parent.name] for name in names}
    return found


def kind_of(kernel: str) -> str:
    """Kind of a kernel, by the name that a profiler shows."""
    if kind := own_kernels().get(kernel):
        return kind
    return next(kind for kind, found in KINDS.items() if re.search(found, kernel, re.IGNORECASE))


def by_kind(kernels: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Microseconds and launches by kind of kernel."""
    totals: dict[str, tuple[float, float]] = {}
    for name, (us, launches) in kernels.items():
        kind = kind_of(name)
        before = totals.get(kind, (0.0, 0.0))
        totals[kind] = before[0] + us, before[1] + launches
    return totals


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


class Report:
    """Prints what was measured as it comes, and keeps the file up to date."""

    def __init__(self, file: Path | None, seconds: float) -> None:
        self.values: dict[str, Any] = {}
        self._file = file
        self._end = time.perf_counter() + seconds

    def __setitem__(self, name: str, value: Any) -> None:
        self.values[name] = value
        write(self.values, self._file)

    def add(self, name: str, row: dict[str, Any]) -> None:
        self[name] = [*self.values.get(name, []), row]

    def has_time(self) -> bool:
        return time.perf_counter() < self._end

    def lap(self, name: str, start: float) -> None:
        self[name] = round(time.perf_counter() - start, 2)
        print(f"{name}: {self.values[name]} s", flush=True)


class Measurements:
    """The parts of the report, each of which can fail alone."""

    def __init__(self, llm: LLM, names: list[str], rank: int, position: int) -> None:
        self.llm, self.names, self.rank, self.position = llm, names, rank, position
        self.slots = llm.runner.registry.acquire(names)
        self.sizes = llm.runtime.buckets.decode

    def _run(self, key: ProgramKey, position: int, counts: list[int]) -> Callable[[], Any]:
        runner = self.llm.runner
        batch = step_batch(self.llm, key, position, counts, self.slots)
        return lambda: runner.run(key, batch)

    def _decode(self, size: int, lora: bool) -> Callable[[], Any]:
        key = ProgramKey("decode", Bucket(size, size), lora)
        return self._run(key, self.position, [1] * size)

    def generate(self, report: Report) -> None:
        """A mixed batch, twice as many sequences as adapters."""
        rng = np.random.default_rng(0)
        vocabulary = self.llm.config.vocab_size
        prompts = [Prompt(rng.integers(vocabulary, size=64), n) for n in [None, *self.names]]
        completions = self.llm.generate(prompts * 2, max_new_tokens=16, stop_tokens=())
        report["generated_tokens"] = sum(len(completion.tokens) for completion in completions)

    def decode(self, report: Report) -> None:
        """Decode steps."""
        for size in self.sizes:
            base, with_lora = (time_steps(self._decode(size, lora)) for lora in (False, True))
            config, adapters = self.llm.config, len(self.names)
            touched = factor_bytes(config, self.rank, adapters, size)
            allowed = touched / PEAK_BYTES * 1e6 + 0.03 * base
            row = {"sequences": size, "base_us": base, "lora_us": with_lora}
            row |= {"added_us": with_lora - base, "factor_bytes": touched, "allowed_us": allowed}
            report.add("decode", row)
            print(
                f"decode {size:4}: base {base:8.1f} us, LoRA {with_lora:8.1f} us, "
                f"added {with_lora - base:7.1f} us (bytes and 3 %: {allowed:7.1f})",
                flush=True,
            )

    def kernels(self, report: Report) -> None:
        """The kernels of decode steps."""
        for size in self.sizes:
            for lora in (False, True):
                kernels = trace_steps(self._decode(size, lora))
                print_kernels(report, f"decode {size} {'lora' if lora else 'base'}", kernels)

    def prefill(self, report: Report) -> None:
        """Prefill steps: each chunk is of sequences of up to 512 tokens, adapters in turn."""
        for bucket in self.llm.runtime.buckets.prefill_buckets():
            length = min(512, self.position, bucket.tokens)
            counts = [length] * min(bucket.tokens // length, bucket.sequences)
            runs = [
                self._run(ProgramKey("prefill", bucket, lora), 0, counts) for lora in (False, True)
            ]
            base, with_lora = (time_steps(run) for run in runs)
            speed = sum(counts) / base * 1e6
            row = {"tokens": sum(counts), "sequences": len(counts), "base_us": base}
            report.add("prefill", row | {"lora_us": with_lora, "base_tokens_per_s": speed})
            print(
                f"prefill {bucket.tokens:5}: base {base:8.1f} us ({speed:,.0f} tokens/s), "
                f"LoRA {with_lora:8.1f} us, {base / with_lora:.1%} of base",
                flush=True,
            )
            for lora, run in zip((False, True), runs, strict=True):
                name = f"prefill {bucket.tokens} {'lora' if lora else 'base'}"
                print_kernels(report, name, trace_steps(run, 1))

    def serve(self, report: Report) -> None:
        """Decode steps as the engine runs them, beside the same program without an engine."""
        engine, rng = self.llm.engine, np.random.default_rng(0)
        for size in [size for size in self.sizes if size in SERVED] or [self.sizes[-1]]:
            for lora in (False, True):
                names = np.resize(self.names, size).tolist() if lora else [None] * size
                for name in names:
                    tokens = rng.integers(self.llm.config.vocab_size, size=self.position - STEPS)
                    prompt = tokens.tolist()
                    engine.add(Sequence(prompt, len(prompt), name, max_new_tokens=2 * STEPS + 16))
                decodes = engine.scheduler.steps["decode"]
                while engine.scheduler.steps["decode"] < decodes + 4:
                    engine.step()
                start, host_start = time.perf_counter(), time.thread_time()
                for _ in range(STEPS):
                    engine.step()
                served = (time.perf_counter() - start) / STEPS * 1e6
                host = (time.thread_time() - host_start) / STEPS * 1e6
                full = len(engine.scheduler.running) == size
                engine.run_until_done()
                step = self._decode(size, lora)
                program, enqueue = time_steps(step), time_to_enqueue(step)
                row = {"sequences": size, "lora": lora, "step_us": served, "host_us": host}
                row |= {
                    "program_us": program,
                    "enqueue_us": enqueue,
                    "idle": max(0.0, 1 - program / served),
                }
                report.add("serve", row | {"all_ran": full})
                print(
                    f"serve {size:4} {'LoRA' if lora else 'base'}: {served:8.1f} us a step, "
                    f"the program {program:8.1f} alone, so the device is idle {row['idle']:.1%}; "
                    f"the host's thread works {host:.1f} us, {enqueue:.1f} of it in the program"
                    + ("" if full else " (some had ended)"),
                    flush=True,
                )

    def warm_start(self, report: Report) -> None:
        """A second start: all programs again, from the compilation cache."""
        runner = self.llm.runner
        programs = Programs(runner._step_function, runner._arguments)
        done = programs.compile(program_keys(self.llm.runtime.buckets, ("prefill", "decode")))
        report["warm_start"] = str(done)
        print(f"warm start: {done}", flush=True)


def print_kernels(report: Report, name: str, kernels: dict[str, tuple[float, float]]) -> None:
    kinds = by_kind(kernels)
    total = sum(us for us, _ in kinds.values())
    launches = sum(count for _, count in kinds.values())
    ordered = sorted(kernels.items(), key=lambda item: -item[1][0])
    report.add("kernels", {"step": name, "kinds": kinds, "kernels": dict(ordered)})
    parts = sorted(kinds.items(), key=lambda item: -item[1][0])
    print(f"{name}: {launches:.0f} kernels, {total:.1f} us in kernels", flush=True)
    print("   " + "; ".join(f"{kind} {us:.0f} us x{count:.0f}" for kind, (us, count) in parts))
    for kernel, (us, count) in ordered[:24]:
        print(f"      {us:9.1f} us x{count:<6.0f} {us / count:8.2f} each  {kernel[:90]}")
    sys.stdout.flush()


def new_llm(options: argparse.Namespace) -> LLM:
    """The model, sized for what is measured."""
    raw = dict(MODELS[options.model])
    if options.layers:
        raw["num_hidden_layers"] = options.layers
        if "layer_types" in raw:
            raw["layer_types"] = raw["layer_types"][: options.layers]
    family = family_of(raw)
    config = family.read_config(raw)

    def sizes(text: str) -> tuple[int, ...]:
        return tuple(int(size) for size in text.split(","))

    runtime = RuntimeConfig(
        lora=LoraConfig(options.adapters, max_rank=options.rank, pool_rank=options.rank),
        buckets=BucketConfig(decode=sizes(options.sequences), prefill=sizes(options.prefill)),
        cache=CacheConfig(max_length=options.position + STEPS + 16),
    )
    return LLM(random_model(family, config), config, family, runtime=runtime, dtype=jnp.bfloat16)


def load_adapters(llm: LLM, names: list[str], rank: int, device: Device, report: Report) -> None:
    """All adapters hold the same numbers, in pages of their own."""
    start = time.perf_counter()
    packed = llm.runner.pool.pack(random_adapter(llm.config, rank, 0))
    report.lap("pack_one_adapter_s", start)
    start = time.perf_counter()
    for name in names:
        llm.runner.registry.install(name, packed)
    with device.shared():
        llm.runner.registry.acquire(names)
        jax.block_until_ready(llm.runner.pool.device_pages())
    report.lap("write_all_adapters_s", start)
    report["adapter_bytes"] = packed.page_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3-30b-a3b", choices=MODELS)
    parser.add_argument("--layers", type=int, help="fewer than the model has, for a quick look")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sequences", default="1,8,32,64,128", help="of the decode steps")
    parser.add_argument("--prefill", default="512,4096", help="tokens of the prefill steps")
    parser.add_argument("--position", type=int, default=512, help="of the tokens that are decoded")
    parser.add_argument("--parts", default="generate,decode,kernels,prefill,serve,warm_start")
    parser.add_argument("--seconds", type=float, default=900, help="after which no part begins")
    parser.add_argument("--lock", help="file that processes which share the device measure under")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if "serve" in options.parts.split(",") and options.position <= STEPS:
        parser.error(f"--position must be above {STEPS}, the steps that are timed while serving")
    report = Report(options.json, options.seconds)
    report.values |= {"setup": backend.describe(), **how_made()}
    report["options"] = {name: str(value) for name, value in vars(options).items()}
    parts = options.parts.split(",")
    names = [f"adapter{number}" for number in range(options.adapters)]
    device = Device(options.lock or os.devnull)
    with tempfile.TemporaryDirectory() as cache:
        use_compilation_cache(cache)  # A new one, so that the first start is cold.
        start = time.perf_counter()
        with device.shared():
            llm = new_llm(options)
            jax.block_until_ready(llm.runner.state)
        report.lap("make_model_s", start)
        prefills = {"generate", "prefill", "serve", "warm_start"} & set(parts)
        kinds: tuple[Kind, ...] = ("prefill", "decode") if prefills else ("decode",)
        report["cold_start"] = str(llm.warm_up(kinds, progress=False))
        print(f"cold start: {report.values['cold_start']}", flush=True)
        load_adapters(llm, names, options.rank, device, report)

        report["memory_plan"] = dict(llm.memory_plan()) | {"total": llm.memory_plan().total}
        memory = jax.devices()[0].memory_stats() or {}
        used = {name: memory.get(name) for name in ("bytes_in_use", "peak_bytes_in_use")}
        report["device_memory"] = used
        plan = report.values["memory_plan"]
        print(f"memory: plan {plan['total']:,} bytes, device {used}", flush=True)

        measurements = Measurements(llm, names, options.rank, options.position)
        for part in parts:
            start = time.perf_counter()
            if not report.has_time():
                print(f"{part}: no time left", flush=True)
                continue
            try:
                with device.alone():
                    getattr(measurements, part)(report)
            except Exception:
                # The other parts may still tell something.
                traceback.print_exc()
                report.add("failed", {"part": part, "error": traceback.format_exc(limit=-4)})
            report.lap(f"part_{part}_s", start)


if __name__ == "__main__":
    main()
