"""The scheduler alone: no JAX, a pretended device that knows what it should have been asked for."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moelora_jax.adapters.pages import PackedAdapter
from moelora_jax.adapters.registry import AdapterVersion
from moelora_jax.config import BucketConfig, CacheConfig
from moelora_jax.engine.blocks import BlockPool, block_keys
from moelora_jax.engine.packing import Packer
from moelora_jax.engine.scheduler import Plan, Scheduler
from moelora_jax.engine.sequence import Sequence
from moelora_jax.engine.waiting import WaitingQueue
from moelora_jax.errors import MoeLoraError, RequestError

BUCKETS = BucketConfig(decode=(4,), prefill=(16,))
CACHE = CacheConfig(max_length=48, block_size=4, num_blocks=25)


def version(name: str, number: int) -> AdapterVersion:
    """One that is on the device."""
    packed = PackedAdapter("test", "memory", 1, pages={}, tables={}, ranks={}, scalings={})
    return AdapterVersion(name, number, packed, False, slot=number)


class FakeAdapters:
    """Adapters by name; those in ``away`` are not on the device."""

    def __init__(self) -> None:
        self.versions: dict[str, AdapterVersion] = {}
        self.away: set[str] = set()
        self.gone: set[str] = set()

    def ready(self, name: str) -> AdapterVersion | None:
        if name in self.gone:
            raise RequestError(f"adapter {name!r} is not loaded")
        if name in self.away:
            return None
        return self.versions.setdefault(name, version(name, len(self.versions) + 1))

    def hold(self, version: AdapterVersion) -> None:
        version.users += 1

    def release(self, version: AdapterVersion) -> None:
        assert version.users > 0
        version.users -= 1


class FakeDevice:
    """Runs plans one behind the scheduler, as the engine does, with a model that can be predicted.

    The cache holds, for every block and offset, a hash of all tokens up to there and of the
    weights, as real keys and values depend on them. What a step reads must be what it should read.
    """

    def __init__(self, scheduler: Scheduler, cache: CacheConfig = CACHE) -> None:
        self.scheduler = scheduler
        self.block_size = cache.block_size
        self.cache = np.full((scheduler.blocks.total + 1, cache.block_size), -1, np.int64)
        self.sampled: dict[int, int] = {}
        self.before: tuple[Plan, list[int]] | None = None

    @staticmethod
    def hashed(weights: int, tokens: list[int]) -> int:
        value = weights + 1
        for token in tokens:
            value = (value * 1_000_003 + token + 7) % (2**61 - 1)
        return value

    @classmethod
    def next_token(cls, weights: int, tokens: list[int]) -> int:
        return cls.hashed(weights, tokens) % 50

    def step(self, now: float = 0.0) -> Plan | None:
        plan = self.scheduler.plan(now)
        before, self.before = self.before, None if plan is None else (plan, self.run(plan))
        if before is not None:
            for chunk, token in zip(before[0].chunks, before[1], strict=True):
                if chunk.samples:
                    self.scheduler.sampled(chunk, token)
        return plan

    def run(self, plan: Plan) -> list[int]:
        assert len({id(chunk.sequence) for chunk in plan.chunks}) == len(plan.chunks)
        assert 0 < sum(chunk.num_tokens for chunk in plan.chunks) <= 16
        tokens = []
        for chunk in plan.chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
            assert sequence.end_reason is None
            if plan.kind == "decode":
                assert chunk.num_tokens == 1
            weights = 0 if sequence.version is None else sequence.version.number
            known = list(sequence.tokens)
            if end > len(known):
                known.append(self.sampled[sequence.seat])
            for position in range(end):
                place = sequence.blocks[position // self.block_size], position % self.block_size
                expected = self.hashed(weights, known[: position + 1])
                if position >= chunk.start:
                    self.cache[place] = expected
                assert self.cache[place] == expected, "a block was lost, or shared wrongly"
            token = self.next_token(weights, known[:end])
            if chunk.samples:
                assert end == len(known)
                self.sampled[sequence.seat] = token
            tokens.append(token)
        return tokens

    def finish(self) -> None:
        for _ in range(2000):
            if self.scheduler.is_idle and self.before is None:
                return
            self.step()
        raise AssertionError("the scheduler does not finish")

    def expected(self, sequence: Sequence, weights: int = 0) -> list[int]:
        tokens = list(sequence.tokens[: sequence.num_prompt])
        while len(tokens) < sequence.num_prompt + sequence.max_new_tokens:
            tokens.append(self.next_token(weights, tokens))
            if tokens[-1] in sequence.stop_tokens:
                break
        return tokens


def make(**options: object) -> tuple[Scheduler, FakeDevice, FakeAdapters]:
    adapters = FakeAdapters()
    scheduler = Scheduler(BUCKETS, CACHE, adapters, **options)  # type: ignore[arg-type]
    return scheduler, FakeDevice(scheduler), adapters


def sequence(prompt: int | list[int] = 3, new: int = 4, **options: object) -> Sequence:
    tokens = list(range(1, prompt + 1)) if isinstance(prompt, int) else list(prompt)
    return Sequence(tokens, len(tokens), options.pop("adapter", None), new, **options)  # type: ignore[arg-type]


# --- Steps ---


def test_prompts_run_in_chunks_beside_sequences_that_decode() -> None:
    scheduler, device, _ = make()
    first, second = sequence(3, 20), sequence(list(range(20, 55)), 2)
    scheduler.add(first)
    device.step()
    scheduler.add(second)
    for number, (count, samples) in enumerate(((15, False), (15, False), (5, True))):
        plan = device.step()
        assert plan is not None and plan.kind == "prefill"
        assert [(c.sequence, c.num_tokens, c.samples) for c in plan.chunks] == [
            (first, 1, True),
            (second, count, samples),
        ], number
    plan = device.step()
    assert plan is not None and plan.kind == "decode" and len(plan.chunks) == 2
    device.finish()
    assert first.tokens == device.expected(first)
    assert second.tokens == device.expected(second)


def test_a_step_is_planned_before_the_tokens_of_the_one_before_are_known() -> None:
    scheduler, _, _ = make()
    one = sequence(3, 5)
    scheduler.add(one)
    for position in (0, 3, 4):
        plan = scheduler.plan(0.0)
        assert plan is not None and plan.chunks[0].start == position
    assert one.num_in_flight == 3 and one.generated == []


def test_a_stop_token_is_noticed_one_step_late_and_the_row_is_dropped() -> None:
    scheduler, device, _ = make()
    free = sequence(3, 10)
    tokens = device.expected(free)[3:]
    stopped = sequence(3, 10, stop_tokens=frozenset(tokens[2:3]))
    scheduler.add(stopped)
    device.finish()
    assert stopped.generated == tokens[: tokens.index(tokens[2]) + 1]
    assert stopped.end_reason == "stop"
    assert scheduler.steps == {"prefill": 1, "decode": len(stopped.generated)}


def test_more_decodes_than_a_prefill_bucket_holds_take_turns_with_prompts() -> None:
    adapters = FakeAdapters()
    cache = CacheConfig(max_length=48, block_size=4)
    scheduler = Scheduler(BucketConfig(decode=(4,), prefill=(2,)), cache, adapters)
    device = FakeDevice(scheduler, cache)
    sequences = [sequence([1, n], 20) for n in range(3)] + [sequence(list(range(30)), 3)]
    for one in sequences:
        scheduler.add(one)
    device.finish()
    for one in sequences:
        assert one.tokens == device.expected(one)
    assert scheduler.steps["decode"] > 10 and scheduler.steps["prefill"] >= 15


# --- Room ---


def test_without_blocks_the_youngest_is_computed_again_and_nothing_is_lost() -> None:
    scheduler, device, _ = make(reuse_prefixes=False)
    sequences = [sequence([7, n, 9], 45) for n in range(4)]  # 12 blocks each, of 24
    for one in sequences:
        scheduler.add(one)
    device.finish()
    assert scheduler.preemptions > 0
    assert sequences[0].arrival == 0
    for one in sequences:
        assert one.tokens == device.expected(one) and one.end_reason == "length"
    assert scheduler.blocks.num_used == 0


def test_higher_priority_goes_first_and_takes_the_seat_of_lower() -> None:
    scheduler, device, _ = make()
    low = [sequence([n, 1], 30, priority=-1) for n in range(4)]
    for one in low:
        scheduler.add(one)
    device.step()
    high = sequence([9, 9], 3, priority=5)
    scheduler.add(high)
    device.step()
    assert high.seat >= 0 and low[3].seat < 0
    device.finish()
    for one in [*low, high]:
        assert one.tokens == device.expected(one)


def test_equal_priorities_never_take_each_others_seat() -> None:
    scheduler, device, _ = make()
    sequences = [sequence([n], 10) for n in range(5)]
    for one in sequences:
        scheduler.add(one)
    device.step()
    assert [one.seat >= 0 for one in sequences] == [True] * 4 + [False]
    assert scheduler.preemptions == 0


# --- Adapters ---


def test_adapters_take_turns() -> None:
    scheduler, device, _ = make()
    many = [sequence([n], 2, adapter="many") for n in range(10)]
    few = [sequence([n], 2, adapter="few") for n in range(2)]
    for one in [*many, *few, base := sequence([5], 2)]:
        scheduler.add(one)
    device.step()
    running = Counter(one.adapter for one in scheduler.running)
    assert running == {"many": 2, "few": 1, None: 1}
    device.finish()
    assert all(one.end_reason == "length" for one in [*many, *few, base])


def test_an_absent_adapter_holds_nobody_up_and_is_asked_for() -> None:
    scheduler, device, adapters = make()
    adapters.away = {"b", "c"}
    absent = [sequence([n], 3, adapter="b") for n in range(5)]
    for one in [*absent, sequence([1], 3, adapter="c"), here := sequence([9], 3, adapter="a")]:
        scheduler.add(one)
    for _ in range(6):
        device.step()
    assert here.end_reason == "length"
    assert scheduler.wanted == ["b", "c"]
    adapters.away.clear()
    device.finish()
    assert all(one.end_reason == "length" for one in absent)
    assert scheduler.wanted == []
    assert all(one.users == 0 for one in adapters.versions.values())


def test_sequences_of_an_unloaded_adapter_fail_and_the_others_go_on() -> None:
    scheduler, device, adapters = make()
    adapters.gone = {"x"}
    lost = [sequence([n], 3, adapter="x") for n in range(3)]
    for one in [*lost, other := sequence([1], 3)]:
        scheduler.add(one)
    device.finish()
    assert other.end_reason == "length"
    for one in lost:
        assert one.end_reason == "error" and isinstance(one.error, MoeLoraError)
    assert scheduler.finished == {"error": 3, "length": 1}
    assert set(scheduler.collect_ended()) == {*lost, other}


def test_a_sequence_keeps_the_version_that_it_started_with() -> None:
    scheduler, device, adapters = make(reuse_prefixes=False)
    old = [sequence([7, n, 9], 45, adapter="a") for n in range(4)]
    for one in old:
        scheduler.add(one)
    device.step()
    before = adapters.versions["a"]
    adapters.versions["a"] = version("a", 99)
    new = sequence([1, 2], 5, adapter="a")
    scheduler.add(new)
    started = [one for one in old if one.version is before]
    device.finish()
    assert scheduler.preemptions > 0
    for one in old:
        weights = before.number if one in started else 99
        assert one.tokens == device.expected(one, weights)
    assert new.tokens == device.expected(new, 99)
    assert before.users == adapters.versions["a"].users == 0


# --- Ends ---


def test_deadlines_end_waiting_and_running_sequences() -> None:
    scheduler, device, _ = make()
    running = sequence([1], 40, deadline=2.0)
    scheduler.add(running)
    device.step(0.0)
    others = [sequence([n], 40) for n in range(3)]
    late = sequence([3], 40, deadline=1.0)
    for one in [*others, late]:
        scheduler.add(one)
    device.step(0.5)
    assert late.seat < 0
    device.step(1.0)
    assert late.end_reason == "timeout" and running.end_reason is None
    device.step(2.5)
    assert running.end_reason == "timeout"
    for one in others:
        scheduler.end(one, "cancelled")
    scheduler.end(running, "cancelled")  # It has ended.
    device.step(3.0)
    assert scheduler.finished == {"timeout": 2, "cancelled": 3}
    assert scheduler.is_idle and scheduler.blocks.num_used == 0


# --- Prefixes ---


def test_a_known_prefix_is_not_computed_again() -> None:
    scheduler, device, _ = make()
    shared = list(range(18))
    first = sequence([*shared, 30], 3)
    scheduler.add(first)
    device.finish()
    assert scheduler.prefix_hits == 0
    second, third = sequence([*shared, 31], 3), sequence([*shared, 31], 3, adapter="a")
    scheduler.add(second)
    scheduler.add(third)
    plan = device.step()
    assert plan is not None
    # Four full blocks of four are shared; with an adapter, nothing is.
    assert {(c.sequence, c.start) for c in plan.chunks} == {(second, 16), (third, 0)}
    device.finish()
    assert scheduler.prefix_hits == 16
    assert second.tokens == device.expected(second)
    assert third.tokens == device.expected(third, (third.version and 1) or 1)


def test_the_last_token_is_always_computed() -> None:
    scheduler, device, _ = make()
    for hits in (0, 12):  # Of 16 tokens in 4 blocks, the last block is computed again.
        one = sequence(list(range(16)), 2)
        scheduler.add(one)
        device.finish()
        assert scheduler.prefix_hits == hits
        assert one.tokens == device.expected(one)


def test_a_conversation_finds_its_own_answer() -> None:
    scheduler, device, _ = make()
    one = sequence([1, 2, 3], 14)
    scheduler.add(one)
    device.finish()
    # 17 tokens, of which the last was sampled, and never computed.
    following = sequence([*one.tokens, 40], 2)
    scheduler.add(following)
    device.finish()
    assert scheduler.prefix_hits == 16
    assert following.tokens == device.expected(following)


def test_a_sequence_that_waits_through_a_reload_forgets_what_it_looked_for() -> None:
    scheduler, device, adapters = make()
    prompt = list(range(16))
    scheduler.add(sequence(prompt, 1, adapter="a"))
    device.finish()  # Its four blocks are remembered.
    for number in range(2):
        scheduler.add(sequence([number + 30] * 39, 2))  # Ten blocks each.
    device.step()
    waits = sequence([*prompt, 1, 2, 3, 4], 4, adapter="a")
    scheduler.add(waits)
    device.step()
    assert waits.seat < 0 and waits.keys  # It has looked, and there is no room.
    adapters.versions["a"] = version("a", 99)
    device.finish()
    assert scheduler.prefix_hits == 0
    assert waits.tokens == device.expected(waits, 99)


def test_a_preempted_sequence_waits_for_its_last_token() -> None:
    scheduler, device, _ = make()
    scheduler.add(one := sequence(6, 6))
    device.step()
    scheduler._preempt(one)  # Its first token is in flight.
    assert scheduler.plan(0.0) is None and one.seat < 0 and one.num_in_flight == 1
    device.finish()
    assert one.tokens == device.expected(one)


def test_keys_tell_weights_tokens_and_their_order_apart() -> None:
    root = (0).to_bytes(8, "little")
    keys = block_keys(root, [1, 2, 3, 4, 5], 2)
    assert len(keys) == 2
    assert block_keys(keys[0], [3, 4], 2) == keys[1:]
    others = [
        block_keys((1).to_bytes(8, "little"), [1, 2, 3, 4], 2),
        block_keys(root, [3, 4, 1, 2], 2),
        block_keys(root, [2, 1, 3, 4], 2),
    ]
    flat = [key for some in [keys, *others] for key in some]
    assert len(set(flat)) == len(flat)


def test_blocks_longest_unused_are_forgotten_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(7)
    old = block_keys(b"", list(range(6)), 2)
    blocks = pool.allocate(3)
    for block, key in zip(blocks, old, strict=True):
        pool.remember(block, key)
    pool.release(blocks)
    assert pool.num_free == 6 and pool.num_remembered == 3
    pool.check([])
    taken = pool.allocate(4)  # Three empty ones, and the last one of the three remembered.
    assert pool.match(old) == blocks[:2]
    pool.check([taken, blocks[:2]])
    pool.release(taken)
    pool.release(blocks[:2])
    pool.forget()
    assert pool.match(old) == []
    pool.check([])


def test_the_queue_is_fair_and_keeps_order() -> None:
    waiting = WaitingQueue()
    by_name = {name: sequence([1], 1, adapter=name[0]) for name in ("a1", "a2", "b1", "b2")}
    for one in by_name.values():
        waiting.add(one)
    waiting.add(urgent := sequence([1], 1, adapter="a", priority=1))
    order = []
    while waiting:
        order.append(waiting.heads()[0])
        waiting.take(order[-1])
    assert order == [urgent, *(by_name[name] for name in ("a1", "b1", "a2", "b2"))]
    waiting.add(by_name["a1"])
    waiting.add(by_name["b1"], first=True)
    assert waiting.heads() == [by_name["b1"], by_name["a1"]] == list(waiting)


# --- Packing ---


def test_a_seat_knows_its_new_sequence() -> None:
    """What is kept by seat must not outlive the sequence, not even one with as many blocks."""
    from moelora_jax.buckets import BatchLayout

    scheduler, _, _ = make(reuse_prefixes=False)
    packer = Packer(BUCKETS, CACHE)
    layout = BatchLayout(max(BUCKETS.prefill_buckets()), CACHE.blocks_per_sequence)
    for prompt in ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]):
        scheduler.blocks.allocate(1)  # So that the second one gets other blocks.
        one = sequence(prompt, 2)
        scheduler.add(one)
        plan = scheduler.plan(0.0)
        assert plan is not None
        batch = layout.unpack(packer.pack(layout, plan))
        assert batch.tokens[:6].tolist() == [*prompt, 0]
        assert batch.positions[:5].tolist() == list(range(5))
        assert batch.block_table[0, :2].tolist() == one.blocks
        assert batch.seat[0] == one.seat and (batch.seat[1:] > 100).all()
        plan = scheduler.plan(0.0)
        assert plan is not None
        batch = layout.unpack(packer.pack(layout, plan))
        assert batch.tokens[0] == -1 - one.seat and batch.positions[0] == 5
        scheduler.end(one, "cancelled")


# --- Any history ---


@settings(max_examples=60)
@given(st.data())
def test_any_history(data: st.DataObject) -> None:
    """Blocks are neither lost nor shared wrongly, tokens neither lost nor doubled."""
    scheduler, device, adapters = make(reuse_prefixes=data.draw(st.booleans()))
    sequences: list[Sequence] = []
    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=20)
    for now in range(data.draw(st.integers(1, 40))):
        action = data.draw(
            st.sampled_from(["add", "add", "add", "cancel", "away", "reload", "step"])
        )
        if action == "add":
            prompt = data.draw(tokens)
            one = sequence(
                prompt,
                data.draw(st.integers(1, 48 - len(prompt))),
                adapter=data.draw(st.sampled_from([None, "a", "b"])),
                stop_tokens=frozenset(data.draw(st.sets(st.integers(0, 49), max_size=3))),
                priority=data.draw(st.integers(0, 2)),
                deadline=now + data.draw(st.sampled_from([1e9, 1e9, 5.0, 20.0])),
            )
            sequences.append(one)
            scheduler.add(one)
        elif action == "cancel" and sequences:
            scheduler.end(data.draw(st.sampled_from(sequences)), "cancelled")
        elif action == "away":
            adapters.away = set(data.draw(st.sets(st.sampled_from("ab"))))
        elif action == "reload" and "a" in adapters.versions:
            adapters.versions["a"] = version("a", 100 + now)
        for _ in range(data.draw(st.integers(1, 3))):
            before = {one: one.version for one in sequences}
            device.step(float(now))
            for one, started in before.items():
                assert started is None or one.version in (started, None)
        scheduler.blocks.check(one.blocks for one in scheduler.running)
        assert sorted(one.seat for one in scheduler.running) == sorted(
            set(range(4)) - set(scheduler._seats)
        )
        states = Counter(
            "ended" if one.end_reason else "running" if one.seat >= 0 else "waiting"
            for one in sequences
        )
        assert states["running"] == len(scheduler.running)
        assert states["waiting"] == len(scheduler.waiting) == len(list(scheduler.waiting))
        assert states["ended"] == sum(scheduler.finished.values())
    adapters.away = set()
    device.finish()
    scheduler.blocks.check([])
    assert all(one.users == 0 for one in adapters.versions.values())
    assert len(scheduler.collect_ended()) == len(sequences)
    for one in sequences:
        if one.adapter is None:  # With adapters, the device has checked every token it computed.
            expected = device.expected(one)
            assert one.tokens == expected[: len(one.tokens)]
            if one.end_reason in ("stop", "length"):
                assert one.tokens == expected
