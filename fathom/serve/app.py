"""The ASGI application: the table of endpoints, and the middleware in front of them."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import fathom
from fathom.serve import errors, metrics
from fathom.serve.auth import AuthMiddleware
from fathom.serve.body import parse, read_json
from fathom.serve.completions import CompletionsEndpoint
from fathom.serve.errors import ApiError
from fathom.serve.openapi import Endpoint, openapi_document
from fathom.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from fathom.serve.service import Service
from fathom.serve.static import inspector_route, page_routes
from fathom.serve.status import engine_status


def make_app(
    service: Service,
    description: dict[str, Any],
    keys: Sequence[str],
    origins: Sequence[str],
    hosts: Sequence[str],
    largest_body: int,
    inspector: bytes | None = None,
) -> Starlette:
    """The application around a service whose engine thread its lifespan starts and stops.

    `description`: status.describe's. `origins`: web sites whose pages may send requests. `hosts`: names under which
    the server answers, "*" for all of them. `largest_body`: bytes. `inspector`: a page to show under /inspect.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.engine_thread.start()
        yield
        await run_in_threadpool(service.engine_thread.stop)

    endpoints = _Api(service, description).endpoints()
    routes = [endpoint.route() for endpoint in endpoints]
    routes += [*page_routes(), inspector_route(inspector), _openapi_route(endpoints)]
    # From the outermost to the innermost.
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)]
    if origins:
        methods = ["GET", "POST"]
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=methods, allow_headers=["*"])
        )
    middleware.append(Middleware(AuthMiddleware, keys=keys, largest_body=largest_body))
    return Starlette(routes=routes, middleware=middleware, exception_handlers=errors.HANDLERS, lifespan=lifespan)


def _openapi_route(endpoints: Sequence[Endpoint]) -> Route:
    document = openapi_document("Fathom", fathom.__version__, endpoints)

    async def openapi(request: Request) -> Response:
        return JSONResponse(document)

    return Route("/openapi.json", openapi)


class _Api:
    """The endpoints of one model."""

    def __init__(self, service: Service, description: dict[str, Any]) -> None:
        self._service = service
        self._description = description
        card = {"id": service.name, "object": "model", "created": 0, "owned_by": "fathom"}
        self._card = card | {"max_model_len": description["context"]}

    def endpoints(self) -> list[Endpoint]:
        """Routes and the OpenAPI document both come from this table."""
        service, stream = self._service, ("application/json", "text/event-stream")
        completions = CompletionsEndpoint(service, CompletionRequest, service.plan_completion)
        chat = CompletionsEndpoint(service, ChatRequest, service.plan_chat)
        return [
            Endpoint("POST", "/v1/completions", "Continue texts or token ids", completions, CompletionRequest, stream),
            Endpoint("POST", "/v1/chat/completions", "Answer a conversation", chat, ChatRequest, stream),
            Endpoint("GET", "/v1/models", "The one model", self._models),
            Endpoint("GET", "/v1/models/{name}", "The one model", self._model),
            Endpoint(
                "POST",
                "/tokenize",
                "Token ids of a text, or of a conversation by the chat template",
                self._tokenize,
                TokenizeRequest,
            ),
            Endpoint(
                "POST", "/detokenize", "Text of token ids, without control tokens", self._detokenize, DetokenizeRequest
            ),
            Endpoint("GET", "/fathom/status", "The model's shape and the engine's state", self._status),
            Endpoint("GET", "/health", "200 while requests can be served, else 503", self._health),
            Endpoint("GET", "/metrics", "Prometheus metrics", self._metrics, content_types=("text/plain",)),
        ]

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card]})

    async def _model(self, request: Request) -> Response:
        self._service.check_name(request.path_params["name"])
        return JSONResponse(self._card)

    async def _tokenize(self, request: Request) -> Response:
        raw = await read_json(request)

        def encode() -> list[int]:
            body = parse(TokenizeRequest, raw)
            if body.messages is not None:
                return self._service.encode_chat([message.plain() for message in body.messages], [])
            return self._service.tokenizer.encode(body.prompt or "", bos=body.add_special_tokens)

        ids = await run_in_threadpool(encode)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self._description["context"]})

    async def _detokenize(self, request: Request) -> Response:
        raw = await read_json(request)

        def decode() -> str:
            return self._service.tokenizer.decode(parse(DetokenizeRequest, raw).tokens)

        return JSONResponse({"prompt": await run_in_threadpool(decode)})

    async def _status(self, request: Request) -> Response:
        return JSONResponse({"model": self._description, "now": engine_status(self._service.engine_thread)})

    async def _health(self, request: Request) -> Response:
        if not self._service.engine_thread.alive:
            raise ApiError(503, "the engine has stopped", code="engine_stopped")
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), headers={"Content-Type": metrics.CONTENT_TYPE})
