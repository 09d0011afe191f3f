"""``moelora demo``."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

#: Rows of the largest mixed batch. All of them fit into one bucket.
MAX_ROWS = 256


def demo(
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep the files here; otherwise they go when the demo ends."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=2, max=MAX_ROWS, help="Rows of the mixed batch.")] = 10,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=512, help="Tokens to generate for each row.")
    ] = 16,
    batches: Annotated[
        int, typer.Option(min=1, help="Random batches that the static shapes are measured over.")
    ] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is random.")] = 0,
) -> None:
    """Write a tiny random Qwen3-MoE and four adapters, serve them, and prove that it is static.

    The adapters have several ranks and both file layouts, and change attention, experts or both.
    The exit code is 1 if a proof fails.
    """
    from moelora_jax.cli.demo_run import print_next, run_demo

    if folder is None:
        with tempfile.TemporaryDirectory(prefix="moelora-demo-") as temporary:
            passed = run_demo(Path(temporary), rows, max_new_tokens, batches, seed)
    else:
        passed = run_demo(folder, rows, max_new_tokens, batches, seed)
        print_next(folder)
    if not passed:
        raise typer.Exit(1)
