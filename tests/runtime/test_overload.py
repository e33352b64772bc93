"""``rcod-serve`` asked for more than it can do: what it refuses, and how it recovers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import http.client
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rcod_runtime import Upscaler
from rcod_runtime.serve.jobs import Choice, Job, Jobs
from rcod_runtime.serve.limits import Limits, Refused
from tests.runtime.test_serve import Server, error_of, large, png, wait_for


@contextlib.contextmanager
def arriving(server: Server, count: int) -> Iterator[contextlib.ExitStack]:
    """So many photos whose bodies don't come; what else is open then goes onto the stack."""
    with contextlib.ExitStack() as open_ones:
        for _ in range(count):
            open_ones.enter_context(closing(server.begin(b"some", {"Content-Length": "99"})))
        wait_for(lambda: server.measure("rcod_jobs_arriving") == count)
        yield open_ones


def test_an_overloaded_server_says_503_at_once_and_recovers(bundle: Path) -> None:
    server = Server(bundle, "--queue", "2")
    try:
        body = large()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: server.ask("/v1/upscale", body), range(8)))
        statuses = sorted(status for status, _, _ in answers)
        assert statuses[:2] == [200, 200] and set(statuses[2:]) == {503}
        refused = next(answer for answer in answers if answer[0] == 503)
        assert refused[1]["retry-after"] == "1"
        assert error_of(refused[2])["type"] == "Overloaded"
        assert server.ask("/readyz")[0] == 200
    finally:
        server.stop()


def test_a_photo_that_has_no_place_is_refused_before_it_is_read(
    bundle: Path, photo: Callable[..., np.ndarray]
) -> None:
    server = Server(bundle, "--queue", "1", "--body-timeout", "10")
    whole = bytes(12 * 2**20)
    large = {"Content-Length": str(len(whole))}
    try:
        assert server.ask("/v1/upscale", png(photo()))[0] == 200
        with closing(server.begin(b"some", large)) as slow:
            wait_for(lambda: server.measure("rcod_jobs_arriving") == 1)
            assert server.measure("rcod_jobs_waiting") == server.measure("rcod_jobs_running") == 0
            assert server.ask("/readyz")[0] == 503
            before, began = server.memory_mib("VmHWM"), time.monotonic()
            with closing(server.begin(bytes(2**20), large)) as partly:
                answer = partly.getresponse()
                assert answer.status == 503 and answer.headers["Retry-After"] == "1"
                assert error_of(answer.read())["type"] == "Overloaded"
                assert time.monotonic() - began < 2, "not at once"
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                # whole before they look for an answer: what they send is thrown away, not reset
                asked = [pool.submit(server.ask, "/v1/upscale", whole) for _ in range(8)]
                assert [answer.result()[0] for answer in asked] == [503] * 8
            assert server.memory_mib("VmHWM") - before < 60, "the bodies were kept"
            assert server.measure("rcod_jobs_arriving") == 1
            assert slow.getresponse().status == 408, "a place is held no longer than this"
        assert server.measure("rcod_jobs_arriving") == 0
        assert server.ask("/v1/upscale", png(photo()))[0] == 200
    finally:
        server.stop()
    assert "Traceback" not in server.said


def test_with_too_many_connections_photos_are_refused_and_probes_are_not(
    bundle: Path, photo: Callable[..., np.ndarray]
) -> None:
    """uvicorn's limit refused /healthz too, in plain text: a server under load was restarted."""
    server = Server(bundle, "--connections", "4")
    try:
        with arriving(server, 4):
            for path in ("/healthz", "/readyz", "/metrics", "/v1/model"):
                assert server.ask(path)[0] == 200, path
            status, headers, body = server.ask("/v1/upscale", png(photo()))
            assert status == 503 and headers["retry-after"] == "1"
            assert headers["connection"] == "close", "it is not one more that is held"
            assert error_of(body)["type"] == "Overloaded"
            assert "over 4 connections are open" in error_of(body)["message"]
            assert server.measure('rcod_answers_total{status="503"}') == 1
        wait_for(lambda: server.ask("/v1/upscale", png(photo()))[0] == 200)
    finally:
        server.stop()


def test_a_photo_of_megabytes_is_told_that_too_many_connections_are_open(bundle: Path) -> None:
    """With its body unread the connection was reset, and its client saw no answer. Only where there
    are twice as many it is closed at once."""
    server = Server(bundle, "--connections", "3", "--body-timeout", "100")
    unsent = b"POST /v1/upscale HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n"
    try:
        with arriving(server, 3) as open_ones:
            for _ in range(3):
                status, headers, body = server.ask("/v1/upscale", bytes(5 * 2**20))
                assert status == 503 and headers["retry-after"] == "1"
                assert "over 3 connections are open" in error_of(body)["message"]

            def closed_at_once() -> bool:
                # One more each time: what the server has not yet read of the photos above counts
                # as a connection, and one that comes meanwhile may be closed at once itself.
                answer = server.begin(b"some", {"Content-Length": "99"}).getresponse()
                open_ones.enter_context(answer)  # its connection: the server awaits the body
                assert answer.status == 503
                try:
                    return b"over 3 connections are open" in server.raw(unsent, wait_s=3)
                except TimeoutError:
                    return False

            wait_for(closed_at_once)
    finally:
        server.stop()


def test_a_connection_of_a_spike_is_as_good_as_others_when_it_is_over(
    bundle: Path, photo: Callable[..., np.ndarray]
) -> None:
    server = Server(bundle, "--connections", "2")
    kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    try:
        with arriving(server, 2):
            kept.request("GET", "/healthz")
            assert kept.getresponse().read() and kept.sock is not None
            its_socket = kept.sock
        wait_for(lambda: server.measure("rcod_jobs_arriving") == 0)
        kept.request("POST", "/v1/upscale", png(photo()))
        assert kept.getresponse().status == 200 and kept.sock is its_socket
    finally:
        kept.close()
        server.stop()


