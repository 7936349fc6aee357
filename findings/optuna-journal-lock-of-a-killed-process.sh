#!/usr/bin/env bash
# Package:  optuna 5.0.0
# Expected: a process that is killed while it writes to a JournalStorage leaves nothing that the next one has to wait
#           for, or the wait is an option of seconds that begins when the lock was made.
# Happens:  the lock file that the dead process leaves (a symbolic link beside the journal) blocks the first write of
#           the next process for 30 seconds, counted from that process's first look, however old the link is
#           (here: a day). It then takes the lock over and works.
# Matters:  a sweep that restarts after a preemption, or a test that kills its driver, seems to hang for half a minute
#           at each start. Remove the journal's .lock before opening it when no other driver can be alive.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    optuna==5.0.0

cat > check.py <<'PY'
import os
import time
import warnings

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.simplefilter("ignore")


def first_write():
    """Return the seconds that opening the study and asking for one trial takes."""
    start = time.monotonic()
    study = optuna.load_study(storage=JournalStorage(JournalFileBackend("study.journal")), study_name="sweep")
    study.ask()
    return time.monotonic() - start


optuna.create_study(storage=JournalStorage(JournalFileBackend("study.journal")), study_name="sweep")
free = first_write()
os.symlink("study.journal", "study.journal.lock")  # what a process leaves that is killed while it holds the lock
day = time.time() - 86400
os.utime("study.journal.lock", (day, day), follow_symlinks=False)
left_over = first_write()

print("version: optuna", optuna.__version__)
print("expected: both first writes take well under a second")
print(f"seen: {free:.1f} s without the left-over lock, {left_over:.1f} s with one that is a day old")
if not (free < 10 and 25 < left_over < 60):
    raise SystemExit("changed: the left-over lock must cost about 30 seconds")
PY
venv/bin/python check.py
