"""The registry: names, what is resident when, and that an error changes nothing."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelora_jax.adapters.adapter import Adapter, LowRankUpdate, Target
from moelora_jax.adapters.pages import PagePool
from moelora_jax.adapters.registry import MAX_NAME_LENGTH, AdapterInfo, AdapterRegistry
from moelora_jax.config import LoraConfig, LoraSite
from moelora_jax.errors import AdapterError, CapacityError, MoeLoraError, RequestError

# Two slots and eight pages of each width: two adapters of rank 32 fit, or one of rank 64.
SITE = LoraSite("up_proj", 16, 24, layers=(0, 1), num_experts=1)
LORA = LoraConfig(max_adapters=2, max_rank=64, pool_rank=32)


def adapter(rank: int = 8, value: float = 1.0) -> Adapter:
    """Updates of both layers, with factors that are ``value`` everywhere."""
    updates = {
        Target(layer, "up_proj", 0): LowRankUpdate(
            np.full((rank, 16), value, np.float32), np.full((24, rank), value, np.float32), value
        )
        for layer in SITE.layers
    }
    return Adapter("test", updates)


def registry(lora: LoraConfig = LORA) -> AdapterRegistry:
    return AdapterRegistry(PagePool([SITE], lora, jnp.float32), max_host_bytes=lora.max_host_bytes)


def value_in_slot(pool: PagePool, slot: int) -> float:
    """The value that the adapter in a slot was made of, checked in every number of it."""
    site = jax.tree.map(lambda array: np.array(jnp.copy(array)), pool.device_state()["up_proj"])
    value = float(site.scaling[0, slot, 0])
    for layer in range(2):
        assert site.scaling[layer, slot, 0] == value
        for factor, numbers in ((0, site.a_pool), (1, site.b_pool)):
            rows = site.table[layer, factor, slot, :, 0]
            pages = numbers[rows[rows >= 0]]
            assert pages.any() and set(np.unique(pages)) <= {0.0, value}
    return value


def snapshot(registry: AdapterRegistry) -> list[object]:
    """Everything that an error must leave as it was."""
    pool = registry.pool
    return [
        registry.names(),
        [registry.info(name) for name in registry.names()],
        str(registry.counters),
        [np.array(jnp.copy(array)).tobytes() for array in jax.tree.leaves(pool.device_state())],
        [array.tobytes() for array in jax.tree.leaves(pool.tables)],
        pool.usage(),
        pool.free_slots(),
    ]


# --- Names ---


def test_loaded_adapters_are_listed_and_described() -> None:
    adapters = registry()
    adapters.load("a", adapter(rank=20))
    adapters.load("org/b 2", adapter(rank=8), pin=True)
    assert adapters.names() == ("a", "org/b 2")
    assert "a" in adapters and "c" not in adapters
    assert adapters.resident() == {"a": 0, "org/b 2": 1}
    page_bytes = 2 * 2 * 16 * (16 + 24) * 4  # layers, pages, rank rows, both widths, float32
    assert adapters.info("a") == AdapterInfo(
        name="a",
        slot=0,
        pinned=False,
        rank=20,
        layout="test",
        source="memory",
        device_bytes=page_bytes,
        # Table entries; scalings in float32 and float64, and ranks.
        host_bytes=page_bytes + 2 * 2 * 4 * 4 + 2 * (4 + 8 + 4),
    )
    adapters.unload("a")
    assert adapters.names() == ("org/b 2",) and adapters.pool.free_slots() == [0]


@pytest.mark.parametrize("name", ["", " a", "a ", "a\n", "\x00", "a" * (MAX_NAME_LENGTH + 1)])
def test_bad_names_are_refused(name: str) -> None:
    adapters = registry()
    with pytest.raises(RequestError, match="is not valid"):
        adapters.load(name, adapter())
    assert adapters.names() == ()


def test_unknown_names_are_refused_and_the_known_ones_listed() -> None:
    adapters = registry()
    with pytest.raises(RequestError, match="adapter 'x' is not loaded; loaded: none"):
        adapters.acquire(["x"])
    for name in "ba":
        adapters.load(name, adapter())
    before = snapshot(adapters)
    for act in (adapters.info, adapters.adapter, adapters.pin, adapters.unpin, adapters.unload):
        with pytest.raises(RequestError, match="adapter 'x' is not loaded; loaded: a, b"):
            act("x")
    with pytest.raises(RequestError, match="adapter 'x'"):
        adapters.acquire(["b", None, "x"])
    assert snapshot(adapters) == before


def test_an_adapter_comes_back_from_the_device_or_from_the_host() -> None:
    adapters = registry()
    for number, name in enumerate("abc", start=1):
        adapters.load(name, adapter(rank=20, value=number / 3))
    assert adapters.resident().keys() == {"b", "c"}
    # What the device holds counts, even where it was changed there.
    pool = adapters.pool
    pool.pools[16] = pool.pools[16] * 2
    for number, name in enumerate("abc", start=1):
        read, loaded = adapters.adapter(name), adapter(rank=20, value=number / 3)
        assert (read.layout, read.source) == ("test", "memory")
        assert read.updates.keys() == loaded.updates.keys()
        for target, update in loaded.updates.items():
            factor = 1 if name == "a" else 2
            np.testing.assert_array_equal(read.updates[target].a, factor * update.a)
            np.testing.assert_array_equal(read.updates[target].b, update.b)
            assert read.updates[target].scaling == number / 3


# --- Residence ---


def test_the_least_recently_used_leaves_the_device_first() -> None:
    adapters = registry()
    for value, name in enumerate("abc", start=1):
        adapters.load(name, adapter(value=float(value)))
    assert adapters.names() == ("a", "b", "c")
    assert adapters.resident() == {"b": 1, "c": 0}  # a was evicted, and c has its slot
    assert adapters.acquire(["b"]) == [1]
    assert adapters.acquire(["a"]) == [0]  # for which c leaves
    assert adapters.names() == ("c", "b", "a")
    assert [value_in_slot(adapters.pool, slot) for slot in (0, 1)] == [1.0, 2.0]
    counters = adapters.counters
    assert (counters.loads, counters.device_writes, counters.device_evictions) == (3, 4, 2)
    assert counters.device_bytes == 4 * adapters.info("a").device_bytes


def test_a_batch_is_resident_together() -> None:
    adapters = registry()
    for name in "abc":
        adapters.load(name, adapter())
    assert adapters.acquire([]) == []
    assert adapters.acquire([None, None]) == [-1, -1]
    # b is the least recently used that is resident, but in the batch: c leaves.
    assert adapters.resident() == {"b": 1, "c": 0}
    assert adapters.acquire(iter(["a", None, "b", "a"])) == [0, -1, 1, 0]
    before = snapshot(adapters)
    with pytest.raises(CapacityError, match=r"c do not fit .* beside 2 that are pinned or in use"):
        adapters.acquire(["a", "b", "c"])
    assert snapshot(adapters) == before


def test_pages_are_short_before_slots_are() -> None:
    adapters = registry(LoraConfig(max_adapters=4, max_rank=64, pool_rank=16))
    adapters.load("small", adapter(rank=16))
    adapters.load("large", adapter(rank=48))
    assert adapters.resident() == {"small": 0, "large": 1}
    adapters.load("largest", adapter(rank=64))
    assert adapters.resident() == {"largest": 0}
    before = snapshot(adapters)
    with pytest.raises(CapacityError, match="2 pages of width 16 are needed, 0 of 8 are free"):
        adapters.acquire(["small", "largest"])
    assert snapshot(adapters) == before
    assert adapters.acquire(["large", "small"]) == [0, 1]


def test_pinned_adapters_stay() -> None:
    adapters = registry()
    adapters.load("a", adapter(), pin=True)
    for name in "bcd":
        adapters.load(name, adapter())
    assert adapters.resident() == {"a": 0, "d": 1}
    adapters.pin("c")
    assert adapters.resident() == {"a": 0, "c": 1} and adapters.info("c").pinned
    before = snapshot(adapters)
    for act in (lambda: adapters.acquire(["d"]), lambda: adapters.pin("d")):
        with pytest.raises(CapacityError, match="1 slots are needed, 0 of 2 are free; unpin"):
            act()
    with pytest.raises(CapacityError, match="beside 2 that are pinned"):
        adapters.load("e", adapter(), pin=True)
    with pytest.raises(RequestError, match="'c' is pinned; unpin it"):
        adapters.unload("c")
    assert snapshot(adapters) == before
    adapters.load("e", adapter())  # waits in host memory
    assert adapters.info("e").slot is None
    adapters.unpin("a")
    assert adapters.acquire(["e"]) == [0]
    assert adapters.resident() == {"c": 1, "e": 0}


# --- Reloading ---


def test_a_reload_replaces_the_old_version_in_its_slot() -> None:
    adapters = registry()
    adapters.load("a", adapter(rank=32, value=1.0), pin=True)
    adapters.load("b", adapter(rank=32, value=2.0))
    adapters.load("a", adapter(rank=30, value=3.0))  # needs the pages of the old version
    assert adapters.resident() == {"b": 1, "a": 0}
    assert [value_in_slot(adapters.pool, slot) for slot in (0, 1)] == [3.0, 2.0]
    assert adapters.info("a").pinned and adapters.info("a").rank == 30
    adapters.load("a", adapter(rank=64, value=4.0))  # needs those of b, too
    assert adapters.resident() == {"a": 0} and value_in_slot(adapters.pool, 0) == 4.0


def test_a_reload_that_does_not_fit_beside_pinned_ones_waits_in_host_memory() -> None:
    adapters = registry()
    adapters.load("a", adapter(), pin=True)
    adapters.load("b", adapter())
    adapters.load("b", adapter(rank=64, value=2.0))
    assert adapters.resident() == {"a": 0} and adapters.info("b").rank == 64
    adapters.unpin("a")
    assert adapters.acquire(["b"]) == [0] and value_in_slot(adapters.pool, 0) == 2.0


@pytest.mark.parametrize("name", ["resident", "absent", "new"])
@pytest.mark.parametrize(
    "version, error",
    [
        (adapter(value=float("nan")), AdapterError),
        (adapter(value=float("inf")), AdapterError),
        (adapter(rank=65), CapacityError),
        (Adapter("test", {Target(2, "up_proj", 0): adapter().updates[Target(0, "up_proj", 0)]}),
         AdapterError),
        (Adapter("test", {Target(0, "up_proj", 0): LowRankUpdate(np.ones((1, 16)), np.ones((16, 1)),
                                                                 1.0)}), AdapterError),
    ],
    ids=["nan", "infinity", "rank", "layer", "shape"],
)  # fmt: skip
def test_a_failed_load_changes_nothing(
    name: str, version: Adapter, error: type[MoeLoraError]
) -> None:
    adapters = registry()
    for loaded in ("absent", "other", "resident"):
        adapters.load(loaded, adapter())
    before = snapshot(adapters)
    with pytest.raises(error):
        adapters.load(name, version)
    assert snapshot(adapters) == before


def test_host_memory_is_limited() -> None:
    size = registry().pool.pack(adapter()).num_bytes
    adapters = registry(replace(LORA, max_host_bytes=2 * size))
    adapters.load("a", adapter())
    adapters.install("b", adapters.pool.pack(adapter()))
    before = snapshot(adapters)
    for load in (
        lambda: adapters.load("c", adapter()),
        lambda: adapters.install("c", adapters.pool.pack(adapter())),
        lambda: adapters.load("a", adapter(rank=17)),
    ):
        with pytest.raises(CapacityError, match=r"max_host_bytes"):
            load()
        assert snapshot(adapters) == before
    adapters.load("a", adapter(value=2.0))  # In place of the old one, which leaves.

    # As long as the old version runs, both are there.
    version = adapters.current("a")
    adapters.hold(version)
    new = adapters.pool.pack(adapter(value=3.0))
    with pytest.raises(CapacityError, match=f"{size:,} bytes of host memory; beside the"):
        adapters.install("a", new)
    adapters.unload("b")
    adapters.install("a", new)
    with pytest.raises(CapacityError, match=r"of 2 others"):
        adapters.load("b", adapter())
    adapters.release(version)
    adapters.load("b", adapter())


@pytest.mark.usefixtures("unchecked")
def test_a_name_is_a_string() -> None:
    for name in (["a"], 3, None):
        with pytest.raises(RequestError, match="is not loaded; loaded: none"):
            registry().current(name)  # type: ignore[arg-type]


def test_a_failed_reload_of_a_pinned_adapter_keeps_the_old_version() -> None:
    adapters = registry()
    adapters.load("a", adapter(), pin=True)
    adapters.load("b", adapter(), pin=True)
    before = snapshot(adapters)
    with pytest.raises(CapacityError, match="a do not fit on the device beside 1 that"):
        adapters.load("a", adapter(rank=64))
    assert snapshot(adapters) == before


# --- Any history ---

NAMES = st.sampled_from("abcd")
RANKS = st.sampled_from([1, 16, 17, 40, 64, 65])
OPERATIONS = st.one_of(
    st.tuples(st.just("load"), NAMES, RANKS, st.booleans()),
    st.tuples(st.sampled_from(["unload", "pin", "unpin"]), NAMES),
    st.tuples(st.just("acquire"), st.lists(st.none() | NAMES, max_size=4)),
)


@settings(max_examples=50)
@given(st.lists(OPERATIONS, max_size=12))
def test_any_history(operations: list[tuple]) -> None:
    adapters = registry(LoraConfig(max_adapters=3, max_rank=64, pool_rank=32))
    used: list[str] = []  # names, the least recently used first
    values: dict[str, float] = {}

    for step, (action, *arguments) in enumerate(operations, start=1):
        before = snapshot(adapters)
        try:
            if action == "load":
                name, rank, pin = arguments
                adapters.load(name, adapter(rank, float(step)), pin=pin)
                touched, values[name] = [name], float(step)
            elif action == "acquire":
                batch = arguments[0]
                slots = adapters.acquire(batch)
                assert slots == [adapters.resident().get(name, -1) for name in batch]
                touched = list(dict.fromkeys(name for name in batch if name is not None))
                assert set(touched) <= set(adapters.resident())
            else:
                getattr(adapters, action)(*arguments)
                touched = arguments if action == "pin" else []
        except MoeLoraError:
            assert snapshot(adapters) == before
            continue

        used = [name for name in used if name not in touched] + touched
        assert adapters.names() == tuple(name for name in used if name in adapters)
        resident = adapters.resident()
        for name in adapters.names():
            assert not adapters.info(name).pinned or name in resident
        # The slots hold the current versions, one each, and no page is lost.
        assert {name: value_in_slot(adapters.pool, slot) for name, slot in resident.items()} == {
            name: values[name] for name in resident
        }
        assert adapters.pool.free_slots() == sorted(set(range(3)) - set(resident.values()))
        usage = adapters.pool.usage()
        assert sum(pool.used_pages * pool.page_bytes for pool in usage) == sum(
            adapters.info(name).device_bytes for name in resident
        )


# --- Versions ---


def test_a_held_version_keeps_its_slot_through_reloads_and_unloading() -> None:
    adapters = registry()
    adapters.load("a", adapter(value=1.0))
    old = adapters.current("a")
    adapters.hold(old)
    adapters.load("a", adapter(value=2.0))
    new = adapters.current("a")
    assert (old.slot, new.slot) == (0, 1) and new.number > old.number
    assert adapters.resident() == {"a": 1}
    adapters.hold(new)
    adapters.load("a", adapter(value=3.0))  # no slot is left
    assert adapters.info("a").slot is None
    adapters.unload("a")
    assert [value_in_slot(adapters.pool, slot) for slot in (0, 1)] == [1.0, 2.0]
    adapters.release(old)
    assert adapters.pool.free_slots() == [0] and value_in_slot(adapters.pool, 1) == 2.0
    adapters.release(new)
    assert adapters.pool.free_slots() == [0, 1] and adapters.names() == ()


def test_held_adapters_are_not_evicted_and_holding_counts_as_use() -> None:
    adapters = registry()
    for name in "ab":
        adapters.load(name, adapter())
    a = adapters.current("a")
    adapters.hold(a)
    assert adapters.names() == ("b", "a")
    adapters.load("c", adapter())
    assert adapters.resident() == {"a": 0, "c": 1}
    adapters.hold(adapters.current("c"))
    before = snapshot(adapters)
    with pytest.raises(CapacityError, match="pinned or in use"):
        adapters.acquire(["b"])
    assert snapshot(adapters) == before
    assert adapters.never_fits("b") is None
    adapters.release(a)
    assert adapters.acquire(["b"]) == [0]


def test_an_installed_adapter_is_written_in_pieces() -> None:
    adapters = registry()
    pool = adapters.pool
    pool._chunk_pages = dict.fromkeys(pool.pools, 3)
    adapters.install("a", pool.pack(adapter(rank=64, value=2.0)))  # 16 pages, 8 of each width
    assert adapters.names() == ("a",) and adapters.resident() == {}
    adapters.start_write("a")
    for _ in range(2 * 3):
        assert adapters.continue_write() is None
        assert adapters.is_writing and adapters.resident() == {}
        assert (np.asarray(pool.device_state()["up_proj"].table) == -1).all()
    assert adapters.continue_write() is adapters.current("a")
    assert not adapters.is_writing and adapters.continue_write() is None
    assert adapters.resident() == {"a": 0} and value_in_slot(pool, 0) == 2.0
    assert adapters.counters.device_writes == 1


@pytest.mark.parametrize("action", ["reload", "unload", "load other", "acquire"])
def test_what_happens_to_a_write_in_progress(action: str) -> None:
    adapters = registry()
    adapters.pool._chunk_pages = dict.fromkeys(adapters.pool.pools, 1)
    adapters.install("a", adapters.pool.pack(adapter(value=2.0)))
    adapters.start_write("a")
    adapters.continue_write()
    if action == "reload":
        adapters.install("a", adapters.pool.pack(adapter(value=3.0)))
        assert adapters.pool.free_slots() == [0, 1] and not adapters.is_writing
        assert adapters.acquire(["a"]) == [0] and value_in_slot(adapters.pool, 0) == 3.0
    elif action == "unload":
        adapters.unload("a")
        assert adapters.pool.free_slots() == [0, 1] and not adapters.is_writing
        assert all(usage.used_pages == 0 for usage in adapters.pool.usage())
    else:  # These finish it first.
        if action == "acquire":
            assert adapters.acquire(["a"]) == [0]
        else:
            adapters.load("b", adapter(value=4.0))
            assert adapters.resident() == {"a": 0, "b": 1}
        assert value_in_slot(adapters.pool, 0) == 2.0


def test_a_pinned_version_waits_for_the_one_that_is_held() -> None:
    adapters = registry()
    adapters.load("a", adapter(rank=64), pin=True)
    old = adapters.current("a")
    adapters.hold(old)
    packed = adapters.pool.pack(adapter(rank=64, value=2.0))
    adapters.install("a", packed)
    assert adapters.info("a").pinned and adapters.info("a").slot is None
    with pytest.raises(CapacityError, match="pinned or in use"):
        adapters.start_write("a")
    with pytest.raises(CapacityError, match="b do not fit"):
        adapters.install("b", packed, pin=True)  # never beside the pinned a
    assert "b" not in adapters
    adapters.release(old)
    adapters.start_write("a")
    adapters.finish_write()
    assert value_in_slot(adapters.pool, 0) == 2.0
