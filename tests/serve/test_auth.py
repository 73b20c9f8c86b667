"""The middleware in front of the routes, without a socket: API keys, CORS, body size."""

import asyncio
import hmac
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server needs starlette")
import httpx
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from fathom.serve.auth import AuthMiddleware
from fathom.serve.errors import HANDLERS


async def inside(request: Any) -> PlainTextResponse:
    return PlainTextResponse(f"{len(await request.body())}")


def guarded(keys: list[str], largest: int = 100) -> AuthMiddleware:
    return AuthMiddleware(
        Starlette(routes=[Route("/in", inside, methods=["POST"])], exception_handlers=HANDLERS), keys, largest
    )


def send(app: Any, **options: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await client.post("/in", **options)

    return asyncio.run(once())


def test_keys_are_kept_as_hashes_only() -> None:
    app = guarded(["sesame-open"])
    assert "sesame" not in repr(vars(app)) and b"sesame" not in b"".join(app._hashes)
    assert all(len(each) == 32 for each in app._hashes)


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: compared.append((one, other)) or real(one, other))
    app = guarded(["first", "second", "third"])
    for key, status in (("first", 200), ("third", 200), ("", 401), ("firs", 401), ("first2", 401)):
        compared.clear()
        assert send(app, headers={"Authorization": f"Bearer {key}"}).status_code == status
        assert [other for _, other in compared] == app._hashes
        assert all(len(one) == 32 for one, _ in compared)


def test_body_size_is_counted_while_it_is_received() -> None:
    app = guarded([])
    assert send(app, content=b"a" * 100).text == "100"
    assert send(app, content=b"a" * 101).status_code == 413
    for length in ("-1", "1e9", "9" * 30, ""):
        assert send(app, content=b"a", headers={"Content-Length": length}).status_code in (200, 413)
        assert send(app, content=b"a" * 200, headers={"Content-Length": length}).status_code == 413


def test_cors_allows_only_listed_origins() -> None:
    app = CORSMiddleware(guarded([]), allow_origins=["https://let.in"], allow_methods=["POST"])
    for origin, let_in in (("https://let.in", True), ("https://strange.example", False)):
        reply = send(app, content=b"", headers={"Origin": origin})
        assert (reply.headers.get("access-control-allow-origin") == origin) == let_in
