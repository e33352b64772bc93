"""Wide 3x3 convolutions of an OpenVINO model by Winograd's minimal filtering F(4x4, 3x3).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016): 36 products make a
block of 4x4 outputs that needs 144 directly. A convolution becomes 36 products of matrices

    Y = A' [ (G g G') * (B' d B) ] A

with d the 6x6 inputs under a block, g the 3x3 weights, * summed over the input channels. OpenVINO
has it not for x86; its products of matrices run at the processor's rate, and the transforms around
them are copies, which is why it pays for many channels alone (measured: ``MIN_CHANNELS``).
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
# 2.5 for 512 (AVX2). AVX-512 doubles the rate of products and not that of copies: .8 to 1.0 for 96,
# .9 to 1.2 for 128, 1.3 to 1.5 for 256, 1.8 to 1.9 for 512.
MIN_CHANNELS, MIN_CHANNELS_AVX512 = 48, 64
MIN_BLOCKS = 64  # of 4x4 outputs: with fewer, what takes time is to read four times the weights

Transformed = dict[tuple[int, tuple[int, ...]], Array]  # by the address and shape of the weights

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


def use_winograd(model: ov.Model, transformed: Transformed) -> int:
    """Replace, in place, the convolutions that gain from it; returns how many they were.

    Those with 3x3 weights, stride 1 and a border of 1, whose shapes are fixed, whose weights are in
    the file and whose outputs are whole blocks. Results are those of a direct convolution but for
    rounding: 2e-5 of the largest value.

    Args:
        transformed: weights that were transformed before, and those of this call: copies of one
            model share theirs. It lives no longer than the model whose weights they are.
    """
    replaced = 0
    wide = "avx512f" in read_processor().flags
    least = MIN_CHANNELS_AVX512 if wide else MIN_CHANNELS
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convolution" and _gains(node, least):
            weights = _stored(node.input_value(1).get_node())
            if weights is not None:
                key = (weights.ctypes.data, weights.shape)
                if key not in transformed:
                    transformed[key] = _transformed(weights)
                output = _winograd(node.input_value(0), transformed[key])
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


def _stored(node: ov.Node) -> Array | None:
    """Weights, as they are or stored in half precision; None for any others (of 8 bits, say)."""
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant" or node.get_element_type() not in (
        ov.Type.f32,
        ov.Type.f16,
    ):
        return None
    return np.asarray(node.data)


def _transformed(weights: Array) -> Array:
    """(K, C, 3, 3) -> G g G', (36, K, C) fp32."""
    k, c = weights.shape[:2]
    return (np.kron(_G, _G) @ weights.reshape(k * c, 9).T.astype(np.float32)).reshape(36, k, c)


def _winograd(image: ov.Output, weights: Array) -> ov.Node:
    n, c, h, w = image.get_partial_shape().to_shape()
    k, rows, columns = weights.shape[1], h // 4, w // 4
    blocks = rows * columns

    padded = ops.pad(image, _ints(0, 0, 1, 1), _ints(0, 0, 1, 1), "constant", _constant(0))
    planes = _reshaped(padded, n * c, 1, h + 2, w + 2)
    d = ops.extract_image_patches(planes, [6, 6], [4, 4], [1, 1], "valid")
    d = _reshaped(d, n * c, 36, blocks)
    v = ops.matmul(_constant(np.kron(_B_T, _B_T)), d, False, False)
    v = ops.transpose(_reshaped(v, n, c, 36, blocks), _ints(2, 1, 0, 3))
    m = ops.matmul(_constant(weights), _reshaped(v, 36, c, n * blocks), False, False)
    m = _reshaped(m, 36, k * n * blocks)
    y = ops.matmul(_constant(np.kron(_A_T, _A_T)), m, False, False)
    y = ops.transpose(_reshaped(y, 4, 4, k, n, rows, columns), _ints(3, 2, 4, 0, 5, 1))
    return _reshaped(y, n, k, h, w)


def _reshaped(node: ov.Node, *shape: int) -> ov.Node:
    return ops.reshape(node, _ints(*shape), False)


def _constant(values: ArrayLike) -> ov.Node:
    """It holds on to the array and makes no copy."""
    return ov.op.Constant(np.asarray(values, np.float32), shared_memory=True)


def _ints(*values: int) -> ov.Node:
    return ov.op.Constant(np.array(values, np.int64))
