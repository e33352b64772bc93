"""HTTP/1.1 for uvicorn, with time limits for what a client must send and read, the connections
counted for the application, and aborted where a stop is not waited for."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0
UNREAD_S = 60.0  # the kernel takes megabytes at a time: 20 kB/s are still enough


class TimedProtocol(H11Protocol):
    """Closes connections that would be held for ever: uvicorn waits for a request's head, for the
    rest of a body whose request is answered, and for answers to be read, and some hundred of such
    connections would be all that it takes.

    ``request.state.connections`` are those that are open, as they come and go;
    ``request.state.came_as`` is how many there were when this one came, with it. uvicorn's own
    limit would refuse every path, also those by which an orchestrator asks whether the process
    lives, and of many that come together also the first."""

    head_s, unread_s = HEAD_S, UNREAD_S
    _request_timer: asyncio.TimerHandle | None = None
    _answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        counted = {"connections": self.connections, "came_as": len(self.connections)}
        self.app_state = {**self.app_state, **counted}
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


class Server(uvicorn.Server):
    """A second Ctrl-C aborts what is open, for which its requests are those of clients that left.

    uvicorn itself would only look no more whether connections are closed, and then leave it to
    asyncio, which from Python 3.12 on waits for them (gh-120866)."""

    _loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.force_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._abort, self._loop)

    def _abort(self, loop: asyncio.AbstractEventLoop) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        loop.call_later(0.1, self._abort, loop)  # it may listen for a moment more
