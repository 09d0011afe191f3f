"""``moelora bench-serve``."""

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moelora_jax.cli.options import AdaptersOption, DtypeOption, LayoutsOption, parse_adapters
from moelora_jax.cli.output import check_output, make_table, progress_bar, stdout
from moelora_jax.cli.sizes import (
    KvBlocksOption,
    MaxAdaptersOption,
    MaxBatchTokensOption,
    MaxRankOption,
    MaxRunningOption,
    MemoryFractionOption,
    PoolRankOption,
)
from moelora_jax.errors import RequestError
from moelora_jax.files import new_file
from moelora_jax.load_test.report import PERCENTILES, Goal, check_plot, plot, summarize
from moelora_jax.load_test.runner import Outcome, ServerTarget, Target, run_load
from moelora_jax.load_test.workload import Lengths, PlannedRequest, Workload

_LOAD = "Load"
_GOAL = "Goal"
_OUTPUT = "Output"
_ENGINE = "Engine in this process, instead of URL"

#: Token ids of prompts, where a server does not tell its vocabulary.
_DEFAULT_VOCABULARY = 1000

#: What the table calls the latencies of a summary: short, as terminals are narrow.
_LATENCIES = {
    "time_to_first_token": "first token",
    "inter_token_latency": "inter-token",
    "time_per_token": "per token",
    "request_duration": "request",
}


def bench_serve(
    url: Annotated[
        str | None, typer.Argument(help="A server, such as http://127.0.0.1:8000.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MOELORA_API_KEY", show_envvar=True, help="Of the server.")
    ] = None,
    rate: Annotated[
        float, typer.Option(min=0.001, rich_help_panel=_LOAD, help="Requests per second.")
    ] = 4.0,
    requests: Annotated[int, typer.Option(min=1, rich_help_panel=_LOAD, help="How many.")] = 100,
    input_lengths: Annotated[
        str,
        typer.Option(
            rich_help_panel=_LOAD,
            help="Prompt tokens: 128, uniform:16,512 or lognormal:MEDIAN,SIGMA,MAX.",
        ),
    ] = "lognormal:128,0.7,1024",
    output_lengths: Annotated[
        str, typer.Option(rich_help_panel=_LOAD, help="Tokens to generate, in the same way.")
    ] = "lognormal:64,0.7,512",
    zipf: Annotated[
        float,
        typer.Option(
            min=0.0,
            rich_help_panel=_LOAD,
            help="The k-th adapter is asked for in proportion to 1/k^ZIPF; 0 for all alike.",
        ),
    ] = 1.0,
    base_share: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, rich_help_panel=_LOAD, help="Of requests to the base model."
        ),
    ] = 0.1,
    seed: Annotated[
        int, typer.Option(min=0, rich_help_panel=_LOAD, help="The same seed plans the same load.")
    ] = 0,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=_LOAD,
            help="Prompts are random token ids below this; the model's own unless given, or 1000 "
            "if the server does not tell.",
        ),
    ] = None,
    slo_ttft: Annotated[
        float | None,
        typer.Option(min=0.0, rich_help_panel=_GOAL, help="Time to first token in ms, at most."),
    ] = None,
    slo_tpot: Annotated[
        float | None,
        typer.Option(
            min=0.0, rich_help_panel=_GOAL, help="Mean time of each further token in ms, at most."
        ),
    ] = None,
    json_output: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", rich_help_panel=_OUTPUT, help="Also as JSON."),
    ] = None,
    plot_output: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE.png", rich_help_panel=_OUTPUT, help="Also as a picture."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", rich_help_panel=_ENGINE, help="Checkpoint folder."),
    ] = None,
    adapter: AdaptersOption = None,
    layout: LayoutsOption = None,
    dtype: DtypeOption = None,
    max_waiting: Annotated[
        int, typer.Option(min=0, rich_help_panel=_ENGINE, help="Completions that may wait.")
    ] = 10_000,
    max_running: MaxRunningOption = 32,
    max_batch_tokens: MaxBatchTokensOption = 1024,
    kv_blocks: KvBlocksOption = None,
    memory_fraction: MemoryFractionOption = 0.9,
    max_adapters: MaxAdaptersOption = None,
    max_rank: MaxRankOption = 64,
    pool_rank: PoolRankOption = 16,
) -> None:
    """Measure a server, or an engine in this process, under an open-loop load.

    Requests are sent at random times that do not depend on the answers (Poisson arrivals), to
    adapters of different popularity (Zipf). All completions have the planned length.
    """
    if (url is None) == (model is None):
        raise RequestError("give either the URL of a server, or --model")
    for path in (json_output, plot_output):
        if path is not None:
            check_output(path)
    if plot_output is not None:
        check_plot(plot_output)
    workload = Workload(
        rate=rate,
        num_requests=requests,
        input_lengths=Lengths.parse(input_lengths),
        output_lengths=Lengths.parse(output_lengths),
        zipf=zipf,
        base_share=base_share,
        seed=seed,
    )
    if url is not None:
        outcomes = asyncio.run(_load_server(workload, url, api_key, vocab_size))
    else:
        from moelora_jax.cli.loading import load_for_serving
        from moelora_jax.engine.async_engine import AsyncEngine
        from moelora_jax.load_test.engine_target import EngineTarget

        assert model is not None
        folders = parse_adapters(adapter or [], layout or [])
        llm = load_for_serving(
            model,
            folders,
            with_lora=bool(folders),
            dtype=dtype,
            memory_fraction=memory_fraction,
            max_length=workload.max_length,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            kv_blocks=kv_blocks,
            max_adapters=max_adapters,
            max_rank=max_rank,
            pool_rank=pool_rank,
        )
        plan = workload.plan(list(folders), vocab_size or llm.config.vocab_size)
        engine = AsyncEngine(llm, max_waiting=max_waiting)

        async def load_engine() -> list[Outcome]:
            engine.start()
            try:
                return await _run(plan, EngineTarget(engine))
            finally:
                await engine.shutdown(drain=False)

        outcomes = asyncio.run(load_engine())

    goal = Goal(_seconds(slo_ttft), _seconds(slo_tpot))
    summary = summarize(outcomes, goal)
    _print(summary)
    if json_output is not None:
        with new_file(json_output) as new:
            new.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if plot_output is not None:
        plot(outcomes, plot_output)
    if not summary["finished"]:
        raise RequestError(f"no request was answered: {summary['errors']}")


