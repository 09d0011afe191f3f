"""Whatever clients and files do: the server stays up, answers others, and counters add up."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, AsyncOpenAI, OpenAI, RateLimitError

from moelora_jax import LLM
from moelora_jax.cli.demo_files import ADAPTERS
from moelora_jax.server.adapter_root import AdapterRoot
from moelora_jax.server.generation import Limits
from moelora_jax.server.keys import Keys
from tests.conftest import ROOT
from tests.served_model import MAX_WAITING, MODEL, Served, served, tiny_model, wait_for

ADMIN = "sk-admin"
MODELS = (MODEL, *ADAPTERS)
#: Requests that the engine holds at once: those that run, and those that wait.
CAPACITY = 4 + MAX_WAITING


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return tiny_model(folder)


@pytest.fixture(scope="module")
def server(llm: LLM, folder: Path) -> Iterator[Served]:
    root = AdapterRoot(folder / "adapters")
    with served(llm, folder, keys=Keys(admin=ADMIN), adapter_root=root) as server:
        yield server


@pytest.fixture(scope="module")
def expected(server: Served) -> dict[str, str]:
    """The answer of each model to a request that nothing disturbs."""
    return {model: complete(server, model) for model in MODELS}


@pytest.fixture(autouse=True)
def adds_up(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test nothing is left, and every request that was accepted has ended once."""
    yield
    if "server" in request.fixturenames:
        assert_adds_up(request.getfixturevalue("server"))


def assert_adds_up(server: Served) -> None:
    server.wait_until_idle()
    stats = server.service.engine.stats()
    assert stats.submitted == sum(stats.finished.values())
    # Of adapters that were unloaded, only the sums are left.
    assert set(stats.by_adapter) <= {None, *(info.name for info in server.llm.adapters())}
    assert stats.submitted >= sum(traffic.requests for traffic in stats.by_adapter.values())
    assert stats.generated_tokens >= sum(t.generated_tokens for t in stats.by_adapter.values())
    assert stats.kv_blocks_used == 0
    assert stats.compilations == stats.address_changes == stats.unplanned_reads == 0
    assert server.request("GET", "/health")[0] == 200


def body(model: str, tokens: int = 12, **more: Any) -> dict[str, Any]:
    return {
        "model": model, "prompt": "Hello, wörld", "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True, **more,
    }  # fmt: skip


def complete(server: Served, model: str) -> str:
    status, answer = server.request("POST", "/v1/completions", body(model))
    assert status == 200, answer
    return answer["choices"][0]["text"]


@contextlib.contextmanager
def begun(server: Served, sent: dict[str, Any]) -> Iterator[tuple[HTTPConnection, HTTPResponse]]:
    """A streamed answer whose first event has come; the connection is closed in the end."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        content = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps({**sent, "stream": True}), content)
        response = connection.getresponse()
        assert response.status == 200
        assert response.readline().startswith(b"data: ")
        yield connection, response


def finished(server: Served) -> Counter[str]:
    return Counter(server.service.engine.stats().finished)


# Clients.


@pytest.mark.parametrize("model", [MODEL, "experts-r24"])
def test_a_client_that_leaves_a_stream(
    server: Served, expected: dict[str, str], model: str
) -> None:
    before = finished(server)
    with begun(server, body(model, 110, n=MAX_WAITING)):
        pass
    server.wait_until_idle()
    assert (finished(server) - before)["cancelled"] > 0
    assert complete(server, model) == expected[model]


def test_a_client_that_leaves_before_the_answer(server: Served, expected: dict[str, str]) -> None:
    before = finished(server)
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    content = {"Content-Type": "application/json"}
    connection.request(
        "POST", "/v1/completions", json.dumps(body(MODEL, 110, n=MAX_WAITING)), content
    )
    wait_for(lambda: server.service.engine.stats().running > 0)
    connection.close()
    server.wait_until_idle()
    assert (finished(server) - before)["cancelled"] > 0
    assert complete(server, MODEL) == expected[MODEL]


def test_a_client_that_never_reads(server: Served, expected: dict[str, str]) -> None:
    with begun(server, body(MODEL, 110, n=4, logprobs=20)):
        for model in MODELS:
            assert complete(server, model) == expected[model]


def test_clients_that_send_half_a_request(
    server: Served, expected: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    connections = []
    for _ in range(20):
        connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b'{"model": ')
        connections.append(connection)
    assert complete(server, MODEL) == expected[MODEL]
    for connection in connections:
        connection.close()
    # That is no fault of the server's: it neither says so, nor fills its log with it.
    answered = 'moelora_http_responses_total{path="/v1/completions",status="%d"}'
    wait_for(lambda: server.metrics().get(answered % 499, 0) >= 20)
    assert answered % 500 not in server.metrics()
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("header", [b"X: %s", b"X: %s\r\n"])
def test_headers_that_never_end(server: Served, header: bytes) -> None:
    """They are cut off before they fill the memory; whoever sends them needs no key."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 16 * 2**20:
                sent += connection.send(header % (b"a" * 10_000))
        assert sent < 16 * 2**20
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX: " + b"a" * 100_000)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 400 ")
    # A body that is longer than that is none of it.
    status, answer = server.request("POST", "/v1/completions", body(MODEL, 1, user="x" * 500_000))
    assert status == 200, answer


