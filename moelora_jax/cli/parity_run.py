"""Both sides of ``moelora parity``, and what it prints of them."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moelora_jax.adapters.adapter import Adapter
from moelora_jax.adapters.layouts import LINEAR, PEFT_FUSED
from moelora_jax.adapters.writer import save_adapter
from moelora_jax.buckets import use_compilation_cache
from moelora_jax.cli.limits import derive_runtime
from moelora_jax.cli.options import AdapterFolder, Dtype
from moelora_jax.cli.output import make_table, stderr, stdout
from moelora_jax.config import ModelConfig
from moelora_jax.engine.llm import LLM, Prompt
from moelora_jax.engine.trace import Trace
from moelora_jax.models import ModelFamily
from moelora_jax.parity import (
    AdapterErrors,
    Agreement,
    Comparison,
    GreedyTokens,
    greedy_torch,
    run_torch_rows,
    trace_torch,
)

#: Layouts that PEFT loads as they are. It passes over tensors of others, or reads some of them.
_READ_BY_PEFT = {LINEAR.name, PEFT_FUSED.name}


def random_prompts(
    config: ModelConfig, adapters: Sequence[str], rows: int, longest: int, seed: int
) -> list[Prompt]:
    """Rows that take turns: the base model, then each adapter."""
    rng = np.random.default_rng(seed)
    longest = min(longest, config.max_position)
    return [
        Prompt(rng.integers(config.vocab_size, size=rng.integers(longest // 2, longest) + 1), name)
        for _ in range(rows)
        for name in (None, *adapters)
    ]


def run_torch(
    model: Path,
    folders: Mapping[str, AdapterFolder],
    adapters: Mapping[str, Adapter],
    prompts: Sequence[Prompt],
    family: ModelFamily,
    config: ModelConfig,
    device: str,
    dtype: Dtype,
    new_tokens: int,
) -> tuple[list[Trace], list[Trace], list[GreedyTokens]]:
    """Every prompt alone: in float32, in the dtype if that is another, and new tokens in float32.

    Adapters that PEFT cannot load are converted for it.
    """
    with tempfile.TemporaryDirectory(prefix="moelora-parity-") as temporary:
        readable: dict[str, Path] = {}
        for number, (name, (folder, _)) in enumerate(folders.items()):
            readable[name] = folder
            if not _is_read_by_peft(adapters[name]):
                readable[name] = Path(temporary, str(number))
                save_adapter(
                    readable[name],
                    adapters[name],
                    config.lora_sites(),
                    layout="peft_fused",
                    module_names=family.module_names,
                )

        def run(
            torch_model: Any, tokens: Sequence[int] | np.ndarray, adapter: str | None
        ) -> tuple[Trace, GreedyTokens]:
            trace = trace_torch(torch_model, tokens, adapter)
            greedy = GreedyTokens((), ())
            return trace, greedy_torch(torch_model, tokens, new_tokens) if new_tokens else greedy

        with stderr().status("PyTorch in float32, each row alone"):
            rows = run_torch_rows(model, readable, prompts, run, device=device)
        rounded: list[Trace] = []
        if dtype is not Dtype.FLOAT32:
            with stderr().status(f"PyTorch in {dtype}, each row alone"):
                rounded = run_torch_rows(
                    model, readable, prompts, trace_torch, device=device, dtype=str(dtype)
                )
        return [trace for trace, _ in rows], rounded, [greedy for _, greedy in rows]


def _is_read_by_peft(adapter: Adapter) -> bool:
    return set(adapter.layout.split("+")) <= _READ_BY_PEFT


def run_here(
    model: Path,
    adapters: Mapping[str, Adapter],
    prompts: Sequence[Prompt],
    config: ModelConfig,
    dtype: Dtype,
    new_tokens: int,
) -> tuple[list[Trace], list[tuple[int, ...]]]:
    """All prompts as one batch, and the tokens that follow each of them."""
    runtime = derive_runtime(
        config,
        adapters.values(),
        prompts,
        max_new_tokens=new_tokens,
        max_batch_rows=_power_of_two(len(prompts)),
        max_batch_tokens=_power_of_two(sum(len(prompt.tokens) for prompt in prompts)),
    )
    use_compilation_cache()
    llm = LLM.load(model, runtime=runtime, dtype=dtype.numpy, progress=True)
    for name, adapter in adapters.items():
        llm.load_adapter(name, adapter)
    with stderr().status("All rows in one batch"):
        # The logits are those of the program that serves.
        traces = [
            replace(trace, logits=logits)
            for trace, logits in zip(llm.trace(prompts), llm.score(prompts), strict=True)
        ]
        if not new_tokens:
            return traces, [()] * len(prompts)
        completions = llm.generate(prompts, max_new_tokens=new_tokens, stop_tokens=())
        return traces, [completion.tokens for completion in completions]


# The report.


def print_comparison(
    found: Comparison, own: Comparison | None, adapters: Mapping[str, Adapter]
) -> None:
    """Tables of the errors: of the MoE layers, and of what comes out."""
    columns = ["layer", "MoE input", "router logits", "same experts", "weights", "MoE output"]
    if own is not None:
        columns.append("PyTorch's experts")
    table = make_table("MoE layers: largest errors", *columns, numbers=columns)
    for index, layer in enumerate(found.layers):
        table.add_row(
            str(layer.layer),
            _error(layer.moe_input),
            _error(layer.router_logits),
            f"{layer.equal_choices:.2%}",
            _error(layer.weights),
            _error(layer.moe_output),
            *([] if own is None else [f"{own.layers[index].equal_choices:.2%}"]),
        )
    console = stdout()
    console.print(table)
    console.print("[dim]relative to the largest number of the layer; weights absolute[/]\n")

    numbers = ["tokens", "hidden", "logits", "log p"]
    if own is not None:
        numbers.append("PyTorch's log p")
    words = "adapter", "layout", "in PyTorch"
    table = make_table("What comes out: largest errors", *words, *numbers, numbers=numbers)

    def add(words: tuple[str, str, str], ours: AdapterErrors, theirs: AdapterErrors | None) -> None:
        values = [ours.hidden, ours.logits, ours.log_probabilities]
        values += [] if theirs is None else [theirs.log_probabilities]
        table.add_row(*words, str(ours.tokens), *map(_error, values))

    for index, errors in enumerate(found.adapters):
        adapter = None if errors.adapter is None else adapters[errors.adapter]
        theirs = None if own is None else own.adapters[index]
        add(_describe(errors.adapter, adapter), errors, theirs)
    table.add_section()
    add(("all", "", ""), found.total, None if own is None else own.total)
    console.print(table)
    console.print(
        "[dim]hidden relative to the largest number; logits absolute, up to "
        f"{found.total.largest_logit:.3g}; log p is 0.5·mean(Δ log p²)"
        + ("" if own is None else "; PyTorch's: its own bfloat16, beside its float32")
        + "[/]\n"
    )


def describe_agreement(name: str, agreement: Agreement, noise: float) -> str:
    """How many tokens are decided, and whether they are the same, in words."""
    what = "best next tokens in prompts" if name == "next_tokens" else "generated tokens"
    different = "all equal" if not agreement.different else f"{agreement.different} DIFFER"
    return f"{what}: {agreement.decided} are decided by more than {noise:.2g}, {different}"


def _describe(name: str | None, adapter: Adapter | None) -> tuple[str, str, str]:
    """The adapter, its layout, and whether PEFT has read its own files."""
    if name is None or adapter is None:
        return "[dim]base[/]", "", ""
    return name, adapter.layout, "as it is" if _is_read_by_peft(adapter) else "converted"


def _error(value: float) -> str:
    return f"{value:.1e}"


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
