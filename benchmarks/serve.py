"""rcod-serve under load over loopback: requests a second, latency, memory, and what overload gets.

  python -m benchmarks.serve
  python -m benchmarks.serve --requests 10000 --photo-px 32

Starts rcod-serve on a free port. "steady": as many clients as the server works on at once plus one,
so that it is never idle and never full; "overload": many more clients than its queue holds, each
asking again at once. Prints a machine card, a table, and one JSON document as the last line. Exit
codes: those of rcod-upscale, and 11 where the server does not start, ends, loses a connection or
answers what it should not.
"""

from __future__ import annotations

import argparse
import http.client
import io
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

from benchmarks import report
from benchmarks.command import check_at_least_1, run_command
from benchmarks.errors import CommandFailed
from benchmarks.picture import draw_picture

SCHEMA_VERSION = 1
WARM_REQUESTS = 50
LOST = "lost"  # in the place of a status: the connection was refused, or ended without an answer
SERVER = (sys.executable, "-m", "rcod_runtime.cli.serve", "--port", "0")


@dataclass(frozen=True)
class ServeConfig:
    """Sides in pixels of the photo that is sent."""

    requests: int
    photo_px: int
    jobs: int
    queue: int
    overload_clients: int
    overload_s: float


class Server:
    """A process, its port and its memory."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    def rss_bytes(self) -> int | None:
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        except OSError:
            return None
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(found[1]) * 1024 if found else None


@contextmanager
def started(config: ServeConfig) -> Iterator[Server]:
    options = ("--jobs", str(config.jobs), "--queue", str(config.queue), "--connections", "1024")
    process = subprocess.Popen([*SERVER, *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said, drain = "", threading.Thread(target=process.stderr.read)
    try:
        for line in process.stderr:
            said += line
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                drain.start()
                yield Server(process, int(found[1]))
                return
        raise CommandFailed(f"rcod-serve did not start: {said.strip()[-500:]}")
    finally:
        process.terminate()
        process.wait(60)
        if drain.ident is not None:
            drain.join()
        process.stderr.close()


def load(server: Server, body: bytes, clients: int, until: Any) -> dict[str, Any]:
    """``clients`` threads ask one after another while ``until()`` is false, each until it loses its
    connection."""
    seconds: dict[str, list[float]] = {}
    lock = threading.Lock()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        status = ""
        while status != LOST and not until():
            began = time.perf_counter()
            try:
                connection.request("POST", "/v1/upscale", body)
                answer = connection.getresponse()
                answer.read()
                status = str(answer.status)
            except (OSError, http.client.HTTPException):
                status = LOST
            taken = time.perf_counter() - began
            with lock:
                seconds.setdefault(status, []).append(taken)
        connection.close()

    began = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - began
    return {
        "clients": clients,
        "wall_s": wall,
        "statuses": {status: len(times) for status, times in sorted(seconds.items())},
        "answers_per_s": len(seconds.get("200", ())) / wall,
        "latency_ms": {s: percentiles(times) for s, times in sorted(seconds.items())},
    }


def check_answers(
    name: str, server: Server, statuses: Mapping[str, int], photos: int | None = None
) -> None:
    """Hold a load to what should come of it: that many ``photos`` and nothing else; None: photos,
    and refusals for want of room.

    Raises:
        CommandFailed: something else did, or the server has ended.
    """
    if photos is None:
        good, expected = {"200"} <= statuses.keys() <= {"200", "503"}, "some of 200, others of 503"
    else:
        good, expected = statuses == {"200": photos}, f"{photos} of 200"
    ended = server.process.poll()
    if good and ended is None:
        return
    found = ", ".join(f"{count} of {status}" for status, count in statuses.items()) or "none"
    if ended is not None:
        found += f", and the server ended with exit code {ended}"
    raise CommandFailed(f"rcod-serve, {name} load: expected answers: {expected}; found {found}.")


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else seconds * 99
    return {"median": cuts[49] * 1e3, "p99": cuts[98] * 1e3, "max": max(seconds) * 1e3}


def measure(config: ServeConfig) -> str:
    card = report.machine_card()
    print(report.format_card(card))
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(draw_picture(config.photo_px, config.photo_px)).save(buffer, "PNG")
    body = buffer.getvalue()
    counter = iter(range(config.requests))
    lock = threading.Lock()

    def enough() -> bool:
        with lock:
            return next(counter, None) is None

    with started(config) as server:
        warm = iter(range(WARM_REQUESTS))
        first = load(server, body, 1, lambda: next(warm, None) is None)
        check_answers("first", server, first["statuses"], WARM_REQUESTS)
        before = server.rss_bytes()
        steady = load(server, body, config.jobs + 1, enough)
        check_answers("steady", server, steady["statuses"], config.requests)
        after = server.rss_bytes()
        end = time.perf_counter() + config.overload_s
        overload = load(server, body, config.overload_clients, lambda: time.perf_counter() > end)
        check_answers("overload", server, overload["statuses"])
        last = server.rss_bytes()
    rows = [
        (
            name,
            str(part["clients"]),
            " ".join(f"{s}: {n}" for s, n in part["statuses"].items()),
            f"{part['answers_per_s']:.1f}",
            *(f"{part['latency_ms']['200'][k]:.0f}" for k in ("median", "p99", "max")),
            f"{part['latency_ms'].get('503', {}).get('p99', 0):.0f}",
        )
        for name, part in (("steady", steady), ("overload", overload))
    ]
    headers = ("load", "clients", "answers", "photos/s", "median ms", "p99", "max", "p99 of 503")
    print(report.format_table(headers, rows))
    memory = {"before_bytes": before, "after_steady_bytes": after, "after_overload_bytes": last}
    if before and after and last:
        shown = " -> ".join(f"{value / 1e6:.1f}" for value in (before, after, last))
        print(f"resident memory, MB: {shown}")
    return report.document(
        "serve", SCHEMA_VERSION, card, config=vars(config), steady=steady, overload=overload,
        memory=memory,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--requests", type=int, default=1000, help="steady (default: %(default)s)")
    add("--photo-px", type=int, default=32, metavar="PX", help="default: %(default)s")
    add("--jobs", type=int, default=1, help="of the server (default: %(default)s)")
    add("--queue", type=int, default=8, help="of the server (default: %(default)s)")
    add("--clients", type=int, default=32, help="of the overload (default: %(default)s)")
    add("--overload", type=float, default=10.0, metavar="S", help="default: %(default)g")
    add("--json", type=Path, metavar="FILE", help="write the JSON document here too")
    arguments = parser.parse_args(argv)
    return run_command(lambda: measure(_config(arguments)), arguments.json)


def _config(arguments: argparse.Namespace) -> ServeConfig:
    check_at_least_1(arguments, "requests", "photo_px", "jobs", "queue", "clients", "overload")
    return ServeConfig(
        arguments.requests,
        arguments.photo_px,
        arguments.jobs,
        arguments.queue,
        arguments.clients,
        arguments.overload,
    )


if __name__ == "__main__":
    sys.exit(main())
