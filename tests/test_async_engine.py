"""The serving engine from outside: streams, threads and loops, cancellation, shutdown."""

import asyncio
from collections.abc import Iterator

import pytest

from moelora_jax import LLM, CapacityError, Prompt, RequestError
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
        for _ in range(30):
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
