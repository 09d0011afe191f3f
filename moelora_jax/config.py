"""Frozen, hashable descriptions: the model, its MoE layers, LoRA limits, buckets and the cache.

Nothing here touches a device or a file. Everything that decides a shape is in one of these classes,
so a compiled program is determined by them alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal, NamedTuple

from moelora_jax.errors import CapacityError, MoeLoraError
from moelora_kernels.types import PAGE_ROWS, ExpertGroups

Scoring = Literal["softmax", "sigmoid"]
Activation = Literal["silu", "clamped_swiglu"]
QkNorm = Literal["head", "projection"]


@dataclass(frozen=True)
class MoeConfig:
    """One routed Mixture-of-Experts layer.

    Attributes:
        num_experts: routed experts per layer (E).
        top_k: experts per token (k).
        hidden_size: width of the residual stream (H).
        intermediate_size: width inside one expert (I).
        scoring: how router logits become probabilities.
        renormalize: whether the k chosen probabilities are divided by their sum.
        routed_scaling: factor on the weighted sum of the experts.
        activation: ``silu`` is silu(gate)·up; ``clamped_swiglu`` is the form of gpt-oss.
        router_bias: whether a bias is added to the router's logits.
        correction_bias: whether a bias is added to the scores for the choice of experts alone.
        groups: what limits the choice of experts; None lets each token choose among all.
        expert_bias: whether the gate, up and down projections of the experts have biases.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    scoring: Scoring = "softmax"
    renormalize: bool = True
    routed_scaling: float = 1.0
    activation: Activation = "silu"
    router_bias: bool = False
    correction_bias: bool = False
    groups: ExpertGroups | None = None
    expert_bias: bool = False

    def __post_init__(self) -> None:
        _check_counts(self, "num_experts", "top_k", "hidden_size", "intermediate_size")
        if self.top_k > self.num_experts:
            raise MoeLoraError(
                f"MoeConfig.top_k is {self.top_k}, more than num_experts {self.num_experts}"
            )
        if self.groups is not None:
            self.groups.check(self.num_experts, self.top_k)


