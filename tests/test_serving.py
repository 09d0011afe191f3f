"""The engine over a tiny model: traffic of many adapters, reloads, shared prefixes, a soak."""

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moelora_jax import LLM, BucketConfig, CacheConfig, LoraConfig, Prompt, RuntimeConfig, Sampling
from moelora_jax.buckets import CompilationCounter
from moelora_jax.engine.engine import Engine
from moelora_jax.engine.requests import TokenOutput
from moelora_jax.engine.sequence import Sequence
from moelora_jax.errors import CapacityError, RequestError
from tests.adapter_files import tiny_model_config
from tests.tiny_llm import random_adapter, tiny_llm

#: One bucket of each kind, so that every row always runs in the same programs.
RUNTIME = RuntimeConfig(
    lora=LoraConfig(max_adapters=4, max_rank=16),
    buckets=BucketConfig(decode=(8,), prefill=(24,)),
    cache=CacheConfig(max_length=64, block_size=4, num_blocks=81),
)
CONFIG = tiny_model_config()
ADAPTERS = 64


@pytest.fixture(scope="module")
def llm() -> LLM:
    llm = tiny_llm(RUNTIME)
    for number in range(ADAPTERS):
        packed = llm.pack_adapter("", random_adapter(CONFIG, number, rank=1 + number % 16))
        llm.runner.registry.install(f"a{number}", packed)
    llm.warm_up()
    return llm


@pytest.fixture
def engine(llm: LLM) -> Engine:
    return Engine(llm.runner)


def sequence(prompt: list[int], adapter: str | None = None, new: int = 8, **options: object):
    return Sequence(list(prompt), len(prompt), adapter, new, **options)  # type: ignore[arg-type]


def random_sequence(rng: np.random.Generator, **options: object) -> Sequence:
    length = int(rng.integers(1, 40))
    sampling = Sampling()
    if rng.random() < 0.3:
        sampling = Sampling(temperature=1.0, top_k=10, seed=int(rng.integers(100)))
    return sequence(
        rng.integers(0, CONFIG.vocab_size, length).tolist(),
        None if rng.random() < 0.2 else f"a{rng.integers(ADAPTERS)}",
        int(rng.integers(1, 25)),
        sampling=sampling,
        **options,
    )


def copy(one: Sequence) -> Sequence:
    return Sequence(
        one.tokens[: one.num_prompt],
        one.num_prompt,
        one.adapter,
        one.max_new_tokens,
        one.sampling,
        one.stop_tokens,
        one.num_logprobs,
    )


def run(
    engine: Engine, sequences: list[Sequence], held: list[int] | None = None
) -> list[list[TokenOutput]]:
    """All outputs of each sequence; checks that they are the sequence's tokens."""
    outputs: dict[Sequence, list[TokenOutput]] = {one: [] for one in sequences}
    for one in sequences:
        engine.add(one)
    while not engine.is_idle:
        for one, output in engine.step():
            outputs[one].append(output)
    assert set(engine.scheduler.collect_ended()) == set(sequences)
    engine.scheduler.blocks.check([held or []])
    for one in sequences:
        assert one.generated == [output.token for output in outputs[one]]
        assert [o.finish_reason for o in outputs[one]][:-1] == [None] * (len(outputs[one]) - 1)
    return list(outputs.values())


# --- Isolation ---


def test_a_request_in_mixed_traffic_equals_the_same_request_alone(llm: LLM) -> None:
    """64 adapters over 4 slots. One bucket of each kind, so the same programs run."""
    rng = np.random.default_rng(0)
    sequences = [random_sequence(rng, num_logprobs=2) for _ in range(80)]
    for number, one in enumerate(sequences[:ADAPTERS]):
        one.adapter = f"a{number}"
    mixed = Engine(llm.runner)
    held = mixed.scheduler.blocks.allocate(45)  # So that some are computed again.
    together = run(mixed, sequences, held)
    assert mixed.scheduler.preemptions > 0
    alone = Engine(llm.runner, reuse_prefixes=False)
    for one, expected in zip(sequences, together, strict=True):
        again = copy(one)
        (outputs,) = run(alone, [again])
        assert again.tokens == one.tokens
        # Chunks of a prompt are cut elsewhere, and float32 sums in attention run over other tiles.
        np.testing.assert_allclose(
            [output.logprob for output in outputs],
            [output.logprob for output in expected],
            rtol=0,
            atol=2e-5,
        )


def in_both_orders(llm: LLM, sequences: list[Sequence]) -> list[list[list[TokenOutput]]]:
    """What comes out one step ahead, and with waiting for each step."""
    return [
        run(Engine(llm.runner, ahead=ahead), [copy(one) for one in sequences])
        for ahead in (True, False)
    ]


