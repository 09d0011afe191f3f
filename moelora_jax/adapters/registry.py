"""The adapters that requests may name: all in host memory, the recent ones on the device, too."""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from moelora_jax.adapters.adapter import Adapter
from moelora_jax.adapters.pages import PackedAdapter, PagePool
from moelora_jax.errors import CapacityError, RequestError

#: Longest adapter name, in characters.
MAX_NAME_LENGTH = 256


@dataclass(frozen=True)
class AdapterInfo:
    """What is known about a loaded adapter.

    Attributes:
        name: what requests call it.
        slot: its slot on the device, or None where only the host has it.
        pinned: whether it stays on the device until it is unpinned.
        rank: its largest rank.
        layout: the file layout that it was read from.
        source: the folder that it came from.
        device_bytes: bytes of its pages, which it takes in the pools while it has a slot.
        host_bytes: bytes that it takes in host memory.
    """

    name: str
    slot: int | None
    pinned: bool
    rank: int
    layout: str
    source: str
    device_bytes: int
    host_bytes: int


@dataclass
class Counters:
    """What a registry has done since it was made.

    Attributes:
        loads: adapters loaded, reloads included.
        device_writes: adapters written to the device.
        device_bytes: bytes of the pages written to the device.
        device_evictions: adapters moved off the device to make room, or because a new version of
            them did not fit there.
    """

    loads: int = 0
    device_writes: int = 0
    device_bytes: int = 0
    device_evictions: int = 0


@dataclass(eq=False)
class AdapterVersion:
    """What was loaded under a name at one time. A reload makes a new version.

    Attributes:
        name: what requests call it.
        number: positive, and different for every version that was ever loaded.
        packed: its pages in host memory.
        pinned: whether it stays on the device.
        slot: its slot on the device, or None.
        users: how many times it is held. While it is held and has a slot, it keeps the slot, even
            if the name is loaded again or unloaded.
    """

    name: str
    number: int
    packed: PackedAdapter
    pinned: bool
    slot: int | None = None
    users: int = 0


class _Write(NamedTuple):
    """A version on its way to its slot."""

    version: AdapterVersion
    slot: int
    pieces: Iterator[None]


