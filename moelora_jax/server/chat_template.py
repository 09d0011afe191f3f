"""Renders the chat templates of Hugging Face checkpoints.

A template is a program in Jinja that comes with the checkpoint. transformers renders it in Jinja's
sandbox with a few names of its own, and so does this module: importing transformers for it would
cost seconds and hundreds of megabytes, and PyTorch if that is installed. A test holds both equal.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moelora_jax.errors import CheckpointError, RequestError

#: Names in tokenizer_config.json that templates may use.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


#: Marks where the content of a message ends: it is no text that anybody would send.
_END = "\ue000 end of the final message \ue000 "


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the template.
        special_tokens: their texts by name, such as ``bos_token``.

    Raises:
        CheckpointError: it is not a template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateError as cause:
            raise CheckpointError(f"the chat template is not valid: {cause}") from cause

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, up to where the answer begins.

        Args:
            messages: of plain JSON values, with ``role`` and ``content``.
            add_generation_prompt: whether the beginning of an answer follows.
            continue_final_message: whether to leave out what follows the last message's content, so
                that the answer continues it.
            options: more names for the template, such as ``enable_thinking``.

        Raises:
            RequestError: the template refuses the messages or fails on them.
        """
        if continue_final_message:
            last = dict(messages[-1])
            last["content"] = f"{last.get('content') or ''}{_END}"
            messages = [*messages[:-1], last]
        names = {
            **self._special_tokens,
            **(options or {}),
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(names)
        except Exception as cause:  # A template is a program: it may fail in any way.
            raise RequestError(
                f"the chat template does not accept these messages: {cause}"
            ) from cause
        if not continue_final_message:
            return text
        before, mark, after = text.rpartition(_END.rstrip())
        if not mark:
            raise RequestError(
                "the chat template does not write what the last message says: nothing can go on "
                "from there"
            )
        # A template that cuts off spaces would have done so before the mark, too.
        return before if after.startswith(" ") else before.rstrip()


def read_chat_template(folder: Path, file: Path | None = None) -> ChatTemplate | None:
    """The chat template of a checkpoint folder, or None if it has none.

    Args:
        folder: with ``chat_template.jinja``, or ``chat_template`` in ``tokenizer_config.json``.
        file: a template to use instead.

    Raises:
        CheckpointError: a file is damaged, or has several templates and none called default.
    """
    config = folder / "tokenizer_config.json"
    values = _read_json(config)
    special_tokens = {}
    for name in _SPECIAL_TOKENS:
        token = values.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            special_tokens[name] = text

    source: str | None
    own = file or folder / "chat_template.jinja"
    if file is not None or own.exists():
        try:
            source = own.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as cause:
            raise CheckpointError(f"{own}: not a readable text file: {cause}") from cause
    else:
        source = _default_template(values.get("chat_template"), config)
    return None if source is None else ChatTemplate(source, special_tokens)


def _default_template(value: object, path: Path) -> str | None:
    """The template itself, or the one called default of several."""
    if isinstance(value, list):
        of_name = [t for t in value if isinstance(t, dict) and t.get("name") == "default"]
        value = of_name[0].get("template", value) if of_name else value
    if value is None or isinstance(value, str):
        return value
    raise CheckpointError(
        f"{path}: chat_template is neither a text nor a list with one that is named 'default'; "
        "choose a file with --chat-template"
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"{path}: not a readable JSON file: {cause}") from cause
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return values


class _Generation(Extension):
    """``{% generation %}`` marks what an assistant says, for training; it renders as it is."""

    tags = {"generation"}  # noqa: RUF012 - so Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, **options: Any) -> str:
    # Jinja's own filter escapes what is special in HTML.
    return json.dumps(value, **{"ensure_ascii": False, **options})


#: What transformers' templates expect, in a sandbox that cannot change what it is given.
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
)
_ENVIRONMENT.filters["tojson"] = _to_json
_ENVIRONMENT.globals["raise_exception"] = _raise_exception
_ENVIRONMENT.globals["strftime_now"] = _strftime_now
