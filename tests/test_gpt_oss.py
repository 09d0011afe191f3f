"""How gpt-oss stores its experts: transposed, gate and up alternating, and in MXFP4."""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moelora_jax import CheckpointError
from moelora_jax.models import load_model, model_arrays, mxfp4
from moelora_jax.models.checkpoint import load_parameters, save_checkpoint
from moelora_jax.models.parameters import Parameter
from moelora_jax.parity import load_torch_model, trace_torch

#: A piece ``[experts, 2, intermediate, hidden]`` for each of two layers.
GATE_UP = Parameter(
    (2, 3, 2, 5, 4),
    {"layers.0.gate_up": (0,), "layers.1.gate_up": (1,)},
    axes=((0,), (3,), (2, 1)),
    mxfp4_axes=((0,), (2, 1), (3,)),
)


def test_axes_are_reordered_and_taken_apart(tmp_path: Path) -> None:
    assert GATE_UP.tensor_shape == (3, 4, 10)
    array = np.random.default_rng(0).normal(size=GATE_UP.shape).astype(np.float32)
    save_checkpoint(tmp_path / "model", {}, {"gate_up": GATE_UP}, {"gate_up": array})
    tensor = load_file(tmp_path / "model" / "model.safetensors")["layers.1.gate_up"]
    np.testing.assert_array_equal(tensor[:, :, 0::2], array[1, :, 0].swapaxes(1, 2))
    np.testing.assert_array_equal(tensor[:, :, 1::2], array[1, :, 1].swapaxes(1, 2))
    loaded = load_parameters(tmp_path / "model", {"gate_up": GATE_UP}, jnp.float32)
    np.testing.assert_array_equal(loaded["gate_up"], array)


@pytest.mark.parametrize("axes", [((0,), (1,)), ((0,), (0, 1)), ((0,), (1, 2), (3,))])
def test_axes_that_are_not_those_of_a_piece_are_refused(axes: Any) -> None:
    with pytest.raises(ValueError, match="not the axes of pieces"):
        Parameter((2, 4, 6, 8), {"a": (0,), "b": (1,)}, axes=axes)
    with pytest.raises(ValueError, match="not the axes of pieces"):
        Parameter((2, 4, 6, 8), {"a": (0,), "b": (1,)}, mxfp4_axes=axes)


def test_mxfp4_numbers() -> None:
    codes = np.arange(32, dtype=np.uint8) % 16
    blocks = (codes[0::2] | codes[1::2] << 4).reshape(1, 1, 1, 16)
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    expected = np.tile(np.array([*magnitudes, *(-m for m in magnitudes)]), 2)
    for exponent in (-127, -3, 0, 100):
        scales = np.full((1, 1, 1), 127 + exponent, np.uint8)
        for dtype in (np.dtype(np.float32), np.dtype(jnp.bfloat16)):
            tensor = mxfp4.dequantize(blocks, scales, dtype)
            assert (tensor.shape, tensor.dtype) == ((1, 1, 32), dtype)
            wide = tensor[0, 0].astype(np.float64)
            np.testing.assert_array_equal(wide, expected * math.ldexp(1.0, exponent))


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """Two checkpoints of the same model: ``plain``, and ``quantized`` as on the hub."""
    torch = pytest.importorskip("torch")
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = GptOssConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    model = GptOssForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    packed: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            for name, rows, width in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
                shape = (3, rows, width // 32)
                blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
                scales = torch.randint(120, 126, shape, generator=generator, dtype=torch.uint8)
                weight = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
                getattr(block.mlp.experts, name).copy_(weight)
                path = f"model.layers.{layer}.mlp.experts.{name}"
                packed[f"{path}_blocks"], packed[f"{path}_scales"] = blocks.numpy(), scales.numpy()
    model.save_pretrained(tmp_path / "plain")

    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    plain = {name.removesuffix("_blocks") for name in packed}
    kept = {name: tensor for name, tensor in tensors.items() if name not in plain}
    assert len(kept) == len(tensors) - 4
    (tmp_path / "quantized").mkdir()
    save_file(kept | packed, tmp_path / "quantized" / "model.safetensors")
    raw = json.loads((tmp_path / "plain" / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(raw))
    return tmp_path


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_mxfp4_checkpoints_load_like_plain_ones(quantized: Path, dtype: Any) -> None:
    expected, actual = (
        model_arrays(load_model(quantized / name, dtype)[0]) for name in ("plain", "quantized")
    )
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array, err_msg=path)


def test_pytorch_reads_mxfp4_for_the_comparison(quantized: Path) -> None:
    plain, read = (
        trace_torch(load_torch_model(quantized / name), [1, 2, 3])
        for name in ("plain", "quantized")
    )
    np.testing.assert_array_equal(plain.moe_output, read.moe_output)
    np.testing.assert_array_equal(plain.logits, read.logits)


def rewrite(folder: Path, changes: dict[str, np.ndarray | None]) -> None:
    """Replace tensors, or remove those that become None."""
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


def test_damaged_mxfp4_checkpoints_are_refused(quantized: Path) -> None:
    folder, path = quantized / "quantized", "model.layers.1.mlp.experts.down_proj"
    tensors = load_file(folder / "model.safetensors")
    blocks, scales = tensors[f"{path}_blocks"], tensors[f"{path}_scales"]
    for changes, message in (
        ({f"{path}_scales": None}, "missing tensors: .*down_proj_scales"),
        ({f"{path}_blocks": None}, "missing tensors: .*down_proj"),
        ({f"{path}_scales": scales[:2]}, r"shape \(2, 64, 1\), expected \(3, 64, 1\)"),
        ({f"{path}_scales": scales.astype(np.float32)}, "dtype F32; supported are U8"),
        ({f"{path}_blocks": blocks[..., :8]}, r"expected \(3, 64, 1, 16\)"),
        ({f"{path}_scales": np.full_like(scales, 255)}, "down_proj_blocks.* NaN or infinite"),
        ({path: np.zeros((3, 32, 64), np.float32)}, "unexpected tensors"),
    ):
        rewrite(folder, changes)
        with pytest.raises(CheckpointError, match=message):
            load_model(folder, jnp.float32)
        rewrite(folder, {f"{path}_blocks": blocks, f"{path}_scales": scales, path: None})
    load_model(folder, jnp.float32)
