"""Over HTTP, 64 adapters: no answer depends on other requests, nor on adapters that come and go."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from moelora_jax import LLM
from moelora_jax.cli.demo_files import ADAPTERS
from moelora_jax.server.adapter_root import AdapterRoot
from moelora_jax.server.keys import Keys
from tests.served_model import MODEL, Served, served, tiny_model
from tests.tiny_llm import random_adapter

ADMIN = "sk-admin"
OTHERS = [f"a{number}" for number in range(64 - len(ADAPTERS))]

# Rows of another place or bucket sum in another order: some roundings of float32 numbers near 4.
TOLERANCE = 2e-5
#: A best token must be ahead by so much, or the order of sums decides: then choose another seed.
MARGIN = 2 * TOLERANCE


class Answer(NamedTuple):
    """What a completion says, and how sure it is of each token."""

    tokens: list[str]
    logprobs: list[float]
    margins: list[float]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("isolation")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    llm = tiny_model(folder)
    for seed, name in enumerate(OTHERS):
        llm.load_adapter(name, random_adapter(llm.config, seed, rank=1 + seed % 16))
    return llm


@pytest.fixture(scope="module")
def server(llm: LLM, folder: Path) -> Iterator[Served]:
    root = AdapterRoot(folder / "adapters")
    with served(llm, folder, max_waiting=512, keys=Keys(admin=ADMIN), adapter_root=root) as server:
        yield server


def ask(server: Served, body: dict[str, Any]) -> Answer:
    sent = body | {"temperature": 0, "ignore_eos": True, "logprobs": 2}
    status, answer = server.request("POST", "/v1/completions", sent)
    assert status == 200, answer
    found = answer["choices"][0]["logprobs"]
    # Two tokens may have the same text, as bytes of a character that is not whole have.
    best = [sorted(top.values()) for top in found["top_logprobs"]]
    margins = [pair[-1] - pair[0] if len(pair) == 2 else MARGIN for pair in best]
    return Answer(found["tokens"], found["token_logprobs"], margins)


def come_and_go(server: Served, root: Path, stop: threading.Event) -> int:
    """Reloads adapters that are asked for, and loads and unloads others; how often."""
    draw, count = random.Random(0), 0

    def manage(path: str, **body: Any) -> None:
        status, answer = server.request("POST", path, body, key=ADMIN)
        assert status == 200, answer

    while not stop.wait(0.01):
        name = draw.choice([*ADAPTERS])
        folder = str(root / name)
        manage("/v1/load_lora_adapter", lora_name=name, lora_path=folder, load_inplace=True)
        manage("/v1/load_lora_adapter", lora_name="guest", lora_path=folder)
        ask(server, {"model": "guest", "prompt": [7], "max_tokens": 1})
        manage("/v1/unload_lora_adapter", lora_name="guest")
        count += 1
    return count


def test_answers_in_mixed_traffic_are_those_of_the_same_requests_alone(
    server: Served, folder: Path
) -> None:
    rng = np.random.default_rng(0)
    bodies = [
        {
            "model": model,
            "prompt": rng.integers(0, 250, int(rng.integers(1, 40))).tolist(),
            "max_tokens": int(rng.integers(1, 9)),
        }
        for model in (MODEL, *ADAPTERS, *OTHERS, MODEL, *ADAPTERS, *OTHERS)
    ]
    alone = [ask(server, body) for body in bodies]
    assert min(margin for answer in alone for margin in answer.margins) >= MARGIN

    stop = threading.Event()
    with ThreadPoolExecutor(33) as threads:
        churn = threads.submit(come_and_go, server, folder / "adapters", stop)
        order = rng.permutation(len(bodies)).tolist()
        try:
            mixed = list(threads.map(lambda index: ask(server, bodies[index]), order))
        finally:
            stop.set()
        assert churn.result() > 3
    for index, answer in zip(order, mixed, strict=True):
        assert answer.tokens == alone[index].tokens, bodies[index]
        np.testing.assert_allclose(answer.logprobs, alone[index].logprobs, rtol=0, atol=TOLERANCE)

    server.wait_until_idle()
    stats = server.service.engine.stats()
    assert stats.compilations == stats.address_changes == stats.unplanned_reads == 0
    # Four slots for 64 adapters: most answers needed a load, and pushed another adapter out.
    assert stats.adapter_evictions > 64
    assert stats.finished == {"length": stats.submitted}
