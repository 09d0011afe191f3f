"""Reads an adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

Two rules. Every tensor in the file is used, or reading fails and names the tensor. And only
safetensors is read, never a pickle.

Layouts that are read, in any combination within one file:

* **linear**: A ``[rank, in]`` and B ``[out, rank]`` of an ordinary linear layer;
* **per_expert**: the same for a projection of one expert; a ``gate_up_proj`` is both projections,
  which share its A;
* **peft_fused**: a parameter of all experts, as PEFT 0.19 and later save ``target_parameters``:
  A ``[experts·rank, in]``, where the ranks of one expert are neighbours, and
  B ``[out, rank·experts]``, where the experts of one rank are neighbours. PEFT also saves this when
  it has converted per-expert ``target_modules``.

Layers, experts and projections without tensors are not changed. A tensor's rank must be what the
config says after its patterns: no convention that divides or multiplies it for experts is accepted.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from moelora_jax.adapters.adapter import Adapter, LowRankUpdate, Target
from moelora_jax.adapters.adapter_config import AdapterConfig, read_adapter_config
from moelora_jax.adapters.module_names import QWEN3_MOE_NAMES, ModuleNames, ModulePlace, Storage
from moelora_jax.config import LoraSite
from moelora_jax.errors import AdapterError
from moelora_jax.safetensors_file import SafetensorsFile

__all__ = ["QWEN3_MOE_NAMES", "ModuleNames", "read_adapter"]

_WEIGHTS = "adapter_model.safetensors"

_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?(?:\.weight)?"
)

#: What a tensor of another name is: the first expression that is found in it tells.
_OTHER_TENSORS = {
    r"\.lora_magnitude_vector": "the magnitude vector of DoRA",
    r"\.lora_embedding_[AB]": "LoRA on an embedding",
    r"\.lora_B\..*bias$": "a bias of lora_B",
    r"\.lora_[AB]\.": "a factor of an adapter that is not called 'default'",
    r"\.bias$": "a replacement of a bias of the model",
    r"\.weight$": "a replacement of a weight of the model (modules_to_save)",
    r"": "nothing known",
}


class _Pair(NamedTuple):
    """The two factors of a module: the names of their tensors and their shapes."""

    module: str
    a: str
    b: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Change:
    """What a pair of factors changes: one matrix, or the same matrix of each expert.

    Attributes:
        pair: the factors.
        storage: how they are laid out.
        layer: the model's layer index.
        name: what PEFT calls the changed module or parameter; patterns and targets match this.
        sites: the sites that the matrix's rows belong to, in their order.
        experts: the experts that the factors hold, in their order; 0 for a linear layer.
    """

    pair: _Pair
    storage: Storage
    layer: int
    name: str
    sites: Sequence[LoraSite]
    experts: Sequence[int]

    @property
    def in_features(self) -> int:
        return self.sites[0].in_features

    @property
    def out_features(self) -> int:
        return sum(site.out_features for site in self.sites)


def read_adapter(
    folder: str | Path, sites: Sequence[LoraSite], *, module_names: ModuleNames
) -> Adapter:
    """Read an adapter folder and check all of it against a model.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        sites: what adapters may change in the model.
        module_names: how adapters for this family of models name their modules.

    Returns:
        The adapter. Its factors are finite and keep the file's dtype: float64, float32, float16 or
        bfloat16. Those that come from one tensor are views of one array.

    Raises:
        AdapterError: if a file is missing or damaged; an option, dtype or layout is not supported;
            a tensor is unknown, unpaired, not finite, or its shape contradicts the model or the
            config; or the config names a target that has no tensors.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    with SafetensorsFile(adapter_weights(folder), AdapterError) as file:
        layout, updates = _Reader(file, config, sites, module_names).read()
    return Adapter(layout, updates, source=str(folder))


