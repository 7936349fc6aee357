"""Compare large classifiers bit by bit with their files in an engine, at the size of ImageNet.

    python tests/fuzz/engine_equality_run.py resnet18 timm:efficientnet_lite0 --target onnxruntime --images 64

Weights are random, with batch-norm statistics of noise: a single wrong code changes classes. Each line names the
network, the bit-widths, the level of optimization and the number of logits that differ in any bit.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

if __name__ == "__main__":  # as a script: the packages of the checkout
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch
from torch import Tensor, nn

from support.placed_students import placed
from synq.engines.lowering import lower
from synq.engines.simulation import Simulation
from synq.export.targets.formats import FORMATS

Engine = Callable[[Tensor], Tensor]


def network(name: str) -> nn.Module:
    """A classifier of torchvision, or of timm for ``timm:NAME``, with random weights and statistics of noise."""
    torch.manual_seed(0)
    if name.startswith("timm:"):
        import timm

        module = timm.create_model(name.removeprefix("timm:"), pretrained=False)
    else:
        import torchvision

        module = getattr(torchvision.models, name)(weights=None)
    module.train()
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with torch.no_grad():
        for _ in range(2):
            module(torch.randn(8, 3, 224, 224))
    return module.eval()


def engines(target: str, content: bytes) -> Iterable[tuple[str, Engine]]:
    """What runs a file: the engine's default, and for ONNX Runtime also the level extended."""
    yield "default", FORMATS[target].open(content, 1)
    if target == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        yield "extended", lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def main() -> int:
    """Return 1 if any bit differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--target", default="onnxruntime", choices=list(FORMATS))
    parser.add_argument("--bits", nargs="+", default=["8,8", "4,4"])
    parser.add_argument("--images", type=int, default=64)
    options = parser.parse_args()
    failed = False
    for name in options.networks:
        module = network(name)
        images = torch.randn(options.images, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        for weight_bits, act_bits in (tuple(map(int, pair.split(","))) for pair in options.bits):
            started, label = time.time(), f"{name} W{weight_bits}A{act_bits} {options.target}"
            try:
                student = placed(
                    module, (3, 224, 224), images[:8], options.target, weight_bits=weight_bits, act_bits=act_bits
                )
                program = lower(student, options.target, (3, 224, 224))
                content = FORMATS[options.target].write(program)
            except ValueError as error:
                print(f"{label}: rejected: {error}", flush=True)
                continue
            opened = list(engines(options.target, content))
            differing, simulation, total = {level: 0 for level, _ in opened}, Simulation(program), 0
            for part in images.split(8):
                expected = simulation(part)
                total += expected.numel()
                for level, engine in opened:
                    differing[level] += int((engine(part) != expected).sum())
            failed |= any(differing.values())
            found = ", ".join(f"{level}: {count}" for level, count in differing.items())
            print(f"{label}: differing of {total} logits: {found} ({time.time() - started:.0f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
