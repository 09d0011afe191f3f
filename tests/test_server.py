"""The HTTP server, by the official client: texts, streams, choices, and bad requests."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from moelora_jax import LLM, Prompt, Sampling
from moelora_jax.cli.demo_files import ADAPTERS
from moelora_jax.server.text import TextModel
from tests.conftest import ROOT
from tests.served_model import MODEL, Served, served, tiny_model

PROMPT = "Hello, wörld"
CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
#: The same sampling everywhere: greedy, and never ended by chance.
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
MODELS = (MODEL, *ADAPTERS)


#: CHAT as the model reads it.
RENDERED = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
SAMPLED = Sampling(temperature=1.5, top_k=50, top_p=0.9, seed=8)
ADJUSTED = {
    "min_p": 0.02, "frequency_penalty": 0.7, "presence_penalty": -0.4, "repetition_penalty": 1.4,
    "logit_bias": {5: 1.5, 200: -3.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return tiny_model(folder)


@pytest.fixture(scope="module")
def alone(llm: LLM, folder: Path) -> dict[tuple[str, str, Sampling], list[int]]:
    """What the model generates for single rows, before it is served."""
    text_model = TextModel.load(folder / "model", llm.config.eos_tokens)
    rows = [(PROMPT, model, Sampling()) for model in MODELS]
    rows += [(RENDERED, model, Sampling()) for model in (MODEL, "both-r16")]
    rows += [(PROMPT, "experts-r8", SAMPLED), (PROMPT, "experts-r8", replace(SAMPLED, **ADJUSTED))]

    def generate(text: str, model: str, sampling: Sampling) -> list[int]:
        prompt = Prompt(text_model.encode(text), None if model == MODEL else model)
        (completion,) = llm.generate([prompt], max_new_tokens=24, sampling=sampling, stop_tokens=[])
        return list(completion.tokens)

    return {row: generate(*row) for row in rows}


@pytest.fixture(scope="module")
def server(llm: LLM, alone: object, folder: Path) -> Iterator[Served]:
    with served(llm, folder) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def streamed(chunks: Any) -> tuple[str, str | None]:
    """Text and finish reason of a streamed completion."""
    text, reason = "", None
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.text
            reason = choice.finish_reason or reason
    return text, reason


def error(server: Served, body: Any, path: str = "/v1/completions") -> dict[str, Any]:
    """What is wrong with a request that is answered with 400."""
    status, answer = server.request("POST", path, body)
    assert status == 400, answer
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    return answer["error"]


def body(**values: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": PROMPT, "max_tokens": 2, **values}


# What is answered.


@pytest.mark.parametrize("model", MODELS)
def test_streamed_is_whole_is_alone(server: Served, client: OpenAI, alone: Any, model: str) -> None:
    text_model = server.service.text_model
    options: Any = {"model": model, "prompt": PROMPT, "max_tokens": 24, **GREEDY}
    whole = client.completions.create(**options)
    (choice,) = whole.choices
    assert streamed(client.completions.create(stream=True, **options)) == (choice.text, "length")

    tokens = text_model.encode(PROMPT)
    assert choice.text == text_model.tokenizer.decode(alone[PROMPT, model, Sampling()])
    assert choice.finish_reason == "length"
    assert whole.model == model
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(tokens), 24)


def test_the_model_names_the_adapter(server: Served, client: OpenAI) -> None:
    texts = {
        model: client.completions.create(
            model=model, prompt=PROMPT, max_tokens=12, **GREEDY
        ).choices[0].text
        for model in (*MODELS, *(f"{MODEL}:{name}" for name in ADAPTERS))
    }  # fmt: skip
    assert len(set(texts.values())) == len(MODELS)
    for name in ADAPTERS:
        assert texts[f"{MODEL}:{name}"] == texts[name]


def test_models(client: OpenAI) -> None:
    cards = {card.id: card for card in client.models.list()}
    assert cards.keys() == set(MODELS)
    assert client.models.retrieve("experts-r24").model_dump()["rank"] == 24
    assert client.models.retrieve("experts-r24").model_dump()["parent"] == MODEL
    with pytest.raises(NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("model", [MODEL, "both-r16"])
def test_chat(server: Served, client: OpenAI, alone: Any, model: str) -> None:
    text_model = server.service.text_model
    tokens = text_model.encode(RENDERED)
    expected = text_model.tokenizer.decode(alone[RENDERED, model, Sampling()][:10])
    options: Any = {"model": model, "messages": CHAT, "max_tokens": 10, **GREEDY}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.prompt_tokens == len(tokens)

    chunks = list(client.chat.completions.create(stream=True, **options))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_a_chat_may_take_all_positions_that_are_left(server: Served, client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.total_tokens == server.llm.runtime.cache.max_length
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}]
    assert client.chat.completions.create(
        model=MODEL, messages=parts, max_completion_tokens=1
    ).choices[0].finish_reason in ("length", "stop")


def test_each_token_comes_while_the_next_step_runs(
    server: Served, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one without text; a step more than that is not run before the client has it."""
    run, allowed = server.llm.runner.run, threading.Semaphore(2)

    def wait_and_run(*arguments: Any) -> Any:
        assert allowed.acquire(timeout=10), "the client has not got the token of the step before"
        return run(*arguments)

    monkeypatch.setattr(server.llm.runner, "run", wait_and_run)
    options: Any = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "stream": True, **GREEDY}
    texts = []
    # What may be the beginning of a stop string is held back.
    for chunk in client.completions.create(stop=["\ufffd!"], **options):
        texts.append(chunk.choices[0].text)
        allowed.release()
    assert len(texts) == 24
    assert "" in texts[:-1], "each token of this model had a text"


