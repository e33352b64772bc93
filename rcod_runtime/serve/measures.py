"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rcod_runtime.serve.jobs import Job, Jobs

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)


class Measures:
    """A registry of its own, so that two servers in one process don't count together."""

    def __init__(self, jobs: Jobs) -> None:
        self.registry = to = CollectorRegistry()
        self.answers = Counter(
            "rcod_answers", "Answers to upscale requests", ["status"], registry=to
        )
        self.pixels = Counter("rcod_input_pixels", "Pixels of the photos upscaled", registry=to)
        self.seconds = Histogram(
            "rcod_stage_seconds",
            "Time of a photo in each stage",
            ["stage"],
            buckets=SECONDS,
            registry=to,
        )
        arriving = Gauge("rcod_jobs_arriving", "Photos whose body is being read", registry=to)
        arriving.set_function(lambda: jobs.arriving)
        running = Gauge("rcod_jobs_running", "Photos in work", registry=to)
        running.set_function(lambda: jobs.running)
        waiting = Gauge("rcod_jobs_waiting", "Photos that wait for their turn", registry=to)
        waiting.set_function(lambda: jobs.waiting)

    def add(self, job: Job) -> None:
        """A photo that was upscaled."""
        self.pixels.inc(job.pixels)
        for stage, seconds in job.seconds.items():
            self.seconds.labels(stage).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
