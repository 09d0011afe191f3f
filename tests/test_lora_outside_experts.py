"""Adapters on the router, the embedding and the head, whose sites are optional, against PEFT."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from moelora_jax import (
    LLM,
    BucketConfig,
    CacheConfig,
    LoraConfig,
    Prompt,
    RuntimeConfig,
)
from tests.adapter_files import ATTENTION
from tests.test_families import TESTED, torch_model

# As in test_parity.py.
TOLERANCE = 2e-5

torch = pytest.importorskip("torch")

LATENT_ATTENTION = ("o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
OPTIONAL_SITES = ("router", "embed_tokens", "lm_head")
#: Family, and whether embedding and head are one matrix. OLMoE names its modules as Qwen3.
CASES = [
    ("Qwen3-MoE", True),
    ("Mixtral", False),
    ("gpt-oss", True),
    ("DeepSeek-V3", False),
]
RUNTIME = RuntimeConfig(
    lora=LoraConfig(max_adapters=10, max_rank=32, pool_rank=24, optional_sites=OPTIONAL_SITES),
    buckets=BucketConfig(decode=(16,), prefill=(256,)),
    cache=CacheConfig(max_length=32, block_size=8),
)


def router_of(name: str) -> str:
    return "mlp.router" if name == "gpt-oss" else "mlp.gate"


def peft_options(name: str, tied: bool) -> dict[str, dict[str, Any]]:
    """Options of peft.LoraConfig by the adapter's name."""
    router = f"{router_of(name)}.weight"
    attention = LATENT_ATTENTION if name == "DeepSeek-V3" else ATTENTION
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options: dict[str, dict[str, Any]] = {
        "router": {"r": 3, "target_parameters": [router]},
        "embedding": {"r": 5, "target_modules": ["embed_tokens"]},
        "head": {"r": 4, "target_modules": ["lm_head"]},
        "embedding as a parameter": {"r": 2, "target_parameters": ["embed_tokens.weight"]},
        "everything": {
            "r": 20,
            "lora_alpha": 7,
            "use_rslora": True,
            "target_modules": [*attention, "embed_tokens", "lm_head"],
            "target_parameters": [*experts, router],
        },
        "attention": {"r": 8, "target_modules": list(attention)},
    }
    if tied:
        options["tied"] = {
            "r": 6,
            "target_modules": ["embed_tokens", "q_proj"],
            "ensure_weight_tying": True,
        }
    return options


def quietly[T](function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call PEFT, which warns that embedding and head of a tied model come apart."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Model (with|has) `tie_word_embeddings", UserWarning)
        warnings.filterwarnings("ignore", r"Setting `save_embedding_layers`", UserWarning)
        return function(*arguments, **options)


def save_by_peft(model: Any, folder: Path, seed: int, **options: Any) -> None:
    """An adapter with random factors."""
    import peft

    config = peft.LoraConfig(**{"lora_alpha": 6, "target_modules": []} | options)
    adapted = quietly(peft.get_peft_model, model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1, generator=generator)
    quietly(adapted.save_pretrained, str(folder))


class Loaded(NamedTuple):
    """A model with adapters, where they are, and what makes each of them in PyTorch."""

    folder: Path
    llm: LLM
    fresh: Callable[[], Any]
    torch_models: dict[str | None, Any]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    from peft import PeftModel

    family_name, tied = request.param
    family = TESTED[family_name]
    options = family.options | {"tie_word_embeddings": tied}
    folder = tmp_path_factory.mktemp("outside")

    def fresh() -> Any:
        return torch_model(family_name, dataclasses.replace(family, options=options))

    fresh().save_pretrained(folder / "base")
    llm = LLM.load(folder / "base", runtime=RUNTIME, dtype=np.float32)
    assert llm.config.tie_embeddings == tied
    torch_models: dict[str | None, Any] = {None: fresh()}
    for seed, (name, peft) in enumerate(peft_options(family_name, tied).items()):
        save_by_peft(fresh(), folder / name, seed, **peft)
        torch_models[name] = quietly(PeftModel.from_pretrained, fresh(), folder / name).eval()
        llm.load_adapter(name, folder / name)
    return Loaded(folder, llm, fresh, torch_models)


def test_logits_of_a_mixed_batch_equal_peft(loaded: Loaded) -> None:
    rng = np.random.default_rng(2)
    names = [None, *loaded.torch_models, None]
    prompts = [Prompt(rng.integers(0, 97, rng.integers(1, 28)).tolist(), name) for name in names]
    assert len(prompts) <= 16 and sum(len(prompt.tokens) for prompt in prompts) <= 256
    scored = loaded.llm.score(prompts)
    for prompt, logits in zip(prompts, scored, strict=True):
        tokens = torch.tensor([prompt.tokens])
        with torch.no_grad():
            expected = loaded.torch_models[prompt.adapter](tokens).logits[0].numpy()
            base = loaded.torch_models[None](tokens).logits[0].numpy()
        assert 1 < np.abs(expected).max() < 20
        if prompt.adapter is not None:
            # The adapter matters by far more than the tolerance, or the comparison says nothing.
            assert np.abs(expected - base).max() > 1000 * TOLERANCE
        np.testing.assert_allclose(
            logits, expected, rtol=0, atol=TOLERANCE, err_msg=str(prompt.adapter)
        )
    # Base rows have the bits of the program without adapters, in the same bucket.
    of_base = [prompt for prompt in prompts if prompt.adapter is None]
    alone = loaded.llm.score(of_base)
    in_batch = [s for s, prompt in zip(scored, prompts, strict=True) if prompt.adapter is None]
    for one, other in zip(alone, in_batch, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("loaded", CASES[:1], indirect=True)
def test_generated_tokens_equal_peft(loaded: Loaded) -> None:
    """Prefill sorts the last tokens of the sequences again, by adapter; and so does decode."""
    rng = np.random.default_rng(3)
    prompts = [
        Prompt(rng.integers(0, 97, rng.integers(1, 20)).tolist(), name)
        for name in loaded.torch_models
    ]
    completions = loaded.llm.generate(prompts, max_new_tokens=5, stop_tokens=())
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = [*prompt.tokens, *completion.tokens]
        with torch.no_grad():
            logits = loaded.torch_models[prompt.adapter](torch.tensor([tokens])).logits[0]
        logits = logits[len(prompt.tokens) - 1 : -1]
        best = torch.topk(logits, 2).values
        assert (best[:, 0] - best[:, 1] > TOLERANCE).all(), "a tie: choose another seed"
        assert list(completion.tokens) == logits.argmax(-1).tolist(), prompt.adapter
