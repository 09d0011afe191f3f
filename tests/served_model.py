"""A server of a tiny random model, on a port of its own, for tests that talk HTTP."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from moelora_jax import LLM, BucketConfig, CacheConfig, LoraConfig, RuntimeConfig
from moelora_jax.cli.demo_files import ADAPTERS, write_demo
from moelora_jax.engine.async_engine import AsyncEngine
from moelora_jax.server.app import ServerConfig, Service
from moelora_jax.server.generation import Limits
from moelora_jax.server.serve import Server, bind
from moelora_jax.server.text import TextModel

MODEL = "tiny"
#: One bucket of each kind, so that little is compiled.
RUNTIME = RuntimeConfig(
    lora=LoraConfig(max_adapters=4, max_rank=32),
    buckets=BucketConfig(decode=(4,), prefill=(32,)),
    cache=CacheConfig(max_length=128, block_size=8),
)
MAX_WAITING = 16


@dataclass(frozen=True, eq=False)
class Served:
    """A running server."""

    server: Server
    service: Service
    llm: LLM
    port: int
    folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, Any]:
        """Status, and the body as JSON where it is. ``body`` may be bytes, which go as they are."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            sent = {"Content-Type": "application/json"} if body is not None else {}
            if key is not None:
                sent["Authorization"] = f"Bearer {key}"
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
            connection.request(method, path, body, {**sent, **(headers or {})})
            response = connection.getresponse()
            data = response.read()
            if (response.getheader("content-type") or "").startswith("application/json"):
                return response.status, json.loads(data)
            return response.status, data.decode()

    def metrics(self, key: str | None = None) -> dict[str, float]:
        """The samples of ``/metrics``, by name and labels as they are written there."""
        status, text = self.request("GET", "/metrics", key=key)
        assert status == 200, text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def wait_until_idle(self, seconds: float = 30) -> None:
        """Until the engine has nothing to do and no response is on its way."""
        wait_for(
            lambda: (
                self.service.active == 0
                and (stats := self.service.engine.stats()).running == stats.waiting == 0
            ),
            seconds,
        )


def wait_for(condition: Any, seconds: float = 30) -> None:
    """Until a condition holds; fails if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def tiny_model(folder: Path, runtime: RuntimeConfig = RUNTIME) -> LLM:
    """Writes the files of the demo and loads the model and its adapters."""
    write_demo(folder, rows=1, seed=0)
    llm = LLM.load(folder / "model", runtime=runtime)
    for name in ADAPTERS:
        llm.load_adapter(name, folder / "adapters" / name)
    llm.warm_up()
    return llm


@contextlib.contextmanager
def served(
    llm: LLM,
    folder: Path,
    *,
    max_waiting: int = MAX_WAITING,
    drain_seconds: float = 20.0,
    **config: Any,
) -> Iterator[Served]:
    """Runs a server in a thread, and drains it at the end.

    Args:
        llm: of :func:`tiny_model`.
        folder: its files.
        max_waiting: of the engine.
        drain_seconds: how long to wait at most in the end.
        config: fields of :class:`ServerConfig` that are not the default.
    """
    engine = AsyncEngine(llm, max_waiting=max_waiting)
    text_model = TextModel.load(folder / "model", llm.config.eos_tokens)
    limits = Limits(llm.runtime.cache.max_length, 60.0)
    settings = replace(ServerConfig(MODEL, limits, llm.config.vocab_size), **config)
    service = Service(engine, text_model, settings)
    engine.start()
    socket = bind("127.0.0.1", 0)
    server = Server(service, drain_seconds=drain_seconds)
    thread = threading.Thread(target=server.run, args=([socket],))
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        yield Served(server, service, llm, socket.getsockname()[1], folder)
    finally:
        server.drain()
        thread.join(30)
        assert not thread.is_alive()
