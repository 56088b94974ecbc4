"""Every error that a user or an operator can cause, and what it looks like over HTTP.

    MedusaError                     500 server_error, server_error
    ├── InternalError               500 server_error, internal_error: a bug
    ├── StartupError                never over HTTP: one sentence on stderr, exit code 2
    ├── InvalidRequestError         400 invalid_request_error, invalid_value and others
    │   └── ContextLengthError      400 invalid_request_error, context_length_exceeded
    ├── AuthenticationError         401 invalid_request_error, invalid_api_key
    ├── ModelNotFoundError          404 invalid_request_error, model_not_found
    ├── RequestTooLargeError        413 invalid_request_error, request_too_large
    ├── RateLimitError              429 requests or tokens, rate_limit_exceeded
    ├── EngineDeadError             503 server_error, engine_dead
    ├── ShuttingDownError           503 server_error, shutting_down
    └── RequestTimeoutError         504 server_error, request_timeout

Messages are full sentences that say what to do. Every error has a `code`, a word for programs, where OpenAI has one the
same; those of bodies that do not fit their schema are in `openai.faults`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

_BEARER = {"WWW-Authenticate": "Bearer"}
_RETRY_SOON = {"Retry-After": "1"}
_RETRY_LATER = {"Retry-After": "5"}


class MedusaError(Exception):
    """Base of all. `param` names the request field at fault, if there is one.

    `headers` go with the response.
    """

    status = 500
    type = "server_error"
    code: str = "server_error"
    headers: ClassVar[Mapping[str, str]] = {}

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InternalError(MedusaError):
    """A bug. Clients are told no more than that; the log is."""

    code = "internal_error"

    def __init__(self) -> None:
        super().__init__("The server had an error; its log says more.")


class StartupError(MedusaError):
    """The server cannot start with this configuration."""


class InvalidRequestError(MedusaError):
    """The client sent something that cannot be served."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthError(InvalidRequestError):
    """Prompt and completion do not fit into the model's context."""

    code = "context_length_exceeded"


class AuthenticationError(MedusaError):
    """The client brought no key, or none that is known here."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"
    headers = _BEARER


class ModelNotFoundError(MedusaError):
    """The client asked for a model that is not served here."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class RequestTooLargeError(MedusaError):
    """The body has more bytes than the operator allows."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class RateLimitError(MedusaError):
    """The queue is full, or the key has its share; OpenAI's clients try again. `limited` is OpenAI's type."""

    status = 429
    code = "rate_limit_exceeded"
    headers = _RETRY_SOON

    def __init__(self, message: str, *, limited: Literal["requests", "tokens"]) -> None:
        super().__init__(message)
        self.type = limited


class EngineDeadError(MedusaError):
    """The engine process is gone; it is being restarted."""

    status = 503
    code = "engine_dead"
    headers = _RETRY_LATER


class ShuttingDownError(MedusaError):
    """The server ends what is open and takes nothing new."""

    status = 503
    code = "shutting_down"
    headers = _RETRY_LATER


class RequestTimeoutError(MedusaError):
    """The request took longer than the operator allows."""

    status = 504
    code = "request_timeout"
