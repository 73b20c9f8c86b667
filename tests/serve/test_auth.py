"""What stands before the routes, without a socket: keys, origins, sizes."""

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


async def inside(request: Any) -> PlainTextResponse:
    return PlainTextResponse(f"{len(await request.body())}")


def gate(keys: list[str], largest: int = 100) -> AuthMiddleware:
    return AuthMiddleware(Starlette(routes=[Route("/in", inside, methods=["POST"])]), keys, largest)


def ask(app: Any, **options: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await client.post("/in", **options)

    return asyncio.run(once())


def test_keys_are_kept_as_hashes_only() -> None:
    stands = gate(["sesame-open"])
    assert "sesame" not in repr(vars(stands)) and b"sesame" not in b"".join(stands._hashes)
    assert all(len(each) == 32 for each in stands._hashes)


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: compared.append((one, other)) or real(one, other))
    stands = gate(["first", "second", "third"])
    for key, status in (("first", 200), ("third", 200), ("", 401), ("firs", 401), ("first2", 401)):
        compared.clear()
        assert ask(stands, headers={"Authorization": f"Bearer {key}"}).status_code == status
        assert [other for _, other in compared] == stands._hashes
        assert all(len(one) == 32 for one, _ in compared)


def test_sizes_are_counted_as_they_come() -> None:
    stands = gate([])
    assert ask(stands, content=b"a" * 100).text == "100"
    assert ask(stands, content=b"a" * 101).status_code == 413
    for told in ("-1", "1e9", "9" * 30, ""):
        assert ask(stands, content=b"a", headers={"Content-Length": told}).status_code in (200, 413)
        assert ask(stands, content=b"a" * 200, headers={"Content-Length": told}).status_code == 413


def test_origins_that_were_let_in_may_ask() -> None:
    app = CORSMiddleware(gate([]), allow_origins=["https://let.in"], allow_methods=["POST"])
    for origin, let_in in (("https://let.in", True), ("https://strange.example", False)):
        reply = ask(app, content=b"", headers={"Origin": origin})
        assert (reply.headers.get("access-control-allow-origin") == origin) == let_in
