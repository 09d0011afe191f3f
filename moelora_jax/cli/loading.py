"""From the options of a command to a model that is ready to run its rows."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import typer
from tokenizers import Tokenizer

from moelora_jax.adapters.adapter import Adapter
from moelora_jax.adapters.reader import read_adapter
from moelora_jax.buckets import Kind, program_keys, use_compilation_cache
from moelora_jax.cli.limits import changed_optional_sites, derive_runtime, serving_runtime
from moelora_jax.cli.options import AdapterFolder, Dtype, layout_errors_name, parse_adapters
from moelora_jax.cli.output import print_memory, progress_bar, stderr
from moelora_jax.cli.rows import read_rows
from moelora_jax.config import LoraSite
from moelora_jax.engine.llm import LLM, Prompt, default_dtype
from moelora_jax.engine.memory import fit_cache
from moelora_jax.errors import CapacityError
from moelora_jax.models import ModelFamily, read_model_config
from moelora_jax.models.tokenizer import read_tokenizer


@dataclass(frozen=True, eq=False)
class Job:
    """A model with its adapters and compiled programs, and what to run on it."""

    llm: LLM
    prompts: list[Prompt]
    tokenizer: Tokenizer | None

    @property
    def summary(self) -> str:
        """How much there is to run."""
        counts = {
            "row": len(self.prompts),
            "token": sum(len(prompt.tokens) for prompt in self.prompts),
            "adapter": len({prompt.adapter for prompt in self.prompts} - {None}),
        }
        return ", ".join(f"{n} {what}" if n == 1 else f"{n} {what}s" for what, n in counts.items())


def prepare(
    kinds: Sequence[Kind],
    *,
    model: Path,
    adapters: Sequence[str],
    layouts: Sequence[str],
    rows: Path,
    dtype: Dtype | None,
    max_new_tokens: int = 0,
    max_adapters: int | None,
    max_batch_rows: int,
    max_batch_tokens: int,
) -> Job:
    """Read and check everything, the cheapest first, then load the model and compile.

    Raises:
        MoeLoraError: anything is wrong with the files; nothing was run.
    """
    folders = parse_adapters(adapters, layouts)
    family, config = read_model_config(model)
    tokenizer = read_tokenizer(model)
    prompts = read_rows(rows, config, folders, tokenizer, max_new_tokens=max_new_tokens)

    loaded = read_adapters(folders, config.lora_sites(), family)
    runtime = derive_runtime(
        config,
        loaded.values(),
        prompts,
        max_new_tokens=max_new_tokens,
        max_adapters=max_adapters,
        max_batch_rows=max_batch_rows,
        max_batch_tokens=max_batch_tokens,
    )
    use_compilation_cache()
    llm = LLM.load(
        model, runtime=runtime, dtype=None if dtype is None else dtype.numpy, progress=True
    )
    for name in list(loaded):
        llm.load_adapter(name, loaded.pop(name))
    needs_lora = any(prompt.adapter is not None for prompt in prompts)
    keys = [key for key in program_keys(runtime.buckets, kinds) if key.lora == needs_lora]
    llm.runner.programs.compile(keys, progress=True)
    return Job(llm, prompts, tokenizer)


def read_adapters(
    folders: Mapping[str, AdapterFolder], sites: Sequence[LoraSite], family: ModelFamily
) -> dict[str, Adapter]:
    """Read and check adapter folders, with a progress bar."""
    adapters: dict[str, Adapter] = {}
    if not folders:
        return adapters
    with progress_bar("Reading adapters") as bar:
        for name, (folder, layout) in bar.track(folders.items()):
            with layout_errors_name(f"--layout {name}=LAYOUT"):
                adapters[name] = read_adapter(
                    folder, sites, module_names=family.module_names, layout=layout
                )
    return adapters


def load_for_serving(
    model: Path,
    folders: Mapping[str, AdapterFolder],
    *,
    with_lora: bool,
    dtype: Dtype | None,
    memory_fraction: float,
    max_length: int | None,
    max_running: int,
    max_batch_tokens: int,
    kv_blocks: int | None,
    max_adapters: int | None,
    max_rank: int,
    pool_rank: int,
    optional_sites: Sequence[str] = (),
    max_host_bytes: int | None = None,
) -> LLM:
    """A model with its adapters and compiled programs, of the sizes that the options ask for.

    Raises:
        MoeLoraError: anything is wrong with the files, or they do not fit.
    """
    family, config = read_model_config(model)
    loaded = read_adapters(folders, config.lora_sites(), family)
    for name, adapter in loaded.items():
        if adapter.max_rank > max_rank:
            raise CapacityError(
                f"--adapter {name}: rank {adapter.max_rank} is above --max-rank {max_rank}"
            )
    # JAX reads this when it first uses a GPU; what the user has set stays.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(memory_fraction))
    runtime = serving_runtime(
        config,
        with_lora=with_lora,
        max_length=max_length,
        max_running=max_running,
        max_batch_tokens=max_batch_tokens,
        kv_blocks=kv_blocks,
        max_adapters=max_adapters or max(8, len(folders)),
        max_rank=max_rank,
        pool_rank=pool_rank,
        optional_sites=[*optional_sites, *changed_optional_sites(config, loaded.values())],
        max_host_bytes=max_host_bytes,
    )
    compute_dtype = default_dtype() if dtype is None else dtype.numpy
    budget = _device_memory()
    if budget is not None:
        runtime = fit_cache(family, config, runtime, compute_dtype, budget)
    use_compilation_cache()
    llm = LLM.load(model, runtime=runtime, dtype=compute_dtype, progress=True)
    for name in list(loaded):
        llm.load_adapter(name, loaded.pop(name))
    typer.echo(f"Ready: {llm.warm_up(progress=True)}", err=True)
    print_memory(stderr(), llm.memory_plan(), "Device memory")
    return llm


def _device_memory() -> int | None:
    """Bytes that JAX may use on the device; None on a CPU, where there is no limit."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
