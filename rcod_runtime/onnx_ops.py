"""How many inputs the operators of ONNX need, from opset 17 on (the operator specification).

OpenVINO reads the inputs of a node without looking whether it has them.
"""

from __future__ import annotations

# Those with one are not listed, and so are those that a later opset may bring.
_NEEDED = {
    0: """
        Constant Optional OptionalHasElement RandomNormal RandomUniform SequenceEmpty
    """,
    2: """
        Add AffineGrid And BitShift BitwiseAnd BitwiseOr BitwiseXor CastLike CausalConvWithState
        CenterCropPad Compress Conv ConvInteger ConvTranspose CumProd CumSum DequantizeLinear
        Div Equal Expand Gather GatherElements GatherND Gemm Greater GreaterOrEqual GridSample
        LayerNormalization Less LessOrEqual Loop MatMul MatMulInteger MaxRoiPool MaxUnpool Mod
        Mul NegativeLogLikelihoodLoss NonMaxSuppression Or PRelu Pad Pow QuantizeLinear
        RMSNormalization Reshape ReverseSequence STFT SequenceAt SequenceInsert
        SoftmaxCrossEntropyLoss StringConcat Sub SwiGLU TensorScatter Tile TopK Unsqueeze Xor
    """,
    3: """
        Attention Col2Im DeformConv GRU GroupNormalization InstanceNormalization LSTM
        LinearAttention OneHot RNN Range RoiAlign RotaryEmbedding ScatterElements ScatterND
        Slice Where
    """,
    5: """
        BatchNormalization MelWeightMatrix
    """,
    8: """
        QLinearConv QLinearMatMul
    """,
}
REQUIRED_INPUTS = {name: count for count, names in _NEEDED.items() for name in names.split()}


def required_inputs(operator: str) -> int:
    """The inputs that a node of this kind can't do without; the first ones of all it may have."""
    return REQUIRED_INPUTS.get(operator, 1)
