"""Middleware in front of the routes: API keys, a limit on the size of bodies, security headers of the page."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fathom.serve.errors import ApiError

_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class AuthMiddleware:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], largest_body: int) -> None:
        """`keys`: each is accepted; none: no authentication. Only their hashes are kept. `largest_body` in bytes."""
        self._app = app
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._largest = largest_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI specifies."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        counted = _BodyCounter(receive, self._largest)

        async def guarded(message: Message) -> None:
            if counted.exceeded:
                return  # whatever the application responds: the response is the 413 below
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(one for one in _HEADERS if one[0] not in given)]
            await send(message)

        refusal = self._refusal(scope["path"], dict(scope["headers"]))
        if refusal is None:
            try:
                await self._app(scope, counted.receive, guarded)
            except ApiError:
                if not counted.exceeded:
                    raise
            if counted.exceeded:
                counted.exceeded, refusal = False, _too_large(self._largest)
        if refusal is not None:
            await refusal.response()(scope, receive, guarded)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._hashes and not (path in ("/", "/health", "/inspect") or path.startswith("/page/")):
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            found = hashlib.sha256(key.strip()).digest()
            # All of them, so that the time does not depend on which one nearly matched.
            right = [hmac.compare_digest(found, known) for known in self._hashes]
            if kind.lower() != b"bearer" or not any(right):
                return ApiError(401, "an API key is required: Authorization: Bearer KEY", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:19]) > self._largest:
            return _too_large(self._largest)
        return None


class _BodyCounter:
    """Counts the bytes of the body itself: the Content-Length header may be missing or wrong."""

    def __init__(self, receive: Receive, largest: int) -> None:
        self._receive = receive
        self._largest = self._left = largest
        self.exceeded = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.exceeded = True
            raise _too_large(self._largest)
        return message


def _too_large(largest: int) -> ApiError:
    return ApiError(413, f"the body is too large; the limit is {largest} bytes", code="body_too_large")
