"""Which adapters are on the device: what waiting sequences need is written between the steps."""

from collections.abc import Sequence

from moelora_jax.adapters.registry import AdapterRegistry, AdapterVersion
from moelora_jax.errors import CapacityError


class Residency:
    """Brings adapters to the device one at a time, in pieces, and says which ones are there.

    Where all room is taken by adapters whose sequences run, the one that got its last sequence
    longest ago gets no more until the adapter that waits has room. So none waits forever.

    Args:
        registry: the loaded adapters.
    """

    def __init__(self, registry: AdapterRegistry) -> None:
        self.registry = registry
        self._draining: set[str] = set()
        self._installed: dict[str, None] = {}  # new, and not asked for yet
        self._failed: dict[str, CapacityError] = {}

    def ready(self, name: str) -> AdapterVersion | None:
        """See :class:`~moelora_jax.engine.scheduler.Adapters`."""
        version = self.registry.current(name)
        if version.slot is not None:
            return None if name in self._draining else version
        if name in self._failed:
            raise self._failed[name]
        return None

    def hold(self, version: AdapterVersion) -> None:
        self.registry.hold(version)

    def release(self, version: AdapterVersion) -> None:
        self.registry.release(version)

    def installed(self, name: str) -> None:
        """A new version has the name; it is written when nothing is more urgent."""
        self._installed[name] = None

    @property
    def has_work(self) -> bool:
        """Whether there is something to write."""
        return self.registry.is_writing or bool(self._installed)

    def advance(self, wanted: Sequence[str], *, is_idle: bool) -> bool:
        """Write a piece of the adapter that is needed most.

        Args:
            wanted: adapters that sequences wait for, the most urgent first.
            is_idle: whether the device has nothing else to do; then all of an adapter is written.

        Returns:
            Whether anything was written.
        """
        self._failed.clear()
        if not self.registry.is_writing:
            self._start(wanted)
        wrote = self.registry.is_writing
        while self.registry.is_writing:
            self.registry.continue_write()
            if not is_idle:
                break
        return wrote

    def _start(self, wanted: Sequence[str]) -> None:
        """Start to write the first adapter that is needed, if there is room."""
        for name in wanted:
            if self.registry.current(name).slot is not None:
                continue  # It is on the device, and gets no new sequences for now.
            if self._try(name):
                self._draining.clear()
            elif error := self.registry.never_fits(name):
                self._failed[name] = error
                continue
            else:
                self._drain()
            return
        self._draining.clear()
        for name in list(self._installed):
            del self._installed[name]
            if name in self.registry and self.registry.current(name).slot is None:
                if self._try(name):
                    return
                if self.registry.current(name).pinned:
                    self._installed[name] = None  # Pinned: again as soon as there is room.

    def _try(self, name: str) -> bool:
        try:
            self.registry.start_write(name)
        except CapacityError:
            return False
        self._installed.pop(name, None)
        return True

    def _drain(self) -> None:
        """Once those that were chosen before have emptied, choose one more that gets no more."""
        # The one that got its last sequence longest ago comes first.
        held = [v for v in map(self.registry.current, self.registry.resident()) if v.users]
        if any(version.name in self._draining for version in held):
            return
        loose = [version.name for version in held if not version.pinned]
        self._draining.update(loose[:1])
