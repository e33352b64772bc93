"""``rcod-serve`` as a process of its own, over loopback."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.corpus import image_corpus
from rcod_runtime import OutputError, Upscaler
from tests.runtime.fakes import make_bundle

pytest.importorskip("uvicorn")


class Server:
    def __init__(self, bundle: Path, *options: str) -> None:
        command = [sys.executable, "-m", "rcod_runtime.cli.serve", "--bundle", str(bundle)]
        command += ["--port", "0", "--backend", "onnxruntime", "--threads", "1", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.said = ""
        for line in self.process.stderr:
            self.said += line
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                return
        raise AssertionError(self.said)

    def ask(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request("GET" if body is None else "POST", path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def raw(self, data: bytes, wait_s: float = 120.0) -> bytes:
        """Send these bytes, read until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait_s) as connection:
            connection.sendall(data)
            parts = []
            try:
                while part := connection.recv(65536):
                    parts.append(part)
            except ConnectionResetError:
                pass
            return b"".join(parts)

    def begin(self, sent: bytes, headers: dict[str, str]) -> http.client.HTTPConnection:
        """A photo of which only this much is sent so far."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.putrequest("POST", "/v1/upscale")
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders(sent)
        return connection

    def memory_mib(self, name: str) -> float:
        """VmRSS: now; VmHWM: at its highest."""
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            pytest.skip("no /proc")
        return int(re.findall(rf"{name}:\s+(\d+) kB", status.read_text("ascii"))[0]) / 1024

    def measure(self, name: str) -> float:
        text = self.ask("/metrics")[2].decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(300)
        assert self.process.stderr is not None
        self.said += self.process.stderr.read()
        self.process.stderr.close()
        return code


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    opened = Server(bundle, "--max-mib", "2", "--max-pixels", "300000", "--body-timeout", "3")
    yield opened
    if opened.process.poll() is None:
        opened.stop()
    assert "Traceback" not in opened.said, opened.said


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def large(side: int = 1000) -> bytes:
    """An image that is some seconds of work in many tiles."""
    return png(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def error_of(body: bytes) -> dict[str, str]:
    error = json.loads(body)["error"]
    assert error.keys() == {"type", "message"}
    return error  # type: ignore[no-any-return]


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- answers ---------------------------------------------------------------------------------------


def test_the_answer_is_what_the_runtime_makes_of_the_photo(
    server: Server, bundle: Path, photo: Callable[..., np.ndarray]
) -> None:
    image = photo()
    with Upscaler(bundle, backend="onnxruntime") as upscaler:
        for query, arguments in (
            ("", {}),
            ("?realism=0.25&scale=1.5", {"realism": 0.25, "scale": 1.5}),
            ("?realism=realism&colour_match=none", {"realism": "realism", "colour_match": "none"}),
        ):
            status, headers, body = server.ask(f"/v1/upscale{query}", png(image))
            assert status == 200 and headers["content-type"] == "image/png"
            assert re.search(r"queue;dur=.*decode;dur=.*upscale;dur=", headers["server-timing"])
            sr = np.asarray(Image.open(io.BytesIO(body)))
            assert np.array_equal(sr, upscaler(image, **arguments))  # type: ignore[arg-type]


def test_other_formats_and_a_head_of_an_id_are_taken(
    server: Server, photo: Callable[..., np.ndarray]
) -> None:
    for kind in ("jpeg", "webp"):
        status, headers, body = server.ask(f"/v1/upscale?format={kind}", png(photo()))
        assert status == 200 and headers["content-type"] == f"image/{kind}"
        assert Image.open(io.BytesIO(body)).size == (160, 96)
    headers = {"X-Request-Id": "a-1"}
    assert server.ask("/v1/upscale", png(photo()), headers)[0] == 200
    assert server.ask("/v1/progress/a-1")[0] == 404, "it is done"


def test_a_bundle_without_neutral_is_served_at_its_own_level(tmp_path: Path) -> None:
    from starlette.requests import Request

    from rcod_runtime.serve.app import _choice
    from rcod_runtime.serve.limits import Refused

    make_bundle(tmp_path, gains=(1.0,), mem=False)  # its level is fidelity
    with Upscaler(tmp_path) as upscaler:
        request = Request({"type": "http", "query_string": b""})
        assert _choice(request, upscaler).realism == "fidelity"
        request = Request({"type": "http", "query_string": b"realism=adaptive"})
        with pytest.raises(Refused, match="no metric estimation module"):
            _choice(request, upscaler)


def test_model_health_and_page(server: Server, bundle: Path) -> None:
    model = json.loads(server.ask("/v1/model")[2])
    assert model["levels"] == ["fidelity", "neutral", "realism"] and model["scale"] == 4
    assert model["limits"] == {"bytes": 2 * 2**20, "pixels": 300_000}
    assert str(bundle) not in json.dumps(model)
    assert server.ask("/healthz")[0] == server.ask("/readyz")[0] == 200
    status, headers, page = server.ask("/")
    assert status == 200 and b'id="realism"' in page
    assert "default-src 'none'" in headers["content-security-policy"]
    assert server.ask("/docs")[0] == server.ask("/openapi.json")[0] == 404


def test_the_metrics_count_answers_photos_and_stages(
    server: Server, photo: Callable[..., np.ndarray]
) -> None:
    names = (
        'rcod_answers_total{status="200"}',
        "rcod_input_pixels_total",
        'rcod_stage_seconds_count{stage="upscale"}',
        'rcod_answers_total{status="400"}',
    )
    before = [server.measure(name) for name in names]
    server.ask("/v1/upscale", png(photo()))
    server.ask("/v1/upscale?scale=9", png(photo()))
    after = [server.measure(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 24 * 40, 1, 1]
    assert server.measure("rcod_jobs_running") == server.measure("rcod_jobs_waiting") == 0


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "channels", "kind", "message"),
    [(40, 4, "jpeg", "JPEG can't hold transparency"), (4200, 3, "webp", "16800 x 96 px; WEBP")],
)
def test_what_the_format_cannot_hold_is_refused_before_the_work(
    server: Server,
    host: Upscaler,
    photo: Callable[..., np.ndarray],
    width: int,
    channels: int,
    kind: str,
    message: str,
) -> None:
    from rcod_runtime.serve.jobs import Choice, Job, Jobs
    from rcod_runtime.serve.limits import Limits

    body = png(photo(24, width, channels))
    status, _, answer = server.ask(f"/v1/upscale?format={kind}", body)
    assert (status, error_of(answer)["type"]) == (400, "OutputError")
    assert message in error_of(answer)["message"]

    async def work(job: Job) -> None:
        await Jobs(host, Limits()).start(job)

    job = Job(Choice("neutral", None, "none", kind), body)
    with pytest.raises(OutputError, match=message):
        asyncio.run(work(job))
    assert job.seconds.keys() == {"queue", "decode"}


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("?realism=nice", "nice"),
        ("?realism=1.5", "1.5"),
        ("?realism=nan", "nan"),
        ("?scale=five", "scale: expected a number from 1 to 4"),
        ("?scale=7", "scale 7.0: expected a number in 1..4"),
        ("?scale=inf", "inf"),
        ("?format=exe", "expected one of png, jpeg, webp"),
        ("?colour_match=x", "expected one of none, adain, wavelet, consistent"),
        ("?bundle=/etc", "unknown parameter 'bundle'"),
    ],
)
def test_parameters_that_cannot_be_used_are_named(
    query: str, words: str, server: Server, photo: Callable[..., np.ndarray]
) -> None:
    for image in (png(photo()), b"which is not looked at"):
        status, _, body = server.ask(f"/v1/upscale{query}", image)
        assert status == 400 and words in error_of(body)["message"]


def test_hostile_images_are_4xx_with_the_typed_message(server: Server) -> None:
    """The seeds of the runtime's fuzz corpus, whole, cut and damaged."""
    rng = np.random.default_rng(0)
    statuses = set()
    for data in image_corpus().values():
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 8):
            damaged[at] ^= 0xFF
        for body in (data, data[: len(data) // 2], bytes(damaged)):
            if len(body) > 2 * 2**20:
                continue
            status, _, answer = server.ask("/v1/upscale?scale=1", body)
            statuses.add(status)
            if status != 200:
                assert status in (400, 413, 422), answer
                assert error_of(answer)["type"] in ("ImageError", "UsageError", "OutputError")
    assert {200, 422} <= statuses
    bomb = png(np.zeros((1000, 1000), np.uint8))
    status, _, answer = server.ask("/v1/upscale", bomb)
    assert status == 422 and "the limit is 0.3 million" in error_of(answer)["message"]
    assert server.ask("/v1/upscale", b"")[0] == 422
    assert server.ask("/v1/upscale", b"<svg/>")[0] == 422


def test_a_large_body_is_refused_before_it_is_read(server: Server) -> None:
    head = b"POST /v1/upscale HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000000\r\n\r\n"
    began = time.monotonic()
    answer = server.raw(head)
    assert b" 413 " in answer.split(b"\r\n")[0] and b"over 2 MiB" in answer
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"Transfer-Encoding: chunked\r\n", b"411"),
        (b"Content-Length: -1\r\n", b"400"),
        (b"Content-Length: 1\r\nContent-Length: 2\r\n", b"400"),
        (b"Content-Length: 3\r\nContent-Encoding: gzip\r\n", b"415"),
        (b"Content-Length: 3\r\nX-Request-Id: ../../etc\r\n", b"400"),
        (b"Content-Length: 3\r\nX: " + b"a" * 300_000 + b"\r\n", b"400"),
    ],
)
def test_tricks_with_heads_are_refused(head: bytes, status: bytes, server: Server) -> None:
    close = b"Connection: close\r\n"
    answer = server.raw(b"POST /v1/upscale HTTP/1.1\r\nHost: x\r\n" + close + head + b"\r\nabc")
    assert answer.split(b" ")[1] == status, answer[:200]
    assert server.ask("/healthz")[0] == 200


