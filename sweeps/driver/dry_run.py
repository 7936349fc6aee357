"""Dry run of a sweep: its trials, synthetic sets and resources, and an estimate of its time.

The estimate is from measurements: one very small run of each model in a scratch folder, scaled by images and iterations
(the cost is linear in both, except for the fit of the initial noise), or records that the sweep's folder already has.
"""

import os
import statistics
import tempfile
from dataclasses import dataclass, replace

from synq import pipeline
from synq.common.text_tables import duration, plural
from synq.config.plugins import SAMPLER, unversioned
from synq.config.run import RunConfig, with_overrides
from synq.evaluation.measure import forget_teachers
from synq.finetune.schedule import num_steps
from synq.runs.record import RunRecord
from synq.synthesis.dataset import MANIFEST_FILE
from synq.synthesis.run_sets import set_names, set_store
from synq.synthesis.start_noise import USUAL_EVALUATIONS, enough_probes

from ..constraints import constraints_text
from ..leaderboard.records import load_records
from ..points import point_params
from ..search_config import LISTED
from ..space import Dimension, base_values
from ..spec import Group, SweepSpec, run_config
from ..state.identity import settled_budget
from ..state.plans import read_sweep_file
from ..storage.object_store import open_storage
from .cluster import Capacity, capacity, cluster, this_machine
from .group_search import check_sampler
from .synthetic_sets import by_method, sets_needed

WARM_UP, CLOSER = (16, 2), (128, 16)
"""(images, synthesis iterations) of the small runs: the first only warms up, the second is measured if it was quick."""
QUICK_SECONDS = 8.0
"""Seconds of the first run below which a larger one is measured; from there on it is repeated."""
SLOW_SECONDS = 90.0
"""Seconds of the first run from which it is not repeated: warm-up is then a small part of it."""
WIDE_START_SECONDS = 25.0
"""Approximate seconds until the workers of a trial with several workers have started."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Estimated cost on one worker, in seconds."""

    synthesis: float
    """Seconds of the synthetic sets of one data seed."""
    trial: float
    """Seconds of one whole trial."""
    source: str
    """Source of the estimate, as text."""


def print_preview(spec: SweepSpec) -> None:
    """Print the trials, sets, resources and time of a sweep. Nothing is written to the sweep's folder.

    Raises:
        ValueError: As `run_sweep`.
        OSError: As `run_sweep`.
    """
    check_sampler(spec)
    notes = spec.output_dir / "sweep.json"
    spec = replace(spec, search=settled_budget(spec.search, read_sweep_file(notes)))
    search = spec.search
    print(f"sweep {search.name} in {spec.address or spec.output_dir}")
    has_records = not spec.address and any((spec.output_dir / "records").glob("*.json"))
    records = load_records([spec.output_dir]) if has_records else []
    available = _capacity(spec)
    slots = available.concurrent(search)
    print(f"{available.summary}; a trial takes {_resources(spec)}; at most {plural(slots, 'trial')} at a time")
    if available.note:
        print(available.note)

    costs = {group.key: _cost(spec, group, records) for group in spec.groups}
    print("\ntrials")
    for group in spec.groups:
        first = _first(spec, group)
        print(
            f"  {group.key}: {search.trials} by {unversioned(SAMPLER, search.sampler)} ({first}), "
            f"{_early(spec, group)}, about {duration(costs[group.key].trial)} each"
        )
    print(f"  space: {', '.join(map(_dimension, spec.dimensions)) or 'none'}")
    if spec.constraints:
        print(f"  constraints: {constraints_text(spec.constraints)}")
    if search.stop_when != "budget":
        print(f"  each search may end earlier: stop_when {search.stop_when}")
    reruns = _reruns(spec)
    if reruns:
        print(
            f"  then the best {search.final_top_k} of each on seeds {', '.join(map(str, search.seeds))}: {reruns} more"
        )
    if records:
        print(f"  {len(records)} are there already")

    print("\nsynthetic sets")
    sets = 0.0
    for group, config in sets_needed(spec).values():
        names = set_names(config)
        store = set_store(config)
        missing = [name for name in names if not store.is_complete(name) and not _is_sent(spec, name)]
        seconds = costs[group.key].synthesis * len(missing) / len(names)
        sets += seconds
        state = "there already" if not missing else f"to be made, about {duration(seconds)} on one worker"
        images = f"{config.synthesis.num_images} + {config.evaluation.heldout_images} held-out images"
        work = f"{images} x {config.synthesis.iterations} iterations"
        print(f"  {group.model}{by_method(spec, config)} data_seed {config.data_seed}: {work}, {state}")

    left = max(0, len(spec.groups) * search.trials + reruns - len(records))
    trials = statistics.fmean(cost.trial for cost in costs.values()) * left / max(1, min(slots, left))
    concurrent_sets = min(len(sets_needed(spec)), slots * search.workers_per_trial)
    sources = ", ".join(sorted({cost.source for cost in costs.values()}))
    print(f"\nabout {duration(sets / concurrent_sets + trials)} in all, if no trial is stopped early ({sources})")


def _dimension(dimension: Dimension) -> str:
    conditions = " and ".join(map(str, dimension.when))
    return f"{dimension.name} (where {conditions})" if conditions else dimension.name


def _capacity(spec: SweepSpec) -> Capacity:
    """Return the capacity of the cluster, or, without one, of this machine, without starting Ray."""
    if os.environ.get("RAY_ADDRESS"):
        with cluster(spec.search) as found:
            return found
    return capacity(spec.search, [this_machine()])