def test_a_burst_of_ten_times_the_capacity(server: Served, expected: dict[str, str]) -> None:
    before, submitted = finished(server), server.service.engine.stats().submitted

    async def burst() -> list[tuple[str, str | None]]:
        async with AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as client:

            async def ask(model: str) -> tuple[str, str | None]:
                try:
                    answer = await client.completions.create(
                        model=model, prompt="Hello, wörld", max_tokens=12, temperature=0,
                        extra_body={"ignore_eos": True},
                    )  # fmt: skip
                except RateLimitError as error:
                    assert error.response.headers["retry-after"]
                    return model, None
                return model, answer.choices[0].text

            models = [MODELS[number % len(MODELS)] for number in range(10 * CAPACITY)]
            return await asyncio.gather(*map(ask, models))

    answers = asyncio.run(burst())
    assert len(answers) == 10 * CAPACITY
    answered = [(model, text) for model, text in answers if text is not None]
    assert len(answered) >= MAX_WAITING
    assert len(answered) < len(answers), "the burst was no burst: nothing was refused"
    for model, text in answered:
        assert text == expected[model]
    server.wait_until_idle()
    assert server.service.engine.stats().submitted - submitted == len(answered)
    assert finished(server) - before == {"length": len(answered)}


def test_all_choices_of_a_request_are_taken_or_none(server: Served) -> None:
    before = finished(server)
    status, answer = server.request("POST", "/v1/completions", body(MODEL, n=CAPACITY + 40))
    assert (status, answer["error"]["code"]) == (429, "queue_full")
    server.wait_until_idle()
    assert set(finished(server) - before) == {"cancelled"}


def test_ten_thousand_waiting_requests(llm: LLM, folder: Path) -> None:
    with served(llm, folder, max_waiting=12_000) as server, contextlib.ExitStack() as stack:
        for number in range(79):  # 79 · 128 = 10,112
            sent = body(MODELS[number % len(MODELS)], 100, n=128)
            stack.enter_context(begun(server, sent) if number == 0 else sending(server, sent))
        wait_for(lambda: server.service.engine.stats().submitted == 79 * 128)
        assert server.service.engine.stats().waiting > 10_000
        assert server.request("GET", "/health")[0] == 200
        stack.close()  # All clients leave.
        server.wait_until_idle()
        assert_adds_up(server)
        assert complete(server, MODEL)


