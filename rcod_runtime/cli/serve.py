"""Serve a bundle over HTTP: images in, sharper ones out, and a page to try it.

  rcod-serve                                 the embedded model on http://127.0.0.1:8000
  rcod-serve --bundle DIR --host 0.0.0.0 --port 80 --jobs 2 --queue 32
  curl --data-binary @photo.jpg 'http://127.0.0.1:8000/v1/upscale?realism=0.3' -o sharp.png

SIGTERM and Ctrl-C: no new connections, what is in work is finished. It has the time that it would
have had, --body-timeout + --job-timeout, and 30 s for its answer to be read; Ctrl-C once more gives
it up. There is no TLS and no login: put a proxy in front where strangers can reach it. Exit codes:
those of rcod-upscale; 6 where it can't listen.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys

from rcod_runtime.cli.opening import add_opening_options, opening
from rcod_runtime.cli.stopping import Terminated, sigterm_raises
from rcod_runtime.cli.streams import leave_streams, open_closed_streams, tell
from rcod_runtime.errors import BackendError, OutputError, RcodError, UsageError
from rcod_runtime.serve.limits import Limits

OPTIONS = {  # of limits whose names are not theirs
    "body_bytes": "--max-mib",
    "pixels": "--max-pixels",
    "body_s": "--body-timeout",
    "job_s": "--job-timeout",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcod-serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, limits = parser.add_argument, Limits()
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=8000, help="0: one that is free (default: %(default)s)")
    add("--jobs", type=int, default=limits.jobs, help="photos in work at once (%(default)s)")
    add("--queue", type=int, default=limits.queue,
        help="photos in work, waiting, arriving; more get 503 (default: %(default)s)")  # fmt: skip
    add("--connections", type=int, default=limits.connections,
        help="open at once; with more, photos get 503 (default: %(default)s)")  # fmt: skip
    add("--max-mib", type=float, default=limits.body_bytes / 2**20, metavar="MIB",
        help="largest body (default: %(default)g)")  # fmt: skip
    add("--max-pixels", type=int, default=limits.pixels, metavar="N",
        help="largest image (default: %(default)s)")  # fmt: skip
    add("--body-timeout", type=float, default=limits.body_s, metavar="S",
        help="for a request to arrive (default: %(default)g)")  # fmt: skip
    add("--job-timeout", type=float, default=limits.job_s, metavar="S",
        help="from there to its answer (default: %(default)g)")  # fmt: skip
    add_opening_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    open_closed_streams()
    try:
        return _serve(arguments)
    except RcodError as error:
        tell(f"{type(error).__name__}: {error}")
        return error.exit_code
    except (KeyboardInterrupt, Terminated):  # before it served
        return 0
    finally:
        leave_streams()


def _serve(arguments: argparse.Namespace) -> int:
    limits = Limits(
        jobs=arguments.jobs,
        queue=arguments.queue,
        connections=arguments.connections,
        body_bytes=_bytes(arguments.max_mib),
        pixels=arguments.max_pixels,
        body_s=arguments.body_timeout,
        job_s=arguments.job_timeout,
    )
    for name, value in vars(limits).items():
        if not value > 0:
            option = OPTIONS.get(name, f"--{name}")
            raise UsageError(f"{option}: expected more than 0, found {value:g}.")
    if not 0 <= arguments.port < 2**16:
        raise UsageError(f"--port {arguments.port}: expected 0 to 65535.")
    if not arguments.host:
        raise UsageError("--host: expected an address, found none. All of them are 0.0.0.0.")
    try:
        arguments.host.encode("idna")
    except UnicodeError as exc:
        raise OutputError(f"--host {arguments.host}: is no address ({exc}).") from exc
    try:
        import uvicorn

        from rcod_runtime.serve.app import make_app
        from rcod_runtime.serve.protocol import Server, TimedProtocol
    except ImportError as exc:
        raise BackendError(f'{exc.name} is not installed. pip install "rcod[serve]"') from exc
    from rcod_runtime import Upscaler

    grace_s = limits.grace_s
    with sigterm_raises():  # as process 1 of a container it would not even notice
        upscaler = Upscaler(**opening(arguments))
        upscaler.warmup()
        config = uvicorn.Config(
            make_app(upscaler, limits),
            host=arguments.host,
            port=arguments.port,
            timeout_keep_alive=5,
            # then it cancels what is in work, and its clients get a 500
            timeout_graceful_shutdown=math.ceil(grace_s) if math.isfinite(grace_s) else None,
            h11_max_incomplete_event_size=16 * 1024,
            http=TimedProtocol,
            ws="none",
            server_header=False,
            log_level="info",
            access_log=False,
        )
        server = Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again after its stop
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    with contextlib.suppress(SystemExit):  # with a code of uvicorn's, where it can't listen
        server.run()
    return 0 if server.started else OutputError.exit_code


def _bytes(mib: float) -> int:
    if not 0 < mib < math.inf:
        raise UsageError(f"--max-mib {mib}: expected a size of more than 0.")
    return math.ceil(mib * 2**20)


if __name__ == "__main__":
    sys.exit(main())
