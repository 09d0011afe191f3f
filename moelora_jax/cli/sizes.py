"""The sizes of a server: options that ``serve`` and ``plan`` share, and what they come to."""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import typer

from moelora_jax.config import BucketConfig, CacheConfig, LoraConfig, ModelConfig, RuntimeConfig
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


def serving_runtime(
    config: ModelConfig,
    *,
    with_lora: bool,
    max_length: int | None,
    max_running: int,
    max_batch_tokens: int,
    kv_blocks: int | None,
    max_adapters: int,
    max_rank: int,
    pool_rank: int,
    optional_sites: Sequence[str],
    max_host_bytes: int | None = None,
) -> RuntimeConfig:
    """What the options of a server come to.

    Raises:
        RequestError: the model has no such optional site.
    """
    known = [site.name for site in config.lora_sites() if site.optional]
    for name in optional_sites:
        if name not in known:
            raise RequestError(f"--optional-site {name}: choose from {', '.join(known)}")
    return RuntimeConfig(
        lora=LoraConfig(
            max_adapters=max_adapters,
            max_rank=max_rank,
            pool_rank=pool_rank,
            sites=None if with_lora else (),
            optional_sites=tuple(optional_sites) if with_lora else (),
            max_host_bytes=max_host_bytes,
        ),
        buckets=BucketConfig(
            decode=_sizes(1, max_running, 2), prefill=_sizes(64, max_batch_tokens, 4)
        ),
        cache=CacheConfig(
            max_length=max_length or min(config.max_position, 4096), num_blocks=kv_blocks
        ),
    )


def _sizes(smallest: int, largest: int, factor: int) -> tuple[int, ...]:
    """Bucket sizes, each ``factor`` times the one before, up to the largest."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= factor
    return (*sizes, largest)


def device_memory() -> int | None:
    """Bytes that JAX may use on the device; None on a CPU, where there is no limit."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


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
