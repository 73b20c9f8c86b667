"""uvicorn's HTTP protocol, with limits on what a client may hold: headers, unfinished requests, connections.

uvicorn bounds idle connections alone. Here a request has to be complete in time, a response has to be read in time,
and a new connection beyond the limit takes the place of the one that has waited longest for its client.
"""

from asyncio import BaseTransport, TimerHandle
from typing import Any

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from fathom.serve.errors import ApiError

MAX_HEADER_BYTES = 1 << 16
"""Bytes of one request apart from its body, and of what a client sends ahead of the response that it waits for. The
parser itself would keep a header of any length."""

CLIENT_SECONDS = 30.0
"""For a client to send the whole of a request, from its first byte or, in a new connection, from the beginning; and to
take anything of a response that waits for it."""


class Connections:
    """Those of one server that wait for their clients to send or to read, the longest waiting first."""

    def __init__(self, most: int) -> None:
        """`most`: connections of the server, whatever they do."""
        self.most = most
        self.waiting: dict[Protocol, None] = {}


class _Parser(HttpRequestParser):
    """Ignores that a client offers another protocol, as Java's does (h2c), where httptools would drop the body."""

    def __init__(self, protocol: "Protocol") -> None:
        super().__init__(protocol)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets it
        self._protocol = protocol

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]  # what asyncio gives it
        """As httptools specifies."""
        try:
            super().feed_data(data)
        except HttpParserUpgrade as upgrade:
            if not self.ignores_upgrade():
                raise
            headers = [header for header in self._protocol.headers if header[0] != b"upgrade"]
            lines = b"".join(b"%s: %s\r\n" % header for header in headers)
            request = b"%s %s HTTP/%s\r\n" % (
                self.get_method(),
                self._protocol.url,
                self.get_http_version().encode(),
            )
            self.feed_data(request + lines + b"\r\n" + data[upgrade.args[0] :])

    def ignores_upgrade(self) -> bool:
        """Whether the request that was just parsed is to be parsed again without its Upgrade header."""
        return bool(self.should_upgrade()) and self.get_method() != b"CONNECT"


class Protocol(HttpToolsProtocol):
    """One connection.

    uvicorn pauses reading where requests are pipelined, and the end of a connection is not noticed while reading is
    paused. So what comes ahead of a response is read, and kept unparsed until the response is complete.
    """

    parser: _Parser

    def __init__(self, others: Connections, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self.parser = _Parser(self)
        self._others = others
        self._beyond = 0
        self._ahead = b""
        self._cycles: list[RequestResponseCycle] = []
        self._begun = False
        """Whether a request has begun that is not complete."""
        self._request_timer: TimerHandle | None = None
        self._response_timer: TimerHandle | None = None

    # ------------------------------------------------------------------------------------- as asyncio specifies

    def connection_made(self, transport: BaseTransport) -> None:  # type: ignore[override]
        """Closes the connection that has waited longest for its client where there are too many."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.transport.set_write_buffer_limits(high=0)
        self._wait_for_request()
        if len(self.connections) > self._others.most:
            longest = next(iter(self._others.waiting))
            if longest is self:
                self._refuse(ApiError(503, "too many connections; try again later", code="too_many_connections"))
            else:
                longest.transport.abort()
            self._others.waiting.pop(longest, None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the requests of the connection: all of them, where uvicorn ends the last one."""
        self._others.waiting.pop(self, None)
        self._cancel_timers()
        for cycle in self._cycles:
            cycle.disconnected = not cycle.response_complete
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses what belongs to the request that the client is waited for."""
        if not self._waits_for_request():
            self._ahead += data
            if len(self._ahead) > MAX_HEADER_BYTES:
                self.transport.abort()
            return
        self._wait_for_request()
        self._beyond += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._beyond > MAX_HEADER_BYTES:
            self.send_400_response(f"The request's headers are too large; the limit is {MAX_HEADER_BYTES} bytes.")
        elif self.pipeline:
            self.flow.resume_reading()
        elif self._waits_for_request():
            self._wait_for_request()

    def pause_writing(self) -> None:
        """The client does not read its response."""
        super().pause_writing()
        self._others.waiting[self] = None
        self._wait_for_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client has read all of its response so far."""
        super().resume_writing()
        if self._response_timer is not None:
            self._response_timer.cancel()
        if not self._waits_for_request():
            self._others.waiting.pop(self, None)

    # ------------------------------------------------------------------------------------ as httptools specifies

    def on_message_begin(self) -> None:
        """The first bytes of a request."""
        self._begun = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A request to respond to."""
        if self.parser.ignores_upgrade():
            return
        super().on_headers_complete()
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete] + [self.cycle]

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._beyond -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request: what comes next is for the server to do."""
        if self.parser.ignores_upgrade():
            return
        self._begun = False
        self._beyond = 0
        super().on_message_complete()
        self._others.waiting.pop(self, None)
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    # -------------------------------------------------------------------------------------- as uvicorn specifies

    def on_response_complete(self) -> None:
        """The end of a response; parses what came ahead of it."""
        super().on_response_complete()
        if self.transport.is_closing() or not self._waits_for_request():
            return
        self._others.waiting[self] = None
        if self._ahead:
            data, self._ahead = self._ahead, b""
            self.data_received(data)

    def send_400_response(self, msg: str) -> None:
        """The response to what is no request."""
        self._refuse(ApiError(400, msg))

    # ----------------------------------------------------------------------------------------------------- waiting

    def _waits_for_request(self) -> bool:
        """Whether the server has nothing to do before the client has sent more."""
        cycle = self.cycle
        return not self.pipeline and (cycle is None or cycle.more_body or cycle.response_complete)

    def _wait_for_request(self) -> None:
        """Give the client time for a request, if it has none yet."""
        self._others.waiting.setdefault(self)
        if self._request_timer is None:
            self._request_timer = self.loop.call_later(CLIENT_SECONDS, self._request_overdue)

    def _request_overdue(self) -> None:
        message = f"the request was not complete after {CLIENT_SECONDS:g} s"
        if self._begun:
            self._refuse(ApiError(408, message, code="request_timeout"))
        else:
            self.transport.close()

    def _wait_for_reader(self, unread: int) -> None:
        """Give the client time to read some of the `unread` bytes."""
        self._response_timer = self.loop.call_later(CLIENT_SECONDS, self._response_overdue, unread)

    def _response_overdue(self, unread: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left < unread:
            self._wait_for_reader(left)
        else:
            self.transport.abort()

    def _cancel_timers(self) -> None:
        for timer in (self._request_timer, self._response_timer):
            if timer is not None:
                timer.cancel()

    def _refuse(self, error: ApiError) -> None:
        """Respond with an error, unless there is a response already, and close the connection."""
        if self.transport.is_closing():
            return
        if not any(cycle.response_started and not cycle.response_complete for cycle in self._cycles):
            response = error.response()
            headers = [*response.raw_headers, (b"connection", b"close")]
            lines = [b"%s: %s\r\n" % header for header in headers]
            self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", bytes(response.body)]))
        self.transport.close()
