"""Static sizes: those of a server's options, and those that follow from what is to be run."""

from collections.abc import Collection, Sequence

from moelora_jax.adapters.adapter import Adapter, factor_key
from moelora_jax.adapters.pages import factors_by_width
from moelora_jax.config import (
    BucketConfig,
    CacheConfig,
    LoraConfig,
    LoraSite,
    ModelConfig,
    RuntimeConfig,
    pages_of_rank,
)
from moelora_jax.engine.llm import Prompt
from moelora_jax.errors import RequestError
from moelora_kernels.types import PAGE_ROWS


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


def derive_runtime(
    model: ModelConfig,
    adapters: Collection[Adapter],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 0,
    max_adapters: int | None = None,
    max_batch_rows: int,
    max_batch_tokens: int,
) -> RuntimeConfig:
    """The smallest sizes that hold some adapters and prompts, with one bucket of each kind.

    Args:
        model: the base model.
        adapters: all that will be loaded.
        prompts: all that will be run.
        max_new_tokens: to be generated for each of them.
        max_adapters: on the device at once; all unless given.
        max_batch_rows: rows that run at once, at most.
        max_batch_tokens: prompt tokens that run at once, at most.
    """
    lengths = [len(prompt.tokens) for prompt in prompts]
    rows = min(max_batch_rows, _power_of_two(len(lengths)))
    tokens = min(max_batch_tokens, max(16, _power_of_two(sum(lengths))))
    return RuntimeConfig(
        lora=derive_lora(model.lora_sites(), adapters, max_adapters),
        buckets=BucketConfig(decode=(rows,), prefill=(tokens,)),
        cache=CacheConfig(max_length=max(lengths) + max_new_tokens),
    )


def derive_lora(
    sites: Sequence[LoraSite], adapters: Collection[Adapter], max_adapters: int | None = None
) -> LoraConfig:
    """The smallest limits with room for all adapters, or for any ``max_adapters`` of them.

    Sites that no adapter changes get no pages at all.
    """
    used = {target.site for adapter in adapters for target in adapter.updates}
    if any(site.name in used and site.num_experts for site in sites):
        used |= {site.name for site in sites if site.num_experts}
    enabled = [site for site in sites if site.name in used]

    slots = max(1, min(len(adapters), max_adapters or len(adapters)))
    counts = [count_pages(adapter, enabled) for adapter in adapters]
    pages_per_factor = 1
    for width, factors in factors_by_width(enabled).items():
        largest = sorted((count.get(width, 0) for count in counts), reverse=True)[:slots]
        pages_per_factor = max(pages_per_factor, -(-sum(largest) // factors))
    return LoraConfig(
        max_adapters=slots,
        max_rank=max((adapter.max_rank for adapter in adapters), default=1),
        pool_rank=-(-pages_per_factor // slots) * PAGE_ROWS,
        sites=tuple(site.name for site in enabled),
    )


def changed_optional_sites(model: ModelConfig, adapters: Collection[Adapter]) -> list[str]:
    """The optional sites that some adapter changes."""
    changed = {target.site for adapter in adapters for target in adapter.updates}
    return [site.name for site in model.lora_sites() if site.optional and site.name in changed]


def count_pages(adapter: Adapter, sites: Sequence[LoraSite]) -> dict[int, int]:
    """Pages that an adapter takes in the pool of each width; a shared factor takes them once."""
    site_of_name = {site.name: site for site in sites}
    counts = dict.fromkeys(factors_by_width(sites), 0)
    seen = set()
    for target, update in adapter.updates.items():
        site = site_of_name[target.site]
        widths = (site.in_features, site.out_features)
        for rows, width in zip(update.factors, widths, strict=True):
            key = factor_key(rows)
            if key not in seen:
                seen.add(key)
                counts[width] += pages_of_rank(update.rank)
    return counts


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()
