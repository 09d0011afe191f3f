"""``moelora inspect``."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moelora_jax.adapters.adapter import Adapter
from moelora_jax.adapters.adapter_config import AdapterConfig, read_adapter_config
from moelora_jax.adapters.layouts import ExpertLayout
from moelora_jax.adapters.pages import pool_pages
from moelora_jax.adapters.reader import adapter_weights, read_adapter
from moelora_jax.cli.limits import count_pages
from moelora_jax.cli.options import Dtype, layout_errors_name
from moelora_jax.cli.output import format_bytes, make_table, stdout
from moelora_jax.config import LoraConfig, LoraSite
from moelora_jax.errors import AdapterError
from moelora_jax.models import read_model_config
from moelora_jax.safetensors_file import FLOAT_DTYPES, SafetensorsFile
from moelora_kernels.types import PAGE_ROWS

_DEFAULT = LoraConfig()
_LIMITS = "Limits of the server that the adapter must fit into"


def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER_DIR", help="An adapter folder.")],
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Checkpoint folder; its config.json is enough, no weight is read."
        ),
    ] = None,
    layout: Annotated[
        ExpertLayout | None,
        typer.Option(help="Of the experts, where reading with --model asks for it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of the pages.")] = Dtype.BFLOAT16,
    max_rank: Annotated[
        int,
        typer.Option(
            min=1,
            rich_help_panel=_LIMITS,
            help="Largest rank of an adapter.",
        ),
    ] = _DEFAULT.max_rank,
    max_adapters: Annotated[
        int,
        typer.Option(
            min=1,
            rich_help_panel=_LIMITS,
            help="Adapters on the device at once.",
        ),
    ] = _DEFAULT.max_adapters,
    pool_rank: Annotated[
        int,
        typer.Option(
            min=1,
            rich_help_panel=_LIMITS,
            help="Rank at which --max-adapters adapters that change everything fit.",
        ),
    ] = _DEFAULT.pool_rank,
) -> None:
    """Say what an adapter folder holds and, with --model, whether it fits the model and why.

    With --model the exit code is 1 if the adapter does not fit.
    """
    limits = LoraConfig(max_adapters=max_adapters, max_rank=max_rank, pool_rank=pool_rank)
    report = _describe_files(adapter)
    if model is not None:
        report |= _describe_fit(adapter, model, layout, limits, dtype)
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print(report)
    if report.get("fits") is False:
        raise typer.Exit(1)


# What the files say.


def _describe_files(folder: Path) -> dict[str, Any]:
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


def _describe_fit(
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


# For people.


def _print(report: dict[str, Any]) -> None:
    console, config = stdout(), report["config"]
    facts = Table.grid(padding=(0, 2))
    patterns = len(config["rank_pattern"]), len(config["alpha_pattern"])
    scaling = "alpha/√rank (rsLoRA)" if config["use_rslora"] else "alpha/rank"
    for what, value in (
        ("adapter", report["folder"]),
        ("rank, alpha", f"{config['rank']}, {config['alpha']:g}; scaling is {scaling}"),
        ("patterns", "{} of ranks, {} of alphas".format(*patterns) if any(patterns) else "none"),
        ("target_modules", _words(config["target_modules"])),
        ("target_parameters", _words(config["target_parameters"])),
        ("saved by PEFT", config["peft_version"] or "unknown"),
        (
            "tensors",
            f"{report['tensors']} of {_words(report['dtypes'])}: {report['parameters']:,} "
            f"parameters, {format_bytes(report['file_bytes'])}",
        ),
    ):
        facts.add_row(what, value)
    console.print(facts, markup=False)

    table = make_table("Modules in the file", "name", "count", "A", "B", numbers=("count",))
    for group in report["modules"]:
        shapes = (" × ".join(map(str, group["shapes"].get(factor, ()))) for factor in "AB")
        table.add_row(group["name"], str(group["count"]), *shapes)
    console.print()
    console.print(table)
    if "sites" in report:
        _print_sites(report)
    if "fits" in report:
        verdict = "fits" if report["fits"] else "does not fit"
        colour = "green" if report["fits"] else "red"
        console.print(f"[bold {colour}]{verdict}[/]: ", end="")
        console.print("; ".join(report["reasons"]), markup=False, soft_wrap=True)


def _print_sites(report: dict[str, Any]) -> None:
    columns = "site", "layers", "experts", "rank", "scaling"
    table = make_table(f"In the model ({report['layout']})", *columns)
    for site in report["sites"]:
        experts = site["experts"]
        table.add_row(
            site["site"],
            f"{_ranges(site['layers'])} of {site['layers_of_model']}",
            "-" if experts is None else f"{_ranges(experts)} of {site['experts_of_model']}",
            _ranges(site["ranks"]),
            _words(f"{scaling:.4g}" for scaling in site["scalings"]),
        )
    stdout().print(table)
    numbers = "width", "pages", "pool", "bytes"
    title = f"As pages of {PAGE_ROWS} ranks, {report['page_dtype']}"
    table = make_table(title, *numbers, numbers=numbers)
    for pages in report["pages"]:
        counts = (pages["width"], pages["needed"], pages["in_pool"])
        table.add_row(*map(str, counts), format_bytes(pages["bytes"]))
    total = sum(pages["bytes"] for pages in report["pages"])
    table.add_row("all", "", "", format_bytes(total))
    stdout().print(table)


def _words(values: Iterable[str] | str) -> str:
    if isinstance(values, str):
        return values
    return ", ".join(values) or "none"


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3, 6`` for 0, 1, 2, 3, 6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
