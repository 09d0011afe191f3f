"""``moelora inspect``."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moelora_jax.adapters.layouts import ExpertLayout
from moelora_jax.cli.options import Dtype
from moelora_jax.cli.output import format_bytes, make_table, stdout

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
    ] = 64,
    max_adapters: Annotated[
        int,
        typer.Option(
            min=1,
            rich_help_panel=_LIMITS,
            help="Adapters on the device at once.",
        ),
    ] = 8,
    pool_rank: Annotated[
        int,
        typer.Option(
            min=1,
            rich_help_panel=_LIMITS,
            help="Rank at which --max-adapters adapters that change everything fit.",
        ),
    ] = 16,
) -> None:
    """Say what an adapter folder holds and, with --model, whether it fits the model and why.

    With --model the exit code is 1 if the adapter does not fit.
    """
    from moelora_jax.cli.adapter_report import describe_files, describe_fit
    from moelora_jax.config import LoraConfig

    limits = LoraConfig(max_adapters=max_adapters, max_rank=max_rank, pool_rank=pool_rank)
    report = describe_files(adapter)
    if model is not None:
        report |= describe_fit(adapter, model, layout, limits, dtype)
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print(report)
    if report.get("fits") is False:
        raise typer.Exit(1)


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
    from moelora_kernels.types import PAGE_ROWS

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
