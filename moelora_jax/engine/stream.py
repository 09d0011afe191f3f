"""The tokens of one request, from the device thread to whoever asked."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from moelora_jax.engine.requests import Request, TokenOutput
from moelora_jax.errors import MoeLoraError

type Waiter = tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]


class Stream:
    """The tokens of one request, as they come: an async iterator, and a blocking one for threads.

    Made by :meth:`~moelora_jax.engine.async_engine.AsyncEngine.submit`. One consumer reads it. The
    last output has a finish reason; a request that fails raises its :class:`MoeLoraError` after the
    tokens that came before.
    """

    def __init__(self, request: Request, cancel: Callable[[], object]) -> None:
        self.request = request
        self._cancel = cancel
        self._changed = threading.Condition()
        self._outputs: deque[TokenOutput] = deque()
        self._ended = False
        self._error: MoeLoraError | None = None
        self._waiter: Waiter | None = None

    def cancel(self) -> None:
        """End the request soon; its stream ends with ``cancelled`` unless it ended before."""
        self._cancel()

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

    def put(self, output: TokenOutput) -> Waiter | None:
        """Device thread: one more output; nothing comes after one with a finish reason.

        Returns:
            Who waits for it on an event loop, for :func:`wake`.
        """
        return self._put(output, ends=output.finish_reason is not None)

    def fail(self, error: MoeLoraError) -> Waiter | None:
        """Device thread: the end, by an error; returns as :meth:`put`."""
        self._error = error
        return self._put(None, ends=True)

    def _put(self, output: TokenOutput | None, *, ends: bool) -> Waiter | None:
        with self._changed:
            if output is not None:
                self._outputs.append(output)
            self._ended = ends
            waiter, self._waiter = self._waiter, None
            self._changed.notify()
        return waiter


def wake(waiters: Iterable[Waiter | None]) -> None:
    """Wake what waits on event loops, each loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for waiter in waiters:
        if waiter is not None:
            by_loop.setdefault(waiter[0], []).append(waiter[1])
    for loop, futures in by_loop.items():
        with contextlib.suppress(RuntimeError):  # The loop was closed, and its tasks with it.
            loop.call_soon_threadsafe(_finish, futures)


def _finish(futures: Iterable["asyncio.Future[None]"]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