@contextlib.contextmanager
def sending(server: Served, sent: dict[str, Any]) -> Iterator[HTTPConnection]:
    """A request whose answer nobody waits for."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        content = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(sent), content)
        yield connection


def test_requests_that_take_too_long(llm: LLM, folder: Path) -> None:
    limits = Limits(llm.runtime.cache.max_length, 0.02)
    with (
        served(llm, folder, limits=limits) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        options: Any = {"model": MODEL, "prompt": "a", "max_tokens": 110, "n": 8, "temperature": 0}
        more = {"extra_body": {"ignore_eos": True}}
        status, answer = server.request("POST", "/v1/completions", body(MODEL, 110, n=8))
        assert (status, answer["error"]["code"]) == (504, "timeout")
        with pytest.raises(APIError, match="longer than the server allows"):
            list(client.completions.create(stream=True, **options, **more))
        assert_adds_up(server)
        assert server.service.engine.stats().finished["timeout"] > 0


# Adapters.


def load(server: Served, name: str, path: str, **more: Any) -> tuple[int, Any]:
    sent = {"lora_name": name, "lora_path": path, **more}
    return server.request("POST", "/v1/load_lora_adapter", sent, key=ADMIN)


def unload(server: Served, name: str) -> int:
    sent = {"lora_name": name}
    return server.request("POST", "/v1/unload_lora_adapter", sent, key=ADMIN)[0]


@pytest.fixture
def broken(server: Served) -> Iterator[Path]:
    """A copy of an adapter folder, to be damaged."""
    folder = server.folder / "adapters" / "broken"
    shutil.copytree(server.folder / "adapters" / "experts-r8", folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "gone", "config", "pickle"])
def test_a_damaged_adapter(
    server: Served, expected: dict[str, str], broken: Path, damage: str
) -> None:
    weights = broken / "adapter_model.safetensors"
    data = weights.read_bytes()
    match damage:
        case "cut":
            weights.write_bytes(data[: len(data) // 2])
        case "noise":
            weights.write_bytes(os.urandom(1000))
        case "empty":
            weights.write_bytes(b"")
        case "gone":
            weights.unlink()
        case "config":
            (broken / "adapter_config.json").write_text("{")
        case "pickle":
            weights.rename(broken / "adapter_model.bin")
    assert load(server, "experts-r8", "experts-r8", load_inplace=True)[0] == 200
    for name in ("broken", "experts-r8"):  # A new one, and a new version of one that is loaded.
        status, answer = load(server, name, "broken", load_inplace=True)
        assert (status, answer["error"]["code"]) == (400, "invalid_adapter"), answer
        assert "broken" in answer["error"]["message"]
    for model in MODELS:
        assert complete(server, model) == expected[model]
    assert "broken" not in [card["id"] for card in server.request("GET", "/v1/models")[1]["data"]]


def test_an_adapter_that_is_written_while_it_is_loaded(
    server: Served, expected: dict[str, str], broken: Path
) -> None:
    """Every load is of one version or fails, and what runs is the last one that was loaded."""
    sources = [server.folder / "adapters" / name for name in ("experts-r8", "experts-r24")]
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            shutil.rmtree(broken, ignore_errors=True)
            if number % 3:
                shutil.copytree(sources[number % 2], broken)
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    statuses = Counter[int]()
    try:
        for _ in range(40):
            statuses[load(server, "moving", "broken", load_inplace=True)[0]] += 1
            if statuses[200]:
                assert complete(server, "moving") in (
                    expected["experts-r8"],
                    expected["experts-r24"],
                )
            assert complete(server, MODEL) == expected[MODEL]
    finally:
        stop.set()
        writer.join()
    assert set(statuses) <= {200, 400, 404}
    assert statuses[400] + statuses[404] > 0
    if statuses[200]:
        assert unload(server, "moving") == 200


def test_one_name_is_loaded_and_unloaded_at_once(server: Served, expected: dict[str, str]) -> None:
    """Of loads at once one is right; what comes between finds a whole adapter, or none."""
    for _ in range(3):
        before = server.service.engine.stats().adapter_loads
        with ThreadPoolExecutor(8) as threads:
            sources = ["experts-r8", "both-r16"] * 4
            answers = list(threads.map(lambda source: load(server, "same", source), sources))
        assert Counter(status for status, _ in answers) == {200: 1, 400: 7}
        (winner,) = (s for s, (status, _) in zip(sources, answers, strict=True) if status == 200)
        assert complete(server, "same") == expected[winner]
        assert server.service.engine.stats().adapter_loads == before + 1

        def change(number: int) -> int:
            if number % 3 == 0:
                return unload(server, "same")
            if number % 3 == 1:
                return load(server, "same", "both-r16", load_inplace=True)[0]
            return server.request("POST", "/v1/completions", body("same"))[0]

        with ThreadPoolExecutor(6) as threads:
            statuses = Counter(threads.map(change, range(24)))
        # 400 is what a request is told whose adapter was unloaded while it waited.
        assert set(statuses) <= {200, 400, 404}
        load(server, "same", "both-r16", load_inplace=True)
        assert complete(server, "same") == expected["both-r16"]
        assert unload(server, "same") == 200


def test_more_adapters_than_fit_come_and_go(server: Served, expected: dict[str, str]) -> None:
    """Mixed traffic over more adapters than there are slots and pages, with changes all along."""
    before = server.service.engine.stats().adapter_evictions
    names = {f"copy-{number}": "experts-r24" for number in range(6)}
    stop = threading.Event()

    def churn() -> None:
        number = 0
        while not stop.is_set():
            source = ("experts-r8", "both-r16", "attention-r3")[number % 3]
            assert load(server, "churn", source)[0] == 200
            assert complete(server, "churn") == expected[source]
            assert unload(server, "churn") == 200
            number += 1

    for name, source in names.items():
        assert load(server, name, source)[0] == 200
    with ThreadPoolExecutor(9) as threads:
        churning = threads.submit(churn)
        models = [*names, *MODELS] * 4
        try:
            answers = list(threads.map(lambda model: complete(server, model), models))
        finally:
            stop.set()
        churning.result()
    for model, text in zip(models, answers, strict=True):
        assert text == expected[names.get(model, model)], model
    assert server.service.engine.stats().adapter_evictions > before
    for name in names:
        assert unload(server, name) == 200


def test_unloading_what_runs(server: Served, expected: dict[str, str]) -> None:
    """A request that runs finishes with its adapter, or is told; nothing else answers for it."""
    for _ in range(5):
        assert load(server, "short-lived", "both-r16")[0] == 200
        with begun(server, body("short-lived", 12)) as (_, response):
            assert unload(server, "short-lived") == 200
            rest = response.read().decode()
        assert rest.endswith("data: [DONE]\n\n")
        assert '"finish_reason": "length"' in rest or '"error"' in rest
        assert complete(server, "both-r16") == expected["both-r16"]
    # Nor does what ended later bring its name back to the metrics.
    server.wait_until_idle()
    assert not [name for name in server.metrics() if '"short-lived"' in name]


# The end.


@contextlib.contextmanager
def process(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """``moelora serve`` as users run it, and its port."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "test-programs"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # It compiles faster.
    }
    command = [
        sys.executable, "-c", "from moelora_jax.cli import app; app()",
        "serve", "--model", str(folder / "model"), "--served-model-name", MODEL, "--port", "0",
        "--adapter", f"fr={folder / 'adapters' / 'experts-r8'}", "--max-running", "1",
        "--max-batch-tokens", "32", "--max-length", "1024",
    ]  # fmt: skip
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stderr is not None
            for line in running.stderr:
                if found := re.search(r"Serving tiny on http://127\.0\.0\.1:(\d+)", line):
                    break
            else:
                raise AssertionError(f"the server ended with {running.wait()}")
            threading.Thread(target=running.stderr.read, daemon=True).start()
            yield running, int(found[1])
        finally:
            running.kill()


