"""Add a sampler from outside: any of Optuna's, or one of yours, decides which settings a sweep tries next.

Samplers run in the process that starts the sweep, so a decorator suffices for sweeps from Python. A package registers
one by an entry point of the group synq.samplers; a function of a file is named as FILE.py:FUNCTION.
"""

import optuna

import synq


@synq.sampler("near_best", version="1")
def near_best(inputs: synq.SamplerInputs) -> optuna.samplers.BaseSampler:
    """Return a sampler of random settings and, in every second trial, settings near the best so far."""
    return NearBest(seed=inputs.seed)


class NearBest(optuna.samplers.RandomSampler):
    """Draws at random, and moves every second trial half of the way to the best."""

    def sample_independent(self, study, trial, param_name, param_distribution):
        drawn = super().sample_independent(study, trial, param_name, param_distribution)
        done = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
        done = [one for one in done if param_name in one.params]
        if trial.number % 2 or not done or isinstance(drawn, str | bool):
            return drawn
        return (drawn + min(done, key=lambda one: one.value).params[param_name]) / 2


SPEC = {
    "name": "own_sampler",
    "models": ["bundled:digits_resnet8"],
    "bits": ["W3A3"],
    "sampler": "near_best",
    "scheduler": "none",
    "report": False,
    "num_trials": 4,
    "base": {
        "synthesis": {"num_images": 64, "shard_size": 64, "iterations": 20},
        "finetune": {"epochs": 1, "batch_size": 32},
        "evaluation": {"heldout_images": 64},
    },
    "space": {"finetune.lr": {"type": "float", "low": 1e-3, "high": 1e-1}},
}


def main() -> None:
    """Run four trials that the sampler proposes."""
    result = synq.sweeps.run(SPEC, output_dir="runs/own_sampler")
    print(result.leaderboard[["rank", "params.finetune.lr", "objective_value"]])


if __name__ == "__main__":
    main()
