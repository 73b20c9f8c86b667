"""The routes: OpenAI's, the page's, and those that operators ask."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, Response

import fathom
from fathom.serve import metrics
from fathom.serve.answering import CompletionsEndpoint
from fathom.serve.errors import ApiError, wrong_body
from fathom.serve.gate import AuthMiddleware
from fathom.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from fathom.serve.service import Service
from fathom.serve.status import now

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def make_app(
    service: Service,
    description: dict[str, Any],
    keys: Sequence[str],
    origins: Sequence[str],
    hosts: Sequence[str],
    largest_body: int,
    inspector: bytes | None = None,
) -> FastAPI:
    """The application around a service whose worker its lifespan starts and stops.

    `description`: status.describe's. `origins`: web sites that may ask from their own pages. `hosts`: names under which
    the server answers, "*" for all of them. `largest_body`: bytes. `inspector`: a page to show under /inspect.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await run_in_threadpool(service.worker.stop)

    app = FastAPI(title="Fathom", version=fathom.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_texts(app, service, description)
    _add_operations(app, service, description)
    _add_page(app)
    _add_inspector(app, inspector)
    _add_openapi(app)
    # The last one added is the first to see a request.
    app.add_middleware(CompletionsEndpoint, service=service)
    app.add_middleware(AuthMiddleware, keys=keys, largest_body=largest_body)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> Response:
        return wrong_body(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed; its log says more").response()


def _add_texts(app: FastAPI, service: Service, description: dict[str, Any]) -> None:
    @app.post("/tokenize", responses=_responses(_OBJECT))
    async def tokenize(body: TokenizeRequest) -> Response:
        """The token ids of a text, or of a conversation as the model would read it."""

        def encode() -> list[int]:
            if body.messages is not None:
                return service.encode_chat([message.plain() for message in body.messages], [])
            return service.tokenizer.encode(body.prompt or "", bos=body.add_special_tokens)

        ids = await run_in_threadpool(encode)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": description["context"]})

    @app.post("/detokenize", responses=_responses(_OBJECT))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids; control tokens leave none."""
        return JSONResponse({"prompt": await run_in_threadpool(service.tokenizer.decode, body.tokens)})


def _add_operations(app: FastAPI, service: Service, description: dict[str, Any]) -> None:
    card = {"id": service.name, "object": "model", "created": 0, "owned_by": "fathom"}
    card["max_model_len"] = description["context"]

    @app.get("/v1/models", responses=_responses(_OBJECT, body=False))
    async def models() -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{name}", responses=_responses(_OBJECT, body=False))
    async def model(name: str) -> Response:
        """The one model."""
        if name != service.name:
            message = f"there is no model {name[:200]!r}; there is {service.name!r}"
            raise ApiError(404, message, "model", "model_not_found")
        return JSONResponse(card)

    @app.get("/fathom/status", responses=_responses(_OBJECT, body=False))
    async def status() -> Response:
        """The model's shape, and what the engine does now."""
        return JSONResponse({"model": description, "now": now(service.worker)})

    @app.get("/health", responses=_responses(_OBJECT, body=False))
    async def health() -> Response:
        """200 while requests are answered, else 503."""
        if not service.worker.alive:
            raise ApiError(503, "the engine has stopped", code="engine_stopped")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def prometheus() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), headers={"Content-Type": metrics.CONTENT_TYPE})


def _add_page(app: FastAPI) -> None:
    # Read once: no request names a file.
    folder = resources.files("fathom.serve") / "page"
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    def shown(name: str) -> Response:
        kind = _TYPES["." + name.rpartition(".")[2]]
        return Response(files[name], headers={"Cache-Control": "no-cache"}, media_type=kind)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return shown("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in files:
            raise ApiError(404, "the page has no such part")
        return shown(name)


def _add_inspector(app: FastAPI, page: bytes | None) -> None:
    # Its scripts are in the page. They run in an origin of their own, without this one's storage, and reach no network.
    policy = "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

    @app.get("/inspect", include_in_schema=False)
    async def inspect() -> Response:
        if page is None:
            raise ApiError(404, "no page is served here: fathom inspect makes one, fathom serve --inspector shows it")
        return Response(page, headers={"Content-Security-Policy": policy}, media_type="text/html")


_SCHEMAS = "#/components/schemas/{model}"

_OBJECT = {"application/json": {"schema": {"type": "object"}}}


def _responses(content: dict[str, Any], stream: bool = False, body: bool = True) -> dict[int | str, dict[str, Any]]:
    told: dict[int | str, dict[str, Any]] = {200: {"description": "the answer", "content": dict(content)}}
    if stream:
        told[200]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    causes = {401: "no valid API key", 404: "no such model", 500: "the server failed", 503: "the engine has stopped"}
    if body:
        causes |= {400: "the request is wrong, and what about it", 408: "took too long", 413: "too large"}
        causes |= {429: "too many requests wait"}
    error = {"application/json": {"schema": _ERROR_SCHEMA}}
    return told | {status: {"description": cause, "content": error} for status, cause in causes.items()}


def _takes(body: type[BaseModel], does: str) -> dict[str, Any]:
    """How the document speaks of a path that is answered before FastAPI sees it."""
    content = {"application/json": {"schema": {"$ref": _SCHEMAS.format(model=body.__name__)}}}
    answers = {str(status): answer for status, answer in _responses(_OBJECT, stream=True).items()}
    operation = {"summary": does, "operationId": body.__name__}
    return {"post": operation | {"requestBody": {"required": True, "content": content}, "responses": answers}}


def _add_openapi(app: FastAPI) -> None:
    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # FastAPI's own, which is never sent
            document["paths"] |= {
                "/v1/completions": _takes(CompletionRequest, "Continue texts, or token ids."),
                "/v1/chat/completions": _takes(ChatRequest, "Answer in a conversation."),
            }
            bodies: list[Any] = [(CompletionRequest, "validation"), (ChatRequest, "validation")]
            _, schemas = models_json_schema(bodies, ref_template=_SCHEMAS)
            document["components"]["schemas"] |= schemas["$defs"]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]
