"""The HTTP application: routes, and who may use them."""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moelora_jax.engine.async_engine import AsyncEngine
from moelora_jax.errors import MoeLoraError
from moelora_jax.server.adapter_root import AdapterRoot
from moelora_jax.server.errors import ApiError, api_error, shutting_down
from moelora_jax.server.generation import Generation, Limits, start_generation
from moelora_jax.server.keys import Key, Keys
from moelora_jax.server.metrics import Metrics
from moelora_jax.server.responses import Answer, ChatAnswer, CompletionAnswer, EventStream
from moelora_jax.server.schemas import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    Conversation,
    DetokenizeRequest,
    GenerationRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from moelora_jax.server.text import TextModel

_log = logging.getLogger("moelora.server")

#: The status page may run its own script and ask this server, and nothing else.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class ServerConfig:
    """What the server is told when it starts.

    Attributes:
        model_name: what requests call the base model.
        limits: of a request.
        vocab_size: of the model; token ids are below it.
        keys: who may do what.
        adapter_root: where adapters may be loaded from; None refuses to load any.
        max_body_bytes: of a request.
    """

    model_name: str
    limits: Limits
    vocab_size: int
    keys: Keys = field(default_factory=Keys)
    adapter_root: AdapterRoot | None = None
    max_body_bytes: int = 4 * 2**20


