"""The requests of the OpenAI API, as far as this server supports them, and vLLM's additions.

A parameter that is not known, or that asks for what the server cannot do, is refused by name. Only
those that change nothing in the answer are let pass.
"""

from typing import Annotated, Any, Literal, NoReturn, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from moelora_jax.engine.sampling import MAX_LOGPROBS
from moelora_jax.server.errors import ApiError
from moelora_jax.workspace import MAX_BIASES

#: Parameters that say nothing about the answer's text.
_WITHOUT_EFFECT = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "safety_identifier",
    "user",
}

#: Parameters that are not supported, of OpenAI and of vLLM, with the values that ask for nothing:
#: clients and load tests send these.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "cache_salt": (),
    "chat_template": (),
    "documents": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "priority": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}

_Probability = Annotated[float, Field(gt=0, le=1)]
_StopString = Annotated[str, Field(min_length=1, max_length=1024)]
_Token = Annotated[int, Field(ge=0, lt=2**31)]
#: Names in JSON are strings.
_TokenName = Annotated[
    _Token, BeforeValidator(lambda name: int(name) if str(name).isdecimal() else name)
]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Bias = Annotated[float, Field(ge=-100, le=100)]


def _refuse(param: str, message: str, code: str = "invalid_request") -> NoReturn:
    raise ApiError(400, message, code, param=param)


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    # Asks for padding against traffic analysis where true; there is none here.
    include_obfuscation: Literal[False] | None = None
    # As vLLM has it: the usage so far in every event.
    continuous_usage_stats: bool | None = None


class GenerationRequest(BaseModel):
    """What both kinds of completions share."""

    # Strict: the string "5" is not a number, nor is true.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: _Probability | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[_TokenName, _Bias], Field(max_length=MAX_BIASES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _StopString | Annotated[list[_StopString], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # As vLLM has them.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_token_ids: Annotated[list[_Token], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if name in _NEUTRAL and name not in cls.model_fields:
                if value is not None and value not in _NEUTRAL[name]:
                    _refuse(
                        name,
                        f"the parameter {name!r} is not supported by this server; leave it out",
                        "unsupported_parameter",
                    )
            elif name not in _WITHOUT_EFFECT:
                kept[name] = value
        return kept

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            _refuse("stream_options", "stream_options is only allowed with stream=true")
        return self

    @property
    def stop_strings(self) -> list[str]:
        """All of ``stop``."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def every_token(self) -> bool:
        """Whether log-probabilities are listed of stop tokens and of stop strings' tokens, too."""
        return bool(self.return_token_ids or self.return_tokens_as_token_ids)


class CompletionRequest(GenerationRequest):
    """``/v1/completions``."""

    prompt: str | list[_Token] | list[str] | list[list[_Token]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None
    # As vLLM has it: whether those that the tokenizer puts around a text belong to the prompt.
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_combinations(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            _refuse(
                "best_of",
                "the parameter 'best_of' is not supported by this server, unless it equals n",
                "unsupported_parameter",
            )
        if self.echo and self.logprobs is not None:
            _refuse(
                "echo",
                "log-probabilities of the prompt are not supported: use echo without logprobs",
                "unsupported_parameter",
            )
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts, as texts or as tokens."""
        match self.prompt:
            case str(text):
                return [text]
            case [int(), *_] as tokens:
                return [cast(list[int], tokens)]
            case several:
                return cast(list[str] | list[list[int]], several)


class TextPart(BaseModel):
    """A part of a message; images and sounds are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a conversation; the template sees what else it has."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[TextPart] | None = None

    def for_template(self) -> dict[str, Any]:
        """Plain values, with the parts of the text joined."""
        values = self.model_dump(exclude_unset=True)
        if isinstance(self.content, list):
            values["content"] = "\n".join(part.text for part in self.content)
        return values


_Messages = Annotated[list[ChatMessage], Field(min_length=1)]


class Conversation(BaseModel):
    """How messages are written with the chat template, as vLLM has it."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_continuation(self) -> "Conversation":
        if self.continue_final_message and self.add_generation_prompt:
            _refuse(
                "continue_final_message",
                "continue_final_message is only allowed with add_generation_prompt=false",
            )
        return self


class ChatCompletionRequest(GenerationRequest, Conversation):
    """``/v1/chat/completions``."""

    messages: _Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:  # vLLM's clients send 0, its default.
            _refuse("top_logprobs", "top_logprobs is only allowed with logprobs=true")
        return self


class TokenizeRequest(Conversation):
    """``/tokenize`` of a text or of a conversation, as vLLM has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: _Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            _refuse("prompt", "give either prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            _refuse(
                "add_special_tokens",
                "the chat template writes the special tokens: leave add_special_tokens out",
                "unsupported_parameter",
            )
        return self


class DetokenizeRequest(BaseModel):
    """``/detokenize``, as vLLM has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: list[_Token]


class LoadAdapterRequest(BaseModel):
    """``/v1/load_lora_adapter``, as vLLM has it, and the layout of experts where it is in doubt."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: bool = False
    # vLLM believes this; here the file tells.
    is_3d_lora_weight: bool = False
    layout: str | None = None


class UnloadAdapterRequest(BaseModel):
    """``/v1/unload_lora_adapter``, as vLLM has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: Annotated[str, Field(min_length=1)]
    # vLLM's clients may send its internal number beside the name; it means nothing here.
    lora_int_id: int | None = None
