"""The whole path on a tiny random model: isolation, static shapes, splitting, and bad input."""

import inspect
import re
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from moelora_jax import (
    LLM,
    CapacityError,
    MoeLoraError,
    Prompt,
    RequestError,
    Sampling,
)
from moelora_jax.buckets import CompilationCounter, ProgramKey
from moelora_jax.workspace import num_bytes
from tests.tiny_llm import random_adapter, tiny_llm

ADAPTERS = {"a": 1, "b": 8, "c": 24}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = tiny_llm()
    for seed, (name, rank) in enumerate(ADAPTERS.items()):
        llm.load_adapter(name, random_adapter(llm.config, seed, rank=rank))
    llm.warm_up(("prefill", "decode", "score"))
    return llm


def random_prompts(llm: LLM, rng: np.random.Generator, rows: int, longest: int) -> list[Prompt]:
    names = [None, None, *llm.runner.registry.names()]
    return [
        Prompt(
            rng.integers(0, llm.config.vocab_size, int(rng.integers(1, longest + 1))).tolist(),
            names[int(rng.integers(len(names)))],
        )
        for _ in range(rows)
    ]


def test_adapters_change_their_rows(llm: LLM) -> None:
    base, *adapted = llm.score([Prompt([1, 2, 3], name) for name in (None, *ADAPTERS)])
    for logits in adapted:
        assert np.abs(logits - base).max() > 0.01