def test_a_step_ahead_gives_the_bits_of_the_synchronous_order(llm: LLM) -> None:
    rng = np.random.default_rng(1)
    sequences = [random_sequence(rng, num_logprobs=20) for _ in range(8)]
    for number, one in enumerate(sequences):
        one.adapter = None if number == 0 else f"a{number % 4}"
    llm.runner.registry.acquire([one.adapter for one in sequences])  # So that none waits for it.
    ahead, synchronous = in_both_orders(llm, sequences)
    assert ahead == synchronous


def test_late_stops_and_admissions_change_no_token(llm: LLM) -> None:
    """Rows then have other neighbours and other places, so float sums may differ in the end."""
    rng = np.random.default_rng(1)
    sequences = [random_sequence(rng) for _ in range(24)]
    for one in sequences[::2]:
        one.stop_tokens = frozenset(range(0, CONFIG.vocab_size, 9))
    ahead, synchronous = in_both_orders(llm, sequences)
    reasons = Counter(outputs[-1].finish_reason for outputs in ahead)
    assert reasons["stop"] > 3 and reasons["length"] > 3
    assert ahead == synchronous


def test_logprobs_are_those_of_the_model(llm: LLM, engine: Engine) -> None:
    one = sequence([3, 1, 4], "a5", 6, num_logprobs=3)
    none = sequence([3, 1, 4], "a5", 6)
    outputs, silent = run(engine, [one, none])
    logits = llm.score([Prompt(one.tokens[:-1], "a5")])[0][2:].astype(np.float64)
    scores = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for output, row in zip(outputs, scores, strict=True):
        best = np.argsort(-row)[:3]
        assert [token for token, _ in output.top_logprobs] == best.tolist()
        # Float32 of numbers of about 4, summed over 64 tokens.
        np.testing.assert_allclose([p for _, p in output.top_logprobs], row[best], atol=1e-5)
        assert output.logprob == output.top_logprobs[0][1]
    assert [(o.token, o.logprob, o.top_logprobs) for o in silent] == [
        (o.token, None, ()) for o in outputs
    ]


# --- Prefixes ---


def test_a_reused_prefix_gives_the_same_answer(llm: LLM) -> None:
    rng = np.random.default_rng(2)
    shared = rng.integers(0, CONFIG.vocab_size, 22).tolist()
    ends = [rng.integers(0, CONFIG.vocab_size, 5).tolist() for _ in range(4)]
    prompts = [
        sequence(shared + end, adapter, 8, num_logprobs=0)
        for end in ends
        for adapter in (None, "a1", "a2")
    ]
    reusing, computing = Engine(llm.runner), Engine(llm.runner, reuse_prefixes=False)
    # One engine after the other: both write to the same cache.
    all_reused = [run(reusing, [copy(one)])[0] for one in prompts]
    all_computed = [run(computing, [copy(one)])[0] for one in prompts]
    for reused, computed in zip(all_reused, all_computed, strict=True):
        assert [o.token for o in reused] == [o.token for o in computed]
        # The end of the prompt runs in another place of the bucket.
        np.testing.assert_allclose(
            [o.logprob for o in reused], [o.logprob for o in computed], rtol=0, atol=2e-5
        )
    # The first prompt of each adapter computes all, the other nine find five full blocks.
    assert reusing.scheduler.prefix_hits == 9 * 20
    assert computing.scheduler.prefix_hits == 0


def test_a_reloaded_adapter_finds_nothing_of_the_version_before(llm: LLM) -> None:
    engine, prompt = Engine(llm.runner), list(range(20))
    answers = []
    for seed in (500, 501, 500):
        llm.load_adapter("renewed", random_adapter(CONFIG, seed))
        one = sequence(prompt, "renewed", 6)
        run(engine, [one])
        answers.append(one.generated)
    assert engine.scheduler.prefix_hits == 0
    assert answers[0] == answers[2] != answers[1]
    llm.unload_adapter("renewed")


# --- Adapters while serving ---


def install(engine: Engine, llm: LLM, name: str, seed: int, **options: bool) -> None:
    packed = llm.pack_adapter(name, random_adapter(CONFIG, seed))
    llm.runner.registry.install(name, packed, **options)
    engine.residency.installed(name)


def test_running_requests_finish_on_the_weights_they_started_with(llm: LLM, engine: Engine) -> None:
    expected = {}
    for seed in (600, 601, 602):
        llm.load_adapter("x", random_adapter(CONFIG, seed))
        run(engine, [one := sequence([1, 2, 3], "x", 30)])
        expected[seed] = one.generated
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
    started = {}
    for seed in (600, 601, 602):
        install(engine, llm, "x", seed)
        started[seed] = sequence([1, 2, 3], "x", 30)
        engine.add(started[seed])
        while started[seed].seat < 0:
            engine.step()
    assert len({one.version.slot for one in started.values() if one.version}) == 3
    llm.unload_adapter("x")  # Even that does not touch what runs.
    waits = sequence([1], "x")
    engine.add(waits)
    while not engine.is_idle:
        engine.step()
    for seed, one in started.items():
        assert one.generated == expected[seed]
    assert isinstance(waits.error, RequestError)
    assert len(llm.runner.pool.free_slots()) == 4 - len(llm.runner.registry.resident())


