"""Sends a planned load to a server, or where else it is told, and takes the times."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Protocol

from moelora_jax.errors import MissingPackageError, RequestError
from moelora_jax.load_test.workload import PlannedRequest


@dataclass
class Outcome:
    """What became of a request. Times are seconds after the beginning of the load.

    Attributes:
        planned: the request.
        sent: when it was sent; later than planned if the client did not keep up.
        token_times: when tokens came. Of a server, when its events came: one that sends none for
            a token without text makes its first tokens late, and the others fast.
        num_tokens: that were generated.
        error: why it failed, or None.
    """

    planned: PlannedRequest
    sent: float = 0.0
    token_times: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str | None = None

    @property
    def time_to_first_token(self) -> float:
        """Seconds from when it was to be sent: what a client that is late waits, too, counts."""
        return self.token_times[0] - self.planned.time

    @property
    def duration(self) -> float:
        """Seconds from when it was to be sent until its last token."""
        return self.token_times[-1] - self.planned.time

    @property
    def inter_token_latencies(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return [after - before for before, after in pairwise(self.token_times)]

    @property
    def time_per_token(self) -> float:
        """Mean seconds for each token after the first."""
        return (self.token_times[-1] - self.token_times[0]) / max(1, self.num_tokens - 1)


class Target(Protocol):
    """Where a load goes."""

    async def run(self, outcome: Outcome, clock: Callable[[], float]) -> None:
        """Send the request and fill in what becomes of it."""


class ServerTarget(AbstractAsyncContextManager["ServerTarget"]):
    """A server with the OpenAI API that takes tokens as prompts, and ``ignore_eos`` as vLLM does.

    Args:
        url: as in ``http://127.0.0.1:8000``.
        api_key: sent with every request.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._session: Any = None
        self._base_model = ""

    async def __aenter__(self) -> "ServerTarget":
        try:
            import aiohttp
        except ModuleNotFoundError as cause:
            what = f"{cause}; loading a server needs more packages"
            raise MissingPackageError(what, "bench") from cause
        # As many connections as requests: the load must not wait for one. Many servers close those
        # that are idle for 5 seconds; a request must not meet one that is just being closed.
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def models(self) -> tuple[list[str], int | None]:
        """The adapters that the server has, and how large its vocabulary is if it says so.

        Raises:
            RequestError: it does not answer as such a server does.
        """
        import aiohttp

        try:
            async with self._session.get(f"{self._url}/v1/models") as response:
                response.raise_for_status()
                cards = (await response.json())["data"]
            (base,) = [card for card in cards if card.get("parent") is None]
        except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError) as cause:
            raise RequestError(
                f"{self._url}/v1/models does not list one base model and its adapters: {cause}"
            ) from cause
        self._base_model = base["id"]
        return [card["id"] for card in cards if card is not base], base.get("vocab_size")

    async def run(self, outcome: Outcome, clock: Callable[[], float]) -> None:
        """Stream a completion."""
        import aiohttp

        planned = outcome.planned
        body = {
            "model": planned.adapter or self._base_model,
            "prompt": planned.prompt,
            "max_tokens": planned.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
                if response.status != 200:
                    outcome.error = f"HTTP {response.status}"
                    return
                done = False
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        self._take(outcome, json.loads(line[6:]), clock())
                    done = done or line.startswith(b"data: [DONE]")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            outcome.error = type(error).__name__
            return
        if outcome.error is None and not (done and outcome.token_times):
            outcome.error = "cut off"
        # A server that does not tell their number is taken at its events.
        outcome.num_tokens = outcome.num_tokens or len(outcome.token_times)

    def _take(self, outcome: Outcome, event: dict[str, Any], now: float) -> None:
        if "error" in event:
            outcome.error = str(event["error"].get("code"))
        elif event["choices"]:
            outcome.token_times.append(now)
        elif event.get("usage"):
            outcome.num_tokens = event["usage"]["completion_tokens"]


async def run_load(
    plan: Sequence[PlannedRequest],
    target: Target,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Outcome]:
    """Send every request at its time, however many are still running, and wait for all.

    Args:
        plan: in the order of time.
        target: where to.
        progress: told how many have ended.
    """
    start = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - start

    outcomes = [Outcome(planned) for planned in plan]
    ended = 0

    async def send(outcome: Outcome) -> None:
        nonlocal ended
        outcome.sent = clock()
        await target.run(outcome, clock)
        ended += 1
        progress(ended)

    async with asyncio.TaskGroup() as tasks:
        for outcome in outcomes:
            await asyncio.sleep(outcome.planned.time - clock())
            tasks.create_task(send(outcome))
    return outcomes
