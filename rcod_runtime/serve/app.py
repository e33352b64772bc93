"""The HTTP interface.

What it answers on which path, and with which status: docs/serve.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any, get_args

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from rcod_runtime import ImageError, OutputError, Upscaler, UsageError
from rcod_runtime.colour import COLOUR_MATCHES, DEFAULT_COLOUR_MATCH, ColourMatch
from rcod_runtime.levels import choice_weights, default_level
from rcod_runtime.serve.jobs import MEDIA_TYPES, Choice, Job, Jobs
from rcod_runtime.serve.limits import Limits, Refused
from rcod_runtime.serve.measures import Measures

log = logging.getLogger(__name__)

ID = re.compile(r"[A-Za-z0-9-]{1,64}")
PAGE_POLICY = (
    "default-src 'none'; img-src blob: data:; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; form-action 'none'; base-uri 'none'"
)
assert set(get_args(ColourMatch)) == set(COLOUR_MATCHES)


def make_app(upscaler: Upscaler, limits: Limits) -> FastAPI:
    """The application. It closes ``upscaler`` when it is shut down."""
    jobs = Jobs(upscaler, limits)
    measures = Measures(jobs)
    in_work: dict[str, Job] = {}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(jobs.close)
        upscaler.close()

    app = FastAPI(
        title="rcod",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # to an address that the client's Host says
        lifespan=lifespan,
    )

    @app.post("/v1/upscale")
    async def upscale(request: Request) -> Response:
        request_id = request.headers.get("x-request-id", "")
        crowd = _crowd(request)
        unread = crowd <= 2 * limits.connections  # above it is closed, not drained
        try:
            _check_crowd(crowd, limits)
            choice = _choice(request, upscaler)
            if request_id and not ID.fullmatch(request_id):
                raise Refused(400, "UsageError", "X-Request-Id: letters, digits and - only, 1..64.")
            _check_length(request, limits)
            if request_id in in_work:
                raise Refused(409, "UsageError", f"X-Request-Id {request_id}: already in work.")
            job = Job(choice)
            if request_id:  # no await since it was looked up: of two equal ids one is refused
                in_work[request_id] = job
            try:
                with jobs.arrival():
                    unread = False
                    job.data = await _body(request, limits)
                result = await _wait(request, jobs.start(job), job, limits)
            finally:
                in_work.pop(request_id, None)
        except Refused as refused:
            measures.answers.labels(refused.status).inc()
            if unread and refused.status != 413:  # of that no more is wanted
                return Unread(refused, limits)
            return _error(refused)
        measures.answers.labels(200).inc()
        measures.add(job)
        timing = ", ".join(f"{k};dur={v * 1e3:.1f}" for k, v in job.seconds.items())
        return Response(
            result,
            media_type=MEDIA_TYPES[choice.format],
            headers={"Server-Timing": timing, "X-Content-Type-Options": "nosniff"},
        )

    @app.get("/v1/progress/{request_id}")
    async def progress(request_id: str) -> Response:
        job = in_work.get(request_id)
        if job is None:
            return _error(Refused(404, "UsageError", "no request of this id is in work."))
        return JSONResponse({"done": job.done, "total": job.total})

    @app.get("/v1/model")
    async def model() -> dict[str, Any]:
        manifest = upscaler.manifest
        return {
            "name": manifest.identity.name,
            "licence": manifest.identity.licence,
            "levels": [level.name for level in manifest.levels],
            "adaptive": manifest.has_metric_estimator,
            "scale": manifest.image.scale,
            "backend": upscaler.backend,
            "limits": {"bytes": limits.body_bytes, "pixels": limits.pixels},
        }

    @app.exception_handler(HTTPException)
    async def no_such_path(request: Request, exc: HTTPException) -> Response:
        answer = _error(Refused(exc.status_code, "UsageError", f"{exc.detail}: docs/serve.md."))
        answer.headers.update(exc.headers or {})
        return answer

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def ready() -> Response:
        full = jobs.accepted >= limits.queue
        return JSONResponse({"status": "full" if full else "ready"}, 503 if full else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(measures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = files("rcod_runtime.serve").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/")
    async def index() -> Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(page, headers=headers)

    return app


def _crowd(request: Request) -> int:
    """How many connections are open, or were when this one came, whichever is less: it is refused
    neither for those that came later nor for those that have left."""
    state = request.state  # with what TimedProtocol counts
    return min(getattr(state, "came_as", 0), len(getattr(state, "connections", ())))


def _check_crowd(crowd: int, limits: Limits) -> None:
    """Whether there are so few that a photo may come.

    Raises:
        Refused: 503.
    """
    if crowd > limits.connections:
        message = f"over {limits.connections} connections are open: try again soon."
        raise Refused(503, "Overloaded", message, retry_s=1)


def _choice(request: Request, upscaler: Upscaler) -> Choice:
    """Of the query; what it doesn't say is the default.

    Raises:
        Refused: 400, an unknown parameter or a value that can't be used.
    """
    query = request.query_params
    unknown = set(query) - {"realism", "scale", "colour_match", "format"}
    if unknown:
        raise Refused(400, "UsageError", f"unknown parameter {sorted(unknown)[0]!r}.")
    realism: str | float = query.get("realism", default_level(upscaler.manifest.levels))
    with contextlib.suppress(ValueError):
        realism = float(realism)
    colour_match = query.get("colour_match", DEFAULT_COLOUR_MATCH)
    if colour_match not in COLOUR_MATCHES:
        raise Refused(
            400, "UsageError", f"colour_match: expected one of {', '.join(COLOUR_MATCHES)}."
        )
    kind = query.get("format", "png")
    if kind not in MEDIA_TYPES:
        raise Refused(400, "UsageError", f"format: expected one of {', '.join(MEDIA_TYPES)}.")
    try:
        scale = float(query["scale"]) if "scale" in query else None
    except ValueError as exc:
        raise Refused(400, "UsageError", "scale: expected a number from 1 to 4.") from exc
    try:
        choice_weights(realism, upscaler.manifest)
        upscaler.output_shape((1, 1), scale)
    except UsageError as exc:
        raise Refused(400, "UsageError", str(exc)) from exc
    return Choice(realism, scale, colour_match, kind)


def _check_length(request: Request, limits: Limits) -> None:
    """What the head says of the body.

    Raises:
        Refused: 411, 413 or 415.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refused(415, "UsageError", "Content-Encoding: send the image as it is.")
    length = request.headers.get("content-length")
    if length is None:
        raise Refused(411, "UsageError", "Content-Length is missing.")
    if not length.isdigit() or int(length) > limits.body_bytes:
        raise _too_large(limits)


