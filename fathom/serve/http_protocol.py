"""uvicorn's HTTP protocol with a limit on everything but the body: request line, headers, trailers, chunk sizes."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 1 << 16
"""Bytes of one request apart from its body. The parser itself would keep a header of any length."""


class Protocol(HttpToolsProtocol):
    """One connection."""

    _beyond = 0

    def data_received(self, data: bytes) -> None:
        """As asyncio specifies."""
        self._beyond += len(data)
        super().data_received(data)
        if self._beyond > MAX_HEADER_BYTES and not self.transport.is_closing():
            if self.cycle is not None and self.cycle.response_started:
                self.transport.close()
            else:
                self.send_400_response(f"The request's headers are too large; the limit is {MAX_HEADER_BYTES} bytes.")

    def on_body(self, body: bytes) -> None:
        """As httptools specifies."""
        self._beyond -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """As httptools specifies."""
        self._beyond = 0
        super().on_message_complete()
