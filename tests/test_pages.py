"""The page pool: what is on the device is what was packed, and nothing else ever changes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelora_jax.adapters import pages as pages_module
from moelora_jax.adapters.adapter import Adapter, LowRankUpdate, Target
from moelora_jax.adapters.pages import PageAllocator, PagePool, pool_pages
from moelora_jax.config import LoraConfig, LoraSite
from moelora_jax.errors import AdapterError, CapacityError, MoeLoraError
from moelora_kernels.types import PAGE_ROWS

# Four sites over three widths. The routed sites exist in the layers 1 and 3 only.
SITES = (
    LoraSite("q_proj", 24, 40, layers=(0, 1, 3)),
    LoraSite("gate_proj", 24, 32, layers=(1, 3), num_experts=3),
    LoraSite("up_proj", 24, 32, layers=(1, 3), num_experts=3),
    LoraSite("down_proj", 32, 24, layers=(1, 3), num_experts=3),
)
LORA = LoraConfig(max_adapters=3, max_rank=40, pool_rank=16)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def random_adapter(
    seed: int, max_rank: int = 40, density: float = 1.0, sharing: float = 0.0
) -> Adapter:
    """An adapter of some of all targets; each factor is with some probability an earlier one."""
    random = np.random.default_rng(seed)
    earlier: dict[tuple[str, int, int], np.ndarray] = {}

    def factor(side: str, rank: int, width: int) -> np.ndarray:
        key = side, rank, width
        if key not in earlier or random.random() >= sharing:
            shape = (rank, width) if side == "a" else (width, rank)
            earlier[key] = random.normal(size=shape).astype(np.float32)
        return earlier[key]

    ranks = random.integers(1, max_rank, size=2, endpoint=True)
    updates = {}
    for site in SITES:
        for layer in site.layers:
            for expert in range(site.table_experts):
                if random.random() < density:
                    rank = int(random.choice(ranks))
                    updates[Target(layer, site.name, expert)] = LowRankUpdate(
                        a=factor("a", rank, site.in_features),
                        b=factor("b", rank, site.out_features),
                        scaling=float(random.uniform(0.1, 4)),
                    )
    return Adapter("test", updates)


def one_update(
    a: np.ndarray | None = None,
    b: np.ndarray | None = None,
    scaling: float = 1.0,
    target: Target | None = None,
) -> Adapter:
    """An adapter with one update, of rank 2 and all ones if nothing else is said."""
    target = Target(3, "gate_proj", 2) if target is None else target
    a = np.ones((2, 24), np.float32) if a is None else a
    b = np.ones((32, 2), np.float32) if b is None else b
    return Adapter("test", {target: LowRankUpdate(a, b, scaling)})


def expected_pages(adapter: Adapter) -> dict[int, int]:
    """Pages by width that an adapter takes, counted without the pool."""
    a_factors = {id(u.a): u.a.shape for u in adapter.updates.values()}
    b_factors = {id(u.b): u.b.shape[::-1] for u in adapter.updates.values()}
    count = {24: 0, 32: 0, 40: 0}
    for rank, width in [*a_factors.values(), *b_factors.values()]:
        count[width] += -(-rank // PAGE_ROWS)
    return count


def on_host(array: jax.Array) -> np.ndarray:
    """A copy that does not hold on to the array's memory."""
    return np.array(jnp.copy(array))


def snapshot(pool: PagePool) -> list[object]:
    """Everything that a failed write must leave as it was, addresses included."""
    arrays = jax.tree.leaves(pool.device_state())
    return [
        [array.unsafe_buffer_pointer() for array in arrays],
        [on_host(array).tobytes() for array in arrays],
        [array.tobytes() for array in jax.tree.leaves(pool.tables)],
        pool.usage(),
        pool.free_slots(),
    ]


