"""``moelora score``."""

from pathlib import Path
from typing import Annotated

import typer
from safetensors.numpy import save_file

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


def score(
    model: ModelOption,
    rows: InputOption,
    output: Annotated[
        Path,
        typer.Option(
            metavar="OUT.safetensors",
            help="Tensor logits.{i}, float32 [tokens, vocabulary], for row i, counted from 0.",
        ),
    ],
    adapter: AdaptersOption = None,
    layout: LayoutsOption = None,
    dtype: DtypeOption = None,
    max_adapters: MaxAdaptersOption = None,
    max_batch_rows: MaxBatchRowsOption = 256,
    max_batch_tokens: MaxBatchTokensOption = 4096,
) -> None:
    """Compute the logits of every position of every row, each row with its own adapter.

    All rows run as one mixed batch, or as few as the limits below allow.
    """
    from moelora_jax.cli.loading import prepare

    check_output(output, rows)
    job = prepare(
        ["score"],
        model=model,
        adapters=adapter or [],
        layouts=layout or [],
        rows=rows,
        dtype=dtype,
        max_adapters=max_adapters,
        max_batch_rows=max_batch_rows,
        max_batch_tokens=max_batch_tokens,
    )
    with stderr().status("Scoring"):
        logits = job.llm.score(job.prompts)
    with new_file(output) as new:
        save_file({f"logits.{i}": row for i, row in enumerate(logits)}, new)
    typer.echo(f"Scored {job.summary}: {output}", err=True)
