"""``moelora generate``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moelora_jax.cli.options import (
    AdaptersOption,
    DtypeOption,
    InputOption,
    LayoutsOption,
    MaxAdaptersOption,
    MaxBatchRowsOption,
    MaxBatchTokensOption,
    ModelOption,
)
from moelora_jax.cli.output import check_output, stderr
from moelora_jax.files import new_file

_SAMPLING = "Sampling"


def generate(
    model: ModelOption,
    rows: InputOption,
    adapter: AdaptersOption = None,
    layout: LayoutsOption = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="OUT.jsonl", help="Where to write the rows, instead of stdout."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate for each row, at most.")
    ] = 16,
    dtype: DtypeOption = None,
    temperature: Annotated[
        float,
        typer.Option(rich_help_panel=_SAMPLING, help="0 takes the most probable token."),
    ] = 0.0,
    top_k: Annotated[
        int,
        typer.Option(
            rich_help_panel=_SAMPLING, help="Sample among this many best tokens; 0 means all."
        ),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            rich_help_panel=_SAMPLING,
            help="Sample among the best tokens that together have this probability.",
        ),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            rich_help_panel=_SAMPLING,
            help="Sample among the tokens with at least this share of the best one's probability.",
        ),
    ] = 0.0,
    frequency_penalty: Annotated[
        float,
        typer.Option(
            rich_help_panel=_SAMPLING, help="Against a token, for each time it was generated."
        ),
    ] = 0.0,
    presence_penalty: Annotated[
        float,
        typer.Option(rich_help_panel=_SAMPLING, help="Against a token that was generated at all."),
    ] = 0.0,
    repetition_penalty: Annotated[
        float,
        typer.Option(
            rich_help_panel=_SAMPLING,
            help="Above 1 against tokens of the prompt and generated ones, by a factor.",
        ),
    ] = 1.0,
    min_tokens: Annotated[
        int,
        typer.Option(rich_help_panel=_SAMPLING, help="Tokens to generate for each row, at least."),
    ] = 0,
    seed: Annotated[
        int,
        typer.Option(
            rich_help_panel=_SAMPLING,
            help="The same seed, prompt and adapter give the same tokens in any batch.",
        ),
    ] = 0,
    max_adapters: MaxAdaptersOption = None,
    max_batch_rows: MaxBatchRowsOption = 64,
    max_batch_tokens: MaxBatchTokensOption = 2048,
) -> None:
    """Continue every row, each with its own adapter.

    Writes one JSON object per row, in the order of the input: "adapter", the new "tokens",
    "finish_reason" ("length" or "stop"), and "text" if the model's folder has a tokenizer.json.
    """
    from moelora_jax.cli.loading import prepare
    from moelora_jax.engine.sampling import Sampling

    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        repetition_penalty=repetition_penalty,
        min_tokens=min_tokens,
    )
    if output is not None:
        check_output(output, rows)
    job = prepare(
        ["prefill", "decode"],
        model=model,
        adapters=adapter or [],
        layouts=layout or [],
        rows=rows,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        max_adapters=max_adapters,
        max_batch_rows=max_batch_rows,
        max_batch_tokens=max_batch_tokens,
    )
    with stderr().status("Generating"):
        completions = job.llm.generate(
            job.prompts, max_new_tokens=max_new_tokens, sampling=sampling
        )
    lines = ""
    for completion in completions:
        row = {
            "adapter": completion.adapter,
            "tokens": list(completion.tokens),
            "finish_reason": completion.finish_reason,
        }
        if job.tokenizer is not None:
            row["text"] = job.tokenizer.decode(list(completion.tokens))
        lines += json.dumps(row, ensure_ascii=False) + "\n"
    if output is None:
        typer.echo(lines, nl=False)
    else:
        with new_file(output) as new:
            new.write_text(lines, encoding="utf-8")
    typer.echo(f"Continued {job.summary}", err=True)
