"""Middleware in front of the routes: API keys, limits on the bytes of bodies, security headers of the page."""

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


_RETRY_SECONDS = 2
_SHORT_BYTES = 1 << 16
_LARGEST_BODIES = 16
"""As many bytes as this number of the largest bodies are held at once; bodies of up to 64 kB always fit."""


class AuthMiddleware:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], largest_body: int) -> None:
        """`keys`: each is accepted; none: no authentication. Only their hashes are kept. `largest_body` in bytes."""
        self._app = app
        self._held = 0
        """Bytes of the bodies of all requests that are being received or responded to."""
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._largest = largest_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI specifies."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        too_large = ApiError(413, f"the body is too large; the limit is {self._largest} bytes", code="body_too_large")
        received = 0

        async def counted() -> Message:
            # The Content-Length header may be missing or wrong.
            nonlocal received
            message = await receive()
            length = len(message.get("body", b""))
            received += length
            self._held += length
            if received > self._largest:
                raise too_large
            if received > _SHORT_BYTES and self._held > _LARGEST_BODIES * self._largest:
                reason = "the bodies of other requests take the memory that there is for them; try again later"
                raise ApiError(503, reason, code="too_many_bodies", retry_after=_RETRY_SECONDS)
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(one for one in _HEADERS if one[0] not in given)]
            await send(message)

        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if self._is_refused(scope["path"], _key(headers)):
            message = "an API key is required: Authorization: Bearer KEY, or x-api-key: KEY"
            refusal = ApiError(401, message, code="invalid_api_key")
            await refusal.response()(scope, receive, with_headers)
        elif not length.isdigit() or int(length[:19]) > self._largest:
            await too_large.response()(scope, receive, with_headers)
        else:
            try:
                await self._app(scope, counted, with_headers)
            finally:
                self._held -= received

    def _is_refused(self, path: str, key: bytes) -> bool:
        if not self._hashes or path in ("/", "/health", "/inspect") or path.startswith("/page/"):
            return False
        found = hashlib.sha256(key).digest()
        # All of them, so that the time does not depend on which one nearly matched.
        return not any([hmac.compare_digest(found, known) for known in self._hashes])


def _key(headers: dict[bytes, bytes]) -> bytes:
    """The request's key: OpenAI's clients send it as a bearer token, Anthropic's in a header of its own."""
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"").strip()