def test_each_token_of_a_chat_has_a_chunk(client: OpenAI) -> None:
    chunks = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=10, stream=True, **GREEDY
    )
    contents = [chunk.choices[0].delta.content for chunk in chunks]
    assert contents[0] == "" and contents[-1] is None  # The role, and the finish reason.
    # Without text at its end the last token needs no chunk but that of the finish reason.
    assert len(contents[1:-1]) in (9, 10)
    assert "" in contents[1:-1], "each token of this model had a text"


def test_usage_of_a_stream(client: OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            max_tokens=5,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 10


def test_usage_in_every_event(server: Served) -> None:
    sent = body(prompt=PROMPT, max_tokens=5, ignore_eos=True)
    sent["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    usages = [chunk["usage"] for chunk in events(server, "/v1/completions", sent)]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts) and counts[-1] == 5 and counts[0] >= 1
    assert {usage["prompt_tokens"] for usage in usages} == {usages[-1]["prompt_tokens"]}


def test_several_prompts_and_choices(server: Served, client: OpenAI) -> None:
    prompts = ["one", "two", [1, 2, 3]]
    single = [
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=6, **GREEDY)
        .choices[0].text
        for prompt in prompts
    ]  # fmt: skip
    several = client.completions.create(
        model=MODEL, prompt=["one", "two"], max_tokens=6, n=2, **GREEDY
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in several.choices]
    assert texts == [single[0], single[0], single[1], single[1]]
    chunks = client.completions.create(
        model=MODEL, prompt=["one", "two"], max_tokens=6, n=2, stream=True, **GREEDY
    )
    joined = [""] * 4
    for chunk in chunks:
        joined[chunk.choices[0].index] += chunk.choices[0].text
    assert joined == texts
    tokens = client.completions.create(model=MODEL, prompt=[1, 2, 3], max_tokens=6, **GREEDY)
    assert tokens.choices[0].text == single[2]


def test_a_seed_repeats_its_choices(server: Served, client: OpenAI, alone: Any) -> None:
    def sample(seed: int | None) -> list[str]:
        answer = client.completions.create(
            model="experts-r8", prompt=PROMPT, max_tokens=8, n=3, seed=seed,
            temperature=SAMPLED.temperature, top_p=SAMPLED.top_p,
            extra_body={"ignore_eos": True, "top_k": SAMPLED.top_k},
        )  # fmt: skip
        return [choice.text for choice in answer.choices]

    first = sample(7)
    assert first == sample(7)
    assert len({*first, *sample(8), *sample(None)}) > 5
    assert sample(-1) == sample(2**31 - 1)
    # The second choice has the next seed.
    tokens = alone[PROMPT, "experts-r8", SAMPLED][:8]
    assert first[1] == server.service.text_model.tokenizer.decode(tokens)


def test_echo(client: OpenAI) -> None:
    plain = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4, **GREEDY)
    for prompt in (PROMPT, "tokens"):
        options: Any = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "echo": True, **GREEDY}
        echoed = client.completions.create(**options).choices[0].text
        assert echoed.startswith(prompt)
        assert streamed(client.completions.create(stream=True, **options))[0] == echoed
    assert (
        client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4, echo=True, **GREEDY)
        .choices[0].text
        == PROMPT + plain.choices[0].text
    )  # fmt: skip


