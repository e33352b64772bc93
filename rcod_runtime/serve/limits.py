"""What one server takes on, and what it says when that is too much."""

from __future__ import annotations

from dataclasses import dataclass

READING_S = 30.0


@dataclass(frozen=True)
class Limits:
    """jobs: photos in work at once; queue: in work, waiting and arriving, more are answered 503.

    connections: open at once, whatever is asked on them; with more, photos are answered 503, with
    over twice as many without what comes of their bodies being read.
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

    @property
    def grace_s(self) -> float:
        """How long a request that was there before a stop may still take, with the time to read
        its answer."""
        return self.body_s + self.job_s + READING_S


class Refused(Exception):
    """An answer other than 200. ``kind`` is for programs, the message for people."""

    def __init__(self, status: int, kind: str, message: str, retry_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.retry_s = status, kind, message, retry_s
