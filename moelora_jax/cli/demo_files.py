"""The files of the demo: a tiny random checkpoint, adapters of several kinds, and rows to run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from moelora_jax.adapters.adapter import Adapter, LowRankUpdate, Target
from moelora_jax.adapters.writer import Layout, save_adapter
from moelora_jax.config import LoraSite, ModelConfig
from moelora_jax.models import family_of, model_arrays
from moelora_jax.models.checkpoint import save_checkpoint

#: config.json of the demo's model, as transformers writes it for Qwen3-MoE.
MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "float32",
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
#: Longest prompt.
MAX_PROMPT = 12

#: Tokens behind those of the 256 bytes.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: How a conversation is written, as in many checkpoints.
CHAT_TEMPLATE = """\
{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""


@dataclass(frozen=True)
class AdapterKind:
    """What a random adapter of the demo is like."""

    rank: int
    layout: Layout
    attention: bool
    experts: bool

    def changes(self, site: LoraSite) -> bool:
        """Whether adapters of this kind change a site."""
        if site.optional:
            return False
        return self.experts if site.num_experts else self.attention


#: By the adapters' names.
ADAPTERS = {
    "attention-r3": AdapterKind(3, "per_expert", attention=True, experts=False),
    "experts-r8": AdapterKind(8, "per_expert", attention=False, experts=True),
    "both-r16": AdapterKind(16, "peft_fused", attention=True, experts=True),
    "experts-r24": AdapterKind(24, "peft_fused", attention=False, experts=True),
}


def write_demo(folder: Path, *, rows: int, seed: int) -> None:
    """Write ``model/``, ``adapters/NAME/`` and ``rows.jsonl``.

    Args:
        folder: must not have these folders yet.
        rows: how many rows; the first one is for the base model, the others take turns.
        seed: of everything that is random.

    Raises:
        MoeLoraError: a folder is there already.
    """
    family = family_of(MODEL_CONFIG)
    config = family.read_config(MODEL_CONFIG)
    model = family.module(config, dtype=jnp.float32, rngs=nnx.Rngs(seed))
    save_checkpoint(folder / "model", MODEL_CONFIG, family.parameters(config), model_arrays(model))
    write_tokenizer(folder / "model")
    rng = np.random.default_rng(seed)
    for name, kind in ADAPTERS.items():
        save_adapter(
            folder / "adapters" / name,
            random_adapter(config, kind, rng),
            config.lora_sites(),
            layout=kind.layout,
            module_names=family.module_names,
        )
    names = [None, *ADAPTERS]
    lines = [
        json.dumps(
            {
                "tokens": random_tokens(config, rng, MAX_PROMPT),
                "adapter": names[row % len(names)],
            }
        )
        for row in range(rows)
    ]
    (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_tokenizer(model: Path) -> None:
    """Write a tokenizer of bytes and a chat template, so that text can be served."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({character: token for token, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    end = tokenizer.token_to_id(SPECIAL_TOKENS[-1])
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))


def random_tokens(config: ModelConfig, rng: np.random.Generator, longest: int) -> list[int]:
    """A prompt of random length, at least 1 and at most ``longest``."""
    length = rng.integers(1, longest, endpoint=True)
    return rng.integers(config.vocab_size, size=length).tolist()


def random_adapter(config: ModelConfig, kind: AdapterKind, rng: np.random.Generator) -> Adapter:
    """An adapter whose changes are about half as large as the weights that they change."""
    rank = kind.rank
    updates: dict[Target, LowRankUpdate] = {}
    for site in filter(kind.changes, config.lora_sites()):
        for layer in site.layers:
            for expert in range(site.table_experts):
                a = rng.normal(scale=site.in_features**-0.5, size=(rank, site.in_features))
                b = rng.normal(scale=0.25 * rank**-0.5, size=(site.out_features, rank))
                target = Target(layer, site.name, expert)
                if kind.layout == "peft_fused" and site.name == "up_proj":
                    a = updates[target._replace(site="gate_proj")].a  # One A for both.
                updates[target] = LowRankUpdate(
                    a.astype(np.float32, copy=False), b.astype(np.float32), scaling=2.0
                )
    return Adapter(kind.layout, updates)