def test_base_rows_are_bitwise_those_of_the_base_only_program(llm: LLM) -> None:
    rng = np.random.default_rng(0)
    base_rows = [Prompt(rng.integers(0, llm.config.vocab_size, n).tolist()) for n in (5, 3, 4)]
    # In the second batch the last row has an adapter, so that the program with LoRA runs.
    alone = llm.score([*base_rows, Prompt([7, 8])])
    mixed = llm.score([*base_rows, Prompt([7, 8], "c")])
    assert not np.array_equal(alone[3], mixed[3])
    for expected, actual in zip(alone[:3], mixed[:3], strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_a_row_does_not_depend_on_its_neighbours(llm: LLM) -> None:
    """Bitwise, as long as the row lies at the same place of the same bucket."""
    row = Prompt([5, 6, 7, 8], "b")
    alone = llm.score([row])[0]
    for other in (None, "a", "b", "c"):
        beside = llm.score([row, Prompt([9, 10, 11], other)])[0]
        np.testing.assert_array_equal(beside, alone)


def test_same_batch_is_bitwise_equal_after_loads_and_unloads_of_others(llm: LLM) -> None:
    rng = np.random.default_rng(1)
    prompts = random_prompts(llm, rng, 4, 4)
    before = llm.score(prompts)
    sites = (None, ("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj"))
    loaded: list[str] = []
    for number in range(100):
        if loaded and rng.random() < 0.5:
            llm.unload_adapter(loaded.pop(int(rng.integers(len(loaded)))))
        else:
            name = f"other {number}"
            rank = int(rng.integers(1, 33))
            adapter = random_adapter(
                llm.config, number, rank=rank, sites=sites[int(rng.integers(3))]
            )
            llm.load_adapter(name, adapter)
            loaded.append(name)
    for name in loaded:
        llm.unload_adapter(name)
    for expected, actual in zip(before, llm.score(prompts), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.filterwarnings("error")
def test_steady_state_compiles_nothing_and_moves_nothing(llm: LLM) -> None:
    """1,000 random batches; an unused donation would warn, which is an error here."""
    rng = np.random.default_rng(2)
    addresses = llm.runner.addresses()
    with CompilationCounter() as compilations:
        for _ in range(1000):
            rows, longest = int(rng.integers(1, 7)), int(rng.integers(1, 13))
            prompts = random_prompts(llm, rng, rows, longest)
            if rng.random() < 0.1:
                llm.score(prompts)
            else:
                llm.generate(prompts, max_new_tokens=int(rng.integers(1, 3)))
    assert compilations.count == 0
    assert llm.runner.addresses() == addresses


def test_reloading_and_evicting_keeps_addresses_and_programs(llm: LLM) -> None:
    addresses = llm.runner.addresses()
    with CompilationCounter() as compilations:
        for seed in range(6):  # More adapters than slots: some are evicted, and come back.
            llm.load_adapter(f"many {seed}", random_adapter(llm.config, seed, rank=8))
        for seed in range(6):
            llm.generate([Prompt([1, 2], f"many {seed}"), Prompt([3])], max_new_tokens=2)
        for seed in range(6):
            llm.unload_adapter(f"many {seed}")
    assert compilations.count == 0
    assert llm.runner.addresses() == addresses


def test_reloading_a_name_uses_the_new_weights(llm: LLM) -> None:
    prompt = Prompt([4, 5, 6], "renewed")
    llm.load_adapter("renewed", random_adapter(llm.config, 10))
    first = llm.score([prompt])[0]
    llm.load_adapter("renewed", random_adapter(llm.config, 11))
    second = llm.score([prompt])[0]
    assert not np.array_equal(first, second)
    llm.load_adapter("renewed", random_adapter(llm.config, 10))
    np.testing.assert_array_equal(llm.score([prompt])[0], first)
    llm.unload_adapter("renewed")


def test_batches_above_the_largest_bucket_are_split(llm: LLM) -> None:
    """Prompts longer than the prefill bucket, and more rows than it has sequences."""
    rng = np.random.default_rng(3)
    prompts = [
        Prompt(rng.integers(0, llm.config.vocab_size, length).tolist(), name)
        for length, name in ((40, "a"), (2, None), (33, None), (17, "c"), (1, "b"), (16, "a"))
    ]
    together = llm.score(prompts)
    for prompt, logits in zip(prompts, together, strict=True):
        assert logits.shape == (len(prompt.tokens), llm.config.vocab_size)
        # Chunks of one prompt are cut elsewhere in another batch, and float32 sums in attention
        # then run over tiles of another size.
        np.testing.assert_allclose(llm.score([prompt])[0], logits, rtol=0, atol=1e-5)


def test_more_adapters_than_slots_in_one_call(llm: LLM) -> None:
    names = [f"queue {i}" for i in range(7)]
    for seed, name in enumerate(names):
        llm.load_adapter(name, random_adapter(llm.config, seed, rank=4))
    together = llm.generate([Prompt([1, 2, 3], name) for name in names], max_new_tokens=3)
    for name, completion in zip(names, together, strict=True):
        alone = llm.generate([Prompt([1, 2, 3], name)], max_new_tokens=3)[0]
        assert alone.tokens == completion.tokens
        llm.unload_adapter(name)


def test_generate_continues_what_score_predicts(llm: LLM) -> None:
    prompts = [Prompt([1, 2, 3], "a"), Prompt([9, 8, 7, 6, 5])]
    for prompt, completion in zip(prompts, llm.generate(prompts, max_new_tokens=5), strict=True):
        tokens = [*prompt.tokens, *completion.tokens]
        logits = llm.score([Prompt(tokens, prompt.adapter)])[0]
        start = len(prompt.tokens) - 1
        np.testing.assert_array_equal(logits[start:-1].argmax(axis=-1), completion.tokens)


def test_sampling_is_reproducible_and_independent_of_the_batch(llm: LLM) -> None:
    prompt = Prompt([1, 2, 3], "a")
    sampling = Sampling(temperature=1.5, top_k=20, top_p=0.95, seed=7)
    alone = llm.generate([prompt], max_new_tokens=6, sampling=sampling)[0]
    others = [Prompt([5], "b"), Prompt([6, 7])]
    beside = llm.generate([*others, prompt], max_new_tokens=6, sampling=sampling)[2]
    assert alone.tokens == beside.tokens
    another = Sampling(temperature=1.5, top_k=20, top_p=0.95, seed=8)
    assert llm.generate([prompt], max_new_tokens=6, sampling=another)[0].tokens != alone.tokens


def test_stop_tokens_end_a_completion(llm: LLM) -> None:
    tokens = llm.generate([Prompt([1, 2, 3])], max_new_tokens=6)[0].tokens
    stopped = llm.generate([Prompt([1, 2, 3])], max_new_tokens=6, stop_tokens=[tokens[2]])[0]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == tokens[: tokens.index(tokens[2]) + 1]


def test_a_row_that_is_no_prompt_is_refused(llm: LLM) -> None:
    sequences = inspect.unwrap(LLM._sequences)  # Without the tests' own checks of types.
    with pytest.raises(RequestError, match=r"row 1: is of type list; write Prompt\(tokens, ad"):
        sequences(llm, [Prompt([1]), [1, 2]], 0, Sampling(), frozenset())


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], RequestError, "the batch is empty"),
        ([Prompt([])], RequestError, "row 0: the prompt has no tokens"),
        ([Prompt(np.array([[1]]))], RequestError, "row 0: a prompt is a list of token ids"),
        ([Prompt([1]), Prompt([1], "nobody")], RequestError, "row 1: adapter 'nobody' is not"),
        ([Prompt([1, 64])], RequestError, "row 0: token id 64 is outside the vocabulary of 64"),
        ([Prompt([-1])], RequestError, "row 0: token id -1"),
        ([Prompt(np.array([1.5]))], RequestError, "token ids must be integers"),
        ([Prompt([1] * 49)], CapacityError, "row 0: 49 prompt tokens exceed"),
    ],
)
def test_bad_rows_are_refused_before_anything_runs(
    llm: LLM, prompts: list[Prompt], error: type[MoeLoraError], message: str
) -> None:
    cache = llm.runner.state.cache.keys
    with pytest.raises(error, match=message):
        llm.score(prompts)
    assert llm.runner.state.cache.keys is cache


