"""Runs the application: one process, until a signal; then it drains."""

import asyncio
import socket
import sys
from types import FrameType

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from moelora_jax.errors import RequestError
from moelora_jax.server.app import Service, create_app

#: Seconds that connections have to send what is already answered.
_CLOSING_SECONDS = 5

#: How long an idle connection is kept. Longer than clients keep theirs, or a request now and then
#: meets a connection that is just being closed.
_IDLE_SECONDS = 75


#: Bytes of a request that are no body, such as headers. uvicorn would keep any number.
_MAX_HEAD_BYTES = 64 * 2**10


class _Protocol(HttpToolsProtocol):
    """uvicorn's, but strangers cannot fill the memory with headers that never end."""

    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > _MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The headers have more than {_MAX_HEAD_BYTES} bytes.")

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        super().on_message_complete()


class Server(uvicorn.Server):
    """A server that drains on SIGTERM or SIGINT; a second signal ends it at once.

    While it drains it still listens: new requests are answered with 503, so that a load balancer
    sends them elsewhere, and those that run go on until they are finished or the time is over.

    Args:
        service: what is served; its engine was started.
        drain_seconds: how long to wait at most.
        announcement: printed once connections are accepted.
    """

    def __init__(
        self, service: Service, *, drain_seconds: float, announcement: str | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=_Protocol,
                lifespan="off",
                access_log=False,
                server_header=False,
                log_level="warning",
                timeout_graceful_shutdown=_CLOSING_SECONDS,
                timeout_keep_alive=_IDLE_SECONDS,
            )
        )
        self._service = service
        self._drain_seconds = drain_seconds
        self._announcement = announcement
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal or :meth:`drain`."""
        self._loop = asyncio.get_running_loop()
        try:
            await super().serve(sockets)
        finally:
            await self._service.engine.shutdown(drain=False)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self._announcement is not None:
            print(self._announcement, file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self._service.draining:
            self.force_exit = True
            super().handle_exit(sig, frame)
        else:
            self.drain()

    def drain(self) -> None:
        """Refuse new requests, finish the others, and end. Any thread may call it."""
        self._service.draining = True
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        service = self._service
        print(f"Draining {service.active} requests", file=sys.stderr, flush=True)
        deadline = asyncio.get_running_loop().time() + self._drain_seconds
        while service.active and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        if service.active:
            print(f"Giving up {service.active} requests", file=sys.stderr, flush=True)
            await service.engine.shutdown(drain=False)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket of an address, so that one that is taken is known before a model is loaded.

    Until the server runs, connections are refused.

    Raises:
        RequestError: the address cannot be used.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as cause:
        raise RequestError(f"cannot listen on {host}, port {port}: {cause}") from cause
    return bound
