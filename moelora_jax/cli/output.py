"""Where commands print and write."""

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moelora_jax.errors import RequestError


def stdout() -> Console:
    """Where results go. Made anew for each use, because tests replace the stream."""
    return Console(highlight=False)


def stderr() -> Console:
    """Where progress goes."""
    return Console(stderr=True, highlight=False)


def progress_bar(description: str) -> Progress:
    """A progress bar on stderr that counts things."""
    return Progress(
        TextColumn(description),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=stderr(),
    )


def make_table(title: str, *columns: str, numbers: Collection[str] = ()) -> Table:
    """A table for people; the columns named in ``numbers`` are aligned to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def print_memory(
    console: Console, plan: Iterable[tuple[str, int]], title: str, *, budget: int | None = None
) -> None:
    """A table of what device memory is for, without what is not there, and what is left."""
    table = make_table(title, "what", "bytes", "", numbers=("bytes", ""))
    total = 0
    for name, size in plan:
        total += size
        if size:
            words = name.replace("_", " ").replace("kv", "KV")
            table.add_row(words, f"{size:,}", format_bytes(size))
    table.add_section()
    table.add_row("total", f"{total:,}", format_bytes(total))
    if budget is not None:
        left = budget - total
        table.add_row("left", f"{left:,}", format_bytes(left))
    console.print(table)


def check_output(path: Path, *inputs: Path) -> None:
    """Refuse, before any work, a file that cannot be written at the end.

    Args:
        path: the file, which may exist.
        inputs: files that must not be written over.

    Raises:
        RequestError: it is a folder or an input, or its folder is missing or not writable.
    """
    if any(path.resolve() == other.resolve() for other in inputs):
        raise RequestError(f"{path}: is the input; name another file to write")
    folder = path.absolute().parent
    if path.is_dir():
        raise RequestError(f"{path}: is a folder; name a file to write")
    if not folder.is_dir():
        raise RequestError(f"{path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise RequestError(f"{path}: the folder {folder} is not writable")


def format_bytes(count: int) -> str:
    """``1.5 MB``."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
