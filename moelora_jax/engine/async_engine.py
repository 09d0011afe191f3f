"""The engine for servers: one thread owns the device, any thread and event loop may ask."""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from moelora_jax.adapters.adapter import Adapter
from moelora_jax.adapters.registry import AdapterInfo
from moelora_jax.buckets import CompilationCounter
from moelora_jax.engine.engine import Output
from moelora_jax.engine.llm import LLM
from moelora_jax.engine.requests import (
    AdapterTraffic,
    EngineStats,
    Request,
    TokenOutput,
    check_options,
    check_sampling,
    check_tokens,
)
from moelora_jax.engine.sequence import Sequence
from moelora_jax.engine.stream import Stream, Waiter, wake
from moelora_jax.errors import MoeLoraError, QueueFullError, RequestError

_log = logging.getLogger("moelora.engine")

#: How long the device thread sleeps when all sequences wait for something, in seconds.
_PAUSE = 0.001

#: How often a busy device thread looks whether buffers have moved, in seconds.
_ADDRESSES_PERIOD = 1.0


class AsyncEngine:
    """Serves requests of any threads and event loops on one thread that owns the device.

    A request runs with the version of its adapter that is loaded when its first token is computed,
    and keeps it to its end, even if the name is loaded again or unloaded meanwhile. A request that
    still waits when its adapter is unloaded fails.

    Example::

        engine = AsyncEngine(llm)
        engine.start()
        async for output in engine.submit(Request((1, 2, 3), "french")):
            print(output.token)
        await engine.shutdown(drain=True, timeout=None)

    Args:
        llm: the model; between :meth:`start` and :meth:`shutdown` nothing else may use it.
        max_waiting: requests that may wait beside as many as can run; more are refused.
    """

    def __init__(self, llm: LLM, *, max_waiting: int = 1024) -> None:
        self.max_waiting = max_waiting
        self._llm = llm
        self._engine = llm.engine
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopping = False
        # Of the device thread alone.
        self._streams: dict[Sequence, Stream] = {}
        self._ended: Counter[str] = Counter()
        self._num_generated = 0
        self._generated: Counter[str | None] = Counter()  # By adapter, while it is loaded.
        self._address_changes = 0
        self._addresses_seen = 0.0  # When, by the monotonic clock.
        self._written = (-1, -1)  # Writes and evictions of adapters that were published.
        # Under the lock.
        self._lock = threading.Lock()
        self._accepting = False
        self._closed = True  # Whether nobody answers calls.
        self._num_submitted = self._num_prompt_tokens = 0
        self._requests: Counter[str | None] = Counter()  # By adapter, while it is loaded.
        self._prompt_tokens: Counter[str | None] = Counter()
        # Replaced as a whole by the device thread.
        self._infos: dict[str, AdapterInfo] = {}
        self._stats: EngineStats | None = None
        self._delivered: dict[str | None, int] = {}

    def start(self) -> None:
        """Start the device thread."""
        if self._thread is not None:
            raise RequestError("the engine was started already; make a new one")
        self._compilations = CompilationCounter()
        self._addresses = self._llm.runner.addresses()
        self._publish_adapters()
        self._publish_stats()
        self._accepting, self._closed = True, False
        self._thread = threading.Thread(target=self._serve, name="moelora-device", daemon=True)
        self._thread.start()

    async def shutdown(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Refuse new requests, end the others, and stop the thread; to repeat it does nothing.

        Args:
            drain: let what was submitted finish; otherwise it is cancelled.
            timeout: seconds to drain at most; what is left then is cancelled.
        """
        with self._lock:
            self._accepting = False
        if self._thread is None or self._closed:
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        while drain and not self._closed and (deadline is None or time.monotonic() < deadline):
            stats = self.stats()
            if not stats.waiting and not stats.running:
                break
            await asyncio.sleep(0.01)
        self._call(self._stop)
        await asyncio.to_thread(self._thread.join)

    def submit(self, request: Request) -> Stream:
        """Queue a request.

        Raises:
            RequestError: it is invalid, or the engine is not running.
            CapacityError: prompt and new tokens are longer than the cache.
            QueueFullError: too many requests wait. Nothing is queued on any error.
        """
        check_options(request)
        tokens = check_tokens(
            request.prompt, request.max_new_tokens, self._llm.config, self._llm.runtime.cache
        )
        check_sampling(
            request.sampling, request.stop_tokens, request.max_new_tokens, self._llm.config
        )
        timeout = request.timeout
        sequence = Sequence(
            tokens=tokens,
            num_prompt=len(tokens),
            adapter=request.adapter,
            max_new_tokens=request.max_new_tokens,
            sampling=request.sampling,
            stop_tokens=request.stop_tokens,
            num_logprobs=request.num_logprobs,
            priority=request.priority,
            deadline=None if timeout is None else time.monotonic() + timeout,
        )
        end = self._engine.scheduler.end
        stream = Stream(request, lambda: self._call(lambda: end(sequence, "cancelled")))
        with self._lock:
            if not self._accepting:
                raise RequestError("the engine is not running, or is shutting down")
            if request.adapter is not None and not self.is_loaded(request.adapter):
                loaded = ", ".join(sorted(self._infos)) or "none"
                raise RequestError(f"adapter {request.adapter!r} is not loaded; loaded: {loaded}")
            # Those that could run may not have been seated yet.
            seats = self._llm.runtime.buckets.max_sequences
            if self._num_waiting() + self._num_running() >= self.max_waiting + seats:
                raise QueueFullError(
                    f"{self.max_waiting} requests are waiting; try again later or raise max_waiting"
                )
            self._num_submitted += 1
            self._num_prompt_tokens += len(tokens)
            self._requests[request.adapter] += 1
            self._prompt_tokens[request.adapter] += len(tokens)
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
        """Load an adapter, or a new version of the one of that name.

        When this returns, requests that start run with it. Files are read and packed on another
        thread; the device gets it between steps, in pieces, when a request needs it or at once if
        there is room. Requests that run with the version before finish with that one.

        Args:
            name: what requests call it.
            adapter: a folder, or an adapter made in memory.
            layout: of the experts in the folder; needed only if reading asks for one.
            pin: keep it on the device once it is there.

        Raises:
            AdapterError: the files are incomplete, damaged, unsupported or of another model.
            CapacityError: its rank or size exceeds the limits. Nothing is changed on any error.
        """
        packed = await asyncio.to_thread(self._llm.pack_adapter, name, adapter, layout=layout)

        def install() -> None:
            self._llm.runner.registry.install(name, packed, pin=pin)
            self._engine.residency.installed(name)
            self._publish_adapters()

        await self._on_device_thread(install)

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; RequestError if it is not loaded, or pinned.

        Requests that run with it finish; those that wait fail.
        """

        def unload() -> None:
            self._llm.runner.registry.unload(name)
            with self._lock:
                self._publish_adapters()
                for counter in (self._requests, self._prompt_tokens, self._generated):
                    del counter[name]  # Or the names of all adapters that ever were pile up.

        await self._on_device_thread(unload)

    async def pin_adapter(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter on the device from when it is there next, or let it leave again.

        Raises:
            RequestError: it is not loaded.
            CapacityError: it does not fit on the device beside the other pinned adapters.
        """

        def pin() -> None:
            registry = self._llm.runner.registry
            if not pinned:
                registry.unpin(name)
            elif error := registry.never_fits(name):
                raise error
            else:
                registry.current(name).pinned = True
                self._engine.residency.installed(name)
            self._publish_adapters()

        await self._on_device_thread(pin)

    @property
    def is_running(self) -> bool:
        """Whether requests are accepted."""
        return self._accepting

    def adapters(self) -> list[AdapterInfo]:
        """The loaded adapters, least recently used first."""
        return list(self._infos.values())

    def is_loaded(self, name: str) -> bool:
        """Whether an adapter has that name."""
        return name in self._infos

    def stats(self) -> EngineStats:
        """Counters and gauges, as they were after the last step."""
        if self._stats is None:
            raise RequestError("the engine was not started")
        with self._lock:
            stats, delivered = self._stats, self._delivered
            requests, prompts = dict(self._requests), dict(self._prompt_tokens)
            submitted, prompt_tokens = self._num_submitted, self._num_prompt_tokens
            waiting = self._num_waiting()
        return replace(
            stats,
            waiting=waiting,
            submitted=submitted,
            prompt_tokens=prompt_tokens,
            adapter_host_bytes=sum(info.host_bytes for info in self.adapters()),
            by_adapter={
                name: AdapterTraffic(count, prompts[name], delivered.get(name, 0))
                for name, count in requests.items()
            },
        )

    def _num_waiting(self) -> int:
        """Under the lock: requests that were accepted, and neither run nor have ended."""
        assert self._stats is not None
        ended = sum(self._stats.finished.values())
        return self._num_submitted - ended - self._num_running()

    def _num_running(self) -> int:
        return 0 if self._stats is None else self._stats.running

    def _call(self, function: Callable[[], None]) -> bool:
        """Have the device thread call a function between two steps; False if it has ended."""
        with self._lock:
            if not self._closed:
                self._calls.put(function)
            return not self._closed

    async def _on_device_thread(self, function: Callable[[], None]) -> None:
        """As :meth:`_call`, and wait for it."""
        future: Future[None] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return  # Whoever asked is gone.
            try:
                function()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        if not self._call(call):
            raise RequestError("the engine is not running")
        await asyncio.wrap_future(future)

    # What follows runs on the device thread.

    def _serve(self) -> None:
        failure: MoeLoraError | None = None
        try:
            while not self._stopping:
                self._run_calls()
                self._step()
        except BaseException as error:
            _log.critical("the engine has stopped", exc_info=True)
            failure = MoeLoraError(f"the engine has stopped: {error}")
        finally:
            self._close(failure)

    def _step(self) -> None:
        outputs: list[Output] = []
        failure: MoeLoraError | None = None
        try:
            outputs = self._engine.step()
        except Exception as error:
            _log.error("a step failed", exc_info=True)
            failure = MoeLoraError(f"a step failed: {error}")
        self._deliver(outputs, self._engine.scheduler.collect_ended(), failure)

    def _close(self, failure: MoeLoraError | None) -> None:
        """End what is left; from here on nobody answers calls."""
        with self._lock:
            self._accepting, self._closed = False, True
        self._stopping = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()()
        self._engine.abort("cancelled" if failure is None else "error")
        self._deliver([], self._engine.scheduler.collect_ended(), failure)
        self._compilations.close()

    def _run_calls(self) -> None:
        """Run what other threads have asked for; wait for it if there is nothing else to do."""
        with contextlib.suppress(queue.Empty):
            if not self._engine.has_work:
                self._calls.get()()
            elif not self._engine.made_progress:
                self._calls.get(timeout=_PAUSE)()
            while True:
                self._calls.get_nowait()()

    def _add(self, sequence: Sequence, stream: Stream) -> None:
        self._streams[sequence] = stream
        self._engine.add(sequence)

    def _stop(self) -> None:
        self._stopping = True

    def _deliver(
        self, outputs: Iterable[Output], ended: Iterable[Sequence], failure: MoeLoraError | None
    ) -> None:
        """Hand out tokens and ends, then count them, so that what is counted was delivered."""
        waiters: list[Waiter | None] = []
        for sequence, output in outputs:
            self._num_generated += 1
            if sequence.adapter is None or self.is_loaded(sequence.adapter):
                self._generated[sequence.adapter] += 1
            waiters.append(self._streams[sequence].put(output))
        for sequence in ended:
            stream, reason = self._streams.pop(sequence), sequence.end_reason
            assert reason is not None and reason != "scored"
            self._ended[reason] += 1
            if reason == "error":
                error = sequence.error or failure or MoeLoraError("the engine has failed")
                waiters.append(stream.fail(error))
            elif reason in ("cancelled", "timeout"):
                waiters.append(stream.put(TokenOutput(-1, finish_reason=reason)))
        self._publish_stats()
        wake(waiters)

    def _publish_adapters(self) -> None:
        self._infos = {info.name: info for info in self._llm.adapters()}

    def _publish_stats(self) -> None:
        engine, runner = self._engine, self._llm.runner
        scheduler, adapters = engine.scheduler, runner.registry.counters
        written = adapters.device_writes, adapters.device_evictions
        if written != self._written:
            self._written = written
            self._publish_adapters()
        now = time.monotonic()
        if now - self._addresses_seen >= _ADDRESSES_PERIOD or not engine.has_work:
            self._addresses_seen = now
            self._count_address_changes()
        stats = EngineStats(
            waiting=0,
            running=len(scheduler.running),
            submitted=0,
            finished=dict(self._ended),
            prompt_tokens=0,
            generated_tokens=self._num_generated,
            by_adapter={},  # Made when somebody asks.
            steps=dict(scheduler.steps),
            preemptions=scheduler.preemptions,
            prefix_hits=scheduler.prefix_hits,
            compilations=self._compilations.count,
            address_changes=self._address_changes,
            unplanned_reads=engine.unplanned_reads,
            adapter_loads=adapters.loads,
            adapter_writes=adapters.device_writes,
            adapter_evictions=adapters.device_evictions,
            adapter_host_bytes=0,
            kv_blocks_used=scheduler.blocks.num_used,
            kv_blocks_remembered=scheduler.blocks.num_remembered,
            kv_blocks_total=scheduler.blocks.total,
            pools=runner.pool.usage(),
        )
        delivered = dict(self._generated)
        with self._lock:
            self._stats, self._delivered = stats, delivered

    def _count_address_changes(self) -> None:
        """Takes some microseconds, so not after every step."""
        addresses = self._llm.runner.addresses()
        for name, old in self._addresses.items():
            self._address_changes += sum(
                before != after for before, after in zip(old, addresses[name], strict=True)
            )
        self._addresses = addresses