def test_paths_lead_nowhere_else(server: Server) -> None:
    for path in ("/../etc/passwd", "/v1/progress/..%2f..%2fetc", "/%2e%2e/x", "/page.html", "//"):
        assert server.ask(path)[0] == 404, path
    for path, status in (("/v1/upscale", 405), ("/v2", 404), ("/v1/upscale/", 404)):
        found, _, body = server.ask(path)
        error = json.loads(body)["error"]
        assert (
            found == status
            and error["type"] == "UsageError"
            and "docs/serve.md" in error["message"]
        )


@pytest.mark.parametrize(
    ("path", "head", "status"),
    [
        ("?format=gif", b"Content-Length: 100\r\n", b"400"),
        ("", b"Transfer-Encoding: chunked\r\n", b"411"),
        ("", b"Content-Length: 100\r\nContent-Encoding: gzip\r\n", b"415"),
    ],
)
def test_a_refused_body_can_not_drip_for_ever(
    path: str, head: bytes, status: bytes, server: Server
) -> None:
    """The answer is there at once, the connection no longer than a body may take (3 s)."""
    request = f"POST /v1/upscale{path} HTTP/1.1\r\nHost: x\r\n".encode() + head + b"\r\n"
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(request)
        assert connection.recv(65536).split(b" ")[1] == status
        assert time.monotonic() - began < 2, "not at once"
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 60:
                connection.sendall(b"1\r\na\r\n" if b"chunked" in head else b"a")
                time.sleep(0.2)
    assert 2.5 < time.monotonic() - began < 20