class Service:
    """What the routes do: one engine, told to the world.

    Attributes:
        active: API requests that are not answered yet.
        draining: whether new ones are refused.
    """

    def __init__(self, engine: AsyncEngine, text_model: TextModel, config: ServerConfig) -> None:
        self.engine = engine
        self.text_model = text_model
        self.config = config
        self.metrics = Metrics(engine.stats, engine.is_loaded, config.model_name)
        self.active = 0
        self.draining = False
        self._started = int(time.time())
        self._changing = asyncio.Lock()  # One change of the adapters at a time.

    async def completion(self, request: CompletionRequest, key: Key) -> "_Work":
        """Queue what ``/v1/completions`` asks for."""
        arrival = time.monotonic()
        adapter = self._adapter(request.model, key)
        special = request.add_special_tokens
        prompts = [await self._tokens(p, add_special_tokens=special) for p in request.prompts]
        generation = self._start(
            request,
            prompts=prompts,
            adapter=adapter,
            max_tokens=16 if request.max_tokens is None else request.max_tokens,
            num_logprobs=request.logprobs,
            arrival=arrival,
        )
        answer = CompletionAnswer(
            request.model,
            self.text_model,
            with_logprobs=request.logprobs is not None,
            **_token_options(request),
            echo=lambda index: self._echo(request, index),
        )
        return _Work(generation, answer, request)

    async def chat(self, request: ChatCompletionRequest, key: Key) -> "_Work":
        """Queue what ``/v1/chat/completions`` asks for."""
        arrival = time.monotonic()
        adapter = self._adapter(request.model, key)
        prompt = await self._chat_tokens(request, request.messages)
        generation = self._start(
            request,
            prompts=[prompt],
            adapter=adapter,
            max_tokens=request.max_completion_tokens or request.max_tokens,
            num_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            arrival=arrival,
        )
        answer = ChatAnswer(
            request.model,
            self.text_model,
            with_logprobs=bool(request.logprobs),
            **_token_options(request),
        )
        return _Work(generation, answer, request)

    async def tokenize(self, request: TokenizeRequest, key: Key) -> dict[str, Any]:
        """What ``/tokenize`` answers."""
        if request.model is not None:
            self._adapter(request.model, key)
        if request.messages is not None:
            tokens = await self._chat_tokens(request, request.messages)
        else:
            assert request.prompt is not None
            add_special_tokens = request.add_special_tokens is not False
            tokens = await self._tokens(request.prompt, add_special_tokens=add_special_tokens)
        names = None
        if request.return_token_strs:
            names = [self.text_model.tokenizer.id_to_token(token) for token in tokens]
        return {
            "count": len(tokens),
            "max_model_len": self.config.limits.max_length,
            "tokens": tokens,
            "token_strs": names,
        }

    async def detokenize(self, request: DetokenizeRequest, key: Key) -> dict[str, Any]:
        """What ``/detokenize`` answers: the text, that of special tokens included."""
        if request.model is not None:
            self._adapter(request.model, key)
        decode = self.text_model.tokenizer.decode
        text = await asyncio.to_thread(decode, request.tokens, skip_special_tokens=False)
        return {"prompt": text}

    def models(self, key: Key) -> dict[str, Any]:
        """What ``/v1/models`` lists: those that the key may use."""
        infos = {info.name: info for info in self.engine.adapters()}
        names = [None, *sorted(infos)]
        cards = []
        for name in filter(key.allows, names):
            card: dict[str, Any] = {
                "id": name or self.config.model_name,
                "object": "model",
                "created": self._started,
                "owned_by": "moelora-jax",
                "parent": None if name is None else self.config.model_name,
                "max_model_len": self.config.limits.max_length,
            }
            if name is None:
                card["vocab_size"] = self.config.vocab_size
            else:
                info = infos[name]
                card |= {
                    "rank": info.rank,
                    "resident": info.slot is not None,
                    "pinned": info.pinned,
                    "bytes": info.device_bytes,
                }
            cards.append(card)
        return {"object": "list", "data": cards}

    async def load_adapter(self, request: LoadAdapterRequest) -> str:
        """Load an adapter from under the root, or replace one in place."""
        root = self.config.adapter_root
        if root is None:
            raise ApiError(
                403,
                "this server does not load adapters on request: start it with --adapter-root",
                "permission_denied",
            )
        name = request.lora_name
        if name == self.config.model_name:
            raise ApiError(
                400,
                f"{name!r} is the name of the base model; choose another one",
                "invalid_request",
                param="lora_name",
            )
        folder = root.folder(request.lora_path)
        async with self._changing:
            self._refuse_if_draining()
            if not request.load_inplace and self.engine.is_loaded(name):
                raise ApiError(
                    400,
                    # Clients of vLLM look for its words "has already been loaded".
                    f"the adapter {name!r} has already been loaded; unload it first, or set "
                    "load_inplace",
                    "already_loaded",
                    param="lora_name",
                )
            await self.engine.load_adapter(name, folder, layout=request.layout)
        _log.info("loaded adapter %r from %s", name, folder)
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload_adapter(self, request: UnloadAdapterRequest) -> str:
        """Forget an adapter."""
        name = request.lora_name
        async with self._changing:
            self._refuse_if_draining()
            if not self.engine.is_loaded(name):
                raise ApiError(
                    404,
                    f"the adapter {name!r} is not loaded",
                    "adapter_not_found",
                    param="lora_name",
                )
            await self.engine.unload_adapter(name)
            self.metrics.forget(name)
        _log.info("unloaded adapter %r", name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _adapter(self, model: str, key: Key) -> str | None:
        """The adapter that a model name means, None for the base model.

        A name that the key may not use is answered as one that does not exist, so that keys cannot
        be used to find out the adapters of others.
        """
        base = self.config.model_name
        adapter: str | None
        if model == base:
            adapter, known = None, True
        else:
            loaded = self.engine.is_loaded
            adapter = model if loaded(model) else model.removeprefix(f"{base}:")
            known = loaded(adapter)
        if not known or not key.allows(adapter):
            raise ApiError(
                404,
                f"the model {model!r} does not exist, or this key may not use it; "
                "/v1/models lists those that it may use",
                "model_not_found",
                param="model",
            )
        return adapter

    async def _tokens(self, prompt: str | list[int], *, add_special_tokens: bool) -> list[int]:
        """Tokens of a prompt. Long texts take a while, and others must not wait for it."""
        if not isinstance(prompt, str):
            return prompt
        encode = self.text_model.encode
        return await asyncio.to_thread(encode, prompt, add_special_tokens=add_special_tokens)

    async def _chat_tokens(self, how: Conversation, messages: Sequence[ChatMessage]) -> list[int]:
        return await asyncio.to_thread(
            self.text_model.encode_chat,
            [message.for_template() for message in messages],
            add_generation_prompt=how.add_generation_prompt,
            continue_final_message=how.continue_final_message,
            options=how.chat_template_kwargs,
        )

    def _echo(self, request: CompletionRequest, index: int) -> str:
        if not request.echo:
            return ""
        prompt = request.prompts[index // (request.n or 1)]
        return prompt if isinstance(prompt, str) else self.text_model.tokenizer.decode(prompt)

    def _refuse_if_draining(self) -> None:
        if self.draining:
            raise shutting_down()

    def _start(self, request: GenerationRequest, **options: Any) -> Generation:
        self._refuse_if_draining()
        return start_generation(
            self.engine, self.text_model, self.metrics, self.config.limits, request, **options
        )


@dataclass(frozen=True)
class _Work:
    """A queued API request, and how it will be answered."""

    generation: Generation
    answer: Answer
    request: GenerationRequest


def _token_options(request: GenerationRequest) -> dict[str, bool]:
    return {
        "with_token_ids": bool(request.return_token_ids),
        "name_tokens_by_id": bool(request.return_tokens_as_token_ids),
    }


def create_app(service: Service) -> FastAPI:
    """The application of a service.

    Args:
        service: whose engine is started and stopped by the caller.
    """
    # No pages of its own: they would load scripts from elsewhere.
    app = FastAPI(title="moelora-jax", openapi_url=None)
    keys = service.config.keys

    def client_key(request: Request) -> Key:
        return keys.client(request.headers.get("authorization"))

    def admin_key(request: Request) -> None:
        keys.admin(request.headers.get("authorization"))

    def body[Schema: BaseModel](schema: type[Schema]) -> Any:
        return Depends(_body(schema, service.config.max_body_bytes))

    Client = Annotated[Key, Depends(client_key)]

    @app.post("/v1/completions")
    async def completions(
        key: Client,
        http: Request,
        request: Annotated[CompletionRequest, body(CompletionRequest)],
    ) -> Response:
        return await _respond(service, http, service.completion(request, key))

    @app.post("/v1/chat/completions")
    async def chat_completions(
        key: Client,
        http: Request,
        request: Annotated[ChatCompletionRequest, body(ChatCompletionRequest)],
    ) -> Response:
        return await _respond(service, http, service.chat(request, key))

    @app.post("/tokenize")
    async def tokenize(
        key: Client, request: Annotated[TokenizeRequest, body(TokenizeRequest)]
    ) -> Response:
        return JSONResponse(await service.tokenize(request, key))

    @app.post("/detokenize")
    async def detokenize(
        key: Client, request: Annotated[DetokenizeRequest, body(DetokenizeRequest)]
    ) -> Response:
        return JSONResponse(await service.detokenize(request, key))

    @app.get("/v1/models")
    async def models(key: Client) -> Response:
        return JSONResponse(service.models(key))

    @app.get("/v1/models/{name:path}")
    async def model(key: Client, name: str) -> Response:
        for card in service.models(key)["data"]:
            if card["id"] == name:
                return JSONResponse(card)
        raise ApiError(404, f"the model {name!r} does not exist", "model_not_found", param="model")

    @app.post("/v1/load_lora_adapter", dependencies=[Depends(admin_key)])
    async def load_adapter(
        request: Annotated[LoadAdapterRequest, body(LoadAdapterRequest)],
    ) -> Response:
        return PlainTextResponse(await service.load_adapter(request))

    @app.post("/v1/unload_lora_adapter", dependencies=[Depends(admin_key)])
    async def unload_adapter(
        request: Annotated[UnloadAdapterRequest, body(UnloadAdapterRequest)],
    ) -> Response:
        return PlainTextResponse(await service.unload_adapter(request))

    @app.get("/health")
    async def health() -> Response:
        if service.draining:
            raise shutting_down()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics(key: Client) -> Response:
        if not key.unrestricted:
            raise ApiError(
                403, "a key that may use some adapters only does not see all", "permission_denied"
            )
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    page = files("moelora_jax.server").joinpath("status.html").read_text(encoding="utf-8")

    @app.get("/")
    async def status_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(MoeLoraError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(Exception, _answer_error)
    app.add_middleware(_CountResponses, metrics=service.metrics)
    return app


#: What Pydantic writes among the names of fields: which form of a value it speaks of.
_FORM = re.compile(r"str|constrained-.*|list\[.*")


def _body[Schema: BaseModel](
    schema: type[Schema], max_bytes: int
) -> Callable[[Request], Awaitable[Schema]]:
    """A dependency that reads the body. Those before it ran, so a stranger's body is not read."""

    async def read(request: Request) -> Schema:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            # Forms of other sites may send other types without asking the browser's user.
            raise ApiError(
                415, "send JSON, with Content-Type: application/json", "unsupported_media_type"
            )
        data = bytearray()
        try:
            async for chunk in request.stream():
                data += chunk
                if len(data) > max_bytes:
                    raise ApiError(
                        413,
                        f"the body has more than the {max_bytes} bytes that this server allows",
                        "body_too_large",
                        # What was not read must not be taken for the next request.
                        headers={"Connection": "close"},
                    )
        except ClientDisconnect as cause:  # Nobody is there to read it; it is counted.
            raise ApiError(
                499, "the client left before its body was whole", "client_gone"
            ) from cause
        try:
            return schema.model_validate_json(bytes(data))
        except ValidationError as error:
            raise _invalid(error) from error

    return read


def _invalid(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    top = errors[0]["loc"][:1]
    # Where a value may have one of several forms, that which is wrong in the least of its parts.
    first = max((e for e in errors if e["loc"][:1] == top), key=lambda e: len(e["loc"]))
    param = str(top[0]) if top else None
    inner = [str(part) for part in first["loc"][1:]]
    where = ".".join([*map(str, top), *(part for part in inner if not _FORM.fullmatch(part))])
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['msg']}", "invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"the parameter {where!r} is not known", "unknown_parameter", param=param
        )
    return ApiError(400, f"{where or 'body'}: {first['msg']}", "invalid_request", param=param)


async def _respond(service: Service, http: Request, start: Coroutine[Any, Any, _Work]) -> Response:
    """Answer an API request, streamed or not; the work ends when the client leaves."""
    if service.draining:
        start.close()
        raise shutting_down()
    service.active += 1
    streaming = False
    try:
        work = await start
        if work.request.stream:
            streaming = True
            events = work.answer.events(work.generation, work.request.stream_options)
            return EventStream(events, lambda: _close(service, work))
        pieces = await _unless_gone(http, work.generation.collect())
        if pieces is None:
            return Response(status_code=499)  # Nobody is there to read it.
        return JSONResponse(work.answer.whole(pieces, work.generation))
    finally:
        if not streaming:
            service.active -= 1


def _close(service: Service, work: _Work) -> None:
    work.generation.close()
    service.active -= 1


async def _unless_gone[Result](http: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of some work, or None if the client closes the connection before."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()


async def _answer_error(_request: Request, error: Exception) -> Response:
    if isinstance(error, MoeLoraError):
        error = api_error(error)
    elif isinstance(error, HTTPException):
        codes = {404: "not_found", 405: "method_not_allowed"}
        code = codes.get(error.status_code, "http_error")
        headers = dict(error.headers or {})  # Which methods are allowed.
        error = ApiError(error.status_code, str(error.detail), code, headers=headers)
    elif not isinstance(error, ApiError):
        error = ApiError(500, "the server failed; its log says why", "internal_error")
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


class _CountResponses:
    """Counts responses by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(route, "path", "other")
                self._metrics.responded(path, message["status"])
            await send(message)

        await self._app(scope, receive, counting_send if scope["type"] == "http" else send)
