"""Float32 logits against PyTorch + PEFT: each row of a mixed batch against that row alone there."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from moelora_jax import LLM, BucketConfig, CacheConfig, LoraConfig, Prompt, RuntimeConfig
from moelora_jax.adapters.adapter import Target
from moelora_jax.adapters.layouts import EXPERT_LAYOUTS
from tests.adapter_files import (
    adapter_options,
    exchange_fused,
    linear_tensors,
    per_expert_tensors,
    save_peft_adapter,
    stacked_tensors,
    tiny_model_config,
    tiny_torch_model,
    write_adapter,
    write_per_expert_adapter,
)

# Logits are of magnitude 1 to 5, where float32 has a spacing of 5e-7 at most; sums of some hundred
# products in another order differ by tens of those.
TOLERANCE = 2e-5

torch = pytest.importorskip("torch")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

#: Options of peft.LoraConfig for adapters that PEFT itself saves.
SAVED_BY_PEFT: dict[str, dict[str, Any]] = {
    "attention rank 1": {"r": 1, "lora_alpha": 2, "target_modules": ATTENTION},
    "attention rank 24": {"r": 24, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]},
    "experts rank 3": {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": EXPERTS},
    "both rank 8": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ATTENTION,
        "target_parameters": EXPERTS,
    },
    "gate_up only rank 16": {
        "r": 16,
        "lora_alpha": 16,
        "target_modules": [],
        "target_parameters": EXPERTS[:1],
    },
    "down only rank 8": {
        "r": 8,
        "lora_alpha": 4,
        "target_modules": [],
        "target_parameters": EXPERTS[1:],
    },
    "rank stabilised": {
        "r": 16,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": ATTENTION,
        "target_parameters": EXPERTS,
    },
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ATTENTION,
        "rank_pattern": {"q_proj": 2, r"layers\.0\.self_attn\.v_proj": 16},
        "alpha_pattern": {"o_proj": 1},
    },
}
MODELS = {
    "no dimension divides another": tiny_model_config(),
    "2I equals H": tiny_model_config(hidden_size=40, intermediate_size=20),
}


#: Adapters of PEFT that are also saved as PEFT 0.18 would have saved them, by another name.
SAVED_BY_PEFT_0_18 = {
    "both rank 8": "PEFT 0.18, both rank 8",
    "experts rank 3": "PEFT 0.18, experts rank 3",
}

#: All expert factors in one tensor each: rank, names of the projections, and whether the outer
#: factors are shared.
STACKED: dict[str, tuple[int, Sequence[str], bool]] = {
    "stacked rank 5": (5, ("gate_proj", "up_proj", "down_proj"), False),
    "stacked rank 17, gate_up fused": (17, ("gate_up_proj", "down_proj"), False),
    "shared outer rank 16": (16, ("w1", "w3", "w2"), True),
    "shared outer rank 24, gate_up fused": (24, ("gate_up_proj", "down_proj"), True),
}


def write_by_hand(folder: Path, config: Any, rng: np.random.Generator) -> dict[str, Any]:
    """Adapters of layouts that PEFT does not write; returns what each changes."""
    deltas = {
        "per expert rank 3": write_per_expert_adapter(
            folder / "per expert rank 3", config, rng, rank=3, alpha=6.0
        ),
        "per expert and attention rank 24": write_per_expert_adapter(
            folder / "per expert and attention rank 24",
            config,
            rng,
            rank=24,
            alpha=12.0,
            attention=True,
        ),
    }
    tensors, deltas["some experts, gate_up fused"] = per_expert_tensors(
        config, rng, rank=8, scaling=2.0, fuse_gate_up=True, experts=(0, 3)
    )
    write_adapter(
        folder / "some experts, gate_up fused",
        tensors,
        adapter_options(r=8, lora_alpha=16, target_modules=["gate_up_proj", "down_proj"]),
    )
    for name, (rank, names, shared_outer) in STACKED.items():
        experts, deltas[name] = stacked_tensors(
            config, rng, names=names, rank=rank, scaling=12 / rank, shared_outer=shared_outer
        )
        attention, more = linear_tensors(config, rng, rank=rank, scaling=12 / rank)
        deltas[name] |= more
        write_adapter(
            folder / name,
            experts | attention,
            adapter_options(r=rank, lora_alpha=12, target_modules=[*names, *ATTENTION]),
        )
    return deltas


def save_as_peft_0_18(source: Path, folder: Path, config: Any) -> None:
    """Save what PEFT saved, with A and B of the experts exchanged."""
    tensors = exchange_fused(load_file(source / "adapter_model.safetensors"), config)
    options = json.loads((source / "adapter_config.json").read_text())
    write_adapter(folder, tensors, options | {"peft_version": "0.18.1"})


def merged(model: Any, deltas: dict[Target, np.ndarray]) -> Any:
    """Add an adapter's changes to a PyTorch model's own weights."""
    with torch.no_grad():
        for (layer, site, expert), delta in deltas.items():
            block = model.model.layers[layer]
            change = torch.from_numpy(delta.astype(np.float32))
            if site == "down_proj":
                block.mlp.experts.down_proj[expert] += change
            elif site in ("gate_proj", "up_proj"):
                inner = change.shape[0]
                first = 0 if site == "gate_proj" else inner
                block.mlp.experts.gate_up_proj[expert, first : first + inner] += change
            else:
                getattr(block.self_attn, site).weight += change
    return model


@pytest.fixture(scope="module", params=MODELS)
def parity(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LLM, dict[str | None, Callable[[], Any]]]]:
    """A model with all adapters loaded, and how PyTorch makes each of them."""
    from peft import PeftModel

    config = MODELS[request.param]
    folder = tmp_path_factory.mktemp("parity")

    def fresh() -> Any:
        model = tiny_torch_model(config).eval()
        with torch.no_grad():  # Random weights of transformers are so small that logits vanish.
            for parameter in model.parameters():
                parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)
        return model

    fresh().save_pretrained(folder / "base")
    for name, options in SAVED_BY_PEFT.items():
        save_peft_adapter(fresh(), folder / name, seed=len(name), **options)
    for name, old in SAVED_BY_PEFT_0_18.items():
        save_as_peft_0_18(folder / name, folder / old, config)
    by_hand = write_by_hand(folder, config, np.random.default_rng(1))

    torch_models: dict[str | None, Callable[[], Any]] = {None: fresh}
    for name in SAVED_BY_PEFT:
        torch_models[name] = lambda name=name: PeftModel.from_pretrained(fresh(), folder / name)
    for name, old in SAVED_BY_PEFT_0_18.items():
        torch_models[old] = torch_models[name]
    for name, deltas in by_hand.items():
        torch_models[name] = lambda deltas=deltas: merged(fresh(), deltas)

    runtime = RuntimeConfig(
        lora=LoraConfig(max_adapters=len(torch_models), max_rank=32, pool_rank=24),
        # All rows in one step.
        buckets=BucketConfig(decode=(24,), prefill=(512,)),
        cache=CacheConfig(max_length=32),
    )
    llm = LLM.load(folder / "base", runtime=runtime, dtype=np.float32)
    for name in torch_models:
        if name is not None:
            llm.load_adapter(name, folder / name)
    found = {layout for info in llm.adapters() for layout in info.layout.split("+")}
    assert found == {"linear", *EXPERT_LAYOUTS}
    yield llm, torch_models


def test_mixed_batch_equals_each_row_alone_in_pytorch(
    parity: tuple[LLM, dict[str | None, Callable[[], Any]]],
) -> None:
    llm, torch_models = parity
    rng = np.random.default_rng(2)
    names = [None, *torch_models, None]
    prompts = [
        Prompt(rng.integers(0, llm.config.vocab_size, int(rng.integers(1, 28))).tolist(), name)
        for name in names
    ]
    assert len(prompts) <= 24 and sum(len(prompt.tokens) for prompt in prompts) <= 512
    scored = llm.score(prompts)

    base_model = torch_models[None]()
    for prompt, logits in zip(prompts, scored, strict=True):
        tokens = torch.tensor([prompt.tokens])
        with torch.no_grad():
            expected = torch_models[prompt.adapter]()(tokens).logits[0].numpy()
            base = base_model(tokens).logits[0].numpy()
        assert 1 < np.abs(expected).max() < 50
        if prompt.adapter is not None:
            # The adapter matters by far more than the tolerance, or the comparison says nothing.
            assert np.abs(expected - base).max() > 100 * TOLERANCE
        np.testing.assert_allclose(
            logits, expected, rtol=0, atol=TOLERANCE, err_msg=str(prompt.adapter)
        )


def test_greedy_tokens_equal_those_of_pytorch(
    parity: tuple[LLM, dict[str | None, Callable[[], Any]]],
) -> None:
    llm, torch_models = parity
    rng = np.random.default_rng(3)
    names = [None, "both rank 8", "per expert and attention rank 24", "shared outer rank 16"]
    prompts = [
        Prompt(rng.integers(0, llm.config.vocab_size, length).tolist(), name)
        for length, name in zip((5, 11, 1, 20), names, strict=True)
    ]
    completions = llm.generate(prompts, max_new_tokens=6, stop_tokens=())

    for prompt, completion in zip(prompts, completions, strict=True):
        model = torch_models[prompt.adapter]()
        tokens = list(prompt.tokens)
        for token in completion.tokens:
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0, -1]
            best = torch.topk(logits, 2).values
            assert best[0] - best[1] > TOLERANCE, "a tie: choose another seed"
            assert token == int(logits.argmax())
            tokens.append(token)
