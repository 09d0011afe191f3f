"""The sizes of a server: options that ``serve``, ``plan`` and ``bench-serve`` share."""

import contextlib
import os
import re
from pathlib import Path
from typing import Annotated

import typer

from moelora_jax.errors import RequestError

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": 2**30}
_SIZES = "Sizes (they decide the device memory that is used)"

MaxLengthOption = Annotated[
    int | None,
    typer.Option(
        min=2,
        rich_help_panel=_SIZES,
        help="Tokens of a prompt and its completion; those that the model was made for, but at "
        "most 4096, unless given.",
    ),
]
MaxRunningOption = Annotated[
    int, typer.Option(min=1, rich_help_panel=_SIZES, help="Completions that run at once.")
]
MaxBatchTokensOption = Annotated[
    int,
    typer.Option(
        min=1, rich_help_panel=_SIZES, help="Prompt tokens that run at once; longer is cut up."
    ),
]
KvBlocksOption = Annotated[
    int | None,
    typer.Option(
        min=2,
        rich_help_panel=_SIZES,
        help="Blocks of 16 positions in the cache, at most; what the memory has room for, and "
        "--max-running completions of --max-length need, unless given.",
    ),
]
MemoryFractionOption = Annotated[
    float,
    typer.Option(
        min=0.01, max=1.0, rich_help_panel=_SIZES, help="Share of the GPU's memory to use."
    ),
]
MaxAdaptersOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        rich_help_panel=_SIZES,
        help="Adapters on the device at once, 8 or as many as are given; more wait in host memory.",
    ),
]
MaxRankOption = Annotated[
    int, typer.Option(min=1, rich_help_panel=_SIZES, help="Largest rank of an adapter.")
]
PoolRankOption = Annotated[
    int,
    typer.Option(
        min=1,
        rich_help_panel=_SIZES,
        help="Rank at which --max-adapters adapters that change everything fit.",
    ),
]
AdapterHostMemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        rich_help_panel=_SIZES,
        help="Host memory that all loaded adapters may take, such as 64GB; half of what there is "
        "unless given.",
    ),
]
OptionalSitesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--optional-site",
        metavar="SITE",
        rich_help_panel=_SIZES,
        help="router, embed_tokens or lm_head: adapters may change this, too. Repeat it for more.",
    ),
]


def host_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or what its container is given."""
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # There is none, or it says "max".
            size = min(size, int(Path(limit).read_text()))
    return size


def parse_bytes(option: str, size: str) -> int:
    """Bytes from ``141GB``, ``80gib`` or a plain number, as an option has it.

    Raises:
        RequestError: it is not of that form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", size.lower())
    if not match or match[2] not in _UNITS:
        raise RequestError(f"{option} {size}: write a size such as 141GB or 80GiB")
    return int(float(match[1]) * _UNITS[match[2]])