def check_contents(pool: PagePool, adapters: dict[int, Adapter]) -> None:
    """Device and host hold exactly these adapters, by slot, and every page is accounted for."""
    state = jax.tree.map(on_host, pool.device_state())
    rows_of_width: dict[int, list[int]] = {width: [] for width in pool.pools}
    for slot in range(pool.lora.max_adapters):
        adapter = adapters.get(slot, Adapter("empty", {}))
        rows_of_slot: dict[int, set[int]] = {width: set() for width in pool.pools}
        for site in pool.sites:
            a_pool, b_pool, table, scaling = state[site.name]
            np.testing.assert_array_equal(table, pool.tables[site.name].pages)
            np.testing.assert_array_equal(scaling, pool.tables[site.name].scaling)
            for row, layer in enumerate(site.layers):
                for expert in range(site.table_experts):
                    update = adapter.updates.get(Target(layer, site.name, expert))
                    entries = table[row, :, slot, :, expert]
                    if update is None:
                        assert (entries == -1).all() and scaling[row, slot, expert] == 0
                        continue
                    count = -(-update.rank // PAGE_ROWS)
                    assert (entries[:, :count] >= 0).all() and (entries[:, count:] == -1).all()
                    a = a_pool[entries[0, :count]].reshape(-1, site.in_features)
                    b = b_pool[entries[1, :count]].reshape(-1, site.out_features).T
                    assert not a[update.rank :].any() and not b[:, update.rank :].any()
                    np.testing.assert_array_equal(a[: update.rank], update.a.astype(pool.dtype))
                    np.testing.assert_array_equal(b[:, : update.rank], update.b.astype(pool.dtype))
                    assert scaling[row, slot, expert] == np.float32(update.scaling)
                    rows_of_slot[site.in_features].update(entries[0, :count].tolist())
                    rows_of_slot[site.out_features].update(entries[1, :count].tolist())
        # Shared factors are stored once, and factors that are only equal in number are not shared.
        expected = expected_pages(adapter)
        assert {width: len(rows) for width, rows in rows_of_slot.items()} == expected
        for width, rows in rows_of_slot.items():
            rows_of_width[width] += rows
    for usage in pool.usage():
        rows = rows_of_width[usage.width]
        assert len(rows) == len(set(rows)) == usage.used_pages  # no page belongs to two slots
        assert usage.total_bytes == pool.pools[usage.width].nbytes
    assert pool.free_slots() == [s for s in range(pool.lora.max_adapters) if s not in adapters]


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The compilations inside the block, in a list that grows."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **kwargs: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(kwargs))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# --- The allocator ---


@given(st.data())
def test_allocator_gives_the_lowest_free_rows(data: st.DataObject) -> None:
    allocator = PageAllocator(12)
    held: list[np.ndarray] = []
    for _ in range(data.draw(st.integers(1, 12))):
        free = sorted(set(range(12)) - {int(row) for rows in held for row in rows})
        assert allocator.num_free == len(free)
        if held and data.draw(st.booleans()):
            allocator.free(held.pop(data.draw(st.integers(0, len(held) - 1))))
            continue
        count = data.draw(st.integers(0, 12))
        if count > len(free):
            with pytest.raises(CapacityError, match=f"{count} pages are needed, {len(free)} of 12"):
                allocator.allocate(count)
        else:
            rows = allocator.allocate(count)
            assert rows.dtype == np.int32 and rows.tolist() == free[:count]
            held.append(rows)


@pytest.mark.parametrize("rows", [[0, 3], [1, 1], [5], [-1]], ids=str)
def test_allocator_refuses_rows_that_are_not_held(rows: list[int]) -> None:
    allocator = PageAllocator(5)
    allocator.allocate(3)
    with pytest.raises(ValueError, match="rows"):
        allocator.free(np.array(rows, np.int32))
    assert allocator.num_free == 2


# --- Sizes ---


def test_pools_hold_adapters_of_the_configured_ranks() -> None:
    factors = {24: 3 + 6 + 6 + 6, 40: 3, 32: 6 + 6 + 6}
    lora = LoraConfig(max_adapters=5, max_rank=40, pool_rank=17)
    assert pool_pages(SITES, lora) == {width: 5 * 2 * count for width, count in factors.items()}
    # One adapter of the largest rank fits, even where that is more.
    lora = LoraConfig(max_adapters=2, max_rank=40, pool_rank=16)
    assert pool_pages(SITES, lora) == {width: 3 * count for width, count in factors.items()}


def test_bytes_are_those_of_the_device_arrays() -> None:
    pool = PagePool(SITES, LORA, jnp.bfloat16)
    arrays = {id(array): array for array in jax.tree.leaves(pool.device_state())}
    total = pool.table_bytes + sum(usage.total_bytes for usage in pool.usage())
    assert total == sum(array.nbytes for array in arrays.values())
    packed = pool.pack(random_adapter(0))
    assert packed.pages_by_width == expected_pages(random_adapter(0))
    assert packed.page_bytes == sum(array.nbytes for array in packed.pages.values())
    tables = jax.tree.leaves((packed.tables, packed.ranks, packed.scalings))
    assert packed.num_bytes == packed.page_bytes + sum(array.nbytes for array in tables)


def test_only_enabled_sites_have_pools() -> None:
    pool = PagePool(SITES, LoraConfig(max_adapters=2, sites=("q_proj",)), jnp.float32)
    assert list(pool.device_state()) == ["q_proj"] and set(pool.pools) == {24, 40}
    with pytest.raises(AdapterError, match=r"layer 3, gate_proj.*enabled sites: q_proj"):
        pool.pack(one_update())


@pytest.mark.parametrize("sites, dtype", [(SITES, jnp.int8), (SITES + SITES[:1], jnp.float32)])
def test_pool_refuses_what_makes_no_sense(sites: tuple[LoraSite, ...], dtype: type) -> None:
    with pytest.raises(ValueError, match=r"floating|repeat"):
        PagePool(sites, LORA, dtype)


# --- Contents ---

ADAPTERS = st.builds(
    random_adapter,
    seed=st.integers(0, 2**16),
    max_rank=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    sharing=st.sampled_from([0.0, 0.5, 1.0]),
)


@settings(max_examples=25)
@given(
    dtype=st.sampled_from(DTYPES),
    operations=st.lists(st.tuples(st.integers(0, 2), st.none() | ADAPTERS), max_size=6),
)
def test_any_writes_and_clears(dtype: type, operations: list[tuple[int, Adapter | None]]) -> None:
    pool = PagePool(SITES, LORA, dtype)
    adapters: dict[int, Adapter] = {}
    for slot, adapter in operations:
        if adapter is None:
            pool.clear(slot)
            adapters.pop(slot, None)
        else:
            others = [expected_pages(adapters[s]) for s in adapters if s != slot]
            fits = all(
                count + sum(other[width] for other in others) <= len(pool.pools[width])
                for width, count in expected_pages(adapter).items()
            )
            if fits:
                pool.write(slot, pool.pack(adapter))
                adapters[slot] = adapter
            else:
                before = snapshot(pool)
                with pytest.raises(CapacityError, match=r"pages of width \d+ are needed, \d+ of"):
                    pool.write(slot, pool.pack(adapter))
                assert snapshot(pool) == before
        check_contents(pool, adapters)


@settings(max_examples=25)
@given(dtype=st.sampled_from(DTYPES), adapter=ADAPTERS)
def test_unpacking_is_the_inverse_of_packing(dtype: type, adapter: Adapter) -> None:
    pool = PagePool(SITES, LORA, dtype)
    packed = pool.pack(adapter)
    unpacked = pool.unpack(packed)
    assert unpacked.updates.keys() == adapter.updates.keys()
    for target, update in adapter.updates.items():
        its = unpacked.updates[target]
        assert its.scaling == update.scaling
        for mine, theirs in ((its.a, update.a), (its.b, update.b)):
            assert mine.dtype == dtype and mine.shape == theirs.shape
            assert mine.tobytes() == theirs.astype(dtype).tobytes()
    # Shared factors are the same array again, so they are stored once again.
    assert pool.pack(unpacked).pages_by_width == packed.pages_by_width


def test_a_slot_is_read_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "CHUNK_BYTES", 5 * PAGE_ROWS * 24 * 4)
    pool = PagePool(SITES, LORA, jnp.float32)
    for slot, seed in ((0, 1), (1, 2), (0, 3), (2, 4)):  # the third one fills the gaps of the first
        pool.write(slot, pool.pack(random_adapter(seed, max_rank=16)))
    addresses = [array.unsafe_buffer_pointer() for array in pool.pools.values()]
    for slot, seed in ((0, 3), (1, 2), (2, 4)):
        expected = pool.pack(random_adapter(seed, max_rank=16)).pages
        pages = pool.read(slot)
        assert pages.keys() == expected.keys()
        for width in pages:
            np.testing.assert_array_equal(pages[width], expected[width])
    pool.write(0, pool.pack(random_adapter(5, max_rank=1)))
    assert [array.unsafe_buffer_pointer() for array in pool.pools.values()] == addresses


