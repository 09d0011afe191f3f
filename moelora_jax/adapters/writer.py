"""Writes an adapter folder, ``adapter_config.json`` and ``adapter_model.safetensors``.

The inverse of :mod:`moelora_jax.adapters.reader`: what is written here reads back bit by bit.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

import numpy as np
from safetensors.numpy import save_file

from moelora_jax.adapters.adapter import Adapter, LowRankUpdate, Target
from moelora_jax.adapters.layouts import Layout
from moelora_jax.adapters.module_names import QWEN3_MOE_NAMES, ModuleNames
from moelora_jax.config import LoraSite
from moelora_jax.errors import AdapterError, LayoutError
from moelora_jax.files import new_folder

__all__ = ["Layout", "save_adapter"]

#: The first version of PEFT whose layout of expert parameters is the one written here. Where a
#: matrix is square, only this tells readers that it is not transposed.
_PEFT_VERSION = "0.19.0"


@dataclass(frozen=True, eq=False)
class _Module:
    """One pair of tensors, and what the config says of it.

    Attributes:
        tensors: what the tensors' names begin with, after PEFT's ``base_model.model.``.
        name: the changed module or parameter, as PEFT calls it; ``{expert}`` stands for the index.
        site: the name of the first site that it changes.
        layer: the model's layer index.
        expert: the index, if it changes one expert alone.
        is_parameter: whether PEFT adapts a parameter, not a module.
        a: the tensor lora_A.
        b: the tensor lora_B.
        rank: of each update in it.
        scaling: of each update in it.
        is_embedding: whether PEFT adapts it as an embedding.
    """

    tensors: str
    name: str
    site: str
    layer: int
    expert: int | None
    is_parameter: bool
    a: np.ndarray
    b: np.ndarray
    rank: int
    scaling: float
    is_embedding: bool = False

    @property
    def short_name(self) -> str:
        """The end of the name that tells the site: ``q_proj``, ``mlp.up_proj.weight``."""
        parts = 1 + self.site.count(".") + self.name.endswith(".weight")
        return ".".join(self.name.split(".")[-parts:])

    def tensor(self, factor: str) -> str:
        """The name of the tensor that holds factor A or B."""
        kind = f"lora_embedding_{factor}" if self.is_embedding else f"lora_{factor}.weight"
        return f"base_model.model.{self.tensors}.{kind}"


def save_adapter(
    folder: str | Path,
    adapter: Adapter,
    sites: Sequence[LoraSite],
    *,
    layout: Layout,
    module_names: ModuleNames = QWEN3_MOE_NAMES,
    base_model: str | None = None,
) -> None:
    """Write an adapter folder that :func:`~moelora_jax.adapters.reader.read_adapter` reads.

    Factors keep their bits and dtypes. A scaling keeps its bits if any alpha gives it, as one
    always does for an adapter that came from a file; else it is off by one rounding of float64.
    The folder appears complete or not at all.

    ``peft_fused`` can be loaded by PEFT 0.19 and later, with transformers 5. There all experts of
    a layer have one rank and one scaling, and gate and up have one A. So where an adapter has two
    of them, they are stacked along the rank, and what does not belong together in B is zero, as
    PEFT itself does; smaller ranks are filled up with zeros, and so are experts without an update.
    ``per_expert`` has no such limits. A factor that several matrices share is written once for each
    of them, unless gate and up share their A in ``peft_fused``. Linear layers are written in the
    same way by both, but two kinds are parameters in ``peft_fused``: the router, which is one for
    transformers 5, and linear layers that are called like projections of experts, because PEFT
    takes a module of such a name for the experts. Copies of base weights are written as they are.

    Args:
        folder: must not exist, or be empty.
        adapter: what to write.
        sites: what adapters may change in the model.
        layout: of the experts.
        module_names: how adapters for this family of models name their modules.
        base_model: name or path of the base model, which other tools show to their users.

    Raises:
        LayoutError: the layout is none that can be written.
        AdapterError: the folder is not empty; the adapter changes nothing, contradicts the sites or
            is not finite; or experts of one layer differ in scaling or dtype, and the layout is
            ``peft_fused``.
    """
    if layout not in get_args(Layout):
        raise LayoutError(f"layout {layout!r} is not one of {', '.join(get_args(Layout))}")
    _check(adapter, sites)
    writer = _Writer(adapter, {site.name: site for site in sites}, module_names)
    modules = writer.modules(layout)
    tensors = {
        module.tensor(factor): np.ascontiguousarray(array)
        for module in modules
        for factor, array in (("A", module.a), ("B", module.b))
    }
    for site, weight in adapter.base_weights.items():
        tensors[f"base_model.model.{writer.path_outside[site]}.base_layer.weight"] = weight
    config = _config(modules, sites, module_names) | {"base_model_name_or_path": base_model}
    with new_folder(Path(folder), AdapterError) as new:
        (new / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        # Without this tag, some versions of transformers refuse the file.
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})


def _check(adapter: Adapter, sites: Sequence[LoraSite]) -> None:
    """Refuse what the reader would refuse."""
    if not adapter.updates:
        raise AdapterError(f"the adapter from {adapter.source} changes nothing, so it has no files")
    site_of_name = {site.name: site for site in sites}
    for target, update in adapter.updates.items():
        site = site_of_name.get(target.site)
        if site is None:
            _fail(target, f"is of no site of the model; its sites are {', '.join(site_of_name)}")
        adapter.check(target, site)
        for factor, array in (("A", update.a), ("B", update.b)):
            if not np.isfinite(array).all():
                _fail(target, f"has numbers in {factor} that are not finite")
        if not np.isfinite(update.scaling):
            _fail(target, f"has the scaling {update.scaling}, which is not finite")


class _Writer:
    """Lays the updates of an adapter out as pairs of tensors."""

    def __init__(self, adapter: Adapter, sites: Mapping[str, LoraSite], names: ModuleNames) -> None:
        self.updates = adapter.updates
        self.sites = sites
        self.names = names
        # The first path of a site is the one that counts.
        self.path_of_linear = {site: path for path, site in reversed(tuple(names.linear.items()))}
        self.path_outside = {site: path for path, site in reversed(tuple(names.outside.items()))}

    def modules(self, layout: Layout) -> list[_Module]:
        """All pairs of tensors, in order of the model."""
        dense = [t for t in self.updates if not self.sites[t.site].num_experts]
        experts = [t for t in self.updates if self.sites[t.site].num_experts]
        modules = [self._linear(target, layout) for target in dense]
        if layout == "per_expert":
            modules += [self._expert(target) for target in experts]
        else:
            for layer in {target.layer: None for target in experts}:
                modules += self._fused(layer)
        order = list(self.sites)
        return sorted(modules, key=lambda m: (m.layer, order.index(m.site), m.expert or 0))

    def _linear(self, target: Target, layout: Layout) -> _Module:
        if target.site in self.path_outside:
            path = self.path_outside[target.site]
            return self._matrix(target, path, path, None)
        if target.site == "router" and layout == "peft_fused":
            path = f"{self._layer(target.layer)}.{self.names.fused_router}"
            return self._matrix(target, path, f"{path}.weight", None, is_parameter=True)
        if target.site not in self.path_of_linear:
            _fail(target, "has no name in adapter files of this family of models")
        path = f"{self._layer(target.layer)}.{self.path_of_linear[target.site]}"
        if layout == "peft_fused" and path.rpartition(".")[2] in self.names.projections:
            return self._matrix(target, path, f"{path}.weight", None, is_parameter=True)
        return self._matrix(target, path, path, None)

    def _expert(self, target: Target) -> _Module:
        if target.site not in self.names.projection_of_site:
            _fail(target, "has no name of its own; write it with layout='peft_fused'")
        experts = f"{self._layer(target.layer)}.{self.names.experts[0]}"
        name = f"{experts}.{{expert}}.{self.names.projection_of_site[target.site]}"
        return self._matrix(target, name.format(expert=target.expert), name, target.expert)

    def _matrix(
        self,
        target: Target,
        tensors: str,
        name: str,
        expert: int | None,
        *,
        is_parameter: bool = False,
    ) -> _Module:
        update = self.updates[target]
        return _Module(
            tensors=tensors,
            name=name,
            site=target.site,
            layer=target.layer,
            expert=expert,
            is_parameter=is_parameter,
            a=update.a,
            b=update.b,
            rank=update.rank,
            scaling=update.scaling,
            is_embedding=self.sites[target.site].is_embedding,
        )

    def _fused(self, layer: int) -> Iterator[_Module]:
        """The parameters of the experts of one layer."""
        updates_of = {
            parameter: found
            for parameter in self.names.expert_parameters
            if (found := self._updates_of_parameter(layer, parameter))
        }
        experts = f"{self._layer(layer)}.{self.names.fused_experts}"
        for parameter, updates in updates_of.items():
            # PEFT wraps the second parameter's layer around the first one's.
            is_inner = len(updates_of) == 2 and parameter == self.names.expert_parameters[0]
            rank, a, b = self._fuse(parameter, updates)
            yield _Module(
                tensors=f"{experts}.base_layer" if is_inner else experts,
                name=f"{experts}.{parameter}",
                site=self.names.projections[parameter][0],
                layer=layer,
                expert=None,
                is_parameter=True,
                a=a,
                b=b,
                rank=rank,
                scaling=next(iter(updates.values())).scaling,
            )

    def _updates_of_parameter(self, layer: int, parameter: str) -> dict[Target, LowRankUpdate]:
        sites = [self.sites[site] for site in self.names.projections[parameter]]
        targets = [
            Target(layer, site.name, expert)
            for expert in range(sites[0].num_experts)
            for site in sites
        ]
        return {target: self.updates[target] for target in targets if target in self.updates}

    def _fuse(
        self, parameter: str, updates: Mapping[Target, LowRankUpdate]
    ) -> tuple[int, np.ndarray, np.ndarray]:
        """Rank, A ``[experts·rank, in]`` and B ``[out, rank·experts]`` of a parameter of all."""
        names = self.names.projections[parameter]
        experts, in_features = self.sites[names[0]].num_experts, self.sites[names[0]].in_features
        first = next(iter(updates))
        # Where the ranks of each A begin; projections of an expert with equal ones share them.
        starts: dict[tuple[int, bytes], int] = {}
        ranks = [0] * experts
        for target, update in updates.items():
            _check_uniform(parameter, target, update, first, updates[first])
            key = target.expert, update.a.tobytes()
            if key not in starts:
                starts[key] = ranks[target.expert]
                ranks[target.expert] += update.rank
        rank = max(ranks)
        a = np.zeros((experts, rank, in_features), updates[first].a.dtype)
        out_features = self.sites[names[0]].out_features
        b = np.zeros((len(names), out_features, rank, experts), updates[first].b.dtype)
        for target, update in updates.items():
            start = starts[target.expert, update.a.tobytes()]
            part = slice(start, start + update.rank)
            a[target.expert, part] = update.a
            b[names.index(target.site), :, part, target.expert] = update.b
        # Rows of two projections alternate, or follow each other.
        rows = b.swapaxes(0, 1) if self.names.interleaved else b
        return rank, a.reshape(experts * rank, -1), rows.reshape(-1, rank * experts)

    def _layer(self, layer: int) -> str:
        return f"{self.names.layers[0]}.{layer}"


def _check_uniform(
    parameter: str, target: Target, update: LowRankUpdate, first: Target, model: LowRankUpdate
) -> None:
    """One parameter has one scaling and one dtype."""
    for what, value, expected in (
        ("scaling", update.scaling, model.scaling),
        ("dtype", update.a.dtype, model.a.dtype),
        ("dtype", update.b.dtype, model.b.dtype),
    ):
        if value != expected:
            _fail(
                target,
                f"has {what} {value}, but {first.site} of expert {first.expert} has {expected}, "
                f"and {parameter} has one for all; write it with layout='per_expert'",
            )


class _Scalings(NamedTuple):
    """A way to write the scalings: alpha over rank, or over its root; and how well it fits."""

    use_rslora: bool
    alphas: list[int | float]
    num_exact: int
    num_integers: int


def _config(
    modules: Sequence[_Module], sites: Sequence[LoraSite], names: ModuleNames
) -> dict[str, Any]:
    """The content of ``adapter_config.json``."""
    ranks = [module.rank for module in modules]
    scalings = max(
        (_scalings(modules, use_rslora) for use_rslora in (False, True)),
        key=lambda s: (s.num_exact, s.num_integers),
    )
    rank = Counter(ranks).most_common(1)[0][0]
    alpha = Counter(scalings.alphas).most_common(1)[0][0]
    targets = _targets(modules, {site.name: site for site in sites}, names)
    return {
        "peft_type": "LORA",
        "peft_version": _PEFT_VERSION,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": scalings.use_rslora,
        "rank_pattern": _pattern(modules, ranks, rank),
        "alpha_pattern": _pattern(modules, scalings.alphas, alpha),
        # An empty list, because PEFT chooses modules of its own where there is none.
        "target_modules": [name for name, is_parameter in targets.items() if not is_parameter],
        "target_parameters": [name for name, is_parameter in targets.items() if is_parameter]
        or None,
        "bias": "none",
        "lora_dropout": 0.0,
    }


def _scalings(modules: Iterable[_Module], use_rslora: bool) -> _Scalings:
    divisors = [(m, sqrt(m.rank) if use_rslora else m.rank) for m in modules]
    alphas = [_alpha(module.scaling, divisor) for module, divisor in divisors]
    exact = sum(a / d == m.scaling for a, (m, d) in zip(alphas, divisors, strict=True))
    return _Scalings(use_rslora, alphas, exact, sum(isinstance(alpha, int) for alpha in alphas))


def _alpha(scaling: float, divisor: int | float) -> int | float:
    """The alpha that gives a scaling: an integer if one does, else the closest number."""
    product = float(scaling) * divisor
    neighbours = (np.nextafter(product, -np.inf), np.nextafter(product, np.inf))
    for alpha in (round(product), product, *map(float, neighbours)):
        if alpha / divisor == scaling:
            return alpha
    return product


def _pattern(
    modules: Sequence[_Module], values: Sequence[int | float], default: int | float
) -> dict[str, int | float]:
    """Regular expressions of the modules whose value is not the default one.

    No two of them match the same module, so that a tool which sorts them does no harm.
    """
    values_of: dict[str, set[int | float]] = defaultdict(set)
    for module, value in zip(modules, values, strict=True):
        parts = module.name.split(".")
        for start in range(len(parts)):
            values_of[".".join(parts[start:])].add(value)
    experts_of: dict[tuple[str, int | float], list[str]] = defaultdict(list)
    for module, value in zip(modules, values, strict=True):
        if value != default:
            uniform = len(values_of[module.short_name]) == 1
            name = module.short_name if uniform else module.name
            experts_of[name, value].append(str(module.expert))
    return {
        re.escape(name).replace(r"\{expert\}", f"({'|'.join(experts)})"): value
        for (name, value), experts in experts_of.items()
    }


def _targets(
    modules: Iterable[_Module], sites: Mapping[str, LoraSite], names: ModuleNames
) -> dict[str, bool]:
    """What the config calls the changed modules and parameters; whether each is a parameter.

    A short name stands for all layers. Where not all are changed, each layer is named, except for
    single experts: there are too many of them, and other tools take a missing one for zero.
    """
    layers: dict[str, set[int]] = defaultdict(set)
    modules = list(modules)
    for module in modules:
        layers[module.short_name].add(module.layer)
    targets = {}
    for module in modules:
        everywhere = layers[module.short_name] == set(sites[module.site].layers)
        if module.expert is not None or (everywhere and not module.is_parameter):
            name = module.short_name
        elif everywhere:
            name = module.name.removeprefix(f"{names.layers[0]}.{module.layer}.")
        else:
            name = module.name
        targets[name] = module.is_parameter
    return targets


def _fail(target: Target, reason: str) -> NoReturn:
    layer, site, expert = target
    raise AdapterError(f"layer {layer}, {site}, expert {expert}: {reason}")
