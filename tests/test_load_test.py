"""Open-loop loads: what is planned, what is measured, and the command that does both."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moelora_jax import LLM, RequestError
from moelora_jax.cli import app
from moelora_jax.cli.demo_files import ADAPTERS
from moelora_jax.engine.async_engine import AsyncEngine
from moelora_jax.load_test.engine_target import EngineTarget
from moelora_jax.load_test.report import Goal, plot, summarize
from moelora_jax.load_test.runner import Outcome, ServerTarget, run_load
from moelora_jax.load_test.workload import Lengths, PlannedRequest, Workload
from moelora_jax.server.keys import Key, Keys, digest
from tests.served_model import Served, served, tiny_model

KEY = "sk-load"
LOAD = Workload(
    rate=200.0,
    num_requests=12,
    input_lengths=Lengths.parse("uniform:1,20"),
    output_lengths=Lengths.parse("lognormal:8,0.5,20"),
    base_share=0.2,
    seed=1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("load")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return tiny_model(folder)


@pytest.fixture(scope="module")
def in_engine(llm: LLM) -> list[Outcome]:
    """The load on an engine, before the server takes it."""
    engine = AsyncEngine(llm)

    async def run() -> list[Outcome]:
        engine.start()
        plan = LOAD.plan(list(ADAPTERS), llm.config.vocab_size)
        outcomes = await run_load(plan, EngineTarget(engine))
        await engine.shutdown(drain=False)
        return outcomes

    return asyncio.run(run())


@pytest.fixture(scope="module")
def server(llm: LLM, folder: Path, in_engine: object) -> Iterator[Served]:
    with served(llm, folder, keys=Keys([Key(digest(KEY))])) as server:
        yield server


# The plan.


def test_the_same_seed_plans_the_same_load() -> None:
    assert LOAD.plan(["a", "b"], 100) == LOAD.plan(["a", "b"], 100)
    other = Workload(**{**vars(LOAD), "seed": 2})
    assert LOAD.plan(["a", "b"], 100) != other.plan(["a", "b"], 100)


def test_a_plan_follows_its_distributions() -> None:
    """20,000 draws of a fixed seed; 5 % is more than seven standard errors of each share."""
    load = Workload(
        rate=50.0,
        num_requests=20_000,
        input_lengths=Lengths.parse("uniform:4,12"),
        output_lengths=Lengths.parse("lognormal:8,0.5,100"),
        zipf=1.0,
        base_share=0.25,
    )
    plan = load.plan(["a", "b", "c"], 7)
    times = np.array([0.0, *(request.time for request in plan)])
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)  # Of an exponential: its mean.
    counts = Counter(request.adapter for request in plan)
    assert counts[None] / len(plan) == pytest.approx(0.25, rel=0.05)
    assert counts["a"] / counts["b"] == pytest.approx(2, rel=0.1)
    assert counts["a"] / counts["c"] == pytest.approx(3, rel=0.1)
    inputs = [len(request.prompt) for request in plan]
    assert (min(inputs), max(inputs)) == (4, 12)
    assert np.mean(inputs) == pytest.approx(8, rel=0.05)
    outputs = [request.output_tokens for request in plan]
    assert np.median(outputs) == 8
    assert min(outputs) >= 1 and max(outputs) <= 100
    assert {token for request in plan[:100] for token in request.prompt} == set(range(7))
    assert {request.adapter for request in load.plan([], 7)} == {None}


def test_lengths() -> None:
    rng = np.random.default_rng(0)
    assert set(Lengths.parse("16").draw(rng, 5)) == {16}
    assert LOAD.max_length == 40
    for text in ("", "a", "0", "uniform:5", "uniform:9,3", "lognormal:8,0.5", "zipf:3", "fixed:-1",
                 "lognormal:8,nan,20"):  # fmt: skip
        with pytest.raises(RequestError, match="length"):
            Lengths.parse(text)


# The report.


def outcome(time: float, token_times: list[float], error: str | None = None) -> Outcome:
    planned = PlannedRequest(time, "a", (1, 2), len(token_times))
    return Outcome(planned, time + 0.001, token_times, len(token_times), error)


def test_a_summary_by_hand(tmp_path: Path) -> None:
    outcomes = [
        outcome(1.0, [1.1, 1.2, 1.3]),  # Keeps both goals.
        outcome(2.0, [2.5, 2.6, 2.7]),  # Its first token is late.
        outcome(3.0, [3.1, 3.2, 4.0]),  # The mean of the others is above the goal.
        outcome(4.0, [], "HTTP 429"),
    ]
    summary = summarize(outcomes, Goal(0.2, 0.15))
    assert (summary["requests"], summary["finished"]) == (4, 3)
    assert summary["errors"] == {"HTTP 429": 1}
    assert summary["duration"] == 4.0
    assert summary["output_tokens_per_second"] == pytest.approx(9 / 4)
    assert summary["tokens_per_event"] == 1.0
    assert summary["input_tokens_per_second"] == pytest.approx(6 / 4)
    assert summary["offered_requests_per_second"] == pytest.approx(1.0)
    assert summary["time_to_first_token"]["p50"] == pytest.approx(0.1)
    assert summary["time_to_first_token"]["max"] == pytest.approx(0.5)
    assert summary["inter_token_latency"]["mean"] == pytest.approx((0.2 + 0.2 + 0.9) / 6)
    assert summary["time_per_token"]["max"] == pytest.approx(0.45)
    assert summary["goal_kept"] == 1 / 4
    assert summary["largest_delay_of_client"] == pytest.approx(0.001)
    json.dumps(summary, allow_nan=False)
    plot(outcomes, tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 1000


def test_a_server_without_an_event_for_each_token_shows() -> None:
    several, at_once = outcome(1.0, [1.1, 1.5]), outcome(2.0, [2.5])
    several.num_tokens = at_once.num_tokens = 5
    summary = summarize([several, at_once], Goal())
    assert summary["tokens_per_event"] == 10 / 3
    # Of tokens that came in one event nobody knows how long each took.
    assert summary["time_per_token"]["mean"] == pytest.approx(0.4 / 4)
    assert summary["time_to_first_token"]["max"] == pytest.approx(0.5)


def test_a_summary_of_failures(tmp_path: Path) -> None:
    outcomes = [outcome(1.0, [], "HTTP 503")]
    summary = summarize(outcomes, Goal())
    assert summary["finished"] == summary["goal_kept"] == 0
    assert summary["time_to_first_token"] is summary["tokens_per_event"] is None
    plot(outcomes, tmp_path / "none.svg")


# Loads.


def check(outcomes: list[Outcome]) -> None:
    """Everything was sent in time and answered in full."""
    assert len(outcomes) == LOAD.num_requests
    for each in outcomes:
        assert each.error is None
        assert each.num_tokens == each.planned.output_tokens
        assert each.planned.time <= each.sent <= each.token_times[0]
        assert each.token_times == sorted(each.token_times)


def test_a_load_on_an_engine(in_engine: list[Outcome]) -> None:
    check(in_engine)
    assert all(len(each.token_times) == each.num_tokens for each in in_engine)


def test_a_load_on_a_server(server: Served, in_engine: list[Outcome]) -> None:
    before = server.service.engine.stats()

    async def run() -> list[Outcome]:
        async with ServerTarget(server.url, KEY) as target:
            adapters, vocab_size = await target.models()
            assert set(adapters) == set(ADAPTERS)
            assert vocab_size == server.llm.config.vocab_size
            return await run_load(LOAD.plan(list(ADAPTERS), vocab_size), target)

    outcomes = asyncio.run(run())
    check(outcomes)
    assert all(len(each.token_times) == each.num_tokens for each in outcomes)
    assert [each.planned for each in outcomes] == [each.planned for each in in_engine]
    server.wait_until_idle()
    after = server.service.engine.stats()
    assert after.submitted - before.submitted == len(outcomes)
    tokens = sum(each.num_tokens for each in outcomes)
    assert after.generated_tokens - before.generated_tokens == tokens


def bench(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench-serve", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_command_measures_a_server(server: Served, tmp_path: Path) -> None:
    output, picture = tmp_path / "out.json", tmp_path / "out.png"
    code, text = bench(
        f"{server.url}/v1", "--api-key", KEY, "--rate", 200, "--requests", 40, "--input-lengths",
        "16", "--output-lengths", "uniform:1,16", "--slo-ttft", 60_000, "--slo-tpot", 60_000,
        "--json", output, "--plot", picture,
    )  # fmt: skip
    assert code == 0, text
    summary = json.loads(output.read_text())
    # A burst of so many may be refused, but nothing else goes wrong.
    assert summary["finished"] + summary["errors"].get("HTTP 429", 0) == 40
    assert summary["goal_kept"] == summary["finished"] / 40
    assert set(summary["requests_by_adapter"]) <= {"", *ADAPTERS}
    assert picture.read_bytes().startswith(b"\x89PNG")
    for expected in ("output tokens/s", "first token", "inter-token", "goal kept"):
        assert expected in text


def test_the_command_says_what_is_wrong(server: Served) -> None:
    for arguments, message in (
        ([], "either the URL"),
        ([server.url, "--model", server.folder], "either the URL"),
        ([server.url], "401"),
        (["http://127.0.0.1:9"], "does not list"),
        ([server.url, "--input-lengths", "many"], "no distribution"),
        ([server.url, "--json", server.folder], "is a folder"),
        # Found before the load has run, which takes a key.
        ([server.url, "--plot", server.folder / "plot.txt"], "must end in one of"),
        (
            [server.url, "--api-key", KEY, "--input-lengths", 500, "--requests", 3, "--rate", 100],
            "HTTP 400",
        ),
    ):
        code, text = bench(*arguments)
        assert code == 1, text
        assert message in text