def test_a_place_is_free_again_however_its_photo_ends(
    bundle: Path, photo: Callable[..., np.ndarray]
) -> None:
    server = Server(bundle, "--queue", "1", "--body-timeout", "2", "--max-mib", "1")
    chunked = {"Content-Length": "9", "Transfer-Encoding": "chunked"}  # chunks count, not the 9
    begun: list[tuple[bytes, dict[str, str], bytes, int]] = [
        (b"ab", {"Content-Length": "99"}, b"", 408),
        (b"ab", {"Content-Length": "4"}, b"cd", 422),
        (b"2\r\nab\r\n", chunked, b"200000\r\n" + bytes(2**21), 413),
    ]
    try:
        for sent, headers, rest, status in begun:
            with closing(server.begin(sent, headers)) as connection:
                wait_for(lambda: server.measure("rcod_jobs_arriving") == 1)
                connection.send(rest)
                assert connection.getresponse().status == status
            assert server.ask("/v1/upscale", png(photo()))[0] == 200, status
        with closing(server.begin(b"ab", {"Content-Length": "99"})):
            wait_for(lambda: server.measure("rcod_jobs_arriving") == 1)
        wait_for(lambda: server.measure("rcod_jobs_arriving") == 0)
        assert server.ask("/v1/upscale", png(photo()))[0] == 200, "its client left"
        assert server.ask("/readyz")[0] == 200
        with closing(server.begin(b"ab", {"Content-Length": "99"})) as connection:
            wait_for(lambda: server.measure("rcod_jobs_arriving") == 1)
            assert server.stop() == 0
            assert connection.getresponse().status == 408
    finally:
        if server.process.poll() is None:
            server.stop()
    assert "Traceback" not in server.said


def test_a_photo_that_cannot_be_decoded_is_not_kept(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not until the collector of cycles comes by either: an idle server runs none."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**16))  # glibc keeps 60 MiB otherwise
    server = Server(bundle, "--queue", "1")
    try:
        assert server.ask("/v1/upscale", bytes(9))[0] == 422
        before = server.memory_mib("VmRSS")
        for _ in range(8):
            assert server.ask("/v1/upscale", bytes(30 * 2**20))[0] == 422
            wait_for(lambda: server.memory_mib("VmRSS") - before < 25)  # soon after its answer
    finally:
        server.stop()


def test_a_client_that_leaves_while_its_photo_waits_frees_its_place_at_once(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places and the one thread, without a socket: the first photo is held in work."""

    async def work(host: Upscaler) -> None:
        jobs = Jobs(host, Limits(queue=2, jobs=1))
        first, second, third = (Job(Choice("neutral", None, "none", "png"), b"x") for _ in "abc")
        held = threading.Event()
        monkeypatch.setattr(jobs, "_result", lambda job, queued: held.wait(60) and job.data)
        try:
            in_work, waiting = jobs.start(first), jobs.start(second)
            while not jobs.running:
                await asyncio.sleep(0.01)
            assert (jobs.accepted, jobs.waiting) == (2, 1)
            first.abandon()
            second.abandon()
            await asyncio.wait([waiting])
            assert waiting.cancelled() and second.turn is None
            assert (jobs.accepted, jobs.waiting) == (1, 0), "the one in work keeps its place"
            last = jobs.start(third)
            held.set()
            assert await asyncio.gather(in_work, last) == [b"x", b"x"]
        finally:
            held.set()
            jobs.close()

    with Upscaler(bundle) as host:
        asyncio.run(work(host))


def test_a_body_is_timed_without_asyncio_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.10 has none, and another TimeoutError."""
    from rcod_runtime.serve.app import Unread, _body

    monkeypatch.delattr(asyncio, "timeout", raising=False)
    limits, sent = Limits(body_s=0.01), list[Any]()

    async def silent() -> AsyncIterator[bytes]:
        await asyncio.sleep(60)
        yield b""

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    async def send(message: Any) -> None:
        sent.append(message)

    async def both() -> None:
        with pytest.raises(Refused, match="no whole body in 0.01 s"):
            await _body(SimpleNamespace(stream=silent), limits)  # type: ignore[arg-type]
        await Unread(Refused(400, "UsageError", "no"), limits)({"type": "http"}, receive, send)

    asyncio.run(both())
    assert [message.get("more_body") for message in sent] == [None, True, None]


def test_a_client_that_leaves_frees_its_place(bundle: Path) -> None:
    """The work stops at the next tiles, long before its time is over."""
    server = Server(bundle, "--queue", "1", "--job-timeout", "1000")
    try:
        body = large(2000)
        head = f"POST /v1/upscale HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + body)
            deadline = time.monotonic() + 120
            while not server.measure("rcod_jobs_running") and time.monotonic() < deadline:
                time.sleep(0.02)
        deadline = time.monotonic() + 120
        while server.ask("/readyz")[0] != 200:
            assert time.monotonic() < deadline, "its place is not free again"
            time.sleep(0.05)
        assert server.measure('rcod_answers_total{status="200"}') == 0
        assert server.measure('rcod_answers_total{status="499"}') == 1
    finally:
        server.stop()


def test_a_photo_that_takes_too_long_is_given_up(bundle: Path) -> None:
    server = Server(bundle, "--job-timeout", "1")
    try:
        status, _, answer = server.ask("/v1/upscale", large(2000))  # however fast it is
        assert status == 504 and "not done in 1 s" in error_of(answer)["message"]
    finally:
        server.stop()
