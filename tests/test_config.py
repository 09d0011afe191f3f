"""Descriptions that cannot be meant are refused where they are made, by name and value."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moelora_jax import (
    BucketConfig,
    CacheConfig,
    CheckpointError,
    LoraConfig,
    MoeConfig,
    MoeLoraError,
    RuntimeConfig,
)
from moelora_jax.models import read_model_config
from tests.test_models import RAW

COUNT = "must be a whole number of at least 1, not"
SIZES = "must be a tuple of ascending positive sizes, not"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoeConfig(8, 0, 64, 32), f"MoeConfig.top_k {COUNT} 0"),
        (lambda: MoeConfig(8, 9, 64, 32), "MoeConfig.top_k is 9, more than num_experts 8"),
        (lambda: LoraConfig(max_adapters=2.5), f"LoraConfig.max_adapters {COUNT} 2.5"),
        (lambda: LoraConfig(max_rank=True), f"LoraConfig.max_rank {COUNT} True"),
        (lambda: LoraConfig(sites="q_proj"), "LoraConfig.sites must be a tuple of names"),
        (lambda: LoraConfig(optional_sites=["router"]), "optional_sites must be a tuple of names"),
        (lambda: LoraConfig(optional_sites=None), "optional_sites must be a tuple of names"),
        (lambda: BucketConfig(decode=4), f"BucketConfig.decode {SIZES} 4"),
        (lambda: BucketConfig(prefill=[32]), rf"BucketConfig.prefill {SIZES} \[32\]"),
        (lambda: BucketConfig(decode=(1, 2.0)), f"BucketConfig.decode {SIZES}"),
        (lambda: CacheConfig(max_length=0), f"CacheConfig.max_length {COUNT} 0"),
        (lambda: CacheConfig(block_size=0), f"CacheConfig.block_size {COUNT} 0"),
        (lambda: CacheConfig(num_blocks=-1), f"CacheConfig.num_blocks {COUNT} -1"),
        (lambda: RuntimeConfig(BucketConfig()), "RuntimeConfig.lora must be a LoraConfig, not Buc"),
        (lambda: RuntimeConfig(cache=1024), "RuntimeConfig.cache must be a CacheConfig, not 1024"),
    ],
)
def test_a_bad_value_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(MoeLoraError, match=message):
        make()


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy_are_numbers() -> None:
    config = CacheConfig(max_length=np.int64(8))
    assert config == CacheConfig(max_length=8)
    assert hash(config) == hash(CacheConfig(max_length=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "48"}, "hidden_size must be a whole number of at least 0, not '48'"),
        ({"num_hidden_layers": 4.0}, "num_hidden_layers must be a whole number"),
        ({"head_dim": -16}, "head_dim must be a whole number of at least 0, not -16"),
        ({"num_experts": 0}, f"MoeConfig.num_experts {COUNT} 0"),
        ({"num_experts_per_tok": 7}, "MoeConfig.top_k is 7, more than num_experts 6"),
        ({"num_key_value_heads": 3}, "num_heads is 4, no multiple of num_kv_heads 3"),
        ({"head_dim": 15}, "a head has 15 to rotate"),
        ({"vocab_size": 0}, f"ModelConfig.vocab_size {COUNT} 0"),
    ],
)
def test_a_bad_config_json_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RAW | change))
    with pytest.raises(CheckpointError, match=f"{tmp_path}: config.json: .*{message}"):
        read_model_config(tmp_path)
