"""``rcod-serve``: how it starts, and how it stops."""

from __future__ import annotations

import concurrent.futures
import http.client
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.runtime.test_serve import Server, large, wait_for


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_the_photo_in_work_be_finished(bundle: Path, number: int) -> None:
    server = Server(bundle)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(server.ask, "/v1/upscale", large(1000))
        wait_for(lambda: server.measure("rcod_jobs_running") == 1)
        assert server.stop(number) == 0, server.said
        assert answer.result()[0] == 200
    assert "Traceback" not in server.said
    with pytest.raises(OSError):
        server.ask("/healthz")


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ((), 140),
        (("--body-timeout", "7.5", "--job-timeout", "600"), 607.5),
        (("--job-timeout", "inf"), math.inf),
    ],
)
def test_a_stop_waits_as_long_as_a_request_may_take(
    options: tuple[str, ...], least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 30 s uvicorn cancelled photos that had 120."""
    import uvicorn

    from rcod_runtime.cli import serve

    configs: list[uvicorn.Config] = []

    class Recorder:
        started = True

        def __init__(self, config: uvicorn.Config) -> None:
            configs.append(config)

        def run(self) -> None:
            pass

    monkeypatch.setattr("rcod_runtime.Upscaler", lambda **_: SimpleNamespace(warmup=lambda: None))
    monkeypatch.setattr("rcod_runtime.serve.protocol.Server", Recorder)
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    assert serve.main(list(options)) == 0
    grace_s = configs[0].timeout_graceful_shutdown
    if least == math.inf:
        assert grace_s is None
    else:
        assert grace_s is not None and least < grace_s < least + 60


def test_a_server_that_stops_takes_no_connections_and_ctrl_c_ends_it_at_once(bundle: Path) -> None:
    server = Server(bundle, "--job-timeout", "1000")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(server.ask, "/v1/upscale", large(2000))
        wait_for(lambda: server.measure("rcod_jobs_running") == 1)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not answers(server, "/readyz"))
        assert server.process.poll() is None and not answer.done()
        began = time.monotonic()
        assert server.stop(signal.SIGINT) == 0
        assert time.monotonic() - began < 60, "it went on with the photo"
        assert not finished(answer)


def answers(server: Server, path: str) -> bool:
    try:
        server.ask(path)
    except OSError:
        return False
    return True


def finished(answer: concurrent.futures.Future[tuple[int, dict[str, str], bytes]]) -> bool:
    try:
        return answer.result()[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def test_what_cannot_be_served_is_named(bundle: Path, tmp_path: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rcod_runtime.cli.serve", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = run("--bundle", str(tmp_path))
    assert done.returncode == 4 and "manifest.json" in done.stderr
    done = run("--bundle", str(bundle), "--queue", "0")
    assert done.returncode == 2 and "--queue: expected more than 0, found 0" in done.stderr
    done = run("--bundle", str(bundle), "--body-timeout", "nan")
    assert done.returncode == 2 and "--body-timeout: expected more than 0" in done.stderr
    for option, value in (("--max-mib", "nan"), ("--max-mib", "inf"), ("--port", "65536")):
        done = run("--bundle", str(bundle), option, value)
        assert done.returncode == 2 and f"UsageError: {option} {value}: expected" in done.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run("--bundle", str(bundle), "--port", port, "--threads", "1")
    assert done.returncode == 6 and "address already in use" in done.stderr.lower()
    without = "import sys; sys.modules['uvicorn'] = None\n"
    code = without + "from rcod_runtime.cli.serve import main\nsys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
                          env={**os.environ})  # fmt: skip
    assert done.returncode == 5 and 'pip install "rcod[serve]"' in done.stderr
