"""Shrink, gate_up and down, each by itself, against NumPy float64.

Each kernel gets its inputs from the oracle, rounded to the compute dtype, so its error is its own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelora_kernels import ExpertPages, down, gate_up, shrink
from tests.kernels.cases import (
    DTYPES,
    ONE_TOKEN,
    SQUARE,
    TOP_8,
    WIDE,
    Activation,
    LayerCase,
    LayerSpec,
    assert_close,
    assert_same_bits,
    compiled,
    layer_specs,
    poisoned,
)

#: Rows of a full tile, for each shape; more than there are rows at all for one token.
TILE_ROWS = {ONE_TOKEN: 16, TOP_8: 4, WIDE: 16, SQUARE: 8}

#: Rows by which buffers are larger than needed.
EXTRA = 3


def with_extra_rows(rows: np.ndarray, axis: int = 0) -> np.ndarray:
    widths = [(0, EXTRA if dim == axis else 0) for dim in range(rows.ndim)]
    return np.pad(rows, widths, constant_values=np.nan)


def run_shrink(
    case: LayerCase,
    site_names: tuple[str, ...],
    x: np.ndarray,
    *,
    of_tokens: bool,
    in_place: bool = True,
    page_seed: int = 0,
) -> np.ndarray:
    pairs, shape = (
        case.shape.pairs,
        (len(site_names), case.shape.pairs + EXTRA, case.shape.max_rank),
    )
    pages = case.pages(page_seed)
    top_k = case.shape.top_k if of_tokens else None
    program = compiled(shrink, pairs=pairs, tile_rows=TILE_ROWS[case.shape], top_k=top_k)
    ranks = program(
        poisoned(shape, case.dtype) if in_place else None,
        case.cast(x),
        case.token_sort(TILE_ROWS[case.shape]),
        tuple(getattr(pages, name) for name in site_names),
        case.layer,
    )
    return np.asarray(ranks)[:, :pairs]


def run_gate_up(
    case: LayerCase,
    *,
    lora: bool = True,
    activation: Activation = "silu",
    bias: bool = False,
    in_place: bool = True,
    page_seed: int = 0,
) -> np.ndarray:
    pairs, tile_rows = case.shape.pairs, TILE_ROWS[case.shape]
    pages = case.pages(page_seed)
    hidden = compiled(gate_up, top_k=case.shape.top_k, tile_rows=tile_rows, activation=activation)(
        poisoned((pairs + EXTRA, case.shape.intermediate), case.dtype) if in_place else None,
        case.cast(case.x),
        case.cast(case.gate_up),
        case.token_sort(tile_rows),
        case.layer,
        bias=case.cast(case.gate_up_bias) if bias else None,
        sites=(pages.gate, pages.up) if lora else None,
    )
    return np.asarray(hidden)[: len(case.rows)]


def run_down(
    case: LayerCase,
    hidden: np.ndarray,
    *,
    lora: bool = True,
    bias: bool = False,
    in_place: bool = True,
    page_seed: int = 0,
    dtype: str = "float32",
) -> np.ndarray:
    pairs, tile_rows = case.shape.pairs, TILE_ROWS[case.shape]
    outputs = compiled(down, pairs=pairs, tile_rows=tile_rows, dtype=dtype)(
        poisoned((pairs + EXTRA, case.shape.hidden), dtype) if in_place else None,
        case.cast(with_extra_rows(hidden)),
        case.cast(case.down),
        case.token_sort(tile_rows),
        case.layer,
        bias=case.cast(case.down_bias) if bias else None,
        site=case.pages(page_seed).down if lora else None,
    )
    return np.asarray(outputs)[: len(case.rows)]


def assert_ranks_close(actual: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    """Compare where ``expected`` is defined."""
    defined = ~np.isnan(expected)
    assert_close(actual[defined], expected[defined], dtype)


# Against the oracle -------------------------------------------------------------------------------


@settings(max_examples=40)
@given(spec=layer_specs())
def test_shrink_of_tokens(spec: LayerSpec) -> None:
    case = LayerCase(spec)
    expected = case.rank_activations(("gate", "up"), case.token_rows())
    ranks = run_shrink(case, ("gate", "up"), case.x, of_tokens=True)
    assert_ranks_close(ranks, expected, case.dtype)


@settings(max_examples=40)
@given(spec=layer_specs())
def test_shrink_of_sorted_rows(spec: LayerSpec) -> None:
    case = LayerCase(spec)
    hidden = case.hidden_rows()
    expected = case.rank_activations(("down",), hidden)
    ranks = run_shrink(case, ("down",), with_extra_rows(hidden), of_tokens=False)
    assert_ranks_close(ranks, expected, case.dtype)


@settings(max_examples=40)
@given(spec=layer_specs())
def test_gate_up(spec: LayerSpec) -> None:
    case = LayerCase(spec)
    ranks = case.rank_activations(("gate", "up"), case.token_rows())
    expected = case.gated_hidden(ranks, "silu", bias=False)
    assert_close(run_gate_up(case), expected, case.dtype)


@settings(max_examples=40)
@given(spec=layer_specs())
def test_down(spec: LayerSpec) -> None:
    case = LayerCase(spec)
    hidden = case.hidden_rows()
    expected = case.expert_outputs(hidden, case.rank_activations(("down",), hidden), bias=False)
    # The result is float32 unless asked for; only the rank activations are rounded.
    outputs = run_down(case, hidden)
    assert outputs.dtype == np.float32
    assert_close(outputs.astype(jnp.dtype(case.dtype)), expected, case.dtype)


def test_biases_and_clamped_swiglu() -> None:
    case = LayerCase(LayerSpec(WIDE, num_tokens=32))
    # Large enough for the clamp to matter.
    case.x = case.x * 8
    ranks = case.rank_activations(("gate", "up"), case.token_rows())
    expected = case.gated_hidden(ranks, "clamped_swiglu", bias=True)
    assert np.abs(expected).max() > 7
    hidden = run_gate_up(case, activation="clamped_swiglu", bias=True)
    assert_close(hidden, expected, "float32")

    rows = case.hidden_rows()
    expected = case.expert_outputs(rows, case.rank_activations(("down",), rows), bias=True)
    assert_close(run_down(case, rows, bias=True), expected, "float32")


def test_rank_activations_are_scaled_before_they_are_rounded() -> None:
    case = LayerCase(LayerSpec(TOP_8, dtype="bfloat16"))
    ranks = run_shrink(case, ("gate", "up"), case.x, of_tokens=True).astype(np.float64)
    expected = case.rank_activations(("gate", "up"), case.token_rows())
    # One rounding is off by the unit roundoff 2^-8 at most; the rest is for the float32 sum.
    bound = 2.0**-8 * np.abs(expected) + 1e-6
    defined = ~np.isnan(expected)
    assert (np.abs(ranks - expected)[defined] <= bound[defined]).all()


def test_down_in_another_dtype_is_rounded_once() -> None:
    case = LayerCase(LayerSpec(TOP_8, dtype="bfloat16", num_tokens=6))
    hidden = case.hidden_rows()
    exact = run_down(case, hidden)
    assert_same_bits(run_down(case, hidden, dtype="bfloat16"), exact.astype(jnp.dtype("bfloat16")))


def test_base_model() -> None:
    case = LayerCase(LayerSpec(TOP_8, num_tokens=6))
    expected = case.gated_hidden(None, "silu", bias=False)
    assert_close(run_gate_up(case, lora=False), expected, "float32")
    hidden = case.hidden_rows()
    expected = case.expert_outputs(hidden, None, bias=False)
    assert_close(run_down(case, hidden, lora=False), expected, "float32")


def test_adapters_matter() -> None:
    """Each kind of adapter changes its rows by more than any tolerance here."""
    case = LayerCase(LayerSpec(WIDE, seed=1))
    ranks = case.rank_activations(("gate", "up"), case.token_rows())
    change = case.gated_hidden(ranks, "silu", bias=False) - case.gated_hidden(
        None, "silu", bias=False
    )
    hidden = case.hidden_rows()
    ranks = case.rank_activations(("down",), hidden)
    down_change = case.expert_outputs(hidden, ranks, bias=False)
    down_change = down_change - case.expert_outputs(hidden, None, bias=False)
    kinds = set()
    for row, pair in enumerate(case.rows):
        gate = case.update("gate", pair) or case.update("up", pair)
        assert (np.abs(change[row]).max() > 1e-2) == (gate is not None)
        assert (np.abs(down_change[row]).max() > 1e-2) == (case.update("down", pair) is not None)
        kinds.add(None if case.adapter(pair) < 0 else case.spec.kinds[case.adapter(pair)])
    assert kinds == {None, *case.spec.kinds}


# Bits ---------------------------------------------------------------------------------------------


def every_kernel(case: LayerCase, **options: object) -> list[np.ndarray]:
    """The defined results of all three kernels."""
    hidden = case.hidden_rows()
    ranks = run_shrink(case, ("gate", "up"), case.x, of_tokens=True, **options)
    down_ranks = run_shrink(case, ("down",), with_extra_rows(hidden), of_tokens=False, **options)
    defined = ~np.isnan(case.rank_activations(("gate", "up"), case.token_rows()))
    down_defined = ~np.isnan(case.rank_activations(("down",), hidden))
    return [
        ranks[defined],
        down_ranks[down_defined],
        run_gate_up(case, **options),
        run_down(case, hidden, **options),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_again(dtype: str) -> None:
    case = LayerCase(LayerSpec(TOP_8, dtype=dtype, num_tokens=6))
    first = every_kernel(case)
    assert_same_bits(every_kernel(case), first)


def test_given_buffers_make_no_difference() -> None:
    case = LayerCase(LayerSpec(TOP_8, dtype="bfloat16", num_tokens=6))
    assert_same_bits(every_kernel(case, in_place=False), every_kernel(case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_does_not_depend_on_where_pages_are(dtype: str) -> None:
    case = LayerCase(LayerSpec(TOP_8, dtype=dtype, num_tokens=6))
    assert (case.pages(0).gate.table != case.pages(1).gate.table).any()
    assert_same_bits(every_kernel(case, page_seed=1), every_kernel(case, page_seed=0))


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(DTYPES))
def test_rows_without_adapter_are_those_of_the_base_model(seed: int, dtype: str) -> None:
    case = LayerCase(LayerSpec(TOP_8, dtype=dtype, assignment="half_base", seed=seed))
    base_rows = np.array([r for r, pair in enumerate(case.rows) if case.adapter(pair) < 0], int)
    hidden = case.hidden_rows()
    assert_same_bits(run_gate_up(case)[base_rows], run_gate_up(case, lora=False)[base_rows])
    assert_same_bits(
        run_down(case, hidden)[base_rows], run_down(case, hidden, lora=False)[base_rows]
    )


# Errors -------------------------------------------------------------------------------------------


def trace(kernel: Callable, out: jax.Array | None, *args: object, **options: object) -> None:
    """Only what happens before anything is compiled."""

    def program(out: jax.Array | None) -> None:
        kernel(*args, **options, tile_rows=16, out=None if out is None else jax.new_ref(out))

    jax.eval_shape(program, out)


def call_gate_up(case: LayerCase, out: jax.Array | None = None, **arguments: object) -> None:
    x, weight, sort = case.cast(case.x), case.cast(case.gate_up), case.token_sort(16)
    trace(gate_up, out, x, weight, sort, case.layer, top_k=case.shape.top_k, **arguments)


def call_down(case: LayerCase, out: jax.Array | None = None, **arguments: object) -> None:
    hidden, weight, sort = case.cast(case.hidden_rows()), case.cast(case.down), case.token_sort(16)
    trace(down, out, hidden, weight, sort, case.layer, pairs=case.shape.pairs, **arguments)


def call_shrink(case: LayerCase, out: jax.Array | None = None, sites: tuple = ()) -> None:
    x, sort, sites = case.cast(case.x), case.token_sort(16), sites or case.pages()[:2]
    sizes = {"pairs": case.shape.pairs, "top_k": case.shape.top_k}
    trace(shrink, out, x, sort, sites, case.layer, **sizes)


def test_sites_of_different_max_rank_raise() -> None:
    case = LayerCase(LayerSpec(SQUARE))
    pages: ExpertPages = case.pages()
    short = pages.up._replace(table=pages.up.table[:, :, :, :1])
    with pytest.raises(ValueError, match=r"differ in max_rank: \[32, 16\]"):
        call_shrink(case, sites=(pages.gate, short))


@pytest.mark.parametrize(
    ("call", "shape", "dtype"),
    [
        (call_shrink, (2, 20, 32), "bfloat16"),
        (call_gate_up, (20, 32), "bfloat16"),
        (call_down, (20, 32), "float32"),  # by default, whatever the compute dtype
    ],
)
def test_an_out_that_does_not_fit_raises(
    call: Callable, shape: tuple[int, ...], dtype: str
) -> None:
    case = LayerCase(LayerSpec(SQUARE, dtype="bfloat16"))
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    call(case, out=poisoned(shape, dtype))
    with pytest.raises(ValueError, match=f"out is {other}"):
        call(case, out=poisoned(shape, other))
    with pytest.raises(ValueError, match="out is"):
        call(case, out=poisoned((1, *shape), dtype))
    with pytest.raises(ValueError, match="too small"):
        call(case, out=poisoned((*shape[:-2], 19, 32), dtype))


def test_tolerances_are_not_vacuous() -> None:
    """A wrong expert, adapter or scaling for a single row would be seen."""
    case = LayerCase(LayerSpec(WIDE, dtype="bfloat16"))
    hidden = case.hidden_rows()
    expected = case.expert_outputs(hidden, None, bias=False)
    wrong = expected.copy()
    wrong[3] = wrong[4]
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(wrong.astype(jnp.dtype("bfloat16")), expected, "bfloat16")
    assert_close(expected.astype(jnp.dtype("bfloat16")), expected, "bfloat16")
