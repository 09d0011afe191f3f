"""Penalties, biases and stop tokens that come too early: in NumPy, and through the whole engine."""

from collections import Counter
from collections.abc import Iterable

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelora_jax import (
    LLM,
    BucketConfig,
    CacheConfig,
    LoraConfig,
    Prompt,
    RuntimeConfig,
    Sampling,
)
from moelora_jax.buckets import BatchLayout, CompilationCounter
from moelora_jax.config import Bucket
from moelora_jax.engine.adjusting import adjusted
from moelora_jax.engine.engine import Engine
from moelora_jax.engine.packing import Packer
from moelora_jax.engine.scheduler import Chunk, Plan
from moelora_jax.engine.sequence import Sequence
from moelora_jax.workspace import MAX_BIASES
from tests.adapter_files import tiny_model_config
from tests.tiny_llm import random_adapter, tiny_llm

CONFIG = tiny_model_config()
VOCAB = CONFIG.vocab_size
#: One bucket of each kind, prompts that need several chunks, and few blocks.
RUNTIME = RuntimeConfig(
    lora=LoraConfig(max_adapters=2, max_rank=16),
    buckets=BucketConfig(decode=(6,), prefill=(16,)),
    cache=CacheConfig(max_length=64, block_size=4, num_blocks=61),
)


def reference(
    logits: np.ndarray,
    sampling: Sampling,
    tokens: Iterable[int],
    num_prompt: int,
    stop_tokens: Iterable[int] = (),
) -> np.ndarray:
    """What vLLM documents, one token at a time, in float32."""
    tokens = list(tokens)
    out = np.array(logits, np.float32)
    if len(tokens) - num_prompt < sampling.min_tokens:
        out[list(stop_tokens)] = -np.inf
    for token, bias in sampling.logit_bias.items():
        out[token] += np.float32(bias)
    penalty = np.float32(sampling.repetition_penalty)
    for token in set(tokens):
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    for token, count in Counter(tokens[num_prompt:]).items():
        out[token] -= np.float32(sampling.frequency_penalty) * np.float32(count)
        out[token] -= np.float32(sampling.presence_penalty)
    return out


#: Numbers whose sums and products are exact in float32.
EXACT = st.integers(-8, 8).map(lambda number: number / 4)
SAMPLING = st.builds(
    Sampling,
    frequency_penalty=EXACT,
    presence_penalty=EXACT,
    repetition_penalty=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    logit_bias=st.dictionaries(st.integers(0, 10), EXACT, max_size=4),
    min_tokens=st.integers(0, 6),
)
ROW = st.tuples(
    SAMPLING,
    st.lists(st.integers(0, 10), min_size=1, max_size=12),
    st.integers(1, 12),
    st.frozensets(st.integers(0, 10), max_size=3),
)

ROWS, BLOCK = 3, 4
LAYOUT = BatchLayout(Bucket(ROWS, ROWS), 4)
device = jax.jit(
    lambda logits, cached, biases, packed: adjusted(logits, cached, biases, LAYOUT.unpack(packed))
)


@settings(deadline=None)
@given(st.lists(ROW, min_size=1, max_size=ROWS), st.randoms(use_true_random=False))
def test_rows_are_adjusted_as_documented(rows: list, random) -> None:
    """Decode rows of any seats and blocks, in a cache and a table that hold others' tokens."""
    packer = Packer(
        BucketConfig(decode=(ROWS,), prefill=(16,)), CacheConfig(max_length=16, block_size=BLOCK)
    )
    rng = np.random.default_rng(random.randrange(2**32))
    cached = rng.integers(0, 11, (17, BLOCK)).astype(np.int32)
    biases = rng.integers(0, 11, (ROWS, 2, MAX_BIASES)).astype(np.int32)
    seats, blocks = rng.permutation(ROWS), rng.permutation(np.arange(1, 17)).tolist()
    chunks = []
    for (sampling, tokens, num_prompt, stops), seat in zip(rows, seats, strict=False):
        num_prompt = min(num_prompt, len(tokens))
        one = Sequence(tokens, num_prompt, None, 16, sampling, stops, seat=int(seat))
        for start in range(0, len(tokens), BLOCK):
            one.blocks.append(blocks.pop())
            part = tokens[start : start + BLOCK]
            cached[one.blocks[-1], : len(part)] = part
        chunks.append(Chunk(one, len(tokens) - 1, 1, samples=True))
    packed = packer.pack(LAYOUT, Plan("decode", tuple(chunks)))
    for seat, of_seat in packer.new_biases():
        biases[seat] = of_seat
    logits = rng.integers(-20, 20, (ROWS, 11)).astype(np.float32) / 4
    out = np.asarray(device(logits, cached, biases, packed))
    for row, chunk in enumerate(chunks):
        one = chunk.sequence
        expected = reference(logits[row], one.sampling, one.tokens, one.num_prompt, one.stop_tokens)
        np.testing.assert_array_equal(out[row], expected)
    wants = any(c.sequence.sampling.has_penalties or c.sequence.sampling.logit_bias for c in chunks)
    assert LAYOUT.unpack(packed).adjusts >= wants


@pytest.fixture(scope="module")
def llm() -> LLM:
    llm = tiny_llm(RUNTIME)
    llm.load_adapter("a", random_adapter(CONFIG, 1, rank=4))
    llm.warm_up(("prefill", "decode", "score"))
    return llm


def expected(llm: LLM, one: Sequence) -> list[int]:
    """Greedy tokens, from the logits of the whole sequence and the reference."""
    logits = llm.score([Prompt(one.tokens[:-1], one.adapter)])[0]
    return [
        int(
            reference(
                logits[end - 1], one.sampling, one.tokens[:end], one.num_prompt, one.stop_tokens
            ).argmax()
        )
        for end in range(one.num_prompt, len(one.tokens))
    ]


