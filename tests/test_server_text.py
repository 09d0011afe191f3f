"""Text to tokens and back: parts of characters, stop strings, chat templates."""

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from moelora_jax import CheckpointError, RequestError
from moelora_jax.cli.demo_files import CHAT_TEMPLATE, write_tokenizer
from moelora_jax.engine.requests import Request, TokenOutput
from moelora_jax.engine.stream import Stream
from moelora_jax.server.chat_template import ChatTemplate, read_chat_template
from moelora_jax.server.detokenizer import Detokenizer, StopStrings
from moelora_jax.server.generation import Completion, Generation
from moelora_jax.server.metrics import Metrics
from moelora_jax.server.responses import CompletionAnswer
from moelora_jax.server.text import TextModel, token_text

SAMPLES = ["Grüße, 世界! 🤗👩‍👩‍👧‍👦 naïve café", "ab ab abab", "  two  spaces\n\ttab ", "éé"]


def byte_level() -> Tokenizer:
    """Merges some bytes across characters, as real vocabularies do."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLES * 3, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As SentencePiece: spaces are ▁, unknown characters are bytes like <0xE4>."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return tokenizer


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}


def detokenize(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.one_of(st.sampled_from(SAMPLES), st.text()))
def test_parts_are_the_whole(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode(text).ids
    parts = detokenize(tokenizer, tokens)
    assert "".join(parts) == tokenizer.decode(tokens)


@given(tokens=st.lists(st.integers(0, 303), max_size=30))
def test_parts_of_random_tokens_are_the_whole(tokens: list[int]) -> None:
    """Also where bytes are no characters, and where tokens are special or unknown.

    With byte fallback, one byte that fits nowhere makes those before it unreadable, too, and they
    may be out already; so this is promised of byte-level tokenizers only.
    """
    tokenizer = TOKENIZERS["byte level"]
    assert tokenizer.get_vocab_size() == 300
    assert "".join(detokenize(tokenizer, tokens)) == tokenizer.decode(tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_character_comes_whole(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode("x🦀y").ids
    parts = detokenize(tokenizer, tokens)
    assert len(tokens) >= 5
    assert "🦀" in parts  # Nothing before its last byte, and no replacement character.
    assert not any("\ufffd" in part for part in parts)
    cut = detokenize(tokenizer, tokens[:-2])
    assert cut[-1].startswith("\ufffd")


async def stream_tokens(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """The texts of the chunks that a client gets."""
    text_model = TextModel(tokenizer, None, frozenset())
    stream = Stream(Request((0,)), lambda: None)
    for token in tokens[:-1]:
        stream.put(TokenOutput(token))
    stream.put(TokenOutput(tokens[-1], finish_reason="length"))
    metrics = Metrics(lambda: None, lambda _: False, "base")  # type: ignore[arg-type, return-value]
    completion = Completion(0, stream, text_model, StopStrings([]), metrics, 0.0)
    answer = CompletionAnswer("base", text_model, with_logprobs=False, echo=lambda _: "")
    events = answer.events(Generation([completion], 1))
    lines = b"".join([event async for event in events]).decode().splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if "{" in line]
    return [chunk["choices"][0]["text"] for chunk in chunks]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", SAMPLES)
def test_each_token_of_a_stream_has_a_chunk_of_whole_characters(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode(text).ids
    chunks = asyncio.run(stream_tokens(tokenizer, tokens))
    assert len(chunks) == len(tokens)
    assert "".join(chunks) == tokenizer.decode(tokens)
    assert not any("\ufffd" in chunk for chunk in chunks)
    assert not text.startswith("Grüße") or "" in chunks  # Some tokens are parts of characters.


def test_special_tokens_have_no_text() -> None:
    tokenizer = TOKENIZERS["byte level"]
    end = tokenizer.token_to_id("<|end|>")
    tokens = tokenizer.encode("ab", add_special_tokens=False).ids
    assert "".join(detokenize(tokenizer, [end, *tokens, end, *tokens, end])) == "abab"


def test_tokens_without_text_are_not_decoded_again_and_again() -> None:
    tokenizer = TOKENIZERS["byte level"]
    end, unknown = tokenizer.token_to_id("<|end|>"), tokenizer.get_vocab_size() + 1
    tokens = tokenizer.encode("a🦀b").ids
    detokenizer = TextModel(tokenizer, None, frozenset()).detokenizer()
    without = [detokenizer.push(token) for token in [*[end, unknown] * 500, *tokens[:2]]]
    assert "".join(without) == "a"
    assert len(detokenizer._tokens) == 2
    assert "".join(map(detokenizer.push, [end, *tokens[2:]])) == "🦀b"


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
def test_stop_strings(text: str, stops: list[str], cuts: list[int]) -> None:
    """However the text is cut up: nothing of a stop string comes out, and all before it does."""
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    matcher = StopStrings(stops)
    out = "".join(
        matcher.push(text[a:b]) for a, b in pairwise(edges)
    ) + matcher.finish()  # fmt: skip
    starts = [text.find(stop) for stop in stops if stop in text]
    assert matcher.found == bool(starts)
    if not starts:
        assert out == text
    else:
        # Of several that overlap, the one that ends first may win, as it comes first.
        assert text.startswith(out)
        assert not any(stop in out for stop in stops)
        assert any(text.startswith(stop, len(out)) for stop in stops)


def test_only_what_may_be_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["</end>", "\n\n"])
    assert [matcher.push(part) for part in ("a<", "/e", "x\n", "b")] == ["a", "", "</ex", "\nb"]
    assert matcher.push("c</en") == "c"
    assert matcher.finish() == "</en"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_of_tokens(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    model = TextModel(tokenizer, None, frozenset())
    tokens = tokenizer.encode("é a🤗 b").ids
    joined = b"".join(model.token_bytes(token) for token in tokens)
    assert joined.decode().lstrip() == "é a🤗 b"
    assert b" " in [model.token_bytes(token) for token in tokens]
    assert model.token_bytes(10**6) == b""
    assert token_text(b"\xe2\x80") == "bytes:\\xe2\\x80"


def test_bytes_of_other_tokenizers_are_their_text() -> None:
    tokenizer = Tokenizer(WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    model = TextModel(tokenizer, None, frozenset())
    assert [model.token_bytes(token) for token in (1, 2)] == [b" a", b"b"]


# Chat templates.

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Grüße!"},
    {"role": "assistant", "content": "Hi.", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
    {"role": "user", "content": "And now?"},
]
#: What real templates do: loops with break, namespaces, JSON, slices, tests, macros, whitespace.
TEMPLATE = """\
{%- macro head(role) -%}<|{{ role }}|>{%- endmacro -%}
{{ bos_token }}
{%- set ns = namespace(count=0) %}
{%- for message in messages[:3] %}
    {%- if message.role == 'nobody' %}{% break %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
{{ head(message['role']) }}{{ message.content | trim }}
    {%- if message.tool_calls is defined and message.tool_calls %}
{{ message.tool_calls | tojson(indent=2) }}
    {%- endif %}
    {% if loop.last %}{{ ns.count }}{% endif %}
{%- endfor %}
{% generation %}marked{% endgeneration %}
{% if add_generation_prompt %}
<|assistant|>{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{% endif %}
{{ messages | length }} {{ tools is none }} {{ "ä" | tojson }}{{ eos_token }}
"""


@pytest.mark.parametrize("template", [TEMPLATE, CHAT_TEMPLATE])
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
def test_templates_render_as_in_transformers(template: str, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZERS["byte level"], bos_token="<s>", eos_token="<|end|>"
    )
    special_tokens = {"bos_token": "<s>", "eos_token": "<|end|>"}
    for add_generation_prompt in (True, False):
        expected = theirs.apply_chat_template(
            MESSAGES,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **options,
        )
        assert expected == ChatTemplate(template, special_tokens).render(
            MESSAGES, add_generation_prompt=add_generation_prompt, options=options
        )


@pytest.mark.parametrize("content", ["I think", "I think ", " I think\n", "<|im_end|>"])
@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}</s>{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ '</s>' if loop.last }}{% endfor %}",
    ],
)
def test_a_message_is_continued_as_in_transformers(template: str, content: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS["byte level"])
    messages = [*MESSAGES, {"role": "assistant", "content": content}]
    expected = theirs.apply_chat_template(
        messages, chat_template=template, tokenize=False, continue_final_message=True
    )
    assert expected == ChatTemplate(template).render(
        messages, add_generation_prompt=False, continue_final_message=True
    )


def test_special_tokens_around_a_text() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<s>"])
    (begin,) = tokenizer.encode("<s>").ids
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    text_model = TextModel(tokenizer, ChatTemplate("a"), frozenset())
    alone = text_model.encode("a", add_special_tokens=False)
    assert text_model.encode("a") == [begin, *alone]
    assert text_model.encode_chat(MESSAGES) == alone  # The template writes them.


def test_a_message_that_is_not_written_cannot_be_continued() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    with pytest.raises(RequestError, match="nothing can go on"):
        template.render(MESSAGES, add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ messages[7].content + 1 }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_templates_that_fail(template: str) -> None:
    with pytest.raises(RequestError, match="chat template"):
        ChatTemplate(template).render(MESSAGES)


def test_a_template_that_is_none() -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate("{% for %}")


def test_where_templates_are_read_from(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    messages = [{"role": "user", "content": "x"}]

    def text_model() -> TextModel:
        return TextModel.load(tmp_path, (0,))

    assert text_model().stop_tokens == {0, 258}
    with pytest.raises(RequestError, match="--chat-template"):
        text_model().encode_chat(messages)

    config = tmp_path / "tokenizer_config.json"
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    for template in ("yes", several):
        config.write_text(json.dumps({"chat_template": template}))
        template_read = read_chat_template(tmp_path)
        assert template_read is not None and template_read.render(messages) == "yes"
    config.write_text(
        json.dumps({"chat_template": "no", "eos_token": {"content": "<end>"}, "bos_token": None})
    )
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}own{{ eos_token }}")
    assert text_model().encode_chat(messages) == text_model().encode("own<end>")
    own = tmp_path / "other.jinja"
    own.write_text("mine")
    mine = TextModel.load(tmp_path, (), chat_template=own)
    assert mine.encode_chat(messages) == mine.encode("mine")

    config.write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        text_model()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.* AutoTokenizer"):
        text_model()


@pytest.mark.parametrize(
    "template",
    [
        [{"name": "rag", "template": "a"}, {"name": "tool_use", "template": "b"}],
        [{"name": "default"}, "a"],
        ["a"],
        {"default": "a"},
        3,
    ],
)
def test_templates_without_a_default_are_refused(tmp_path: Path, template: object) -> None:
    """transformers does not choose one either; a file of the user's is asked for."""
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: .*--chat-template"):
        read_chat_template(tmp_path)
    own = tmp_path / "own.jinja"
    own.write_text("mine")
    assert read_chat_template(tmp_path, own) is not None


@pytest.mark.parametrize("eos", ["</s>", [[2]], [2, "x"], 1.5, True])
def test_stop_tokens_that_are_no_tokens_are_refused(tmp_path: Path, eos: object) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        TextModel.load(tmp_path, ())
