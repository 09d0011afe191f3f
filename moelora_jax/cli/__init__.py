"""The command ``moelora``."""

from importlib.metadata import version
from typing import Annotated

import typer
from typer.core import TyperGroup

from moelora_jax.cli.demo import demo
from moelora_jax.cli.generate import generate
from moelora_jax.cli.inspect import inspect
from moelora_jax.cli.score import score
from moelora_jax.errors import MoeLoraError

__all__ = ["app"]


class _Commands(TyperGroup):
    """The commands; an error that the user can mend is one line, not a traceback."""

    def invoke(self, ctx: typer.Context) -> object:
        try:
            return super().invoke(ctx)
        except (MoeLoraError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moelora {version('moelora-jax')}")
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

app.command(
    epilog="""[bold]Examples[/bold]

    moelora demo

    moelora demo --folder demo && ls demo
    """
)(demo)
app.command(
    epilog=f"""[bold]Example[/bold]

    moelora score --model qwen --adapter fr=adapters/french --input rows.jsonl --output out.safetensors

    with rows.jsonl, one object per line:

    {{"tokens": [9707, 11], "adapter": "fr"}}

    {{"tokens": [9707, 11], "adapter": null}}

    {_FILES}
    """
)(score)
app.command(
    epilog=f"""[bold]Examples[/bold]

    moelora generate --model qwen --adapter fr=adapters/french --input rows.jsonl --max-new-tokens 32

    moelora generate --model qwen --input rows.jsonl --temperature 0.7 --top-p 0.9 --output out.jsonl

    with rows.jsonl, one object per line:

    {{"text": "Once upon a time", "adapter": "fr"}}

    {{"tokens": [9707, 11]}}

    {_FILES}
    """
)(generate)
app.command(
    epilog="""[bold]Examples[/bold]

    moelora inspect adapters/french

    moelora inspect adapters/french --model qwen

    moelora inspect adapters/french --model qwen --json | jq .fits
    """
)(inspect)
