"""How a family of models names the modules that adapters change."""

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from moelora_jax.adapters.layouts import (
    LINEAR,
    PEFT_FUSED,
    PEFT_FUSED_0_18,
    PER_EXPERT,
    SHARED_OUTER_IN,
    SHARED_OUTER_OUT,
    STACKED,
    FactorLayout,
)

# What names of modules have beside those of the modules inside a layer.
_INDICES = re.compile(r"^(?:.*\.)?layers\.\d+\.|(?<=experts)\.\d+")

#: Modules that all families call alike.
_ATTENTION = {f"self_attn.{site}": site for site in ("q_proj", "k_proj", "v_proj", "o_proj")}
_OUTSIDE = {
    "model.embed_tokens": "embed_tokens",
    "model.language_model.embed_tokens": "embed_tokens",
    "language_model.model.embed_tokens": "embed_tokens",
    "lm_head": "lm_head",
    "language_model.lm_head": "lm_head",
    "model.unembed_tokens": "lm_head",  # Tinker.
}


class ModulePlace(NamedTuple):
    """Where in the model a module of an adapter file is.

    Attributes:
        layouts: how its factors may be laid out, as far as the name tells. None at all for an
            expert projection that the model lacks.
        layer: the model's layer index; 0 outside of the layers.
        module: the module's name, without the ``base_layer`` that PEFT appends.
        sites: names of the sites that its rows belong to, in their order. Empty for PEFT_FUSED,
            where the name does not tell.
        expert: the expert index of a PER_EXPERT module, else None.
        wrapped: whether PEFT has wrapped this PEFT_FUSED module in another.
    """

    layouts: tuple[FactorLayout, ...]
    layer: int
    module: str
    sites: tuple[str, ...] = ()
    expert: int | None = None
    wrapped: bool = False


@dataclass(frozen=True)
class ModuleNames:
    """What the adapter reader needs to know of a model family.

    Attributes:
        linear: path of a linear module inside a layer to the name of its site. The first path of a
            site is the one that is written.
        experts: paths inside a layer by which adapters may call the routed experts; the first one
            is written for single experts.
        projections: name of an expert projection to the names of the sites that it is made of, in
            the order in which their rows are stored. The first name of a site is the one that is
            written. A projection of no sites is one that the model lacks, though files for all
            experts may hold empty tensors for it.
        expert_parameters: the projections that are parameters of the whole experts module, in the
            order in which PEFT wraps them: the first one becomes the innermost. It leads into the
            experts, the second out of them.
        fused_experts: path inside a layer of the module whose parameters they are, as transformers
            5 calls it.
        fused_router: path inside a layer of the router, whose weight PEFT adapts as a parameter
            with transformers 5.
        outside: name of a module outside of the layers to the name of its site, likewise.
        layers: names by which adapters may call the list of layers.
        interleaved: whether the rows of a projection of two sites alternate; otherwise those of the
            second follow those of the first.
        in_features_first: whether the expert parameters are ``[experts, in, out]``, and no version
            of transformers had modules for single experts. All versions of PEFT save the factors of
            these alike; of others, 0.17 and 0.18 exchange A and B.
    """

    linear: Mapping[str, str]
    experts: tuple[str, ...]
    projections: Mapping[str, tuple[str, ...]]
    expert_parameters: tuple[str, str]
    fused_experts: str = "mlp.experts"
    fused_router: str = "mlp.gate"
    outside: Mapping[str, str] = field(default_factory=lambda: _OUTSIDE)
    layers: tuple[str, ...] = (
        "model.layers",
        "model.language_model.layers",
        "language_model.model.layers",
    )
    interleaved: bool = False
    in_features_first: bool = False

    def locate(self, module: str) -> ModulePlace | None:
        """Find a module of an adapter file in the model; None if the family has no such module.

        Args:
            module: its name in the file, without the ``base_model.model.`` of PEFT.
        """
        found = self._module.fullmatch(module)
        if found is None:
            return None
        if found["outside"]:
            return ModulePlace((LINEAR,), 0, module, (self.outside[found["outside"]],))
        layer, expert = int(found["layer"]), found["expert"]
        if found["linear"]:
            return ModulePlace((LINEAR,), layer, module, (self.linear[found["linear"]],))
        if found["projection"]:
            sites = self.projections[found["projection"]]
            if expert is None:
                return ModulePlace(self._stacked(sites), layer, module, sites)
            return ModulePlace((PER_EXPERT,), layer, module, sites, int(expert)) if sites else None
        if expert is not None:
            return None
        wrapped = found["wrapped"] or ""
        layouts = (PEFT_FUSED,) if self.in_features_first else (PEFT_FUSED, PEFT_FUSED_0_18)
        return ModulePlace(layouts, layer, module.removesuffix(wrapped), wrapped=bool(wrapped))

    def has(self, target: str, sites: Container[str]) -> bool:
        """Whether a model has modules of this name, as transformers calls them.

        Args:
            target: a name or its end, such as ``q_proj``, ``mlp.experts.3.up_proj`` or
                ``model.layers.0.self_attn.q_proj``.
            sites: names of the model's sites.
        """
        end = _INDICES.sub("", target)
        return any(f".{path}".endswith(f".{end}") for path in self._paths(sites))

    def _paths(self, sites: Container[str]) -> Iterator[str]:
        """Modules inside a layer and outside, without the indices of experts."""
        for path, site in {**self.linear, **self.outside}.items():
            if site in sites:
                yield path
        if not self.in_features_first:
            for projection in self.projection_of_site.values():
                yield f"{self.experts[0]}.{projection}"

    @cached_property
    def projection_of_site(self) -> dict[str, str]:
        """The name that is written for the projection of a single site."""
        names: dict[str, str] = {}
        for name, sites in self.projections.items():
            if len(sites) == 1:
                names.setdefault(sites[0], name)
        return names

    def _stacked(self, sites: tuple[str, ...]) -> tuple[FactorLayout, ...]:
        """The layouts of a projection whose name stands for all experts."""
        if not sites:
            return ()
        leads_out = sites == self.projections[self.expert_parameters[1]]
        return (STACKED, SHARED_OUTER_OUT if leads_out else SHARED_OUTER_IN)

    @cached_property
    def _module(self) -> re.Pattern[str]:
        # No leading zeros, so that an index has one spelling and a module has one name.
        index = r"0|[1-9][0-9]{0,8}"
        return re.compile(
            rf"(?P<outside>{_any_of(self.outside)})"
            rf"|(?:{_any_of(self.layers)})\.(?P<layer>{index})\."
            rf"(?:(?P<linear>{_any_of(self.linear)})"
            rf"|(?:{_any_of(self.experts)})(?:\.(?P<expert>{index}))?"
            rf"(?:\.(?P<projection>{_any_of(self.projections)})|(?P<wrapped>\.base_layer))?)"
        )


