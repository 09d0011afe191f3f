"""Every model family against transformers: logits, adapters, generation, and its config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moelora_jax import (
    LLM,
    BucketConfig,
    CacheConfig,
    CheckpointError,
    LoraConfig,
    ModelConfig,
    Prompt,
    RuntimeConfig,
)
from moelora_jax.config import RopeConfig
from moelora_jax.models import FAMILIES, read_model_config
from moelora_jax.parity import compare, trace_torch
from tests.adapter_files import (
    EXPERTS,
    Deltas,
    Tensors,
    adapter_options,
    linear_module,
    linear_tensors,
    per_expert_tensors,
    stacked_tensors,
    write_adapter,
)

# As in test_parity.py.
TOLERANCE = 2e-5
# Of what MoE layers compute, relative to the largest number of a layer: sums of at most 64 products
# are off by some of float32's 6e-8, and each layer adds to the errors of those before it.
RELATIVE_TOLERANCE = 1e-5

RUNTIME = RuntimeConfig(
    lora=LoraConfig(max_adapters=4, max_rank=32, pool_rank=24),
    buckets=BucketConfig(decode=(8,), prefill=(128,)),
    cache=CacheConfig(max_length=32, block_size=8),
)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "num_local_experts": 6,
}
#: Of a head of 16, some pairs are slowed down, some are not, and some are between.
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "truncate": False,
}
#: Every width differs, so that no transposition goes unseen. The norms of latent vectors do not
#: take their epsilon from the config.
DEEPSEEK = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 36,
    "moe_intermediate_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 256,
}
DEEPSEEK_YARN = YARN | {"truncate": True, "mscale": 1.0, "mscale_all_dim": 0.7}


@dataclass(frozen=True)
class Family:
    """A family under test.

    Attributes:
        architecture: in config.json.
        config_class: of transformers.
        options: of a tiny model, with every feature that the family has.
        version_4: the same as transformers 4 wrote it, where it differs; None removes a key.
        expert_names: how per-expert adapters call ``mlp.experts`` and the projections.
        interleaved: whether expert parameters are ``[experts, in, out]`` and gate and up alternate.
        scales: factor on the random weights whose name has this part.
        refused: changes of the config, and what is said about them.
    """

    architecture: str
    config_class: str
    options: dict[str, Any]
    version_4: dict[str, Any]
    refused: dict[str, dict[str, Any]]
    expert_names: dict[str, str] = field(default_factory=dict)
    interleaved: bool = False
    scales: dict[str, float] = field(default_factory=dict)


TESTED = {
    "Qwen3-MoE": Family(
        architecture="Qwen3MoeForCausalLM",
        config_class="Qwen3MoeConfig",
        options=SIZES
        | {
            "head_dim": 16,
            "intermediate_size": 28,
            "moe_intermediate_size": 20,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
        version_4={
            "num_local_experts": None,
            "num_experts": 6,
            "rope_parameters": None,
            "rope_theta": 5000.0,
        },
        refused={
            "num_experts missing": {"num_experts": None, "num_local_experts": None},
            "use_sliding_window True": {"use_sliding_window": True},
            "quantization_config": {"quantization_config": {"quant_method": "fp8"}},
        },
    ),
    "OLMoE": Family(
        architecture="OlmoeForCausalLM",
        config_class="OlmoeConfig",
        options=SIZES
        | {
            "clip_qkv": 0.9,
            "norm_topk_prob": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
        version_4={
            "num_local_experts": None,
            "num_experts": 6,
            "rope_parameters": None,
            "rope_theta": 5000.0,
        },
        refused={
            "num_experts missing": {"num_experts": None, "num_local_experts": None},
            "hidden_act 'gelu'": {"hidden_act": "gelu"},
            "rope_type 'linear'": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "quantization_config": {"quantization_config": {"quant_method": "fp8"}},
        },
    ),
    "Mixtral": Family(
        architecture="MixtralForCausalLM",
        config_class="MixtralConfig",
        options=SIZES
        | {
            "head_dim": 16,
            "sliding_window": 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
        version_4={"rope_parameters": None, "rope_theta": 5000.0},
        refused={
            "num_local_experts missing": {"num_local_experts": None},
            "hidden_act 'gelu'": {"hidden_act": "gelu"},
            "rope_type 'dynamic'": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "quantization_config": {"quantization_config": {"quant_method": "awq"}},
        },
        expert_names={
            "mlp.experts": "block_sparse_moe.experts",
            "gate_proj": "w1",
            "up_proj": "w3",
            "down_proj": "w2",
        },
    ),
    "gpt-oss": Family(
        architecture="GptOssForCausalLM",
        config_class="GptOssConfig",
        options=SIZES
        | {
            "head_dim": 16,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "max_position_embeddings": 256,
            "rope_parameters": YARN | {"rope_theta": 5000.0},
        },
        version_4={"rope_parameters": None, "rope_theta": 5000.0, "rope_scaling": YARN},
        refused={
            "layer_types missing": {"layer_types": None},
            "layer_types must be": {"layer_types": ["full_attention", "chunked_attention"] * 2},
            "rope_parameters missing": {"rope_parameters": None},
            "swiglu_limit 10.0": {"swiglu_limit": 10.0},
            "beta_medium of rope_type": {"rope_parameters": YARN | {"beta_medium": 4.0}},
            "quant_method 'gptq'": {"quantization_config": {"quant_method": "gptq"}},
        },
        interleaved=True,
        # Some gates must exceed the limit of 7, and sinks must matter beside scores.
        scales={"gate_up_proj": 4.0, "down_proj": 0.25, "sinks": 10.0},
    ),
    "DeepSeek-V2-Lite": Family(
        architecture="DeepseekV2ForCausalLM",
        config_class="DeepseekV2Config",
        options=DEEPSEEK
        | {
            "num_hidden_layers": 2,
            "q_lora_rank": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
        version_4={
            "rope_parameters": None,
            "rope_theta": 5000.0,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "n_group": 1,
            "topk_group": 1,
            "moe_layer_freq": 1,
            "norm_topk_prob": False,
        },
        refused={
            "kv_lora_rank missing": {"kv_lora_rank": None},
            "hidden_act 'gelu'": {"hidden_act": "gelu"},
            "topk_method 'noaux_tc'": {"topk_method": "noaux_tc"},
            "norm_topk_prob True": {"norm_topk_prob": True},
            "moe_layer_freq 2": {"moe_layer_freq": 2},
            "num_key_value_heads 2": {"num_key_value_heads": 2},
            "quantization_config": {"quantization_config": {"quant_method": "fp8"}},
            "top_k is 9": {"num_experts_per_tok": 9},
        },
    ),
    "DeepSeek-V2": Family(
        architecture="DeepseekV2ForCausalLM",
        config_class="DeepseekV2Config",
        options=DEEPSEEK
        | {
            "num_hidden_layers": 2,
            "attention_bias": True,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
        version_4={"rope_parameters": None, "rope_theta": 5000.0},
        refused={
            "topk_group missing": {"topk_group": None},
            "8 experts cannot be divided into 3": {"n_group": 3},
            "5 groups cannot be chosen of 4": {"topk_group": 5},
        },
    ),
    "DeepSeek-V3": Family(
        architecture="DeepseekV3ForCausalLM",
        config_class="DeepseekV3Config",
        options=DEEPSEEK
        | {
            "num_hidden_layers": 3,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": DEEPSEEK_YARN | {"rope_theta": 5000.0},
        },
        version_4={
            "rope_parameters": None,
            "rope_theta": 5000.0,
            "rope_scaling": {"type": "yarn"} | DEEPSEEK_YARN | {"rope_type": None},
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 1,
        },
        refused={
            "n_group missing": {"n_group": None},
            "scoring_func 'softmax'": {"scoring_func": "softmax"},
            "topk_method 'greedy'": {"topk_method": "greedy"},
            "quantization_config": {"quantization_config": {"quant_method": "fp8"}},
        },
        # The bias must change choices, and scores lie within 0 and 1.
        scales={"e_score_correction_bias": 2.0},
    ),
}


@pytest.fixture(scope="module", params=TESTED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def torch_model(name: str, family: Family | None = None) -> Any:
    """A model of PyTorch with random weights, the same at every call."""
    torch = pytest.importorskip("torch")
    import transformers

    family = family or TESTED[name]
    config = getattr(transformers, family.config_class)(**family.options)
    model = getattr(transformers, family.architecture)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor, parameter in model.state_dict().items():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.15
            for part, factor in family.scales.items():
                scale *= factor if part in tensor else 1.0
            is_norm = "norm" in tensor
            parameter.copy_(1 + 0.1 * noise if is_norm else scale * noise)
    return model


def raw_config(name: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A config.json without its nulls."""
    family = TESTED[name]
    raw = {"architectures": [family.architecture]} | family.options | dict(changes or {})
    return {key: value for key, value in raw.items() if value is not None}


