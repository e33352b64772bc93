"""A backend's session, held to what the manifest says of its graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rcod_runtime.backends import Array, Session, Shapes
from rcod_runtime.errors import BackendError
from rcod_runtime.manifest import Graph


class CheckedSession:
    """Passes everything on, and refuses outputs of other names, types or shapes.

    The arithmetic around the graphs relies on them; numpy would stretch some that are wrong.
    """

    def __init__(self, session: Session, path: Path, graph: Graph) -> None:
        self._session, self._path, self._graph = session, path, graph

    def bind(self, shapes: Shapes) -> None:
        self._session.bind(shapes)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        outputs = self._session.run(feeds)
        axes = self._axes(feeds)
        for tensor in self._graph.outputs:
            found = outputs.get(tensor.name)
            expected = tensor.sized(*axes)
            if found is None or found.shape != expected or found.dtype != np.float32:
                shown = "nothing" if found is None else f"{found.dtype} {found.shape}"
                raise BackendError(
                    f"{self._path}: output {tensor.name}: expected float32 {expected} by the "
                    f"manifest, found {shown}. The graph is not what the manifest says; export "
                    "the bundle again."
                )
        return outputs

    def _axes(self, feeds: Mapping[str, Array]) -> tuple[int, int, int]:
        """Batch, height and width that belong to the inputs' shapes."""
        sides = {"batch": 0, "height": 0, "width": 0}
        for tensor in self._graph.inputs:
            for axis, side in zip(tensor.shape, feeds[tensor.name].shape, strict=True):
                if isinstance(axis, str):
                    name, _, divisor = axis.partition("/")
                    sides[name] = side * int(divisor or 1)
        return sides["batch"], sides["height"], sides["width"]
