"""Run in a process of its own: compiles a model's programs for an H200 and prints what is in them.

Prints one JSON object: for each program its donated, aliased, temporary and new output bytes, and
the launches outside and inside of the loop over layers, by the kind of thunk XLA makes of them, and
how many copies and sorts are among all. Names on the command line choose programs.
"""

import json
import os
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
DUMP = tempfile.TemporaryDirectory()
os.environ["XLA_FLAGS"] = f"--xla_dump_to={DUMP.name} --xla_dump_hlo_as_text"

from tests.h200_compiler import compile_for_h200  # noqa: E402, I001

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

import moelora_kernels.backend as backend  # noqa: E402
from moelora_jax import BucketConfig, CacheConfig, LoraConfig, RuntimeConfig  # noqa: E402
from moelora_jax.buckets import Kind, ProgramKey  # noqa: E402
from moelora_jax.config import Bucket, LatentConfig, ModelConfig, MoeConfig  # noqa: E402
from moelora_jax.engine.runner import Runner  # noqa: E402
from moelora_jax.models import FAMILIES  # noqa: E402
from moelora_jax.workspace import num_bytes  # noqa: E402
from moelora_kernels import ExpertGroups  # noqa: E402
from tests.tiny_llm import tiny_llm  # noqa: E402

MODEL = ModelConfig(
    architecture="Qwen3MoeForCausalLM",
    vocab_size=1024,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    moe=MoeConfig(num_experts=16, top_k=4, hidden_size=512, intermediate_size=128),
    moe_layers=(0, 1, 2),
)
#: The heads of DeepSeek-V3, whose keys are wider than values; a dense layer before the others.
DEEPSEEK = replace(
    MODEL,
    architecture="DeepseekV3ForCausalLM",
    num_layers=4,
    num_kv_heads=8,
    head_dim=192,
    latent=LatentConfig(query_rank=96, key_value_rank=128, rope_dim=64, value_dim=128),
    moe=replace(
        MODEL.moe, scoring="sigmoid", correction_bias=True, groups=ExpertGroups(4, 2, summed=2)
    ),
    moe_layers=(1, 2, 3),
    dense_intermediate_size=512,
    shared_intermediate_size=128,
)
RUNTIME = RuntimeConfig(
    lora=LoraConfig(max_adapters=4, max_rank=32),
    buckets=BucketConfig(decode=(8,), prefill=(64, 256)),
    cache=CacheConfig(max_length=256),
)
PROGRAMS: tuple[tuple[Kind, Bucket, bool], ...] = (
    ("decode", Bucket(8, 8), True),
    ("decode", Bucket(8, 8), False),
    ("prefill", Bucket(64, 8), True),
)
#: Of more rows than one launch of linear maps has.
LONG_PREFILL = ProgramKey("prefill", Bucket(256, 8), True)


def thunks(text: str) -> dict[str, list[str]]:
    """Kinds of thunks at the top of a program, and at the top of the body of its loop."""
    found: dict[str, list[str]] = {"top": [], "body": [], "in_body": []}
    in_body = False
    for line in text.splitlines():
        match = re.match(r"( *)\d+: k(\w+)", line)
        if line.strip() == "body:":
            in_body = True
        if not match:
            continue
        indent, kind = len(match[1]), match[2]
        if indent == 0:
            in_body = False
            found["top"].append(kind)
        elif in_body:
            found["body" if indent == 4 else "in_body"].append(kind)
    return found


def main() -> None:
    backend.default_implementation = lambda: "triton"  # There is no GPU to see.
    family = FAMILIES[MODEL.architecture]
    model = family.module(MODEL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    runner = Runner(model, MODEL, RUNTIME, jnp.bfloat16)
    report = {}
    # The model of the other tests, too: float32, and no dimension divides another.
    tiny = tiny_llm().runner
    programs = [
        (f"{kind} {'lora' if lora else 'base'}", runner, ProgramKey(kind, bucket, lora))
        for kind, bucket, lora in PROGRAMS
    ]
    programs.append(("long prefill lora", runner, LONG_PREFILL))
    programs.append(("tiny lora", tiny, ProgramKey("decode", Bucket(4, 4), True)))
    # Adapters may also change router, embedding and head.
    everywhere = replace(
        RUNTIME, lora=replace(RUNTIME.lora, optional_sites=("router", "embed_tokens", "lm_head"))
    )
    runner = Runner(model, MODEL, everywhere, jnp.bfloat16)
    programs += [
        (f"{kind} everywhere", runner, ProgramKey(kind, bucket, lora))
        for kind, bucket, lora in PROGRAMS
        if lora
    ]
    model = FAMILIES[DEEPSEEK.architecture].module(DEEPSEEK, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    runner = Runner(model, DEEPSEEK, RUNTIME, jnp.bfloat16)
    programs += [
        (f"{kind} deepseek", runner, ProgramKey(kind, bucket, lora))
        for kind, bucket, lora in PROGRAMS
        if lora
    ]
    for name, runner, key in programs:
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        before = set(Path(DUMP.name).iterdir())
        program = compile_for_h200(
            runner._step_function(key), *runner._arguments(key), donate_argnums=0
        )
        (sequence,) = (
            path
            for path in set(Path(DUMP.name).iterdir()) - before
            if path.name.endswith("jit_step.thunk_sequence_after_thunk_passes.txt")
        )
        memory = program.memory_analysis()
        report[name] = {
            "rows": key.bucket.sequences,
            "donated_bytes": num_bytes(runner.state),
            "aliased_bytes": memory.alias_size_in_bytes,
            "new_output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "sorts": len(re.findall(r" (?:sort|topk)\(|Sort|TopK", program.as_text())),
            "copies": len(re.findall(r"\d+: kCopy", sequence.read_text())),
            **thunks(sequence.read_text()),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