async def _load_server(
    workload: Workload, url: str, api_key: str | None, vocab_size: int | None
) -> list[Outcome]:
    async with ServerTarget(url, api_key) as target:
        adapters, known = await target.models()
        plan = workload.plan(adapters, vocab_size or known or _DEFAULT_VOCABULARY)
        return await _run(plan, target)


async def _run(plan: list[PlannedRequest], target: Target) -> list[Outcome]:
    with progress_bar("Requests") as bar:
        task = bar.add_task("", total=len(plan))
        return await run_load(
            plan, target, progress=lambda ended: bar.update(task, completed=ended)
        )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _print(summary: dict[str, Any]) -> None:
    console = stdout()
    table = make_table("Throughput", "what", "value", numbers=("value",))
    table.add_row("requests", f"{summary['requests']:,}")
    table.add_row("finished", f"{summary['finished']:,}")
    for error, count in summary["errors"].items():
        table.add_row(f"failed: {error}", f"{count:,}")
    table.add_row("seconds", f"{summary['duration']:,.1f}")
    table.add_row("requests/s offered", f"{summary['offered_requests_per_second']:,.2f}")
    table.add_row("requests/s finished", f"{summary['finished_requests_per_second']:,.2f}")
    table.add_row("input tokens/s", f"{summary['input_tokens_per_second']:,.0f}")
    table.add_row("output tokens/s", f"{summary['output_tokens_per_second']:,.0f}")
    if summary["tokens_per_event"] is not None:
        table.add_row("tokens per event", f"{summary['tokens_per_event']:,.2f}")
    if any(value is not None for value in summary["goal"].values()):
        table.add_row("goal kept", f"{summary['goal_kept']:.1%}")
        table.add_row("requests/s that kept it", f"{summary['goal_kept_requests_per_second']:,.2f}")
    table.add_row("client late by at most", f"{summary['largest_delay_of_client'] * 1000:,.0f} ms")
    console.print(table)

    columns = ("mean", *(f"p{p}" for p in PERCENTILES), "max")
    table = make_table("Latency in ms", "what", *columns, numbers=columns)
    for name, shown in _LATENCIES.items():
        if summary[name] is not None:
            values = (f"{summary[name][column] * 1000:,.1f}" for column in columns)
            table.add_row(shown, *values)
    console.print(table)
