"""Every error that a user or an operator can cause, and what it looks like over HTTP.

    MedusaError                     500 server_error
    ├── StartupError                never over HTTP: one sentence on stderr, exit code 2
    ├── InvalidRequestError         400 invalid_request_error
    │   └── ContextLengthError      400 invalid_request_error, context_length_exceeded
    ├── ModelNotFoundError          404 invalid_request_error, model_not_found
    └── EngineDeadError             503 server_error, engine_dead

Messages are full sentences that say what to do. `code` is a string, as in OpenAI's API.
"""

from __future__ import annotations


class MedusaError(Exception):
    """Base of all. `param` names the request field at fault, if there is one."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class StartupError(MedusaError):
    """The server cannot start with this configuration."""


class InvalidRequestError(MedusaError):
    """The client sent something that cannot be served."""

    status = 400
    type = "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    """Prompt and completion do not fit into the model's context."""

    code = "context_length_exceeded"


class ModelNotFoundError(MedusaError):
    """The client asked for a model that is not served here."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class EngineDeadError(MedusaError):
    """The engine process is gone; it is being restarted."""

    status = 503
    code = "engine_dead"
