#!/usr/bin/env bash
# Package:  optuna 5.0.0
# Expected: with RDBStorage(heartbeat_interval=1, grace_period=2) the trial of a process that died is set to FAIL by
#           fail_stale_trials, however the process got it.
# Happens:  only Study.optimize gives the beat. A trial from study.ask has no heartbeat at all, is therefore never
#           stale, and stays RUNNING for ever; the option is accepted without a word. The trial of a killed
#           study.optimize is failed as promised.
# Matters:  drivers built on ask and tell (Ray Tune's OptunaSearch among them) configure a heartbeat that protects
#           nothing; after each crash the sampler goes on treating dead trials as being measured.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check optuna==5.0.0

cat > check.py <<'PY'
import os
import subprocess
import sys
import time
import warnings

import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.simplefilter("ignore")


def storage():
    return optuna.storages.RDBStorage("sqlite:///study.db", heartbeat_interval=1, grace_period=2)


def objective(trial):
    trial.suggest_float("lr", 0, 1)
    os._exit(1)  # the process is gone in mid-trial


if len(sys.argv) > 1:
    study = optuna.load_study(study_name=sys.argv[1], storage=storage())
    if sys.argv[1] == "optimize":
        study.optimize(objective, n_trials=1)
    objective(study.ask())

seen = {}
for kind in ("optimize", "ask"):
    study = optuna.create_study(study_name=kind, storage=storage())
    subprocess.run([sys.executable, __file__, kind])
    time.sleep(5)
    optuna.storages.fail_stale_trials(study)
    seen[kind] = study.trials[0].state.name
print("version: optuna", optuna.__version__)
print("expected: both trials FAIL, 5 s after their process died (beat 1 s, grace 2 s)")
for kind, state in seen.items():
    print(f"seen: trial from study.{kind}: {state}")
if seen != {"optimize": "FAIL", "ask": "RUNNING"}:
    raise SystemExit(f"changed: {seen}")
PY
venv/bin/python check.py
