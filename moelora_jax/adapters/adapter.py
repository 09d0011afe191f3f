"""An adapter in host memory: what every file format is read into, and what is packed into pages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from moelora_jax.config import LoraSite
from moelora_jax.errors import AdapterError
from moelora_jax.safetensors_file import FLOAT_DTYPES

_DTYPES = frozenset(FLOAT_DTYPES.values())


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
        a: shrink factor ``[rank, in_features]``; an array of JAX's is copied to the host.
        b: expand factor ``[out_features, rank]``, likewise.
        scaling: alpha/rank, or alpha/√rank for rank-stabilised LoRA.
    """

    a: np.ndarray = field(repr=False)
    b: np.ndarray = field(repr=False)
    scaling: float

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            object.__setattr__(self, name, np.asarray(getattr(self, name)))
        object.__setattr__(self, "scaling", float(self.scaling))

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
    """A LoRA adapter in host memory, read from files or made of arrays.

    What it changes is checked against a model when it is loaded.

    Attributes:
        layout: the file layout that it was read from; any word for one that was made.
        updates: the changed matrices; a target that is missing is not changed.
        source: the folder it came from, for messages.
        base_weights: copies of the base model's matrices that PEFT saves beside the factors of
            embeddings and heads, by the name of the site. They must be compared with the model's
            own before the adapter is packed: see :meth:`compared`.
    """

    layout: str
    updates: Mapping[Target, LowRankUpdate] = field(repr=False)
    source: str = "memory"
    base_weights: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for target, update in self.updates.items():
            if not (isinstance(target, Target) and isinstance(update, LowRankUpdate)):
                raise AdapterError(
                    f"adapter from {self.source}: an update is Target(layer, site, expert): "
                    f"LowRankUpdate(a, b, scaling), not {target!r}: {type(update).__name__}"
                )

    def describe(self, target: Target) -> str:
        """Where the update of a target comes from and belongs to, for messages."""
        layer, site, expert = target
        return f"adapter from {self.source}, layer {layer}, {site}, expert {expert}"

    def check(self, target: Target, site: LoraSite) -> None:
        """Refuse an update that does not fit its site.

        Raises:
            AdapterError: the site is not in that layer or has no such expert, or a factor has
                another shape or no dtype of files.
        """
        where, update = self.describe(target), self.updates[target]
        if target.layer not in site.layers:
            raise AdapterError(f"{where}: the site exists in layers {site.layers} only")
        if not 0 <= target.expert < site.table_experts:
            raise AdapterError(f"{where}: the site has {site.table_experts} experts, from 0 on")
        a, b = update.a.shape, update.b.shape
        rank = a[0] if a else 0
        if rank < 1 or a != (rank, site.in_features) or b != (site.out_features, rank):
            raise AdapterError(
                f"{where}: A has shape {a} and B {b}; [rank, {site.in_features}] and "
                f"[{site.out_features}, rank] are needed, and a rank of at least 1"
            )
        for factor, array in (("A", update.a), ("B", update.b)):
            if array.dtype not in _DTYPES:
                raise AdapterError(
                    f"{where}: {factor} has dtype {array.dtype}; supported are "
                    f"{', '.join(sorted(map(str, _DTYPES)))}"
                )

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
                    "differs from the model: it replaces the matrix, or was trained on another "
                    "model; neither is supported"
                )
        return replace(self, base_weights={})
