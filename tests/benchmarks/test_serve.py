"""``benchmarks.serve``: a short load on the real server, and its figures."""

from __future__ import annotations

import json
import socket
from types import SimpleNamespace

import pytest

from benchmarks.errors import CommandFailed
from benchmarks.serve import Server, check_answers, load, main, percentiles

pytest.importorskip("uvicorn")


def test_percentiles() -> None:
    found = percentiles([i / 1000 for i in range(1, 101)])
    assert found == pytest.approx({"median": 50.5, "p99": 99.01, "max": 100.0})
    assert percentiles([0.002]) == {"median": 2.0, "p99": 2.0, "max": 2.0}


def server(exit_code: int | None = None, port: int = 0) -> Server:
    return Server(SimpleNamespace(poll=lambda: exit_code), port)  # type: ignore[arg-type]


def test_clients_that_lose_their_connection_are_counted() -> None:
    with socket.socket() as bound:  # and not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        found = load(server(port=bound.getsockname()[1]), b"", 3, lambda: False)
    assert found["statuses"] == {"lost": 3} and found["answers_per_s"] == 0


def test_a_load_is_held_to_what_should_come_of_it() -> None:
    check_answers("steady", server(), {"200": 20}, 20)
    check_answers("overload", server(), {"200": 3, "503": 9})
    for statuses, photos, said in (
        ({"200": 19}, 20, "steady load: expected answers: 20 of 200; found 19 of 200."),
        ({"200": 20, "lost": 1}, 20, "found 20 of 200, 1 of lost."),
        ({"200": 3, "500": 1}, None, "found 3 of 200, 1 of 500."),
        ({"503": 9}, None, "expected answers: some of 200"),
        ({}, None, "found none."),
    ):
        with pytest.raises(CommandFailed, match=said):
            check_answers("steady", server(), statuses, photos)
    with pytest.raises(CommandFailed, match="the server ended with exit code -11"):
        check_answers("overload", server(-11), {"200": 3, "503": 9})


@pytest.mark.parametrize("option", ["--requests", "--clients", "--overload", "--queue"])
def test_loads_of_nothing_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option, "0"]) == 2
    assert f"{option} 0" in capsys.readouterr().err


def test_a_short_load_counts_every_answer_and_overload_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--requests", "20", "--photo-px", "16", "--queue", "2", "--clients", "12"]
    assert main([*argv, "--overload", "2"]) == 0
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    assert document["benchmark"] == "serve"
    assert document["steady"]["statuses"] == {"200": 20}
    assert document["steady"]["answers_per_s"] > 0
    statuses = document["overload"]["statuses"]
    assert statuses.keys() == {"200", "503"} and statuses["503"] > 0
    assert "overload" in printed and "p99 of 503" in printed
