"""Triton's kernels under Triton's interpreter, against the reference; a process of its own.

Triton decides at import whether kernels are interpreted, so ``TRITON_INTERPRET=1`` must be set from
outside. Launches are replaced by calls on torch tensors; everything else is what runs on a GPU.
"""

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from moelora_jax.config import MoeConfig
from moelora_jax.moe import MoeParams, moe_experts, moe_workspace_shapes
from moelora_kernels import (
    SIGNALS,
    ExpertGroups,
    LinearMap,
    TokenSort,
    dense_lora,
    embedding_lora,
    linear_lora,
    prepare_heads,
    route,
    shrink,
    sort_tokens,
    token_sort_shapes,
)
from moelora_kernels.backend import Tiled
from moelora_kernels.expert_lora import triton_gather, triton_shrink
from moelora_kernels.expert_lora.reference import gather_rows
from moelora_kernels.linear import api as linear_api
from moelora_kernels.linear import triton_many_rows
from moelora_kernels.tuning.tiles import (
    GemmTiles,
    LinearShrinkTiles,
    LinearTiles,
    MoeTiles,
    ShrinkTiles,
)
from tests.kernels.cases import (
    LAYER,
    LayerCase,
    LayerSpec,
    Shape,
    poisoned,
    poisoned_like,
    relative_error,
)


def to_torch(value: Any) -> Any:
    if isinstance(value, Tiled):
        return TensorDescriptor.from_tensor(to_torch(value.matrix), list(value.block))
    return None if value is None else torch.from_numpy(np.array(value[...]))


def to_jax(tensor: torch.Tensor) -> jax.Array:
    return jnp.asarray(tensor.numpy())


def poison(shape: jax.ShapeDtypeStruct) -> torch.Tensor:
    dtype = getattr(torch, str(shape.dtype))
    return torch.full(shape.shape, float("nan") if dtype.is_floating_point else -7, dtype=dtype)


def interpret(kernel: Any, inputs: Any, outputs: Any, refs: Any, how: Any, **constants: Any) -> Any:
    """What :func:`moelora_kernels.backend.launch` does, with torch tensors for memory."""
    refs = tuple(refs or ())
    tensors = [to_torch(ref[...]) for ref in refs]
    tensors += [poison(out) for out in outputs[len(refs) :]]
    given = [to_torch(value) for value in inputs]
    kernel[how.grid](*given, *tensors, **constants)
    for value, tensor in zip(inputs, given, strict=True):
        if isinstance(value, jax.Ref):
            value[...] = to_jax(tensor)
    for ref, tensor in zip(refs, tensors, strict=False):
        ref[...] = to_jax(tensor)
    return (*refs, *map(to_jax, tensors[len(refs) :]))


SHAPES = (
    Shape(1, 2, 6, 48, 20, 3, 1),
    Shape(1, 3, 4, 40, 24, 2, 3),
    Shape(7, 3, 4, 40, 20, 5, 4),
    Shape(20, 2, 6, 48, 24, 10, 2),
)
#: One expert and one choice: the gate projection is a dense linear layer.
DENSE_SHAPES = (Shape(7, 1, 1, 32, 32, 5, 4), Shape(33, 1, 1, 20, 48, 10, 2))
#: Runs of rows, and a second step over pages and over adapters.
RUNS = ShrinkTiles(block_k=32, num_warps=1, num_stages=1, run_rows=16, programs=5)
PRODUCTS = GemmTiles(16, 16, 1, 1)
#: More rows than runs have and fewer, few programs and many, one sum and several.
SHRINKS = (
    ShrinkTiles(block_k=16, num_warps=1, num_stages=1, run_rows=32, programs=1),
    ShrinkTiles(block_k=64, num_warps=4, num_stages=1, run_rows=16, programs=1000),
    ShrinkTiles(block_k=32, num_warps=2, num_stages=1, run_rows=16, programs=3),
)
#: One launch; few launches; a launch for each task.
TILES = (
    MoeTiles(16, PRODUCTS, GemmTiles(32, 32, 1, 1), one_launch=True),
    MoeTiles(16, PRODUCTS, PRODUCTS),
    MoeTiles(16, *[replace(PRODUCTS, shrink=RUNS)] * 2),
)
#: Rows enough that pages are copied ahead.
PROMPT_TILES = MoeTiles(64, *[replace(PRODUCTS, shrink=RUNS)] * 2)

