"""Run .pte files in ExecuTorch, which is imported late: it warns, and tests filter warnings when they run."""

from torch import Tensor

from synq.engines.program import Program
from synq.engines.simulation import Simulation
from synq.export.executorch import write_pte


def logits_of(data: bytes, images: Tensor) -> Tensor:
    """Outputs of a file with the batch 1 for images (N, C, H, W)."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(data)  # methods do not keep it alive
    method = program.load_method("forward")
    outputs = [method.execute([image[None].contiguous()])[0].clone() for image in images]
    return outputs[0].new_tensor([output[0].tolist() for output in outputs])


def differing_logits(program: Program, images: Tensor) -> int:
    """Number of logits that differ in any bit between the file in ExecuTorch and the simulation."""
    logits = logits_of(write_pte(program), images)
    expected = Simulation(program)(images)
    assert logits.shape == expected.shape
    return int((logits != expected).sum())
