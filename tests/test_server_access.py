"""Who may do what: keys, the adapters of a key, loading from under one root, and limits."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AuthenticationError, OpenAI

from moelora_jax import Adapter, RequestError
from moelora_jax.adapters.writer import save_adapter
from moelora_jax.cli.demo_files import ADAPTERS
from moelora_jax.models import FAMILIES
from moelora_jax.server.adapter_root import AdapterRoot
from moelora_jax.server.errors import ApiError
from moelora_jax.server.keys import Key, Keys, digest, read_keys
from tests.served_model import MODEL, Served, served, tiny_model
from tests.tiny_llm import random_adapter

EVERYTHING, SOME, BASE_ONLY, ADMIN = "sk-everything", "sk-some", "sk-base", "sk-admin"
MAX_BODY = 20_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("access")
    file = folder / "keys.json"
    file.write_text(
        json.dumps(
            [
                {"name": "all", "key": EVERYTHING},
                {"key_sha256": digest(SOME).hex(), "adapters": ["experts-*"], "base": False},
                {"key": BASE_ONLY, "adapters": []},
            ]
        )
    )
    keys = Keys(read_keys(file), ADMIN)
    llm = tiny_model(folder)
    root = AdapterRoot(folder / "adapters")
    with served(llm, folder, keys=keys, adapter_root=root, max_body_bytes=MAX_BODY) as server:
        yield server


def complete(server: Served, model: str, key: str | None = None) -> int:
    body = {"model": model, "prompt": "Hello", "max_tokens": 1}
    return server.request("POST", "/v1/completions", body, key=key)[0]


def load(server: Served, name: str, path: object, **more: Any) -> tuple[int, Any]:
    body = {"lora_name": name, "lora_path": str(path), **more}
    return server.request("POST", "/v1/load_lora_adapter", body, key=ADMIN)


def unload(server: Served, name: str) -> tuple[int, Any]:
    return server.request("POST", "/v1/unload_lora_adapter", {"lora_name": name}, key=ADMIN)


def refused(answer: tuple[int, Any], status: int, code: str) -> str:
    """The message of an error of that kind."""
    assert answer[0] == status, answer
    assert answer[1]["error"]["code"] == code
    return answer[1]["error"]["message"]


# Keys.


@pytest.mark.parametrize("key", [None, "", "wrong", "sk-everythin", "sk-everything2", "ключ"])
def test_without_a_right_key_there_is_nothing(server: Served, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode().decode("latin-1")}
    for method, path, body in (
        ("GET", "/v1/models", None),
        ("GET", f"/v1/models/{MODEL}", None),
        ("GET", "/metrics", None),
        ("POST", "/v1/completions", {"model": MODEL, "prompt": "a"}),
        ("POST", "/v1/chat/completions", {"model": MODEL, "messages": []}),
        ("POST", "/v1/completions", b"not JSON, but that is not told to strangers"),
        ("POST", "/tokenize", {"prompt": "a"}),
        ("POST", "/detokenize", {"tokens": [1]}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "b"}),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "experts-r8"}),
    ):
        answer = server.request(method, path, body, headers=headers)
        refused(answer, 401, "invalid_api_key")
    assert server.request("GET", "/health")[0] == 200
    assert server.request("GET", "/")[0] == 200  # The page holds no data; it asks for a key.


def test_other_schemes_are_no_keys(server: Served) -> None:
    for value in (EVERYTHING, f"Basic {EVERYTHING}", f"Bearer{EVERYTHING}", "Bearer"):
        answer = server.request("GET", "/v1/models", headers={"Authorization": value})
        assert answer[0] == 401
    for value in (f"bearer {EVERYTHING}", f"Bearer  {EVERYTHING}"):
        assert server.request("GET", "/v1/models", headers={"Authorization": value})[0] == 200


@pytest.mark.parametrize(
    ("key", "models"),
    [
        (EVERYTHING, {MODEL, *ADAPTERS}),
        (ADMIN, {MODEL, *ADAPTERS}),
        (SOME, {"experts-r8", "experts-r24"}),
        (BASE_ONLY, {MODEL}),
    ],
)
def test_a_key_sees_and_uses_its_models(server: Served, key: str, models: set[str]) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        assert {card.id for card in client.models.list()} == models
    for model in (MODEL, *ADAPTERS):
        assert complete(server, model, key) == (200 if model in models else 404)
        if model != MODEL:
            assert complete(server, f"{MODEL}:{model}", key) == (200 if model in models else 404)
    assert server.request("GET", "/metrics", key=key)[0] == (200 if len(models) > 2 else 403)


def test_the_client_names_the_error(server: Served) -> None:
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="no", max_retries=0) as client,
        pytest.raises(AuthenticationError, match="API key"),
    ):
        client.models.list()


@pytest.mark.parametrize("key", [EVERYTHING, SOME, BASE_ONLY])
def test_only_the_admin_key_changes_adapters(server: Served, key: str) -> None:
    for path, body in (
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "experts-r8"}),
        ("/v1/unload_lora_adapter", {"lora_name": "experts-r8"}),
    ):
        refused(server.request("POST", path, body, key=key), 403, "permission_denied")
    assert complete(server, "experts-r8", EVERYTHING) == 200


def test_without_an_admin_key_nobody_changes_adapters() -> None:
    for keys in (Keys(), Keys([Key(digest("a"))])):
        for header in (None, "Bearer a", "Bearer None", "Bearer "):
            with pytest.raises(ApiError, match="--admin-key") as caught:
                keys.admin(header)
            assert caught.value.status == 403
    assert Keys().client(None).unrestricted
    assert Keys(admin="b").client(None).unrestricted  # The admin key does not close the rest.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a readable JSON"),
        ("{}", "a list"),
        ("[]", "at least one"),
        ('["sk"]', "key 1: must be an object"),
        ('[{"key": "a"}, {"key": "b", "adapter": []}]', "key 2: unknown field 'adapter'"),
        ('[{"name": "x"}]', "either key or key_sha256"),
        ('[{"key": "a", "key_sha256": "b"}]', "either key or key_sha256"),
        ('[{"key": " "}]', "not empty"),
        ('[{"key_sha256": "abc"}]', "64 hexadecimal"),
        ('[{"key": "a", "adapters": "experts"}]', "list of names"),
        ('[{"key": "a", "base": 1}]', "true or false"),
    ],
)
def test_bad_files_of_keys(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(RequestError, match=message):
        read_keys(file)


def test_equal_keys_are_refused() -> None:
    with pytest.raises(RequestError, match="twice"):
        Keys([Key(digest("a"))], "a")


# Loading and unloading.


def test_load_use_unload(server: Served) -> None:
    folder = server.folder / "adapters"
    assert load(server, "new", "experts-r8") == (
        200,
        "Success: LoRA adapter 'new' added successfully.",
    )
    assert complete(server, "new", EVERYTHING) == 200
    # The words that clients of vLLM look for, and what they may send beside the names.
    message = refused(load(server, "new", "experts-r24"), 400, "already_loaded")
    assert "has already been loaded" in message
    more = {"load_inplace": True, "is_3d_lora_weight": False}
    assert load(server, "new", "experts-r24", **more)[0] == 200
    card = server.request("GET", "/v1/models/new", key=EVERYTHING)[1]
    assert card["rank"] == 24
    assert 'adapter="new"' in "".join(server.metrics(ADMIN))
    assert unload(server, "new") == (200, "Success: LoRA adapter 'new' removed successfully.")
    assert complete(server, "new", EVERYTHING) == 404
    refused(unload(server, "new"), 404, "adapter_not_found")
    assert not [name for name in server.metrics(ADMIN) if '"new"' in name]
    assert load(server, "new", folder / "experts-r8")[0] == 200  # Absolute, and under the root.
    assert unload(server, "new")[0] == 200


def test_paths_outside_the_root(server: Served, tmp_path: Path) -> None:
    folder = server.folder / "adapters"
    outside = server.folder / "outside"
    shutil.copytree(folder / "experts-r8", outside)
    (folder / "link").symlink_to(outside)
    (folder / "link-inside").symlink_to(folder / "experts-r8")
    shutil.copytree(folder / "experts-r8", folder / "links")
    (folder / "links" / "adapter_model.safetensors").unlink()
    (folder / "links" / "adapter_model.safetensors").symlink_to(
        outside / "adapter_model.safetensors"
    )
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    try:
        for path in ("../outside", outside, "experts-r8/../../outside", "link", "links", "/", "..",
                     "/etc", "../adapters-2", "link/."):  # fmt: skip
            refused(load(server, "evil", path), 403, "path_not_allowed")
        for path in ("nothing", "experts-r8/adapter_config.json", "pipe", folder / "nothing"):
            refused(load(server, "evil", path), 404, "adapter_not_found")
        for path in ("a\0b", "loop", "a" * 5000):
            status, answer = load(server, "evil", path)
            assert status in (400, 404), answer
        (folder / "empty").mkdir()
        refused(load(server, "evil", "empty"), 400, "invalid_adapter")
        assert complete(server, "evil", EVERYTHING) == 404
        assert load(server, "good", "link-inside")[0] == 200
        assert load(server, "good", "both-r16/../experts-r8", load_inplace=True)[0] == 200
        assert unload(server, "good")[0] == 200
    finally:
        for name in ("link", "link-inside", "loop", "pipe"):
            (folder / name).unlink()
        for name in (outside, folder / "links", folder / "empty"):
            shutil.rmtree(name)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_name": "", "lora_path": "experts-r8"}, "lora_name"),
        ({"lora_name": "a", "lora_path": ""}, "lora_path"),
        ({"lora_name": "a"}, "lora_path"),
        ({"lora_name": " a", "lora_path": "experts-r8"}, None),
        ({"lora_name": "a" * 257, "lora_path": "experts-r8"}, None),
        ({"lora_name": "a\n", "lora_path": "experts-r8"}, None),
        ({"lora_name": MODEL, "lora_path": "experts-r8"}, "lora_name"),
        ({"lora_name": "a", "lora_path": "experts-r8", "layout": "round"}, None),
        ({"lora_name": "a", "lora_path": "experts-r8", "rank": 3}, "rank"),
    ],
)
def test_bad_loads_are_named(server: Served, body: dict[str, Any], param: str | None) -> None:
    status, answer = server.request("POST", "/v1/load_lora_adapter", body, key=ADMIN)
    assert status == 400, answer
    assert answer["error"]["param"] == param


def test_a_rank_above_the_limit(server: Served) -> None:
    folder = server.folder / "adapters" / "too-large"
    config = server.llm.config
    adapter = random_adapter(config, 0, rank=40, sites=["q_proj"])
    names = FAMILIES[config.architecture].module_names
    save_adapter(
        folder,
        Adapter("per_expert", adapter.updates),
        config.lora_sites(),
        layout="per_expert",
        module_names=names,
    )
    message = refused(load(server, "too-large", "too-large"), 400, "capacity_exceeded")
    assert "40" in message and "32" in message
    shutil.rmtree(folder)


def test_host_memory_for_adapters_is_limited(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = server.request("GET", "/v1/models", key=EVERYTHING)
    taken = int(server.metrics(ADMIN)["moelora_adapter_host_bytes"])
    assert taken == sum(info.host_bytes for info in server.llm.adapters()) > 0
    monkeypatch.setattr(server.llm.runner.registry, "max_host_bytes", taken)
    message = refused(load(server, "more", "experts-r8"), 400, "capacity_exceeded")
    assert "unload some" in message
    assert server.request("GET", "/v1/models", key=EVERYTHING) == models
    assert load(server, "experts-r8", "experts-r8", load_inplace=True)[0] == 200
    assert complete(server, "experts-r8", EVERYTHING) == 200


# Limits of bodies.


def test_a_body_above_the_limit(server: Served) -> None:
    fits = {"model": MODEL, "prompt": [1], "max_tokens": 1, "user": "x" * (MAX_BODY - 100)}
    assert server.request("POST", "/v1/completions", fits, key=EVERYTHING)[0] == 200
    large = {**fits, "user": "x" * (MAX_BODY + 1)}
    answer = server.request("POST", "/v1/completions", large, key=EVERYTHING)
    refused(answer, 413, "body_too_large")
    # Its length is not told in advance, so it has to be counted.
    chunks = (b"%x\r\n%s\r\n" % (1000, b" " * 1000) for _ in range(MAX_BODY // 1000 + 5))
    answer = server.request(
        "POST",
        "/v1/completions",
        b"".join(chunks) + b"0\r\n\r\n",
        key=EVERYTHING,
        headers={"Transfer-Encoding": "chunked"},
    )
    refused(answer, 413, "body_too_large")
    assert complete(server, MODEL, EVERYTHING) == 200