def test_sigterm_in_mid_stream(folder: Path, llm: LLM) -> None:
    with process(folder) as (running, port):
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        options: Any = {
            "model": "fr", "prompt": "Hello", "max_tokens": 1000, "temperature": 0,
            "extra_body": {"ignore_eos": True}, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        stream = iter(client.completions.create(**options))
        chunks = [next(stream)]
        running.send_signal(signal.SIGTERM)
        # It is refused from now on, but the connection is still accepted.
        wait_for(lambda: status_of(port, "GET", "/health") == 503)
        assert status_of(port, "POST", "/v1/completions", body(MODEL)) == 503
        chunks += stream
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 1000
        assert chunks[-2].choices[0].finish_reason == "length"
        assert running.wait(30) == 0


def status_of(port: int, method: str, path: str, sent: Any = None) -> int:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        content = {"Content-Type": "application/json"}
        connection.request(method, path, None if sent is None else json.dumps(sent), content)
        return connection.getresponse().status


def test_adapters_do_not_change_while_it_drains(llm: LLM, folder: Path) -> None:
    root = AdapterRoot(folder / "adapters")
    with (
        served(llm, folder, keys=Keys(admin=ADMIN), adapter_root=root) as server,
        begun(server, body(MODEL, 110, n=MAX_WAITING)) as (_, response),
    ):
        server.server.drain()
        for load_inplace in (False, True):
            status, answer = load(server, "experts-r8", "both-r16", load_inplace=load_inplace)
            assert (status, answer["error"]["code"]) == (503, "shutting_down")
        assert unload(server, "experts-r8") == 503
        assert response.read().endswith(b"data: [DONE]\n\n")
    stats = server.service.engine.stats()
    assert stats.submitted == sum(stats.finished.values()) == stats.finished["length"]


def test_no_time_to_drain(llm: LLM, folder: Path) -> None:
    """What does not finish in time ends with an error, not with silence."""
    with served(llm, folder, drain_seconds=0.0) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model=MODEL, prompt="Hello", max_tokens=110, n=MAX_WAITING, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        with pytest.raises(APIError, match="shutting down"):
            for number, _ in enumerate(stream):
                if number == 0:
                    server.server.drain()


def test_a_second_signal_waits_for_nothing(llm: LLM, folder: Path) -> None:
    with served(llm, folder) as server:
        sent = body(MODEL, 110, n=MAX_WAITING)
        with begun(server, sent) as (_, response):
            server.server.handle_exit(signal.SIGTERM, None)
            assert server.service.draining
            server.server.handle_exit(signal.SIGTERM, None)
            try:
                rest = response.read().decode()
            except IncompleteRead as error:
                rest = error.partial.decode()
    assert '"shutting_down"' in rest or not rest.endswith("data: [DONE]\n\n")
    stats = server.service.engine.stats()
    assert stats.finished["cancelled"] > 0
    assert stats.submitted == sum(stats.finished.values())


def test_an_idle_connection_is_kept(server: Served) -> None:
    """Clients keep theirs for some seconds; a request must not meet one that is being closed."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.auto_open = 0  # It must not connect again by itself.
    with contextlib.closing(connection):
        connection.connect()
        for pause in (6, 0):  # Longer than the 5 seconds that many servers wait.
            connection.request("GET", "/health")
            response = connection.getresponse()
            assert response.status == 200
            response.read()
            time.sleep(pause)
