"""Errors as HTTP responses, in the form of the OpenAI API."""

from typing import Any

from moelora_jax.errors import (
    AdapterError,
    CapacityError,
    MoeLoraError,
    QueueFullError,
    RequestError,
)


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: for people: names the thing and says what to do.
        code: for programs.
        param: the request's parameter at fault.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that tells the client."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


#: What the OpenAI API calls errors of a status; others are ``invalid_request_error``.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}

#: Status and code of the errors below the server; the first class that matches tells.
_OF_CLASS: tuple[tuple[type[MoeLoraError], int, str], ...] = (
    (QueueFullError, 429, "queue_full"),
    (CapacityError, 400, "capacity_exceeded"),
    (AdapterError, 400, "invalid_adapter"),
    (RequestError, 400, "invalid_request"),
    (MoeLoraError, 500, "engine_error"),
)


def api_error(error: MoeLoraError) -> ApiError:
    """The response to an error of the engine or of the files."""
    status, code = next(
        (status, code) for kind, status, code in _OF_CLASS if isinstance(error, kind)
    )
    return ApiError(
        status, str(error), code, headers={"Retry-After": "1"} if status == 429 else None
    )


def shutting_down() -> ApiError:
    """The response while the server drains, and to what did not finish in time."""
    return ApiError(
        503,
        "the server is shutting down; try another one, or again later",
        "shutting_down",
        headers={"Retry-After": "5"},
    )
