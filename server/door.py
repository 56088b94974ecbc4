"""All that a request passes on its way to the routes, in order.

    Visits          the request's id, what is noted of it, the access log and the metrics at its end
    CORS            so that browsers may read errors, too
    AnswerErrors    whatever is raised further in becomes OpenAI's error object
    Authenticate    before anything is read of the body
    BodyLimit
    Deadline

Invariant: all of it is plain ASGI; a chunk of a stream passes one wrapper, Visits' own, and CORS where that is on.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from server.access_log import AccessLog
from server.auth import Authenticate
from server.limits import BodyLimit, Deadline
from server.metrics import Metrics
from server.openai.faults import AnswerErrors
from server.options import DoorOptions
from server.visit import Visit, Visits

EXPOSED = ("X-Request-Id", "Retry-After")


def install(app: FastAPI, options: DoorOptions, metrics: Metrics) -> None:
    """Starlette calls first what is added last."""
    if options.request_timeout_seconds is not None:
        app.add_middleware(Deadline, seconds=options.request_timeout_seconds)
    app.add_middleware(BodyLimit, max_bytes=options.max_request_bytes)
    if options.api_keys:
        app.add_middleware(Authenticate, keys=options.api_keys)
    app.add_middleware(AnswerErrors)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=EXPOSED,
        )

    def count(visit: Visit) -> None:
        metrics.http(visit.route or "none", visit.method, visit.status or 500, visit.seconds)

    app.add_middleware(Visits, observers=(count, AccessLog()) if options.access_log else (count,))