@dataclass(frozen=True)
class LoraSite:
    """A linear map of the model that adapters may change, in every layer that has it.

    Attributes:
        name: the field's name of the projection, unique within a model: ``q_proj``, ``gate_proj``.
        in_features: width of A.
        out_features: height of B.
        layers: the model's layer indices that have this site. Page tables have one row for each. A
            site outside of the layers has the single index 0.
        num_experts: E for a projection of routed experts, 0 for a dense linear layer.
        optional: whether it has tables and pools only where :class:`LoraConfig` asks for them,
            because few adapters change it.
        is_embedding: whether its input is a token id, which picks a column of A.
        tied_to: name of the site whose weight matrix this one shares in the base model.
    """

    name: str
    in_features: int
    out_features: int
    layers: tuple[int, ...]
    num_experts: int = 0
    optional: bool = False
    is_embedding: bool = False
    tied_to: str | None = None

    @property
    def table_experts(self) -> int:
        """Experts dimension of the page table: a dense site is a site with one expert."""
        return max(self.num_experts, 1)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: rotary positions for contexts longer than those of the pretraining.

    Pairs of features that turn often within the original length keep their frequency, pairs that
    turn rarely are slowed down by ``factor``, and between them is a linear ramp.

    Attributes:
        factor: of the context's length.
        original_length: positions that the model was pretrained with.
        attention_factor: on the rotated queries and keys both.
        beta_fast: turns within the original length from which on a pair keeps its frequency.
        beta_slow: turns up to which a pair is slowed down fully.
        truncate: whether the ramp begins and ends at whole pairs.
        score_factor: on the scores of latent attention, most of whose features are not rotated and
            so not multiplied by ``attention_factor``.
    """

    factor: float
    original_length: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    score_factor: float = 1.0


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        yarn: how frequencies are scaled; None leaves them as they are.
        interleaved: whether the two features of a pair are neighbours, not half a head apart.
    """

    theta: float = 10000.0
    yarn: YarnScaling | None = None
    interleaved: bool = False


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (MLA), as in DeepSeek-V2: arXiv 2405.04434, section 2.1.

    A token's keys and values in all heads are projected up from one latent vector, and its queries
    may be, too. The last features of queries and keys are rotated; those of the key are the same in
    all heads.

    Attributes:
        query_rank: width of the queries' latent vector; None projects them directly.
        key_value_rank: width of the keys' and values' latent vector.
        rope_dim: rotated features of a query or key head; the others carry no position.
        value_dim: width of a value head.
    """

    query_rank: int | None
    key_value_rank: int
    rope_dim: int
    value_dim: int


class Projection(NamedTuple):
    """A linear map of attention, which every layer has."""

    name: str
    in_features: int
    out_features: int
    bias: bool


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer whose feed-forward layers are MoE layers or dense MLPs.

    Attributes:
        architecture: the entry of ``architectures`` in the checkpoint's config.json.
        vocab_size: rows of the embedding.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of a query or key head.
        moe: the routed layers, all alike.
        moe_layers: indices of the layers with routed experts; the others have a dense MLP.
        dense_intermediate_size: width inside a dense MLP.
        shared_intermediate_size: width of all shared experts of a routed layer together, through
            which every token goes; 0 if there are none.
        latent: what latent attention needs to know; None is grouped-query attention.
        rope: the rotary position embedding.
        norm_eps: added to the variance in RMSNorm.
        attention_bias: whether q, k, v and o projections have biases; in latent attention, those
            that lead into a latent vector or out of attention.
        attention_sinks: whether each query head has a learned score that takes part in the softmax
            and has no value.
        qk_norm: what of queries and keys is normalised: each ``head``, the whole ``projection``, or
            nothing.
        clip_qkv: queries, keys and values are clipped to ± this, after the norm; None does not.
        sliding_window: positions that a token of a sliding layer attends to, its own included.
        sliding_layers: indices of the layers with that window; the others attend to all positions.
        tie_embeddings: whether the output projection is the embedding.
        max_position: longest sequence that the checkpoint was made for.
        eos_tokens: token ids that end a generation.
    """

    architecture: str
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    moe: MoeConfig
    moe_layers: tuple[int, ...]
    dense_intermediate_size: int = 0
    shared_intermediate_size: int = 0
    latent: LatentConfig | None = None
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_sinks: bool = False
    qk_norm: QkNorm | None = None
    clip_qkv: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    tie_embeddings: bool = False
    max_position: int = 4096
    eos_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_counts(
            self,
            "vocab_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position",
        )
        if self.num_heads % self.num_kv_heads:
            raise MoeLoraError(
                f"ModelConfig.num_heads is {self.num_heads}, no multiple of num_kv_heads "
                f"{self.num_kv_heads}"
            )
        if self.rotated_features % 2:
            raise MoeLoraError(
                f"ModelConfig: positions rotate pairs of features, but a head has "
                f"{self.rotated_features} to rotate"
            )
        if self.sliding_layers and not (self.sliding_window and self.sliding_window > 0):
            raise MoeLoraError(
                f"ModelConfig.sliding_layers need a sliding_window of at least 1, not "
                f"{self.sliding_window}"
            )

    @property
    def hidden_size(self) -> int:
        return self.moe.hidden_size

    @property
    def dense_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_layers) if i not in self.moe_layers)

    @property
    def value_dim(self) -> int:
        """Width of a value head."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def rotated_features(self) -> int:
        """Features of a query or key that positions rotate."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    def attention_projections(self) -> tuple[Projection, ...]:
        """The linear maps of attention, in the order in which they are applied."""
        hidden, bias = self.hidden_size, self.attention_bias
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        values = self.num_heads * self.value_dim
        out = Projection("o_proj", values, hidden, bias)
        latent = self.latent
        if latent is None:
            return (
                Projection("q_proj", hidden, queries, bias),
                Projection("k_proj", hidden, keys, bias),
                Projection("v_proj", hidden, keys, bias),
                out,
            )
        if latent.query_rank is None:
            query: tuple[Projection, ...] = (Projection("q_proj", hidden, queries, False),)
        else:
            query = (
                Projection("q_a_proj", hidden, latent.query_rank, bias),
                Projection("q_b_proj", latent.query_rank, queries, False),
            )
        rank, up = latent.key_value_rank, self.head_dim - latent.rope_dim + latent.value_dim
        return (
            *query,
            Projection("kv_a_proj_with_mqa", hidden, rank + latent.rope_dim, bias),
            Projection("kv_b_proj", rank, self.num_heads * up, False),
            out,
        )

    def lora_sites(self) -> tuple[LoraSite, ...]:
        """Every projection that an adapter may change: attention, experts, and optional ones."""
        hidden, everywhere = self.hidden_size, tuple(range(self.num_layers))
        tied = "embed_tokens" if self.tie_embeddings else None

        def gated_mlp(
            prefix: str, inner: int, layers: tuple[int, ...], num_experts: int = 0
        ) -> tuple[LoraSite, ...]:
            if not (inner and layers):
                return ()
            return (
                LoraSite(f"{prefix}gate_proj", hidden, inner, layers, num_experts),
                LoraSite(f"{prefix}up_proj", hidden, inner, layers, num_experts),
                LoraSite(f"{prefix}down_proj", inner, hidden, layers, num_experts),
            )

        return (
            *(
                LoraSite(p.name, p.in_features, p.out_features, everywhere)
                for p in self.attention_projections()
            ),
            *gated_mlp("mlp.", self.dense_intermediate_size, self.dense_layers),
            *gated_mlp("shared_experts.", self.shared_intermediate_size, self.moe_layers),
            *gated_mlp("", self.moe.intermediate_size, self.moe_layers, self.moe.num_experts),
            LoraSite("router", hidden, self.moe.num_experts, self.moe_layers, optional=True),
            LoraSite(
                "embed_tokens", self.vocab_size, hidden, (0,), optional=True, is_embedding=True
            ),
            LoraSite("lm_head", hidden, self.vocab_size, (0,), optional=True, tied_to=tied),
        )


