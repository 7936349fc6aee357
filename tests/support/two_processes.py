"""Worker of test_two_processes: ten fine-tuning steps, their losses and what each process kept.

Called by the test, or run by `accelerate launch` with the file for its JSON and the names of the cases; the global
batch is the same, so
the numbers must be.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from synq.common.seeding import derive_seed
from synq.config.run import FinetuneConfig, QuantConfig, RuntimeConfig
from synq.finetune.loop import finetune
from synq.finetune.responses import TappedNetwork, teacher_response
from synq.finetune.schedule import epoch_batches, local_batch_size
from synq.losses import difficulty
from synq.network.cam_site import locate_cam
from synq.network.tracing import trace_classifier, with_features
from synq.quant.layers import QuantConv2d, QuantLinear, step_parameters
from synq.quant.student import observe_ranges, quantize_model
from synq.runtime import make_accelerator

SIZE = (3, 8, 8)
BATCH = 64
SEED = 7


def classifier(kind: str) -> nn.Module:
    """A random classifier whose head is linear ("closed_form") or not ("autograd")."""
    torch.manual_seed(derive_seed("two processes") % 2**31)
    hidden = [nn.Linear(12, 9), nn.Hardswish()] if kind == "autograd" else []
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        *hidden,
        nn.Linear(9 if hidden else 12, 5),
    )
    with torch.no_grad():
        net[-1].weight.mul_(20)  # type: ignore[operator]  # teacher outputs of all degrees of certainty
    return net.eval().requires_grad_(False)


def codes(net: nn.Module) -> list[Tensor]:
    """Integer weights of every layer."""
    from synq.quant.fake_quant import quantize

    result = []
    for layer in net.modules():
        if isinstance(layer, (QuantConv2d, QuantLinear)):
            quantizer = layer.weight_quantizer
            scale, zero_point = quantizer.qparams(layer.weight)
            result.append(quantize(layer.weight, scale, zero_point, quantizer.quant_min, quantizer.quant_max, axis=0))
    return result


def train_case(kind: str, steps: Literal["none", "all"]) -> dict[str, Any]:
    """Train one case; every process returns what it found."""
    accelerator = make_accelerator(RuntimeConfig(device="cpu"))
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    traced = trace_classifier(classifier(kind).double(), SIZE)
    site = locate_cam(traced)
    assert site.kind == kind
    student = quantize_model(traced, QuantConfig(weight_bits=4, act_bits=8, learned_steps=steps), cam_node=site.node)
    images = torch.randn(BATCH, *SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(BATCH) % 5
    observe_ranges(student.net, images, act_range="minmax")
    teacher = TappedNetwork(net=with_features(traced, site.node), cam_site=site)
    network = TappedNetwork(net=with_features(student.net, student.cam_node), cam_site=site)
    # One step an epoch, so that the history holds every step.
    config = FinetuneConfig(
        epochs=10, batch_size=BATCH, lr=1e-6, ce_weight=1.0, cam_weight=3.0, difficulty_threshold=0.8
    )

    share = local_batch_size(BATCH, accelerator.num_processes)
    kept = []
    for epoch in range(config.epochs):
        rows = next(iter(epoch_batches(BATCH, BATCH, SEED, epoch)))[accelerator.process_index * share :][:share]
        logits = teacher_response(teacher, images[rows], labels[rows]).logits
        kept.append(float((difficulty(logits, labels[rows]) <= config.difficulty_threshold).double().mean()))
    all_kept = accelerator.gather(torch.tensor([kept], dtype=torch.float64))

    if accelerator.process_index == 1:  # as if another device had summed its histogram in another order
        for ranges in (*student.net.buffers(), *step_parameters(student.net)):
            ranges.detach().mul_(1.5) if ranges.is_floating_point() else ranges.add_(1)
    before = codes(student.net)
    history = finetune(network, teacher, images, labels, config, accelerator=accelerator, seed=SEED)
    flips = sum(int((a != b).sum()) for a, b in zip(before, codes(student.net), strict=True))
    weights = torch.cat([p.detach().flatten() for p in student.net.parameters()])
    everyone = accelerator.gather(weights[None])
    ranges = accelerator.gather(torch.cat([b.detach().flatten().double() for b in student.net.buffers()])[None])
    return {
        "processes": accelerator.num_processes,
        "history": history,
        "flips": flips,
        "kept": all_kept.tolist(),
        "weights": weights.tolist(),
        "ranks_agree": bool((everyone == everyone[:1]).all()) and bool((ranges == ranges[:1]).all()),
    }


def main(out: Path, names: list[str]) -> None:
    found = {name: train_case(*name.split("-")) for name in names}  # type: ignore[arg-type]
    accelerator = make_accelerator(RuntimeConfig(device="cpu"))
    if accelerator.is_main_process:
        out.write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    sys.stdout.flush()
    os._exit(0)  # gloo aborts now and then in the interpreter's own exit


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
