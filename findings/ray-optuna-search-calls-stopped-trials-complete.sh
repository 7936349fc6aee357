#!/usr/bin/env bash
# Package:  ray 2.60.0 (ray[tune]) with optuna 5.0.0
# Expected: a trial that ASHA stops early is PRUNED in the Optuna study behind OptunaSearch, as Optuna's own pruners
#           leave it.
# Happens:  it is COMPLETE, with the value of the epoch at which it was stopped.
# Matters:  the sampler takes the loss after one epoch for the final one of that setting, Optuna's plots and importances
#           mix values of different budgets, and nothing in the study says which trials were stopped.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    "ray[tune]==2.60.0" optuna==5.0.0

cat > check.py <<'PY'
import os

os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0", RAY_AIR_NEW_OUTPUT="0")
os.environ.update(RAY_AUTH_MODE="disabled", RAY_TMPDIR=os.getcwd())
# a busy machine may take its time to start Ray
os.environ.update(RAY_agent_register_timeout_ms="300000", RAY_raylet_start_wait_time_s="300")
import warnings

import optuna
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

warnings.simplefilter("ignore")
optuna.logging.set_verbosity(optuna.logging.ERROR)


def train(config):
    for epoch in range(1, 10):
        tune.report({"loss": config["x"] + 1 / epoch})


START = [{"x": x} for x in (0.1, 0.9, 0.2, 0.8)]
ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
search = OptunaSearch(
    {"x": optuna.distributions.FloatDistribution(0, 1)}, metric="loss", mode="min", points_to_evaluate=START
)
plan = tune.TuneConfig(
    search_alg=search,
    scheduler=ASHAScheduler(metric="loss", mode="min", max_t=9, grace_period=1, reduction_factor=3),
    num_samples=4,
    max_concurrent_trials=1,
    reuse_actors=True,
)
tune.Tuner(train, tune_config=plan, run_config=tune.RunConfig(storage_path=os.getcwd(), verbose=0)).fit()
study = search._ot_study
rows = []
for trial in study.trials:
    x = trial.params["x"]
    if trial.value is None:
        raise SystemExit(f"changed: the trial of x {x} has no value and is {trial.state.name}")
    rows.append((x, round(1 / (trial.value - x)), trial.state.name))  # the loss says how many epochs there were
ray.shutdown()

print("version: ray", ray.__version__, "optuna", optuna.__version__)
print("expected: PRUNED for each trial that was stopped before epoch 9")
for x, epochs, state in rows:
    print(f"seen: x {x}: {state} with the loss of epoch {epochs}")
stopped = [state for _, epochs, state in rows if epochs < 9]
if len(rows) != 4 or len(stopped) < 2 or set(stopped) != {"COMPLETE"}:
    raise SystemExit(f"changed: {rows}")
PY
venv/bin/python check.py
