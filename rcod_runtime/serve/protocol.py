"""HTTP/1.1 for uvicorn, with time limits for what a client must send and read, and the connections
counted for the application."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0
UNREAD_S = 60.0  # the kernel takes megabytes at a time: 20 kB/s are still enough


class TimedProtocol(H11Protocol):
    """Closes connections that would be held for ever: uvicorn waits for a request's head, for the
    rest of a body whose request is answered, and for answers to be read, and some hundred of such
    connections would be all that it takes.

    ``request.state.connections`` is how many were open when this one came, with it. uvicorn's own
    limit would refuse every path, also those by which an orchestrator asks whether the process
    lives, and of many that come together also the first."""

    head_s, unread_s = HEAD_S, UNREAD_S
    _request_timer: asyncio.TimerHandle | None = None
    _answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, "connections": len(self.connections)}
        self._await_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_request()
        self._await_reading()  # answers are written in one piece

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._request_timer, self._answer_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def _await_request(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
        self._request_timer = self.loop.call_later(self.head_s, self._end_request)

    def _end_request(self) -> None:
        no_head = self.conn.their_state is h11.IDLE
        rest_of_body = self.conn.our_state is h11.DONE
        if (no_head or rest_of_body) and not self.transport.is_closing():
            self.transport.close()

    def _await_reading(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
        unread = self.transport.get_write_buffer_size()
        if unread:
            self._answer_timer = self.loop.call_later(self.unread_s, self._end_answer, unread)

    def _end_answer(self, unread: int) -> None:
        """A reader may be slow, but must read."""
        if self.transport.get_write_buffer_size() < unread:
            self._await_reading()
        else:
            self.transport.abort()  # close() would wait until all is sent
