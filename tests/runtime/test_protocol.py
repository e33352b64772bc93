"""What ``rcod-serve`` does with connections whose clients neither send nor read, and with those for
which a stop doesn't wait: its protocol, with shorter time limits, over loopback."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn")

from rcod_runtime.serve.protocol import Server, TimedProtocol  # noqa: E402

ANSWER = bytes(16 * 2**20)  # more than the kernel keeps for a socket

LARGE = b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n"


class Hasty(TimedProtocol):
    head_s, unread_s = 1.5, 2.0  # longer than a busy machine holds a thread up


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    body = ANSWER if scope["path"] == "/large" else b"ok"
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-length", str(len(body)).encode())]})  # fmt: skip
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    config = uvicorn.Config(app, http=Hasty, lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    # Else the kernel takes megabytes at a time, and what is left shrinks by jumps.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**18)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield server
    server.should_exit = True
    thread.join()


def connect(server: Any, sent: bytes) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
    connection.settimeout(30)
    connection.connect(server.servers[0].sockets[0].getsockname())
    connection.sendall(sent)
    return connection


def read_to_end(connection: socket.socket, pause_s: float = 0.0) -> int:
    count = 0
    while part := connection.recv(2**16):
        count += len(part)
        time.sleep(pause_s)
    return count


def test_a_body_that_does_not_end_though_its_request_is_answered(server: Any) -> None:
    request = b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
    with closing(connect(server, request)) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        began = time.monotonic()
        with suppress(ConnectionError):  # where this process is that slow it is closed already
            connection.sendall(b"a")  # for uvicorn that is life, and the connection is kept
            read_to_end(connection)
        assert time.monotonic() - began < 4, "uvicorn's own limit is 5 s from the answer"


def test_an_answer_that_nobody_reads(server: Any) -> None:
    with closing(connect(server, LARGE)) as connection:
        assert connection.recv(1, socket.MSG_PEEK), "its beginning is there"
        deadline = time.monotonic() + 20
        while server.server_state.connections:
            assert time.monotonic() < deadline, "the connection is held for ever"
            time.sleep(0.01)
        assert read_to_end(connection) < len(ANSWER), "what the kernel had"


def test_an_answer_that_is_read_slowly_arrives(server: Any) -> None:
    with closing(connect(server, LARGE)) as connection:
        began = time.monotonic()
        assert read_to_end(connection, pause_s=0.016) > len(ANSWER)
        assert time.monotonic() - began > 1.5 * Hasty.unread_s, "not slow enough to tell"


def test_a_second_ctrl_c_aborts_what_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn leaves it to asyncio then, which waits for open connections, from Python 3.12 on."""
    seen: list[str] = []

    async def never(scope: Any, receive: Any, send: Any) -> None:
        while "http.disconnect" not in seen:
            seen.append((await receive())["type"])

    async def wait_closed(_: asyncio.Server) -> None:
        while server.server_state.connections:
            await asyncio.sleep(0.01)

    monkeypatch.setattr(asyncio.base_events.Server, "wait_closed", wait_closed)
    config = uvicorn.Config(
        never, http=TimedProtocol, lifespan="off", log_level="warning", loop="asyncio"
    )
    server = Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    with closing(connect(server, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")) as connection:
        while not seen:
            time.sleep(0.01)
        server.handle_exit(signal.SIGINT, None)
        time.sleep(0.5)
        assert thread.is_alive() and seen == ["http.request"], "it waits for its requests"
        server.handle_exit(signal.SIGINT, None)
        with suppress(ConnectionError):
            assert connection.recv(1) == b""
        thread.join(30)
    assert seen[-1] == "http.disconnect", "it was cancelled at most, with the loop"
    assert not thread.is_alive() and not server.server_state.connections
