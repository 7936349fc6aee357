#!/usr/bin/env bash
# Package:  optuna 5.0.0
# Expected: a study with GridSampler driven by ask and tell takes the result of each grid point; asked for more than
#           the grid has, it says that the grid is exhausted.
# Happens:  telling the last point stores its result and then raises RuntimeError ("Study.stop is supposed to be
#           invoked inside an objective function"). Whoever goes on asking gets points that were measured
#           already, chosen at random, and each further tell stores its result and raises again.
# Matters:  search libraries and cluster drivers use ask and tell. The error looks like a lost result, so a driver
#           that tells again or fails the trial spoils the study; one that ignores it pays for repeated trials.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    optuna==5.0.0

cat > check.py <<'PY'
import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)
BITS = [2, 3, 4, 8]
study = optuna.create_study(sampler=optuna.samplers.GridSampler({"bits": BITS}, seed=0))
asked, errors = [], []
for number in range(7):
    trial = study.ask()
    asked.append(trial.suggest_categorical("bits", BITS))
    try:
        study.tell(trial, float(asked[-1]))
    except RuntimeError as error:
        errors.append(number)
        message = str(error)
states = [trial.state.name for trial in study.trials]

print("version: optuna", optuna.__version__)
print("expected: four results, no error, and a fifth ask that says the grid is exhausted")
print("seen: asked for", asked, "with a RuntimeError at the tell of number", errors)
print("seen:", message)
print("seen: states", states)
if not (
    sorted(asked[:4]) == BITS
    and set(asked[4:]) <= set(BITS)
    and errors == [3, 4, 5, 6]
    and states == ["COMPLETE"] * 7
    and "Study.stop" in message
):
    raise SystemExit("changed: the last point's tell, and each later one, must store its result and raise")
PY
venv/bin/python check.py
