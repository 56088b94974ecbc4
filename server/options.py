"""What the operator has chosen for the API process, as its rooms are told. None is no limit."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Limits:
    """Of `admission`: how many choices, prompt tokens and requests of one API key are taken at a time."""

    max_num_seqs: int = 64
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    max_concurrent_requests_per_key: int | None = None


@dataclass(frozen=True, slots=True)
class DoorOptions:
    """Of `door`: who may come in, with how much, and for how long."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_origins: tuple[str, ...] = ()
    max_request_bytes: int = 4 * 2**20
    request_timeout_seconds: float | None = None
    access_log: bool = False
    limits: Limits = field(default_factory=Limits)
