"""Limits of the HTTP server."""

from __future__ import annotations

from dataclasses import dataclass

from ddiff.errors import ArgumentError


@dataclass(frozen=True)
class Limits:
    """Limits on requests and on the work that the server accepts.

    Attributes:
        batch: samples that the network evaluates together.
        queue: samples that may be queued; further requests are refused with status 429.
        choices: samples of one request.
        steps: sampling steps of one request.
        timeout: seconds from the arrival of a request to its result.
        body: bytes of the body of a request.
        body_timeout: seconds in which the body of a request must arrive.
    """

    batch: int = 8
    queue: int = 256
    choices: int = 32
    steps: int = 1024
    timeout: float = 300.0
    body: int = 2**20
    body_timeout: float = 30.0

    def __post_init__(self) -> None:
        for name in ("batch", "queue", "choices", "steps", "timeout", "body", "body_timeout"):
            value = vars(self)[name]
            if not 0 < value < 2**31:
                raise ArgumentError(
                    f"serve: {name} must be above 0 and below 2^31; got {value}. Leave it out for "
                    "the default."
                )
