"""The memory plan: before anything is there, and what is there then."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from moelora_jax import BucketConfig, CacheConfig, CapacityError, LoraConfig, RuntimeConfig
from moelora_jax.cli import app
from moelora_jax.cli.demo_files import MODEL_CONFIG
from moelora_jax.engine.memory import fit_cache, plan_memory
from moelora_jax.models import FAMILIES
from moelora_jax.workspace import num_bytes
from tests.adapter_files import tiny_model_config
from tests.tiny_llm import TINY_RUNTIME, tiny_llm

CONFIG = tiny_model_config()
FAMILY = FAMILIES[CONFIG.architecture]
RUNTIMES = {
    "tiny": TINY_RUNTIME,
    "all sites": RuntimeConfig(
        lora=LoraConfig(
            max_adapters=3,
            max_rank=40,
            pool_rank=20,
            optional_sites=("router", "embed_tokens", "lm_head"),
        ),
        buckets=BucketConfig(decode=(1, 4), prefill=(8, 64)),
        cache=CacheConfig(max_length=100, block_size=8, num_blocks=77),
    ),
    "base only": RuntimeConfig(lora=LoraConfig(sites=())),
}


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
def test_the_plan_is_what_is_allocated(runtime: RuntimeConfig) -> None:
    planned = dict(plan_memory(FAMILY, CONFIG, runtime, jnp.float32))
    before = {id(array) for array in jax.live_arrays()}
    llm = tiny_llm(runtime)
    there = [array for array in jax.live_arrays() if id(array) not in before]
    actual = dict(llm.memory_plan())
    assert planned.pop("temporaries") > 0
    assert actual.pop("temporaries") == 0  # Nothing is compiled yet.
    assert actual == planned
    # What else lives is small: keys of random numbers.
    extra = num_bytes(there) - sum(planned.values())
    assert 0 <= extra <= 0.02 * sum(planned.values())


def test_temporaries_are_those_of_the_largest_program() -> None:
    llm = tiny_llm()
    llm.warm_up()
    programs = llm.runner.programs._compiled.values()
    sizes = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert llm.memory_plan().temporaries == max(sizes) > 0


def test_the_cache_gets_what_is_left() -> None:
    runtime = RUNTIMES["tiny"]
    full = runtime.cache.total_blocks(4)
    plan = plan_memory(FAMILY, CONFIG, runtime, jnp.float32)
    block = plan.kv_cache // full

    def blocks(usable: int) -> int:
        budget = -(-usable * 100 // 97)  # 3 % are left to compilation.
        cache = fit_cache(FAMILY, CONFIG, runtime, jnp.float32, budget).cache
        assert cache.num_blocks is not None
        return cache.num_blocks

    assert blocks(plan.total) == blocks(10 * plan.total) == full
    assert blocks(plan.total - 1) == full - 1
    assert blocks(plan.total - 3 * block) == full - 3
    least = runtime.cache.blocks_per_sequence + 1
    assert blocks(plan.total - (full - least) * block) == least
    with pytest.raises(CapacityError, match="device memory are too few") as error:
        blocks(plan.total - (full - least) * block - 1)
    message = str(error.value)
    needed = -(-(plan.total - (full - least) * block) * 100 // 97)
    assert f"{needed:,} are the least: weights" in message
    assert f"max_length {runtime.cache.max_length} {least * block:,}, and 3 % for" in message
    assert blocks(needed * 97 // 100) == least


def test_plan_prints_it_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL_CONFIG))
    options = ["plan", "--model", str(tmp_path), "--gpu-memory", "100MB", "--max-length", "512"]
    done = CliRunner().invoke(app, [*options, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert report["budget"] == 90_000_000
    assert report["kv_blocks"] == 32 * 512 // 16
    total = report.pop("total")
    assert total == sum(report.values()) - report["budget"] - report["kv_blocks"]
    done = CliRunner().invoke(app, options)
    assert f"{total:,}" in done.output and "1,024 blocks" in done.output
    small = CliRunner().invoke(app, [*options, "--memory-fraction", "0.02"])
    assert small.exit_code == 1 and "2,000,000 bytes of device memory are too few" in small.output
    small_letters = CliRunner().invoke(app, [*options, "--gpu-memory", "100mb", "--json"])
    assert json.loads(small_letters.output)["budget"] == 90_000_000
    wrong = CliRunner().invoke(app, ["plan", "--model", str(tmp_path), "--gpu-memory", "lots"])
    assert wrong.exit_code == 1 and "--gpu-memory lots" in wrong.output


def test_a_cache_that_is_cut_to_the_memory_serves_what_fits() -> None:
    plan = plan_memory(FAMILY, CONFIG, TINY_RUNTIME, jnp.float32)
    budget = (plan.total - plan.kv_cache // 2) * 100 // 97
    runtime = fit_cache(FAMILY, CONFIG, TINY_RUNTIME, jnp.float32, budget)
    llm = tiny_llm(runtime)
    assert llm.memory_plan().kv_cache <= plan.kv_cache // 2
