"""Cases and oracles that every implementation of the kernels is tested with.

The oracles are plain loops over tokens in NumPy float64. They work with the factors of the adapters
and know nothing of pages. They start from the same rounded inputs as the kernels.

All cases are poisoned: whatever a kernel must not use is NaN, or -7 where it is an integer. That is
the weights and page tables of the other layer, weights of experts without a token, pool rows that
no table names (among them the first and the last, which a clamped or a negative index would hit),
scalings without pages, and everything of the padding tokens.
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from moelora_kernels import PAGE_ROWS, ExpertPages, LinearUpdate, SitePages, TokenSort

DType = Literal["float32", "bfloat16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")
Activation = Literal["silu", "clamped_swiglu"]

#: Cases have two stacked layers, of which this one is used.
LAYERS, LAYER = 2, 1

#: What integers that must not be read are set to.
POISON = -7

#: Relative error of a whole array. float32: the unit roundoff is 6e-8, products here sum some tens
#: of terms, three follow each other, and the sum over the experts may cancel. bfloat16: the unit
#: roundoff is 3.9e-3, the error of one rounding in this norm about 1.7e-3; the results are rounded
#: once, and so are all activations that one kernel hands to the next.
TOLERANCE: dict[str, float] = {"float32": 1e-5, "bfloat16": 5e-3}


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the error over the norm of the result; NaN if anything is NaN."""
    error = np.linalg.norm(actual.astype(np.float64) - expected)
    return float(error / max(float(np.linalg.norm(expected)), 1e-30))


