"""Types that the kernels of this package share."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
from jax import Array

#: Rank rows per page; see :class:`SitePages`.
PAGE_ROWS = 16

#: Rows past the last pair that a kernel may read of a buffer of rank activations.
RANK_PADDING = 175

#: Shape of the int32 counters by which programs of one launch wait for each other. They are zero
#: before and after every launch.
SIGNALS = (1024,)

#: An array, or a reference that kernels write in place. Both are indexed alike, so a type checker
#: may take a reference for an array.
if TYPE_CHECKING:
    Buffer = Array
else:
    Buffer = Array | jax.Ref


class SitePages(NamedTuple):
    """The factors of all resident adapters at one site of the model, as pages.

    A page is ``PAGE_ROWS`` rank rows of one factor: a ``[16, in]`` tile of A, or of B transposed
    ``[16, out]``. The table names the pool row of each page, or -1 where there is none. The pages
    of a factor are a prefix of its table entries, and A and B of one update have equally many. Rank
    rows past the true rank are zero. Several entries may name one page: factors shared by all
    experts, or one A used by gate and up.

    Attributes:
        a_pool: ``[pages, 16, in_features]`` in the compute dtype.
        b_pool: ``[pages, 16, out_features]`` in the compute dtype.
        table: int32 ``[layers, 2, adapters, pages, experts]``; index 0 of the second axis is A, 1
            is B. Dense linear layers have one expert.
        scaling: float32 ``[layers, adapters, experts]``, what the update ``B·A`` is multiplied
            with.
    """

    a_pool: Array
    b_pool: Array
    table: Array
    scaling: Array

    @property
    def num_adapters(self) -> int:
        return self.table.shape[2]

    @property
    def max_rank(self) -> int:
        return self.table.shape[3] * PAGE_ROWS


class ExpertPages(NamedTuple):
    """The pages of the three projections of routed experts."""

    gate: SitePages
    up: SitePages
    down: SitePages


class LinearMap(NamedTuple):
    """A linear map of every layer, and what adapters change of it.

    Attributes:
        weight: ``[layers, out, in]`` in the compute dtype.
        bias: ``[layers, out]``; None for none.
        pages: of its site, whose table has one expert; None where adapters change nothing.
    """

    weight: Array
    bias: Array | None = None
    pages: SitePages | None = None


class TokenSort(NamedTuple):
    """Pairs (token, choice) grouped by expert, and within an expert by adapter.

    Pair ``i`` is choice ``i % top_k`` of token ``i // top_k``. A *row* is a position in the sorted
    order. Tiles are at most ``tile_rows`` consecutive rows, or ``run_rows``; unused entries of the
    maps are -1, and come last.

    Attributes:
        order: int32 ``[pairs]``: pair of each row; -1 past the last real pair.
        row_of_pair: int32 ``[pairs]``: the inverse; -1 for pairs of padding tokens.
        expert_tiles: int32 ``[tiles, 3]``: expert, first row, end row. No tile spans two experts.
        run_tiles: int32 ``[tiles, 4]``: expert, adapter, first row, end row. No tile spans two
            experts or two adapters, and rows without an adapter are in none. None where none were
            asked for, and where Triton's sort knows no adapters.
        group_of_row: int32 ``[pairs]``: ``expert * (num_adapters + 1) + adapter + 1`` of each row;
            -1 past the last real pair. Triton's products find the adapters of a tile with it.
    """

    order: Buffer
    row_of_pair: Buffer
    expert_tiles: Buffer
    run_tiles: Buffer | None = None
    group_of_row: Buffer | None = None


@dataclass(frozen=True)
class ExpertGroups:
    """Experts in equal groups of neighbours: a token first chooses groups, then experts of theirs.

    As in DeepSeek-V2 (arXiv 2405.04434, section 2.2.2), where a group is one device's experts.

    Attributes:
        count: groups.
        chosen: how many of them a token's experts may come from.
        summed: how many of a group's best scores make up the group's score.
    """

    count: int
    chosen: int
    summed: int = 1

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise ValueError if ``top_k`` of so many experts cannot be chosen in this way."""
        if self.count < 1 or num_experts % self.count:
            raise ValueError(f"{num_experts} experts cannot be divided into {self.count} groups")
        size = num_experts // self.count
        if not 1 <= self.chosen <= self.count:
            raise ValueError(f"{self.chosen} groups cannot be chosen of {self.count}")
        if not 1 <= self.summed <= size:
            raise ValueError(f"{self.summed} best scores cannot be taken of groups of {size}")
        if top_k > self.chosen * size:
            raise ValueError(f"top_k is {top_k}, but {self.chosen} groups have too few experts")
