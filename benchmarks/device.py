"""Sharing one device among processes that compile side by side."""

import fcntl
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


class Device:
    """Keeps processes that share a device from disturbing each other's measurements."""

    def __init__(self, lock: str) -> None:
        self.lock = lock

    @contextmanager
    def _hold(self, kind: int) -> Iterator[None]:
        with open(self.lock, "w") as file:
            fcntl.flock(file, kind)
            yield

    def shared(self) -> AbstractContextManager[None]:
        """For work on the device that is not measured."""
        return self._hold(fcntl.LOCK_SH)

    def alone(self) -> AbstractContextManager[None]:
        """For measurements."""
        return self._hold(fcntl.LOCK_EX)