def test_an_adapter_is_written_in_pieces_while_others_decode(
    llm: LLM, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = []
    for name in ("a1", "a2"):
        run(engine, [one := sequence([5, 6], name, 40)])
        expected.append(one.generated)
    pool = llm.runner.pool
    monkeypatch.setattr(pool, "_chunk_pages", dict.fromkeys(pool.pools, 8))
    llm.runner.registry.acquire(["a3", "a4", "a5", "a6"])
    engine.add(one := sequence([5, 6], "a1", 40))
    while one.seat < 0:
        engine.step()
    engine.add(two := sequence([5, 6], "a2", 40))
    steps = 0
    while two.seat < 0:
        steps += bool(engine.step())
    assert steps > 5, "the other sequence got no token while the adapter was written"
    while not engine.is_idle:
        engine.step()
    assert [one.generated, two.generated] == expected


def test_tokens_do_not_wait_until_adapters_are_written(
    llm: LLM, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece is written while the device runs a step, before the host waits for the tokens."""
    calls = []

    def record(owner: Any, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (calls.append(name), real(*args))[1])

    llm.runner.registry.acquire(["a3", "a4", "a5", "a6"])
    engine.add(sequence([5, 6], None, 10))
    engine.step()
    record(llm.runner, "run")
    record(llm.runner.registry, "continue_write")
    record(engine, "_take")
    engine.add(sequence([5, 6], "a1", 2))
    engine.step()
    assert calls == ["run", "continue_write", "_take"]
    while not engine.is_idle:
        engine.step()


def test_a_hot_adapter_does_not_keep_others_off_the_device(llm: LLM, engine: Engine) -> None:
    """Four adapters with endless traffic have all the slots; a fifth one gets its turn."""
    running: list[Sequence] = []

    def keep_busy() -> None:
        for number in range(4):
            if sum(s.adapter == f"a{number}" and not s.end_reason for s in running) < 3:
                running.append(sequence([number], f"a{number}", 10))
                engine.add(running[-1])

    for _ in range(10):
        keep_busy()
        engine.step()
    engine.add(fifth := sequence([1, 2], "a9", 3))
    for _ in range(100):
        keep_busy()
        engine.step()
        if fifth.end_reason:
            break
    assert fifth.end_reason == "length"
    engine.abort()


def test_an_adapter_that_can_never_fit_fails_its_requests(llm: LLM, engine: Engine) -> None:
    for number in range(4):
        llm.runner.registry.pin(f"a{number}")
    try:
        engine.add(one := sequence([1], "a7"))
        engine.add(two := sequence([1], "a1"))
        while not engine.is_idle:
            engine.step()
        assert isinstance(one.error, CapacityError) and "unpin" in str(one.error)
        assert two.end_reason == "length"
        with pytest.raises(CapacityError, match="do not fit"):
            install(engine, llm, "pinned", 1, pin=True)
        assert "pinned" not in llm.runner.registry
    finally:
        for number in range(4):
            llm.runner.registry.unpin(f"a{number}")


def test_a_pinned_adapter_is_replaced_while_it_runs(llm: LLM, engine: Engine) -> None:
    """With all slots in use the new version waits for room, and gets it before others do."""
    install(engine, llm, "pinned", 700, pin=True)
    engine.add(old := sequence([1, 2], "pinned", 20))
    others = [sequence([1], f"a{number}", 20) for number in range(3)]
    for one in others:
        engine.add(one)
    while old.seat < 0 or any(one.seat < 0 for one in others):
        engine.step()
    install(engine, llm, "pinned", 701)
    while engine.has_work:
        engine.step()
    info = llm.runner.registry.info("pinned")
    assert info.pinned and info.slot is not None
    llm.runner.registry.unpin("pinned")
    llm.unload_adapter("pinned")


# --- Failures ---


def test_a_failed_step_ends_its_sequences_and_the_engine_goes_on(
    llm: LLM, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(engine, [expected := sequence([1, 2, 3], "a1", 5)])

    def fail(state, *_: object) -> None:
        for leaf in (state.cache.keys, state.sampled):
            leaf.delete()  # As if it was donated.
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(llm.runner, "programs", defaultdict(lambda: fail))
        engine.add(lost := sequence([1, 2, 3], "a1", 5))
        with pytest.raises(RuntimeError, match="out of memory"):
            while not engine.is_idle:
                engine.step()
    assert lost.end_reason == "error" and engine.is_idle
    assert engine.scheduler.collect_ended() == [lost]
    hits = engine.scheduler.prefix_hits
    run(engine, [again := sequence([1, 2, 3], "a1", 5)])
    assert again.generated == expected.generated
    assert engine.scheduler.prefix_hits == hits  # What the cache held is gone.


# --- Soak ---


def check(engine: Engine, sequences: list[Sequence], held: list[int]) -> None:
    """What must hold after every step."""
    scheduler, registry = engine.scheduler, engine.runner.registry
    scheduler.blocks.check([held, *(one.blocks for one in scheduler.running)])
    states = Counter(
        "ended" if one.end_reason else "running" if one.seat >= 0 else "waiting"
        for one in sequences
    )
    assert states["running"] == len(scheduler.running) <= 8
    assert states["waiting"] == len(scheduler.waiting)
    users = Counter(one.version for one in sequences if one.version is not None)
    for version, count in users.items():
        assert version.users == count and version.slot is not None
    slots = [version.slot for version in users]
    slots += [
        slot for name, slot in registry.resident().items() if registry.current(name) not in users
    ]
    slots += [registry._write_in_progress.slot] if registry._write_in_progress else []
    assert sorted([*slots, *engine.runner.pool.free_slots()]) == list(range(4))


def test_soak(llm: LLM) -> None:
    """Random traffic with churn; nothing compiles, moves, is lost, or depends on the others."""
    rng = np.random.default_rng(3)
    now = 0.0
    engine = Engine(llm.runner, clock=lambda: now)
    held = engine.scheduler.blocks.allocate(40)
    addresses = llm.runner.addresses()
    alive: list[Sequence] = []
    finished: list[Sequence] = []
    churned, tokens, ended = [], 0, Counter[str]()

    def add() -> None:
        if len(alive) < 30:
            deadline = now + float(rng.integers(5, 300)) if rng.random() < 0.1 else None
            priority = int(rng.integers(0, 2))
            one = random_sequence(rng, deadline=deadline, priority=priority)
            if churned and rng.random() < 0.2:
                one.adapter = str(rng.choice(churned))
            alive.append(one)
            engine.add(one)

    def cancel() -> None:
        if alive:
            engine.scheduler.end(alive[int(rng.integers(len(alive)))], "cancelled")

    def load() -> None:
        name = f"c{rng.integers(5)}"
        install(engine, llm, name, int(rng.integers(1000)))
        churned.append(name)

    def unload() -> None:
        if churned:
            name = churned[int(rng.integers(len(churned)))]
            llm.unload_adapter(name)
            churned[:] = [other for other in churned if other != name]

    actions: list[tuple[float, Callable[[], None]]] = [
        (0.25, add), (0.02, cancel), (0.015, load), (0.02, unload),
    ]  # fmt: skip
    with CompilationCounter() as compilations:
        for _ in range(1500):
            now += 1
            for probability, action in actions:
                if rng.random() < probability:
                    action()
            tokens += len(engine.step())
            check(engine, alive, held)
            for one in engine.scheduler.collect_ended():
                assert one.end_reason is not None
                ended[one.end_reason] += 1
                alive.remove(one)
                finished.append(one)
        engine.scheduler.end_all("cancelled")
        while not engine.is_idle:
            engine.step()
    finished += engine.scheduler.collect_ended()
    assert compilations.count == 0
    assert llm.runner.addresses() == addresses
    assert engine.unplanned_reads == 0
    assert sum(len(one.generated) for one in finished) == tokens
    for name in set(churned):
        llm.unload_adapter(name)
    # It was a soak: everything that can happen did.
    assert min(ended[reason] for reason in ("length", "cancelled", "timeout", "error")) > 1
    assert engine.scheduler.preemptions > 20 and engine.scheduler.prefix_hits > 0
    assert llm.runner.registry.counters.device_evictions > 100
    done = [one for one in finished if one.end_reason == "length" and str(one.adapter)[0] != "c"]
    for one in rng.permutation(np.array(done, object))[:20]:
        again = copy(one)
        run(Engine(llm.runner), [again])
        assert again.tokens == one.tokens


@pytest.mark.gpu
def test_an_unplanned_read_is_an_error_and_is_counted(
    llm: LLM, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where results need no copy, JAX does not notice it."""
    run_step = llm.runner.run

    def run_and_look(*arguments: Any) -> Any:
        out = run_step(*arguments)
        np.asarray(out.logprobs)  # Nobody asked for them. Tokens may be on the host already.
        return out

    with monkeypatch.context() as patched:
        patched.setattr(llm.runner, "run", run_and_look)
        engine.add(sequence([1, 2, 3]))
        with pytest.raises(Exception, match="device-to-host"):
            engine.step()
    assert engine.unplanned_reads == 1
    engine.scheduler.collect_ended()
    run(engine, [sequence([1, 2, 3])])
    assert engine.unplanned_reads == 1
