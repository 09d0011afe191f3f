"""The layouts in which files hold factors: one table, and how each row of it is taken apart.

The axes of a tensor are words of these letters; a word of several is one axis, whose last letter
varies fastest:

* ``e`` experts;
* ``r`` rank, ``i`` in features, ``o`` out features of the matrix that changes;
* ``1`` an axis of length 1, in place of the experts that share the factor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

import numpy as np

#: The length of each letter.
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class FactorLayout:
    """How two tensors hold the factors of one matrix, or of the same matrix of every expert.

    Attributes:
        name: what it is called in messages, and what callers ask for.
        a: the axes of the tensor ``lora_A``.
        b: the axes of the tensor ``lora_B``.
    """

    name: str
    a: str
    b: str

    @property
    def num_axes(self) -> int:
        """Dimensions of both tensors."""
        return len(self.a.split())

    def take_apart(
        self, a: np.ndarray, b: np.ndarray, sizes: Sizes
    ) -> tuple[np.ndarray, np.ndarray]:
        """The factors in the two tensors, as views of them.

        Returns:
            The shrink factors ``[experts, rank, in]`` and the expand factors
            ``[experts, out, rank]``. The first axis of a factor that all experts share is 1.
        """
        first, second = _experts_first(a, self.a, sizes), _experts_first(b, self.b, sizes)
        return (first, second) if "i" in self.a else (second, first)


LINEAR = FactorLayout("linear", "r i", "o r")
#: An embedding whose weight ``[in, out]`` PEFT adapts as a parameter.
LINEAR_TRANSPOSED = FactorLayout("linear", "r o", "i r")
PER_EXPERT = FactorLayout("per_expert", "r i", "o r")
PEFT_FUSED = FactorLayout("peft_fused", "er i", "o re")
PEFT_FUSED_0_18 = FactorLayout("peft_fused_0_18", "er o", "i re")
STACKED = FactorLayout("stacked", "e r i", "e o r")
#: Of a projection into the experts (gate, up), and of one out of them (down).
SHARED_OUTER_IN = FactorLayout("shared_outer", "1 r i", "e o r")
SHARED_OUTER_OUT = FactorLayout("shared_outer", "e r i", "1 o r")

#: What the factors of routed experts can be read as.
ExpertLayout = Literal["per_expert", "peft_fused", "peft_fused_0_18", "stacked", "shared_outer"]
EXPERT_LAYOUTS: tuple[str, ...] = get_args(ExpertLayout)

#: What they can be written as; see :mod:`moelora_jax.adapters.writer`.
Layout = Literal["per_expert", "peft_fused"]


def shape_of(axes: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape of a tensor with these axes."""
    return tuple(prod(sizes[letter] for letter in axis) for axis in axes.split())


def wrong_axes(axes: str, shape: Sequence[int], sizes: Sizes) -> list[str]:
    """The axes whose length is another one in ``shape``."""
    lengths = zip(axes.split(), shape, shape_of(axes, sizes), strict=True)
    return [axis for axis, actual, expected in lengths if actual != expected]


def _experts_first(tensor: np.ndarray, axes: str, sizes: Sizes) -> np.ndarray:
    letters = axes.replace(" ", "")
    order = sorted(letters, key="1eori".index)
    array = tensor.reshape([sizes[letter] for letter in letters])
    array = array.transpose([letters.index(letter) for letter in order])
    return array if array.ndim == 3 else array[None]
