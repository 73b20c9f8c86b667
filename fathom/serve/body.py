"""The JSON body of a request: read, parsed and validated."""

import re
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from fathom.serve.errors import ApiError, invalid_body

MAX_VALUES = 300_000
"""Of a body, its numbers above all; the context length is less."""

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"')

_Body = TypeVar("_Body", bound=BaseModel)


async def read_json(request: Request) -> bytes:
    """The raw body. Raises ApiError unless it is declared as JSON, and starlette's ClientDisconnect.

    A web page of another origin can send any text without asking first (a CORS preflight), but not declare it as JSON.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(400, f"the content-type is {content_type[:80]!r}; it must be 'application/json'", "content-type")
    return await request.body()


def parse(model: type[_Body], raw: bytes) -> _Body:
    """The validated body. Raises ApiError. May take long: not for the event loop."""
    # The parser holds the interpreter's lock until its end, for a million numbers some tens of ms.
    if raw.count(b",") > MAX_VALUES and _STRING.sub(b"", raw).count(b",") > MAX_VALUES:
        raise ApiError(400, f"the body has more than {MAX_VALUES} values")
    try:
        content = from_json(raw, allow_inf_nan=False, cache_strings=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise invalid_body(error) from error
