"""HTTP as uvicorn reads it, with a limit on what is no body: lines, headers, trailers, and chunks' lengths."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LARGEST_HEAD = 1 << 16
"""Bytes of one request beyond its body. The parser itself would keep a header of any length."""


class Protocol(HttpToolsProtocol):
    """One connection."""

    _beyond = 0

    def data_received(self, data: bytes) -> None:
        """As asyncio specifies."""
        self._beyond += len(data)
        super().data_received(data)
        if self._beyond > LARGEST_HEAD and not self.transport.is_closing():
            if self.cycle is not None and self.cycle.response_started:
                self.transport.close()
            else:
                self.send_400_response(f"The request's headers are too large; the limit is {LARGEST_HEAD} bytes.")

    def on_body(self, body: bytes) -> None:
        """As httptools specifies."""
        self._beyond -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """As httptools specifies."""
        self._beyond = 0
        super().on_message_complete()
