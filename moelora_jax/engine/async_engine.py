"""The engine for servers: one thread owns the device, streams carry tokens to whoever asked."""

import asyncio
import contextlib
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from moelora_jax.adapters.adapter import Adapter
from moelora_jax.adapters.registry import AdapterInfo
from moelora_jax.buckets import CompilationCounter
from moelora_jax.engine import engine
from moelora_jax.engine.llm import LLM, Prompt
from moelora_jax.engine.requests import AdapterTraffic, EngineStats, Request, TokenOutput
from moelora_jax.engine.sampling import MAX_LOGPROBS
from moelora_jax.errors import MoeLoraError, QueueFullError, RequestError


class Stream:
    """The tokens of one request, as they come: an async iterator, and a blocking one for threads.

    Made by :meth:`AsyncEngine.submit`. One consumer reads it. The last output has a finish reason;
    a request that fails raises its :class:`MoeLoraError` after the tokens that came before.
    """

    def __init__(self, request: Request, cancel: Callable[["Stream"], object]) -> None:
        self.request = request
        self._cancel = cancel
        self._changed = threading.Condition()
        self._outputs: deque[TokenOutput] = deque()
        self._ended = False
        self._error: MoeLoraError | None = None
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def cancel(self) -> None:
        """End the request soon; its stream ends with ``cancelled`` unless it ended before."""
        self._cancel(self)

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self

    async def __anext__(self) -> TokenOutput:
        while True:
            with self._changed:
                if self._outputs:
                    return self._outputs.popleft()
                if self._ended:
                    if self._error is not None:
                        raise self._error
                    raise StopAsyncIteration
                loop = asyncio.get_running_loop()
                future: asyncio.Future[None] = loop.create_future()
                self._waiter = loop, future
            await future

    def __iter__(self) -> Iterator[TokenOutput]:
        return self

    def __next__(self) -> TokenOutput:
        with self._changed:
            self._changed.wait_for(lambda: self._outputs or self._ended)
            if self._outputs:
                return self._outputs.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def _put(self, output: TokenOutput | None, error: MoeLoraError | None = None) -> None:
        """Called by the device thread: one more output, the last one, or an error."""
        with self._changed:
            if output is not None:
                self._outputs.append(output)
            self._ended = error is not None or (output is not None and bool(output.finish_reason))
            self._error = error
            waiter, self._waiter = self._waiter, None
            self._changed.notify()
        if waiter is not None:
            loop, future = waiter
            with contextlib.suppress(RuntimeError):  # The consumer's loop was closed.
                loop.call_soon_threadsafe(_wake, future)


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