def test_packing_stores_a_factor_once_for_each_side() -> None:
    square = np.ones((24, 24), np.float32)  # the same object as A and as B
    site = LoraSite("square", 24, 24, layers=(0, 1))
    pool = PagePool([site], LORA, jnp.float32)
    update = LowRankUpdate(square, square, 1.0)
    updates = {Target(0, "square", 0): update, Target(1, "square", 0): update}
    packed = pool.pack(Adapter("test", updates))
    assert packed.pages_by_width == {24: 4}
    np.testing.assert_array_equal(packed.tables["square"].pages[0, :, :2, 0], [[0, 1], [2, 3]])
    assert not packed.pages[24].flags.writeable


def test_large_adapters_are_written_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "CHUNK_BYTES", 5 * PAGE_ROWS * 24 * 4)
    pool = PagePool(SITES, LORA, jnp.float32)
    adapter = random_adapter(1, max_rank=16)
    assert expected_pages(adapter)[24] % 5 != 0  # the last chunk is padded
    pool.write(2, pool.pack(adapter))
    check_contents(pool, {2: adapter})


def test_a_slot_may_be_replaced_where_its_own_pages_are_needed() -> None:
    pool = PagePool(SITES, LORA, jnp.float32)
    first, second = (random_adapter(seed, max_rank=1) for seed in (1, 2))
    updates = {
        target: LowRankUpdate(np.repeat(update.a, 40, axis=0), np.repeat(update.b, 40, axis=1), 1.0)
        for target, update in first.updates.items()
    }
    largest = Adapter("test", updates)
    pool.write(1, pool.pack(largest))
    assert all(usage.used_pages == usage.total_pages for usage in pool.usage())
    with pytest.raises(CapacityError, match="63 pages of width 24 are needed, 0 of 63 are free"):
        pool.write(0, pool.pack(largest))
    pool.write(1, pool.pack(largest))
    check_contents(pool, {1: largest})
    pool.write(1, pool.pack(first))
    pool.write(0, pool.pack(second))
    check_contents(pool, {0: second, 1: first})


