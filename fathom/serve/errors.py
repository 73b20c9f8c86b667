"""Errors in OpenAI's shape, which with a type beside it is also Anthropic's."""

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ExceptionHandler

_TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}

_TEXT, _OPTIONAL = {"type": "string"}, {"type": ["string", "null"]}
_FIELDS = {"message": _TEXT, "type": _TEXT, "param": _OPTIONAL, "code": _OPTIONAL}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {"type": _TEXT, "error": {"type": "object", "required": [*_FIELDS], "properties": _FIELDS}},
}
"""JSON schema of an error's body."""


@dataclass(eq=False)
class ApiError(Exception):
    """A request that is refused or has failed, as the client sees it."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None
    """Seconds until another attempt makes sense."""

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _TYPES.get(self.status, default)
        return {
            "type": "error",
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }

    def response(self) -> JSONResponse:
        """The whole response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def invalid_body(error: ValidationError) -> ApiError:
    """The first of pydantic's errors, by the name of the field; one of our own sentences if there is one."""
    found = error.errors(include_url=False, include_context=False)
    first = next((each for each in found if each["type"] == "value_error"), found[0])
    # Inside a union every alternative has its errors; the names of alternatives mean nothing to a client.
    field = ".".join(str(part) for part in first["loc"] if "[" not in str(part) and "-" not in str(part))
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{field}: {message}" if field else message, field or None)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = error.headers or {}
    messages = {
        404: f"there is no path {request.url.path[:200]!r}",
        405: f"the method is {request.method}; it must be {headers.get('Allow')}",
    }
    response = ApiError(error.status_code, messages.get(error.status_code, error.detail)).response()
    response.headers.update(headers)
    return response


async def _disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's code for it; there is no client left to receive it


async def _unexpected(request: Request, error: Exception) -> Response:
    return ApiError(500, "internal error; the server's log has the details").response()


HANDLERS: dict[Any, ExceptionHandler] = {
    ApiError: _api_error,
    HTTPException: _no_route,
    ClientDisconnect: _disconnected,
    Exception: _unexpected,
}
"""Starlette's exception handlers, by type."""
