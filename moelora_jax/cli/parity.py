"""``moelora parity``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moelora_jax.cli.options import (
    AdaptersOption,
    Dtype,
    LayoutsOption,
    ModelOption,
    parse_adapters,
)
from moelora_jax.cli.output import check_output, stdout
from moelora_jax.files import new_file

_RANDOM = "Random prompts (unless --input is given)"


def parity(
    model: ModelOption,
    adapter: AdaptersOption = None,
    layout: LayoutsOption = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            "--input", metavar="ROWS.jsonl", help="Prompts, as for moelora score; else random ones."
        ),
    ] = None,
    random: Annotated[
        int,
        typer.Option(
            min=1, rich_help_panel=_RANDOM, help="Rows of the base model and of each adapter."
        ),
    ] = 2,
    length: Annotated[
        int, typer.Option(min=1, rich_help_panel=_RANDOM, help="Tokens of the longest row.")
    ] = 32,
    seed: Annotated[int, typer.Option(min=0, rich_help_panel=_RANDOM)] = 0,
    generate: Annotated[
        int, typer.Option(min=0, help="Tokens to generate for each row and to compare, too.")
    ] = 0,
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="Compute dtype here. The reference is PyTorch in float32; what PyTorch itself "
            "gives in bfloat16 is shown beside."
        ),
    ] = Dtype.FLOAT32,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="In float32 of the largest error of a logit, 2e-5 unless given; in bfloat16 of "
            "0.5 * mean((difference of log p)^2) over the prompt tokens, 1e-3 unless given.",
        ),
    ] = None,
    torch_device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Of PyTorch: cpu, cuda, cuda:1, ...")
    ] = "cpu",
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE.json", help="Where to write all numbers, too."),
    ] = None,
) -> None:
    """Compare with PyTorch, layer by layer: all rows as one batch here, each row alone there.

    PyTorch, with transformers and PEFT, runs first and is freed before the model is loaded here. It
    needs memory for the model in float32, on the CPU unless --torch-device says otherwise. The
    exit code is 1 beyond the tolerance, or if a best token differs although PyTorch's is ahead of
    the second best by more than the noise: in float32 twice the tolerance, in bfloat16 the largest
    error of a logit in PyTorch's own bfloat16, at 99 of 100 positions.
    """
    from moelora_jax.cli.loading import read_adapters
    from moelora_jax.cli.parity_run import (
        describe_agreement,
        print_comparison,
        random_prompts,
        run_here,
        run_torch,
    )
    from moelora_jax.cli.rows import read_rows
    from moelora_jax.models import read_model_config
    from moelora_jax.models.tokenizer import read_tokenizer
    from moelora_jax.parity import (
        GreedyTokens,
        compare,
        count_agreement,
        logit_noise,
        require_torch,
    )

    require_torch()
    if json_file is not None:
        check_output(json_file, *([rows] if rows else []))
    folders = parse_adapters(adapter or [], layout or [])
    family, config = read_model_config(model)
    if rows is None:
        prompts = random_prompts(config, list(folders), random, length, seed)
    else:
        prompts = read_rows(rows, config, folders, read_tokenizer(model))
    adapters = read_adapters(folders, config.lora_sites(), family)
    references, rounded, greedy = run_torch(
        model, folders, adapters, prompts, family, config, torch_device, dtype, generate
    )
    traces, completions = run_here(model, adapters, prompts, config, dtype, generate)

    found = compare(traces, references)
    own = compare(rounded, references) if rounded else None
    if tolerance is None:
        tolerance = 2e-5 if own is None else 1e-3
    noise = 2 * tolerance if own is None else logit_noise(rounded, references)
    agreements = {
        "next_tokens": count_agreement(
            [
                (GreedyTokens.of(trace.logits).tokens, GreedyTokens.of(reference.logits))
                for trace, reference in zip(traces, references, strict=True)
            ],
            noise,
            generated=False,
        ),
        "generated": count_agreement(zip(completions, greedy, strict=True), noise, generated=True),
    }
    error = found.total.logits if own is None else found.total.log_probabilities
    same_tokens = not any(agreement.different for agreement in agreements.values())
    passed = error <= tolerance and same_tokens
    if json_file is not None:
        report = {
            "model": str(model),
            "folders": {name: str(folder) for name, (folder, _) in folders.items()},
            "layouts": {name: adapter.layout for name, adapter in adapters.items()},
            "dtype": str(dtype),
            "tolerance": tolerance,
            "passed": passed,
            **asdict(found),
            "torch_in_dtype": None if own is None else asdict(own),
            "noise": noise,
            **{name: asdict(agreement) for name, agreement in agreements.items()},
        }
        with new_file(json_file) as new:
            new.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_comparison(found, own, adapters)
    console = stdout()
    for name, agreement in agreements.items():
        if agreement.decided or (generate and name == "generated"):
            console.print(describe_agreement(name, agreement, noise))
    what = "largest error of a logit" if own is None else "0.5·mean(Δ log p²)"
    verdict = "[bold green]within[/]" if error <= tolerance else "[bold red]beyond[/]"
    console.print(f"{verdict} the tolerance: {what} {error:.2g}, {tolerance:g} is allowed")
    if not passed:
        raise typer.Exit(1)
