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

    def bind(self, shapes: Shapes, outputs: Shapes | None = None, common: bool = True) -> None:
        self._session.bind(shapes, self._output_shapes(shapes), common)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        outputs = self._session.run(feeds)
        shapes = self._output_shapes({name: value.shape for name, value in feeds.items()})
        for name, expected in shapes.items():
            found = outputs.get(name)
            if found is None or found.shape != expected or found.dtype != np.float32:
                shown = "nothing" if found is None else f"{found.dtype} {found.shape}"
                raise BackendError(
                    f"{self._path}: output {name}: expected float32 {expected} by the manifest, "
                    f"found {shown}. The graph is not what the manifest says; export the bundle "
                    "again."
                )
        return outputs

    def _output_shapes(self, shapes: Shapes) -> Shapes:
        """By the manifest, for inputs of these shapes."""
        sides = {"batch": 0, "height": 0, "width": 0}
        for tensor in self._graph.inputs:
            for axis, side in zip(tensor.shape, shapes[tensor.name], strict=True):
                if isinstance(axis, str):
                    name, _, divisor = axis.partition("/")
                    sides[name] = side * int(divisor or 1)
        axes = sides["batch"], sides["height"], sides["width"]
        return {tensor.name: tensor.sized(*axes) for tensor in self._graph.outputs}
