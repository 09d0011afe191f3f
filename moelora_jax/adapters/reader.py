"""Reads an adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

Two rules. Every tensor in the file is used, or reading fails and names the tensor. And only
safetensors is read, never a pickle.

Layouts that are read (:mod:`~moelora_jax.adapters.layouts` has them as a table):

* **linear**: A ``[rank, in]`` and B ``[out, rank]`` of an ordinary linear layer, or the same as
  ``lora_embedding_A`` and ``lora_embedding_B`` of an embedding, whose input is the vocabulary;
* **per_expert**: the same for a projection of one expert; a ``gate_up_proj`` is both projections,
  which share its A;
* **peft_fused**: a parameter of all experts, as PEFT 0.19 and later save ``target_parameters``:
  A ``[experts·rank, in]``, where the ranks of one expert are neighbours, and
  B ``[out, rank·experts]``, where the experts of one rank are neighbours. PEFT also saves this when
  it has converted per-expert ``target_modules``;
* **peft_fused_0_18**: the same from PEFT 0.17 and 0.18, which exchange A and B: ``lora_A`` is
  ``[experts·rank, out]`` and ``lora_B`` is ``[in, rank·experts]``;
* **stacked**: all experts in one tensor: A ``[experts, rank, in]`` and B ``[experts, out, rank]``;
* **shared_outer**: the same, but all experts share the factor on the outer side, the A of gate and
  up and the B of down, whose first axis is 1.

Names and shapes tell the layout. Where a parameter is square, another one of the file tells whether
PEFT exchanged A and B, or else the ``peft_version`` of the config. One file may hold several
layouts, but not both of peft_fused and peft_fused_0_18, nor both of stacked and shared_outer.

Layers, experts and projections without tensors are not changed. A tensor's rank must be what the
config says after its patterns: no convention that divides or multiplies it for experts is accepted.

PEFT saves the base model's matrix (``base_layer.weight``, or the model's own name of it) beside the
factors of an embedding or a head. These copies are kept for whoever knows the model to compare.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from moelora_jax.adapters.adapter import Adapter, LowRankUpdate, Target
from moelora_jax.adapters.adapter_config import AdapterConfig, read_adapter_config
from moelora_jax.adapters.layouts import (
    EXPERT_LAYOUTS,
    LINEAR,
    LINEAR_TRANSPOSED,
    PEFT_FUSED,
    PEFT_FUSED_0_18,
    FactorLayout,
    Sizes,
    shape_of,
    wrong_axes,
)
from moelora_jax.adapters.module_names import ModuleNames, ModulePlace
from moelora_jax.config import LoraSite
from moelora_jax.errors import AdapterError, LayoutError
from moelora_jax.safetensors_file import SafetensorsFile

_WEIGHTS = "adapter_model.safetensors"

# Tensors that a thread looks at before it takes others.
_TENSORS_PER_TASK = 32

_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])"
    r"(?:\.default)?(?:\.weight)?"
)
# PEFT saves it by its own name where the vocabulary may have grown.
_BASE_WEIGHT = re.compile(r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.base_layer)?\.weight")
# What torch.compile, FSDP and activation checkpointing put between the names of modules.
_WRAPPERS = re.compile(r"\b_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")

#: What a tensor of another name is: the first expression that is found in it tells.
_OTHER_TENSORS = {
    r"\.lora_magnitude_vector": "the magnitude vector of DoRA",
    r"\.lora_B\..*bias$": "a bias of lora_B",
    r"\.lora_(embedding_)?[AB]\.": "a factor of an adapter that is not called 'default'",
    r"\.bias$": "a replacement of a bias of the model",
    r"\.weight$": "a replacement of a weight of the model (modules_to_save)",
    r"": "nothing known",
}


class _Pair(NamedTuple):
    """The two factors of a module: the names of their tensors and their shapes."""

    module: str
    is_embedding: bool
    a: str
    b: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Change:
    """What a pair of factors changes: one matrix, or the same matrix of each expert.

    Attributes:
        pair: the factors.
        layouts: how they may be laid out, as far as the module's name tells.
        layer: the model's layer index.
        name: what PEFT calls the changed module or parameter; patterns and targets match this.
        sites: the sites that the matrix's rows belong to, in their order.
        experts: the experts that the factors hold, in their order; 0 for a linear layer.
        rank: what the config says.
    """

    pair: _Pair
    layouts: Sequence[FactorLayout]
    layer: int
    name: str
    sites: Sequence[LoraSite]
    experts: Sequence[int]
    rank: int

    @property
    def in_features(self) -> int:
        return self.sites[0].in_features

    @property
    def out_features(self) -> int:
        return sum(site.out_features for site in self.sites)

    @property
    def sizes(self) -> Sizes:
        """The length of each letter of a layout."""
        return {
            "1": 1,
            "e": len(self.experts),
            "r": self.rank,
            "i": self.in_features,
            "o": self.out_features,
        }

    def likely_layouts(self) -> list[FactorLayout]:
        """The layouts that the shapes fit best; a wrong rank is as wrong in all of them."""
        a, b = self.pair.a_shape, self.pair.b_shape
        misfits = [
            len(wrong_axes(layout.a, a, self.sizes) + wrong_axes(layout.b, b, self.sizes))
            for layout in self.layouts
        ]
        each = zip(self.layouts, misfits, strict=True)
        return [layout for layout, misfit in each if misfit == min(misfits)]


def read_adapter(
    folder: str | Path,
    sites: Sequence[LoraSite],
    *,
    module_names: ModuleNames,
    layout: str | None = None,
) -> Adapter:
    """Read an adapter folder and check all of it against a model.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        sites: what adapters may change in the model.
        module_names: how adapters for this family of models name their modules.
        layout: one of ``EXPERT_LAYOUTS``, for adapters whose shapes and version do not tell it. All
            tensors of routed experts must fit it; ``peft_version`` is not asked then.

    Returns:
        The adapter. Its factors are finite and keep the file's dtype: float64, float32, float16 or
        bfloat16. Those that come from one tensor are views of one array, and a factor that several
        experts or projections share is the same view in each of them.

    Raises:
        LayoutError: the layout is unknown, in doubt, or not the one asked for.
        AdapterError: a file is missing or damaged; an option or dtype is not supported; a tensor is
            unknown, unpaired, not finite, or its shape contradicts the model or the config; or the
            config names a target that has no tensors.
    """
    if layout not in (None, *EXPERT_LAYOUTS):
        raise LayoutError(f"layout {layout!r} is not one of {', '.join(EXPERT_LAYOUTS)}")
    folder = Path(folder)
    config = read_adapter_config(folder)
    # In memory, because an adapter may be written anew while a server reads it.
    with SafetensorsFile(adapter_weights(folder), AdapterError, in_memory=True) as file:
        if read_adapter_config(folder) != config:
            raise AdapterError(f"{folder}: was replaced while it was read; load it again")
        reader = _Reader(file, config, sites, module_names, layout)
        found, updates = reader.read()
        copies = reader.base_weights()
    return Adapter(found, updates, source=str(folder), base_weights=copies)


def adapter_weights(folder: Path) -> Path:
    """The file of an adapter folder that holds its tensors, which may be missing.

    Raises:
        AdapterError: there are only other files, or the adapter adds vocabulary.
    """
    weights, pickle = folder / _WEIGHTS, folder / "adapter_model.bin"
    if pickle.exists() and not weights.exists():
        raise AdapterError(
            f"{pickle}: a pickle can run code and is never read; save the adapter as safetensors"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others and not weights.exists():
        raise AdapterError(
            f"{weights}: no such file, but {', '.join(others[:3])}; an adapter is one file of this "
            "name, as PEFT saves it"
        )
    vocabulary = folder / "new_embeddings.safetensors"
    if vocabulary.exists():
        raise AdapterError(f"{vocabulary}: an adapter that adds vocabulary is not supported")
    return weights


class _Reader:
    """Reads one file of tensors; the steps are methods because all of them need the same five."""

    def __init__(
        self,
        file: SafetensorsFile,
        config: AdapterConfig,
        sites: Sequence[LoraSite],
        names: ModuleNames,
        layout: str | None,
    ) -> None:
        self.file = file
        self.config = config
        self.sites = {site.name: site for site in sites}
        self.names = names
        self.asked = layout

    def read(self) -> tuple[str, dict[Target, LowRankUpdate]]:
        """The layout's name and the updates."""
        places = {pair: self._place(pair) for pair in self._pairs()}
        changes = self._changes(places)
        if not changes:
            raise AdapterError(f"{self.file.path}: holds no tensors that change the model")
        layouts = self._layouts(changes)
        for change, layout in layouts.items():
            self._check_shapes(change, layout)
        absent = {place.module for place in places.values() if not place.layouts}
        self.config.check_targets({change.name for change in changes} | absent, self._in_model)
        factors = self._factors(changes)
        updates: dict[Target, LowRankUpdate] = {}
        tensors: dict[Target, str] = {}
        for change, layout in layouts.items():
            for target, update in self._updates(change, layout, factors):
                if target in updates:
                    self._fail(change.pair.a, f"changes the same as {tensors[target]!r}: {target}")
                updates[target], tensors[target] = update, change.pair.a
        self._tie(updates, tensors)
        found = {layout.name for layout in layouts.values()}
        return "+".join(name for name in (LINEAR.name, *EXPERT_LAYOUTS) if name in found), updates

    def _in_model(self, target: str) -> bool:
        """Whether the model has modules that a target of the config names."""
        return self.names.has(target, self.sites)

    # From names to changes.

    def _pairs(self) -> list[_Pair]:
        """All tensors of the file, each A with its B."""
        factors: dict[tuple[str, bool], dict[str, str]] = {}
        for tensor in self.file.headers:
            if self._site_of_base_weight(tensor) is not None:
                continue
            name = _FACTOR.fullmatch(_WRAPPERS.sub("", tensor))
            if name is None:
                kinds = (kind for part, kind in _OTHER_TENSORS.items() if re.search(part, tensor))
                self._fail(tensor, f"is {next(kinds)}: not supported")
            key = name["module"], bool(name["embedding"])
            other = factors.setdefault(key, {}).setdefault(name["factor"], tensor)
            if other != tensor:
                self._fail(tensor, f"is the same factor as {other!r}")
        pairs = []
        for (module, is_embedding), names in factors.items():
            if len(names) < 2:
                (missing,) = {"A", "B"} - names.keys()
                (tensor,) = names.values()
                kind = "lora_embedding" if is_embedding else "lora"
                self._fail(tensor, f"has no {kind}_{missing} beside it")
            shapes = (self.file.headers[names[factor]].shape for factor in "AB")
            pairs.append(_Pair(module, is_embedding, names["A"], names["B"], *shapes))
        return pairs

    def _place(self, pair: _Pair) -> ModulePlace:
        place = self.names.locate(pair.module)
        if place is None:
            self._fail(pair.a, "is for a module that adapters of this model cannot change")
        if pair.is_embedding and not self._is_embedding(place):
            self._fail(pair.a, "is LoRA on an embedding, which this module is not")
        if not place.layouts:
            self._check_absent(pair, place)
            return place
        dimensions = place.layouts[0].num_axes
        for tensor, shape in ((pair.a, pair.a_shape), (pair.b, pair.b_shape)):
            if 0 in shape:
                self._fail(
                    tensor, "is empty, as DeepSpeed and FSDP save what was not gathered before"
                )
            if len(shape) != dimensions:
                self._fail(tensor, f"has shape {shape}, expected {dimensions} dimensions")
        return place

    def _changes(self, places: Mapping[_Pair, ModulePlace]) -> list[_Change]:
        """What each pair of the file changes."""
        fused = {
            (place.module, place.wrapped): pair
            for pair, place in places.items()
            if PEFT_FUSED in place.layouts
        }
        changes = []
        for pair, place in places.items():
            if PEFT_FUSED in place.layouts:
                other = fused.get((place.module, not place.wrapped))
                changes.append(self._fused_change(pair, place, other))
            elif place.layouts:
                changes.append(self._change(pair, place))
        return changes

    def _change(self, pair: _Pair, place: ModulePlace) -> _Change:
        """The change of a linear layer, or of a projection of one expert or of all."""
        sites = self._sites(pair, place.layer, place.sites)
        every = range(sites[0].table_experts)
        if place.expert is not None and place.expert not in every:
            self._fail(pair.a, f"is for expert {place.expert} of {len(every)}, counted from 0")
        experts = every if place.expert is None else (place.expert,)
        # PEFT can adapt the weight of a linear layer as a parameter; the tensors are the same.
        weight = f"{place.module}.weight"
        is_parameter = self.config.targets_parameter(weight)
        name = weight if is_parameter else place.module
        layouts = place.layouts
        if sites[0].is_embedding and not pair.is_embedding:
            if not is_parameter:
                self._fail(pair.a, "is of an embedding, where it should be called lora_embedding_A")
            layouts = (LINEAR_TRANSPOSED,)
        rank = self.config.rank_of(name)
        return _Change(pair, layouts, place.layer, name, sites, experts, rank)

    def _fused_change(self, pair: _Pair, place: ModulePlace, other: _Pair | None) -> _Change:
        """The change of a parameter of all experts.

        Args:
            pair: the factors.
            place: the experts module.
            other: the factors of the module's other parameter, if the file has them.
        """
        parameter = self._expert_parameter(pair, place, other)
        sites = self._sites(pair, place.layer, self.names.projections[parameter])
        name = f"{place.module}.{parameter}"
        experts = range(sites[0].num_experts)
        rank = self.config.rank_of(name)
        return _Change(pair, place.layouts, place.layer, name, sites, experts, rank)

    def _expert_parameter(self, pair: _Pair, place: ModulePlace, other: _Pair | None) -> str:
        """Which parameter it is: PEFT's tensor names only tell if there are two of them."""
        inner, outer = self.names.expert_parameters
        targeted = [
            parameter
            for parameter in (inner, outer)
            if self.config.targets_parameter(f"{place.module}.{parameter}")
        ]
        if other is None and (place.wrapped or len(targeted) == 2):
            missing = outer if place.wrapped else inner
            self._fail(pair.a, f"has no counterpart for {missing} of {place.module}")
        if other is not None and len(targeted) == 1:
            self._fail(pair.a, f"is one of two parameters, but only {targeted[0]} is targeted")
        if other is not None:
            return inner if place.wrapped else outer
        if targeted:
            return targeted[0]
        return self._expert_parameter_by_shape(pair, place)

    def _expert_parameter_by_shape(self, pair: _Pair, place: ModulePlace) -> str:
        """Which parameter it is if the config does not say; PEFT < 0.19 exchanges the features."""
        features = {pair.a_shape[1], pair.b_shape[0]}
        for parameter in self.names.expert_parameters:
            sites = self._sites(pair, place.layer, self.names.projections[parameter])
            if features == {sites[0].in_features, sum(site.out_features for site in sites)}:
                return parameter
        self._fail(pair.a, f"and its lora_B fit no parameter of the experts: {sorted(features)}")

    def _sites(self, pair: _Pair, layer: int, names: Sequence[str]) -> list[LoraSite]:
        """The sites of these names, which the layer must have."""
        for name in names:
            if name not in self.sites:
                self._fail(pair.a, f"changes {name}, which adapters may not change here")
            if layer not in self.sites[name].layers:
                layers = self.sites[name].layers
                self._fail(pair.a, f"is for layer {layer}; the layers with {name} are {layers}")
        return [self.sites[name] for name in names]

    def _check_absent(self, pair: _Pair, place: ModulePlace) -> None:
        """Check a projection that the model lacks: the layer has experts, the tensors are empty."""
        self._sites(pair, place.layer, self.names.projections[self.names.expert_parameters[1]])
        for tensor, shape in ((pair.a, pair.a_shape), (pair.b, pair.b_shape)):
            if 0 not in shape:
                self._fail(tensor, f"has shape {shape}, but the model has no such projection")

    # From shapes to layouts.

    def _layouts(self, changes: Sequence[_Change]) -> dict[_Change, FactorLayout]:
        """The layout of each change."""
        told = self._layouts_by_shape(changes)
        return {change: self._layout(change, told) for change in changes}

    def _layouts_by_shape(self, changes: Sequence[_Change]) -> dict[FactorLayout, str]:
        """Where several layouts are possible, which one the file has, if a shape tells.

        Returns:
            For the first one of the possible layouts, the name of the one that the file has.
        """
        told: dict[FactorLayout, tuple[str, str]] = {}
        for change in changes:
            likely = change.likely_layouts()
            if len(likely) > 1:
                continue
            name, tensor = likely[0].name, change.pair.a
            other, other_tensor = told.setdefault(change.layouts[0], (name, tensor))
            if other != name:
                self._fail(
                    tensor,
                    f"of shape {change.pair.a_shape}, with lora_B of shape {change.pair.b_shape}, "
                    f"is of the layout {name}, but {other_tensor!r} is of {other}",
                )
        return {first: name for first, (name, _) in told.items()}

    def _layout(self, change: _Change, told: Mapping[FactorLayout, str]) -> FactorLayout:
        first = change.layouts[0]
        if self.asked and first.name != LINEAR.name:
            name = self.asked
        else:
            name = told.get(first) or self._layout_by_version(change)
        for layout in change.layouts:
            if layout.name == name:
                return layout
        self._fail(
            change.pair.a, f"cannot be of the layout {name}, which was asked for", LayoutError
        )

    def _layout_by_version(self, change: _Change) -> str:
        """The layout's name if no shape in the file tells it."""
        is_square = change.in_features == change.out_features
        if PEFT_FUSED_0_18 not in change.layouts or not is_square:
            # Stacked factors of one expert are the same, shared or not. Else nothing fits.
            return change.layouts[0].name
        exchanges = self.config.exchanges_experts()
        if exchanges is None:
            self._fail(
                change.pair.a,
                "is of a square matrix, where PEFT before 0.19 exchanges A and B: peft_version in "
                f"{self.config.path.name} must tell, and is {self.config.peft_version!r}; or ask "
                f"for layout {PEFT_FUSED.name!r} or {PEFT_FUSED_0_18.name!r}",
                LayoutError,
            )
        return PEFT_FUSED_0_18.name if exchanges else PEFT_FUSED.name

    def _check_shapes(self, change: _Change, layout: FactorLayout) -> None:
        """Check both factors against the model's features and the config's rank."""
        pair = change.pair
        for tensor, shape, axes in (
            (pair.a, pair.a_shape, layout.a),
            (pair.b, pair.b_shape, layout.b),
        ):
            wrong = wrong_axes(axes, shape, change.sizes)
            if not wrong:
                continue
            error = AdapterError
            if all("r" in axis for axis in wrong):
                reason = f"{self.config.path.name} gives {change.name} rank {change.rank}"
            elif self.asked:
                reason = f"the layout {self.asked}, which was asked for, does not fit"
                error = LayoutError
            else:
                reason = "this looks like an adapter for another model"
            expected = shape_of(axes, change.sizes)
            self._fail(tensor, f"has shape {shape}, expected {expected}: {reason}", error)

    # From changes to arrays.

    def _factors(self, changes: Sequence[_Change]) -> dict[str, np.ndarray]:
        """The tensors of all changes by name."""
        names = [name for change in changes for name in (change.pair.a, change.pair.b)]

        def read(some: Sequence[str]) -> dict[str, np.ndarray]:
            return {name: self._factor(name) for name in some}

        # Looking at all numbers is most of the work; one tensor may have too few for a task.
        with ThreadPoolExecutor() as threads:
            parts = threads.map(read, itertools.batched(names, _TENSORS_PER_TASK))
            return {name: factor for part in parts for name, factor in part.items()}

    def _updates(
        self, change: _Change, layout: FactorLayout, factors: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[Target, LowRankUpdate]]:
        """Take both factors apart by expert and by site."""
        scaling = self.config.scaling_of(change.name)
        a, b = layout.take_apart(factors[change.pair.a], factors[change.pair.b], change.sizes)
        each_a = _of_each_expert(a, change)
        for site, rows in zip(change.sites, self._rows(change.sites), strict=True):
            each_b = _of_each_expert(b[:, rows], change)
            for expert, its_a, its_b in zip(change.experts, each_a, each_b, strict=True):
                yield Target(change.layer, site.name, expert), LowRankUpdate(its_a, its_b, scaling)

    def _rows(self, sites: Sequence[LoraSite]) -> list[slice]:
        """Where the rows of each site are in a B that holds all of them."""
        if self.names.interleaved:
            return [slice(start, None, len(sites)) for start in range(len(sites))]
        ends = np.cumsum([site.out_features for site in sites]).tolist()
        return [slice(end - site.out_features, end) for site, end in zip(sites, ends, strict=True)]

    def _factor(self, tensor: str) -> np.ndarray:
        array = self.file.read(tensor)
        finite = np.isfinite(array)
        if not finite.all():
            index = tuple(np.argwhere(~finite)[0].tolist())
            self._fail(tensor, f"is {array[index]} at {index}: all values must be finite")
        return array

    # Embedding and head.

    def base_weights(self) -> dict[str, np.ndarray]:
        """The copies of the base model's matrices that the file holds, by site name."""
        copies: dict[str, np.ndarray] = {}
        names: dict[str, str] = {}
        for tensor, header in self.file.headers.items():
            site = self._site_of_base_weight(tensor)
            if site is None:
                continue
            shape = (site.out_features, site.in_features)
            shape = shape[::-1] if site.is_embedding else shape
            if header.shape != shape:
                self._fail(
                    tensor,
                    f"has shape {header.shape}, expected {shape}: this looks like an adapter that "
                    "adds vocabulary, or for another model",
                )
            if site.name in names:
                self._fail(tensor, f"is the same matrix as {names[site.name]!r}")
            copies[site.name], names[site.name] = self.file.read(tensor), tensor
        return copies

    def _site_of_base_weight(self, tensor: str) -> LoraSite | None:
        """The site outside of the layers whose base matrix this is; None for other tensors."""
        found = _BASE_WEIGHT.fullmatch(_WRAPPERS.sub("", tensor))
        name = None if found is None else self.names.outside.get(found["module"])
        return None if name is None else self.sites.get(name)

    def _is_embedding(self, place: ModulePlace) -> bool:
        return any(self.sites[site].is_embedding for site in place.sites if site in self.sites)

    def _tie(self, updates: dict[Target, LowRankUpdate], tensors: Mapping[Target, str]) -> None:
        """Check that what ``ensure_weight_tying`` ties changes alike, and store it once."""
        if not self.config.ensure_weight_tying:
            return
        for site in self.sites.values():
            if site.tied_to is None:
                continue
            mine, other = Target(0, site.name, 0), Target(0, site.tied_to, 0)
            for target, counterpart in ((mine, other), (other, mine)):
                if target in updates and counterpart not in updates:
                    self._fail(
                        tensors[target],
                        f"has no counterpart for {counterpart.site}, and ensure_weight_tying in "
                        f"{self.config.path.name} says that both change alike",
                    )
            if mine in updates:
                a, b = updates[other].b.T, updates[other].a.T
                if not (np.array_equal(updates[mine].a, a) and np.array_equal(updates[mine].b, b)):
                    self._fail(
                        tensors[mine],
                        f"or its lora_B is not the transpose of {other.site}'s, but "
                        f"ensure_weight_tying in {self.config.path.name} says that it is",
                    )
                updates[mine] = replace(updates[mine], a=a, b=b)

    # Errors.

    def _fail(self, tensor: str, reason: str, error: type[AdapterError] = AdapterError) -> NoReturn:
        raise error(f"{self.file.path}: tensor {tensor!r} {reason}")


def _of_each_expert(factors: np.ndarray, change: _Change) -> list[np.ndarray]:
    """One view for each expert; the very same one if ``factors`` holds one for all of them."""
    return list(factors) * (len(change.experts) // len(factors))