def _too_large(limits: Limits) -> Refused:
    return Refused(413, "ImageError", f"the image has over {limits.body_bytes / 2**20:g} MiB.")


async def _body(request: Request, limits: Limits) -> bytes:
    """The body, read no further than it is allowed to be long, whatever its head says.

    Raises:
        Refused: 408, 413 or 499.
    """
    chunks: list[bytes] = []

    async def read() -> None:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limits.body_bytes:
                raise _too_large(limits)
            chunks.append(chunk)

    try:
        await asyncio.wait_for(read(), limits.body_s)
        return b"".join(chunks)
    except asyncio.TimeoutError as exc:  # Python 3.10's is not the builtin one
        raise Refused(408, "UsageError", f"no whole body in {limits.body_s:g} s.") from exc
    except ClientDisconnect as exc:
        raise Refused(499, "Abandoned", "the client closed the connection.") from exc
    finally:
        chunks.clear()  # what is raised through wait_for is in a cycle with them


async def _wait(request: Request, result: asyncio.Task[bytes], job: Job, limits: Limits) -> bytes:
    """The result, while the client waits for it and for no longer than the limit.

    Raises:
        Refused: 422, 400, 499, 500 or 504.
    """
    gone = asyncio.create_task(_disconnected(request))
    either: set[asyncio.Future[Any]] = {result, gone}
    try:
        await asyncio.wait(either, timeout=limits.job_s, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            job.abandon()
            if gone.done():
                raise Refused(499, "Abandoned", "the client closed the connection.")
            raise Refused(504, "Timeout", f"not done in {limits.job_s:g} s: a smaller image?")
        return result.result()
    except ImageError as exc:
        raise Refused(422, "ImageError", str(exc)) from exc
    except (UsageError, OutputError) as exc:
        raise Refused(400, type(exc).__name__, str(exc)) from exc
    except Refused:
        raise
    except asyncio.CancelledError:
        job.abandon()
        raise
    except Exception as exc:
        log.exception("a photo could not be upscaled")
        raise Refused(500, type(exc).__name__, "the server could not upscale the image.") from exc
    finally:
        gone.cancel()
        del result, either  # else a cycle: its error holds this frame, and the photo


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(refused: Refused) -> Response:
    # of these what is still to come is not read
    headers = _headers(refused, close=refused.status in (408, 413, 503))
    return JSONResponse(_said(refused), refused.status, headers=headers)


def _said(refused: Refused) -> dict[str, Any]:
    return {"error": {"type": refused.kind, "message": refused.message}}


def _headers(refused: Refused, close: bool) -> dict[str, str]:
    headers = {"Connection": "close"} if close else {}
    if refused.retry_s is not None:
        headers["Retry-After"] = str(refused.retry_s)
    return headers


class Unread(JSONResponse):
    """A refusal that is sent at once, before the body is there. What comes of the body is thrown
    away, as much and for as long as a body may be and take: if the connection were closed at once,
    it would be reset, and a client that sends its whole photo before it looks for an answer would
    never see this one."""

    def __init__(self, refused: Refused, limits: Limits) -> None:
        super().__init__(_said(refused), refused.status, headers=_headers(refused, close=True))
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_open(message: Message) -> None:
            # whole for the client, by its length; not yet for the server, which closes at its end
            more = {"more_body": True} if message["type"] == "http.response.body" else {}
            await send({**message, **more})

        async def throw_away() -> None:
            left = self.limits.body_bytes
            while left >= 0 and (message := await receive()).get("more_body"):
                left -= len(message.get("body", b""))

        await super().__call__(scope, receive, send_open)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(throw_away(), self.limits.body_s)
        await send({"type": "http.response.body"})