#: One or several tiles of rows, whose sums one program has or several share.
LINEAR_TILES = (
    LinearTiles(16, 16, 16, 1, 1, stack=4),
    LinearTiles(64, 16, 32, 1, 1, stack=4),
    LinearTiles(16, 16, 16, 1, 1, parts=2),
)
#: Of one row.
ROW_TILES = LinearTiles(1, 8, 16, 1, 1)
#: Of more rows, whose tiles are loaded by descriptors; and programs of their shrink that have all
#: columns, and that share them, some of which have few.
MANY_ROWS_TILES = (LinearTiles(32, 16, 16, 1, 1), LinearTiles(16, 32, 32, 1, 1))
LINEAR_SHRINK_TILES = (LinearShrinkTiles(16, 16, 2, 1), LinearShrinkTiles(32, 16, 1, 3))


def layer(
    case: LayerCase,
    implementation: Any,
    lora: bool = True,
    tiles: MoeTiles | None = None,
    bias: bool = False,
) -> np.ndarray:
    shape = case.shape
    config = MoeConfig(shape.experts, shape.top_k, shape.hidden, shape.intermediate)
    router = jnp.zeros((2, shape.experts, shape.hidden), case.dtype)
    params = MoeParams(
        router,
        case.cast(case.gate_up),
        case.cast(case.down),
        gate_up_bias=case.cast(case.gate_up_bias) if bias else None,
        down_bias=case.cast(case.down_bias) if bias else None,
    )
    workspace: Any = None
    if implementation == "triton":
        shapes = moe_workspace_shapes(
            config,
            shape.tokens,
            num_adapters=shape.adapters if lora else 0,
            max_rank=shape.max_rank,
            dtype=case.dtype,
        )
        workspace = jax.tree.map(jax.new_ref, poisoned_like(shapes))
    out = moe_experts(
        case.cast(case.x),
        jnp.asarray(case.experts),
        jnp.asarray(case.weights, jnp.float32),
        params,
        case.layer,
        config,
        num_tokens=case.device_num_tokens,
        adapter_of_token=jnp.asarray(case.adapter_of_token) if lora else None,
        pages=case.pages() if lora else None,
        workspace=workspace,
        implementation=implementation,
        tiles=tiles,
    )
    assert workspace is None or not lora or not np.asarray(workspace.signals[...]).any()
    return np.asarray(out[...])


def check_layer(
    shape: Shape, dtype: str, num_tokens: int | None, tiles: MoeTiles, bias: bool = False
) -> None:
    spec = LayerSpec(shape, dtype=dtype, num_tokens=num_tokens, seed=3)  # type: ignore[arg-type]
    check_case(LayerCase(spec), tiles, bias)


def check_case(case: LayerCase, tiles: MoeTiles, bias: bool = False) -> None:
    expected = layer(case, "reference", bias=bias).astype(np.float64)
    out = layer(case, "triton", tiles=tiles, bias=bias)
    error = relative_error(out, expected)
    assert error <= (1e-5 if case.dtype == "float32" else 2e-3), error
    base_rows = case.adapter_of_token < 0
    base = layer(case, "triton", lora=False, tiles=tiles, bias=bias)
    assert out[base_rows].tobytes() == base[base_rows].tobytes()
    print("layer", tuple(case.shape), case.dtype, case.num_tokens, error, flush=True)


