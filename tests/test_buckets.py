"""Packing of batches, the choice of buckets, and the compiled programs."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.compilation_cache import compilation_cache

from moelora_jax import BucketConfig, MoeLoraError, RequestError
from moelora_jax.buckets import (
    Batch,
    BatchLayout,
    CompilationCounter,
    ProgramKey,
    Programs,
    choose_bucket,
    program_keys,
)
from moelora_jax.config import Bucket

INT32 = st.integers(-(2**31), 2**31 - 1)


@given(
    tokens=st.integers(1, 9),
    sequences=st.integers(1, 5),
    blocks=st.integers(1, 4),
    seed=st.integers(),
)
def test_unpacking_undoes_packing_bitwise(
    tokens: int, sequences: int, blocks: int, seed: int
) -> None:
    layout = BatchLayout(Bucket(tokens, sequences), blocks)
    rng = np.random.default_rng(abs(seed))
    batch = Batch(
        *(
            rng.integers(-(2**31), 2**31, field.shape).astype(np.int32).view(field.dtype)
            for field in layout.shapes()
        )
    )
    packed = layout.padding()
    assert packed.dtype == np.int32
    assert packed.shape == (layout.size,)
    for view, field in zip(layout.unpack(packed), batch, strict=True):
        view[...] = field
    for field, expected in zip(layout.unpack(jnp.asarray(packed)), batch, strict=True):
        actual = np.asarray(field)
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        np.testing.assert_array_equal(actual.view(np.int32), expected.view(np.int32))


def test_padding_is_new_each_time() -> None:
    layout = BatchLayout(Bucket(4, 2), 3)
    layout.padding()[:] = 7
    batch = layout.unpack(layout.padding())
    assert batch.num_tokens == 0
    assert (batch.adapter_of_token == -1).all()
    assert not batch.query_counts.any()


@given(st.sets(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1), st.data())
def test_the_smallest_bucket_that_holds_a_batch(
    shapes: set[tuple[int, int]], data: st.DataObject
) -> None:
    buckets = [Bucket(*shape) for shape in shapes]
    tokens, sequences = data.draw(st.integers(1, 45)), data.draw(st.integers(1, 10))
    fitting = [b for b in buckets if b.tokens >= tokens and b.sequences >= sequences]
    if not fitting:
        with pytest.raises(RequestError, match=f"no bucket holds {tokens} tokens"):
            choose_bucket(buckets, tokens, sequences)
        return
    chosen = choose_bucket(buckets, tokens, sequences)
    assert chosen in fitting
    assert chosen.tokens == min(bucket.tokens for bucket in fitting)


@pytest.mark.parametrize("sizes", [(), (0, 1), (4, 2), (2, 2)])
def test_bucket_sizes_must_ascend(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending positive sizes"):
        BucketConfig(decode=sizes)


def test_every_kind_has_a_program_per_bucket_with_and_without_adapters() -> None:
    keys = program_keys(BucketConfig(decode=(1, 2), prefill=(8,)), ("prefill", "decode"))
    assert len(keys) == len(set(keys)) == 6
    assert ProgramKey("decode", Bucket(2, 2), lora=True) in keys
    assert ProgramKey("prefill", Bucket(8, 2), lora=False) in keys


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kinds", ["score", ("score", "train")])
def test_a_kind_of_program_that_does_not_exist(kinds: Any) -> None:
    message = f"kinds of programs are some of ('prefill', 'decode', 'score'), not {kinds!r}"
    with pytest.raises(MoeLoraError, match=re.escape(message)):
        program_keys(BucketConfig(), kinds)


def test_programs_are_compiled_once_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    key = ProgramKey("decode", Bucket(2, 2), lora=False)
    built = []

    def build(key: ProgramKey):
        built.append(key)
        return lambda state, x: (state + x, x * 2)

    vector = jax.ShapeDtypeStruct((3,), jnp.float32)
    programs = Programs(build, lambda _: (vector, vector))
    assert key not in programs
    with CompilationCounter() as compilations:
        report = programs.compile([key, key], progress=True)
        assert (report.programs, report.seconds > 0) == (1, True)
        assert programs.compile([key]).programs == 0
        assert compilations.count == 1
        state, out = programs[key](jnp.ones(3), jnp.full(3, 2.0))
    assert built == [key]
    assert key in programs
    assert len(programs) == 1
    np.testing.assert_array_equal(state, np.full(3, 3.0))
    np.testing.assert_array_equal(out, np.full(3, 4.0))


def test_a_closed_counter_no_longer_counts() -> None:
    counter = CompilationCounter()
    counter.close()
    jax.jit(lambda x: x * 3 + 17).lower(jnp.ones(5)).compile()
    assert counter.count == 0


def test_programs_come_from_the_cache_at_the_second_start(tmp_path: Path) -> None:
    def build(key: ProgramKey):
        return lambda state, x: (state * key.bucket.tokens, x)

    keys = [ProgramKey("decode", Bucket(size, size), lora=False) for size in (1, 2, 3)]
    before = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    reports = []
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        compilation_cache.reset_cache()
        for _ in range(2):
            programs = Programs(
                build,
                lambda key: (jax.ShapeDtypeStruct((key.bucket.tokens,), jnp.float32),) * 2,
            )
            reports.append(programs.compile(keys))
            state, _ = programs[keys[2]](jnp.ones(3), jnp.ones(3))
            np.testing.assert_array_equal(state, np.full(3, 3.0))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        compilation_cache.reset_cache()
    assert [report.from_cache for report in reports] == [0, 3]
    assert "cold" in str(reports[0]) and "warm" in str(reports[1])


def test_a_program_that_does_not_compile_says_so() -> None:
    def build(_: ProgramKey):
        return lambda state, x: (state + x.nonsense, x)

    vector = jax.ShapeDtypeStruct((3,), jnp.float32)
    programs = Programs(build, lambda _: (vector, vector))
    with pytest.raises(AttributeError, match="nonsense"):
        programs.compile([ProgramKey("decode", Bucket(1, 1), lora=False)])
    assert len(programs) == 0
