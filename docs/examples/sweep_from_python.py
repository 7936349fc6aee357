"""Search over two settings of your own from Python, and look at the tables: each setting is a column."""

import synq

SPEC = {
    "name": "two_settings",
    "models": ["bundled:digits_resnet8"],
    "bits": ["W3A3"],
    "sampler": "grid",
    "base": {
        "synthesis": {"num_images": 64, "shard_size": 64, "iterations": 20},
        "finetune": {"epochs": 2, "batch_size": 32},
        "evaluation": {"heldout_images": 64},
    },
    "space": {"finetune.momentum": [0.5, 0.9], "quant.mse_norm": [2.0, 2.4]},
}


def main() -> None:
    """Run four trials, and print the leaderboard and the best run."""
    result = synq.sweeps.run(SPEC, output_dir="runs/two_settings")
    print(result.trials[["trial", "params.finetune.momentum", "params.quant.mse_norm", "objective_value", "top1"]])
    print(result.leaderboard[["rank", "params.finetune.momentum", "params.quant.mse_norm", "top1_mean"]])
    print(result.best())


if __name__ == "__main__":
    main()
