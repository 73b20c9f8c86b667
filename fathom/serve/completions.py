"""The endpoints that generate text, from the body to the response: whole, or as server-sent events."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from fathom.serve.body import parse, read_json
from fathom.serve.errors import ApiError
from fathom.serve.response import Plan, ResponseBuilder
from fathom.serve.service import Service

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

_Body = TypeVar("_Body", bound=BaseModel)


class CompletionsEndpoint:
    """ASGI endpoint of one of the two paths.

    Not a function that returns a Response: a client that disconnects must free its pages also before there is one.
    Bodies are parsed, with all else that may take long, in another thread than the event loop's.
    """

    def __init__(self, service: Service, body: type[_Body], plan: Callable[[_Body], Plan]) -> None:
        """`plan`: makes the engine's requests of a body; a method of `service`."""
        self._service = service
        self._plan: Callable[[bytes], Plan] = lambda raw: plan(parse(body, raw))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI specifies. Raises ApiError before the response has started."""
        status = 500
        try:
            raw = await read_json(Request(scope, receive))
            await self._answer(raw, scope, receive, send)
            status = 200
        except ApiError as error:
            status = error.status
            raise
        except ClientDisconnect:
            status = 499
        finally:
            self._service.metrics.responses.labels(scope["path"], str(status)).inc()

    async def _answer(self, raw: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Closes the response whatever happens."""
        reply = self._service.open(lambda: self._plan(raw), len(raw))
        disconnected = asyncio.ensure_future(_disconnected(receive))
        disconnected.add_done_callback(lambda _: reply.job.notify(ClientDisconnect()))
        try:
            # In a task of its own: each chunk would resume all the coroutines that the request came through.
            await asyncio.ensure_future(self._send(reply, scope, receive, send))
        finally:
            disconnected.cancel()
            self._service.close(reply)

    async def _send(self, reply: ResponseBuilder, scope: Scope, receive: Receive, send: Send) -> None:
        events = await self._service.next_events(reply)
        if reply.plan.body.stream:
            chunks = reply.chunks(events)
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
            await self._stream(reply, chunks, send)
            return
        while not reply.finished(events):
            events = await self._service.next_events(reply)
        # In another thread: with log-probabilities or routing a response may have megabytes.
        response = await run_in_threadpool(lambda: JSONResponse(reply.whole()))
        await response(scope, receive, send)

    async def _stream(self, reply: ResponseBuilder, chunks: list[str], send: Send) -> None:
        """Send chunks as they come; those generated while the client read slowly go out together."""
        while not reply.over:
            if chunks:
                await send({"type": "http.response.body", "body": _body(chunks), "more_body": True})
            try:
                chunks = reply.chunks(await self._service.next_events(reply))
            except ApiError as error:
                chunks = reply.failure(error)
                break
        await send({"type": "http.response.body", "body": _body(chunks), "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _body(events: list[str]) -> bytes:
    return "".join(events).encode(errors="replace")