def test_slow_clients_are_cut_off(server: Server) -> None:
    slow_body = b"POST /v1/upscale HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nab"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        body = pool.submit(server.raw, slow_body)
        head = pool.submit(server.raw, b"POST /v1/upscale HTTP/1.1\r\nHost:")
        silent = pool.submit(server.raw, b"")
        assert b" 408 " in body.result() and b"no whole body in 3 s" in body.result()
        assert head.result() == silent.result() == b""
    assert server.ask("/healthz")[0] == 200


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error_of_the_server(
    server: Server,
) -> None:
    name = 'rcod_answers_total{status="499"}'
    before = server.measure(name)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/upscale HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nab")
    deadline = time.monotonic() + 60
    while server.measure(name) == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_of_two_requests_at_once_with_one_id_one_is_refused(
    server: Server, photo: Callable[..., np.ndarray]
) -> None:
    body = png(photo())
    headers = {"X-Request-Id": "twin", "Content-Length": str(len(body))}
    with closing(server.begin(body[:9], headers)) as first:
        wait_for(lambda: server.ask("/v1/progress/twin")[0] == 200)
        status, _, answer = server.ask("/v1/upscale", body, headers)
        assert status == 409 and "twin: already in work" in error_of(answer)["message"]
        first.send(body[9:])
        assert first.getresponse().status == 200
    assert server.ask("/v1/upscale", body, headers)[0] == 200, "the id is free again"


def test_nothing_is_left_behind(server: Server, photo: Callable[..., np.ndarray]) -> None:
    """No file, no handle, no thread, after answers and refusals of every kind."""
    folder = Path(f"/proc/{server.process.pid}")
    if not folder.is_dir():
        pytest.skip("no /proc")

    def held() -> tuple[int, int]:
        return len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))

    def use() -> None:
        server.ask("/v1/upscale", png(photo()))
        server.ask("/v1/upscale", b"no image")
        server.raw(b"POST /v1/upscale HTTP/1.1\r\nContent-Length: 9999999\r\nHost: x\r\n\r\n")

    def settled() -> tuple[int, int]:
        found = held()
        time.sleep(0.5)
        while (later := held()) != found:
            found = later
            time.sleep(0.5)
        return found

    use()
    before = settled()
    for _ in range(5):
        use()
    wait_for(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))
    assert all(now <= then for now, then in zip(settled(), before, strict=True))
