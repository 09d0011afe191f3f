"""Options that several commands share, and what they mean."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NamedTuple

import ml_dtypes  # noqa: F401  (makes NumPy know bfloat16 by its name)
import numpy as np
import typer

from moelora_jax.adapters.layouts import EXPERT_LAYOUTS
from moelora_jax.errors import LayoutError, RequestError


class Dtype(StrEnum):
    """A compute dtype."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def numpy(self) -> np.dtype:
        """The dtype itself."""
        return np.dtype(self.value)


ModelOption = Annotated[
    Path, typer.Option("--model", metavar="DIR", help="Checkpoint folder of the base model.")
]
AdaptersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=DIR",
        help="An adapter folder, and what rows or requests call it. Repeat for more adapters.",
    ),
]
LayoutsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--layout",
        metavar="NAME=LAYOUT",
        help="How the experts of an adapter are laid out, where reading it asks for that: "
        f"{', '.join(EXPERT_LAYOUTS)}. Repeat for more adapters.",
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


class AdapterFolder(NamedTuple):
    """An adapter to read, and the layout of its experts if the user has said it."""

    folder: Path
    layout: str | None


def parse_adapters(adapters: Sequence[str], layouts: Sequence[str]) -> dict[str, AdapterFolder]:
    """Adapters by name, from ``--adapter NAME=DIR`` and ``--layout NAME=LAYOUT`` options.

    Raises:
        RequestError: an option is not of that form, a name occurs twice, or a layout is unknown or
            of no adapter.
    """
    folder_of = _parse_pairs("--adapter", "NAME=DIR", adapters)
    layout_of = _parse_pairs("--layout", "NAME=LAYOUT", layouts)
    for name, layout in layout_of.items():
        if name not in folder_of:
            given = ", ".join(folder_of) or "none"
            raise RequestError(
                f"--layout {name}={layout}: no --adapter has that name; given: {given}"
            )
        if layout not in EXPERT_LAYOUTS:
            known = ", ".join(EXPERT_LAYOUTS)
            raise RequestError(f"--layout {name}={layout}: unknown; known are {known}")
    return {
        name: AdapterFolder(Path(folder), layout_of.get(name)) for name, folder in folder_of.items()
    }


def _parse_pairs(flag: str, form: str, options: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for option in options:
        name, _, value = option.partition("=")
        if not name or not value:
            raise RequestError(f"{flag} {option}: write {form}")
        if name in pairs:
            raise RequestError(f"{flag} {option}: the name {name!r} is taken twice")
        pairs[name] = value
    return pairs


@contextmanager
def layout_errors_name(flag: str) -> Iterator[None]:
    """Errors about an adapter's layout end with the flag that sets it."""
    try:
        yield
    except LayoutError as error:
        raise LayoutError(f"{error}; the option is {flag}") from error
