"""The ASGI application: the table of endpoints, and the middleware in front of them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

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
from fathom.serve.messages import CountTokensRequest, MessagesRequest, count_tokens, plan_messages
from fathom.serve.openapi import Endpoint, openapi_document
from fathom.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, InfillRequest, TokenizeRequest
from fathom.serve.responses import ResponsesRequest, plan_responses
from fathom.serve.service import Service
from fathom.serve.static import inspector_route, page_routes
from fathom.serve.status import describe, engine_status

_STREAM = ("application/json", "text/event-stream")


def make_app(
    service: Service,
    keys: Sequence[str] = (),
    origins: Sequence[str] = (),
    hosts: Sequence[str] = ("*",),
    largest_body: int = 4 << 20,
    inspector: bytes | None = None,
) -> Starlette:
    """The application around a service whose engine thread its lifespan starts and stops.

    `keys`: accepted API keys; none: no authentication. `origins`: web sites whose pages may send requests. `hosts`:
    names under which the server answers, "*" for all of them. `largest_body`: bytes. `inspector`: a page to show under
    /inspect.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.engine_thread.start()
        yield
        await run_in_threadpool(service.engine_thread.stop)

    endpoints = _endpoints(service, inspector is not None)
    document = openapi_document("Fathom", fathom.__version__, endpoints)

    async def openapi(request: Request) -> Response:
        return JSONResponse(document)

    routes = [endpoint.route() for endpoint in endpoints]
    routes += [*page_routes(), inspector_route(inspector), Route("/openapi.json", openapi)]
    # From the outermost to the innermost.
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
        Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"]),
        Middleware(AuthMiddleware, keys=keys, largest_body=largest_body),
    ]
    return Starlette(routes=routes, middleware=middleware, exception_handlers=errors.HANDLERS, lifespan=lifespan)


def _endpoints(service: Service, inspector: bool) -> list[Endpoint]:
    """Routes and the OpenAPI document both come from this table."""
    description = describe(service.engine, service.name, service.template is not None) | {"inspector": inspector}
    context = description["context"]
    card = {"id": service.name, "object": "model", "created": 0, "owned_by": "fathom", "max_model_len": context}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        service.check_name(request.path_params["name"])
        return JSONResponse(card)

    async def no_response(request: Request) -> Response:
        raise ApiError(404, "responses are not stored here, so none can be retrieved", code="not_stored")

    async def status(request: Request) -> Response:
        return JSONResponse({"model": description, "now": engine_status(service.engine_thread)})

    async def health(request: Request) -> Response:
        if not service.engine_thread.alive:
            raise ApiError(503, "the engine has stopped", code="engine_stopped")
        return JSONResponse({"status": "ok"})

    async def prometheus(request: Request) -> Response:
        text = await run_in_threadpool(service.metrics.text)  # a line for each of thousands of experts
        return Response(text, headers={"Content-Type": metrics.CONTENT_TYPE})

    return [
        *_completion_endpoints(service),
        *_token_endpoints(service, context),
        Endpoint("GET", "/v1/responses/{name}", "Refused: nothing is stored", no_response),
        Endpoint("GET", "/v1/models", "The one model", models),
        Endpoint("GET", "/v1/models/{name}", "The one model", model),
        Endpoint("GET", "/fathom/status", "The model's shape and the engine's state", status),
        Endpoint("GET", "/health", "200 while requests can be served, else 503", health),
        Endpoint("GET", "/metrics", "Prometheus metrics", prometheus, content_types=("text/plain",)),
    ]


def _completion_endpoints(service: Service) -> list[Endpoint]:
    """What the model answers to."""
    complete = CompletionsEndpoint(service, CompletionRequest, service.plan_completion)
    chat = CompletionsEndpoint(service, ChatRequest, service.plan_chat)
    infill = CompletionsEndpoint(service, InfillRequest, service.plan_infill)
    responses = CompletionsEndpoint(service, ResponsesRequest, lambda body: plan_responses(service, body))
    messages = CompletionsEndpoint(service, MessagesRequest, lambda body: plan_messages(service, body))
    return [
        Endpoint("POST", "/v1/completions", "Continue texts or token ids", complete, CompletionRequest, _STREAM),
        Endpoint("POST", "/v1/chat/completions", "Answer a conversation", chat, ChatRequest, _STREAM),
        Endpoint("POST", "/v1/responses", "Answer, by OpenAI's Responses", responses, ResponsesRequest, _STREAM),
        Endpoint("POST", "/v1/messages", "Answer, by Anthropic's Messages", messages, MessagesRequest, _STREAM),
        Endpoint("POST", "/infill", "Fill in between two texts", infill, InfillRequest, _STREAM),
    ]


def _token_endpoints(service: Service, context: int) -> list[Endpoint]:
    """Texts to token ids and back, on the threads that prepare requests."""

    async def prepared(request: Request, respond: Callable[[bytes], Response]) -> Response:
        raw = await read_json(request)
        threads = service.engine_thread.preparation(len(raw))
        return await asyncio.get_running_loop().run_in_executor(threads, respond, raw)

    async def tokenize(request: Request) -> Response:
        def response(raw: bytes) -> Response:
            ids = service.tokenize(parse(TokenizeRequest, raw))
            return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": context})

        return await prepared(request, response)

    async def detokenize(request: Request) -> Response:
        return await prepared(
            request, lambda raw: JSONResponse({"prompt": service.detokenize(parse(DetokenizeRequest, raw))})
        )

    async def counted(request: Request) -> Response:
        def response(raw: bytes) -> Response:
            return JSONResponse(count_tokens(service, parse(CountTokensRequest, raw)))

        return await prepared(request, response)

    ids_of = "Token ids of a text, or of a conversation by the chat template"
    text_of = "Text of token ids, without control tokens"
    return [
        Endpoint("POST", "/v1/messages/count_tokens", "Length of a prompt", counted, CountTokensRequest),
        Endpoint("POST", "/tokenize", ids_of, tokenize, TokenizeRequest),
        Endpoint("POST", "/detokenize", text_of, detokenize, DetokenizeRequest),
    ]