def test_too_long_a_generation_is_refused(llm: LLM) -> None:
    with pytest.raises(CapacityError, match="row 0: 40 prompt tokens and 9 new ones exceed"):
        llm.generate([Prompt([1] * 40)], max_new_tokens=9)
    with pytest.raises(RequestError, match="max_new_tokens must be at least 1"):
        llm.generate([Prompt([1])], max_new_tokens=0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens must be at least 1, a whole number, not 2.5"),
        ({"max_new_tokens": "2"}, "max_new_tokens must be at least 1, a whole number, not '2'"),
        ({"sampling": {"temperature": 1}}, "sampling must be a Sampling, not {'temperature': 1}"),
        ({"stop_tokens": 3}, "stop_tokens must be a sequence of token ids, not 3"),
        ({"stop_tokens": ["a"]}, "stop_tokens must be a sequence of token ids, not ['a']"),
        ({"prompts": Prompt([1])}, "prompts is a sequence of rows; write [Prompt(...)]"),
    ],
)
def test_options_of_other_types_are_refused(
    llm: LLM, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        llm.generate(**{"prompts": [Prompt([1])]} | options)


def test_an_error_in_a_step_leaves_the_engine_usable(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llm.generate([Prompt([1, 2])], max_new_tokens=2)

    def fail(*_: object) -> Future[None]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(llm.runner, "run", fail)
        llm.generate([Prompt([1, 2])] * 6, max_new_tokens=2)
    assert llm.generate([Prompt([1, 2])], max_new_tokens=2) == expected


def test_memory_plan_is_what_is_allocated_and_aliased(llm: LLM) -> None:
    plan = llm.memory_plan()
    assert plan.total == sum(size for _, size in plan)
    state = num_bytes(llm.runner.state)
    assert plan.workspaces + plan.kv_cache == state
    for bucket in llm.runtime.buckets.decode_buckets():
        for lora in (False, True):
            program = llm.runner.programs[ProgramKey("decode", bucket, lora)]
            analysis = program.memory_analysis()
            # All donated bytes come back in place; the only new output is the sampled tokens.
            assert analysis.alias_size_in_bytes == state
            assert analysis.output_size_in_bytes - state <= 8 * bucket.sequences + 1024