@pytest.mark.parametrize("slot", [-1, 3])
def test_slots_outside_the_tables_are_refused(slot: int) -> None:
    pool = PagePool(SITES, LORA, jnp.float32)
    with pytest.raises(ValueError, match=f"slot {slot}"):
        pool.write(slot, pool.pack(one_update()))
    with pytest.raises(ValueError, match=f"slot {slot}"):
        pool.clear(slot)


@pytest.mark.usefixtures("unchecked")
def test_arrays_of_jax_are_packed_like_those_of_numpy() -> None:
    """A trainer's own arrays need no copy by hand, and one that is shared stays shared."""
    random = np.random.default_rng(0)
    a = random.normal(size=(3, 24)).astype(np.float32)
    b = random.normal(size=(32, 3)).astype(np.float32)
    pool = PagePool(SITES, LORA, jnp.float32)

    def pack(a: Any, b: Any, scaling: Any) -> dict[int, np.ndarray]:
        targets = [
            Target(1, site, expert) for site in ("gate_proj", "up_proj") for expert in (0, 2)
        ]
        updates = {target: LowRankUpdate(a, b, scaling) for target in targets}
        return dict(pool.pack(Adapter("memory", updates)).pages)

    expected = pack(a, b, 2.0)
    assert [len(expected[width]) for width in (24, 32, 40)] == [1, 1, 0]
    packed = pack(jnp.asarray(a), jnp.asarray(b), jnp.float32(2))
    for width, pages in expected.items():
        np.testing.assert_array_equal(packed[width], pages)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("key", [(1, "gate_proj", 0), "gate_proj"])
