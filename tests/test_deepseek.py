"""DeepSeek-V2 and -V3 beyond what all families have in common (test_families.py)."""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from moelora_jax import CheckpointError, ModelConfig
from moelora_jax.adapters.reader import read_adapter
from moelora_jax.config import LatentConfig
from moelora_jax.models import (
    FAMILIES,
    ModelFamily,
    convert_checkpoint,
    load_model,
    model_arrays,
)
from moelora_jax.models.checkpoint import save_checkpoint
from moelora_kernels import ExpertGroups
from tests.adapter_files import assert_describes
from tests.test_convert import peft_deltas
from tests.test_families import raw_config, torch_model

#: What the hub's config.json of the large models say, but for what the reader does not ask for.
V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V3 = V2_LITE | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "rope_scaling": V2_LITE["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}


def family_and_config(raw: dict[str, Any]) -> tuple[ModelFamily, ModelConfig]:
    family = FAMILIES[raw["architectures"][0]]
    return family, family.read_config(raw)


@pytest.mark.parametrize(
    ("raw", "parameters"), [(V2_LITE, 15_706_484_224), (V3, 671_026_419_200)], ids=["V2-Lite", "V3"]
)
def test_the_published_models_have_the_published_number_of_parameters(
    raw: dict[str, Any], parameters: int
) -> None:
    family, config = family_and_config(raw)
    table = family.parameters(config).values()
    assert sum(math.prod(parameter.shape) for parameter in table) == parameters


def test_the_config_of_v3() -> None:
    _, config = family_and_config(V3)
    assert (config.head_dim, config.value_dim, config.num_kv_heads) == (192, 128, 128)
    assert config.latent == LatentConfig(1536, 512, rope_dim=64, value_dim=128)
    assert (config.dense_layers, config.shared_intermediate_size) == ((0, 1, 2), 2048)
    moe = config.moe
    assert (moe.scoring, moe.renormalize, moe.routed_scaling) == ("sigmoid", True, 2.5)
    assert (moe.groups, moe.correction_bias) == (ExpertGroups(8, 4, summed=2), True)
    yarn = config.rope.yarn
    assert yarn is not None
    # Rotated features keep their size; scores grow by (0.1·ln 40 + 1)², as in DeepSeek's own code.
    assert yarn.attention_factor == 1.0
    assert yarn.score_factor == pytest.approx(1.3688879454**2)


def test_sites_of_v3() -> None:
    _, config = family_and_config(V3)
    sites = {site.name: site for site in config.lora_sites() if not site.optional}
    widths = {name: (site.in_features, site.out_features) for name, site in sites.items()}
    assert widths == {
        "q_a_proj": (7168, 1536),
        "q_b_proj": (1536, 128 * 192),
        "kv_a_proj_with_mqa": (7168, 512 + 64),
        "kv_b_proj": (512, 128 * 256),
        "o_proj": (128 * 128, 7168),
        "mlp.gate_proj": (7168, 18432),
        "mlp.up_proj": (7168, 18432),
        "mlp.down_proj": (18432, 7168),
        "shared_experts.gate_proj": (7168, 2048),
        "shared_experts.up_proj": (7168, 2048),
        "shared_experts.down_proj": (2048, 7168),
        "gate_proj": (7168, 2048),
        "up_proj": (7168, 2048),
        "down_proj": (2048, 7168),
    }
    assert sites["mlp.up_proj"].layers == (0, 1, 2)
    assert sites["shared_experts.up_proj"].layers == sites["up_proj"].layers == tuple(range(3, 61))


# A checkpoint on disk -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek-V3 in shards, with a layer for one more token as the published one has."""
    raw = raw_config("DeepSeek-V3")
    family, config = family_and_config(raw)
    model = family.module(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    arrays = model_arrays(model)
    # Numbers that bfloat16 would round.
    bias = 5 + np.linspace(0, 0.01, arrays["experts.correction_bias"].size, dtype=np.float32)
    arrays["experts.correction_bias"] = bias.reshape(arrays["experts.correction_bias"].shape)
    folder = tmp_path_factory.mktemp("deepseek") / "model"
    save_checkpoint(folder, raw, family.parameters(config), arrays, max_shard_bytes=100_000)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    extra = {"model.layers.3.eh_proj.weight": np.zeros((48, 96), np.float32)}
    save_file(extra, folder / "more.safetensors")
    index["weight_map"].update(dict.fromkeys(extra, "more.safetensors"))
    index_path.write_text(json.dumps(index))
    return folder


def test_the_correction_bias_stays_float32(checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint, tmp_path / "converted", jnp.bfloat16)
    for folder in (checkpoint, tmp_path / "converted"):
        arrays = model_arrays(load_model(folder, jnp.bfloat16)[0])
        bias = arrays.pop("experts.correction_bias")
        assert bias.dtype == jnp.float32
        expected = 5 + np.linspace(0, 0.01, bias.size, dtype=np.float32)
        np.testing.assert_array_equal(np.ravel(bias), expected)
        assert {array.dtype for array in arrays.values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_a_layernorm.weight",
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.shared_experts.down_proj.weight",
        "model.layers.2.mlp.experts.7.down_proj.weight",
    ],
)
def test_every_tensor_is_needed_and_no_other(checkpoint: Path, tmp_path: Path, tensor: str) -> None:
    tensors = {
        name: array
        for path in checkpoint.glob("*.safetensors")
        for name, array in load_file(path).items()
    }
    values = tensors.pop(tensor)
    cases = {
        f"missing tensors: {tensor}": tensors,
        f"{tensor!r} has shape": tensors | {tensor: np.stack([values, values])},
        f"{tensor!r} has values that are NaN": tensors | {tensor: np.full_like(values, np.nan)},
        # As checkpoints in FP8 have it.
        f"{tensor}_scale_inv": tensors | {tensor: values, f"{tensor}_scale_inv": values},
    }
    for number, (message, changed) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text((checkpoint / "config.json").read_text())
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_model(folder, jnp.float32)


# Adapters -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not:RuntimeWarning")
def test_peft_takes_the_names_of_linear_layers_for_the_experts(tmp_path: Path) -> None:
    """With transformers 5 these targets mean experts alone, gate and up with twice the rank."""
    torch = pytest.importorskip("torch")
    import peft

    targets = ["q_b_proj", "gate_proj", "up_proj", "down_proj"]
    options = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets)
    adapted = peft.get_peft_model(torch_model("DeepSeek-V3"), options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1, generator=generator)
    adapted.save_pretrained(str(tmp_path))
    family, config = family_and_config(raw_config("DeepSeek-V3"))
    adapter = read_adapter(tmp_path, config.lora_sites(), module_names=family.module_names)
    sites = {target.site for target in adapter.updates}
    assert sites == {"q_b_proj", "gate_proj", "up_proj", "down_proj"}
    # Float32 rounds products of factors of 0.1 to 1e-9.
    assert_describes(adapter, peft_deltas("DeepSeek-V3", tmp_path), tolerance=1e-7)