def check_shrink(case: LayerCase, tiles: ShrinkTiles) -> None:
    """Rank activations of gate and up, and of down, where they are defined."""
    shape = case.shape
    pages = case.pages()
    options: Any = {"pairs": shape.pairs, "tile_rows": 16}
    sort = sort_tokens(
        jnp.asarray(case.experts),
        jnp.asarray(case.adapter_of_token),
        case.device_num_tokens,
        num_experts=shape.experts,
        num_adapters=shape.adapters,
        tile_rows=16,
        implementation="reference",
    )
    hidden = np.random.default_rng(0).normal(size=(shape.pairs, shape.intermediate))
    assert sort.group_of_row is not None
    group = np.asarray(sort.group_of_row[...])
    has_adapter = (group >= 0) & (group % (shape.adapters + 1) > 0)
    for sites, x, top_k in (
        ((pages.gate, pages.up), case.x, shape.top_k),
        ((pages.down,), hidden, None),
    ):
        expected, actual = (
            np.asarray(
                shrink(
                    case.cast(x), sort, sites, case.layer, top_k=top_k, tiles=tiles,
                    implementation=name, **options,  # type: ignore[arg-type]
                )[...]
            )
            for name in ("reference", "triton")
        )  # fmt: skip
        error = relative_error(actual[:, has_adapter], expected[:, has_adapter].astype(np.float64))
        assert error <= 1e-5, (tiles, error)
    print("shrink", tuple(shape), tiles, flush=True)


class Calls:
    """Counts the calls of a kernel's function under the interpreter."""

    def __init__(self, module: Any, name: str) -> None:
        self.module, self.name, self.function = module, name, getattr(module, name)
        self.count = 0

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        return self.function(*args)

    def __enter__(self) -> "Calls":
        setattr(self.module, self.name, self)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self.module, self.name, self.function)


