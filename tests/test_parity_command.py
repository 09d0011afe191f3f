"""``moelora parity``: it agrees where both sides do, finds what differs, and says what is wrong."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moelora_jax import AdapterError, MoeLoraError
from moelora_jax.cli.demo_files import ADAPTERS, MODEL_CONFIG, write_demo
from moelora_jax.engine.trace import Trace
from moelora_jax.models import convert_checkpoint
from moelora_jax.parity import (
    Agreement,
    GreedyTokens,
    adapted,
    compare,
    count_agreement,
    load_torch_model,
    logit_noise,
    trace_torch,
)
from tests.test_cli import documented_command, error, fast_compilation, run

__all__ = ["fast_compilation"]  # A fixture for all tests of a module.

pytest.importorskip("torch")

#: float32 has 24 bits, and no sum is longer than 100 products; errors grow with the 4 layers.
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity") / "demo"
    write_demo(folder, rows=5, seed=0)
    return folder


@pytest.fixture
def options(folder: Path) -> list[object]:
    adapters = (("--adapter", f"{name}={folder}/adapters/{name}") for name in ADAPTERS)
    return ["--model", folder / "model", *(word for pair in adapters for word in pair)]


def test_the_documented_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    command = documented_command("numerics.md", "parity")
    result = run(*command, "--generate", 4, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    assert "within the tolerance: largest error of a logit" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] is True
    assert report["total"]["logits"] <= report["tolerance"] == 2e-5
    assert report["total"]["rows"] == sum(errors["rows"] for errors in report["adapters"]) == 6
    assert report["generated"] == {"decided": 4 * 6, "different": 0}
    assert [errors["layer"] for errors in report["layers"]] == [0, 1, 2, 3]
    for errors in report["layers"]:
        assert errors["equal_choices"] == 1.0
        for name in ("moe_input", "router_logits", "weights", "moe_output"):
            assert 0 < errors[name] < RELATIVE


def test_given_rows_and_bfloat16(folder: Path, options: list[object], tmp_path: Path) -> None:
    # Rounding makes some tokens of a random model choose another expert, so log p is off by 0.3.
    command = ("parity", *options, "--input", folder / "rows.jsonl", "--dtype", "bfloat16")
    report = tmp_path / "report.json"
    result = run(*command, "--tolerance", 0.1, "--generate", 4, "--json", report)
    assert result.exit_code == 0, result.output
    assert "within the tolerance: 0.5·mean(Δ log p²)" in result.stdout
    found = json.loads(report.read_text())
    assert 0 < found["torch_in_dtype"]["total"]["log_probabilities"] < 0.1
    assert found["next_tokens"]["decided"] > 0 == found["next_tokens"]["different"]
    assert found["generated"]["different"] == 0


def test_beyond_the_tolerance(folder: Path) -> None:
    command = ("parity", "--model", folder / "model", "--random", 1, "--length", 4)
    result = run(*command, "--tolerance", 0)
    assert result.exit_code == 1
    assert "beyond the tolerance: largest error of a logit" in result.stdout


def test_an_adapter_leaves_the_torch_model(folder: Path) -> None:
    model = load_torch_model(folder / "model")
    before = trace_torch(model, [1, 2, 3])
    with adapted(model, folder / "adapters" / "both-r16") as adapted_model:
        changed = trace_torch(adapted_model, [1, 2, 3], "both-r16")
    after = trace_torch(model, [1, 2, 3])
    assert np.abs(changed.logits - before.logits).max() > 0.01
    np.testing.assert_array_equal(after.logits, before.logits)


def test_an_adapter_of_embedding_head_and_router(folder: Path, tmp_path: Path) -> None:
    """PEFT saves the embedding itself, too; all of it is held, and leaves the model again."""
    import peft
    import torch

    options = peft.LoraConfig(
        r=3, target_modules=["embed_tokens", "lm_head"], target_parameters=["mlp.gate.weight"]
    )
    saved = peft.get_peft_model(load_torch_model(folder / "model"), options)
    with torch.no_grad():
        for name, parameter in saved.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    saved.save_pretrained(str(tmp_path), save_embedding_layers=True)
    expected = trace_torch(saved, [1, 2, 3])

    model = load_torch_model(folder / "model")
    before = trace_torch(model, [1, 2, 3])
    with adapted(model, tmp_path) as adapted_model:
        found = trace_torch(adapted_model, [1, 2, 3])
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.router_logits, expected.router_logits)
    assert np.abs(found.logits - before.logits).max() > 0.01
    np.testing.assert_array_equal(trace_torch(model, [1, 2, 3]).logits, before.logits)


def test_what_peft_does_not_hold_is_an_error(folder: Path, tmp_path: Path) -> None:
    """PEFT passes over tensors of an unknown layout."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL_CONFIG))
    source = folder / "adapters" / "experts-r8"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    options |= {"target_modules": ["q_proj"], "rank_pattern": {}, "alpha_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    model = load_torch_model(folder / "model")
    with (
        pytest.raises(AdapterError, match=r"tensor '.*': PEFT .*moelora convert"),
        adapted(model, tmp_path),
    ):
        pass
    assert trace_torch(model, [1, 2]).logits.shape == (2, MODEL_CONFIG["vocab_size"])


def test_missing_packages_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else found(name)
    )
    message = error("parity", "--model", folder / "model")
    assert (
        message == "error: PEFT must be installed: pip install '.[torch]' in the project's folder"
    )