# Where it stops.


def test_stop_tokens(server: Served, client: OpenAI, alone: Any) -> None:
    text_model = server.service.text_model
    tokens = alone[PROMPT, MODEL, Sampling()][:20]
    stop = tokens[9]
    first = tokens.index(stop)
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0,
        extra_body={"ignore_eos": True, "stop_token_ids": [stop]},
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == text_model.tokenizer.decode(tokens[:first])
    assert answer.usage is not None and answer.usage.completion_tokens == first + 1


def test_stop_strings_across_tokens(server: Served, client: OpenAI) -> None:
    """Every string of every length that occurs stops the text where it begins, streamed or not."""
    text = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, **GREEDY)
    whole = text.choices[0].text
    for start, length in ((3, 1), (3, 2), (5, 4), (2, 6)):
        stop = whole[start : start + length]
        options: Any = {
            "model": MODEL, "prompt": PROMPT, "max_tokens": 20, "stop": [stop, "not in it"],
            **GREEDY,
        }  # fmt: skip
        answer = client.completions.create(**options).choices[0]
        assert answer.text == whole[: whole.find(stop)], repr(stop)
        assert answer.finish_reason == "stop"
        assert streamed(client.completions.create(stream=True, **options)) == (answer.text, "stop")
    server.wait_until_idle()


# Log-probabilities.


def test_logprobs_of_completions(server: Served, client: OpenAI) -> None:
    options: Any = {"model": "both-r16", "prompt": PROMPT, "max_tokens": 8, **GREEDY}
    choice = client.completions.create(logprobs=3, **options).choices[0]
    assert choice.logprobs is not None
    tokens, values = choice.logprobs.tokens, choice.logprobs.token_logprobs
    tops, offsets = choice.logprobs.top_logprobs, choice.logprobs.text_offset
    assert tokens and values and tops and offsets
    assert len(tokens) == len(values) == len(tops) == len(offsets) == 8
    for token, value, top in zip(tokens, values, tops, strict=True):
        assert len(top) == 3
        assert top[token] == value == max(top.values())  # Greedy takes the most probable.
        assert value < 0
    for token, offset in zip(tokens, offsets, strict=True):
        if not token.startswith("bytes:"):
            # Bytes before it that were no character yet were no text yet, either.
            assert choice.text[offset:].lstrip("\ufffd").startswith(token)
    chunks = [
        chunk.choices[0].logprobs
        for chunk in client.completions.create(logprobs=3, stream=True, **options)
    ]
    assert [token for chunk in chunks for token in chunk.tokens] == tokens
    assert [value for chunk in chunks for value in chunk.token_logprobs] == values
    assert [offset for chunk in chunks for offset in chunk.text_offset] == offsets
    assert client.completions.create(**options).choices[0].logprobs is None

    # A token that is none of the best is listed with them all the same.
    options = {**options, "temperature": 5.0, "seed": 1}
    chosen = client.completions.create(logprobs=1, **options).choices[0].logprobs
    assert chosen is not None and chosen.top_logprobs and chosen.tokens and chosen.token_logprobs
    assert 2 in {len(top) for top in chosen.top_logprobs} <= {1, 2}
    for token, value, top in zip(
        chosen.tokens, chosen.token_logprobs, chosen.top_logprobs, strict=True
    ):
        assert top[token] == value


