"""Errors of the HTTP server, in the form of the OpenAI API."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """Request that is answered with an error.

    Attributes:
        message: explanation for the client.
        param: name of the field of the request; None if the error is not about one field.
        status: HTTP status.
        code: short name of the error, for programs.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}
