"""The demo: the whole path on files of its own, and proofs that shapes are static."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import typer

from moelora_jax.adapters.adapter import Adapter
from moelora_jax.adapters.reader import read_adapter
from moelora_jax.buckets import CompilationCounter, choose_bucket, use_compilation_cache
from moelora_jax.cli.demo import MAX_ROWS
from moelora_jax.cli.demo_files import (
    ADAPTERS,
    MAX_PROMPT,
    MODEL_CONFIG,
    random_tokens,
    write_demo,
)
from moelora_jax.cli.limits import derive_runtime
from moelora_jax.cli.output import make_table, print_memory, progress_bar, stdout
from moelora_jax.cli.rows import read_rows
from moelora_jax.engine.llm import LLM, Completion, Prompt
from moelora_jax.engine.sampling import Sampling
from moelora_jax.models import family_of


def run_demo(folder: Path, rows: int, max_new_tokens: int, batches: int, seed: int) -> bool:
    """The demo; returns whether all proofs hold."""
    write_demo(folder, rows=rows, seed=seed)
    family = family_of(MODEL_CONFIG)
    config = family.read_config(MODEL_CONFIG)
    prompts = read_rows(folder / "rows.jsonl", config, ADAPTERS, None)
    adapters = {
        name: read_adapter(
            folder / "adapters" / name, config.lora_sites(), module_names=family.module_names
        )
        for name in ADAPTERS
    }
    runtime = derive_runtime(
        config,
        adapters.values(),
        prompts,
        max_new_tokens=max_new_tokens,
        max_batch_rows=MAX_ROWS,
        max_batch_tokens=MAX_ROWS * MAX_PROMPT,
    )
    use_compilation_cache()
    llm = LLM.load(folder / "model", runtime=runtime, progress=True)
    for name, adapter in adapters.items():
        llm.load_adapter(name, adapter)

    start = time.perf_counter()
    llm.warm_up(("prefill", "decode", "score"), progress=True)
    warm_up_seconds = time.perf_counter() - start

    with CompilationCounter() as compilations:
        before = llm.runner.addresses()
        start = time.perf_counter()
        completions = llm.generate(prompts, max_new_tokens=max_new_tokens)
        seconds = time.perf_counter() - start
        logits = llm.score(prompts)
        with progress_bar("Random batches") as bar:
            for batch in bar.track(range(batches)):
                _run_random_batch(llm, adapters, prompts, np.random.default_rng([seed, batch]))
        proofs = [
            *_prove_static(compilations, before, llm, batches),
            *_prove_equal(llm, prompts, completions, logits, max_new_tokens),
        ]

    device = jax.devices()[0]
    typer.echo(
        f"Qwen3-MoE, random weights, on {device.device_kind}; {len(llm.runner.programs)} programs "
        f"compiled in {warm_up_seconds:.1f} s\n"
    )
    _print_completions(llm, prompts, completions)
    count = sum(len(completion.tokens) for completion in completions)
    typer.echo(
        f"{count} tokens in {seconds * 1000:.0f} ms: {count / seconds:,.0f} tokens/s, "
        "prompts included\n"
    )
    print_memory(stdout(), llm.memory_plan(), "Device memory")
    _print_proofs(proofs)
    return all(proof.holds for proof in proofs)


def _run_random_batch(
    llm: LLM, adapters: Mapping[str, Adapter], prompts: list[Prompt], rng: np.random.Generator
) -> None:
    """Reload an adapter, then run random rows, lengths, adapters and sampling."""
    names = [None, *adapters]
    name = str(rng.choice(list(adapters)))
    llm.load_adapter(name, adapters[name])
    longest = max(len(prompt.tokens) for prompt in prompts)
    batch = [
        Prompt(random_tokens(llm.config, rng, longest), names[rng.integers(len(names))])
        for _ in range(rng.integers(1, len(prompts), endpoint=True))
    ]
    if rng.integers(2):
        llm.score(batch)
    else:
        sampling = Sampling(temperature=float(rng.choice([0.0, 0.8])), seed=int(rng.integers(100)))
        new = llm.runtime.cache.max_length - longest
        count = int(rng.integers(1, min(4, new), endpoint=True))
        llm.generate(batch, max_new_tokens=count, sampling=sampling)


# The proofs.


@dataclass(frozen=True)
class _Proof:
    """A claim, what was measured, and whether it bears the claim out."""

    claim: str
    measured: str
    holds: bool


def _prove_static(
    compilations: CompilationCounter,
    before: dict[str, tuple[int, ...]],
    llm: LLM,
    batches: int,
) -> Iterator[_Proof]:
    """That nothing was compiled and nothing has moved since the warm-up."""
    count = compilations.count
    yield _Proof(
        f"Nothing is compiled after warm-up: mixed batch, {batches} random batches, "
        f"{batches} adapter reloads",
        f"{count} compilations",
        count == 0,
    )
    after = llm.runner.addresses()
    for name, old in before.items():
        unmoved = sum(a == b for a, b in zip(old, after[name], strict=True))
        yield _Proof(
            f"Addresses of {_words(name)} stay the same",
            f"{unmoved} of {len(old)} arrays",
            unmoved == len(old),
        )


def _prove_equal(
    llm: LLM,
    prompts: list[Prompt],
    completions: list[Completion],
    logits: list[np.ndarray],
    max_new_tokens: int,
) -> Iterator[_Proof]:
    """That rows do not see each other's adapters, nor what ran before."""
    again = llm.score(prompts)
    yield _Proof(
        "Logits of the mixed batch are the same before and after the random batches",
        *_compare_bits(logits, again),
    )
    same_tokens = llm.generate(prompts, max_new_tokens=max_new_tokens) == completions
    yield _Proof(
        "So are its generated tokens",
        "equal" if same_tokens else "different",
        same_tokens,
    )
    # Without any adapter in the batch, the base-only program of the same bucket runs.
    base = llm.score([Prompt(prompt.tokens) for prompt in prompts])
    is_base = [prompt.adapter is None for prompt in prompts]
    yield _Proof(
        f"Logits of the {sum(is_base)} base rows are the same in the mixed batch and in the "
        f"base-only program of the same bucket ({_bucket(llm, prompts)})",
        *_compare_bits(
            [row for row, base_row in zip(again, is_base, strict=True) if base_row],
            [row for row, base_row in zip(base, is_base, strict=True) if base_row],
        ),
    )
    changed = sum(
        not np.array_equal(a, b)
        for a, b, base_row in zip(again, base, is_base, strict=True)
        if not base_row
    )
    adapted = len(is_base) - sum(is_base)
    yield _Proof(
        "Logits of rows with an adapter are not those of the base model",
        f"{changed} of {adapted} rows differ",
        changed == adapted,
    )


