"""The Optuna search of one group of a sweep."""

import math
import random
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from synq.config.plugins import SAMPLER, is_added

from ..constraints import SEARCHED, Constraint
from ..search_config import LISTED
from ..space import Dimension, sample
from ..spec import SweepSpec
from .dashboard import study_name
from .own_sampler import SamplerInputs, check_proposal, own_sampler, proposal_error
from .samplers import REMEMBERING, check_installed, make_sampler
from .stopping import check_terminator

OBJECTIVE = "objective_value"
EPOCH = "epoch"
STATUS = "status"
"""Key in the last result of a trial that ended by itself: completed or failed. A stopped trial has no such result."""


class GroupSearch(OptunaSearch):
    """The Optuna search of one group.

    Unlike its parent, it reports a stopped trial to Optuna as PRUNED (not as COMPLETE with its early value) and one
    without a finite objective as FAIL (not RUNNING forever), and stores the sweep's name of each trial in Optuna.
    """

    def __init__(
        self,
        dimensions: tuple[Dimension, ...],
        *,
        minimize: bool,
        second_objective: str = "none",
        sampler: str,
        seed: str,
        num_startup: int,
        study_name: str,
        storage: BaseStorage | None = None,
        constraints: Sequence[Constraint] = (),
    ) -> None:
        """Start an empty search.

        Args:
            dimensions: The search space.
            minimize: Whether a lower objective is better.
            second_objective: Field of a trial's result that is also minimized; none for a single objective.
            sampler: The name of a sampler, or a function of the user; those of `LISTED` only take what is enqueued.
            seed: Seed of the random numbers of every proposal, as text.
            num_startup: Number of random trials before results are used; also the population size of nsga2.
            study_name: Name of the Optuna study.
            storage: Storage of the study; None keeps it in memory.
            constraints: Bounds on the results of trials. Those on `SEARCHED` are passed to Optuna, whose samplers tpe,
                gp and nsga2 avoid settings that violate them.

        Raises:
            ValueError: As `own_sampler`.
        """
        self.dimensions = dimensions
        self.sampler_name, self.seed_text, self.num_startup = sampler, seed, num_startup
        self.is_own = is_added(SAMPLER, sampler)
        self.draws_always = self.is_own or sampler in REMEMBERING
        self.reported: dict[str, set[int]] = {}
        self.num_completed = 0
        """Number of completed trials that were reported."""
        self.constraints = [one for one in constraints if one.name in SEARCHED]
        self.metrics = [OBJECTIVE, *([second_objective] if second_objective != "none" else [])]
        modes = ["min" if minimize else "max", "min"][: len(self.metrics)]
        self.directions = tuple("minimize" if mode == "min" else "maximize" for mode in modes)
        one = len(self.metrics) == 1
        super().__init__(
            partial(sample, dimensions),
            metric=self.metrics[0] if one else self.metrics,
            mode=modes[0] if one else modes,
            sampler=self._sampler_of(0),
            study_name=study_name,
            storage=storage,
        )

    @property
    def study(self) -> optuna.Study:
        """Return the Optuna study."""
        assert self._ot_study is not None
        return self._ot_study

    def propose(self, trial_id: str, number: int, *, blind: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (overrides, parameters) of the next trial.

        Args:
            trial_id: Ray Tune's id of the trial.
            number: Number of the proposal; it seeds the random numbers, so that a restarted driver does not repeat the
                first ones.
            blind: Whether to draw at random, because the sampler only proposes known settings.

        Raises:
            ValueError: The sampler is the user's, and fails or proposes settings outside the space.
        """
        self.study.sampler = self._sampler_of(number, blind=blind)
        suggestion = self._suggested(trial_id)
        params = dict(self._ot_trials[trial_id].params)
        if self.is_own:
            check_proposal(self.sampler_name, self.dimensions, params)
        return suggestion["overrides"], params

    def _suggested(self, trial_id: str, *, draw: bool = False) -> Any:
        try:
            with warnings.catch_warnings():
                # Of proposals that take more than a second, as with a Gaussian process.
                warnings.filterwarnings("ignore", "Define-by-run function", UserWarning)
                if self.sampler_name == "auto":  # its code passes options that are deprecated
                    warnings.simplefilter("ignore", FutureWarning)
                if draw:  # where all values are given, Optuna does not
                    self._ot_trials[trial_id].relative_params  # noqa: B018
                return self.suggest(trial_id)
        except Exception as error:  # a user's sampler may raise anything
            if not self.is_own:
                raise
            raise proposal_error(self.sampler_name, error) from error

    def accept(self, proposal: str, trial_id: str, trial: str) -> None:
        """Turn a proposal into a trial, named `trial_id` in Ray Tune and `trial` in the sweep."""
        self._ot_trials[trial_id] = self._ot_trials.pop(proposal)
        self._ot_trials[trial_id].set_user_attr("trial", trial)

    def attach(self, trial_id: str, params: dict[str, Any], trial: str) -> None:
        """Add a trial with given parameters to the study, as if it had just been proposed."""
        # NSGA-II, CMA-ES and perhaps a user's record the generation of each trial as they draw; others draw in vain.
        if not self.draws_always:
            self.study.sampler = optuna.samplers.RandomSampler(seed=0)
        self.study.enqueue_trial(params)
        self._ot_trials[trial_id] = self.study.ask()
        self._suggested(trial_id, draw=self.draws_always)
        self._ot_trials[trial_id].set_user_attr("trial", trial)

    def has(self, trial_id: str) -> bool:
        """Return whether a trial is in the study."""
        return trial_id in self._ot_trials

    def is_ended(self, trial_id: str) -> bool:
        """Return whether the end of a trial was reported."""
        return trial_id in self._completed_trials

    def hand_over(self, trial: str, trial_id: str) -> None:
        """Rename a running trial, which is then reported by another name."""
        self._ot_trials[trial_id] = self._ot_trials.pop(trial)
        self.reported[trial_id] = self.reported.pop(trial, set())

    def frozen(self, trial_id: str) -> optuna.trial.FrozenTrial:
        """Return the present state of a trial in the study."""
        return self.study.get_trials(deepcopy=False)[self._ot_trials[trial_id].number]

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report an intermediate objective to Optuna: once per epoch, finite values only."""
        epoch: Any = result.get(EPOCH)
        value: Any = result.get(OBJECTIVE)
        epochs = self.reported.setdefault(trial_id, set())
        if (
            STATUS in result
            or epoch is None
            or not is_finite(value)
            or int(epoch) in epochs
            or trial_id in self._completed_trials
            or len(self.metrics) > 1  # Optuna accepts no intermediate values with two objectives
        ):
            return
        epochs.add(int(epoch))
        self._ot_trials[trial_id].report(float(value), int(epoch))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Report the end of a trial to Optuna."""
        if trial_id in self._completed_trials or trial_id not in self._ot_trials:
            return
        result = result or {}
        values = [result.get(metric) for metric in self.metrics]
        status = "failed" if error or not result else result.get(STATUS, "pruned")
        if status == "completed" and all(map(is_finite, values)):
            for one in self.constraints:  # of every completed trial, as GPSampler needs them
                self._ot_trials[trial_id].set_constraint(one.name, one.excess(result.get(one.name)))
            self.study.tell(self._ot_trials[trial_id], [float(value) for value in values if value is not None])
            self.num_completed += 1
        elif status == "pruned":
            self.on_trial_result(trial_id, result)
            self.study.tell(self._ot_trials[trial_id], state=TrialState.PRUNED)
        else:
            self.study.tell(self._ot_trials[trial_id], state=TrialState.FAIL)
        self._completed_trials.add(trial_id)

    def _sampler_of(self, number: int, *, blind: bool = False) -> optuna.samplers.BaseSampler:
        seed = random.Random(f"{self.seed_text}/{number}").getrandbits(31)
        if blind or self.sampler_name in ("random", *LISTED):  # listed proposals are enqueued, nothing is drawn
            return optuna.samplers.RandomSampler(seed=seed)
        if self.is_own:
            inputs = SamplerInputs(
                seed=seed, num_startup=self.num_startup, dimensions=self.dimensions, directions=self.directions
            )
            return own_sampler(self.sampler_name, inputs)
        return make_sampler(self.sampler_name, self.dimensions, seed=seed, num_startup=self.num_startup)


def check_sampler(spec: SweepSpec) -> None:
    """Check that Optuna supports what a sweep asks for, before anything is computed.

    The sampler of a user proposes settings in a scratch study.

    Raises:
        ValueError: As `own_sampler` and `GroupSearch.propose`, or Optuna is too old for constraints.
    """
    search = spec.search
    check_terminator(search)
    check_installed(search.sampler, spec.dimensions)
    if spec.constraints and not hasattr(optuna.trial.Trial, "set_constraint"):
        raise ValueError(
            f"`constraints` must come with Optuna 5.0 or newer, but got {optuna.__version__}: pip install -U optuna"
        )
    if search.has_own_sampler:
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # a new study is no news for the user
        scratch = GroupSearch(
            spec.dimensions,
            minimize=search.minimize,
            second_objective=search.second_objective,
            sampler=search.sampler,
            seed="check",
            num_startup=num_startup(spec),
            study_name="check",
        )
        scratch.propose("check", 0)


def group_searches(spec: SweepSpec, storage: BaseStorage | None = None) -> dict[str, GroupSearch]:
    """Return an empty search for each group of a sweep, by its key.

    Args:
        spec: The sweep.
        storage: Storage of the studies; None keeps them in memory.

    Raises:
        ValueError: As `own_sampler`.
    """
    return {
        group.key: GroupSearch(
            spec.dimensions,
            minimize=spec.search.minimize,
            second_objective=spec.search.second_objective,
            sampler=spec.search.sampler,
            seed=f"{spec.search.sampler_seed}/{group.key}",
            num_startup=num_startup(spec),
            study_name=study_name(spec, group),
            storage=storage,
            constraints=spec.constraints,
        )
        for group in spec.groups
    }


def num_startup(spec: SweepSpec) -> int:
    """Return the number of random trials of a group before its sampler uses results."""
    return min(10, max(2, spec.search.trials // 3))


def is_finite(value: Any) -> bool:
    """Return whether a reported value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