@dataclass(frozen=True)
class LoraConfig:
    """Limits of what adapters may be resident on the device at once.

    Attributes:
        max_adapters: slots in the page tables.
        max_rank: largest rank of any factor, rounded up to whole pages in the tables. A larger
            limit costs table entries and rank-activation columns, not time or page memory.
        pool_rank: the page pools are sized for ``max_adapters`` adapters that have this rank at
            every site and expert. Adapters of other ranks share the same pages.
        sites: names of the sites that get tables and pools; None means all that the model has, but
            for optional ones.
        optional_sites: names of optional sites that get them, too: ``router``, ``embed_tokens``,
            ``lm_head``. Each costs launches in every step with LoRA. Pages of the last two are as
            wide as the vocabulary, so they take megabytes.
        max_host_bytes: host memory that all loaded adapters may take together, those that are not
            on the device included; None for no limit.
    """

    max_adapters: int = 8
    max_rank: int = 64
    pool_rank: int = 16
    sites: tuple[str, ...] | None = None
    optional_sites: tuple[str, ...] = ()
    max_host_bytes: int | None = None

    def __post_init__(self) -> None:
        _check_counts(self, "max_adapters", "max_rank", "pool_rank")
        if self.max_host_bytes is not None:
            _check_counts(self, "max_host_bytes")
        for name in ("sites", "optional_sites"):
            value = getattr(self, name)
            if not isinstance(value, tuple) and not (name == "sites" and value is None):
                raise MoeLoraError(f"LoraConfig.{name} must be a tuple of names, not {value!r}")

    @property
    def max_pages(self) -> int:
        """Pages that one factor of the largest rank takes."""
        return pages_of_rank(self.max_rank)

    @property
    def rank_columns(self) -> int:
        """Columns of the rank activations: ``max_rank`` in whole pages."""
        return self.max_pages * PAGE_ROWS

    def select(self, sites: tuple[LoraSite, ...]) -> tuple[LoraSite, ...]:
        """The model's sites that are enabled here."""
        known = {site.name for site in sites}
        for field_name in ("sites", "optional_sites"):
            for name in getattr(self, field_name) or ():
                if name not in known:
                    raise MoeLoraError(
                        f"LoraConfig.{field_name}: no site {name!r}; the model has {sorted(known)}"
                    )
        if self.sites is None:
            enabled = {site.name for site in sites if not site.optional}
        else:
            enabled = set(self.sites)
        enabled |= set(self.optional_sites)
        experts = {site.name for site in sites if site.num_experts}
        if 0 < len(experts & enabled) < len(experts):
            raise MoeLoraError(f"LoraConfig.sites: enable all or none of {sorted(experts)}")
        return tuple(site for site in sites if site.name in enabled)


