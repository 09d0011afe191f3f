"""An adapter in host memory: what every file format is read into, and what is packed into pages."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Target(NamedTuple):
    """One weight matrix of the model.

    Attributes:
        layer: the model's layer index.
        site: name of a :class:`~moelora_jax.config.LoraSite`.
        expert: expert index; 0 at a dense site.
    """

    layer: int
    site: str
    expert: int


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """A change of one weight matrix: ``scaling · b @ a``.

    Factors that several targets share (one A for all experts, one A for gate and up) are the same
    array object in each of them, and are stored once when packed.

    Attributes:
        a: shrink factor ``[rank, in_features]``.
        b: expand factor ``[out_features, rank]``.
        scaling: alpha/rank, or alpha/√rank for rank-stabilised LoRA.
    """

    a: np.ndarray
    b: np.ndarray
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter, validated against a model's sites.

    Attributes:
        layout: the file layout that it was read from.
        updates: the changed matrices; a target that is missing is not changed.
        source: the folder it came from, for messages.
    """

    layout: str
    updates: Mapping[Target, LowRankUpdate]
    source: str = field(default="memory")

    @property
    def max_rank(self) -> int:
        return max((update.rank for update in self.updates.values()), default=0)

    @property
    def num_parameters(self) -> int:
        """Numbers in the factors; a shared factor counts once."""
        arrays = {id(f): f for u in self.updates.values() for f in (u.a, u.b)}
        return sum(array.size for array in arrays.values())
