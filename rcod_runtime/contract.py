"""What the graphs of a bundle must take and give to work together: tensors, shapes, sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING

from rcod_runtime.errors import ManifestError

if TYPE_CHECKING:
    from rcod_runtime.manifest import Graph, ImageContract, Tensor

Shape = tuple[int | str, ...]

GRAPHS = ("encoder", "vpim", "denoiser", "decoder")
GUIDE = "guide"  # rcod-s has it too: the image's matrices for the branches of encoder and denoiser
ALL_GRAPHS = (GUIDE, *GRAPHS)
_INPUTS = {
    "guide": {"lq"},
    "encoder": {"image"},
    "vpim": {"image"},
    "denoiser": {"z_lq", "tokens", "level"},
    "decoder": {"z_sr"},
}
_OUTPUTS = {
    "guide": {"vae_matrices", "unet_matrices"},
    "encoder": {"z_lq"},
    "vpim": {"tokens"},
    "denoiser": {"z_sr"},
    "decoder": {"image"},
}
# With a MEM: its estimate of M, and the weights of the level that Eq. 5 gives for it.
_ESTIMATES = {"m_l", "adaptive"}
MAX_ELEMENTS = 2**26  # of one input or output for one of the bundle's tiles: 256 MiB in fp32
_LATENTS = {"z_lq", "z_sr"}


def check_graphs(
    graphs: Mapping[str, Graph], image: ImageContract, family: str, level_count: int
) -> None:
    """Hold a bundle to the graphs of its family, and these to each other.

    Raises:
        ManifestError: a graph or tensor that is missing or not known, another shape, or too many
            values for a tile; it has the field.
    """
    wanted = (*GRAPHS, GUIDE) if family == "rcod-s" else GRAPHS
    if set(graphs) != set(wanted):
        raise ManifestError("graphs", f"the graphs {', '.join(wanted)}", sorted(graphs))
    for name, graph in graphs.items():
        _check_tensors(name, graph, GUIDE in graphs, level_count)
    _check_shapes(graphs, image, level_count)


def _check_tensors(name: str, graph: Graph, is_guided: bool, level_count: int) -> None:
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    outputs = {tensor.name: tensor for tensor in graph.outputs}
    wanted = set(_INPUTS[name])
    if level_count == 1:  # nothing to choose
        wanted -= {"level"}
    if is_guided:
        wanted |= {"encoder": {"vae_matrices"}, "denoiser": {"unet_matrices"}}.get(name, set())
    if set(inputs) != wanted:
        raise ManifestError(f"graphs.{name}.inputs", ", ".join(sorted(wanted)), sorted(inputs))
    optional = _ESTIMATES if name == (GUIDE if is_guided else "encoder") else set()
    if set(outputs) not in (_OUTPUTS[name], _OUTPUTS[name] | optional):
        expected = ", ".join(sorted(_OUTPUTS[name]))
        more = f", or with {', '.join(sorted(optional))}" if optional else ""
        raise ManifestError(f"graphs.{name}.outputs", expected + more, sorted(outputs))
    for tensor in (inputs.get("level"), outputs.get("adaptive")):
        if tensor is not None and tensor.shape[-1] != level_count:
            raise ManifestError(
                f"graphs.{name}",
                f'"{tensor.name}" with {level_count} weights, one for each level',
                tensor.shape,
            )


def _check_shapes(graphs: Mapping[str, Graph], image: ImageContract, level_count: int) -> None:
    """Every tensor has the shape that the runtime feeds, or that another graph hands on."""
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