def check_shared() -> None:
    """A that all experts share is multiplied once per token, other A once per pair."""
    shape = Shape(40, 3, 6, 40, 24, 4, 1)
    case = LayerCase(LayerSpec(shape, num_tokens=37, kinds=("shared", "own"), seed=3))
    adapter = case.adapter_of_token[:37]
    tokens = np.bincount(adapter + 1, minlength=5)[1:]
    groups = (adapter[:, None] * 6 + case.experts[:37])[adapter >= 0]
    # Runs of sixteen rows at most: of tokens, of pairs for gate and up, of pairs for down.
    pairs_of_run = -(-np.bincount(groups.ravel(), minlength=24).reshape(4, 6) // 16)
    with Calls(triton_shrink, "multiply_pages") as calls:
        check_shrink(case, SHRINKS[1])
    assert calls.count == (-(-tokens[::2] // 16)).sum() + pairs_of_run[1::2].sum() + (
        pairs_of_run.sum()
    )
    for tiles in TILES[:2]:
        with Calls(triton_shrink, "shrink_pages") as calls:
            check_case(case, tiles)
        # For gate, for up and for down.
        assert calls.count == 2 * (tokens[::2].sum() + 3 * tokens[1::2].sum()) + 3 * tokens.sum()
    print("shared", flush=True)


def check_sort() -> None:
    rng = np.random.default_rng(0)
    # Half of the pairs have one expert, whose tiles are cut to about equal size.
    drawn, kept = rng.integers(20, size=(150, 2)), rng.integers(2, size=(150, 2))
    experts = jnp.asarray(drawn * kept, jnp.int32)
    adapters = jnp.asarray(rng.integers(-1, 4, size=150), jnp.int32)
    for num_tokens, tile_rows, run_rows in (
        (150, 16, 0), (150, 48, None), (150, 48, 16), (70, 144, 3), (0, 16, 16),
    ):  # fmt: skip
        arguments = (experts, adapters, jnp.int32(num_tokens))
        sizes: Any = {"num_experts": 20, "num_adapters": 4}
        sizes |= {"tile_rows": tile_rows, "run_rows": run_rows}
        shapes = token_sort_shapes(160, 2, **sizes)
        expected, actual, given = (
            sort_tokens(*arguments, **sizes, implementation=name, out=out)
            for name, out in (
                ("reference", None),
                ("triton", None),
                ("triton", TokenSort(*map(jax.new_ref, poisoned_like(shapes)))),
            )
        )
        assert (actual.run_tiles is None) == (run_rows == 0)
        for field in TokenSort._fields:
            if (wanted := getattr(expected, field)) is None:
                continue
            assert np.array_equal(wanted, getattr(actual, field)), field
            in_buffer = np.asarray(getattr(given, field)[...])
            assert np.array_equal(wanted, in_buffer[: len(wanted)]), field
            # A map has nothing behind its tiles, whatever was there before.
            assert field[-5:] != "tiles" or (in_buffer[len(wanted) :] == -1).all(), field
    print("sort", flush=True)


def check_gather() -> None:
    """Real rows are copied, the others left as they were: more columns than a program has."""
    case = LayerCase(LayerSpec(Shape(9, 3, 4, triton_gather.BLOCK + 24, 1, 0, 0), num_tokens=7))
    x, pairs = case.cast(case.x), case.shape.pairs
    sort = case.token_sort(16)
    out = jax.new_ref(poisoned((pairs + 2, x.shape[1]), str(x.dtype)))
    actual = np.asarray(triton_gather.gather_rows(x, sort, 3, out)[...])
    rows = 7 * 3
    assert np.array_equal(actual[:rows], gather_rows(x, sort, pairs, 3)[:rows])
    assert np.isnan(actual[rows:]).all()
    print("gather", flush=True)


def check_route() -> None:
    logits = jax.random.normal(jax.random.key(0), (5, 12))
    bias = jax.random.normal(jax.random.key(1), (12,))
    for scoring, correction_bias, groups in (
        ("softmax", None, None),
        ("sigmoid", None, None),
        ("softmax", None, ExpertGroups(4, 2)),
        ("sigmoid", bias, ExpertGroups(3, 1, 2)),
        ("sigmoid", bias, None),
    ):
        expected, actual = (
            route(
                logits,
                top_k=3,
                scoring=scoring,  # type: ignore[arg-type]
                correction_bias=correction_bias,
                groups=groups,
                implementation=name,  # type: ignore[arg-type]
            )
            for name in ("reference", "triton")
        )
        assert np.array_equal(expected[0], actual[0])
        np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5)
    print("route", flush=True)


def sort_by_adapter(case: LayerCase, implementation: Any) -> TokenSort:
    """The tokens of a dense layer."""
    return sort_tokens(
        jnp.zeros((case.shape.tokens, 1), jnp.int32),
        jnp.asarray(case.adapter_of_token),
        case.device_num_tokens,
        num_experts=1,
        num_adapters=case.shape.adapters,
        tile_rows=16,
        implementation=implementation,
    )


def check_dense(shape: Shape, dtype: str) -> None:
    """A linear layer of float32 outputs, as the router and the head are; and an embedding."""
    case = LayerCase(LayerSpec(shape, dtype=dtype, num_tokens=shape.tokens - 1, seed=4))  # type: ignore[arg-type]
    pages = case.pages().gate
    first = pages._replace(table=pages.table[LAYER:], scaling=pages.scaling[LAYER:])
    rng = np.random.default_rng(0)
    y = jnp.asarray(rng.normal(size=(shape.tokens, shape.intermediate)), jnp.float32)
    ids = jnp.asarray(rng.integers(shape.hidden, size=shape.tokens), jnp.int32)
    outputs: dict[Any, list[np.ndarray]] = {}
    for name in ("reference", "triton"):
        sort = sort_by_adapter(case, name)
        options: Any = {"tile_rows": 16, "implementation": name}
        outputs[name] = [
            np.asarray(dense_lora(case.cast(case.x), y, pages, sort, case.layer, **options)),
            np.asarray(embedding_lora(ids, y.astype(dtype), first, sort, **options)),
        ]
    base = case.adapter_of_token < 0
    for expected, actual in zip(outputs["reference"], outputs["triton"], strict=True):
        assert relative_error(actual, expected.astype(np.float64)) <= (
            1e-5 if dtype == "float32" else 2e-3
        )
        assert actual[base].tobytes() == expected[base].tobytes()
    assert (outputs["triton"][0][~base] != np.asarray(y)[~base]).any()
    print("dense", tuple(shape), dtype, flush=True)


def check_linear(
    shape: Shape,
    dtype: str,
    num_maps: int,
    tiles: LinearTiles,
    shrink_tiles: LinearShrinkTiles | None = None,
    *,
    many_rows: bool = False,
) -> None:
    """Maps of one input, of which the second has a bias and the third no pages.

    Of many rows, with tiles of a shrink, weights are loaded by descriptors; otherwise by pointers.
    """
    linear_api.MAX_ROWS = 0 if many_rows else 128
    linear_api.suits_descriptors = lambda *_: shrink_tiles is not None
    linear_api.linear_tiles = lambda *_: tiles
    triton_many_rows.linear_shrink_tiles = lambda *_: shrink_tiles
    case = LayerCase(LayerSpec(shape, dtype=dtype, num_tokens=max(shape.tokens - 1, 1), seed=4))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)

    def weights(*sizes: int) -> jax.Array:
        values = rng.normal(size=(2, *sizes)) * shape.hidden**-0.5
        return case.cast(values.astype(np.float32))

    out = shape.intermediate
    pages = case.pages()
    maps = (
        LinearMap(weights(out, shape.hidden), None, pages.gate),
        LinearMap(weights(out, shape.hidden), weights(out), pages.up),
        LinearMap(weights(9, shape.hidden), weights(9), None),
    )[:num_maps]
    outputs = {}
    signals = jax.new_ref(jnp.zeros(SIGNALS, jnp.int32))
    for name in ("reference", "triton"):
        for lora in (True, False):
            sort = sort_by_adapter(case, name)
            outputs[name, lora] = np.asarray(
                linear_lora(
                    case.cast(case.x),
                    maps,
                    case.layer,
                    sort=sort if lora else None,
                    tile_rows=16,
                    signals=signals,
                    implementation=name,  # type: ignore[arg-type]
                )
            )
    assert not np.asarray(signals[...]).any()
    real = slice(0, case.num_tokens)
    for lora in (True, False):
        error = relative_error(
            outputs["triton", lora][real], outputs["reference", lora][real].astype(np.float64)
        )
        assert error <= (1e-5 if dtype == "float32" else 2e-3), error
    base = (case.adapter_of_token < 0) | (np.arange(shape.tokens) >= case.num_tokens)
    with_adapters, without = outputs["triton", True], outputs["triton", False]
    assert with_adapters[base].tobytes() == without[base].tobytes()
    assert (with_adapters[real] != without[real]).any()
    print("linear", tuple(shape), dtype, num_maps, tiles, flush=True)


