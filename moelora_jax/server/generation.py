"""From an API request to requests of the engine, and from their tokens to pieces of text."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, fields

from moelora_jax.engine.async_engine import AsyncEngine
from moelora_jax.engine.requests import Request, TokenOutput
from moelora_jax.engine.sampling import Sampling
from moelora_jax.engine.stream import Stream
from moelora_jax.errors import MoeLoraError
from moelora_jax.server.detokenizer import StopStrings
from moelora_jax.server.errors import ApiError, api_error, shutting_down
from moelora_jax.server.metrics import Metrics
from moelora_jax.server.schemas import GenerationRequest
from moelora_jax.server.text import TextModel

_log = logging.getLogger("moelora.server")

#: Completions that one HTTP request may ask for, over all of its prompts.
MAX_CHOICES = 128


@dataclass(frozen=True)
class ScoredToken:
    """A token of a completion whose log-probability was asked for.

    Attributes:
        output: token and log-probabilities.
        offset: characters of the completion before it.
    """

    output: TokenOutput
    offset: int


@dataclass(frozen=True)
class Piece:
    """What one more token has brought to a completion.

    Attributes:
        index: of the completion.
        text: empty where the token has none, or none yet.
        tokens: the tokens that begin in the text, if log-probabilities were asked for.
        token_ids: all tokens, those without text and stop tokens, too.
        finish_reason: ``stop`` or ``length`` in the last piece, else None.
    """

    index: int
    text: str
    tokens: tuple[ScoredToken, ...] = ()
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True)
class Limits:
    """Of one request.

    Attributes:
        max_length: tokens of a prompt and its completion.
        timeout: seconds until a request that is not finished is given up; None for no limit.
    """

    max_length: int
    timeout: float | None = None


class Generation:
    """The completions of one API request: ``n`` of each prompt, in this order.

    Attributes:
        prompt_tokens: of all prompts.
        completion_tokens: so far.
    """

    def __init__(self, completions: "Sequence[Completion]", prompt_tokens: int) -> None:
        self._completions = completions
        self.prompt_tokens = prompt_tokens

    @property
    def completion_tokens(self) -> int:
        return sum(completion.num_tokens for completion in self._completions)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """All pieces as they come; those that came meanwhile at once.

        Raises:
            ApiError: a completion failed.
        """
        arrived: asyncio.Queue[Piece | ApiError] = asyncio.Queue()
        tasks = [asyncio.create_task(_pump(each, arrived)) for each in self._completions]
        unfinished = len(tasks)
        try:
            while unfinished:
                pieces = [_piece(await arrived.get())]
                while not arrived.empty():
                    pieces.append(_piece(arrived.get_nowait()))
                unfinished -= sum(piece.finish_reason is not None for piece in pieces)
                yield pieces
        finally:
            for task in tasks:
                task.cancel()
            self.close()

    async def collect(self) -> list[Piece]:
        """Each completion as one piece."""
        parts: list[list[Piece]] = [[] for _ in self._completions]
        async for pieces in self.pieces():
            for piece in pieces:
                parts[piece.index].append(piece)
        return [
            Piece(
                index,
                "".join(piece.text for piece in part),
                tuple(token for piece in part for token in piece.tokens),
                tuple(token for piece in part for token in piece.token_ids),
                part[-1].finish_reason,
            )
            for index, part in enumerate(parts)
        ]

    def prompt(self, index: int) -> tuple[int, ...]:
        """The prompt of a completion."""
        return self._completions[index].stream.request.prompt

    def close(self) -> None:
        """Cancel what is not finished."""
        for completion in self._completions:
            completion.close()


@dataclass(eq=False)
class Completion:
    """One completion on its way: a stream of the engine, and the text so far.

    ``every_token`` is as :class:`GenerationRequest` has it.
    """

    index: int
    stream: Stream
    text_model: TextModel
    stop_strings: StopStrings
    metrics: Metrics
    arrival: float
    every_token: bool = False
    num_tokens: int = 0
    ended: bool = False
    _last: float = 0.0
    _decoded: int = 0
    _released: int = 0
    _waiting: list[ScoredToken] = field(default_factory=list)

    async def pieces(self) -> AsyncIterator[Piece]:
        detokenizer = self.text_model.detokenizer()
        async for output in self.stream:
            if output.finish_reason in ("cancelled", "timeout"):
                self._end()
                raise _interrupted(output.finish_reason)
            self._observe()
            # A stop token's text is no part of the answer.
            is_text = output.finish_reason != "stop"
            if self.stream.request.num_logprobs is not None and (is_text or self.every_token):
                self._waiting.append(ScoredToken(output, self._decoded))
            text = detokenizer.push(output.token) if is_text else ""
            if output.finish_reason is not None:
                text += detokenizer.finish()
            self._decoded += len(text)
            # As in vLLM, min_tokens holds for stop strings, too.
            if self.num_tokens > self.stream.request.sampling.min_tokens:
                text = self.stop_strings.push(text)
            reason: str | None = output.finish_reason
            if self.stop_strings.found:
                reason = "stop"
            elif reason is not None:
                text += self.stop_strings.finish()
            if reason is not None:
                self._end()
            # Also without text: whoever listens sees that a token came, and when.
            tokens = self._release(text, reason)
            yield Piece(self.index, text, tokens, (output.token,), reason)
            if reason is not None:
                return

    def close(self) -> None:
        """Cancel it unless it is finished."""
        if not self.ended:
            self._end()

    def _end(self) -> None:
        self.ended = True
        self.stream.cancel()
        self.metrics.finished(self.stream.request.adapter, time.monotonic() - self.arrival)

    def _observe(self) -> None:
        now = time.monotonic()
        adapter = self.stream.request.adapter
        if self.num_tokens == 0:
            self.metrics.first_token(adapter, now - self.arrival)
        else:
            self.metrics.next_token(adapter, now - self._last)
        self._last = now
        self.num_tokens += 1

    def _release(self, text: str, reason: str | None) -> tuple[ScoredToken, ...]:
        """The tokens that begin in text that is out now."""
        self._released += len(text)
        if self.stop_strings.found and not self.every_token:
            out = [token for token in self._waiting if token.offset < self._released]
            self._waiting = []
        elif reason is not None or self._released == self._decoded:
            out, self._waiting = self._waiting, []
        else:
            out = [token for token in self._waiting if token.offset < self._released]
            self._waiting = self._waiting[len(out) :]
        return tuple(out)


def start_generation(
    engine: AsyncEngine,
    text_model: TextModel,
    metrics: Metrics,
    limits: Limits,
    request: GenerationRequest,
    *,
    prompts: Sequence[Sequence[int]],
    adapter: str | None,
    max_tokens: int | None,
    num_logprobs: int | None,
    arrival: float,
) -> Generation:
    """Queue all completions of a request, or none.

    Args:
        engine: runs them.
        text_model: makes them text.
        metrics: are told the times.
        limits: of the server.
        request: what was asked for.
        prompts: token ids.
        adapter: that was asked for.
        max_tokens: to generate for each prompt; None for as many as fit.
        num_logprobs: as :class:`Request` has it.
        arrival: of the request, by :func:`time.monotonic`.

    Raises:
        ApiError: a prompt is too long, or there are too many.
        MoeLoraError: the engine does not take one of them.
    """
    number = request.n or 1
    if not prompts or len(prompts) * number > MAX_CHOICES:
        raise ApiError(
            400,
            f"{len(prompts)} prompts with n={number} were given; "
            f"there must be 1 to {MAX_CHOICES} completions",
            "invalid_request",
            param="prompt",
        )
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    stop_tokens = frozenset(request.stop_token_ids or ())
    if not request.ignore_eos:
        stop_tokens |= text_model.stop_tokens
    completions: list[Completion] = []
    try:
        for index in range(len(prompts) * number):
            prompt = prompts[index // number]
            stream = engine.submit(
                Request(
                    prompt=tuple(prompt),
                    adapter=adapter,
                    max_new_tokens=_num_new_tokens(len(prompt), max_tokens, limits),
                    sampling=_sampling(request, seed + index % number),
                    stop_tokens=stop_tokens,
                    num_logprobs=num_logprobs,
                    timeout=limits.timeout,
                )
            )
            stops = StopStrings(request.stop_strings)
            completions.append(
                Completion(index, stream, text_model, stops, metrics, arrival, request.every_token)
            )
    except BaseException:
        for completion in completions:
            completion.close()
        raise
    return Generation(completions, sum(len(prompt) for prompt in prompts))


def _num_new_tokens(prompt: int, wanted: int | None, limits: Limits) -> int:
    if prompt + (wanted or 1) > limits.max_length:
        raise ApiError(
            400,
            f"the prompt has {prompt} tokens, and {wanted or 1} are to be generated; together that "
            f"is more than the {limits.max_length} that this server allows: shorten the prompt or "
            "lower max_tokens",
            "context_length_exceeded",
        )
    return wanted or limits.max_length - prompt


def _sampling(request: GenerationRequest, seed: int) -> Sampling:
    """What a request asks for; the API's parameters have the names that the engine has for them."""
    options = {each.name: getattr(request, each.name) for each in fields(Sampling)}
    options = {name: value for name, value in options.items() if value is not None}
    options["top_k"] = max(request.top_k or 0, 0)  # -1 is vLLM's way to say all.
    options["seed"] = seed % 2**31
    # An API samples unless asked not to, other than the engine.
    return Sampling(**{"temperature": 1.0} | options)


def _interrupted(reason: str) -> ApiError:
    if reason == "timeout":
        return ApiError(
            504,
            "the request took longer than the server allows; ask for fewer tokens, or later",
            "timeout",
        )
    return shutting_down()  # Nothing else cancels a request whose client still listens.


async def _pump(completion: Completion, arrived: "asyncio.Queue[Piece | ApiError]") -> None:
    try:
        async for piece in completion.pieces():
            arrived.put_nowait(piece)
    except ApiError as error:
        arrived.put_nowait(error)
    except MoeLoraError as error:
        arrived.put_nowait(api_error(error))
    except Exception:
        _log.exception("a completion failed")
        arrived.put_nowait(ApiError(500, "the server failed; its log says why", "internal_error"))


def _piece(item: Piece | ApiError) -> Piece:
    if isinstance(item, ApiError):
        raise item
    return item
