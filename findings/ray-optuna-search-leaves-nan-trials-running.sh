#!/usr/bin/env bash
# Package:  ray 2.60.0 (ray[tune]) with optuna 5.0.0
# Expected: a trial whose metric is NaN ends as FAIL in the Optuna study behind OptunaSearch, as under study.optimize.
# Happens:  for Ray Tune such a trial has finished without error. The search hands NaN to Optuna as the value of a
#           COMPLETE trial, Optuna refuses it, the refusal is logged ("The value nan is not acceptable"), and the
#           trial stays RUNNING in the study for good.
# Matters:  diverged settings are the ones a sampler most needs to hear of. With a storage that outlives the sweep they
#           look like trials that somebody is still measuring. Report a large finite value instead of NaN, or tell
#           the study FAIL oneself.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    "ray[tune]==2.60.0" optuna==5.0.0

cat > check.py <<'PY'
import warnings

import optuna
import ray
from ray.tune.search.optuna import OptunaSearch

warnings.simplefilter("ignore")
optuna.logging.set_verbosity(optuna.logging.ERROR)
LOSSES = [1.0, float("nan"), 0.5]

# the calls that Ray Tune makes for trials that report once and end without an error
space = {"x": optuna.distributions.FloatDistribution(0, 1)}
search = OptunaSearch(space, metric="loss", mode="min", seed=0)
for number, loss in enumerate(LOSSES):
    result = {"loss": loss, "training_iteration": 1}
    search.suggest(str(number))
    search.on_trial_result(str(number), result)
    search.on_trial_complete(str(number), result, error=False)
through_ray = [trial.state.name for trial in search._ot_study.trials]

left = iter(LOSSES)
study = optuna.create_study()
study.optimize(lambda trial: next(left), n_trials=len(LOSSES))
alone = [trial.state.name for trial in study.trials]

print("version: ray", ray.__version__, "optuna", optuna.__version__)
print("expected: the trial of the NaN is FAIL both times")
print("seen: losses", LOSSES, "through OptunaSearch", through_ray)
print("seen: losses", LOSSES, "by study.optimize   ", alone)
if through_ray != ["COMPLETE", "RUNNING", "COMPLETE"] or alone != ["COMPLETE", "FAIL", "COMPLETE"]:
    raise SystemExit(f"changed: {through_ray} {alone}")
PY
venv/bin/python check.py
