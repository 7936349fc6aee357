#!/usr/bin/env bash
# Package:  optuna 5.0.0
# Expected: trials whose values were given by enqueue_trial take part in NSGA-II: good ones become parents.
# Happens:  a trial with all values given gets no generation, is in no population and never a parent. With as many good
#           trials enqueued as the population has, the search begins anew at random, and its later populations are a
#           hundred times worse. Nothing warns. A trial of which one value is not given does take part.
# Matters:  a search that goes on from earlier results, by enqueue_trial or by add_trial with fixed values of an
#           ask-and-tell driver, keeps nothing of what it knew; a resumed search is a new one.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check optuna==5.0.0

cat > check.py <<'PY'
import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)
SIZE, GENERATION = 10, "NSGAIISampler:generation"


def searched(given):
    """Return generations of the enqueued trials and the means of three populations."""
    sampler = optuna.samplers.NSGAIISampler(population_size=SIZE, seed=0)
    study = optuna.create_study(sampler=sampler)
    for number in range(SIZE):
        study.enqueue_trial({name: 0.001 * number for name in given})
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1) + trial.suggest_float("y", 0, 1), n_trials=3 * SIZE)
    parts = [study.trials[start : start + SIZE] for start in range(0, 3 * SIZE, SIZE)]
    generations = {trial.system_attrs.get(GENERATION) for trial in parts[0]}
    return generations, [round(sum(trial.value for trial in part) / SIZE, 3) for part in parts]


whole, means = searched(("x", "y"))
part, _ = searched(("x",))
print("version: optuna", optuna.__version__)
print("expected: the enqueued trials are generation 0, and later means are close to theirs")
print(f"seen: generation of the enqueued trials {whole}, means of ten trials each {means}")
print(f"seen: generation where only one of two values was given {part}")
if not (whole == {None} and part == {0} and min(means[1:]) > 50 * means[0]):
    raise SystemExit(f"changed: {whole} {part} {means}")
PY
venv/bin/python check.py
