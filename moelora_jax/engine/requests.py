"""What goes into the serving engine and what comes out of it: requests, tokens, statistics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal, NamedTuple

import numpy as np

from moelora_jax.adapters.pages import PoolUsage
from moelora_jax.config import CacheConfig, ModelConfig
from moelora_jax.engine.sampling import MAX_LOGPROBS, Sampling
from moelora_jax.errors import CapacityError, RequestError
from moelora_jax.workspace import MAX_BIASES

#: Why a request ended. ``stop``: it sampled a stop token, which is its last token. ``length``: it
#: has as many tokens as it asked for. ``cancelled`` and ``timeout`` come with no token.
FinishReason = Literal["stop", "length", "cancelled", "timeout"]


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        prompt: token ids, at least one.
        adapter: name of a loaded adapter, or None for the base model.
        max_new_tokens: tokens to generate, at most.
        sampling: how tokens are chosen.
        stop_tokens: ids that end the request; the stop token is kept.
        num_logprobs: None for no log-probabilities, 0 for those of the chosen tokens alone, more
            for so many of the most probable tokens beside them, at most ``MAX_LOGPROBS``.
        priority: requests of higher priority go first; equal ones take turns by adapter.
        timeout: seconds from submission after which the request ends, finished or not.
    """

    prompt: tuple[int, ...]
    adapter: str | None = None
    max_new_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    num_logprobs: int | None = None
    priority: int = 0
    timeout: float | None = None


class TokenOutput(NamedTuple):
    """One token of a request, or its end.

    Attributes:
        token: the token id; -1 where the request ended without one (``cancelled``, ``timeout``).
        logprob: its log-probability under the model, whatever :class:`Sampling` makes of it; None
            unless asked for.
        top_logprobs: the most probable tokens and their log-probabilities, best first.
        finish_reason: None but for the last output.
    """

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


def check_tokens(
    tokens: Sequence[int] | np.ndarray,
    max_new_tokens: int,
    model: ModelConfig,
    cache: CacheConfig,
) -> list[int]:
    """The token ids of a prompt, checked.

    Raises:
        RequestError: they are no list of token ids of the model.
        CapacityError: they and the new tokens are longer than the cache.
    """
    array = np.asarray(tokens)
    if array.ndim != 1:
        raise RequestError(f"a prompt is a list of token ids, not {type(tokens).__name__}")
    if array.size == 0:
        raise RequestError("the prompt has no tokens; at least one is needed")
    if not np.issubdtype(array.dtype, np.integer):
        raise RequestError(f"token ids must be integers, not {array.dtype}")
    outside = array[(array < 0) | (array >= model.vocab_size)]
    if outside.size:
        raise RequestError(
            f"token id {outside[0]} is outside the vocabulary of {model.vocab_size} tokens"
        )
    if array.size + max_new_tokens > cache.max_length:
        new = f" and {max_new_tokens} new ones" if max_new_tokens else ""
        raise CapacityError(
            f"{array.size} prompt tokens{new} exceed the cache's max_length {cache.max_length}; "
            "shorten the prompt or raise CacheConfig.max_length"
        )
    return array.tolist()


def check_max_new_tokens(count: object) -> None:
    """Refuse what is no number of tokens: a sequence would never reach it."""
    if not isinstance(count, Integral) or int(count) < 1:
        raise RequestError(f"max_new_tokens must be at least 1, a whole number, not {count!r}")


def check_sampling(
    sampling: Sampling, stop_tokens: frozenset[int], max_new_tokens: int, model: ModelConfig
) -> None:
    """Refuse tokens that the model does not have, and more than there is room for."""
    if sampling.min_tokens > max_new_tokens:
        raise RequestError(
            f"min_tokens is {sampling.min_tokens}, more than the {max_new_tokens} tokens that are "
            "to be generated"
        )
    masked = stop_tokens if sampling.min_tokens else frozenset()
    for name, tokens in (("logit_bias", sampling.logit_bias), ("stop token of min_tokens", masked)):
        for token in tokens:
            if not 0 <= token < model.vocab_size:
                raise RequestError(
                    f"{name}: token id {token} is outside the vocabulary of {model.vocab_size}"
                )
    if len(sampling.logit_bias) + len(masked) > MAX_BIASES:
        raise RequestError(
            f"logit_bias has {len(sampling.logit_bias)} tokens, and min_tokens keeps off "
            f"{len(masked)} stop tokens; at most {MAX_BIASES} together are possible"
        )


def check_options(request: Request) -> None:
    """Refuse options that make no sense with a RequestError."""
    check_max_new_tokens(request.max_new_tokens)
    logprobs = request.num_logprobs
    if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
        raise RequestError(f"num_logprobs must be between 0 and {MAX_LOGPROBS}, not {logprobs}")
    if request.timeout is not None and not request.timeout > 0:
        raise RequestError(f"timeout must be positive seconds, not {request.timeout}")


@dataclass(frozen=True)
class AdapterTraffic:
    """Counters of one adapter, or of the base model.

    Attributes:
        requests: submitted.
        prompt_tokens: of the submitted requests.
        generated_tokens: delivered.
    """

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and gauges of this moment.

    Attributes:
        waiting: requests in the queue (gauge).
        running: requests that hold cache blocks (gauge).
        submitted: requests accepted.
        finished: requests ended, by finish reason, and ``error`` for those that failed.
        prompt_tokens: of all accepted requests.
        generated_tokens: delivered to streams.
        by_adapter: the same by name of the loaded adapters, since they were loaded; None is the
            base model.
        steps: programs run, by kind.
        preemptions: sequences that gave up their cache blocks and were computed again.
        prefix_hits: tokens that were found in the cache instead of being computed.
        compilations: programs compiled in this process since the engine was started.
        address_changes: workspaces, caches or pools that moved since the engine was started.
        unplanned_reads: reads from the device besides the sampled tokens and what was asked for;
            such a step fails.
        adapter_loads: adapters loaded, reloads included.
        adapter_writes: adapters written to the device.
        adapter_evictions: adapters moved off the device to make room.
        adapter_host_bytes: host memory that the loaded adapters take (gauge).
        kv_blocks_used: cache blocks that sequences hold (gauge).
        kv_blocks_remembered: cache blocks, in use or not, that a prompt can be found in (gauge).
        kv_blocks_total: cache blocks that there are.
        pools: how full each page pool is (gauge).
    """

    waiting: int
    running: int
    submitted: int
    finished: Mapping[str, int]
    prompt_tokens: int
    generated_tokens: int
    by_adapter: Mapping[str | None, AdapterTraffic]
    steps: Mapping[str, int]
    preemptions: int
    prefix_hits: int
    compilations: int
    address_changes: int
    unplanned_reads: int
    adapter_loads: int
    adapter_writes: int
    adapter_evictions: int
    adapter_host_bytes: int
    kv_blocks_used: int
    kv_blocks_remembered: int
    kv_blocks_total: int
    pools: tuple[PoolUsage, ...]
