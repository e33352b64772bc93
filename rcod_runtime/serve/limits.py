"""What one server takes on, and what it says when that is too much."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """jobs: photos in work at once; queue: in work, waiting and arriving, more are answered 503.

    body_s: from the head of a request to the end of its body; job_s: from there to the answer,
    waiting included. A job over it stops at its next tile batch.
    """

    jobs: int = 1
    queue: int = 16
    connections: int = 128
    body_bytes: int = 32 * 2**20
    pixels: int = 4_000_000
    body_s: float = 20.0
    job_s: float = 120.0


class Refused(Exception):
    """An answer other than 200. ``kind`` is for programs, the message for people."""

    def __init__(self, status: int, kind: str, message: str, retry_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.retry_s = status, kind, message, retry_s
