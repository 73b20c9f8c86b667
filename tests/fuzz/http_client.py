"""A client that sends any bytes and reads what comes back, without a library that would correct either."""

import asyncio
from typing import Self


class Connection:
    """One connection; it is opened again where the server has closed it."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave, whatever is on its way."""
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None

    async def send(self, data: bytes) -> None:
        """Send, in a new connection if there is none. Raises OSError where the server has closed it."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address, limit=1 << 20)
        self._streams[1].write(data)
        await self._streams[1].drain()

    async def response(self, method: str = "POST") -> tuple[int, bytes]:
        """The status and the body of the next response. Raises OSError or EOFError where none comes."""
        assert self._streams is not None
        reader = self._streams[0]
        status = 100
        while status == 100:
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head.split(b" ", 2)[1])
        lines = [line.lower() for line in head.split(b"\r\n")]
        body = b""
        if b"transfer-encoding: chunked" in lines and method != "HEAD":
            while size := int(await reader.readuntil(b"\r\n"), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
        elif method != "HEAD":
            length = next((line for line in lines if line.startswith(b"content-length:")), b": 0")
            body = await reader.readexactly(int(length.partition(b":")[2]))
        if b"connection: close" in lines:
            self.close()
        return status, body


def request(body: bytes, path: str = "/v1/completions", method: str = "POST", chunks: int = 0) -> bytes:
    """With its length, or in chunks of so many bytes."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n".encode()
    if not chunks:
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    parts = [body[start : start + chunks] for start in range(0, len(body), chunks)]
    coded = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + coded + b"0\r\n\r\n"
