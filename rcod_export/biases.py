"""Empirical bias correction (Nagel et al. 2019): rounding to 8 bits leaves the means alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

Array = npt.NDArray[np.float32]


def correct_biases(
    exact: onnx.ModelProto,
    rounded: onnx.ModelProto,
    names: Iterable[str],
    feeds: Iterable[Mapping[str, Array]],
) -> None:
    """Take off the biases of ``exact`` what rounding adds to the mean of an output channel.

    For the same input x a convolution gives W' x' + b in the place of W x + b; the means over
    ``feeds`` differ by the sums over taps of W' mean(x') - W mean(x). (Borders, where some taps see
    nothing, are not told apart.)
    """
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in exact.graph.initializer}
    convs = {node.name: node for node in exact.graph.node if node.name in set(names)}
    roundings = _roundings(rounded.graph, convs)
    means = _input_means(exact, {name: convs[name].input[0] for name in convs}, roundings, feeds)
    for name, node in convs.items():
        mean, rounded_mean = means[name]  # (C,) each
        added = roundings[name].weights.sum((2, 3)) @ rounded_mean
        added -= weights[node.input[1]].sum((2, 3)) @ mean  # (O,)
        # Of its own: one that is all zeros is left out of a graph, and equal ones are shared.
        bias = weights[node.input[2]] if len(node.input) > 2 else np.zeros(len(added), np.float32)
        stored = numpy_helper.from_array((bias - added).astype(np.float32), f"{name}.bias")
        exact.graph.initializer.append(stored)
        node.input[2:] = [stored.name]


@dataclass(frozen=True)
class _Rounding:
    """Of one convolution: the step and the zero of its input, its weights (O, C, k, k) as they are
    multiplied."""

    step: float
    zero: int
    weights: Array

    def rounded(self, x: Array) -> Array:
        steps = np.clip(np.rint(x / self.step) + self.zero, 0, 255) - self.zero
        return np.asarray(steps * self.step, np.float32)


def _roundings(graph: onnx.GraphProto, names: Iterable[str]) -> dict[str, _Rounding]:
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    nodes = {node.name: node for node in graph.node}
    roundings = {}
    for name in names:
        x, w = (made_by[nodes[name].input[index]].input for index in (0, 1))
        steps = values[w[1]].reshape(-1, 1, 1, 1)  # one for each output channel
        weights = values[w[0]].astype(np.float32) * steps
        roundings[name] = _Rounding(float(values[x[1]]), int(values[x[2]]), weights)
    return roundings


def _input_means(
    model: onnx.ModelProto,
    inputs: Mapping[str, str],
    roundings: Mapping[str, _Rounding],
    feeds: Iterable[Mapping[str, Array]],
) -> dict[str, tuple[Array, Array]]:
    """Of each convolution: the mean (C,) of what goes in, as it is and rounded."""
    import onnxruntime

    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    there = {output.name for output in seen.graph.output}
    wanted = dict.fromkeys(inputs.values())
    seen.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in there)
    session = onnxruntime.InferenceSession(seen.SerializeToString())
    sums: dict[str, list[Array]] = {}
    for feed in feeds:
        found = dict(zip(wanted, session.run(list(wanted), dict(feed)), strict=True))
        for name, tensor in inputs.items():
            x = found[tensor]  # (B, C, h, w)
            pair = [values.mean((0, 2, 3)) for values in (x, roundings[name].rounded(x))]
            sums.setdefault(name, []).append(np.stack(pair))
    return {name: tuple(np.mean(pairs, 0)) for name, pairs in sums.items()}
