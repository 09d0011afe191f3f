"""The rows that a command is asked to run: one JSON object per line."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer

from moelora_jax.config import ModelConfig
from moelora_jax.engine.llm import Prompt
from moelora_jax.errors import RequestError

_KEYS = ("tokens", "text", "adapter")


def read_rows(
    path: Path,
    model: ModelConfig,
    adapters: Collection[str],
    tokenizer: Tokenizer | None,
    *,
    max_new_tokens: int = 0,
) -> list[Prompt]:
    """Read and check all rows; empty lines are skipped.

    Args:
        path: the file.
        model: tells which token ids and lengths are valid.
        adapters: the names that rows may use.
        tokenizer: for rows of text.
        max_new_tokens: how many tokens must fit behind each row.

    Raises:
        RequestError: naming the line of the first row that is wrong.
    """
    if not path.exists():
        raise RequestError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise RequestError(f"{path}: not a readable text file: {cause}") from cause
    # Not splitlines(): it also splits at characters that JSON strings may hold.
    prompts = [
        _Row(f"{path}, line {number}", line).prompt(model, adapters, tokenizer, max_new_tokens)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not prompts:
        raise RequestError(f'{path}: has no rows; write lines like {{"tokens": [1, 2, 3]}}')
    return prompts


@dataclass(frozen=True)
class _Row:
    """A line and where it is from."""

    where: str
    line: str

    def prompt(
        self,
        model: ModelConfig,
        adapters: Collection[str],
        tokenizer: Tokenizer | None,
        max_new_tokens: int,
    ) -> Prompt:
        row = self._parse()
        tokens = self._tokens(row, tokenizer)
        outside = [token for token in tokens if not 0 <= token < model.vocab_size]
        if outside:
            self._fail(
                f"token id {outside[0]} is outside the vocabulary of {model.vocab_size} tokens"
            )
        if len(tokens) + max_new_tokens > model.max_position:
            new = f" and {max_new_tokens} new ones" if max_new_tokens else ""
            self._fail(
                f"{len(tokens)} tokens{new} are more than the {model.max_position} positions that "
                "the model was made for"
            )
        name = row.get("adapter")
        if name is not None and name not in adapters:
            given = ", ".join(sorted(adapters)) or "none"
            self._fail(f"adapter {name!r} is not given by --adapter; given: {given}")
        return Prompt(tokens, name)

    def _parse(self) -> dict[str, Any]:
        try:
            row = json.loads(self.line)
        except (ValueError, RecursionError) as cause:
            self._fail(f"not JSON: {cause}")
        if not isinstance(row, dict):
            self._fail('must be a JSON object, such as {"tokens": [1, 2, 3], "adapter": null}')
        if unknown := [key for key in row if key not in _KEYS]:
            self._fail(f"unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
        if ("tokens" in row) == ("text" in row):
            self._fail('give either "tokens" or "text"')
        if not isinstance(row.get("adapter"), str | None):
            self._fail(f"adapter must be a name or null, not {row['adapter']!r}")
        return row

    def _tokens(self, row: dict[str, Any], tokenizer: Tokenizer | None) -> list[int]:
        if "tokens" in row:
            tokens = row["tokens"]
            # A bool is an int in Python.
            if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
                self._fail("tokens must be a list of integers")
        else:
            if not isinstance(row["text"], str):
                self._fail(f"text must be a string, not {row['text']!r}")
            if tokenizer is None:
                self._fail("has text, but the model's folder has no tokenizer.json; give tokens")
            tokens = tokenizer.encode(row["text"]).ids
        if not tokens:
            self._fail("has no tokens; at least one is needed")
        return tokens

    def _fail(self, reason: str) -> NoReturn:
        raise RequestError(f"{self.where}: {reason}")
