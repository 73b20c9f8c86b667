"""The OpenAPI document, made from the table of endpoints and the pydantic models of their bodies."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from fathom.serve import errors

_SCHEMAS = "#/components/schemas/{model}"

_ERRORS = {
    401: "no valid API key",
    404: "no such model",
    500: "internal error",
    503: "the engine has stopped, or too many bodies",
}
_BODY_ERRORS = {
    400: "the request is invalid; the message names the field",
    408: "deadline exceeded",
    413: "the body is too large",
    429: "the queue is full",
}


@dataclass(frozen=True)
class Endpoint:
    """One row of the table."""

    method: Literal["GET", "POST"]
    path: str
    summary: str
    endpoint: Any
    """Starlette's: a coroutine function from Request to Response, or an ASGI application."""
    body: type[BaseModel] | None = None
    content_types: tuple[str, ...] = ("application/json",)
    """Of a successful response."""

    def route(self) -> Route:
        """Starlette's."""
        return Route(self.path, self.endpoint, methods=[self.method])


def openapi_document(title: str, version: str, endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """By OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    bodies = [(endpoint.body, "validation") for endpoint in endpoints if endpoint.body is not None]
    _, schemas = models_json_schema(bodies, ref_template=_SCHEMAS)  # type: ignore[arg-type]
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    # An event of a stream is a text, or, where it has a name, an object.
    schemas: dict[str, Any] = {"application/json": {"type": "object"}, "text/event-stream": {}}
    content = {kind: {"schema": schemas.get(kind, {"type": "string"})} for kind in endpoint.content_types}
    error = {"application/json": {"schema": errors.SCHEMA}}
    described = _ERRORS | (_BODY_ERRORS if endpoint.body is not None else {})
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": f"{endpoint.method.lower()}{re.sub(r'[^a-z]+', '_', endpoint.path).rstrip('_')}",
        "responses": {"200": {"description": "success", "content": content}}
        | {str(status): {"description": cause, "content": error} for status, cause in sorted(described.items())},
    }
    names = re.findall(r"{(\w+)}", endpoint.path)
    if names:
        schema = {"type": "string"}
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": schema} for name in names]
    if endpoint.body is not None:
        schema = {"$ref": _SCHEMAS.format(model=endpoint.body.__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation
