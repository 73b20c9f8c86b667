"""The routes: OpenAI's, the page's, and those that operators ask."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

import fathom
from fathom.serve import metrics
from fathom.serve.errors import ApiError
from fathom.serve.gate import Gate
from fathom.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from fathom.serve.service import Plan, Service
from fathom.serve.status import now
from fathom.serve.worker import Job

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
    _add_answers(app, service)
    _add_texts(app, service, description)
    _add_operations(app, service, description)
    _add_page(app)
    _add_inspector(app, inspector)
    _add_openapi(app)
    # The last one added is the first to see a request.
    app.add_middleware(Gate, keys=keys, largest_body=largest_body)
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
    async def wrong_body(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # Inside a union every alternative complains; its name says nothing to a client.
        place = [str(part) for part in first["loc"] if part not in ("body",) and "[" not in str(part)]
        message = str(first["msg"]).removeprefix("Value error, ")
        return ApiError(400, f"{'.'.join(place)}: {message}" if place else message, ".".join(place) or None).response()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed; its log says more").response()


def _add_answers(app: FastAPI, service: Service) -> None:
    async def answer(request: Request, plan: Plan) -> Response:
        job = await service.open(plan)
        if plan.body.stream:
            return EventStream(service, plan, job)
        try:
            whole = await _unless_gone(request, service.whole(plan, job))
        finally:
            service.close(job)
        return Response(status_code=499) if whole is None else JSONResponse(whole)

    async def counted(request: Request, make: Callable[[], Plan]) -> Response:
        try:
            response = await answer(request, await run_in_threadpool(make))
        except ApiError as error:
            service.metrics.answered(request.url.path, error.status)
            raise
        service.metrics.answered(request.url.path, response.status_code)
        return response

    @app.post("/v1/completions", responses=_responses(_OBJECT, stream=True))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts, or token ids."""
        return await counted(request, lambda: service.plan_completion(body))

    @app.post("/v1/chat/completions", responses=_responses(_OBJECT, stream=True))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer in a conversation."""
        return await counted(request, lambda: service.plan_chat(body))


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


def _add_openapi(app: FastAPI) -> None:
    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # FastAPI's own, which is never sent
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]


async def _unless_gone(request: Request, work: Awaitable[dict[str, Any]]) -> dict[str, Any] | None:
    """The work's result; None, and the work cancelled, where the client has gone."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        gone.cancel()
        working.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events; whatever happens to the client or here, the job is closed."""

    def __init__(self, service: Service, plan: Plan, job: Job) -> None:
        super().__init__(status_code=200, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.headers["Content-Type"] = "text/event-stream; charset=utf-8"
        del self.headers["Content-Length"]
        self._service, self._plan, self._job = service, plan, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI specifies."""
        request = Request(scope, receive)
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
        finally:
            gone.cancel()
            sending.cancel()
            self._service.close(self._job)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._service.chunks(self._plan, self._job):
                await self._event(send, chunk)
            await self._event(send, "[DONE]")
        except ApiError as error:
            await self._event(send, json.dumps(error.body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _event(self, send: Send, data: str) -> None:
        body = f"data: {data}\n\n".encode(errors="replace")
        await send({"type": "http.response.body", "body": body, "more_body": True})
