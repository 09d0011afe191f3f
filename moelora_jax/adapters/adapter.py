"""An adapter in host memory: what every file format is read into, and what is packed into pages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from moelora_jax.errors import AdapterError


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

    Factors that several targets share (one A for all experts, one A for gate and up) are views of
    the same memory in each of them, and are stored once when packed.

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

    @property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Rank rows of both factors: ``a``, and ``b`` transposed ``[rank, out_features]``."""
        return self.a, self.b.T


def factor_key(rows: np.ndarray) -> tuple[object, ...]:
    """Equal for two factors' rank rows that are the same numbers in the same memory."""
    return rows.__array_interface__["data"][0], rows.shape, rows.strides, rows.dtype.str


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter, validated against a model's sites.

    Attributes:
        layout: the file layout that it was read from.
        updates: the changed matrices; a target that is missing is not changed.
        source: the folder it came from, for messages.
        base_weights: copies of the base model's matrices that PEFT saves beside the factors of
            embeddings and heads, by the name of the site. They must be compared with the model's
            own before the adapter is packed: see :meth:`compared`.
    """

    layout: str
    updates: Mapping[Target, LowRankUpdate]
    source: str = field(default="memory")
    base_weights: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def max_rank(self) -> int:
        return max((update.rank for update in self.updates.values()), default=0)

    @property
    def num_parameters(self) -> int:
        """Numbers in the factors; a shared factor counts once."""
        arrays = {factor_key(f): f for u in self.updates.values() for f in u.factors}
        return sum(array.size for array in arrays.values())

    def compared(self, base_weight: Callable[[str], np.ndarray]) -> "Adapter":
        """The adapter without its ``base_weights``, which are those of the model.

        Args:
            base_weight: the model's matrix of a site, ``[out_features, in_features]`` or that of
                an embedding ``[vocab, hidden]``.

        Raises:
            AdapterError: a matrix differs by more than the rounding to the dtype of either side.
        """
        for site, copy in self.base_weights.items():
            ours = base_weight(site)
            rounded = copy.astype(ours.dtype)
            if not (np.array_equal(rounded, ours) or np.array_equal(ours.astype(copy.dtype), copy)):
                raise AdapterError(
                    f"adapter from {self.source}: its copy of the base model's {site} "
                    "(base_layer.weight) differs from the model: it replaces the matrix, or was "
                    "trained on another model; neither is supported"
                )
        return replace(self, base_weights={})