def test_an_update_has_a_target(key: object) -> None:
    update = LowRankUpdate(np.ones((2, 24), np.float32), np.ones((32, 2), np.float32), 1.0)
    with pytest.raises(AdapterError, match=r"is Target\(layer, site, expert\): LowRankUpdate"):
        Adapter("memory", {key: update})  # type: ignore[dict-item]
    with pytest.raises(AdapterError, match=r"not .*: ndarray"):
        Adapter("memory", {Target(1, "gate_proj", 0): update.a})  # type: ignore[dict-item]


# --- Refusals ---


def with_value(value: float, dtype: type = np.float32) -> np.ndarray:
    a = np.ones((2, 24), dtype)
    a[1, 7] = value
    return a


@pytest.mark.parametrize(
    "dtype, adapter, message",
    [
        (jnp.float32, one_update(a=with_value(np.nan)), "expert 2: A has .* finite in float32"),
        (jnp.float32, one_update(b=with_value(np.inf)[:, :16].reshape(32, 1), a=np.ones((1, 24))),
         "expert 2: B has .* finite in float32"),
        (jnp.float16, one_update(a=with_value(7e4)), "A has .* finite in float16"),
        (jnp.bfloat16, one_update(a=with_value(3.4e38)), "A has .* finite in bfloat16"),
        (jnp.float32, one_update(a=with_value(1e39, np.float64)), "A has .* finite in float32"),
        (jnp.float32, one_update(scaling=np.nan), "scaling nan is not finite"),
        (jnp.float32, one_update(scaling=1e39), r"scaling 1e\+39 is not finite"),
        (jnp.float32, one_update(a=np.ones((2, 23))), r"A has shape \(2, 23\) .*\[rank, 24\]"),
        (jnp.float32, one_update(b=np.ones((32, 3))), r"B \(32, 3\); .*\[32, rank\]"),
        (jnp.float32, one_update(b=np.ones((31, 2))), r"B \(31, 2\); .*\[32, rank\]"),
        (jnp.float32, one_update(a=np.ones(24)), r"A has shape \(24,\)"),
        (jnp.float32, one_update(a=np.ones((2, 24), np.int32)), "A has dtype int32; supported are"),
        (jnp.float32, one_update(b=np.ones((32, 2), complex)), "B has dtype complex128"),
        (jnp.float32, one_update(a=np.ones((0, 24)), b=np.ones((32, 0))), "rank of at least 1"),
        (jnp.float32, one_update(a=np.ones((41, 24)), b=np.ones((32, 41))),
         "rank 41 is above LoraConfig.max_rank 40; raise max_rank to at least 41"),
        (jnp.float32, one_update(target=Target(3, "k_proj", 0)), "no pages; enabled sites: q_proj"),
        (jnp.float32, one_update(target=Target(2, "gate_proj", 0)), r"layers \(1, 3\) only"),
        (jnp.float32, one_update(target=Target(1, "gate_proj", 3)), "has 3 experts"),
        (jnp.float32, one_update(target=Target(1, "gate_proj", -1)), "has 3 experts"),
    ],
)  # fmt: skip
def test_invalid_adapters_are_refused_and_nothing_changes(
    dtype: type, adapter: Adapter, message: str
) -> None:
    pool = PagePool(SITES, LORA, dtype)
    pool.write(0, pool.pack(one_update()))
    before = snapshot(pool)
    with pytest.raises(MoeLoraError, match=r"adapter from memory, layer \d, \w+_proj") as raised:
        pool.pack(adapter)
    raised.match(message)
    assert isinstance(raised.value, CapacityError) == ("max_rank" in message)
    assert snapshot(pool) == before


