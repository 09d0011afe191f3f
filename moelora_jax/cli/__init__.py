"""The command ``moelora``.

A command imports what it runs when it runs: JAX takes seconds to import, and help needs none of it.
"""

from importlib.metadata import PackageNotFoundError, version
from inspect import cleandoc
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moelora_jax.cli import (
    bench_serve,
    convert,
    demo,
    generate,
    inspect,
    parity,
    plan,
    score,
    serve,
)
from moelora_jax.errors import MoeLoraError

__all__ = ["app"]


class _Commands(TyperGroup):
    """The commands; an error that the user can mend is one line, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # Of `| head`: click ends in silence.
        except (MoeLoraError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            number = version("moelora-jax")
        except PackageNotFoundError:
            number = "of a checkout that is not installed"
        typer.echo(f"moelora {number}")
        raise typer.Exit


@app.callback()
def _moelora(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Serve many LoRA adapters over one Mixture-of-Experts model.

    Results go to stdout or to the file that you name, progress and errors to stderr. The exit code
    is 0 if all went well.
    """


_FILES = """A model is a folder of transformers: config.json and safetensors. An adapter is a folder
of PEFT: adapter_config.json and adapter_model.safetensors."""


def _examples(commands: str, rows: str = "") -> str:
    """What the help of a command ends with; indented lines without a fence would be joined."""
    shown = f"**Examples**\n\n```\n{cleandoc(commands)}\n```\n"
    if rows:
        shown += f"\nWith rows.jsonl, one object per line:\n\n```\n{cleandoc(rows)}\n```\n"
    return f"{shown}\n{_FILES}\n"


app.command(
    epilog=_examples(
        """
        moelora demo
        moelora demo --folder demo && ls demo
        """
    )
)(demo.demo)
app.command(
    epilog=_examples(
        """
        moelora score --model qwen --adapter fr=french \\
            --input rows.jsonl --output out.safetensors
        """,
        rows="""
        {"tokens": [9707, 11], "adapter": "fr"}
        {"tokens": [9707, 11], "adapter": null}
        """,
    )
)(score.score)
app.command(
    epilog=_examples(
        """
        moelora generate --model qwen --adapter fr=french \\
            --input rows.jsonl --max-new-tokens 32
        moelora generate --model qwen --input rows.jsonl \\
            --temperature 0.7 --output out.jsonl
        """,
        rows="""
        {"text": "Once upon a time", "adapter": "fr"}
        {"tokens": [9707, 11]}
        """,
    )
)(generate.generate)
app.command(
    epilog=_examples(
        """
        moelora inspect french
        moelora inspect french --model qwen
        moelora inspect french --model qwen --json | jq .fits
        """
    )
)(inspect.inspect)
app.command(
    epilog=_examples(
        """
        moelora convert french french-fused --model qwen \\
            --layout peft_fused
        """
    )
)(convert.convert)
app.command(
    epilog=_examples(
        """
        moelora plan --model qwen --gpu-memory 141GB
        moelora plan --model qwen --gpu-memory 80GiB \\
            --max-adapters 16 --max-running 128
        """
    )
)(plan.plan)
app.command(
    epilog=_examples(
        """
        moelora serve --model qwen --adapter fr=french
        curl localhost:8000/v1/completions \\
            -H 'Content-Type: application/json' \\
            -d '{"model": "fr", "prompt": "Il était une fois"}'
        MOELORA_API_KEY=... MOELORA_ADMIN_KEY=... \\
            moelora serve --model qwen --host 0.0.0.0 \\
            --adapter-root adapters
        """
    )
)(serve.serve)
app.command(
    epilog=_examples(
        """
        moelora parity --model qwen --adapter fr=french
        moelora parity --model qwen --adapter fr=french \\
            --dtype bfloat16 --torch-device cuda --json parity.json
        """
    )
)(parity.parity)
app.command(
    name="bench-serve",
    epilog=_examples(
        """
        moelora bench-serve http://127.0.0.1:8000 --rate 8 \\
            --requests 500 --slo-ttft 500 --slo-tpot 50 \\
            --json out.json --plot out.png
        moelora bench-serve --model qwen --adapter fr=french --rate 8
        """
    ),
)(bench_serve.bench_serve)