def test_logprobs_of_chats(client: OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": CHAT, "max_tokens": 6, "logprobs": True, **GREEDY}
    choice = client.chat.completions.create(top_logprobs=2, **options).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    content = choice.logprobs.content
    assert len(content) == 6
    data = b"".join(bytes(entry.bytes or ()) for entry in content)
    assert data.decode(errors="replace") == choice.message.content
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob
    chunks = client.chat.completions.create(top_logprobs=2, stream=True, **options)
    parts = [
        entry
        for chunk in chunks
        if (logprobs := chunk.choices[0].logprobs) is not None
        for entry in logprobs.content or ()
    ]
    assert parts == content
    assert client.chat.completions.create(**options).choices[0].logprobs is not None


def test_logprobs_end_where_the_text_does(client: OpenAI) -> None:
    options: Any = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20, "logprobs": 0, **GREEDY}
    whole = client.completions.create(**options).choices[0]
    stop = whole.text[5:8]
    stopped = client.completions.create(stop=stop, **options).choices[0]
    assert stopped.logprobs is not None and stopped.logprobs.text_offset is not None
    assert all(offset < len(stopped.text) for offset in stopped.logprobs.text_offset)


# Tokens: what a trainer learns from must be the tokens that were sampled.


@pytest.mark.parametrize("end", ["length", "stop token", "stop string"])
def test_token_ids(server: Served, alone: Any, end: str) -> None:
    """Prompt and completion come as tokens, with a log-probability for each of them."""
    text_model = server.service.text_model
    tokens, more = alone[PROMPT, MODEL, Sampling()][:16], {}
    if end == "stop token":
        more = {"stop_token_ids": [tokens[9]]}
        tokens = tokens[: tokens.index(tokens[9]) + 1]
    elif end == "stop string":
        more = {"stop": text_model.tokenizer.decode(tokens)[4:6]}
    sent = body(
        prompt=PROMPT, max_tokens=16, temperature=0, ignore_eos=True, n=2, logprobs=1,
        return_token_ids=True, return_tokens_as_token_ids=True, **more,
    )  # fmt: skip
    answer = server.request("POST", "/v1/completions", sent)[1]
    lengths = []
    for choice in answer["choices"]:
        assert choice["prompt_token_ids"] == text_model.encode(PROMPT)
        lengths.append(len(choice["token_ids"]))
        assert choice["token_ids"] == tokens[: lengths[-1]]
        names = [f"token_id:{token}" for token in choice["token_ids"]]
        assert choice["logprobs"]["tokens"] == names
        assert [max(top, key=top.get) for top in choice["logprobs"]["top_logprobs"]] == names
    assert sum(lengths) == answer["usage"]["completion_tokens"]
    assert set(lengths) == {len(tokens)} if end != "stop string" else max(lengths) < 16

    chunks = events(server, "/v1/completions", sent)
    for index, choice in enumerate(answer["choices"]):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [token for part in mine for token in part["token_ids"]] == choice["token_ids"]
        prompts = [part.get("prompt_token_ids") for part in mine]
        assert prompts == [choice["prompt_token_ids"]] + [None] * (len(mine) - 1)


def test_token_ids_of_chats(server: Served) -> None:
    sent: Any = {
        "model": MODEL, "messages": CHAT, "max_tokens": 24, "temperature": 0, "logprobs": True,
        "return_token_ids": True,
    }  # fmt: skip
    free = server.request("POST", "/v1/chat/completions", {**sent, "ignore_eos": True})[1]
    sent["stop_token_ids"] = [free["choices"][0]["token_ids"][7]]
    answer = server.request("POST", "/v1/chat/completions", sent)[1]
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert answer["prompt_token_ids"] == server.service.text_model.encode(RENDERED)
    assert choice["token_ids"][-1] == sent["stop_token_ids"][0]
    assert len(choice["token_ids"]) == answer["usage"]["completion_tokens"]
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])
    chunks = events(server, "/v1/chat/completions", sent)
    assert [chunk.get("prompt_token_ids") for chunk in chunks][:2] == [
        answer["prompt_token_ids"], None,
    ]  # fmt: skip
    parts = [chunk["choices"][0].get("token_ids", []) for chunk in chunks]
    assert [token for part in parts for token in part] == choice["token_ids"]


def test_penalties_and_biases(server: Served, alone: Any) -> None:
    adjusted = replace(SAMPLED, **ADJUSTED)
    answer = server.request(
        "POST",
        "/v1/completions",
        {**asdict(adjusted), "model": "experts-r8", "prompt": PROMPT, "max_tokens": 24}
        | {"ignore_eos": True, "return_token_ids": True},
    )[1]
    tokens = answer["choices"][0]["token_ids"]
    assert tokens == alone[PROMPT, "experts-r8", adjusted]
    assert tokens != alone[PROMPT, "experts-r8", SAMPLED]


