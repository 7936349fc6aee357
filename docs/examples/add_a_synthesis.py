"""Add a way to make images from outside, and compare it with SynQ's in one sweep.

Here the method is a function of this file, which the trials of a sweep can import as well. In a notebook,
`@synq.synthesis_method("ascent", version="1")` registers it for the runs of that process; a package registers one by an
entry point of the group synq.synthesis_methods.
"""

import torch
from torch.nn import functional as F

import synq


def ascent(inputs: synq.SynthesisInputs) -> torch.Tensor:
    """Return noise whose pixels were optimized until the network sees the assigned classes: (N, C, H, W)."""
    images = torch.randn(len(inputs.labels), *inputs.input_size, generator=inputs.generator).to(inputs.device)
    images.requires_grad_()
    optimizer = torch.optim.Adam([images], lr=inputs.config.lr)
    for step in range(inputs.config.iterations):
        optimizer.zero_grad()
        F.cross_entropy(inputs.module(inputs.clamp(images)), inputs.labels).backward()
        optimizer.step()
        inputs.progress((step + 1) / inputs.config.iterations)
    return inputs.clamp(images)


SPEC = {
    "name": "own_synthesis",
    "models": ["bundled:digits_resnet8"],
    "bits": ["W3A3"],
    "sampler": "grid",
    "scheduler": "none",
    "report": False,
    "base": {
        "synthesis": {"num_images": 64, "shard_size": 64, "iterations": 20},
        "finetune": {"epochs": 2, "batch_size": 32},
        "evaluation": {"heldout_images": 64},
    },
    "space": {"synthesis.method": ["inversion", f"{__file__}:ascent"]},
}


def main() -> None:
    """Run one trial with SynQ's images and one with those of the function; both are measured on the same images."""
    result = synq.sweeps.run(SPEC, output_dir="runs/own_synthesis")
    print(result.leaderboard[["rank", "params.synthesis.method", "objective_value", "top1_mean"]])


if __name__ == "__main__":
    main()
