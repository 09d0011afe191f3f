"""Device memory of the resident adapters: pools of pages, their allocator, and the page tables.

A page is ``PAGE_ROWS`` rank rows of one factor (:class:`~moelora_kernels.types.SitePages`). All
factors of one width share one pool, whichever site, layer and expert they belong to. An adapter
occupies one *slot*: one index of the adapters axis of every page table.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moelora_jax.adapters.adapter import Adapter, LowRankUpdate, Target, factor_key
from moelora_jax.config import LoraConfig, LoraSite, pages_of_rank
from moelora_jax.errors import AdapterError, CapacityError
from moelora_kernels.types import PAGE_ROWS, SitePages

#: Pages travel to the device in chunks of this many bytes at most, so that one compiled program per
#: pool writes an adapter of any size.
CHUNK_BYTES = 16 * 2**20

# Factors that a thread packs at a time: a few take too little time to be worth a task.
_FACTORS_PER_TASK = 32

# Index of the factor in the second axis of a page table.
_A, _B = 0, 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class SiteTable[ArrayT: (np.ndarray, jax.Array)]:
    """The page table of one site, on the host or on the device, for all slots or for one.

    Attributes:
        pages: int32 ``[layers, 2, adapters, pages, experts]``: the pool row of each page, -1 where
            there is none. Index ``i`` of the first axis is layer ``site.layers[i]``. The table of
            one slot has no adapters axis.
        scaling: float32 ``[layers, adapters, experts]``, likewise.
    """

    pages: ArrayT
    scaling: ArrayT


class DevicePages(NamedTuple):
    """All device arrays of a pool, each once: what a program is called with.

    Attributes:
        pools: for every width, ``[pages, 16, width]``.
        tables: for every site, page table and scaling of all slots, as in :class:`SiteTable`.
    """

    pools: dict[int, jax.Array]
    tables: dict[str, tuple[jax.Array, jax.Array]]


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter as pages in host memory, ready to be copied into the pool that packed it.

    Attributes:
        layout: the file layout that the adapter was read from.
        source: the folder that it came from, for messages.
        rank: its largest rank.
        pages: for every pool width, ``[pages, 16, width]`` in the pool's dtype, read-only.
        tables: for every site, the table of one slot, whose entries number the pages in ``pages``.
        ranks: for every site, int32 ``[layers, experts]``: the rank of each update, 0 where there
            is none.
        scalings: for every site, float64 ``[layers, experts]``: what ``tables`` has in float32.
    """

    layout: str
    source: str
    rank: int
    pages: Mapping[int, np.ndarray]
    tables: Mapping[str, SiteTable[np.ndarray]]
    ranks: Mapping[str, np.ndarray]
    scalings: Mapping[str, np.ndarray]

    @property
    def pages_by_width(self) -> dict[int, int]:
        """Pages that the adapter takes in the pool of each width."""
        return {width: len(pages) for width, pages in self.pages.items()}

    @property
    def page_bytes(self) -> int:
        """Bytes of the pages: what the adapter takes in the pools while it is resident."""
        return sum(pages.nbytes for pages in self.pages.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of pages and tables: what the adapter takes in host memory."""
        tables = jax.tree.leaves((self.tables, self.ranks, self.scalings))
        return self.page_bytes + sum(array.nbytes for array in tables)


class PoolUsage(NamedTuple):
    """How full the pool of one width is.

    Attributes:
        width: numbers in one rank row.
        page_bytes: bytes of one page.
        total_pages: pages in the pool.
        used_pages: pages that belong to a slot.
    """

    width: int
    page_bytes: int
    total_pages: int
    used_pages: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all pages."""
        return self.total_pages * self.page_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages that belong to a slot."""
        return self.used_pages * self.page_bytes


class PageAllocator:
    """Which rows of a pool are free. The lowest go first, so equal histories give equal rows."""

    def __init__(self, total: int) -> None:
        self._free = np.ones(total, dtype=bool)

    @property
    def total(self) -> int:
        """Rows of the pool."""
        return len(self._free)

    @property
    def num_free(self) -> int:
        """Rows that are free."""
        return int(np.count_nonzero(self._free))

    def allocate(self, count: int) -> np.ndarray:
        """Takes the ``count`` lowest free rows.

        Returns:
            int32 ``[count]``, ascending.

        Raises:
            CapacityError: fewer rows are free; nothing is taken.
        """
        rows = np.flatnonzero(self._free)
        if count > len(rows):
            raise CapacityError(f"{count} pages are needed, {len(rows)} of {self.total} are free")
        rows = rows[:count].astype(np.int32)
        self._free[rows] = False
        return rows

    def free(self, rows: np.ndarray) -> None:
        """Gives rows back.

        Raises:
            ValueError: a row is outside the pool, given twice, or already free; nothing is changed.
        """
        if len(rows) == 0:
            return
        if rows.min() < 0 or rows.max() >= self.total:
            raise ValueError(f"rows {rows.tolist()} are not all in a pool of {self.total} pages")
        if len(np.unique(rows)) != len(rows) or self._free[rows].any():
            raise ValueError(f"double free among rows {rows.tolist()}")
        self._free[rows] = True


def factors_by_width(sites: Iterable[LoraSite]) -> dict[int, int]:
    """Factors of each width in an adapter that changes every layer and expert of every site."""
    factors: dict[int, int] = {}
    for site in sites:
        for width in (site.in_features, site.out_features):
            factors[width] = factors.get(width, 0) + len(site.layers) * site.table_experts
    return factors


def pool_pages(sites: Iterable[LoraSite], lora: LoraConfig) -> dict[int, int]:
    """Pages in the pool of each width.

    There is room for ``max_adapters`` adapters with factors of rank ``pool_rank`` for every layer
    and expert of every site, and at least for one such adapter of rank ``max_rank``: anything that
    can be packed fits into an empty pool.
    """
    pages_per_factor = max(
        lora.max_adapters * pages_of_rank(lora.pool_rank), pages_of_rank(lora.max_rank)
    )
    return {width: count * pages_per_factor for width, count in factors_by_width(sites).items()}


def pool_bytes(
    sites: Sequence[LoraSite], lora: LoraConfig, dtype: DTypeLike
) -> tuple[dict[int, int], int]:
    """What a :class:`PagePool` will allocate on the device.

    Returns:
        Bytes of the pool of each width, and of all page tables and scalings.
    """
    enabled = lora.select(tuple(sites))
    page = PAGE_ROWS * jnp.dtype(dtype).itemsize
    pools = {width: count * width * page for width, count in pool_pages(enabled, lora).items()}
    entries = (
        len(site.layers) * lora.max_adapters * site.table_experts * (2 * lora.max_pages + 1)
        for site in enabled
    )
    return pools, sum(entries) * np.dtype(np.int32).itemsize


class PagePool:
    """The pages and page tables of all resident adapters, at fixed addresses on the device.

    Every write donates the array that it changes and gets it back at the same address. A slot is
    never read while it is being written: JAX runs a donated update after all computations on the
    device that were enqueued before it, and computations enqueued later see its result. The caller
    has one duty: to take :meth:`device_state` anew after every write, because older arrays were
    donated. Calls must come from one thread, or under one lock.

    On the CPU a NumPy view of a pool (``np.asarray``) holds on to its memory, and the next write
    then has to move the pool. Copy on the device first (``jnp.copy``).

    Attributes:
        sites: the sites that have pages.
        lora: the limits.
        dtype: of the pages.
        pools: for every width, ``[pages, 16, width]`` on the device, shared by all sites that have
            that width.
        tables: for every site, the page table of all slots in host memory: the source of truth, of
            which the device holds a copy.
    """

    def __init__(self, sites: Sequence[LoraSite], lora: LoraConfig, dtype: DTypeLike) -> None:
        """Allocates everything, with no adapter resident.

        Args:
            sites: the model's sites, with unique names.
            lora: which of them are enabled, and the limits that decide all shapes.
            dtype: a floating dtype, the compute dtype of the model.

        Raises:
            ValueError: the dtype is not floating, site names repeat, or ``lora`` enables a site
                that is not among ``sites``.
        """
        self.sites = lora.select(tuple(sites))
        self.lora = lora
        self.dtype = jnp.dtype(dtype)
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"pages must have a floating dtype, not {self.dtype}")
        self._site_of_name = {site.name: site for site in self.sites}
        if len(self._site_of_name) != len(self.sites):
            raise ValueError(f"site names repeat: {[site.name for site in self.sites]}")
        self._option_of_site = {
            site.name: "optional_sites" if site.optional else "sites" for site in sites
        }

        totals = pool_pages(self.sites, lora)
        self._allocators = {width: PageAllocator(total) for width, total in totals.items()}
        self._rows_of_slot: dict[int, dict[int, np.ndarray]] = {}
        self._chunk_pages = {
            width: max(1, min(total, CHUNK_BYTES // self._page_bytes(width)))
            for width, total in totals.items()
        }
        self.pools = {
            width: jnp.zeros((total, PAGE_ROWS, width), self.dtype)
            for width, total in totals.items()
        }
        self.tables = {
            site.name: _empty_table(site, lora.max_pages, lora.max_adapters) for site in self.sites
        }
        # jnp.array copies: on the CPU jnp.asarray may keep reading the host table, which changes.
        self._device_tables: dict[str, SiteTable[jax.Array]] = {
            name: SiteTable(jnp.array(table.pages), jnp.array(table.scaling))
            for name, table in self.tables.items()
        }

    def warm_up(self) -> None:
        """Runs every program that writes, without effect; no write compiles anything after it."""
        for width in self.pools:
            nothing = np.empty((0, PAGE_ROWS, width), self.dtype)
            self._write_chunk(width, np.empty(0, np.int32), nothing)
        self._write_table(0, self._table_of_slot(0))

    def device_pages(self) -> DevicePages:
        """The current device arrays, each once, for a jitted program; the next write ends them."""
        tables = {name: (t.pages, t.scaling) for name, t in self._device_tables.items()}
        return DevicePages(self.pools, tables)

    def by_site(self, pages: DevicePages) -> dict[str, SitePages]:
        """The arrays of :meth:`device_pages` as kernels take them; also inside a program."""
        return {
            site.name: SitePages(
                a_pool=pages.pools[site.in_features],
                b_pool=pages.pools[site.out_features],
                table=pages.tables[site.name][0],
                scaling=pages.tables[site.name][1],
            )
            for site in self.sites
        }

    def device_state(self) -> dict[str, SitePages]:
        """The current device arrays by site name; the next write ends them."""
        return self.by_site(self.device_pages())

    def pack(self, adapter: Adapter) -> PackedAdapter:
        """Validates an adapter and lays its factors out as pages, in host memory only.

        A factor that several updates share, in the same memory, is stored once.

        Raises:
            AdapterError: an update is of a site, layer or expert that has no pages here, its
                factors have the wrong shape, a number is not finite in the pool's dtype, or copies
                of base weights were not compared with the model.
            CapacityError: a rank is above ``lora.max_rank``.
        """
        tables = {site.name: _empty_table(site, self.lora.max_pages) for site in self.sites}
        ranks = {name: np.zeros(t.scaling.shape, np.int32) for name, t in tables.items()}
        scalings = {name: np.zeros(t.scaling.shape, np.float64) for name, t in tables.items()}
        factors: dict[int, list[_Factor]] = {width: [] for width in self.pools}
        num_pages = dict.fromkeys(self.pools, 0)
        numbers_of_factor: dict[tuple[object, ...], np.ndarray] = {}
        for name in adapter.base_weights:
            raise AdapterError(
                f"adapter from {adapter.source}: it holds a copy of the base model's {name}, which "
                "must be compared with the model: use Adapter.compared, or load it with LLM"
            )

        for target, update in adapter.updates.items():
            site = self._check_update(adapter, target, update)
            row, table = site.layers.index(target.layer), tables[site.name]
            table.scaling[row, target.expert] = update.scaling
            scalings[site.name][row, target.expert] = update.scaling
            ranks[site.name][row, target.expert] = update.rank
            count = pages_of_rank(update.rank)
            for side, rows in enumerate(update.factors):
                key = factor_key(rows)
                if key not in numbers_of_factor:
                    width = rows.shape[1]
                    first = num_pages[width]
                    numbers_of_factor[key] = np.arange(first, first + count, dtype=np.int32)
                    num_pages[width] += count
                    factors[width].append(_Factor(rows, target, side, first))
                table.pages[row, side, :count, target.expert] = numbers_of_factor[key]

        pages = {
            width: self._pack_pages(adapter, factors[width], num_pages[width], width)
            for width in self.pools
        }
        return PackedAdapter(
            layout=adapter.layout,
            source=adapter.source,
            rank=adapter.max_rank,
            pages=pages,
            tables=tables,
            ranks=ranks,
            scalings=scalings,
        )

    def unpack(self, packed: PackedAdapter) -> Adapter:
        """The inverse of :meth:`pack`: factors in the pool's dtype, shared ones the same memory."""
        factors: dict[tuple[int, int, int], np.ndarray] = {}

        def rows_of(width: int, numbers: np.ndarray, rank: int) -> np.ndarray:
            key = width, int(numbers[0]), rank
            if key not in factors:
                numbers = numbers[: pages_of_rank(rank)]
                factors[key] = packed.pages[width][numbers].reshape(-1, width)[:rank]
            return factors[key]

        updates = {}
        for site in self.sites:
            pages, ranks = packed.tables[site.name].pages, packed.ranks[site.name]
            for row, expert in np.argwhere(ranks).tolist():
                rank = int(ranks[row, expert])
                updates[Target(site.layers[row], site.name, expert)] = LowRankUpdate(
                    a=rows_of(site.in_features, pages[row, _A, :, expert], rank),
                    b=rows_of(site.out_features, pages[row, _B, :, expert], rank).T,
                    scaling=float(packed.scalings[site.name][row, expert]),
                )
        return Adapter(packed.layout, updates, packed.source)

    def shortage(self, packed: Collection[PackedAdapter], clearing: Collection[int] = ()) -> str:
        """What is missing to write all of ``packed`` once the slots ``clearing`` are cleared.

        Returns:
            The missing slots and pages in words, with numbers; empty if everything fits.
        """
        freed = [self._rows_of_slot[slot] for slot in set(clearing) if slot in self._rows_of_slot]
        missing = []
        free_slots = len(self.free_slots()) + len(freed)
        if len(packed) > free_slots:
            missing.append(
                f"{len(packed)} slots are needed, {free_slots} of {self.lora.max_adapters} are free"
            )
        for width, allocator in self._allocators.items():
            needed = sum(adapter.pages_by_width[width] for adapter in packed)
            free = allocator.num_free + sum(len(rows[width]) for rows in freed)
            if needed > free:
                missing.append(
                    f"{needed} pages of width {width} are needed, "
                    f"{free} of {allocator.total} are free"
                )
        return "; ".join(missing)

    def write(self, slot: int, packed: PackedAdapter) -> None:
        """Makes an adapter resident in a slot, in place of the adapter that is there, if any.

        Raises:
            CapacityError: its pages do not fit, the slot's present ones counted as free; nothing is
                changed.
        """
        for _ in self.write_in_pieces(slot, packed):
            pass

    def write_in_pieces(self, slot: int, packed: PackedAdapter) -> Iterator[None]:
        """As :meth:`write`, but other work may go on between the pieces.

        The slot is emptied and the pages are taken at once; until the last piece was written the
        slot reads as empty. To give up, stop iterating and :meth:`clear` the slot.

        Returns:
            Writes at most ``CHUNK_BYTES`` each time it is advanced.

        Raises:
            CapacityError: as :meth:`write`.
        """
        self._check_slot(slot)
        if shortage := self.shortage([packed], clearing=[slot]):
            raise CapacityError(
                f"adapter from {packed.source} does not fit: {shortage}; "
                "clear other slots or raise LoraConfig.pool_rank"
            )
        self.clear(slot)
        rows = {
            width: self._allocators[width].allocate(count)
            for width, count in packed.pages_by_width.items()
        }
        self._rows_of_slot[slot] = rows
        return self._write_pieces(slot, packed, rows)

    def _write_pieces(
        self, slot: int, packed: PackedAdapter, rows: Mapping[int, np.ndarray]
    ) -> Iterator[None]:
        # Pages first: until the table names them, no computation reads them.
        for width, pages in packed.pages.items():
            chunk = self._chunk_pages[width]
            for start in range(0, len(pages), chunk):
                part = slice(start, start + chunk)
                self._write_chunk(width, rows[width][part], pages[part])
                yield
        self._write_table(slot, self._place(packed.tables, rows))

    def clear(self, slot: int) -> None:
        """Empties a slot and frees its pages; an empty slot stays as it is."""
        self._check_slot(slot)
        if slot not in self._rows_of_slot:
            return
        # The table first: from here on no computation reads the pages.
        empty = {site.name: _empty_table(site, self.lora.max_pages) for site in self.sites}
        self._write_table(slot, empty)
        for width, rows in self._rows_of_slot.pop(slot).items():
            self._allocators[width].free(rows)

    def read(self, slot: int) -> dict[int, np.ndarray]:
        """Copies the pages of a slot from the device: ``pages`` of the packed adapter in it."""
        self._check_slot(slot)
        copies = {}
        for width, rows in self._rows_of_slot[slot].items():
            chunk = self._chunk_pages[width]
            parts = [
                np.asarray(self.pools[width][rows[start : start + chunk]])
                for start in range(0, len(rows), chunk)
            ]
            nothing = np.empty((0, PAGE_ROWS, width), self.dtype)
            copies[width] = np.concatenate([nothing, *parts])
        return copies

    def free_slots(self) -> list[int]:
        """Slots that hold no adapter, ascending."""
        return [slot for slot in range(self.lora.max_adapters) if slot not in self._rows_of_slot]

    def usage(self) -> tuple[PoolUsage, ...]:
        """How full each pool is, in order of the sites."""
        return tuple(
            PoolUsage(
                width=width,
                page_bytes=self._page_bytes(width),
                total_pages=allocator.total,
                used_pages=allocator.total - allocator.num_free,
            )
            for width, allocator in self._allocators.items()
        )

    @property
    def table_bytes(self) -> int:
        """Bytes of all page tables and scalings on the device, the same for any set of adapters."""
        return sum(array.nbytes for array in jax.tree.leaves(self.tables))

    def _page_bytes(self, width: int) -> int:
        return PAGE_ROWS * width * self.dtype.itemsize

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.lora.max_adapters:
            raise ValueError(f"slot {slot} is not within the {self.lora.max_adapters} slots")

    def _check_update(self, adapter: Adapter, target: Target, update: LowRankUpdate) -> LoraSite:
        """The site of an update that can be packed; raises as :meth:`pack` does for any other."""
        where = adapter.describe(target)
        site = self._site_of_name.get(target.site)
        if site is None:
            enabled = ", ".join(self._site_of_name)
            option = self._option_of_site.get(target.site)
            hint = f"add it to LoraConfig.{option}; " if option else ""
            raise AdapterError(f"{where}: the site has no pages; {hint}enabled sites: {enabled}")
        adapter.check(target, site)
        if not abs(update.scaling) <= float(np.finfo(np.float32).max):  # false for NaN, too
            raise AdapterError(f"{where}: scaling {update.scaling} is not finite in float32")
        if update.rank > self.lora.max_rank:
            raise CapacityError(
                f"{where}: rank {update.rank} is above LoraConfig.max_rank {self.lora.max_rank}; "
                f"raise max_rank to at least {adapter.max_rank}"
            )
        return site

    def _pack_pages(
        self, adapter: Adapter, factors: Sequence["_Factor"], num_pages: int, width: int
    ) -> np.ndarray:
        """The pages of all factors of one width ``[pages, 16, width]``, read-only."""
        packed = np.zeros((num_pages * PAGE_ROWS, width), self.dtype)

        def pack(some: Sequence[_Factor]) -> None:
            for factor in some:
                with np.errstate(over="ignore", invalid="ignore"):
                    rows = factor.rows.astype(self.dtype)
                # After the cast: what is finite in the file may overflow in the pool's dtype.
                if not np.isfinite(rows).all():
                    raise AdapterError(
                        f"{adapter.describe(factor.target)}: {'AB'[factor.side]} has numbers "
                        f"that are not finite in {self.dtype}"
                    )
                start = factor.first_page * PAGE_ROWS
                packed[start : start + len(rows)] = rows

        with ThreadPoolExecutor() as threads:
            list(threads.map(pack, itertools.batched(factors, _FACTORS_PER_TASK)))
        packed.flags.writeable = False
        return packed.reshape(num_pages, PAGE_ROWS, width)

    def _place(
        self, tables: Mapping[str, SiteTable[np.ndarray]], rows: Mapping[int, np.ndarray]
    ) -> dict[str, SiteTable[np.ndarray]]:
        """Tables of a packed adapter with its page numbers replaced by pool rows."""
        # One -1 is appended to the rows, so that the page number -1, "none", maps to itself.
        row_of_number = {width: np.append(r, np.int32(-1)) for width, r in rows.items()}
        placed = {}
        for site in self.sites:
            table = tables[site.name]
            a_rows = row_of_number[site.in_features][table.pages[:, _A]]
            b_rows = row_of_number[site.out_features][table.pages[:, _B]]
            placed[site.name] = SiteTable(np.stack([a_rows, b_rows], axis=1), table.scaling)
        return placed

    def _table_of_slot(self, slot: int) -> dict[str, SiteTable[np.ndarray]]:
        return {
            name: SiteTable(table.pages[:, :, slot].copy(), table.scaling[:, slot].copy())
            for name, table in self.tables.items()
        }

    def _write_table(self, slot: int, tables: dict[str, SiteTable[np.ndarray]]) -> None:
        """Writes the tables of one slot, all sites at once, on the host and on the device."""
        for name, table in tables.items():
            self.tables[name].pages[:, :, slot] = table.pages
            self.tables[name].scaling[:, slot] = table.scaling
        self._device_tables = _set_slot(self._device_tables, np.int32(slot), tables)

    def _write_chunk(self, width: int, rows: np.ndarray, pages: np.ndarray) -> None:
        """Writes at most a chunk of pages ``[count, 16, width]`` into the pool rows ``[count]``."""
        chunk, count = self._chunk_pages[width], len(rows)
        if count < chunk:
            # Rows past the end of the pool are dropped. They differ, as do all rows of a chunk.
            past_end = self._allocators[width].total + np.arange(chunk - count, dtype=np.int32)
            rows = np.concatenate([rows, past_end])
            padded = np.zeros((chunk, PAGE_ROWS, width), self.dtype)
            padded[:count] = pages
            pages = padded
        self.pools[width] = _set_pages(self.pools[width], rows, pages)


class _Factor(NamedTuple):
    """A factor to be packed.

    Attributes:
        rows: its rank rows ``[rank, width]``.
        target: the first update that has it.
        side: ``_A`` or ``_B``.
        first_page: number of the page where it begins.
    """

    rows: np.ndarray
    target: Target
    side: int
    first_page: int


def _empty_table(
    site: LoraSite, max_pages: int, max_adapters: int | None = None
) -> SiteTable[np.ndarray]:
    """A table without pages: of all slots, or of one if ``max_adapters`` is not given."""
    layers, experts = len(site.layers), site.table_experts
    adapters = () if max_adapters is None else (max_adapters,)
    return SiteTable(
        pages=np.full((layers, 2, *adapters, max_pages, experts), -1, np.int32),
        scaling=np.zeros((layers, *adapters, experts), np.float32),
    )


@partial(jax.jit, donate_argnames="pool")
def _set_pages(pool: jax.Array, rows: jax.Array, pages: jax.Array) -> jax.Array:
    """Writes ``pages [chunk, 16, width]`` in place into distinct ``rows [chunk]`` of the pool."""
    return pool.at[rows].set(pages, mode="drop", unique_indices=True)


@partial(jax.jit, donate_argnames="tables")
def _set_slot(
    tables: dict[str, SiteTable[jax.Array]],
    slot: jax.Array,
    values: dict[str, SiteTable[jax.Array]],
) -> dict[str, SiteTable[jax.Array]]:
    """Writes the tables of one slot in place into the tables of all slots, for every site."""
    set_at = jax.lax.dynamic_update_index_in_dim
    return {
        name: SiteTable(
            pages=set_at(table.pages, values[name].pages, slot, axis=2),
            scaling=set_at(table.scaling, values[name].scaling, slot, axis=1),
        )
        for name, table in tables.items()
    }
