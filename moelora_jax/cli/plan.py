"""``moelora plan``."""

import json
from typing import Annotated

import typer

from moelora_jax.cli.options import Dtype, ModelOption
from moelora_jax.cli.output import print_memory, stdout
from moelora_jax.cli.sizes import (
    KvBlocksOption,
    MaxAdaptersOption,
    MaxBatchTokensOption,
    MaxLengthOption,
    MaxRankOption,
    MaxRunningOption,
    MemoryFractionOption,
    OptionalSitesOption,
    PoolRankOption,
    parse_bytes,
)


def plan(
    model: ModelOption,
    gpu_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory of the GPU, such as 141GB or 80GiB.")
    ],
    dtype: Annotated[Dtype, typer.Option(help="Compute dtype.")] = Dtype.BFLOAT16,
    lora: Annotated[bool, typer.Option(help="Whether there is room for adapters.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    max_length: MaxLengthOption = None,
    max_running: MaxRunningOption = 32,
    max_batch_tokens: MaxBatchTokensOption = 1024,
    kv_blocks: KvBlocksOption = None,
    memory_fraction: MemoryFractionOption = 0.9,
    max_adapters: MaxAdaptersOption = None,
    max_rank: MaxRankOption = 64,
    pool_rank: PoolRankOption = 16,
    optional_site: OptionalSitesOption = None,
) -> None:
    """Say what `moelora serve` with the same options would use a GPU's memory for.

    Needs neither a GPU nor weights: of the model, config.json is enough. The exit code is 1 if it
    does not fit.
    """
    from moelora_jax.cli.limits import serving_runtime
    from moelora_jax.engine.memory import fit_cache, plan_memory
    from moelora_jax.models import read_model_config

    budget = int(parse_bytes("--gpu-memory", gpu_memory) * memory_fraction)
    family, config = read_model_config(model)
    runtime = serving_runtime(
        config,
        with_lora=lora,
        max_length=max_length,
        max_running=max_running,
        max_batch_tokens=max_batch_tokens,
        kv_blocks=kv_blocks,
        max_adapters=max_adapters or 8,
        max_rank=max_rank,
        pool_rank=pool_rank,
        optional_sites=optional_site or (),
    )
    runtime = fit_cache(family, config, runtime, dtype.numpy, budget)
    memory = plan_memory(family, config, runtime, dtype.numpy)
    cache = runtime.cache
    blocks = cache.total_blocks(runtime.buckets.max_sequences) - 1
    if as_json:
        report = dict(memory) | {"total": memory.total, "budget": budget, "kv_blocks": blocks}
        typer.echo(json.dumps(report, indent=2))
        return
    print_memory(stdout(), memory, f"Device memory, of {budget:,} bytes", budget=budget)
    positions = blocks * cache.block_size
    typer.echo(
        f"The cache holds {blocks:,} blocks of {cache.block_size}: {positions:,} positions, "
        f"{positions / cache.max_length:.1f} completions of {cache.max_length} tokens; up to "
        f"{runtime.buckets.max_sequences} run at once."
    )
