"""Add a loss term from outside, sweep its weight, and see it in the table.

Here the term is a function of this file, which the trials of a sweep can import as well. In a notebook,
`@synq.loss_term("logit_distance", version="1")` registers it for the runs of that process; a package registers one by
an entry point of the group synq.loss_terms.
"""

import torch

import synq


def logit_distance(inputs: synq.LossInputs) -> torch.Tensor:
    """Return the squared distance of each image's logits, the mean over classes: (N,)."""
    return (inputs.student_logits - inputs.teacher_logits).square().mean(dim=1)


SPEC = {
    "name": "own_loss",
    "models": ["bundled:digits_resnet8"],
    "bits": ["W3A3"],
    "sampler": "grid",
    "scheduler": "none",
    "base": {
        "synthesis": {"num_images": 64, "shard_size": 64, "iterations": 20},
        "finetune": {"epochs": 2, "batch_size": 32, "own_term": f"{__file__}:logit_distance"},
        "evaluation": {"heldout_images": 64},
    },
    "space": {"finetune.own_weight": [0.0, 0.1]},
}


def main() -> None:
    """Run one trial without the term and one with it."""
    result = synq.sweeps.run(SPEC, output_dir="runs/own_loss")
    print(result.leaderboard[["rank", "params.finetune.own_weight", "objective_value", "top1_mean"]])
    print("loss terms of the last epoch:", result.best().record.loss_history[-1])


if __name__ == "__main__":
    main()
