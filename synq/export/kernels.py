"""Number of integer and float kernels that ONNX Runtime runs for the convolutions and matrix products of a model.

ONNX Runtime replaces operations of the file by others, also from its own domains (``com.microsoft`` and internal ones):
the optimized graph names what it runs. The two lists hold every operation of ONNX Runtime 1.32 that is a convolution or
a matrix product of an activation with one tensor; fused attention and recurrent operations are not among them, because
no graph with QuantizeLinear and DequantizeLinear is fused into one. Source: ``docs/ContribOperators.md`` of ONNX
Runtime, and the list of its operators, which the test of this module reads.
"""

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from synq.export.verify import open_session

if TYPE_CHECKING:
    import onnx

INTEGER_KERNELS = frozenset(
    {
        *("QLinearConv", "ConvInteger", "QLinearConvTranspose"),
        *("QLinearMatMul", "MatMulInteger", "MatMulInteger16", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
        *("QGemm", "QOrderedMatMul"),
    }
)
"""Operations that multiply integers; the sums of some are scaled to float at once."""
FLOAT_KERNELS = frozenset(
    {
        *("Conv", "FusedConv", "NhwcConv", "NhwcFusedConv", "ConvTranspose", "ConvTransposeWithDynamicPads"),
        *("DeformConv", "MatMul", "FusedMatMul", "FusedMatMulActivation", "TransposeMatMul", "SparseToDenseMatMul"),
        *("Gemm", "FusedGemm", "GemmFastGelu", "GemmFloat8", "Einsum", "MatMulPacked"),
        # Weights of few bits, which are dequantized for float products (MatMulNBits rounds the activations to 8 bits
        # only where its `accuracy_level` is 4).
        *("MatMulNBits", "MatMulNBitsMlp", "MatMulNBitsQkv", "MatMulNBitsQLoRA", "MatMulBnb4", "MatMulFpQ4"),
        *("MatMulBlockQuantizedFp4Weight", "MatMulBlockQuantizedFp8Weight"),
    }
)
"""Operations that multiply floats."""


def count_kernels(model: bytes) -> tuple[int, int]:
    """Return the numbers of integer and float kernels of convolutions and matrix products in ONNX Runtime.

    They depend on the machine, because ONNX Runtime optimizes the graph for it.

    Args:
        model: An ONNX model.

    Returns:
        ``(integer kernels, float kernels)``.
    """
    kinds = kernels_of(model)
    return sum(kind in INTEGER_KERNELS for kind in kinds), sum(kind in FLOAT_KERNELS for kind in kinds)


def kernels_of(model: bytes) -> list[str]:
    """Return the operations that ONNX Runtime runs for a model on this machine, in order."""
    return [node.op_type for node in _optimized_nodes(model)]


def kernel_counts(model: bytes) -> dict[str, int]:
    """Return how often ONNX Runtime runs each operation for a model on this machine."""
    return dict(Counter(kernels_of(model)))


def float_layers(model: bytes) -> list[str]:
    """Return the names of the convolutions and matrix products that ONNX Runtime computes in float on this machine.

    Args:
        model: An ONNX model, whose nodes are named by their layers.
    """
    return [node.name for node in _optimized_nodes(model) if node.op_type in FLOAT_KERNELS]


def _optimized_nodes(model: bytes) -> "list[onnx.NodeProto]":
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        open_session(model, optimized=path)
        return list(onnx.load(path).graph.node)
