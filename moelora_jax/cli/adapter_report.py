"""What an adapter folder holds, and whether it fits a model: the facts of ``moelora inspect``."""

import re
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from moelora_jax.adapters.adapter import Adapter
from moelora_jax.adapters.adapter_config import AdapterConfig, read_adapter_config
from moelora_jax.adapters.pages import pool_pages
from moelora_jax.adapters.reader import adapter_weights, read_adapter
from moelora_jax.cli.limits import count_pages
from moelora_jax.cli.options import Dtype, layout_errors_name
from moelora_jax.config import LoraConfig, LoraSite
from moelora_jax.errors import AdapterError
from moelora_jax.models import read_model_config
from moelora_jax.safetensors_file import FLOAT_DTYPES, SafetensorsFile
from moelora_kernels.types import PAGE_ROWS

# What the files say.


def describe_files(folder: Path) -> dict[str, Any]:
    """What can be said without a model.

    Raises:
        AdapterError: a file is missing, damaged, or asks for something that is not supported.
    """
    config = read_adapter_config(folder)
    with SafetensorsFile(adapter_weights(folder), AdapterError) as file:
        headers = dict(file.headers)
    numbers = sum(prod(header.shape) for header in headers.values())
    return {
        "folder": str(folder),
        "config": _describe_config(config),
        "tensors": len(headers),
        "parameters": numbers,
        "dtypes": sorted({header.dtype for header in headers.values()}),
        "file_bytes": sum(
            prod(header.shape) * FLOAT_DTYPES[header.dtype].itemsize
            for header in headers.values()
            if header.dtype in FLOAT_DTYPES
        ),
        "modules": _group({name: header.shape for name, header in headers.items()}),
    }


def _describe_config(config: AdapterConfig) -> dict[str, Any]:
    targets = config.target_modules
    return {
        "rank": config.rank,
        "alpha": config.alpha,
        "use_rslora": config.use_rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "target_parameters": list(config.target_parameters),
        "peft_version": config.peft_version,
    }


def _group(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """Modules whose names differ in numbers only, and whose tensors have the same shapes."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        module, _, factor = name.removeprefix("base_model.model.").rpartition(".lora_")
        modules.setdefault(module or name, {})[factor[:1] if module else ""] = shape
    groups = Counter(
        (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), tuple(sorted(factors.items())))
        for name, factors in modules.items()
    )
    return [
        {"name": name, "shapes": {factor: list(shape) for factor, shape in factors}, "count": count}
        for (name, factors), count in groups.items()
    ]


# What the model says to that.


def describe_fit(
    folder: Path, model: Path, layout: str | None, limits: LoraConfig, dtype: Dtype
) -> dict[str, Any]:
    """Whether the adapter is one for the model, and within the limits.

    Raises:
        CheckpointError: the model's config.json is missing or not supported.
    """
    family, config = read_model_config(model)
    try:
        with layout_errors_name("--layout LAYOUT"):
            adapter = read_adapter(
                folder, config.lora_sites(), module_names=family.module_names, layout=layout
            )
    except AdapterError as error:
        return {"model": str(model), "fits": False, "reasons": [str(error)]}
    changed = {target.site for target in adapter.updates}
    optional = [site.name for site in config.lora_sites() if site.optional]
    limits = replace(limits, optional_sites=tuple(name for name in optional if name in changed))
    sites = limits.select(config.lora_sites())
    needed, there = count_pages(adapter, sites), pool_pages(sites, limits)
    reasons = []
    if adapter.max_rank > limits.max_rank:
        reasons.append(
            f"rank {adapter.max_rank} is above max_rank {limits.max_rank}; raise max_rank"
        )
    for width in needed:
        if needed[width] > there[width]:
            reasons.append(
                f"{needed[width]} pages of width {width} are needed, the pool has {there[width]}; "
                "raise pool_rank or max_adapters"
            )
    return {
        "model": str(model),
        "fits": not reasons,
        "reasons": reasons
        or [f"every tensor has a place in the model, and rank {adapter.max_rank} is within limits"],
        "layout": adapter.layout,
        "sites": [_describe_site(adapter, site) for site in sites if _updates(adapter, site)],
        "page_dtype": str(dtype),
        "pages": [
            {
                "width": width,
                "needed": needed[width],
                "in_pool": there[width],
                "bytes": needed[width] * PAGE_ROWS * width * dtype.numpy.itemsize,
            }
            for width in needed
        ],
    }


def _updates(adapter: Adapter, site: LoraSite) -> list[Any]:
    return [item for item in adapter.updates.items() if item[0].site == site.name]


def _describe_site(adapter: Adapter, site: LoraSite) -> dict[str, Any]:
    updates = _updates(adapter, site)
    return {
        "site": site.name,
        "layers": sorted({target.layer for target, _ in updates}),
        "layers_of_model": len(site.layers),
        "experts": sorted({target.expert for target, _ in updates}) if site.num_experts else None,
        "experts_of_model": site.num_experts or None,
        "ranks": sorted({update.rank for _, update in updates}),
        "scalings": sorted({update.scaling for _, update in updates}),
        "updates": len(updates),
    }
