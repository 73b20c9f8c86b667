"""The two paths that answer with text, from the body to the response: whole, or as server-sent events."""

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fathom.serve.errors import ApiError
from fathom.serve.protocol import ChatRequest, CompletionRequest, parsed
from fathom.serve.reply import Plan, Reply, as_json
from fathom.serve.service import Service

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class CompletionsEndpoint:
    """ASGI middleware: answers requests for text, and lets all others pass.

    Behind it FastAPI would lead each of them through a dozen layers, for half a millisecond of a processor that the
    engine computes with. Bodies are read with all else that takes long, in another thread than the event loop's.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._plans: dict[str, Callable[[bytes], Plan]] = {
            "/v1/completions": lambda raw: service.plan_completion(parsed(CompletionRequest, raw)),
            "/v1/chat/completions": lambda raw: service.plan_chat(parsed(ChatRequest, raw)),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI specifies."""
        plan = self._plans.get(scope["path"]) if scope["type"] == "http" else None
        if plan is None:
            await self._app(scope, receive, send)
            return
        status = 500
        try:
            raw = await _json_body(scope, receive)
            await self._answer(lambda: plan(raw), scope, receive, send)
            status = 200
        except ApiError as error:
            status = error.status
            await error.response()(scope, receive, send)
        except _GoneError:
            status = 499
        finally:
            self._service.metrics.answered(scope["path"], status)

    async def _answer(self, make: Callable[[], Plan], scope: Scope, receive: Receive, send: Send) -> None:
        """Whatever happens to the client or here, the reply is closed in the end."""
        reply = self._service.open(make)
        gone = asyncio.ensure_future(_gone(receive))
        gone.add_done_callback(lambda _: reply.job.notify(_GoneError()))
        try:
            # In a task of its own: each piece would wake all the layers that the request came through.
            await asyncio.ensure_future(self._send(reply, scope, receive, send))
        finally:
            gone.cancel()
            self._service.close(reply)

    async def _send(self, reply: Reply, scope: Scope, receive: Receive, send: Send) -> None:
        events = await self._service.next_events(reply)
        if reply.plan.body.stream:
            chunks = reply.chunks(events)
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
            await self._stream(reply, chunks, send)
            return
        reply.collect(events)
        while not reply.over:
            reply.collect(await self._service.next_events(reply))
        await JSONResponse(reply.whole())(scope, receive, send)

    async def _stream(self, reply: Reply, chunks: list[str], send: Send) -> None:
        """Send what there is and what comes. What came while a reader was slow goes out together."""
        while not reply.over:
            if chunks:
                await send({"type": "http.response.body", "body": _events(chunks), "more_body": True})
            try:
                chunks = reply.chunks(await self._service.next_events(reply))
            except ApiError as error:
                chunks = [as_json(error.body())]
                break
        else:
            chunks = [*chunks, "[DONE]"]
        await send({"type": "http.response.body", "body": _events(chunks), "more_body": False})


class _GoneError(Exception):
    """The client has left."""


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _json_body(scope: Scope, receive: Receive) -> bytes:
    """The body as it came. A strange page could send one that does not say that it is JSON: that is refused."""
    if scope["method"] != "POST":
        raise ApiError(405, f"the method is {scope['method']}; it must be POST")
    kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(400, f"the content-type is {kind[:80]!r}; it must be 'application/json'", "content-type")
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        pieces.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(pieces)


def _events(chunks: list[str]) -> bytes:
    return "".join([f"data: {chunk}\n\n" for chunk in chunks]).encode(errors="replace")