def test_a_least_number_of_tokens(server: Served, alone: Any) -> None:
    free = alone[PROMPT, MODEL, Sampling()]
    text = server.service.text_model.tokenizer.decode(free)
    sent = body(max_tokens=24, temperature=0, ignore_eos=True, return_token_ids=True)

    def ask(**values: Any) -> list[int]:
        (choice,) = server.request("POST", "/v1/completions", {**sent, **values})[1]["choices"]
        return choice["token_ids"]

    stop: dict[str, Any] = {"stop_token_ids": free[2:3]}
    assert ask(**stop) == free[: free.index(free[2]) + 1]
    later = ask(**stop, min_tokens=8)
    assert len(later) > 8
    assert free[2] not in later[:8]

    assert len(ask(stop=text[2])) <= 8
    later = ask(stop=text[2], min_tokens=8)
    assert len(later) > 8
    assert later == free[: len(later)]


def events(server: Served, path: str, sent: dict[str, Any]) -> list[dict[str, Any]]:
    status, text = server.request("POST", path, {**sent, "stream": True})
    assert status == 200, text
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def test_tokenize(server: Served) -> None:
    text_model = server.service.text_model
    tokens = text_model.encode(PROMPT)
    status, answer = server.request("POST", "/tokenize", {"model": MODEL, "prompt": PROMPT})
    assert status == 200
    assert answer["tokens"] == tokens and answer["count"] == len(tokens)
    assert answer["max_model_len"] == server.llm.runtime.cache.max_length
    assert server.request("POST", "/detokenize", {"tokens": tokens}) == (200, {"prompt": PROMPT})
    asked = {"messages": CHAT, "return_token_strs": True}
    answer = server.request("POST", "/tokenize", asked)[1]
    assert answer["tokens"] == text_model.encode(RENDERED)
    assert [text_model.tokenizer.token_to_id(name) for name in answer["token_strs"]] == (
        answer["tokens"]
    )
    back = server.request("POST", "/detokenize", {"tokens": answer["tokens"]})[1]
    assert back == {"prompt": RENDERED}  # Special tokens, too.
    for bad, param in (
        ({}, "prompt"),
        ({"prompt": "a", "messages": CHAT}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"messages": CHAT, "add_special_tokens": True}, "add_special_tokens"),
        ({"prompt": "a", "model": "nobody"}, "model"),
    ):
        status, answer = server.request("POST", "/tokenize", bad)
        assert status in (400, 404) and answer["error"]["param"] == param
    for tokens in ([-1], ["a"]):
        assert error(server, {"tokens": tokens}, "/detokenize")["param"] == "tokens"
    assert server.request("POST", "/detokenize", {"tokens": [2**31 - 1]})[1] == {"prompt": ""}


def test_an_answer_that_was_begun_is_continued(server: Served, client: OpenAI) -> None:
    text = RENDERED + "I say"
    expected = client.completions.create(model=MODEL, prompt=text, max_tokens=8, **GREEDY)
    messages = [*CHAT, {"role": "assistant", "content": "I say"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False, "ignore_eos": True}
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=8, temperature=0, extra_body=extra
    )
    assert answer.choices[0].message.content == expected.choices[0].text
    assert answer.usage == expected.usage
    both = {"model": MODEL, "messages": messages, "continue_final_message": True}
    assert error(server, both, "/v1/chat/completions")["param"] == "continue_final_message"


# Bad requests.


