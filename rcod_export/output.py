"""The folder that an export becomes: whole or not at all, in place of an older one alone."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

from rcod_runtime.errors import OutputError
from rcod_runtime.files import PARTIAL_SUFFIX
from rcod_train.files import written_whole


def check_replaceable(out: Path, kind: str, is_one: bool, content: Set[str]) -> None:
    """What lies in the folder beside ``content`` would be deleted with the old export.

    Raises:
        OutputError: something is there that is none of this kind, or holds something else too.
    """
    if not out.exists():
        return
    if not is_one:
        raise OutputError(f"{out}: exists and is no {kind} of rcod-export. Choose another -o.")
    names = {path.name for path in out.iterdir() if not path.name.endswith(PARTIAL_SUFFIX)}
    foreign = sorted(names - content)
    if foreign:
        raise OutputError(
            f"{out}: expected nothing but the {kind} that is replaced, found {', '.join(foreign)} "
            "in it. Choose another -o."
        )


@contextmanager
def written_output(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``out`` at the end; after an error ``out`` is as it was.

    Raises:
        OutputError: it can't be written.
    """
    try:
        with written_whole(out) as folder:
            yield folder
    except OSError as exc:
        raise OutputError(
            f"{out}: could not be written ({exc.strerror or exc}). Free space or choose another -o."
        ) from exc
