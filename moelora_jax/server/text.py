"""Text to tokens and back: what the server knows of a checkpoint's tokenizer."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moelora_jax.errors import CheckpointError, RequestError
from moelora_jax.models.tokenizer import read_tokenizer
from moelora_jax.server.chat_template import ChatTemplate, read_chat_template
from moelora_jax.server.detokenizer import Detokenizer


class TextModel:
    """The tokenizer of a model, and how it writes conversations.

    Args:
        tokenizer: of the checkpoint.
        chat_template: None refuses conversations.
        stop_tokens: ids that end an answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        stop_tokens: frozenset[int],
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.stop_tokens = stop_tokens

    @classmethod
    def load(
        cls, folder: Path, eos_tokens: Sequence[int], *, chat_template: Path | None = None
    ) -> "TextModel":
        """Read them from a checkpoint folder.

        Args:
            folder: must have a ``tokenizer.json``.
            eos_tokens: those of its config.json; ``generation_config.json`` may name more.
            chat_template: a file to use instead of the folder's own template.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        tokenizer = read_tokenizer(folder)
        if tokenizer is None:
            raise CheckpointError(
                f"{folder}: has no tokenizer.json, which serving text needs; for most models "
                "transformers writes it: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        stop_tokens = frozenset(eos_tokens) | _generation_eos(folder / "generation_config.json")
        return cls(tokenizer, read_chat_template(folder, chat_template), stop_tokens)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a prompt, with the special tokens that the tokenizer puts around it."""
        try:
            text.encode()
        except UnicodeEncodeError as cause:  # A lone surrogate, which JSON can express.
            raise RequestError(f"the prompt is not valid Unicode: {cause}") from cause
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        **options: Any,
    ) -> list[int]:
        """Tokens of a conversation; see :meth:`ChatTemplate.render`."""
        if self.chat_template is None:
            raise RequestError(
                "the model has no chat template: use /v1/completions, or start the server with "
                "--chat-template"
            )
        text = self.chat_template.render(messages, **options)
        return self.encode(text, add_special_tokens=False)

    def detokenizer(self) -> Detokenizer:
        """For the tokens of one completion."""
        return Detokenizer(self.tokenizer, self._special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for within a text; part of a character is possible."""
        piece = self.tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if token not in self._added_tokens:
            if self._byte_level and all(character in _BYTE_OF_CHARACTER for character in piece):
                return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
        # Behind another token, because some tokenizers drop a space at the beginning.
        anchor = self._anchor
        before = self.tokenizer.decode(anchor, skip_special_tokens=False)
        both = self.tokenizer.decode([*anchor, token], skip_special_tokens=False)
        return both[len(before) :].encode()

    @cached_property
    def _special_tokens(self) -> frozenset[int]:
        added = self.tokenizer.get_added_tokens_decoder()
        return frozenset(token for token, what in added.items() if what.special)

    @cached_property
    def _added_tokens(self) -> frozenset[int]:
        return frozenset(self.tokenizer.get_added_tokens_decoder())

    @cached_property
    def _anchor(self) -> list[int]:
        return self.tokenizer.encode("a", add_special_tokens=False).ids[-1:]

    @cached_property
    def _byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self.tokenizer.to_str())["decoder"])


def token_text(data: bytes) -> str:
    """How a token is written in lists of log-probabilities: as text, or else as its bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _generation_eos(path: Path) -> frozenset[int]:
    if not path.exists():
        return frozenset()
    try:
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as cause:
        raise CheckpointError(f"{path}: not a readable JSON object: {cause}") from cause
    tokens = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int for token in tokens):
        raise CheckpointError(
            f"{path}: eos_token_id must be a token or a list of tokens, not {eos!r}"
        )
    return frozenset(tokens)


def _byte_of_character() -> dict[str, int]:
    """The printable characters that byte-level tokenizers write bytes as, since GPT-2."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF_CHARACTER = _byte_of_character()
