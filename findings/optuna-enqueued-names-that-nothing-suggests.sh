#!/usr/bin/env bash
# Package:  optuna 5.0.0
# Expected: enqueue_trial with a name that the objective never suggests (a typo, or a nested dictionary as it comes
#           from a configuration file) is reported when the trial is told.
# Happens:  the values are dropped without a word: the trial runs with sampled values in their place, is COMPLETE, and
#           looks like the enqueued one. (A value out of range is reported, and used.)
# Matters:  "start from the published setting" measures random settings; the log of the sweep shows trial 0 done.
#           Compare trial.params with what was enqueued.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    optuna==5.0.0

cat > check.py <<'PY'
import warnings

import optuna

optuna.logging.set_verbosity(optuna.logging.WARNING)


def objective(trial):
    return trial.suggest_float("lr", 1e-4, 1e-1, log=True) * trial.suggest_int("bits", 2, 8)


PUBLISHED = {"lr": 0.0123, "bits": 4}
CASES = {
    "right": PUBLISHED,
    "typo": {"learning_rate": 0.0123, "bit": 4},
    "nested": {"quant": PUBLISHED},
}
seen, said = {}, {}
for name, values in CASES.items():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        study.enqueue_trial(values)
        study.optimize(objective, n_trials=1)
    seen[name] = study.trials[0].params
    said[name] = [str(warning.message) for warning in warned]
    assert study.trials[0].state.name == "COMPLETE"

print("version: optuna", optuna.__version__)
print("expected: each case but the first says what it drops")
for name, params in seen.items():
    print(f"seen: {name:8s} enqueued {CASES[name]} ran {params}, warnings: {len(said[name])}")
holds = seen["right"] == PUBLISHED and not any(said.values())
for name in ("typo", "nested"):
    holds = holds and seen[name]["lr"] != PUBLISHED["lr"]
if not holds:
    raise SystemExit(f"changed: {seen} {said}")
PY
venv/bin/python check.py
