"""The adapters that requests may name: all in host memory, the recent ones on the device, too."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

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
        host_evictions: adapters forgotten to make room in host memory.
    """

    loads: int = 0
    device_writes: int = 0
    device_bytes: int = 0
    device_evictions: int = 0
    host_evictions: int = 0


@dataclass
class _Entry:
    packed: PackedAdapter
    pinned: bool
    slot: int | None = None


class AdapterRegistry:
    """Loaded adapters by name, over the slots and pages of a pool.

    Every loaded adapter is kept packed in host memory. Those used last are also *resident*: they
    have a slot on the device, and leave it, the least recently used first, when others need the
    room. A pinned adapter is always resident. Loading, pinning and acquiring count as use.

    A method that raises leaves the registry and the pool as they were. As with the pool, calls must
    come from one thread, or under one lock.

    Attributes:
        pool: the device memory; nothing else may write to it.
        host_limit: most bytes of packed adapters in host memory, or None.
        counters: what was done so far.
    """

    def __init__(self, pool: PagePool, host_bytes: int | None = None) -> None:
        """An empty registry.

        Args:
            pool: an empty pool.
            host_bytes: most bytes of packed adapters in host memory, resident ones included; None
                for no limit. To stay within it, adapters that are not resident are forgotten, the
                least recently used first.
        """
        self.pool = pool
        self.host_limit = host_bytes
        self.counters = Counters()
        self._entries: dict[str, _Entry] = {}  # least recently used first

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

    @property
    def host_bytes(self) -> int:
        """Bytes of all packed adapters in host memory."""
        return sum(entry.packed.num_bytes for entry in self._entries.values())

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
            CapacityError: its rank is too high, it does not fit in host memory, or it is to be
                pinned and does not fit on the device beside the other pinned adapters.
        """
        _check_name(name)
        packed = self.pool.pack(adapter)
        old = self._entries.get(name)
        entry = _Entry(packed, pinned=pin or (old is not None and old.pinned))
        try:
            evicted = self._plan_evictions({name: packed}, keep=[name])
            fits = True
        except CapacityError:
            if entry.pinned:
                raise
            evicted = [] if old is None or old.slot is None else [name]
            fits = False
        forgotten = self._plan_forgetting(name, packed, evicted)

        for other in evicted:
            self._evict(other)
        for other in forgotten:
            del self._entries[other]
        self.counters.host_evictions += len(forgotten)
        if old is not None:
            entry.slot = old.slot
            del self._entries[name]
        self._entries[name] = entry
        if fits:
            self._write(entry)
        self.counters.loads += 1

    def adapter(self, name: str) -> Adapter:
        """An adapter as it is held: its factors in the pool's dtype, its scaling as it was loaded.

        The pages of a resident adapter are read from the device. RequestError if it is not loaded.
        """
        entry = self._entry(name)
        if entry.slot is None:
            return self.pool.unpack(entry.packed)
        return self.pool.unpack(replace(entry.packed, pages=self.pool.read(entry.slot)))

    def unload(self, name: str) -> None:
        """Forgets an adapter and frees its slot, pages and host memory.

        Raises:
            RequestError: it is not loaded, or it is pinned.
        """
        entry = self._entry(name)
        if entry.pinned:
            raise RequestError(f"adapter {name!r} is pinned; unpin it before unloading it")
        if entry.slot is not None:
            self.pool.clear(entry.slot)
        del self._entries[name]

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

    def summary(self) -> str:
        """A table of where all bytes are, for people to read."""
        first = max(len("pages of width"), *(len(name) for name in self._entries), 0)
        lines = [f"{'adapter':<{first}} slot pinned rank {'device bytes':>16} {'host bytes':>16}"]
        for info in map(self.info, self._entries):
            pinned = "yes" if info.pinned else "no"
            slot, device_bytes = ("-", 0) if info.slot is None else (info.slot, info.device_bytes)
            lines.append(
                f"{info.name:<{first}} {slot:>4} {pinned:>6} {info.rank:>4} "
                f"{device_bytes:>16,} {info.host_bytes:>16,}"
            )
        lines += ["", f"{'pages of width':<{first}} {'total bytes':>16} {'used':>16} {'free':>16}"]
        for pool in self.pool.usage():
            lines.append(
                f"{pool.width:<{first}} {pool.total_bytes:>16,} {pool.used_bytes:>16,} "
                f"{pool.free_bytes:>16,}"
            )
        limit = "no limit" if self.host_limit is None else f"limit {self.host_limit:,}"
        total, tables = self.pool.total_bytes, self.pool.table_bytes
        lines += [
            "",
            f"device: {total:,} bytes, {tables:,} of them page tables",
            f"host: {self.host_bytes:,} bytes, {limit}",
        ]
        return "\n".join(lines)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            loaded = ", ".join(sorted(self._entries)) or "none"
            raise RequestError(f"adapter {name!r} is not loaded; loaded: {loaded}")
        return self._entries[name]

    def _plan_evictions(
        self, incoming: Mapping[str, PackedAdapter], keep: Collection[str]
    ) -> list[str]:
        """Which adapters must leave the device for ``incoming`` to be written; evicts none yet.

        Args:
            incoming: what is to be written, by name. The slot of a resident one counts as free.
            keep: adapters that must not leave the device.

        Raises:
            CapacityError: evicting everything that may be evicted is not enough.
        """
        slots = self.resident()
        freed = [slots[name] for name in incoming if name in slots]
        candidates = [name for name in slots if name not in keep and not self._entries[name].pinned]
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

    def _plan_forgetting(
        self, name: str, packed: PackedAdapter, evicted: Collection[str]
    ) -> list[str]:
        """Which adapters must leave host memory for ``name`` to be kept; forgets none yet.

        Args:
            name: the adapter that is being loaded.
            packed: what will be kept under that name, in place of what is kept now.
            evicted: adapters that are resident now, and will not be.

        Raises:
            CapacityError: forgetting everything that is not resident is not enough.
        """
        if self.host_limit is None:
            return []
        others = {other: entry for other, entry in self._entries.items() if other != name}
        excess = packed.num_bytes - self.host_limit
        excess += sum(entry.packed.num_bytes for entry in others.values())
        forgotten = []
        for other, entry in others.items():
            if excess <= 0:
                break
            if entry.slot is None or other in evicted:
                forgotten.append(other)
                excess -= entry.packed.num_bytes
        if excess > 0:
            raise CapacityError(
                f"adapter {name!r} takes {packed.num_bytes:,} bytes of host memory, {excess:,} "
                f"more than the limit of {self.host_limit:,} leaves beside the resident adapters; "
                "unload adapters or raise the limit"
            )
        return forgotten

    def _evict(self, name: str) -> None:
        entry = self._entries[name]
        assert entry.slot is not None
        self.pool.clear(entry.slot)
        entry.slot = None
        self.counters.device_evictions += 1

    def _write(self, entry: _Entry) -> None:
        """Writes an adapter that fits into its slot, or into the first free one if it has none."""
        if entry.slot is None:
            entry.slot = self.pool.free_slots()[0]
        self.pool.write(entry.slot, entry.packed)
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
