#!/usr/bin/env bash
# Package:  optuna 5.0.0
# Expected: create_study(direction="maximize", load_if_exists=True) on a study that was made to be minimized raises,
#           or at least warns: the two cannot both be meant.
# Happens:  the argument is ignored; the only line that is logged says that an existing study is used. The study goes
#           on minimizing, and best_trial of the "maximized" top-1 is the worst trial. The same happens with another
#           number of objectives: a study of two is handed out, and the one direction is dropped.
# Matters:  a sweep that changes its metric from a loss to an accuracy and is resumed under its old name searches for
#           the worst setting. Check study.directions after loading.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    optuna==5.0.0

cat > check.py <<'PY'
import logging
import warnings

import optuna

said = []


class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


storage = optuna.storages.InMemoryStorage()
optuna.create_study(study_name="one", storage=storage, direction="minimize")
optuna.create_study(study_name="two", storage=storage, directions=["minimize", "minimize"])
optuna.logging.set_verbosity(optuna.logging.DEBUG)
optuna.logging.disable_default_handler()
logging.getLogger("optuna").addHandler(Listener())
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    one = optuna.create_study(study_name="one", storage=storage, direction="maximize", load_if_exists=True)
    two = optuna.create_study(study_name="two", storage=storage, direction="maximize", load_if_exists=True)
text = " ".join(said + [str(warning.message) for warning in warned])
for top1 in (90.0, 10.0, 70.0):
    one.tell(one.ask(), top1)

print("version: optuna", optuna.__version__)
print("expected: an error, or a warning that names the direction")
print("seen: said:", text)
print("seen: direction of the first:", one.direction.name, "- best top-1:", one.best_value)
print("seen: directions of the second:", [direction.name for direction in two.directions])
kept = one.direction.name == "MINIMIZE" and one.best_value == 10 and len(two.directions) == 2
if not kept or "direction" in text:
    raise SystemExit("changed: the new direction must be ignored without a word")
PY
venv/bin/python check.py
