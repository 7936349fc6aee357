"""Write a program to a file of ExecuTorch (.pte) for its XNNPACK backend: its logits are those of the simulation.

The program becomes a graph of quantize, dequantize and float operators (`QuantizedModule`), which ExecuTorch's
partitioner lowers to integer kernels. No calibration is involved. Weights of fewer than 8 bits are kept in int8.
"""

from importlib import import_module

import torch
from torch import nn

from synq.engines.program import Program
from synq.export.mobile.quantized_module import QuantizedModule


def write_pte(program: Program, batch: int = 1) -> bytes:
    """Return the bytes of a .pte file with one method, ``forward``: images (N, C, H, W) -> logits (N, K).

    Args:
        program: A program of the target ``executorch``.
        batch: N, which the file fixes.

    Raises:
        ValueError: If the engine has no exact integer kernel for a step.
        ModuleNotFoundError: If the package executorch is not installed.
    """
    import_module("torch.ao.quantization.fx._decomposed")  # registers the operators quantized_decomposed
    return lowered_to_xnnpack(QuantizedModule(program).eval(), program.shapes[program.image], batch)


def lowered_to_xnnpack(module: nn.Module, input_size: tuple[int, ...], batch: int = 1) -> bytes:
    """Return the bytes of a .pte file of a module, with what XNNPACK has kernels for delegated to it.

    Args:
        module: (N, C, H, W) -> (N, K), in evaluation mode.
        input_size: (C, H, W).
        batch: N, which the file fixes.

    Raises:
        ModuleNotFoundError: If the package executorch is not installed.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    exported = torch.export.export(module, (torch.zeros(batch, *input_size),), strict=True)
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    return bytes(lowered.to_executorch().buffer)