class AdapterRegistry:
    """Loaded adapters by name, over the slots and pages of a pool.

    Every loaded adapter is kept packed in host memory. Those used last are also *resident*: they
    have a slot on the device, and leave it, the least recently used first, when others need the
    room. A pinned adapter is always resident. Loading, pinning, acquiring and holding count as use.

    An engine that runs for long holds the version of each sequence. A version that is held keeps
    its slot, so a reload gives the new version another slot, or lets it wait in host memory; the
    old one leaves when it is released. Such an engine installs adapters without writing them, and
    writes them in pieces, one adapter at a time.

    A method that raises leaves the registry and the pool as they were. As with the pool, calls must
    come from one thread, or under one lock.

    Attributes:
        pool: the device memory; nothing else may write to it.
        max_host_bytes: host memory that the adapters may take; None for no limit.
        counters: what was done so far.
    """

    def __init__(self, pool: PagePool, *, max_host_bytes: int | None = None) -> None:
        """An empty registry over an empty pool."""
        self.pool = pool
        self.max_host_bytes = max_host_bytes
        self.counters = Counters()
        self._entries: dict[str, AdapterVersion] = {}  # least recently used first
        self._numbers = itertools.count(1)
        self._write_in_progress: _Write | None = None
        self._replaced: list[AdapterVersion] = []  # held, and no name means them any more

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> tuple[str, ...]:
        """All loaded adapters, the least recently used first."""
        return tuple(self._entries)

    def resident(self) -> dict[str, int]:
        """The slots of the adapters on the device, the least recently used first."""
        return {name: entry.slot for name, entry in self._entries.items() if entry.slot is not None}

    def info(self, name: str) -> AdapterInfo:
        """What is known about an adapter; RequestError if it is not loaded."""
        entry = self._entry(name)
        return AdapterInfo(
            name=name,
            slot=entry.slot,
            pinned=entry.pinned,
            rank=entry.packed.rank,
            layout=entry.packed.layout,
            source=entry.packed.source,
            device_bytes=entry.packed.page_bytes,
            host_bytes=entry.packed.num_bytes,
        )

    def load(self, name: str, adapter: Adapter, *, pin: bool = False) -> None:
        """Loads an adapter under a name, in place of the one that has the name, if any.

        The new version of a resident adapter takes its slot; that of a pinned adapter is pinned.
        An adapter that is not pinned and has no room beside the pinned ones stays in host memory.

        Args:
            name: printable, at most ``MAX_NAME_LENGTH`` characters, with no space at either end.
            adapter: copied; not needed afterwards.
            pin: whether to pin it.

        Raises:
            RequestError: the name is not a valid one.
            AdapterError: the adapter is not valid for the pool; see :meth:`PagePool.pack`.
            CapacityError: its rank is too high, host memory has no room for it, or it is to be
                pinned and does not fit on the device beside the other pinned adapters.
        """
        _check_name(name)
        self.finish_write()
        packed = self.pool.pack(adapter)
        self._check_host_memory(name, packed)
        old = self._entries.get(name)
        version = self._version(name, packed, pin)
        try:
            evicted = self._plan_evictions({name: packed}, keep=[name])
            fits = True
        except CapacityError:
            if version.pinned:
                raise
            evicted = [] if old is None or old.slot is None or old.users else [name]
            fits = False

        for other in evicted:
            self._evict(other)
        if old is not None and not old.users:
            version.slot = old.slot
        self._entries.pop(name, None)
        self._entries[name] = version
        if fits:
            self._write(version)
        self.counters.loads += 1

    def adapter(self, name: str) -> Adapter:
        """An adapter as it is held: its factors in the pool's dtype, its scaling as it was loaded.

        The pages of a resident adapter are read from the device. RequestError if it is not loaded.
        """
        entry = self._entry(name)
        if entry.slot is None:
            return self.pool.unpack(entry.packed)
        return self.pool.unpack(replace(entry.packed, pages=self.pool.read(entry.slot)))

    def install(self, name: str, packed: PackedAdapter, *, pin: bool = False) -> None:
        """Loads an adapter into host memory only; the device gets it by :meth:`start_write`.

        The old version leaves the device, unless it is held. A pinned adapter stays once it is
        there.

        Args:
            name: as :meth:`load`.
            packed: what ``pool.pack`` has made, which needs no lock.
            pin: whether to pin it.

        Raises:
            RequestError: the name is not a valid one.
            CapacityError: host memory has no room for it, or it is to be pinned and does not fit on
                the device beside the other pinned adapters, even once no other is held.
        """
        _check_name(name)
        self._check_host_memory(name, packed)
        old = self._entries.get(name)
        version = self._version(name, packed, pin)
        if version.pinned:
            self._check_pinned(name, packed)
        if old is not None:
            self._retire(old)
        self._entries.pop(name, None)
        self._entries[name] = version
        self.counters.loads += 1

    def current(self, name: str) -> AdapterVersion:
        """The version that a name stands for now; RequestError if it is not loaded."""
        return self._entry(name)

    def hold(self, version: AdapterVersion) -> None:
        """Lets a version that has a slot keep it until :meth:`release`."""
        assert version.slot is not None, f"adapter {version.name!r} has no slot"
        version.users += 1
        if self._entries.get(version.name) is version:
            self._entries[version.name] = self._entries.pop(version.name)

    def release(self, version: AdapterVersion) -> None:
        """Ends one :meth:`hold`; a version that nothing holds and no name means is cleared."""
        assert version.users, f"adapter {version.name!r} is not held"
        version.users -= 1
        if not version.users and self._entries.get(version.name) is not version:
            self._retire(version)

    def start_write(self, name: str) -> None:
        """Begins to make an adapter resident; :meth:`continue_write` does the rest.

        Adapters that are not held or pinned leave the device for it.

        Raises:
            RequestError: it is not loaded.
            CapacityError: it does not fit beside those that are held or pinned.
        """
        version = self._entry(name)
        assert version.slot is None and self._write_in_progress is None
        for other in self._plan_evictions({name: version.packed}, keep=[name]):
            self._evict(other)
        slot = self.pool.free_slots()[0]
        pieces = self.pool.write_in_pieces(slot, version.packed)
        self._write_in_progress = _Write(version, slot, pieces)

    def continue_write(self) -> AdapterVersion | None:
        """Writes one more piece of the adapter that is being written, if there is one.

        Returns:
            The adapter, if it is resident now.
        """
        if self._write_in_progress is None:
            return None
        version, slot, pieces = self._write_in_progress
        for _ in pieces:
            return None
        version.slot = slot
        self._count_write(version)
        self._write_in_progress = None
        return version

    def finish_write(self) -> None:
        """Writes all that is left of the adapter that is being written, if there is one."""
        while self._write_in_progress is not None:
            self.continue_write()

    @property
    def is_writing(self) -> bool:
        """Whether an adapter is being written."""
        return self._write_in_progress is not None

    def never_fits(self, name: str) -> CapacityError | None:
        """Why an adapter cannot become resident while the pinned ones stay, if it cannot."""
        try:
            self._check_pinned(name, self._entry(name).packed)
        except CapacityError as error:
            return error
        return None

    def unload(self, name: str) -> None:
        """Forgets an adapter and frees its slot, pages and host memory.

        Raises:
            RequestError: it is not loaded, or it is pinned.
        """
        entry = self._entry(name)
        if entry.pinned:
            raise RequestError(f"adapter {name!r} is pinned; unpin it before unloading it")
        del self._entries[name]
        self._retire(entry)

    def pin(self, name: str) -> None:
        """Makes an adapter resident until it is unpinned.

        Raises:
            RequestError: it is not loaded.
            CapacityError: it does not fit on the device beside the other pinned adapters.
        """
        self.acquire([name])
        self._entry(name).pinned = True

    def unpin(self, name: str) -> None:
        """Lets an adapter leave the device again; RequestError if it is not loaded."""
        self._entry(name).pinned = False

    def acquire(self, names: Iterable[str | None]) -> list[int]:
        """Makes the adapters of a batch resident together.

        Args:
            names: the adapter of each sequence, None for the base model; repetitions are fine.

        Returns:
            The slot of each sequence's adapter, -1 for None. It is valid until the next call that
            loads, unloads, pins or acquires.

        Raises:
            RequestError: an adapter is not loaded.
            CapacityError: the batch and the pinned adapters do not fit on the device together.
        """
        batch = list(names)
        self.finish_write()
        entries = {name: self._entry(name) for name in batch if name is not None}
        absent = {name: entry for name, entry in entries.items() if entry.slot is None}
        if absent:
            packed = {name: entry.packed for name, entry in absent.items()}
            for other in self._plan_evictions(packed, keep=entries):
                self._evict(other)
            for entry in absent.values():
                self._write(entry)
        for name in entries:
            self._entries[name] = self._entries.pop(name)  # now the most recently used
        slots = self.resident()
        return [-1 if name is None else slots[name] for name in batch]

    def _entry(self, name: str) -> AdapterVersion:
        if not isinstance(name, str) or name not in self._entries:
            loaded = ", ".join(sorted(self._entries)) or "none"
            raise RequestError(f"adapter {name!r} is not loaded; loaded: {loaded}")
        return self._entries[name]

    def _version(self, name: str, packed: PackedAdapter, pin: bool) -> AdapterVersion:
        """A new version, pinned if the one before it is."""
        old = self._entries.get(name)
        pinned = pin or (old is not None and old.pinned)
        return AdapterVersion(name, next(self._numbers), packed, pinned)

    def _retire(self, version: AdapterVersion) -> None:
        """Takes a version that no name means any more off the device, unless it is held."""
        if self._write_in_progress is not None and self._write_in_progress.version is version:
            self.pool.clear(self._write_in_progress.slot)
            self._write_in_progress = None
        if version.slot is None:
            return
        if version.users:
            self._replaced.append(version)
            return
        self.pool.clear(version.slot)
        version.slot = None
        if version in self._replaced:
            self._replaced.remove(version)

    def _check_host_memory(self, name: str, packed: PackedAdapter) -> None:
        """Raises CapacityError if host memory has no room for an adapter under a name."""
        if self.max_host_bytes is None:
            return
        # A version that is held stays in host memory, too, after it has been replaced.
        kept = [v for v in self._entries.values() if v.name != name or v.users] + self._replaced
        taken = sum(version.packed.num_bytes for version in kept)
        if taken + packed.num_bytes > self.max_host_bytes:
            raise CapacityError(
                f"adapter {name!r} takes {packed.num_bytes:,} bytes of host memory; beside the "
                f"{taken:,} of {len(kept)} others that is more than the {self.max_host_bytes:,} "
                "that adapters may take: unload some, or raise LoraConfig.max_host_bytes"
            )

    def _check_pinned(self, name: str, packed: PackedAdapter) -> None:
        """Raises CapacityError if an adapter never fits beside the other pinned ones."""
        # Those that wait for room are not resident, but they have the right to it.
        incoming = {
            other: v.packed for other, v in self._entries.items() if v.pinned and v.slot is None
        }
        incoming[name] = packed
        self._plan_evictions(incoming, keep=incoming, held_too=True)

    def _plan_evictions(
        self,
        incoming: Mapping[str, PackedAdapter],
        keep: Collection[str],
        *,
        held_too: bool = False,
    ) -> list[str]:
        """Which adapters must leave the device for ``incoming`` to be written; evicts none yet.

        Args:
            incoming: what is to be written, by name. The slot of a resident one counts as free,
                unless it is held.
            keep: adapters that must not leave the device.
            held_too: whether adapters that are held count as if they were not.

        Raises:
            CapacityError: evicting everything that may be evicted is not enough.
        """
        slots = self.resident()
        held = set() if held_too else {name for name in slots if self._entries[name].users}
        freed = [slots[name] for name in incoming if name in slots and name not in held]
        if held_too:
            freed += [version.slot for version in self._replaced if version.slot is not None]
            if self._write_in_progress is not None:
                freed.append(self._write_in_progress.slot)
        candidates = [
            name
            for name in slots
            if name not in keep and name not in held and not self._entries[name].pinned
        ]
        evicted: list[str] = []
        while shortage := self.pool.shortage(list(incoming.values()), clearing=freed):
            if len(evicted) == len(candidates):
                raise CapacityError(
                    f"adapters {', '.join(incoming)} do not fit on the device beside "
                    f"{len(slots) - len(freed)} that are pinned or in use: {shortage}; "
                    "unpin adapters, or raise LoraConfig.max_adapters or LoraConfig.pool_rank"
                )
            evicted.append(candidates[len(evicted)])
            freed.append(slots[evicted[-1]])
        return evicted

    def _evict(self, name: str) -> None:
        entry = self._entries[name]
        assert entry.slot is not None
        self.pool.clear(entry.slot)
        entry.slot = None
        self.counters.device_evictions += 1

    def _write(self, entry: AdapterVersion) -> None:
        """Writes an adapter that fits into its slot, or into the first free one if it has none."""
        if entry.slot is None:
            entry.slot = self.pool.free_slots()[0]
        self.pool.write(entry.slot, entry.packed)
        self._count_write(entry)

    def _count_write(self, entry: AdapterVersion) -> None:
        self.counters.device_writes += 1
        self.counters.device_bytes += entry.packed.page_bytes


def _check_name(name: object) -> None:
    valid = (
        isinstance(name, str)
        and 0 < len(name) <= MAX_NAME_LENGTH
        and name.isprintable()
        and name == name.strip()
    )
    if not valid:
        raise RequestError(
            f"adapter name {name!r} is not valid: it must be a string of 1 to {MAX_NAME_LENGTH} "
            "printable characters with no space at either end"
        )
