"""Options that several commands share, and what they mean."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import typer

from moelora_jax.errors import RequestError


class Dtype(StrEnum):
    """A compute dtype."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def numpy(self) -> np.dtype:
        """The dtype itself."""
        return jnp.dtype(self.value)


ModelOption = Annotated[
    Path, typer.Option("--model", metavar="DIR", help="Checkpoint folder of the base model.")
]
AdaptersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=DIR",
        help="An adapter folder, and what rows call it. Repeat for more adapters.",
    ),
]
InputOption = Annotated[
    Path,
    typer.Option(
        "--input",
        metavar="ROWS.jsonl",
        help='One JSON object per line: "tokens" (or "text", if the model has a tokenizer.json), '
        'and "adapter": a name, or null for the base model.',
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype", help="Compute dtype; float32 on a CPU and bfloat16 elsewhere unless given."
    ),
]

_LIMITS = "Limits (derived from the adapters and rows unless given)"

MaxAdaptersOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        rich_help_panel=_LIMITS,
        help="Adapters on the device at once, all by default; the others wait in host memory.",
    ),
]
MaxBatchRowsOption = Annotated[
    int, typer.Option(min=1, rich_help_panel=_LIMITS, help="Rows that run at once.")
]
MaxBatchTokensOption = Annotated[
    int,
    typer.Option(
        min=1, rich_help_panel=_LIMITS, help="Prompt tokens that run at once; longer is cut up."
    ),
]


def parse_adapters(options: Sequence[str]) -> dict[str, Path]:
    """Names and folders from ``NAME=DIR`` options.

    Raises:
        RequestError: an option is not of that form, or a name occurs twice.
    """
    folders: dict[str, Path] = {}
    for option in options:
        name, _, folder = option.partition("=")
        if not name or not folder:
            raise RequestError(f"--adapter {option}: write NAME=DIR")
        if name in folders:
            raise RequestError(f"--adapter {option}: the name {name!r} is taken twice")
        folders[name] = Path(folder)
    return folders