def _is_sent(spec: SweepSpec, name: str) -> bool:
    """Return whether the sweep's address has a synthetic set."""
    return bool(spec.address) and open_storage(spec.address).exists(f"store/{name}/{MANIFEST_FILE}")


def _resources(spec: SweepSpec) -> str:
    search = spec.search
    each = f"{search.cpus_per_worker:g} CPUs, {search.gpus_per_worker:g} GPUs"
    return each if search.workers_per_trial == 1 else f"{search.workers_per_trial} workers of {each}"


def _early(spec: SweepSpec, group: Group) -> str:
    epochs = group.base.finetune.epochs
    if spec.search.scheduler == "none" or epochs <= 1:
        return f"{epochs} epochs, none stopped early"
    return f"{epochs} epochs, weak ones stopped from epoch {min(spec.search.grace_epochs, epochs)} on"


def _first(spec: SweepSpec, group: Group) -> str:
    """Return, as text, the points that come before any proposal of the sampler."""
    if spec.search.sampler in LISTED:
        return "in order"
    points = [f"{len(spec.points)} listed points"] if spec.points else []
    if point_params(spec.dimensions, base_values(spec.dimensions, group.base)) is not None:
        points.append("the base settings")
    points += [f"up to {spec.search.warm_start_top_k} of earlier sweeps"] if spec.search.warm_start else []
    return f"first {', '.join(points)}" if points else "none given"


def _reruns(spec: SweepSpec) -> int:
    searches = len(spec.groups) * spec.num_bit_choices
    base = spec.groups[0].base
    further = sum((seed, seed) != (base.seed, base.data_seed) for seed in spec.search.seeds)
    return searches * spec.search.final_top_k * further


def _cost(spec: SweepSpec, group: Group, records: list[RunRecord]) -> Cost:
    """Return the cost estimated from records of the group, if there are any, else from a small run."""
    config = run_config(spec, group, {})
    teacher, measure = pipeline.check(config)
    size, seconds = WARM_UP, _measured(config, WARM_UP)
    # A first run also loads libraries, starts threads and compiles kernels: some seconds, which every real run does
    # once and which must not be scaled by its images.
    if sum(seconds.values()) < SLOW_SECONDS:
        size = CLOSER if sum(seconds.values()) < QUICK_SECONDS else WARM_UP
        seconds = _measured(config, size)
    images, iterations = _size(config, size)
    centers = config.synthesis.center_iterations if config.synthesis.calib_centers else 0
    all_images = config.synthesis.num_images + config.evaluation.heldout_images
    passes = all_images * (config.synthesis.iterations + centers)
    if config.synthesis.fits_start:  # once per set, whatever its size; the small run does not do it
        passes += 2 * USUAL_EVALUATIONS * min(enough_probes(teacher.input_size), config.synthesis.shard_size)
    synthesis = seconds["synthesis"] * passes / (2 * images * iterations)
    timed = [record for record in records if record.status == "completed" and record.name.startswith(f"{group.key}-t")]
    if timed:
        totals = [sum(part for stage, part in record.seconds.items() if stage != "synthesis") for record in timed]
        return Cost(synthesis=synthesis, trial=statistics.fmean(totals), source="trials as in this sweep's records")
    epochs = config.finetune.epochs
    batch = config.finetune.batch_size
    trained = num_steps(config.synthesis.num_images, batch) * batch * epochs
    heldout = config.evaluation.heldout_images / images
    share = max(heldout, len(measure.reported) / images)
    # The small run has three measurements, half of each on held-out and half on labeled images.
    every_epoch = seconds["measure"] / 6 * heldout * epochs
    work = seconds["teacher"] + seconds["quantize"] + seconds["finetune"] * trained / images
    trial = (work + seconds["measure"] * share + every_epoch) / spec.search.workers_per_trial
    start = WIDE_START_SECONDS if spec.search.workers_per_trial > 1 else 0.0
    return Cost(synthesis=synthesis, trial=trial + start, source="measured on a small run")


def _size(config: RunConfig, most: tuple[int, int]) -> tuple[int, int]:
    """Return images and iterations of a small run: whole batches of at most the size of the real run's."""
    batch = min(config.finetune.batch_size, most[0])
    return max(2, most[0] // batch * batch), most[1]


def _measured(config: RunConfig, most: tuple[int, int]) -> dict[str, float]:
    """Do a small run in a scratch folder and return its seconds by stage."""
    images, iterations = _size(config, most)
    with tempfile.TemporaryDirectory(prefix="synq-preview-") as scratch:
        changes = {
            "synthesis.num_images": images,
            "synthesis.shard_size": max(2, min(config.synthesis.shard_size, images)),
            "synthesis.iterations": iterations,
            "synthesis.center_iterations": iterations,
            "synthesis.start": "white",
            "finetune.epochs": 1,
            "finetune.batch_size": min(config.finetune.batch_size, images),
            "finetune.warmup_epochs": 0.0,
            "evaluation.heldout_images": images,
            "evaluation.num_images": images,
            "evaluation.objective": "synthetic",
            "runtime.output_dir": scratch,
            "runtime.store_dir": f"{scratch}/store",
        }
        forget_teachers()  # a run in a new worker computes the teacher's logits, too
        return pipeline.run(with_overrides(config, changes)).seconds