# --- The device ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_after_warm_up_nothing_is_compiled_and_nothing_moves(dtype: type) -> None:
    # No other pool has these shapes, so that this warm-up has everything to compile.
    slots = 5 + DTYPES.index(dtype)
    pool = PagePool(SITES, LoraConfig(max_adapters=slots, max_rank=64, pool_rank=48), dtype)
    with compilations() as compiled:
        pool.warm_up()
    assert len(compiled) == len(pool.pools) + 1

    packed = [pool.pack(random_adapter(seed, density=0.5)) for seed in range(6)]
    addresses = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(pool.device_state())]
    random = np.random.default_rng(0)
    with compilations() as compiled:
        for _ in range(200):
            slot, choice = int(random.integers(slots)), int(random.integers(8))
            if choice < len(packed):
                pool.write(slot, packed[choice])
            else:
                pool.clear(slot)
            state = jax.tree.leaves(pool.device_state())
            assert [a.unsafe_buffer_pointer() for a in state] == addresses
    assert compiled == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_write_needs_no_second_copy_of_the_pool(dtype: type) -> None:
    pool = jax.ShapeDtypeStruct((500, PAGE_ROWS, 24), dtype)
    rows = jax.ShapeDtypeStruct((4,), jnp.int32)
    pages = jax.ShapeDtypeStruct((4, PAGE_ROWS, 24), dtype)
    memory = pages_module._set_pages.lower(pool, rows, pages).compile().memory_analysis()
    pool_bytes = 500 * PAGE_ROWS * 24 * jnp.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 10


def test_a_computation_sees_the_adapters_of_when_it_was_enqueued() -> None:
    pool = PagePool(SITES, LORA, jnp.float32)

    def constant(value: float) -> Adapter:
        return one_update(a=np.full((2, 24), value, np.float32))

    @jax.jit
    def read(state: dict[str, pages_module.SitePages]) -> jax.Array:
        site = state["gate_proj"]
        numbers = site.a_pool[site.table[1, 0, 0, 0, 2]]
        # Work that keeps the device busy while the next write is enqueued.
        return jax.lax.fori_loop(0, 2000, lambda _, total: total + numbers, jnp.zeros_like(numbers))

    results = []
    for value in (1.0, 2.0, 3.0):
        pool.write(0, pool.pack(constant(value)))
        results.append(read(pool.device_state()))
    for value, result in zip((1.0, 2.0, 3.0), results, strict=True):
        np.testing.assert_array_equal(result[:2], np.full((2, 24), 2000 * value))


def test_old_arrays_end_with_the_next_write() -> None:
    pool = PagePool(SITES, LORA, jnp.float32)
    old = pool.device_state()["gate_proj"]
    pool.write(0, pool.pack(one_update()))
    assert all(array.is_deleted() for array in old)
    assert not any(array.is_deleted() for array in jax.tree.leaves(pool.device_state()))


@pytest.mark.parametrize("write", [PagePool.warm_up, lambda pool: pool.clear(1)])
def test_writing_nothing_changes_nothing(write: Callable[[PagePool], None]) -> None:
    pool = PagePool(SITES, LORA, jnp.float32)
    pool.write(0, pool.pack(random_adapter(5, max_rank=16)))
    before = snapshot(pool)
    write(pool)
    assert snapshot(pool) == before