def _any_of(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names))


_GATED_MLP = ("gate_proj", "up_proj", "down_proj")
#: Of the layers without routed experts.
_DENSE_MLP = {f"mlp.{name}": f"mlp.{name}" for name in _GATED_MLP}

#: Qwen3-MoE, as transformers v4 (per expert), transformers v5 (fused parameters) and Megatron (w1,
#: w3, w2) name its modules.
QWEN3_MOE_NAMES = ModuleNames(
    linear=_ATTENTION | _DENSE_MLP | {"mlp.gate": "router"},
    experts=("mlp.experts",),
    projections={
        "gate_proj": ("gate_proj",),
        "up_proj": ("up_proj",),
        "gate_up_proj": ("gate_proj", "up_proj"),
        "down_proj": ("down_proj",),
        "w1": ("gate_proj",),
        "w3": ("up_proj",),
        "w2": ("down_proj",),
    },
    expert_parameters=("gate_up_proj", "down_proj"),
)

#: Mixtral: transformers v4 says ``block_sparse_moe`` and w1, w3, w2; v5 says ``mlp`` and fuses.
MIXTRAL_NAMES = ModuleNames(
    linear=_ATTENTION | {"block_sparse_moe.gate": "router", "mlp.gate": "router"},
    experts=("block_sparse_moe.experts", "mlp.experts"),
    projections={
        "w1": ("gate_proj",),
        "w3": ("up_proj",),
        "w2": ("down_proj",),
        "gate_proj": ("gate_proj",),
        "up_proj": ("up_proj",),
        "gate_up_proj": ("gate_proj", "up_proj"),
        "down_proj": ("down_proj",),
    },
    expert_parameters=("gate_up_proj", "down_proj"),
)

#: gpt-oss, whose expert parameters have gate and up in alternating rows.
GPT_OSS_NAMES = ModuleNames(
    linear={
        **_ATTENTION,
        **{f"attn.{site}": site for site in _ATTENTION.values()},  # Tinker.
        "mlp.router": "router",
    },
    experts=("mlp.experts",),
    projections={
        "gate_proj": ("gate_proj",),
        "up_proj": ("up_proj",),
        "gate_up_proj": ("gate_proj", "up_proj"),
        "down_proj": ("down_proj",),
    },
    expert_parameters=("gate_up_proj", "down_proj"),
    fused_router="mlp.router",
    interleaved=True,
    in_features_first=True,
)

#: DeepSeek-V2 and -V3, whose experts are named like those of Qwen3-MoE.
DEEPSEEK_NAMES = replace(
    QWEN3_MOE_NAMES,
    linear={
        **{
            f"self_attn.{site}": site
            for site in (
                "q_proj",
                "q_a_proj",
                "q_b_proj",
                "kv_a_proj_with_mqa",
                "kv_b_proj",
                "o_proj",
            )
        },
        **_DENSE_MLP,
        "mlp.gate": "router",
        **{f"mlp.shared_experts.{name}": f"shared_experts.{name}" for name in _GATED_MLP},
    },
)