@pytest.mark.parametrize(
    ("values", "param", "code"),
    [
        ({"temperature": -0.1}, "temperature", "invalid_request"),
        ({"temperature": "hot"}, "temperature", "invalid_request"),
        ({"temperature": True}, "temperature", "invalid_request"),
        ({"top_p": 0}, "top_p", "invalid_request"),
        ({"top_p": 1.5}, "top_p", "invalid_request"),
        ({"top_k": -2}, "top_k", "invalid_request"),
        ({"n": 0}, "n", "invalid_request"),
        ({"n": 129}, "n", "invalid_request"),
        ({"n": 2.5}, "n", "invalid_request"),
        ({"max_tokens": 0}, "max_tokens", "invalid_request"),
        ({"max_tokens": "5"}, "max_tokens", "invalid_request"),
        ({"seed": 2**64}, "seed", "invalid_request"),
        ({"logprobs": 21}, "logprobs", "invalid_request"),
        ({"stop": ""}, "stop", "invalid_request"),
        ({"stop": ["a", ""]}, "stop", "invalid_request"),
        ({"prompt": []}, "prompt", "invalid_request"),
        ({"prompt": [[]]}, None, "invalid_request"),
        ({"prompt": ""}, None, "invalid_request"),
        ({"prompt": [1, 272]}, None, "invalid_request"),
        ({"prompt": [-1]}, "prompt", "invalid_request"),
        ({"prompt": {"text": "a"}}, "prompt", "invalid_request"),
        ({"prompt": ["a"] * 129}, "prompt", "invalid_request"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "invalid_request"),
        ({"model": 3}, "model", "invalid_request"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_request"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "unsupported_parameter"),
        ({"use_beam_search": True}, "use_beam_search", "unsupported_parameter"),
        ({"max_tokens": 200}, None, "context_length_exceeded"),
        ({"prompt": "a" * 128}, None, "context_length_exceeded"),
        ({"echo": True, "logprobs": 1}, "echo", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_request"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "invalid_request"),
        ({"logit_bias": {"-5": 1}}, "logit_bias", "invalid_request"),
        ({"logit_bias": {"5": True}}, "logit_bias", "invalid_request"),
        ({"logit_bias": [5]}, "logit_bias", "invalid_request"),
        ({"logit_bias": dict.fromkeys(map(str, range(301)), 1)}, "logit_bias", "invalid_request"),
        ({"logit_bias": {"272": 1}}, None, "invalid_request"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "invalid_request"),
        ({"presence_penalty": -2.5}, "presence_penalty", "invalid_request"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_request"),
        ({"min_p": 1.5}, "min_p", "invalid_request"),
        ({"min_tokens": -1}, "min_tokens", "invalid_request"),
        ({"min_tokens": 9, "max_tokens": 8}, None, "invalid_request"),
        ({"skip_special_tokens": False}, "skip_special_tokens", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"temprature": 0}, "temprature", "unknown_parameter"),
        ({"messages": []}, "messages", "unknown_parameter"),
    ],
)
def test_bad_values_are_named(
    server: Served, values: dict[str, Any], param: str | None, code: str
) -> None:
    found = error(server, body(**values))
    assert (found["param"], found["code"]) == (param, code)
    assert found["type"] == "invalid_request_error"
    if param is not None:
        assert param in found["message"]


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "seed", "min_p", "frequency_penalty", "repetition_penalty"]
)
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(server: Served, name: str, value: str) -> None:
    sent = json.dumps(body()).removesuffix("}") + f', "{name}": {value}}}'
    assert error(server, sent.encode())["param"] in (name, None)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "tiny", "prompt": "\xc3"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    ],
)
def test_bodies_that_are_no_requests(server: Served, sent: bytes) -> None:
    error(server, sent)


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "no role"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"prompt": "text"}, "prompt"),
    ],
)
def test_bad_chats_are_named(server: Served, values: dict[str, Any], param: str) -> None:
    chat = {"model": MODEL, "messages": CHAT, "max_tokens": 2, **values}
    assert error(server, chat, "/v1/chat/completions")["param"] == param


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"stop": ["a", ""]}, "stop.1"),
        ({"prompt": [[1], [2, -1]]}, "prompt.1.1"),
        ({"prompt": 5}, "prompt"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ],
)
def test_the_part_that_is_wrong_is_named(
    server: Served, values: dict[str, Any], where: str
) -> None:
    assert error(server, body(**values))["message"].startswith(f"{where}: ")


def test_a_picture_is_named(server: Served) -> None:
    content = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "b"}}]
    chat = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
    message = error(server, chat, "/v1/chat/completions")["message"]
    assert message == "messages.0.content.1.type: Input should be 'text'"


