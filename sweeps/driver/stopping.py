"""The end of a search before its budget is spent, `stop_when`: decided by the evaluators of Optuna's terminator.

`optuna.terminator.Terminator` itself knows no constraints and takes its threshold from cross-validation, which there is
none of here; its evaluators are called on the trials that satisfy the constraints.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.search_space import intersection_search_space
from optuna.trial import FrozenTrial, TrialState

from ..search_config import SearchConfig
from ..state.ledger import Ledger

LEAST_TRIALS = 20
"""Fewest completed trials from which a bound on the gain is computed; Optuna's default."""


def check_terminator(search: SearchConfig) -> None:
    """Check that this Optuna has what `stop_when` needs.

    Raises:
        ValueError: It has not.
    """
    if search.stop_when != "budget":
        try:
            import optuna.terminator  # deprecated since Optuna 4.9, to be removed in 6.0
        except ImportError:
            raise ValueError(
                f"`stop_when` must be budget with Optuna {optuna.__version__}, which has no optuna.terminator, but got "
                f"{search.stop_when}: pip install 'optuna<6'"
            ) from None


def why_stop(study: optuna.Study, search: SearchConfig) -> str:
    """Return why the search of a group should propose no more trials; "" if it should go on.

    The decision depends on the trials only, so a resumed sweep decides as one that was not stopped.

    Args:
        study: The study of the group.
        search: `stop_when`, `min_gain` and `patience` of the sweep.
    """
    if search.stop_when == "budget":
        return ""
    trials = [trial for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if is_feasible(trial)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental, and deprecated since 4.9
        return (_no_gain if search.stop_when == "no_gain" else _stagnation)(trials, study.direction, search)


def is_feasible(trial: FrozenTrial) -> bool:
    """Return whether a trial satisfies its constraints."""
    return all(value <= 0 for value in getattr(trial, "constraints", {}).values())


def _no_gain(trials: Sequence[FrozenTrial], direction: Any, search: SearchConfig) -> str:
    from optuna.terminator import RegretBoundEvaluator

    if len(trials) < LEAST_TRIALS or not intersection_search_space(list(trials)):
        return ""
    bound = float(RegretBoundEvaluator(seed=len(trials)).evaluate(list(trials), direction))
    values = [trial.value for trial in trials if trial.value is not None]
    best = min(values) if search.minimize else max(values)
    if not bound < search.min_gain * abs(best):
        return ""
    return (
        f"nothing left to gain: at most {bound:.3g} by the bound on the regret, which is below {search.min_gain:g} "
        f"of the best objective, {best:.4g}"
    )


def _stagnation(trials: Sequence[FrozenTrial], direction: Any, search: SearchConfig) -> str:
    from optuna.terminator import BestValueStagnationEvaluator

    if not trials:
        return ""
    left = BestValueStagnationEvaluator(search.patience).evaluate(list(trials), direction)
    return "" if left > 0 else f"no better trial among the last {search.patience} completed ones"


def is_stopped(key: str, ledger: Ledger, study: optuna.Study, num_completed: int, checked: dict[str, int]) -> bool:
    """Return whether `stop_when` has ended the search of a group; a decision is kept in the ledger.

    Args:
        key: Key of the group.
        ledger: Trials of the sweep.
        study: The study of the group.
        num_completed: Number of its completed trials.
        checked: By group, that number at the last check; updated.
    """
    if key not in ledger.stopped and checked.get(key) != num_completed:
        checked[key] = num_completed
        if reason := why_stop(study, ledger.spec.search):
            ledger.stop_group(key, reason)
    return key in ledger.stopped