@dataclass(frozen=True, order=True)
class Bucket:
    """A static batch shape: up to ``tokens`` tokens of up to ``sequences`` sequences."""

    tokens: int
    sequences: int


@dataclass(frozen=True)
class BucketConfig:
    """The batch shapes that programs are compiled for.

    Attributes:
        decode: batch sizes of the decode programs, one token for each sequence.
        prefill: token counts of the prefill programs, shared by up to ``max(decode)`` sequences.
    """

    decode: tuple[int, ...] = (1, 4, 16)
    prefill: tuple[int, ...] = (32, 128, 512)

    def __post_init__(self) -> None:
        for name in ("decode", "prefill"):
            sizes = getattr(self, name)
            if (
                not isinstance(sizes, tuple)
                or not all(map(_is_count, sizes))
                or list(sizes) != sorted({*sizes})
                or not sizes
            ):
                raise MoeLoraError(
                    f"BucketConfig.{name} must be a tuple of ascending positive sizes, not "
                    f"{sizes!r}"
                )

    @property
    def max_sequences(self) -> int:
        return self.decode[-1]

    @property
    def max_tokens(self) -> int:
        return max(self.decode[-1], self.prefill[-1])

    def decode_buckets(self) -> Iterator[Bucket]:
        return (Bucket(size, size) for size in self.decode)

    def prefill_buckets(self) -> Iterator[Bucket]:
        return (Bucket(size, min(size, self.max_sequences)) for size in self.prefill)


@dataclass(frozen=True)
class CacheConfig:
    """The paged KV cache: blocks of ``block_size`` positions, named by block tables.

    Attributes:
        max_length: longest sequence, prompt and generated tokens together.
        num_blocks: blocks in the cache, or None for room for ``max_sequences`` full sequences.
            Block 0 is never given out: padding tokens write there.
        block_size: positions per block.
    """

    max_length: int = 1024
    num_blocks: int | None = None
    block_size: int = 16

    def __post_init__(self) -> None:
        _check_counts(self, "max_length", "block_size")
        if self.num_blocks is not None:
            _check_counts(self, "num_blocks")

    @property
    def blocks_per_sequence(self) -> int:
        return -(-self.max_length // self.block_size)

    def total_blocks(self, max_sequences: int) -> int:
        needed = self.blocks_per_sequence * max_sequences + 1
        if self.num_blocks is None:
            return needed
        if self.num_blocks < self.blocks_per_sequence + 1:
            raise CapacityError(
                f"CacheConfig.num_blocks {self.num_blocks} cannot hold one sequence of max_length "
                f"{self.max_length}; at least {self.blocks_per_sequence + 1} blocks are needed"
            )
        return self.num_blocks


@dataclass(frozen=True)
class RuntimeConfig:
    """Everything besides the model that decides the shapes of the compiled programs."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    buckets: BucketConfig = field(default_factory=BucketConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        for name, kind in (("lora", LoraConfig), ("buckets", BucketConfig), ("cache", CacheConfig)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise MoeLoraError(f"RuntimeConfig.{name} must be a {kind.__name__}, not {value!r}")


def pages_of_rank(rank: int) -> int:
    """Pages that one factor of ``rank`` takes."""
    return -(-rank // PAGE_ROWS)


def _is_count(value: object) -> bool:
    """Whether it is a whole number of at least 1; NumPy's are, True is not."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _check_counts(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not _is_count(value):
            raise MoeLoraError(
                f"{type(config).__name__}.{name} must be a whole number of at least 1, not "
                f"{value!r}"
            )