def test_what_asks_for_nothing_is_accepted(server: Served) -> None:
    neutral = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "suffix": None,
        "repetition_penalty": 1.0, "min_p": 0.0, "min_tokens": 0, "skip_special_tokens": True,
        "best_of": 1, "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto",
        "stop": None, "seed": None, "logprobs": None, "top_k": -1, "response_format": None,
        "include_stop_str_in_output": False, "spaces_between_special_tokens": True,
        "use_beam_search": False, "length_penalty": 1.0, "truncate_prompt_tokens": None,
        "prompt_logprobs": None, "bad_words": [], "request_id": "a", "structured_outputs": None,
    }  # fmt: skip
    status, answer = server.request("POST", "/v1/completions", body(**neutral))
    assert status == 200, answer
    neutral = {
        "logprobs": False, "top_logprobs": 0, "echo": False, "chat_template": None,
        "documents": None, "continue_final_message": False, "mm_processor_kwargs": None,
    }  # fmt: skip
    chat = {"model": MODEL, "messages": CHAT, "max_tokens": 2, **neutral}
    status, answer = server.request("POST", "/v1/chat/completions", chat)
    assert status == 200, answer


def test_unknown_models_and_paths(server: Served, client: OpenAI) -> None:
    for model in ("gpt-4o", f"{MODEL}:nobody", "nobody:experts-r8", "", f"{MODEL}:"):
        status, answer = server.request("POST", "/v1/completions", body(model=model))
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert answer["error"]["param"] == "model"
    with pytest.raises(NotFoundError, match="gpt-4o"):
        client.completions.create(model="gpt-4o", prompt="a")
    with pytest.raises(BadRequestError, match="temperature"):
        client.completions.create(model=MODEL, prompt="a", temperature=-1)
    assert server.request("GET", "/v1/nothing")[0] == 404
    assert server.request("GET", "/v1/nothing")[1]["error"]["code"] == "not_found"
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/v1/completions")
        response = connection.getresponse()
        assert (response.status, response.getheader("allow")) == (405, "POST")
    status, answer = server.request(
        "POST", "/v1/completions", body(), headers={"Content-Type": "text/plain"}
    )
    assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")


# What it tells about itself.


def test_metrics_add_up(server: Served, client: OpenAI) -> None:
    server.wait_until_idle()
    before = server.metrics()
    for model in (MODEL, "experts-r8"):
        client.completions.create(model=model, prompt=[1, 2, 3], max_tokens=5, n=2, **GREEDY)
    server.wait_until_idle()
    after = server.metrics()

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more("moelora_requests_submitted_total") == 4
    assert more("moelora_prompt_tokens_total") == 12
    assert more("moelora_generated_tokens_total") == 20
    assert more('moelora_requests_finished_total{reason="length"}') == 4
    for name in (MODEL, "experts-r8"):
        assert more(f'moelora_adapter_requests_total{{adapter="{name}"}}') == 2
        assert more(f'moelora_adapter_generated_tokens_total{{adapter="{name}"}}') == 10
        assert more(f'moelora_time_to_first_token_seconds_count{{adapter="{name}"}}') == 2
        assert more(f'moelora_inter_token_latency_seconds_count{{adapter="{name}"}}') == 8
        assert more(f'moelora_request_duration_seconds_count{{adapter="{name}"}}') == 2
    assert more('moelora_http_responses_total{path="/v1/completions",status="200"}') == 2
    assert after["moelora_compilations_total"] == 0
    assert after["moelora_address_changes_total"] == 0
    assert after["moelora_kv_blocks_used"] == 0
    assert after["moelora_requests_running"] == after["moelora_requests_waiting"] == 0


def test_health(server: Served) -> None:
    assert server.request("GET", "/health") == (200, {"status": "ok"})


def test_the_guide_names_metrics_and_errors(server: Served) -> None:
    guide = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert server.request("POST", "/v1/completions", body(max_tokens=2, ignore_eos=True))[0] == 200
    names = {re.sub(r"(_bucket|_sum|_count|_created)?(\{.*)?$", "", n) for n in server.metrics()}
    assert len(names) > 25
    for name in names:
        assert f"`{name.removeprefix('moelora_')}" in guide, name
    sources = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "moelora_jax" / "server").glob("*.py")
    )
    errors = re.findall(r'ApiError\(\s*\d{3},\s*(?:f?".*"\s*)+,\s*"([a-z_]+)"', sources)
    assert len(set(errors)) > 8
    for code in {*errors, "queue_full", "engine_error", "capacity_exceeded", "invalid_adapter"}:
        assert f"`{code}`" in guide, code
