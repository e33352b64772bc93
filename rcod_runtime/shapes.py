"""The shapes that a bundle's graphs must have to work together, and how large they may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING

from rcod_runtime.errors import ManifestError

if TYPE_CHECKING:
    from rcod_runtime.manifest import Graph, ImageContract, Tensor

Shape = tuple[int | str, ...]

MAX_ELEMENTS = 2**26  # of one input or output for one of the bundle's tiles: 256 MiB in fp32
_LATENTS = {"z_lq", "z_sr"}


def check_shapes(graphs: Mapping[str, Graph], image: ImageContract, level_count: int) -> None:
    """Hold every tensor to the shape that the runtime feeds, or that another graph hands on.

    Raises:
        ManifestError: another shape, or too many values for a tile; it has the field.
    """
    c, px, scale = image.channels, image.tokens_px, image.scale
    known: dict[str, Shape] = {
        "image": ("batch", c, "height", "width"),
        "thumbnail": ("batch", c, px, px),
        "lq": ("batch", c, f"height/{scale}", f"width/{scale}"),
        "level": ("batch", level_count),
        "adaptive": ("batch", level_count),
        "m_l": ("batch",),
    }
    for field, name, tensor in _tensors(graphs):
        shape = tensor.shape
        if name not in known:  # its first owner decides
            if name == "latent":
                _check_latent(field, shape, image.size_multiple)
            elif shape[0] != "batch" or not all(isinstance(side, int) for side in shape[1:]):
                raise ManifestError(field, "batch, then lengths", shape)
        expected = known.setdefault(name, shape)
        if shape != expected:
            raise ManifestError(field, ", ".join(map(str, expected)), shape)
        if prod(tensor.sized(1, image.tile_px, image.tile_px)) > MAX_ELEMENTS:
            raise ManifestError(field, f"at most {MAX_ELEMENTS} values for a tile", shape)


def _tensors(graphs: Mapping[str, Graph]) -> Iterator[tuple[str, str, Tensor]]:
    """(field, what it is, tensor) of every input and output."""
    for name, graph in graphs.items():
        for kind, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            for index, tensor in enumerate(tensors):
                what = "latent" if tensor.name in _LATENTS else tensor.name
                what = "thumbnail" if (name, what) == ("vpim", "image") else what
                yield f"graphs.{name}.{kind}[{index}].shape", what, tensor


def _check_latent(field: str, shape: Shape, size_multiple: int) -> None:
    factors = [k for k in range(1, size_multiple + 1) if size_multiple % k == 0]
    parts = [(f"height/{k}", f"width/{k}") for k in factors]
    good = shape[0] == "batch" and isinstance(shape[1], int) and shape[2:] in parts
    if not good:
        expected = f"batch, channels, height/k, width/k where k divides {size_multiple}"
        raise ManifestError(field, expected, shape)