def check_heads(heads: int, kv_heads: int, head_dim: int, norms: bool) -> None:
    rng = np.random.default_rng(0)
    tokens, layers, blocks, block_size = 5, 2, 4, 3

    def normal(*sizes: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=sizes), jnp.float16)

    projected = normal(tokens, (heads + 2 * kv_heads) * head_dim)
    angle = rng.normal(size=(tokens, head_dim // 2)).astype(np.float32)
    weights = [normal(layers, head_dim) if norms else None for _ in range(2)]
    places = rng.permutation(blocks * block_size)[:tokens]
    outputs = []
    for name in ("reference", "triton"):
        caches = [
            jax.new_ref(jnp.full((layers, blocks, block_size, kv_heads, head_dim), 7, jnp.float16))
            for _ in range(2)
        ]
        query = prepare_heads(
            projected,
            *caches,
            LAYER,
            jnp.asarray(places // block_size, jnp.int32),
            jnp.asarray(places % block_size, jnp.int32),
            jnp.cos(angle),
            jnp.sin(angle),
            query_norm=weights[0],
            key_norm=weights[1],
            epsilon=1e-6,
            implementation=name,  # type: ignore[arg-type]
        )
        outputs.append([np.asarray(values[...]) for values in (query, *caches)])
    for expected, actual in zip(*outputs, strict=True):
        # Both round in the same places; sums in another order may change one of these.
        np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-3)
    assert (outputs[1][1][LAYER] != 7).any()
    print("heads", heads, kv_heads, head_dim, norms, flush=True)


def main() -> None:
    from moelora_kernels.combine import triton as combine
    from moelora_kernels.dense_lora import triton as dense
    from moelora_kernels.expert_lora import triton as expert_lora
    from moelora_kernels.fused_experts import triton as fused_experts
    from moelora_kernels.fused_experts import triton_one_token
    from moelora_kernels.heads import triton as heads
    from moelora_kernels.linear import triton as linear
    from moelora_kernels.router import triton as router
    from moelora_kernels.sort import triton as sort

    modules = (combine, dense, expert_lora, fused_experts, heads, linear, router, sort)
    for module in (*modules, triton_gather, triton_many_rows, triton_one_token, triton_shrink):
        module.launch = interpret  # type: ignore[attr-defined]
    check_route()
    check_heads(6, 2, 20, norms=True)
    check_heads(3, 3, 16, norms=False)
    check_sort()
    # The form for large batches, in blocks that a small one fills.
    sort.MAX_COUNTED_PAIRS, sort.BLOCK_PAIRS = 0, 128
    check_sort()
    # Several programs list runs, each of several blocks of groups.
    sort.LIST_GROUPS, sort.LIST_PROGRAMS = 16, 3
    check_sort()
    check_gather()
    # Rows are multiplied in several steps.
    triton_shrink.STEP_NUMBERS = triton_shrink.tl.constexpr(256)
    check_shared()
    # Runs of several tiles, more and fewer than programs; several chunks of tokens; more pages than
    # are multiplied at once.
    triton_shrink.CHUNK_TOKENS, triton_shrink.CHUNK_PROGRAMS = 16, 2
    for spec, stack_pages in (
        (LayerSpec(Shape(90, 2, 3, 40, 24, 3, 1), num_tokens=80, assignment="runs"), 8),
        (LayerSpec(Shape(40, 3, 6, 40, 24, 10, 3), num_tokens=39), 4),
    ):
        triton_shrink.STACK_PAGES = stack_pages
        for shrink_tiles in SHRINKS:
            check_shrink(LayerCase(spec), shrink_tiles)
    # One token: several programs share the columns of a page.
    few = triton_one_token.FEW_PROGRAMS
    triton_one_token.FEW_PROGRAMS = few._replace(shrink_part=16)
    # The interpreter cannot multiply bfloat16.
    for shape in SHAPES:
        for tiles in TILES if shape.tokens > 1 else TILES[:1]:
            check_layer(shape, "float32", None, tiles, bias=shape.tokens == 1)
        check_layer(shape, "float16", shape.tokens // 2, TILES[0])
    # One token's tiles of many programs, and parts of several steps.
    triton_one_token.ONE_WAVE, triton_one_token.MAX_PARTS = 0, 1
    triton_one_token.SHRINK_COLUMNS = 4
    triton_one_token.MANY_PROGRAMS = triton_one_token.MANY_PROGRAMS._replace(shrink_part=16)
    check_layer(SHAPES[1], "float32", None, TILES[0])
    # Padding alone; large tiles.
    check_layer(SHAPES[2], "float32", 0, TILES[0])
    check_layer(SHAPES[3], "float32", None, replace(TILES[0], tile_rows=32))
    # Tiles of one adapter, and of several; fewer pages, and more, than are multiplied at once.
    for adapters, max_pages, assignment in (
        (2, 1, "one"), (2, 5, "one"), (2, 3, "runs"), (10, 1, "mixed"), (40, 2, "mixed"),
    ):  # fmt: skip
        shape = Shape(130, 1, 1, 20, 24, adapters, max_pages)
        spec = LayerSpec(shape, num_tokens=129, assignment=assignment)  # type: ignore[arg-type]
        check_case(LayerCase(spec), PROMPT_TILES)
    for shape in DENSE_SHAPES:
        check_dense(shape, "float32")
        check_dense(shape, "float16")
        for linear_tiles, num_maps in itertools.product(LINEAR_TILES, (1, 3)):
            check_linear(shape, "float32", num_maps, linear_tiles)
        for number, (linear_tiles, num_maps) in enumerate(
            zip(MANY_ROWS_TILES, (1, 3), strict=True)
        ):
            linear_shrink = LINEAR_SHRINK_TILES[number]
            check_linear(shape, "float32", num_maps, linear_tiles, linear_shrink, many_rows=True)
            check_linear(shape, "float32", num_maps, linear_tiles, many_rows=True)
        check_linear(shape, "float16", 2, LINEAR_TILES[0])
    # Whose rows are whole 16 bytes.
    shape, linear_shrink = DENSE_SHAPES[0], LINEAR_SHRINK_TILES[0]
    check_linear(shape, "float16", 2, MANY_ROWS_TILES[0], linear_shrink, many_rows=True)
    # One page, and more pages than are added at once.
    for pages, dtype in ((6, "float32"), (1, "float16")):
        check_linear(Shape(1, 1, 1, 20, 48, 3, pages), dtype, 3, ROW_TILES)


if __name__ == "__main__":
    main()