def merged(model: Any, deltas: Deltas, *, interleaved: bool) -> Any:
    """Add an adapter's changes to a PyTorch model's own weights."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        for (layer, site, expert), delta in deltas.items():
            block = model.model.layers[layer]
            change = torch.from_numpy(delta.astype(np.float32))
            if site not in EXPERTS:
                block.get_submodule(linear_module(site)).weight += change
                continue
            parameter = "down_proj" if site == "down_proj" else "gate_up_proj"
            weight = getattr(block.mlp.experts, parameter)[expert]
            if interleaved:
                weight = weight.T  # A view [out, in].
            if site == "down_proj":
                weight += change
            elif interleaved:
                weight[0 if site == "gate_proj" else 1 :: 2] += change
            else:
                weight.chunk(2)[0 if site == "gate_proj" else 1].add_(change)
    return model


def renamed(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    """Tensors of routed experts under the names of a family."""

    def rename(tensor: str) -> str:
        if ".experts." in tensor:
            for name, other in names.items():
                tensor = tensor.replace(f".{name}.", f".{other}.")
        return tensor

    return {rename(tensor): values for tensor, values in tensors.items()}


def linear_sites(config: ModelConfig) -> list[str]:
    """The linear layers that adapters may change, but for optional ones."""
    sites = config.lora_sites()
    return [site.name for site in sites if not (site.num_experts or site.optional)]


def write_by_hand(folder: Path, config: ModelConfig, family: Family) -> dict[str, Deltas]:
    """Adapters of layouts that PEFT does not write."""
    rng = np.random.default_rng(0)
    experts, deltas_of_experts = per_expert_tensors(config, rng, rank=3, scaling=2.0)
    linear, deltas_of_linear = linear_tensors(
        config, rng, sites=linear_sites(config), rank=3, scaling=2.0
    )
    few, deltas_of_few = per_expert_tensors(config, rng, rank=24, scaling=0.5, experts=(0, 3, 4))
    names = family.expert_names
    write_adapter(
        folder / "everything",
        renamed(experts, names) | linear,
        adapter_options(r=3, lora_alpha=6),
    )
    write_adapter(
        folder / "some experts", renamed(few, names), adapter_options(r=24, lora_alpha=12)
    )
    shared, deltas_of_shared = stacked_tensors(config, rng, rank=7, scaling=1.0, shared_outer=True)
    write_adapter(folder / "shared outer", shared, adapter_options(r=7, lora_alpha=7))
    return {
        "everything": deltas_of_experts | deltas_of_linear,
        "some experts": deltas_of_few,
        "shared outer": deltas_of_shared,
    }


def save_by_peft(model: Any, config: ModelConfig, folder: Path) -> None:
    """An adapter on attention and on the experts' parameters, with random factors.

    Linear layers that are called like projections of experts are parameters, too: PEFT takes the
    module's name for that of the experts.
    """
    torch = pytest.importorskip("torch")
    import peft

    modules = [linear_module(site) for site in linear_sites(config)]
    options = peft.LoraConfig(
        r=5,
        lora_alpha=10,
        target_modules=[module for module in modules if "self_attn" in module],
        target_parameters=[
            *(f"{module}.weight" for module in modules if "self_attn" not in module),
            "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj",
        ],
    )
    adapted = peft.get_peft_model(model, options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1, generator=generator)
    adapted.save_pretrained(str(folder))


class Loaded(NamedTuple):
    """A model with four adapters, and what makes the same of each in PyTorch."""

    folder: Path
    llm: LLM
    torch_models: dict[str | None, Any]


@pytest.fixture(scope="module")
def loaded(name: str, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    pytest.importorskip("torch")
    from peft import PeftModel

    folder, family = tmp_path_factory.mktemp("family"), TESTED[name]
    base = torch_model(name)
    base.save_pretrained(folder / "base")
    llm = LLM.load(folder / "base", runtime=RUNTIME, dtype=jnp.float32)

    by_hand = write_by_hand(folder, llm.config, family)
    save_by_peft(torch_model(name), llm.config, folder / "by peft")
    peft_model = PeftModel.from_pretrained(torch_model(name), folder / "by peft")
    torch_models = {None: base, "by peft": peft_model.eval()}
    for adapter, deltas in by_hand.items():
        torch_models[adapter] = merged(torch_model(name), deltas, interleaved=family.interleaved)
    for adapter in torch_models:
        if adapter is not None:
            llm.load_adapter(adapter, folder / adapter)
    return Loaded(folder / "base", llm, torch_models)


def test_a_mixed_batch_equals_transformers_layer_by_layer(loaded: Loaded) -> None:
    rng = np.random.default_rng(2)
    names = [None, *loaded.torch_models, None]
    prompts = [
        Prompt(rng.integers(0, 97, length).tolist(), name)
        for name, length in zip(names, (30, 1, 28, 9, 20, 25, 12), strict=True)
    ]
    scored, traces = loaded.llm.score(prompts), loaded.llm.trace(prompts)
    references = [
        trace_torch(loaded.torch_models[prompt.adapter], prompt.tokens, prompt.adapter)
        for prompt in prompts
    ]
    for prompt, logits, trace, reference in zip(prompts, scored, traces, references, strict=True):
        expected = reference.logits
        assert 1 < np.abs(expected).max() < 10
        if prompt.adapter is not None:
            # The adapter matters by far more than the tolerance, or the comparison says nothing.
            base = trace_torch(loaded.torch_models[None], prompt.tokens)
            assert np.abs(expected - base.logits).max() > 1000 * TOLERANCE
            assert np.abs(reference.moe_output - base.moe_output).max() > 1000 * TOLERANCE
        for actual in (logits, trace.logits):
            np.testing.assert_allclose(
                actual, expected, rtol=0, atol=TOLERANCE, err_msg=str(prompt.adapter)
            )
    found = compare(traces, references)
    assert [errors.layer for errors in found.layers] == list(loaded.llm.config.moe_layers)
    for errors in found.layers:
        assert errors.equal_choices == 1
        for name in ("moe_input", "router_logits", "weights", "moe_output"):
            assert getattr(errors, name) < RELATIVE_TOLERANCE, (errors.layer, name)
    assert found.total.hidden < RELATIVE_TOLERANCE


def test_generated_tokens_equal_transformers(loaded: Loaded) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    prompts = [
        Prompt(rng.integers(0, 97, length).tolist(), name)
        for name, length in zip(loaded.torch_models, (7, 1, 22, 13, 9), strict=True)
    ]
    completions = loaded.llm.generate(prompts, max_new_tokens=8, stop_tokens=())
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = [*prompt.tokens, *completion.tokens]
        with torch.no_grad():
            logits = loaded.torch_models[prompt.adapter](torch.tensor([tokens])).logits[0]
        logits = logits[len(prompt.tokens) - 1 : -1]
        best = torch.topk(logits, 2).values
        assert (best[:, 0] - best[:, 1] > TOLERANCE).all(), "a tie: choose another seed"
        assert list(completion.tokens) == logits.argmax(-1).tolist()


def test_bfloat16_log_probabilities_are_near_those_in_float32(loaded: Loaded) -> None:
    torch = pytest.importorskip("torch")
    llm = LLM.load(loaded.folder, runtime=RUNTIME, dtype=jnp.bfloat16)
    rng = np.random.default_rng(4)
    prompts = [Prompt(rng.integers(0, 97, 30).tolist()) for _ in range(4)]
    differences = []
    for prompt, logits in zip(prompts, llm.score(prompts), strict=True):
        with torch.no_grad():
            expected = loaded.torch_models[None](torch.tensor([prompt.tokens])).logits[0]
        ours, theirs = (
            torch.log_softmax(values, -1)[range(29), prompt.tokens[1:]]
            for values in (torch.from_numpy(logits[:-1]), expected[:-1])
        )
        differences.append((ours - theirs).numpy())
    # Bfloat16 has 8 bits, so probabilities are off by some percent. The median, because in a random
    # model rounding makes a few tokens choose another expert; PyTorch's own bfloat16 does the same.
    assert np.median(np.abs(differences)) <= 0.03


def test_configs_of_transformers_4_and_5_are_read_alike(name: str) -> None:
    family = TESTED[name]
    read = FAMILIES[family.architecture].read_config
    config = read(raw_config(name))
    assert read(raw_config(name, family.version_4)) == config
    assert config.rope.theta == 5000.0


@pytest.mark.parametrize(
    ("name", "message"),
    [(name, message) for name, family in TESTED.items() for message in family.refused],
)
def test_unsupported_configs_are_refused_by_key(name: str, message: str, tmp_path: Path) -> None:
    raw = raw_config(name, TESTED[name].refused[message])
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=f"{tmp_path}: config.json: .*{message}"):
        read_model_config(tmp_path)


def test_every_parameter_of_the_module_is_in_the_table(name: str) -> None:
    family = FAMILIES[TESTED[name].architecture]
    config = family.read_config(raw_config(name))
    skeleton = nnx.eval_shape(lambda: family.module(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    shapes = {
        ".".join(map(str, path)): leaf.shape
        for path, leaf in nnx.to_flat_state(nnx.state(skeleton))
    }
    table = family.parameters(config)
    assert shapes == {path: parameter.shape for path, parameter in table.items()}


def test_what_transformers_assumes_where_the_config_is_silent() -> None:
    olmoe = raw_config("OLMoE", {"clip_qkv": None, "rope_parameters": None})
    config = FAMILIES["OlmoeForCausalLM"].read_config(olmoe)
    assert (config.clip_qkv, config.rope) == (None, RopeConfig(10000.0))
    mixtral = raw_config("Mixtral", {"sliding_window": None, "rope_parameters": None})
    config = FAMILIES["MixtralForCausalLM"].read_config(mixtral)
    assert (config.sliding_layers, config.rope) == ((), RopeConfig(1e6))