def adapter_weights(folder: Path) -> Path:
    """The file of an adapter folder that holds its tensors, which may be missing.

    Raises:
        AdapterError: there is only a pickle, or the adapter adds vocabulary.
    """
    weights, pickle = folder / _WEIGHTS, folder / "adapter_model.bin"
    if pickle.exists() and not weights.exists():
        raise AdapterError(
            f"{pickle}: a pickle can run code and is never read; save the adapter as safetensors"
        )
    vocabulary = folder / "new_embeddings.safetensors"
    if vocabulary.exists():
        raise AdapterError(f"{vocabulary}: an adapter that adds vocabulary is not supported")
    return weights


class _Reader:
    """Reads one file of tensors; the steps are methods because all of them need the same four."""

    def __init__(
        self,
        file: SafetensorsFile,
        config: AdapterConfig,
        sites: Sequence[LoraSite],
        names: ModuleNames,
    ) -> None:
        self.file = file
        self.config = config
        self.sites = {site.name: site for site in sites}
        self.names = names

    def read(self) -> tuple[str, dict[Target, LowRankUpdate]]:
        """The layout's name and the updates."""
        changes = self._changes()
        self._check_experts_not_transposed(changes)
        for change in changes:
            self._check_shapes(change)
        self.config.check_targets({change.name for change in changes})
        updates: dict[Target, LowRankUpdate] = {}
        tensors: dict[Target, str] = {}
        for change in changes:
            for target, update in self._updates(change):
                if target in updates:
                    self._fail(change.pair.a, f"changes the same as {tensors[target]!r}: {target}")
                updates[target], tensors[target] = update, change.pair.a
        found = {change.storage for change in changes}
        return "+".join(storage.value for storage in Storage if storage in found), updates

    # From names to changes.

    def _pairs(self) -> list[_Pair]:
        """All tensors of the file, each A with its B."""
        factors: dict[str, dict[str, str]] = {}
        for tensor in self.file.headers:
            name = _FACTOR.fullmatch(tensor)
            if name is None:
                kinds = (kind for part, kind in _OTHER_TENSORS.items() if re.search(part, tensor))
                self._fail(tensor, f"is {next(kinds)}: not supported")
            other = factors.setdefault(name["module"], {}).setdefault(name["factor"], tensor)
            if other != tensor:
                self._fail(tensor, f"is the same factor as {other!r}")
        pairs = []
        for module, names in factors.items():
            if len(names) < 2:
                (missing,) = {"A", "B"} - names.keys()
                (tensor,) = names.values()
                self._fail(tensor, f"has no lora_{missing} beside it")
            shapes = (self.file.headers[names[factor]].shape for factor in "AB")
            pairs.append(_Pair(module, names["A"], names["B"], *shapes))
        if not pairs:
            raise AdapterError(f"{self.file.path}: holds no tensors")
        return pairs

    def _changes(self) -> list[_Change]:
        """What each pair of the file changes."""
        places = {pair: self._place(pair) for pair in self._pairs()}
        fused = {
            (place.module, place.wrapped): pair
            for pair, place in places.items()
            if place.storage is Storage.PEFT_FUSED
        }
        changes = []
        for pair, place in places.items():
            if place.storage is Storage.PEFT_FUSED:
                other = fused.get((place.module, not place.wrapped))
                changes.append(self._fused_change(pair, place, other))
            else:
                changes.append(self._change(pair, place))
        return changes

    def _place(self, pair: _Pair) -> ModulePlace:
        place = self.names.locate(pair.module)
        if place is None:
            self._fail(pair.a, "is for a module that adapters of this model cannot change")
        dimensions = 3 if place.storage is Storage.STACKED else 2
        for tensor, shape in ((pair.a, pair.a_shape), (pair.b, pair.b_shape)):
            if len(shape) != dimensions:
                self._fail(tensor, f"has shape {shape}, expected {dimensions} dimensions")
        if place.storage is Storage.STACKED:
            is_shared = 1 in (pair.a_shape[0], pair.b_shape[0])
            self._refuse_layout(pair, "shared outer experts" if is_shared else "stacked experts")
        return place

    def _change(self, pair: _Pair, place: ModulePlace) -> _Change:
        """The change of a linear layer or of one expert."""
        sites = self._sites(pair, place.layer, place.sites)
        expert = place.expert or 0
        if expert >= sites[0].table_experts:
            self._fail(pair.a, f"is for expert {expert} of {sites[0].num_experts}, counted from 0")
        # PEFT can adapt the weight of a linear layer as a parameter; the tensors are the same.
        weight = f"{place.module}.weight"
        name = weight if self.config.targets_parameter(weight) else place.module
        return _Change(pair, place.storage, place.layer, name, sites, (expert,))

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
        return _Change(pair, place.storage, place.layer, name, sites, experts)

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

    # Checks.

    def _check_experts_not_transposed(self, changes: Sequence[_Change]) -> None:
        """Refuse fused experts from PEFT 0.17 or 0.18, which exchange the features of A and B."""
        doubtful = []
        for change in changes:
            if change.storage is Storage.PEFT_FUSED:
                found = (change.pair.a_shape[1], change.pair.b_shape[0])
                if found == (change.in_features, change.out_features):
                    doubtful.append(change)
                elif found == (change.out_features, change.in_features):
                    self._refuse_transposed(change)
        # One parameter that is not square decides for the whole file.
        if not doubtful or any(c.in_features != c.out_features for c in doubtful):
            return
        transposes = self.config.transposes_experts()
        if transposes:
            self._refuse_transposed(doubtful[0])
        if transposes is None:
            self._fail(
                doubtful[0].pair.a,
                "is of a square matrix, which PEFT before 0.19 saves transposed: peft_version in "
                f"{self.config.path.name} must tell, and is {self.config.peft_version!r}",
            )

    def _check_shapes(self, change: _Change) -> None:
        """Check both factors against the model's features and the config's rank."""
        pair, rank = change.pair, self.config.rank_of(change.name)
        ranks = rank * len(change.experts)
        factors = (
            (pair.a, pair.a_shape, (ranks, change.in_features), 1),
            (pair.b, pair.b_shape, (change.out_features, ranks), 0),
        )
        for tensor, shape, expected, features in factors:
            if shape[features] != expected[features]:
                reason = "this looks like an adapter for another model"
            else:
                reason = f"{self.config.path.name} gives {change.name} rank {rank}"
            if shape != expected:
                self._fail(tensor, f"has shape {shape}, expected {expected}: {reason}")

    # From changes to arrays.

    def _updates(self, change: _Change) -> Iterator[tuple[Target, LowRankUpdate]]:
        """Read both factors and take them apart by expert and by site."""
        experts, rank = len(change.experts), self.config.rank_of(change.name)
        scaling = self.config.scaling_of(change.name)
        a = self._factor(change.pair.a).reshape(experts, rank, change.in_features)
        b = self._factor(change.pair.b).reshape(change.out_features, rank, experts)
        rows = self._rows(change.sites)
        for i, expert in enumerate(change.experts):
            shared = a[i]
            for site, site_rows in zip(change.sites, rows, strict=True):
                target = Target(change.layer, site.name, expert)
                yield target, LowRankUpdate(shared, b[site_rows, :, i], scaling)

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

    # Errors.

    def _fail(self, tensor: str, reason: str) -> NoReturn:
        raise AdapterError(f"{self.file.path}: tensor {tensor!r} {reason}")

    def _refuse_transposed(self, change: _Change) -> NoReturn:
        self._refuse_layout(change.pair, "fused experts of PEFT 0.17 and 0.18")

    def _refuse_layout(self, pair: _Pair, layout: str) -> NoReturn:
        self._fail(
            pair.a,
            f"of shape {pair.a_shape}, with lora_B of shape {pair.b_shape}, is of the layout "
            f"'{layout}', which is not supported yet",
        )