def test_what_pytorch_cannot_do(folder: Path, tmp_path: Path) -> None:
    message = error("parity", "--model", folder / "model", "--torch-device", "abacus")
    assert message.startswith("error: PyTorch cannot use the device 'abacus'")
    convert_checkpoint(folder / "model", tmp_path / "copy", np.float32)
    with pytest.raises(MoeLoraError, match="name the checkpoint that it was converted from"):
        load_torch_model(tmp_path / "copy")


# The comparison itself.


def made_trace(**changes: Any) -> Trace:
    """Two layers, three tokens, four experts of which each token chooses two."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return Trace(
        **{
            "tokens": (1, 2, 0),
            "adapter": None,
            "moe_layers": (0, 2),
            "moe_input": normal(2, 3, 5),
            "router_logits": normal(2, 3, 4),
            "experts": np.array([[[0, 1], [1, 2], [3, 0]]] * 2, np.int32),
            "weights": np.array([[[0.75, 0.25]] * 3] * 2, np.float32),
            "moe_output": normal(2, 3, 5),
            "hidden": normal(3, 5),
            "logits": normal(3, 6),
        }
        | changes
    )


def test_equal_traces_have_no_errors() -> None:
    found = compare([made_trace()], [made_trace()])
    assert found.total.logits == found.total.log_probabilities == found.total.hidden == 0
    for layer in found.layers:
        assert layer.equal_choices == 1
        assert layer.moe_input == layer.router_logits == layer.weights == layer.moe_output == 0


@pytest.mark.parametrize("name", ["moe_input", "router_logits", "moe_output"])
def test_an_error_is_found_in_its_layer(name: str) -> None:
    reference = made_trace()
    values = getattr(reference, name).copy()
    largest = np.abs(values[1]).max()
    values[1, 2, 3] += 0.5
    found = compare([replace(reference, **{name: values})], [reference])
    assert getattr(found.layers[0], name) == 0
    assert getattr(found.layers[1], name) == pytest.approx(0.5 / largest)
    assert found.layers[1].layer == 2


def test_the_order_of_experts_does_not_matter_but_the_choice_does() -> None:
    reference = made_trace()
    turned = replace(
        reference, experts=reference.experts[..., ::-1], weights=reference.weights[..., ::-1]
    )
    layer = compare([turned], [reference]).layers[0]
    assert (layer.equal_choices, layer.weights) == (1, 0)

    experts, weights = reference.experts.copy(), reference.weights.copy()
    experts[0, 1, 1] = 3  # one of six choices
    weights[0, 0, 0] = 0.5
    layer = compare([replace(reference, experts=experts, weights=weights)], [reference]).layers[0]
    assert layer.equal_choices == pytest.approx(5 / 6)
    assert layer.weights == pytest.approx(0.25)


def test_log_probabilities_by_hand() -> None:
    reference = made_trace(logits=np.zeros((3, 6), np.float32))
    logits = np.zeros((3, 6), np.float32)
    logits[0, 2] = np.log(2)  # the second token becomes 2/7 instead of 1/6
    logits[2, 0] = 100  # comes after the last token
    total = compare([replace(reference, logits=logits)], [reference]).total
    change = np.log(2 / 7) - np.log(1 / 6)
    assert total.log_probabilities == pytest.approx(0.5 * change**2 / 2)
    assert total.logits == 100


def test_tokens_are_compared_where_the_margin_decides() -> None:
    reference = GreedyTokens.of(np.array([[0, 2, 1], [5, 1, 4.5], [0, 0, 3]], np.float32))
    assert (reference.tokens, reference.margins) == ((1, 0, 2), (1, 0.5, 3))
    # The second token is another, but hardly decided; what a generated row has behind it says
    # nothing, while prompts go on as they are.
    rows = [((1, 2, 0), reference)]
    assert count_agreement(rows, 0.7, generated=False) == Agreement(decided=2, different=1)
    assert count_agreement(rows, 0.7, generated=True) == Agreement(decided=1, different=0)
    assert count_agreement(rows, 0.4, generated=True) == Agreement(decided=2, different=1)


def test_the_noise_is_that_of_nearly_all_positions() -> None:
    reference = made_trace(logits=np.zeros((200, 6), np.float32))
    logits = np.zeros((200, 6), np.float32)
    logits[:, 3] = -0.25
    logits[7, 2] = 9  # one of 200 positions
    assert logit_noise([replace(reference, logits=logits)], [reference]) == 0.25


def test_adapters_are_told_apart_and_rows_must_be_the_same() -> None:
    base, tuned = made_trace(), made_trace(adapter="fr")
    worse = replace(tuned, logits=tuned.logits + 1)
    found = compare([base, worse, base], [base, tuned, base])
    assert [(e.adapter, e.rows, e.tokens) for e in found.adapters] == [(None, 2, 6), ("fr", 1, 3)]
    assert [e.logits for e in found.adapters] == [0, pytest.approx(1)]
    assert found.total.rows == 3
    with pytest.raises(ValueError, match="adapter of a row are None, but fr"):
        compare([base], [tuned])