class AsyncEngine:
    """Serves requests of any threads and event loops on one thread that owns the device.

    Example::

        engine = AsyncEngine(llm)
        engine.start()
        async for output in engine.submit(Request((1, 2, 3), "french")):
            print(output.token)
        await engine.shutdown(drain=True, timeout=None)

    Args:
        llm: the model; between :meth:`start` and :meth:`shutdown` nothing else may use it.
        max_waiting: requests that may wait; more are refused.
    """

    def __init__(self, llm: LLM, *, max_waiting: int = 1024) -> None:
        self._llm = llm
        self._engine = llm._engine
        self.max_waiting = max_waiting
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._accepting = False
        self._draining = False
        self._stopping = False
        self._streams: dict[engine.Sequence, Stream] = {}
        self._delivered: dict[engine.Sequence, int] = {}
        self._deadlines: dict[engine.Sequence, float] = {}
        self._infos: dict[str, AdapterInfo] = {}
        self._submitted = 0
        self._unfinished = 0
        self._finished: Counter[str] = Counter()
        self._traffic: dict[str | None, AdapterTraffic] = {}
        self._steps: Counter[str] = Counter()

    def start(self) -> None:
        """Start the device thread."""
        if self._thread is not None:
            raise RequestError("the engine was started already; make a new one")
        self._compilations = CompilationCounter()
        self._addresses = self._llm.runner.addresses()
        self._publish()
        self._accepting = True
        self._thread = threading.Thread(target=self._serve, name="moelora-device", daemon=True)
        self._thread.start()

    async def shutdown(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Refuse new requests, end the others, and stop the thread.

        Args:
            drain: let what was submitted finish; otherwise it is cancelled.
            timeout: seconds to drain at most; what is left then is cancelled.
        """
        with self._lock:
            self._accepting = False
        if self._thread is None:
            return
        if drain:
            deadline = None if timeout is None else time.monotonic() + timeout
            while self._unfinished and (deadline is None or time.monotonic() < deadline):
                await asyncio.sleep(0.01)
        await asyncio.wrap_future(self._call(self._stop))
        await asyncio.to_thread(self._thread.join)
        self._compilations.close()

    def submit(self, request: Request) -> Stream:
        """Queue a request.

        Raises:
            RequestError: it is invalid, or the engine is not running.
            CapacityError: prompt and new tokens are longer than the cache.
            QueueFullError: too many requests wait. Nothing is queued on any error.
        """
        sequence = self._sequence(request)
        stream = Stream(request, lambda stream: self._call(lambda: self._cancel(sequence)))
        with self._lock:
            if not self._accepting:
                raise RequestError("the engine is not running, or is shutting down")
            if self._unfinished - len(self._engine.running) >= self.max_waiting:
                raise QueueFullError(
                    f"{self.max_waiting} requests are waiting; try again later or raise max_waiting"
                )
            self._unfinished += 1
            self._submitted += 1
            traffic = self._traffic.get(request.adapter, AdapterTraffic())
            self._traffic[request.adapter] = replace(
                traffic,
                requests=traffic.requests + 1,
                prompt_tokens=traffic.prompt_tokens + len(request.prompt),
            )
            self._calls.put(lambda: self._add(sequence, stream))
        return stream

    async def load_adapter(
        self,
        name: str,
        adapter: str | Path | Adapter,
        *,
        layout: str | None = None,
        pin: bool = False,
    ) -> None:
        """Load an adapter, or replace the one of that name; see :meth:`LLM.load_adapter`.

        Files are read on another thread. On any error nothing is changed.
        """
        if not isinstance(adapter, Adapter):
            adapter = await asyncio.to_thread(self._llm.read_adapter, adapter, layout=layout)
            layout = None
        arrays = adapter
        await asyncio.wrap_future(
            self._call(lambda: self._llm.load_adapter(name, arrays, layout=layout, pin=pin))
        )

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; RequestError if it is not loaded."""
        await asyncio.wrap_future(self._call(lambda: self._llm.unload_adapter(name)))

    def adapters(self) -> list[AdapterInfo]:
        """The loaded adapters."""
        return list(self._infos.values())

    def stats(self) -> EngineStats:
        """Counters and gauges of this moment."""
        counters = self._llm.runner.registry.counters
        with self._lock:
            traffic = dict(self._traffic)
        running = len(self._engine.running)
        cache = self._llm.runtime.cache
        total = cache.total_blocks(self._llm.runtime.buckets.max_sequences) - 1
        now = self._llm.runner.addresses() if not self._streams else self._addresses
        return EngineStats(
            waiting=max(0, self._unfinished - running),
            running=running,
            submitted=self._submitted,
            finished=dict(self._finished),
            prompt_tokens=sum(t.prompt_tokens for t in traffic.values()),
            generated_tokens=sum(t.generated_tokens for t in traffic.values()),
            by_adapter=traffic,
            steps=dict(self._steps),
            preemptions=0,
            prefix_hits=0,
            compilations=self._compilations.count,
            address_changes=sum(now[name] != old for name, old in self._addresses.items()),
            unplanned_reads=0,
            adapter_loads=counters.loads,
            adapter_writes=counters.device_writes,
            adapter_evictions=counters.device_evictions,
            kv_blocks_used=total - len(self._engine._free_blocks),
            kv_blocks_total=total,
            pools=self._llm.runner.pool.usage(),
        )

    # What follows runs on the device thread, unless said otherwise.

    def _call[T](self, function: Callable[[], T]) -> "Future[T]":
        """From any thread: have the device thread call a function between two steps."""
        future: Future[T] = Future()

        def call() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(call)
        return future

    def _sequence(self, request: Request) -> engine.Sequence:
        """From any thread: a checked sequence."""
        if request.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be at least 1, not {request.max_new_tokens}")
        logprobs = request.num_logprobs
        if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
            raise RequestError(f"num_logprobs must be between 0 and {MAX_LOGPROBS}, not {logprobs}")
        if request.timeout is not None and not request.timeout > 0:
            raise RequestError(f"timeout must be positive seconds, not {request.timeout}")
        return self._llm._sequences(
            [Prompt(request.prompt, request.adapter)],
            request.max_new_tokens,
            request.sampling,
            request.stop_tokens,
        )[0]

    def _serve(self) -> None:
        while not self._stopping:
            busy = bool(self._engine.waiting or self._engine.running)
            with contextlib.suppress(queue.Empty):
                self._calls.get(block=not busy)()
                while True:
                    self._calls.get_nowait()()
            self._publish()
            self._expire()
            try:
                self._engine.step()
            except Exception as error:
                self._fail(error)
            self._deliver()

    def _publish(self) -> None:
        self._infos = {info.name: info for info in self._llm.adapters()}

    def _add(self, sequence: engine.Sequence, stream: Stream) -> None:
        self._streams[sequence] = stream
        self._delivered[sequence] = 0
        if stream.request.timeout is not None:
            self._deadlines[sequence] = time.monotonic() + stream.request.timeout
        self._engine.add(sequence)

    def _deliver(self) -> None:
        for sequence, stream in list(self._streams.items()):
            new = sequence.generated[self._delivered[sequence] :]
            for number, token in enumerate(new, start=1):
                last = number == len(new)
                reason: Any = sequence.finish_reason if last else None
                stream._put(TokenOutput(token, finish_reason=reason))
                traffic = self._traffic[sequence.adapter]
                self._traffic[sequence.adapter] = replace(
                    traffic, generated_tokens=traffic.generated_tokens + 1
                )
            self._delivered[sequence] += len(new)
            if sequence.finish_reason:
                self._forget(sequence, sequence.finish_reason)

    def _forget(self, sequence: engine.Sequence, reason: str) -> None:
        del self._streams[sequence], self._delivered[sequence]
        self._deadlines.pop(sequence, None)
        self._finished[reason] += 1
        with self._lock:
            self._unfinished -= 1

    def _end(self, sequence: engine.Sequence, reason: Any) -> None:
        stream = self._streams.get(sequence)
        if stream is None:
            return
        if sequence in self._engine.running:
            self._engine._release(sequence)
        else:
            self._engine.waiting.remove(sequence)
        stream._put(TokenOutput(-1, finish_reason=reason))
        self._forget(sequence, reason)

    def _cancel(self, sequence: engine.Sequence) -> None:
        self._end(sequence, "cancelled")

    def _expire(self) -> None:
        now = time.monotonic()
        for sequence, deadline in list(self._deadlines.items()):
            if now >= deadline:
                self._end(sequence, "timeout")

    def _fail(self, error: Exception) -> None:
        """A step failed: every request ends with the error, and the engine goes on."""
        told = error if isinstance(error, MoeLoraError) else MoeLoraError(f"a step failed: {error}")
        self._engine.waiting.clear()
        for sequence in list(self._engine.running):
            self._engine._release(sequence)
        for sequence, stream in list(self._streams.items()):
            stream._put(None, told)
            self._forget(sequence, "error")

    def _stop(self) -> None:
        for sequence in list(self._streams):
            self._end(sequence, "cancelled")
        self._stopping = True
