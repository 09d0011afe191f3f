"""The answers of the OpenAI API: whole, or as server-sent events."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from moelora_jax.server.errors import ApiError
from moelora_jax.server.generation import Generation, Piece, ScoredToken
from moelora_jax.server.schemas import StreamOptions
from moelora_jax.server.text import TextModel, token_text

_Json = dict[str, Any]


class Answer:
    """How the completions of one request are written; the base of both kinds.

    Args:
        model: the name that the client used.
        text_model: writes the tokens of log-probabilities.
        with_logprobs: whether they were asked for.
        with_token_ids: whether to list the tokens of prompts and completions, as vLLM does.
        name_tokens_by_id: whether log-probabilities call tokens ``token_id:5``, as vLLM does.
    """

    _prefix: str
    _object: str
    _chunk_object: str

    def __init__(
        self,
        model: str,
        text_model: TextModel,
        *,
        with_logprobs: bool,
        with_token_ids: bool = False,
        name_tokens_by_id: bool = False,
    ) -> None:
        self._text_model = text_model
        self._with_logprobs = with_logprobs
        self._with_token_ids = with_token_ids
        self._name_tokens_by_id = name_tokens_by_id
        self._head: _Json = {
            "id": f"{self._prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, pieces: list[Piece], generation: Generation) -> _Json:
        """The answer that is not streamed."""
        answer = {
            **self._head,
            "object": self._object,
            "choices": [self._choice(piece) for piece in pieces],
            "usage": _usage(generation),
        }
        if self._with_token_ids:
            self._add_prompts(answer, generation)
        return answer

    async def events(
        self, generation: Generation, options: StreamOptions | None = None
    ) -> AsyncIterator[bytes]:
        """The answer as server-sent events; an error ends it early."""
        options = options or StreamOptions()
        head = {**self._head, "object": self._chunk_object}
        if options.include_usage:
            head["usage"] = None
        started: set[int] = set()
        try:
            async for pieces in generation.pieces():
                events = []
                for piece in pieces:
                    first = piece.index not in started
                    started.add(piece.index)
                    if options.continuous_usage_stats:
                        head["usage"] = _usage(generation)
                    for choice in self._chunks(piece, first):
                        chunk = {**head, "choices": [choice]}
                        if first and self._with_token_ids:
                            self._add_prompts(chunk, generation)
                            first = False
                        events.append(_event(chunk))
                yield b"".join(events)
            if options.include_usage:
                yield _event({**head, "choices": [], "usage": _usage(generation)})
        except ApiError as error:
            yield _event(error.body)
        yield b"data: [DONE]\n\n"

    def _choice(self, piece: Piece) -> _Json:
        raise NotImplementedError

    def _chunks(self, piece: Piece, first: bool) -> list[_Json]:
        raise NotImplementedError

    def _add_prompts(self, answer: _Json, generation: Generation) -> None:
        raise NotImplementedError

    def _token_ids(self, piece: Piece) -> _Json:
        return {"token_ids": list(piece.token_ids)} if self._with_token_ids else {}

    def _token(self, token: int) -> str:
        if self._name_tokens_by_id:
            return f"token_id:{token}"
        return token_text(self._text_model.token_bytes(token))


class CompletionAnswer(Answer):
    """``/v1/completions``.

    Args:
        echo: for each completion what its text begins with: the prompt if that is asked for.
    """

    _prefix, _object, _chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any, echo: Callable[[int], str], **options: Any) -> None:
        super().__init__(*args, **options)
        self._echo = echo

    def _choice(self, piece: Piece) -> _Json:
        return self._write(piece, self._echo(piece.index))

    def _chunks(self, piece: Piece, first: bool) -> list[_Json]:
        return [self._write(piece, self._echo(piece.index) if first else "")]

    def _write(self, piece: Piece, before: str) -> _Json:
        return {
            "index": piece.index,
            "text": before + piece.text,
            "logprobs": self._logprobs(piece) if self._with_logprobs else None,
            "finish_reason": piece.finish_reason,
            **self._token_ids(piece),
        }

    def _add_prompts(self, answer: _Json, generation: Generation) -> None:
        for choice in answer["choices"]:
            choice["prompt_token_ids"] = list(generation.prompt(choice["index"]))

    def _logprobs(self, piece: Piece) -> _Json:
        return {
            "tokens": [self._token(token.output.token) for token in piece.tokens],
            "token_logprobs": [_finite(token.output.logprob) for token in piece.tokens],
            "top_logprobs": [
                # The API has the chosen token among them even if it is none of the best.
                {self._token(other): _finite(value) for other, value in token.output.top_logprobs}
                | {self._token(token.output.token): _finite(token.output.logprob)}
                for token in piece.tokens
            ],
            "text_offset": [token.offset for token in piece.tokens],
        }


class ChatAnswer(Answer):
    """``/v1/chat/completions``."""

    _prefix, _object, _chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, piece: Piece) -> _Json:
        return {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece) if self._with_logprobs else None,
            "finish_reason": piece.finish_reason,
            **self._token_ids(piece),
        }

    def _chunks(self, piece: Piece, first: bool) -> list[_Json]:
        def chunk(delta: _Json, **others: Any) -> _Json:
            return {"index": piece.index, "delta": delta, "finish_reason": None, **others}

        chunks = []
        if first:
            chunks.append(chunk({"role": "assistant", "content": ""}))
        ids = self._token_ids(piece)
        if piece.text or piece.tokens or ids or piece.finish_reason is None:
            logprobs = {"logprobs": self._logprobs(piece)} if self._with_logprobs else {}
            chunks.append(chunk({"content": piece.text}, **logprobs, **ids))
        if piece.finish_reason is not None:
            chunks.append(chunk({}, finish_reason=piece.finish_reason))
        return chunks

    def _add_prompts(self, answer: _Json, generation: Generation) -> None:
        answer["prompt_token_ids"] = list(generation.prompt(0))

    def _logprobs(self, piece: Piece) -> _Json:
        return {"content": [self._scored(token) for token in piece.tokens]}

    def _scored(self, token: ScoredToken) -> _Json:
        output = token.output
        return {
            **self._entry(output.token, output.logprob),
            "top_logprobs": [self._entry(*pair) for pair in output.top_logprobs],
        }

    def _entry(self, token: int, logprob: float | None) -> _Json:
        data = list(self._text_model.token_bytes(token))
        return {"token": self._token(token), "logprob": _finite(logprob), "bytes": data}


class EventStream(StreamingResponse):
    """Server-sent events; whatever ends the response also ends the generation."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        # Proxies must pass on each event at once.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def _finite(logprob: float | None) -> float | None:
    """The API's lowest number stands for minus infinity, which JSON does not have."""
    return None if logprob is None else max(logprob, -9999.0)


def _usage(generation: Generation) -> _Json:
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _event(value: _Json) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"
