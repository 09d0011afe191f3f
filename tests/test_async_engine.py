"""The serving engine from outside: streams, threads and loops, cancellation, shutdown."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from moelora_jax import LLM, CapacityError, MoeLoraError, Prompt, RequestError
from moelora_jax.engine.async_engine import AsyncEngine
from moelora_jax.engine.requests import Request, TokenOutput
from moelora_jax.engine.stream import Stream
from moelora_jax.errors import QueueFullError
from tests.tiny_llm import random_adapter, tiny_llm


@pytest.fixture(scope="module")
def llm() -> LLM:
    llm = tiny_llm()
    for seed, name in enumerate("ab"):
        llm.load_adapter(name, random_adapter(llm.config, seed))
    llm.warm_up()
    return llm


@pytest.fixture
def engine(llm: LLM) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(llm, max_waiting=8)
    engine.start()
    yield engine
    asyncio.run(engine.shutdown(drain=False, timeout=None))
    asyncio.run(engine.shutdown(drain=True, timeout=None))  # Once more does nothing.


async def collect(stream: Stream) -> list[TokenOutput]:
    return [output async for output in stream]


def test_streams_give_what_the_synchronous_api_gives(llm: LLM) -> None:
    prompts = [Prompt([1, 2, 3], "a"), Prompt([4, 5], "b"), Prompt([6])]
    expected = [llm.generate([prompt], max_new_tokens=5)[0].tokens for prompt in prompts]
    engine = AsyncEngine(llm)
    engine.start()

    async def serve() -> list[list[TokenOutput]]:
        requests = [Request(tuple(p.tokens), p.adapter, max_new_tokens=5) for p in prompts]
        return await asyncio.gather(*(collect(engine.submit(request)) for request in requests))

    outputs = asyncio.run(serve())
    for tokens, outs in zip(expected, outputs, strict=True):
        assert tuple(out.token for out in outs) == tokens
        assert [out.finish_reason for out in outs] == [None] * 4 + ["length"]
    in_a_thread = [out.token for out in engine.submit(Request((6,), max_new_tokens=5))]
    assert tuple(in_a_thread) == expected[2]
    asyncio.run(engine.shutdown(drain=True, timeout=None))
    stats = engine.stats()
    assert stats.submitted == 4
    assert stats.finished == {"length": 4}
    assert stats.generated_tokens == 20
    assert (stats.waiting, stats.running, stats.kv_blocks_used) == (0, 0, 0)
    assert stats.compilations == stats.address_changes == 0


def test_cancelled_and_timed_out_requests_end(engine: AsyncEngine) -> None:
    stream = engine.submit(Request((1, 2), max_new_tokens=46))
    next(stream)
    stream.cancel()
    assert list(stream)[-1].finish_reason in ("cancelled", "length")
    late = engine.submit(Request((1, 2), max_new_tokens=46, timeout=1e-6))
    assert list(late)[-1].finish_reason == "timeout"
    assert engine.stats().kv_blocks_used == 0


def test_bad_requests_are_refused_at_once(engine: AsyncEngine) -> None:
    for request, error in (
        (Request((1,), "nobody"), RequestError),
        (Request(()), RequestError),
        (Request((1,), max_new_tokens=0), RequestError),
        (Request((1,), num_logprobs=21), RequestError),
        (Request((1,), timeout=float("nan")), RequestError),
        (Request((1,) * 40, max_new_tokens=9), CapacityError),
    ):
        with pytest.raises(error):
            engine.submit(request)
    assert engine.stats().submitted == 0


def test_a_full_queue_refuses(engine: AsyncEngine) -> None:
    streams = []
    with pytest.raises(QueueFullError, match="8 requests are waiting"):
        for _ in range(100):
            streams.append(engine.submit(Request((1, 2), max_new_tokens=46)))
    for stream in streams:
        stream.cancel()
    for stream in streams:
        assert list(stream)[-1].finish_reason in ("cancelled", "length")


def test_adapters_come_and_go_while_requests_run(engine: AsyncEngine, llm: LLM) -> None:
    running = engine.submit(Request((1, 2), "a", max_new_tokens=40))
    asyncio.run(engine.load_adapter("c", random_adapter(llm.config, 7)))
    assert "c" in [info.name for info in engine.adapters()]
    assert len(list(engine.submit(Request((1,), "c", max_new_tokens=3)))) == 3
    assert len(list(running)) == 40
    asyncio.run(engine.unload_adapter("c"))
    with pytest.raises(RequestError, match="'c' is not loaded"):
        engine.submit(Request((1,), "c"))
    with pytest.raises(RequestError, match="'c' is not loaded"):
        asyncio.run(engine.unload_adapter("c"))


def test_shutdown_drains_or_cancels(llm: LLM) -> None:
    for drain, reason in ((True, "length"), (False, "cancelled")):
        engine = AsyncEngine(llm)
        engine.start()
        streams = [engine.submit(Request((1, 2), max_new_tokens=40)) for _ in range(6)]
        asyncio.run(engine.shutdown(drain=drain, timeout=None))
        reasons = {list(stream)[-1].finish_reason for stream in streams}
        assert reasons == {reason}
        with pytest.raises(RequestError, match="not running"):
            engine.submit(Request((1,)))


def test_a_burst_of_many_times_the_capacity(llm: LLM) -> None:
    """Consumers on two event loops and a thread; some give up. Nothing is lost, counters add up."""
    engine = AsyncEngine(llm, max_waiting=3000)
    engine.start()
    streams = [engine.submit(Request((n % 60, 1), "ab"[n % 2], 2)) for n in range(2000)]
    for stream in streams[5::2]:
        stream.cancel()
    results: list[list[list[TokenOutput]]] = []

    async def read(part: list[Stream]) -> list[list[TokenOutput]]:
        return await asyncio.gather(*(collect(stream) for stream in part))

    threads = [
        threading.Thread(target=lambda part=part: results.append(asyncio.run(read(part))))
        for part in (streams[:700], streams[700:1400])
    ]
    threads.append(
        threading.Thread(target=lambda: results.append([list(stream) for stream in streams[1400:]]))
    )
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    outputs = [out for part in results for out in part]
    assert len(outputs) == 2000
    reasons = Counter(out[-1].finish_reason for out in outputs)
    assert reasons["length"] >= 1002 and reasons["length"] + reasons["cancelled"] == 2000
    for out in outputs:
        assert [token.finish_reason for token in out[:-1]] == [None] * (len(out) - 1)
        assert len(out) == 2 or out[-1].finish_reason == "cancelled"
    asyncio.run(engine.shutdown(drain=True, timeout=None))
    stats = engine.stats()
    assert stats.finished == reasons and stats.submitted == 2000
    assert stats.generated_tokens == sum(token.token >= 0 for out in outputs for token in out)
    assert sum(traffic.requests for traffic in stats.by_adapter.values()) == 2000
    assert (stats.waiting, stats.running, stats.kv_blocks_used) == (0, 0, 0)
    assert stats.compilations == stats.address_changes == stats.unplanned_reads == 0


def test_a_buffer_that_moves_is_counted(
    engine: AsyncEngine, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(engine.submit(Request((1,), "a", 2)))
    assert engine.stats().address_changes == 0
    real = llm.runner.addresses

    def moved() -> dict[str, tuple[int, ...]]:
        addresses = real()
        first, *others = addresses["kv_cache"]
        return addresses | {"kv_cache": (first + 1, *others)}

    monkeypatch.setattr(llm.runner, "addresses", moved)
    list(engine.submit(Request((1,), "a", 2)))
    asyncio.run(engine.shutdown(drain=True, timeout=None))
    assert engine.stats().address_changes == 1


def test_a_failed_load_changes_nothing(engine: AsyncEngine, llm: LLM, tmp_path: Path) -> None:
    before, loads = engine.adapters(), engine.stats().adapter_loads
    too_large = random_adapter(llm.config, 1, rank=33)
    for adapter, error in ((too_large, CapacityError), (tmp_path / "nothing", MoeLoraError)):
        with pytest.raises(error):
            asyncio.run(engine.load_adapter("a", adapter))
    assert engine.adapters() == before
    assert len(list(engine.submit(Request((1,), "a", 3)))) == 3
    assert engine.stats().adapter_loads == loads


def test_pinned_adapters_stay_until_they_are_unpinned(engine: AsyncEngine, llm: LLM) -> None:
    adapter = random_adapter(llm.config, 3)
    asyncio.run(engine.load_adapter("p", adapter, pin=True))
    list(engine.submit(Request((1,), "p", 2)))
    with pytest.raises(RequestError, match="is pinned"):
        asyncio.run(engine.unload_adapter("p"))
    asyncio.run(engine.pin_adapter("p", pinned=False))
    asyncio.run(engine.unload_adapter("p"))
    for pinned in (True, False):
        with pytest.raises(RequestError, match="'p' is not loaded"):
            asyncio.run(engine.pin_adapter("p", pinned))


def test_a_failed_step_ends_its_streams_with_the_error(
    llm: LLM, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    expected = [output.token for output in engine.submit(Request((7, 8), "a", 4))]
    with monkeypatch.context() as patched:
        patched.setattr(llm.runner, "run", fail)
        with pytest.raises(MoeLoraError, match="a step failed: out of memory"):
            list(engine.submit(Request((1, 2), max_new_tokens=4)))
    assert [output.token for output in engine.submit(Request((7, 8), "a", 4))] == expected
    assert engine.stats().finished == {"length": 2, "error": 1}


def test_the_end_of_the_device_thread_leaves_nobody_waiting(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = AsyncEngine(llm)
    engine.start()
    stream = engine.submit(Request((1, 2), max_new_tokens=40))
    next(stream)
    monkeypatch.setattr(engine, "_step", lambda: 1 / 0)
    with pytest.raises(MoeLoraError, match="the engine has stopped: division by zero"):
        list(stream)
    assert not engine.is_running
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(RequestError, match="not running"):
        engine.submit(Request((1,)))
    with pytest.raises(RequestError, match="not running"):
        asyncio.run(engine.unload_adapter("a"))
    for _ in range(2):
        asyncio.run(engine.shutdown(drain=True, timeout=None))
