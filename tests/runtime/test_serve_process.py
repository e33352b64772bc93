"""``rcod-serve``: how it starts, and how it stops."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runtime.test_serve import Server, large


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_the_photo_in_work_be_finished(bundle: Path, number: int) -> None:
    server = Server(bundle)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(server.ask, "/v1/upscale", large(500))
        deadline = time.monotonic() + 120
        while not server.measure("rcod_jobs_running") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.stop(number) == 0, server.said
        assert answer.result()[0] == 200
    assert "Traceback" not in server.said
    with pytest.raises(OSError):
        server.ask("/healthz")


def test_what_cannot_be_served_is_named(bundle: Path, tmp_path: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rcod_runtime.cli.serve", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = run("--bundle", str(tmp_path))
    assert done.returncode == 4 and "manifest.json" in done.stderr
    done = run("--bundle", str(bundle), "--queue", "0")
    assert done.returncode == 2 and "queue: expected more than 0, found 0" in done.stderr
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
