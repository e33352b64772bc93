"""Wide 3x3 convolutions of an OpenVINO model by Winograd's minimal filtering F(4x4, 3x3).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016): 36 products make a
block of 4x4 outputs that needs 144 directly. A convolution becomes 36 products of matrices

    Y = A' [ (G g G') * (B' d B) ] A

with d the 6x6 inputs under a block, g the 3x3 weights, * summed over the input channels. OpenVINO
has it not for x86; its products of matrices run at the processor's rate, and the transforms around
them are copies, which is why it pays for many channels alone (measured: ``MIN_CHANNELS``).

G g G' is four times the weights. It is computed anew for each image, in room that all convolutions
share, from the weights as the file holds them.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from numpy.typing import ArrayLike
from openvino import opset13 as ops

from rcod_runtime.backends import Array
from rcod_runtime.processor import read_processor

# C K / (C + K) of C input and K output channels: the products saved grow with C K, the copies with
# C + K. 1.2 times as fast at this bound (96 and 96), 1.2 to 1.5 for 128, 1.5 to 1.9 for 256, 2.0 to
# 2.5 for 512 (AVX2, in the form before). AVX-512 doubles the rate of products and not that of
# copies: .9 for 96, 1.0 to 1.1 for 128, 1.6 to 1.7 for 256, 1.5 to 2.0 for 512.
MIN_CHANNELS, MIN_CHANNELS_AVX512 = 48, 64
MIN_BLOCKS = 64  # of 4x4 outputs: with fewer, what takes time is to read four times the weights

_B_T = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    np.float32,
)
_G = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    np.float32,
)
_A_T = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    np.float32,
)


def use_winograd(model: ov.Model) -> int:
    """Replace, in place, the convolutions that gain from it; returns how many they were.

    Those with 3x3 weights, stride 1 and a border of 1, whose shapes are fixed, whose weights are in
    the file and whose outputs are whole blocks. Results are those of a direct convolution but for
    rounding: 2e-5 of the largest value.
    """
    replaced = 0
    wide = "avx512f" in read_processor().flags
    least = MIN_CHANNELS_AVX512 if wide else MIN_CHANNELS
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convolution" and _gains(node, least):
            weights = node.input_value(1)
            if _is_stored(weights.get_node()):
                output = _winograd(node.input_value(0), weights)
                output.set_friendly_name(node.get_friendly_name())
                node.output(0).replace(output.output(0))
                replaced += 1
    return replaced


def _gains(node: ov.Node, min_channels: int) -> bool:
    image, weights = (node.get_input_partial_shape(i) for i in (0, 1))
    if image.is_dynamic or weights.is_dynamic or len(image) != 4:
        return False
    attributes = node.get_attributes()
    ones = ("strides", "dilations", "pads_begin", "pads_end")
    if any(list(attributes[name]) != [1, 1] for name in ones):
        return False
    n, _, h, w = image.to_shape()
    k, c, *kernel = weights.to_shape()
    if kernel != [3, 3] or h % 4 or w % 4 or n * h * w < 16 * MIN_BLOCKS:
        return False
    return bool(c * k >= min_channels * (c + k)) and node.get_output_element_type(0) == ov.Type.f32


def _is_stored(node: ov.Node) -> bool:
    """Weights of the file, as they are or in half precision; not any others (of 8 bits, say)."""
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    kinds = (ov.Type.f32, ov.Type.f16)
    return node.get_type_name() == "Constant" and node.get_element_type() in kinds


def _winograd(image: ov.Output, weights: ov.Output) -> ov.Node:
    n, c, h, w = image.get_partial_shape().to_shape()
    k, rows, columns = weights.get_partial_shape().to_shape()[0], h // 4, w // 4
    blocks = rows * columns

    # The planes' border of 1 is what "same" leaves of 6x6 inputs at every fourth place.
    planes = _reshaped(image, n * c, 1, h, w)
    d = ops.extract_image_patches(planes, [6, 6], [4, 4], [1, 1], "same_upper")
    v = _transformed(np.kron(_B_T, _B_T), _reshaped(d, n * c, 36, blocks))
    v = ops.transpose(_reshaped(v, n, c, 36, blocks), _ints(0, 2, 1, 3))
    u = _transformed(np.kron(_G, _G), _reshaped(_read_after(v, weights, k), k * c, 9), True)
    m = ops.matmul(_reshaped(u, 36, k, c), v, False, False)
    y = _transformed(np.kron(_A_T, _A_T), _reshaped(m, n, 36, k * blocks))
    return ops.depth_to_space(_reshaped(y, n, 16 * k, rows, columns), "blocks_first", 4)


def _transformed(matrix: Array, values: ov.Node, transposed: bool = False) -> ov.Node:
    return ops.matmul(_constant(matrix), values, False, transposed)


def _read_after(values: ov.Node, weights: ov.Output, rows: int) -> ov.Node:
    """``weights``, read when ``values`` (of rank 4) are there, in fp32.

    What depends on no input OpenVINO computes once and holds for good: so the numbers of the rows
    depend on a value, and none is beyond infinity.
    """
    first = ops.slice(values, _ints(0, 0, 0, 0), _ints(1, 1, 1, 1), _ints(1, 1, 1, 1))
    zero = ops.convert(_reshaped(ops.less(_constant(np.inf), first), 1), "i64")
    return ops.gather(weights, ops.add(zero, _ints(*range(rows))), _ints(0))


def _reshaped(node: ov.Node, *shape: int) -> ov.Node:
    return ops.reshape(node, _ints(*shape), False)


def _constant(values: ArrayLike) -> ov.Node:
    """It holds on to the array and makes no copy."""
    return ov.op.Constant(np.asarray(values, np.float32), shared_memory=True)


def _ints(*values: int) -> ov.Node:
    return ov.op.Constant(np.array(values, np.int64))
