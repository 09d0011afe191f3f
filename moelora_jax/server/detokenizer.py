"""From tokens to text as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Container, Sequence

from tokenizers import Tokenizer

#: What decoding yields for bytes that are no whole character.
_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns the tokens of one completion into text, one at a time.

    The text of a token depends on its neighbours: bytes of one character may be spread over several
    tokens, and some tokenizers drop a space at the beginning. So the tokens since the last whole
    character are decoded behind those before them, which give the context. What comes out, joined,
    is the text of all tokens decoded at once. (Only of tokenizers that fall back to bytes, and of
    bytes that are no characters, a decoder that knew what follows would give up earlier bytes.)

    Args:
        tokenizer: decodes.
        special_tokens: ids without text, as those that the tokenizer does not know.
    """

    def __init__(self, tokenizer: Tokenizer, special_tokens: Container[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._tokens: list[int] = []
        self._num_context = 0  # The first of the tokens, whose text is out already.

    def push(self, token: int) -> str:
        """The text that is certain now; empty within a character."""
        if token in self._special_tokens or self._tokenizer.id_to_token(token) is None:
            return ""  # Or thousands of them would be decoded again with each one that follows.
        self._tokens.append(token)
        context, text = self._decode(self._num_context), self._decode(len(self._tokens))
        if text.endswith(_REPLACEMENT) or len(text) <= len(context):
            return ""
        del self._tokens[: self._num_context]
        self._num_context = len(self._tokens)
        return text[len(context) :]

    def finish(self) -> str:
        """What is left at the end: an unfinished character becomes U+FFFD, as in any decoder."""
        context, text = self._decode(self._num_context), self._decode(len(self._tokens))
        self._num_context = len(self._tokens)
        return text[len(context) :]

    def _decode(self, count: int) -> str:
        return self._tokenizer.decode(self._tokens[:count], skip_special_tokens=True)


class StopStrings:
    """Finds the first stop string in text that comes in parts.

    Text that may be the beginning of a stop string is held back until it is certain that it is not.

    Args:
        stops: the strings; none of them is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        #: Whether a stop string was met; no text comes after that.
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain to be no part of a stop string."""
        if self.found:
            return ""
        text = self._held + text
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        held = self._num_held(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, as no more text comes."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for count in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stops):
                return count
        return 0