def _compare_bits(left: list[np.ndarray], right: list[np.ndarray]) -> tuple[str, bool]:
    """How many numbers of two lists of float32 arrays differ in any bit, in words."""
    pairs = [(a.view(np.uint32), b.view(np.uint32)) for a, b in zip(left, right, strict=True)]
    different = sum(int(np.count_nonzero(a != b)) for a, b in pairs)
    total = sum(a.size for a, _ in pairs)
    return f"{different:,} of {total:,} numbers differ", different == 0


def _bucket(llm: LLM, prompts: list[Prompt]) -> str:
    tokens = sum(len(prompt.tokens) for prompt in prompts)
    buckets = llm.runtime.buckets.prefill_buckets()
    return f"{choose_bucket(buckets, tokens, len(prompts)).tokens} tokens"


# The report.


def _print_completions(llm: LLM, prompts: list[Prompt], completions: list[Completion]) -> None:
    infos = {info.name: info for info in llm.adapters()}
    columns = "adapter", "layout", "rank", "prompt", "generated tokens"
    table = make_table("One mixed batch, greedy", *columns, numbers=("rank", "prompt"))
    for prompt, completion in zip(prompts, completions, strict=True):
        info = infos.get(prompt.adapter or "")
        table.add_row(
            "[dim]base[/]" if info is None else info.name,
            "" if info is None else info.layout,
            "" if info is None else str(info.rank),
            str(len(prompt.tokens)),
            " ".join(map(str, completion.tokens)),
        )
    stdout().print(table)


def _words(name: str) -> str:
    """``KV cache`` for ``kv_cache``."""
    return name.replace("_", " ").replace("kv", "KV")


def _print_proofs(proofs: list[_Proof]) -> None:
    table = make_table("Measured", "claim", "measured", "holds")
    for proof in proofs:
        verdict = "[green]yes[/]" if proof.holds else "[bold red]NO[/]"
        table.add_row(proof.claim, proof.measured, verdict)
    stdout().print(table)


def print_next(folder: Path) -> None:
    """What to try with the files."""
    adapters = " ".join(f"--adapter {name}={folder}/adapters/{name}" for name in ADAPTERS)
    typer.echo(
        f"The files are in {folder}. Try:\n"
        f"  moelora generate --model {folder}/model {adapters} --input {folder}/rows.jsonl\n"
        f"  moelora inspect {folder}/adapters/both-r16 --model {folder}/model"
    )
