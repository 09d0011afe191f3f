"""What the benchmarks measure: weights, adapters and routing of chained layers."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moelora_jax.config import MoeConfig
from moelora_jax.moe import MoeParams, MoeWorkspace, moe_workspace_shapes
from moelora_kernels import PAGE_ROWS, ExpertPages, SitePages
from moelora_kernels.tuning.tiles import MoeTiles, moe_tiles

HERE = Path(__file__).parent

#: Routed layers of well-known models. gpt-oss without its biases, as its peers were measured.
MODELS = {
    "qwen3-30b-a3b": MoeConfig(128, 8, 2048, 768),
    "mixtral-8x7b": MoeConfig(8, 2, 4096, 14336),
    "gpt-oss-20b": MoeConfig(32, 4, 2880, 2880, activation="clamped_swiglu"),
    "dsv2-lite": MoeConfig(64, 6, 2048, 1408, renormalize=False),
}

#: What one H200 reaches: bytes per second of a device-to-device copy, bf16 operations per second.
PEAK_BYTES, PEAK_FLOPS = 4.3e12, 790e12

#: Fraction of the tokens that have no adapter.
BASE_FRACTION = 0.06


def auto_adapters(tokens: int) -> int:
    """Adapters of a batch: half the tokens below nine tokens, then one each, at most 16."""
    return max(1, tokens // 2) if tokens < 9 else min(tokens, 16)


@dataclass(frozen=True)
class Point:
    """One measured configuration.

    Attributes:
        model: key of :data:`MODELS`.
        tokens: tokens of the batch.
        rank: of all adapters.
        adapters: resident adapters, all of them used.
        layout: own factors for every expert; or A of gate and up, and B of down, shared by all.
        mix: adapters drawn per token, or one adapter for each of ``adapters`` runs of tokens, or
            no adapter for any token.
        max_rank: what the page tables allow; None means ``rank``.
    """

    model: str
    tokens: int
    rank: int = 16
    adapters: int = 1
    layout: Literal["per_expert", "shared"] = "per_expert"
    mix: Literal["token", "request", "none"] = "token"
    max_rank: int | None = None

    @property
    def config(self) -> MoeConfig:
        return MODELS[self.model]

    @property
    def max_pages(self) -> int:
        return -(-(self.max_rank or self.rank) // PAGE_ROWS)

    @property
    def tiles(self) -> MoeTiles:
        """Tiles of a layer on the default device."""
        return moe_tiles(
            num_experts=self.config.num_experts,
            top_k=self.config.top_k,
            hidden=self.config.hidden_size,
            intermediate=self.config.intermediate_size,
            tokens=self.tokens,
            dtype=jnp.bfloat16,
        )

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "tokens": self.tokens,
            "rank": self.rank,
            "adapters": self.adapters,
            "layout": self.layout,
            "mix": self.mix,
            "max_rank": self.max_rank or self.rank,
        }


def anchors() -> list[dict[str, Any]]:
    """Medians of other engines on the same card, with the roofline of each point."""
    lines = (HERE / "anchors.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def anchor_of(point: Point) -> dict[str, Any] | None:
    """The anchor measured at this point, if there is one."""
    wanted = point.describe()
    if wanted.pop("mix") != "token" or wanted.pop("max_rank") != point.rank:
        return None
    for anchor in anchors():
        if all(anchor[key] == value for key, value in wanted.items()):
            return anchor
    return None


class Batch(NamedTuple):
    """Routing of one layer: experts and weights ``[tokens, top_k]``."""

    experts: jax.Array
    weights: jax.Array


class Workload:
    """Stacked random weights and adapters of a few layers, and routing for a chain through them.

    Step ``i`` of the chain runs layer ``i % layers`` with a routing of its own. Neighbours share no
    weights, so that nothing of a step is in the L2 cache when the next one runs.

    Attributes:
        point: what is measured.
        layers: layers in memory.
        chained: steps; enough that the device is busy for longer than a call takes to dispatch.
        experts: chosen experts ``[tokens, top_k]`` of each step.
        adapter_of_token: adapter of each token, -1 for none.
    """

    def __init__(self, point: Point, layers: int, seed: int = 0) -> None:
        self.point, self.layers = point, layers
        rng = np.random.default_rng(seed)
        self.adapter_of_token = self._assign(rng)
        self.experts = [self._route(rng)]
        self.chained = int(np.clip(np.ceil(3000 / self.roofline_us()), layers, 32))
        self.experts += [self._route(rng) for _ in range(self.chained - 1)]

    def _route(self, rng: np.random.Generator) -> np.ndarray:
        """Uniform routing: experts of a token are distinct."""
        config = self.point.config
        scores = rng.random((self.point.tokens, config.num_experts))
        return np.argsort(scores, axis=1)[:, : config.top_k].astype(np.int32)

    def _assign(self, rng: np.random.Generator) -> np.ndarray:
        tokens, adapters = self.point.tokens, self.point.adapters
        if self.point.mix == "none":
            return np.full(tokens, -1, np.int32)
        if self.point.mix == "request":
            assigned = np.arange(tokens) * adapters // tokens
        else:
            assigned = rng.integers(adapters, size=tokens)
        base = rng.random(tokens) < BASE_FRACTION
        base[0] = False  # a batch of one token has an adapter
        return np.where(base, -1, assigned).astype(np.int32)

    @cached_property
    def x(self) -> jax.Array:
        return _normal(1, (self.point.tokens, self.point.config.hidden_size))

    @cached_property
    def batches(self) -> list[Batch]:
        weights = jax.random.uniform(
            jax.random.key(2), (self.point.tokens, self.point.config.top_k), minval=0.1
        )
        return [Batch(jnp.asarray(experts), weights) for experts in self.experts]

    @cached_property
    def params(self) -> MoeParams:
        config = self.point.config
        experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        return MoeParams(
            _normal(3, (self.layers, experts, hidden), hidden**-0.5),
            _normal(4, (self.layers, experts, 2, inner, hidden), hidden**-0.5),
            _normal(5, (self.layers, experts, hidden, inner), inner**-0.5),
        )

    @cached_property
    def pages(self) -> ExpertPages:
        point, config = self.point, self.point.config
        pages = -(-point.rank // PAGE_ROWS)
        sites, next_row = [], {"hidden": 0, "inner": 0}

        def table_of(pool: str, shared: bool) -> np.ndarray:
            """Fresh rows ``[layers, adapters, pages, experts]``, or the same for all experts."""
            experts = 1 if shared else config.num_experts
            shape = (self.layers, point.adapters, experts, pages)
            rows = next_row[pool] + np.arange(np.prod(shape)).reshape(shape)
            next_row[pool] += rows.size
            rows = np.broadcast_to(rows, (*shape[:2], config.num_experts, pages))
            return rows.transpose(0, 1, 3, 2)

        for site in ("gate", "up", "down"):
            a, b = ("inner", "hidden") if site == "down" else ("hidden", "inner")
            shared = point.layout == "shared"
            table = np.full(
                (self.layers, 2, point.adapters, point.max_pages, config.num_experts), -1, np.int32
            )
            table[:, 0, :, :pages] = table_of(a, shared and a == "hidden")
            table[:, 1, :, :pages] = table_of(b, shared and b == "hidden")
            sites.append((a, b, table))
        pools = {
            name: _normal(6 + index, (next_row[name], PAGE_ROWS, width), width**-0.5)
            for index, (name, width) in enumerate(
                (("hidden", config.hidden_size), ("inner", config.intermediate_size))
            )
        }
        if point.rank % PAGE_ROWS:
            pools = {
                name: _clear_rows(pool, point.rank % PAGE_ROWS) for name, pool in pools.items()
            }
        scaling = jnp.full((self.layers, point.adapters, config.num_experts), 2.0, jnp.float32)
        return ExpertPages(
            *(SitePages(pools[a], pools[b], jnp.asarray(table), scaling) for a, b, table in sites)
        )

    def workspace(self, lora: bool) -> MoeWorkspace:
        """Zeroed workspaces, and the layer's output."""
        shapes = moe_workspace_shapes(
            self.point.config,
            self.point.tokens,
            num_adapters=self.point.adapters if lora else 0,
            max_rank=self.point.max_pages * PAGE_ROWS,
            dtype=jnp.bfloat16,
        )
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def roofline_us(self, lora: bool = True) -> float:
        """Time that the bytes of the touched weights and factors need, or the operations if longer.

        The mean over the chain.
        """
        point, config = self.point, self.point.config
        hidden, inner = config.hidden_size, config.intermediate_size
        total = 0.0
        for experts in self.experts:
            touched = np.unique(experts).size
            adapter = np.broadcast_to(self.adapter_of_token[:, None], experts.shape)
            with_adapter = adapter >= 0
            groups = (adapter * config.num_experts + experts)[with_adapter]
            num_groups = np.unique(groups).size if lora else 0
            num_adapters = np.unique(adapter[with_adapter]).size if lora else 0
            outer = num_adapters if point.layout == "shared" else num_groups
            lora_width = outer * 3 * hidden + num_groups * 3 * inner
            num_bytes = 2 * (touched * 3 * hidden * inner + point.rank * lora_width)
            rank_pairs = int(with_adapter.sum()) * point.rank if lora else 0
            flops = 2 * (experts.size * 3 * hidden * inner + rank_pairs * 3 * (hidden + inner))
            total += max(num_bytes / PEAK_BYTES, flops / PEAK_FLOPS)
        return total / len(self.experts) * 1e6

    def expected_token(
        self, step: int, token: int, lora: bool, read: Callable[[jax.Array], np.ndarray]
    ) -> np.ndarray:
        """The output of a step for one token in float64, from the rounded weights.

        ``read`` brings an array to the host.
        """

        def to_float64(array: jax.Array) -> np.ndarray:
            return read(array).astype(np.float64)

        config = self.point.config
        adapter = int(self.adapter_of_token[token]) if lora else -1
        layer = step % self.layers
        batch, pages = self.batches[step], self.pages if adapter >= 0 else None
        weights = np.asarray(batch.weights)[token].astype(np.float64)
        x = to_float64(self.x[token])
        total = np.zeros(config.hidden_size)
        for choice, expert in enumerate(self.experts[step][token]):

            def add(y: np.ndarray, v: np.ndarray, site: SitePages | None, e: int) -> np.ndarray:
                if site is None:
                    return y
                rows = np.asarray(site.table)[layer, :, adapter, :, e]
                for a_row, b_row in rows.T[rows[0] >= 0]:
                    a, b = to_float64(site.a_pool[a_row]), to_float64(site.b_pool[b_row])
                    y = y + float(site.scaling[layer, adapter, e]) * ((a @ v) @ b)
                return y

            both = to_float64(self.params.gate_up[layer, expert])
            gate = add(both[0] @ x, x, pages and pages.gate, expert)
            up = add(both[1] @ x, x, pages and pages.up, expert)
            h = activate(gate, up, config.activation)
            y = to_float64(self.params.down[layer, expert]) @ h
            total += weights[choice] * add(y, h, pages and pages.down, expert)
        return total * config.routed_scaling


def activate(gate: np.ndarray, up: np.ndarray, activation: str) -> np.ndarray:
    """The activation between gate_up and down, in the dtype of its operands."""
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
    return (up + 1) * gate / (1 + np.exp(-1.702 * gate))


@jax.jit(static_argnums=(0, 1))
def _normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    """Normal bfloat16 numbers, made in slices to keep temporaries small."""
    split = 2 if len(shape) > 2 else 1
    slices = int(np.prod(shape[:split]))
    keys = jax.random.split(jax.random.key(seed), slices)
    values = jax.lax.map(lambda key: jax.random.normal(key, shape[split:], jnp.bfloat16), keys)
    return values.reshape(shape) * jnp.bfloat16(scale)


@jax.jit(donate_argnums=0, static_argnums=1)
def _clear_rows(pool: jax.Array, rank: int) -> jax.Array:
    """Rank rows past the true rank are zero."""
    return pool.at[:, rank:].set(0)