def assert_close(actual: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    assert actual.dtype == jnp.dtype(dtype)
    assert actual.shape == expected.shape
    error = relative_error(actual, expected)
    assert error <= TOLERANCE[dtype], f"relative error {error}"


def assert_same_bits(actual: object, expected: object) -> None:
    """Equal pytrees of arrays, bit by bit: NaN equals the same NaN, and -0 differs from 0."""
    left, right = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


def to_device(array: np.ndarray, dtype: str) -> jax.Array:
    return jnp.asarray(array.astype(jnp.dtype(dtype)))


def linear_update(
    tokens: int, outputs: tuple[int, ...], dtype: str, without: int = -1
) -> tuple[LinearUpdate, np.ndarray]:
    """What adapters have yet to add to linear maps, in three parts, and their sum in float64.

    Tokens have no page, one, and two in turn; the map ``without`` has no adapters.
    """
    rng = np.random.default_rng(1)
    maps, parts, max_pages = len(outputs), 3, 2
    pool_rows = np.full((maps, tokens, max_pages), POISON, np.int32)
    ranks = np.full((parts, maps, tokens, max_pages * PAGE_ROWS), np.nan, np.float32)
    pools = [np.full((tokens * max_pages + 2, PAGE_ROWS, out), np.nan) for out in outputs]
    added = [np.zeros((tokens, out)) for out in outputs]
    for number, token in itertools.product(range(maps), range(tokens)):
        if number != without:
            pool_rows[number, token] = -1
            for page in range(token % (max_pages + 1)):
                row = 1 + token * max_pages + page
                b = rounded(rng.normal(size=(PAGE_ROWS, outputs[number])), dtype)
                z = (0.1 * rng.normal(size=(parts, PAGE_ROWS))).astype(np.float32)
                pool_rows[number, token, page], pools[number][row] = row, b
                ranks[:, number, token, page * PAGE_ROWS : (page + 1) * PAGE_ROWS] = z
                added[number][token] += rounded(z.sum(0), dtype) @ b
    b_pools = [None if i == without else to_device(b, dtype) for i, b in enumerate(pools)]
    arrays = jnp.asarray(ranks), jnp.asarray(pool_rows)
    return LinearUpdate(*arrays, tuple(b_pools), outputs), np.concatenate(added, axis=1)


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """float64 numbers that ``dtype`` can represent."""
    return array.astype(jnp.dtype(dtype)).astype(np.float64)


def poisoned(shape: Sequence[int], dtype: str) -> jax.Array:
    """An array full of poison, for outputs that must be written and for workspaces."""
    dtype = jnp.dtype(dtype)
    value = POISON if jnp.issubdtype(dtype, jnp.integer) else jnp.nan
    # Not from NumPy, whose memory JAX may borrow; borrowed memory cannot be donated.
    return jnp.full(shape, value, dtype)


def poisoned_like(shapes: object) -> object:
    """Poison for every leaf of a pytree of shapes, but zeros for the signals of an MoE layer."""
    values = jax.tree.map(lambda leaf: poisoned(leaf.shape, leaf.dtype), shapes)
    if getattr(values, "signals", None) is not None:
        values = values._replace(signals=jnp.zeros_like(values.signals))
    return values


@functools.cache
def compiled(kernel: Callable, **static: Hashable) -> Callable:
    """``kernel`` as one jitted program, which all cases of a shape share.

    The program's first argument is a pytree of arrays for ``out``, which is donated and whose final
    values are returned, or None to have the kernel allocate its result. Slice results in NumPy: JAX
    compiles each slice.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def program(out: object, *args: object, **kwargs: object) -> object:
        if out is None:
            return kernel(*args, **kwargs, **static)
        refs = jax.tree.map(jax.new_ref, out)
        returned = kernel(*args, **kwargs, **static, out=refs)
        pairs = zip(jax.tree.leaves(returned), jax.tree.leaves(refs), strict=True)
        assert all(one is other for one, other in pairs), "out is returned"
        return jax.tree.map(jax.freeze, refs)

    return program


# Sorting and tiles --------------------------------------------------------------------------------


class Tile(NamedTuple):
    group: tuple[int, ...]
    first: int
    end: int


def oracle_order(experts: np.ndarray, adapter_of_token: np.ndarray, num_tokens: int) -> list[int]:
    """Real pairs by expert and adapter; Python's sort is stable."""
    top_k = experts.shape[1]
    return sorted(
        range(num_tokens * top_k),
        key=lambda pair: (experts.flat[pair], adapter_of_token[pair // top_k]),
    )


def oracle_tiles(group_of_row: Sequence[tuple[int, ...]], tile_rows: int) -> list[Tile]:
    """Consecutive rows of one group, cut from the group's first row on."""
    tiles: list[Tile] = []
    for row, group in enumerate(group_of_row):
        if tiles and tiles[-1].group == group and row - tiles[-1].first < tile_rows:
            tiles[-1] = tiles[-1]._replace(end=row + 1)
        else:
            tiles.append(Tile(group, row, row + 1))
    return tiles


# Adapters -----------------------------------------------------------------------------------------


class Update(NamedTuple):
    """One low-rank update. ``b`` is stored with the rank first, as in pages."""

    a: np.ndarray
    b: np.ndarray
    scaling: float

    @property
    def rank(self) -> int:
        return len(self.a)


class Site(NamedTuple):
    """A linear map with adapters: widths, and the updates by (adapter, expert)."""

    in_features: int
    out_features: int
    updates: dict[tuple[int, int], Update]


def place_pages(
    sites: Sequence[Site],
    *,
    adapters: int,
    experts: int,
    max_pages: int,
    dtype: str,
    seed: int,
) -> list[SitePages]:
    """Put the factors into one pool per width, in random rows; equal pages share a row."""
    rng = np.random.default_rng(seed)
    # The size depends on shapes alone, so that equal shapes share a compiled program.
    # In the worst case all sites have A and B in one pool.
    total = 2 * len(sites) * adapters * experts * max_pages + 2
    pools, rows_of_pages = {}, {}
    for width in sorted({width for site in sites for width in site[:2]}):
        pools[width] = np.full((total, PAGE_ROWS, width), np.nan)
        # The first and the last row are never used.
        rows_of_pages[width] = ({}, iter(rng.permutation(np.arange(1, total - 1))))

    def row(page: np.ndarray) -> int:
        known, free_rows = rows_of_pages[page.shape[1]]
        if page.tobytes() not in known:
            known[page.tobytes()] = next(free_rows)
            pools[page.shape[1]][known[page.tobytes()]] = page
        return known[page.tobytes()]

    tables, scalings = [], []
    for site in sites:
        table = np.full((LAYERS, 2, adapters, max_pages, experts), -1, np.int32)
        table[1 - LAYER] = 0  # a row of NaN
        scaling = np.full((LAYERS, adapters, experts), np.nan, np.float32)
        for (adapter, expert), update in site.updates.items():
            scaling[LAYER, adapter, expert] = update.scaling
            for side, factor in enumerate((update.a, update.b)):
                for number, start in enumerate(range(0, update.rank, PAGE_ROWS)):
                    page = np.zeros((PAGE_ROWS, factor.shape[1]))
                    rank_rows = factor[start : start + PAGE_ROWS]
                    page[: len(rank_rows)] = rank_rows
                    table[LAYER, side, adapter, number, expert] = row(page)
        tables.append(jnp.asarray(table))
        scalings.append(jnp.asarray(scaling))
    device_pools = {width: to_device(pool, dtype) for width, pool in pools.items()}
    return [
        SitePages(device_pools[site.in_features], device_pools[site.out_features], table, scaling)
        for site, table, scaling in zip(sites, tables, scalings, strict=True)
    ]


def random_factor(rng: np.random.Generator, rank: int, width: int, dtype: str) -> np.ndarray:
    """Rank rows ``[rank, width]`` of a size that keeps activations near 1 in A as in B."""
    return rounded(rng.normal(size=(rank, width)) / np.sqrt(max(rank, width)), dtype)


# One MoE layer ------------------------------------------------------------------------------------

Kind = Literal[
    "own",
    "shared",
    "shared_outer",
    "one_a",
    "some_experts",
    "down_only",
    "gate_only",
    "repeated_page",
    "twin",
    "empty",
]
#: What an adapter is like.
KINDS: tuple[Kind, ...] = (
    "own",  # own factors for each projection and expert, of different ranks
    "shared",  # all experts name the same pages
    "shared_outer",  # all experts share A of gate and up and B of down
    "one_a",  # gate and up share A
    "some_experts",  # every second expert has none
    "down_only",
    "gate_only",
    "repeated_page",  # a factor that has one page twice
    "twin",  # the pages of the adapter before, with another scaling
    "empty",  # a slot without pages
)

Assignment = Literal["mixed", "half_base", "base", "one", "runs"]


class Shape(NamedTuple):
    """Everything static about a case; each one costs a compilation."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int
    adapters: int
    max_pages: int

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    @property
    def max_rank(self) -> int:
        return self.max_pages * PAGE_ROWS


#: Few shapes, odd on purpose: one token, no multiples of a tile, 2I = H and not, I = H, top_k = E.
ONE_TOKEN = Shape(1, 2, 6, 48, 20, 3, 1)
TOP_8 = Shape(7, 8, 8, 40, 20, 5, 4)
WIDE = Shape(33, 2, 6, 48, 24, 10, 4)
SQUARE = Shape(20, 1, 3, 32, 32, 2, 2)
SHAPES = (ONE_TOKEN, TOP_8, WIDE, SQUARE)


@dataclass(frozen=True)
class LayerSpec:
    """What decides a :class:`LayerCase`.

    Attributes:
        shape: sizes.
        dtype: of weights, pages and activations.
        num_tokens: real tokens; the others are padding. None means all.
        kinds: what the adapters are like, one for each slot, repeated as needed.
        assignment: which adapters the tokens have: any of them or none; none for half of the
            tokens; none at all; all the same; runs of equal adapters.
        routing: uniform over the experts, or the first ``top_k`` experts for nearly all tokens.
        seed: of all numbers.
    """

    shape: Shape
    dtype: DType = "float32"
    num_tokens: int | None = None
    kinds: tuple[Kind, ...] = KINDS
    assignment: Assignment = "mixed"
    routing: Literal["uniform", "skewed"] = "uniform"
    seed: int = 0


def variants(shapes: Sequence, dtypes: Sequence[DType]) -> list[tuple]:
    """Shapes with the first dtype, and every other shape with the second: each is a compilation."""
    return [*itertools.product(shapes, dtypes[:1]), *itertools.product(shapes[1::2], dtypes[1:])]


@st.composite
def layer_specs(
    draw: st.DrawFn,
    shapes: Sequence[Shape] = SHAPES,
    dtypes: Sequence[DType] = DTYPES,
) -> LayerSpec:
    shape, dtype = draw(st.sampled_from(variants(shapes, dtypes)))
    return LayerSpec(
        shape,
        dtype=dtype,
        num_tokens=draw(st.none() | st.integers(0, shape.tokens)),
        kinds=tuple(
            draw(st.lists(st.sampled_from(KINDS), min_size=shape.adapters, max_size=shape.adapters))
        ),
        assignment=draw(st.sampled_from(["mixed", "half_base", "base", "one", "runs"])),
        routing=draw(st.sampled_from(["uniform", "skewed"])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


class LayerCase:
    """Weights, adapters and a routed batch for one MoE layer, and what each kernel must return.

    NumPy arrays are float64 or integers, and ``[rows, ...]`` means rows in sorted order. Undefined
    numbers in expected results are NaN.

    Attributes:
        x: hidden states ``[tokens, hidden]``.
        experts: ``[tokens, top_k]``.
        weights: router weights ``[tokens, top_k]``.
        adapter_of_token: ``[tokens]``.
        gate_up: ``[LAYERS, experts, 2, intermediate, hidden]``.
        gate_up_bias: ``[LAYERS, experts, 2, intermediate]``.
        down: ``[LAYERS, experts, hidden, intermediate]``.
        down_bias: ``[LAYERS, experts, hidden]``.
        sites: the sites ``gate``, ``up`` and ``down``.
        rows: the pair of each sorted row.
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.spec, self.shape, self.dtype = spec, spec.shape, spec.dtype
        tokens, top_k, experts, hidden, inner, adapters, _ = spec.shape
        self.num_tokens = tokens if spec.num_tokens is None else spec.num_tokens
        padding = slice(self.num_tokens, None)
        rng = np.random.default_rng(spec.seed)

        def normal(*shape: int) -> np.ndarray:
            return rounded(rng.normal(size=shape), spec.dtype)

        def weight(*shape: int) -> np.ndarray:
            return rounded(rng.normal(size=shape) / np.sqrt(shape[-1]), spec.dtype)

        self.x = normal(tokens, hidden)
        self.experts = self._route(rng)
        self.weights = rounded(rng.uniform(0.1, 1.0, size=(tokens, top_k)), "float32")
        self.adapter_of_token = self._assign(rng)
        self.x[padding] = self.weights[padding] = np.nan
        self.experts[padding] = self.adapter_of_token[padding] = POISON

        self.gate_up = weight(LAYERS, experts, 2, inner, hidden)
        self.gate_up_bias = normal(LAYERS, experts, 2, inner)
        self.down = weight(LAYERS, experts, hidden, inner)
        self.down_bias = normal(LAYERS, experts, hidden)
        idle_experts = sorted(set(range(experts)) - set(self.experts.flat))
        for array in (self.gate_up, self.gate_up_bias, self.down, self.down_bias):
            array[1 - LAYER] = array[:, idle_experts] = np.nan

        self.sites = {
            "gate": Site(hidden, inner, {}),
            "up": Site(hidden, inner, {}),
            "down": Site(inner, hidden, {}),
        }
        for adapter in range(adapters):
            self._add_adapter(rng, adapter, spec.kinds[adapter % len(spec.kinds)])
        self.rows = oracle_order(self.experts, self.adapter_of_token, self.num_tokens)

    def _route(self, rng: np.random.Generator) -> np.ndarray:
        tokens, top_k, experts = self.shape[:3]
        uniform = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
        if self.spec.routing == "skewed":
            uniform[rng.random(tokens) < 0.9] = np.arange(top_k)
        return uniform.astype(np.int32)

    def _assign(self, rng: np.random.Generator) -> np.ndarray:
        tokens, adapters = self.shape.tokens, self.shape.adapters
        mixed = rng.integers(-1, adapters, size=tokens)
        match self.spec.assignment:
            case "half_base":
                mixed[rng.random(tokens) < 0.5] = -1
            case "base":
                mixed[:] = -1
            case "one":
                mixed[:] = rng.integers(adapters)
            case "runs":
                mixed = np.repeat(mixed, 5)[:tokens]
        return mixed.astype(np.int32)

    def _add_adapter(self, rng: np.random.Generator, adapter: int, kind: Kind) -> None:
        hidden, inner, experts = self.shape.hidden, self.shape.intermediate, self.shape.experts
        pages = self.shape.max_pages

        def any_rank() -> int:
            return int(rng.integers(1, self.shape.max_rank + 1))

        def new(rank: int, width: int) -> np.ndarray:
            if kind == "repeated_page" and pages > 1:
                return np.tile(random_factor(rng, PAGE_ROWS, width, self.dtype), (2, 1))
            return random_factor(rng, rank, width, self.dtype)

        if kind == "empty" or (kind == "twin" and adapter == 0):
            return
        outer_rank = any_rank()
        outer_a, outer_b = new(outer_rank, hidden), new(outer_rank, hidden)
        for expert in range(experts):
            if kind == "some_experts" and expert % 2:
                continue
            gate_rank, up_rank, down_rank = any_rank(), any_rank(), any_rank()
            if kind in ("shared", "shared_outer"):
                gate_rank = up_rank = down_rank = outer_rank
            if kind == "one_a":
                up_rank = gate_rank
            gate_a, up_a = new(gate_rank, hidden), new(up_rank, hidden)
            down_b = new(down_rank, hidden)
            if kind == "shared_outer":
                gate_a, up_a, down_b = outer_a, outer_a, outer_b
            if kind == "one_a":
                up_a = gate_a
            factors = {
                "gate": (gate_a, new(gate_rank, inner)),
                "up": (up_a, new(up_rank, inner)),
                "down": (new(down_rank, inner), down_b),
            }
            for name, site in self.sites.items():
                if kind in ("down_only", "gate_only") and name not in kind:
                    continue
                scaling = float(np.float32(rng.uniform(0.5, 2.0)))
                update = Update(*factors[name], scaling)
                if kind == "shared" and expert > 0:
                    update = site.updates[adapter, 0]
                if kind == "twin":
                    before = site.updates.get((adapter - 1, expert))
                    if before is None:
                        continue
                    update = before._replace(scaling=scaling)
                site.updates[adapter, expert] = update

    # What the kernels are given.

    def cast(self, array: np.ndarray) -> jax.Array:
        return to_device(array, self.dtype)

    def router(self) -> tuple[np.ndarray, np.ndarray]:
        """A router ``[experts, hidden]`` that routes as this case does, and its logits.

        Needs a hidden size of at least the number of tokens. Logits are ``[tokens, experts]``.
        """
        tokens, top_k, experts, _, _, _, _ = self.shape
        logits = np.full((tokens, experts), -4.0)
        for choice in range(top_k):
            logits[np.arange(tokens), self.experts[:, choice]] = -choice / top_k
        real = slice(0, self.num_tokens)
        weight = np.linalg.lstsq(self.x[real], logits[real], rcond=None)[0].T
        return weight, logits

    @property
    def layer(self) -> jax.Array:
        return jnp.int32(LAYER)

    @property
    def device_num_tokens(self) -> jax.Array:
        return jnp.int32(self.num_tokens)

    def pages(self, seed: int = 0) -> ExpertPages:
        """The adapters in device pools; another seed puts them into other pool rows."""
        return ExpertPages(
            *place_pages(
                list(self.sites.values()),
                adapters=self.shape.adapters,
                experts=self.shape.experts,
                max_pages=self.shape.max_pages,
                dtype=self.dtype,
                seed=seed,
            )
        )

    def token_sort(self, tile_rows: int, extra: int = 3) -> TokenSort:
        """The sort by the oracle, in buffers that are ``extra`` entries too large."""
        pairs = self.shape.pairs
        order, row_of_pair, group_of_row = np.full((3, pairs + extra), POISON, np.int32)
        for array in (order, row_of_pair, group_of_row):
            array[:pairs] = -1
        for row, pair in enumerate(self.rows):
            order[row], row_of_pair[pair] = pair, row
            groups_before = self.expert(pair) * (self.shape.adapters + 1)
            group_of_row[row] = groups_before + self.adapter(pair) + 1

        by_expert = oracle_tiles([(self.expert(pair),) for pair in self.rows], tile_rows)
        by_run = oracle_tiles(
            [(self.expert(pair), self.adapter(pair)) for pair in self.rows], tile_rows
        )
        by_run = [tile for tile in by_run if tile.group[1] >= 0]
        # In the worst case each pair is a tile.
        expert_tiles = np.full((pairs + extra, 3), -1, np.int32)
        run_tiles = np.full((pairs + extra, 4), -1, np.int32)
        for tiles, entries in ((by_expert, expert_tiles), (by_run, run_tiles)):
            for index, tile in enumerate(tiles):
                entries[index] = (*tile.group, tile.first, tile.end)
        arrays = order, row_of_pair, expert_tiles, run_tiles, group_of_row
        return TokenSort(*map(jnp.asarray, arrays))

    # What the kernels must return.

    def token(self, pair: int) -> int:
        return pair // self.shape.top_k

    def expert(self, pair: int) -> int:
        return int(self.experts.flat[pair])

    def adapter(self, pair: int) -> int:
        return int(self.adapter_of_token[self.token(pair)])

    def update(self, site: str, pair: int) -> Update | None:
        return self.sites[site].updates.get((self.adapter(pair), self.expert(pair)))

    def token_rows(self) -> np.ndarray:
        """The hidden state of each row; NaN past the last."""
        rows = np.full((self.shape.pairs, self.shape.hidden), np.nan)
        for row, pair in enumerate(self.rows):
            rows[row] = self.x[self.token(pair)]
        return rows

    def hidden_rows(self, seed: int = 0) -> np.ndarray:
        """Random rows ``[rows, intermediate]`` to stand for gate_up's; NaN past the last."""
        rows = np.full((self.shape.pairs, self.shape.intermediate), np.nan)
        values = np.random.default_rng(seed).normal(size=rows.shape)
        rows[: len(self.rows)] = rounded(values, self.dtype)[: len(self.rows)]
        return rows

    def rank_activations(self, sites: Sequence[str], inputs: np.ndarray) -> np.ndarray:
        """``[sites, rows, max_rank]`` for input rows ``[rows, in]``.

        Defined are all ranks of rows that have an adapter; those past its last are zero.
        """
        expected = np.full((len(sites), self.shape.pairs, self.shape.max_rank), np.nan)
        for index, site in enumerate(sites):
            for row, pair in enumerate(self.rows):
                update = self.update(site, pair)
                if self.adapter(pair) >= 0:
                    expected[index, row] = 0
                if update is not None:
                    expected[index, row, : update.rank] = update.scaling * (update.a @ inputs[row])
        return expected

    def gated_hidden(
        self, ranks: np.ndarray | None, activation: Activation, bias: bool
    ) -> np.ndarray:
        """``[real rows, intermediate]``, given rank activations ``[2, rows, max_rank]`` or none."""
        expected = np.zeros((len(self.rows), self.shape.intermediate))
        for row, pair in enumerate(self.rows):
            halves = []
            for half, site in enumerate(("gate", "up")):
                value = self.gate_up[LAYER, self.expert(pair), half] @ self.x[self.token(pair)]
                if bias:
                    value = value + self.gate_up_bias[LAYER, self.expert(pair), half]
                update = self.update(site, pair)
                if ranks is not None and update is not None:
                    value = value + ranks[half, row, : update.rank] @ update.b
                halves.append(value)
            expected[row] = activate(*halves, activation)
        return expected

    def expert_outputs(
        self, hidden: np.ndarray, ranks: np.ndarray | None, bias: bool
    ) -> np.ndarray:
        """``[real rows, hidden]``, given rows and rank activations ``[1, rows, max_rank]``."""
        expected = np.zeros((len(self.rows), self.shape.hidden))
        for row, pair in enumerate(self.rows):
            expected[row] = self.down[LAYER, self.expert(pair)] @ hidden[row]
            if bias:
                expected[row] += self.down_bias[LAYER, self.expert(pair)]
            update = self.update("down", pair)
            if ranks is not None and update is not None:
                expected[row] += ranks[0, row, : update.rank] @ update.b
        return expected

    def combined(self, outputs: np.ndarray, scaling: float) -> np.ndarray:
        """``[tokens, hidden]`` from the experts' outputs ``[rows, hidden]``; zeros for padding."""
        expected = np.zeros((self.shape.tokens, outputs.shape[1]))
        for row, pair in enumerate(self.rows):
            expected[self.token(pair)] += scaling * self.weights.flat[pair] * outputs[row]
        return expected

    def layer_output(
        self, *, lora: bool = True, activation: Activation = "silu", scaling: float = 1.0
    ) -> np.ndarray:
        """The whole layer ``[tokens, hidden]``, without rounding in between."""
        expected = np.zeros((self.shape.tokens, self.shape.hidden))

        def project(site: str, weight: np.ndarray, pair: int, x: np.ndarray) -> np.ndarray:
            update = self.update(site, pair) if lora else None
            if update is None:
                return weight @ x
            return weight @ x + update.scaling * (update.b.T @ (update.a @ x))

        for pair in range(self.num_tokens * self.shape.top_k):
            token, expert = self.token(pair), self.expert(pair)
            gate = project("gate", self.gate_up[LAYER, expert, 0], pair, self.x[token])
            up = project("up", self.gate_up[LAYER, expert, 1], pair, self.x[token])
            hidden = activate(gate, up, activation)
            output = project("down", self.down[LAYER, expert], pair, hidden)
            expected[token] += scaling * self.weights.flat[pair] * output
        return expected


def activate(gate: np.ndarray, up: np.ndarray, activation: Activation) -> np.ndarray:
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return (up + 1) * gate / (1 + np.exp(-1.702 * gate))


# Attention over a paged cache ---------------------------------------------------------------------


class AttentionShape(NamedTuple):
    """Everything static about a case. ``tokens`` is the size of the bucket."""

    tokens: int
    sequences: int
    heads: int
    kv_heads: int
    head_dim: int = 20
    block_size: int = 5
    blocks: int = 4
    value_dim: int = 20

    @property
    def max_length(self) -> int:
        return self.block_size * self.blocks


#: Multi-head, grouped and multi-query attention; narrower and wider values than keys.
PREFILL_SHAPES = (
    AttentionShape(27, 4, 4, 4),
    AttentionShape(27, 4, 4, 2),
    AttentionShape(27, 4, 3, 1),
    AttentionShape(27, 4, 4, 4, value_dim=12),
)
DECODE_SHAPES = (
    AttentionShape(5, 5, 4, 2),
    AttentionShape(1, 1, 4, 2),
    AttentionShape(5, 5, 4, 2, value_dim=36),
)


@dataclass(frozen=True)
class AttentionSpec:
    """What decides an :class:`AttentionCase`.

    Attributes:
        shape: sizes.
        lengths: for each sequence, positions that earlier steps wrote and tokens of this step. A
            sequence without tokens in this step is an unused slot.
        dtype: of queries and caches.
        seed: of all numbers.
    """

    shape: AttentionShape
    lengths: tuple[tuple[int, int], ...]
    dtype: DType = "float32"
    seed: int = 0


@st.composite
def prefill_specs(draw: st.DrawFn, dtypes: Sequence[DType] = DTYPES) -> AttentionSpec:
    """First and later chunks of prompts, and single tokens, in one batch."""
    shape, dtype = draw(st.sampled_from(variants(PREFILL_SHAPES, dtypes)))
    lengths, left = [], shape.tokens
    for _ in range(shape.sequences):
        new = draw(st.integers(0, min(left, shape.max_length)))
        earlier = draw(st.just(0) | st.integers(0, shape.max_length - new))
        lengths.append((earlier, new))
        left -= new
    seed = draw(st.integers(0, 2**32 - 1))
    return AttentionSpec(shape, tuple(lengths), dtype, seed)


@st.composite
def decode_specs(draw: st.DrawFn, dtypes: Sequence[DType] = DTYPES) -> AttentionSpec:
    """One token for each sequence; the last sequences may be unused slots."""
    shape, dtype = draw(st.sampled_from(variants(DECODE_SHAPES, dtypes)))
    used = draw(st.integers(0, shape.sequences))
    earlier = st.integers(0, shape.max_length - 1)
    lengths = [(draw(earlier), 1) for _ in range(used)] + [(0, 0)] * (shape.sequences - used)
    seed = draw(st.integers(0, 2**32 - 1))
    return AttentionSpec(shape, tuple(lengths), dtype, seed)


class AttentionCase:
    """A packed batch of sequences whose earlier positions are in the cache.

    Attributes:
        queries: ``[tokens, heads, head_dim]``.
        new_keys, new_values: of this step's tokens, ``[tokens, kv_heads, head_dim]`` and
            ``[tokens, kv_heads, value_dim]``.
        k_cache, v_cache: before this step ``[LAYERS, blocks, block_size, kv_heads, head_dim]`` and
            the same with ``value_dim``, NaN but for earlier positions. A sequence's blocks are
            scattered over the cache.
        block_table: ``[sequences, blocks]``; a random block past a sequence's length.
        block_of_token, offset_of_token: where each new key and value goes; block 0 for padding.
        positions: of each token in its sequence.
        expected: ``[tokens, heads, value_dim]``; NaN for padding.
    """

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec, self.shape, self.dtype = spec, spec.shape, spec.dtype
        tokens, sequences, heads, kv_heads, head_dim, block_size, blocks, value_dim = spec.shape
        rng = np.random.default_rng(spec.seed)
        total_blocks = sequences * blocks + 3
        free = iter(rng.permutation(np.arange(1, total_blocks)))
        self.scale = head_dim**-0.5

        self.query_counts = np.array([new for _, new in spec.lengths], np.int32)
        self.queries = np.full((tokens, heads, head_dim), np.nan)
        self.new_keys = np.full((tokens, kv_heads, head_dim), np.nan)
        self.new_values = np.full((tokens, kv_heads, value_dim), np.nan)
        self.expected = np.full((tokens, heads, value_dim), np.nan)
        self.positions = np.full(tokens, POISON, np.int32)
        self.block_of_token = np.zeros(tokens, np.int32)
        self.offset_of_token = rng.integers(0, block_size, size=tokens).astype(np.int32)
        self.k_cache = np.full((LAYERS, total_blocks, block_size, kv_heads, head_dim), np.nan)
        self.v_cache = np.full((LAYERS, total_blocks, block_size, kv_heads, value_dim), np.nan)
        self.block_table = rng.integers(0, total_blocks, size=(sequences, blocks)).astype(np.int32)

        token = 0
        for sequence, (earlier, new) in enumerate(spec.lengths):
            if new == 0:
                continue
            length = earlier + new
            keys = rounded(rng.normal(size=(length, kv_heads, head_dim)), spec.dtype)
            values = rounded(rng.normal(size=(length, kv_heads, value_dim)), spec.dtype)
            for position in range(length):
                block, offset = divmod(position, block_size)
                if offset == 0:
                    self.block_table[sequence, block] = next(free)
                row = self.block_table[sequence, block]
                if position < earlier:
                    self.k_cache[LAYER, row, offset] = keys[position]
                    self.v_cache[LAYER, row, offset] = values[position]
                    continue
                query = rounded(rng.normal(size=(heads, head_dim)), spec.dtype)
                self.queries[token] = query
                self.new_keys[token], self.new_values[token] = keys[position], values[position]
                self.positions[token] = position
                self.block_of_token[token], self.offset_of_token[token] = row, offset
                for head in range(heads):
                    kv_head = head // (heads // kv_heads)
                    scores = keys[: position + 1, kv_head] @ query[head] * self.scale
                    weights = np.exp(scores - scores.max())
                    visible = values[: position + 1, kv_head]
                    self.expected[token, head] = weights / weights.sum() @ visible
                token += 1
        self.num_tokens = token