def random_sampling(rng: np.random.Generator, temperature: float = 0.0) -> Sampling:
    """Everything at once, each half of the time."""

    def maybe(value: float, otherwise: float) -> float:
        return value if rng.random() < 0.5 else otherwise

    biased = rng.choice(VOCAB, 5, replace=False).tolist() if rng.random() < 0.5 else []
    return Sampling(
        temperature=temperature,
        min_p=maybe(0.05, 0.0),
        seed=int(rng.integers(100)),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        repetition_penalty=maybe(float(rng.uniform(0.8, 2)), 1.0),
        logit_bias={token: float(rng.uniform(-4, 4)) for token in biased},
        min_tokens=int(rng.integers(0, 6)),
    )


def random_sequence(
    rng: np.random.Generator, sampling: Sampling, prefix: list[int] | None = None
) -> Sequence:
    # Few different tokens, so that they repeat.
    prompt = (prefix or []) + rng.integers(0, 12, int(rng.integers(1, 24))).tolist()
    stops = frozenset(rng.choice(VOCAB, 12, replace=False).tolist())
    adapter = "a" if rng.random() < 0.5 else None
    return Sequence(prompt, len(prompt), adapter, int(rng.integers(6, 16)), sampling, stops)


def copy(one: Sequence) -> Sequence:
    prompt = one.tokens[: one.num_prompt]
    return Sequence(
        prompt, len(prompt), one.adapter, one.max_new_tokens, one.sampling, one.stop_tokens
    )


def run(engine: Engine, sequences: list[Sequence]) -> None:
    for one in sequences:
        engine.add(one)
    engine.run_until_done()


def test_greedy_tokens_in_traffic_are_those_of_the_reference(llm: LLM) -> None:
    """Shared prefixes, prompts in chunks, sequences that are computed again, seats used again."""
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 12, 20).tolist()
    sequences = [
        random_sequence(rng, random_sampling(rng), shared if number % 3 == 0 else None)
        for number in range(40)
    ]
    engine = Engine(llm.runner)
    engine.scheduler.blocks.allocate(35)
    addresses = llm.runner.addresses()
    with CompilationCounter() as compilations:
        run(engine, sequences)
    assert compilations.count == 0
    assert llm.runner.addresses() == addresses
    assert engine.scheduler.preemptions > 0 and engine.scheduler.prefix_hits > 0
    assert any(one.num_prompt > 16 for one in sequences)
    for one in sequences:
        assert one.generated == expected(llm, one)
        early = one.generated[: one.sampling.min_tokens]
        assert not one.stop_tokens & set(early)
    assert any(one.end_reason == "stop" for one in sequences)


def test_what_a_row_asks_for_changes_no_other_row(llm: LLM) -> None:
    """Sampled and greedy requests get the tokens that they get alone, and the same bits."""
    rng = np.random.default_rng(1)
    plain = [
        random_sequence(rng, Sampling(temperature=1.2, top_k=9, top_p=0.9, seed=3)),
        random_sequence(rng, Sampling()),
    ]
    asking = [random_sequence(rng, random_sampling(rng, temperature=0.9)) for _ in range(4)]
    for one in (*plain, *asking):
        one.num_logprobs = 3
    together = [copy(one) for one in (*plain, *asking)]
    beside_none = [copy(one) for one in plain]
    run(Engine(llm.runner), together)
    run(Engine(llm.runner), beside_none)
    assert [one.tokens for one in together[:2]] == [one.tokens for one in beside_none]
    for one in together:
        run(Engine(llm.runner), [alone := copy(one)])
        assert alone.tokens == one.tokens


def test_one_step_ahead_or_not(llm: LLM) -> None:
    rng = np.random.default_rng(2)
    sequences = [random_sequence(rng, random_sampling(rng, temperature=1.0)) for _ in range(12)]
    answers = []
    for ahead in (True, False):
        copies = [copy(one) for one in sequences]
        run(Engine(llm.runner, ahead=ahead), copies)
        answers.append([one.tokens for one in copies])
    assert answers[0] == answers[1]


def test_a_seat_forgets_the_biases_of_the_request_before(llm: LLM) -> None:
    """The device keeps what it was told of a seat until it is told something else."""
    engine = Engine(llm.runner)
    prompt = Prompt([1, 2, 3])
    plain = llm.generate([prompt], max_new_tokens=8)[0].tokens
    forbidden = Sampling(logit_bias=dict.fromkeys(plain, -100.0))
    assert not set(plain) & set(
        llm.generate([prompt], max_new_tokens=8, sampling=forbidden)[0].tokens
    )
    # Its penalty has logits adjusted in the same seat.
    penalised = Sequence([1, 2, 3], 3, None, 8, Sampling(presence_penalty=1e-6))
    run(engine, [penalised])
    assert penalised.generated == list(plain)


def test_the_most_biases(llm: LLM) -> None:
    """All 64 tokens but one; the table of a seat has room for more."""
    only = Sampling(logit_bias={token: -100.0 for token in range(VOCAB) if token != 7})
    tokens = llm.generate([Prompt([1, 2])], max_new_tokens=3, sampling=only)[0].tokens
    assert tokens == (7, 7, 7)


def test_min_tokens_put_off_the_end(llm: LLM) -> None:
    prompt = Prompt([5, 6])
    first = llm.generate([prompt], max_new_tokens=6)[0].tokens[0]
    for least in (0, 4):
        (done,) = llm.generate(
            [prompt], max_new_tokens=6, sampling=Sampling(min_tokens=least), stop_tokens=[first]
        )
        assert (first in done.tokens[:least]) is False
        assert len(done.tokens) == 1 if least == 0 else len(done.tokens) > 4
