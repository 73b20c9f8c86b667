"""Errors in OpenAI's shape."""

from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """`retry_after`: seconds until asking again makes sense."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON that says so."""
        return {"error": {"message": self.message, "type": _kind(self.status), "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status == 405:
            headers["Allow"] = "POST"
        return JSONResponse(self.body(), self.status, headers)


def wrong_body(mistakes: Sequence[Any]) -> ApiError:
    """What pydantic finds wrong with a body, its first mistake in words."""
    first = mistakes[0]
    # Inside a union every alternative complains; its name says nothing to a client.
    place = ".".join(str(part) for part in first["loc"] if part != "body" and "[" not in str(part))
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{place}: {message}" if place else message, place or None)


def _kind(status: int) -> str:
    known = {401: "authentication_error", 429: "rate_limit_error", 408: "timeout_error"}
    return known.get(status) or ("invalid_request_error" if status < 500 else "server_error")
