"""What a sweep would do, before it does anything: trials, synthetic sets, resources, and an estimate of the time.

The estimate is measured, not guessed: one very small run of each model in a scratch folder, scaled by images and iterations (the cost
is linear in both, but for the noise that a set begins as), or the records that the sweep's folder already has.
"""

import os
import statistics
import tempfile
from dataclasses import dataclass, replace

from synq import pipeline
from synq.config.run import RunConfig, with_overrides
from synq.evaluation.measure import forget_teachers
from synq.runs.record import RunRecord
from synq.synthesis.dataset import MANIFEST_FILE
from synq.synthesis.run_sets import set_names, set_store
from synq.synthesis.start_noise import USUAL_EVALUATIONS, enough_probes

from ..leaderboard.records import load_records
from ..points import point_params
from ..search_config import LISTED
from ..space import base_values
from ..spec import Group, SweepSpec, run_config
from ..state.ledger import settled_budget
from ..state.plans import read_sweep_file
from ..storage.object_store import open_storage
from .cluster import Capacity, capacity, cluster
from .tuner import sets_needed

WARM_UP, CLOSER = (16, 2), (128, 16)
"""Images and steps of synthesis of the runs that are measured: the first, and a second one where the first was quick."""
WORTH_MORE_SECONDS = 8.0
WIDE_START_SECONDS = 25.0
"""About what it takes until the workers of a wide trial have started."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Estimated seconds, on one worker."""

    synthesis: float
    """Of the synthetic sets of one data seed."""
    trial: float
    """Of one whole trial."""
    source: str
    """Where the figures come from."""


def print_preview(spec: SweepSpec) -> None:
    """Print what `run_sweep` would do. Nothing is written to the sweep's folder.

    Raises:
        ValueError, OSError: What `run_sweep` would refuse at once.
    """
    notes = spec.output_dir / "sweep.json"
    spec = replace(spec, search=settled_budget(spec.search, read_sweep_file(notes)))
    search = spec.search
    place = spec.address or str(spec.output_dir)
    print(f"sweep {search.name} in {place}")
    there = not spec.address and any((spec.output_dir / "records").glob("*.json"))
    records = load_records([spec.output_dir]) if there else []
    room = _room(spec)
    print(f"{room.summary}; a trial takes {_resources(spec)}; at most {room.trials} at a time")
    if room.note:
        print(room.note)
    slots = min(room.trials, search.max_concurrent or room.trials)

    costs = {group.key: _cost(spec, group, records) for group in spec.groups}
    print("\ntrials")
    for group in spec.groups:
        first = _first(spec, group)
        print(
            f"  {group.key}: {search.trials} by {search.sampler} ({first}), {_early(spec, group)}, about {_clock(costs[group.key].trial)} each"
        )
    print(f"  space: {', '.join(dimension.name for dimension in spec.dimensions) or 'none'}")
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
        state = "there already" if not missing else f"to be made, about {_clock(seconds)} on one worker"
        images = f"{config.synthesis.num_images} + {config.evaluation.heldout_images} held-out images"
        print(
            f"  {group.model} data_seed {config.data_seed}: {images} x {config.synthesis.iterations} iterations, {state}"
        )

    left = max(0, len(spec.groups) * search.trials + reruns - len(records))
    trials = statistics.fmean(cost.trial for cost in costs.values()) * left / max(1, min(slots, left))
    path_overrides = min(len(sets_needed(spec)), slots * search.workers_per_trial)
    print(
        f"\nabout {_clock(sets / path_overrides + trials)} in all, were no trial stopped early ({', '.join(sorted({c.source for c in costs.values()}))})"
    )


def _room(spec: SweepSpec) -> Capacity:
    """Ask the cluster; without one, count this machine, so that no Ray is started."""
    if os.environ.get("RAY_ADDRESS"):
        with cluster(spec.search) as found:
            return found
    import torch

    here = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    return capacity(spec.search, [here])


def _is_sent(spec: SweepSpec, name: str) -> bool:
    """Whether the address has a synthetic set."""
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
    """What comes before any proposal, in words."""
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
    """Estimate from records of this very group where there are some, else from a small run alone."""
    config = run_config(spec, group, {})
    teacher, measure = pipeline.check(config)
    size, seconds = WARM_UP, _measured(config, WARM_UP)
    if sum(seconds.values()) < WORTH_MORE_SECONDS:  # mostly warming up: look again, more closely
        size, seconds = CLOSER, _measured(config, CLOSER)
    images, iterations = _size(config, size)
    centers = config.synthesis.center_iterations if config.synthesis.calib_centers else 0
    all_images = config.synthesis.num_images + config.evaluation.heldout_images
    passes = all_images * (config.synthesis.iterations + centers)
    if config.synthesis.fits_start:  # once for either set, whatever its size; the small run is spared it
        passes += 2 * USUAL_EVALUATIONS * min(enough_probes(teacher.input_size), config.synthesis.shard_size)
    synthesis = seconds["synthesis"] * passes / (2 * images * iterations)
    timed = [record for record in records if record.status == "completed" and record.name.startswith(f"{group.key}-t")]
    if timed:
        own = [sum(part for stage, part in record.seconds.items() if stage != "synthesis") for record in timed]
        return Cost(synthesis=synthesis, trial=statistics.fmean(own), source="trials as in this sweep's own records")
    epochs = config.finetune.epochs
    seen = config.synthesis.num_images // config.finetune.batch_size * config.finetune.batch_size * epochs
    heldout = config.evaluation.heldout_images / images
    share = max(heldout, len(measure.reported) / images)
    every_epoch = (
        seconds["measure"] / 6 * heldout * epochs
    )  # of three measurements, half on held-out, half on labeled images
    work = seconds["teacher"] + seconds["quantize"] + seconds["finetune"] * seen / images
    trial = (work + seconds["measure"] * share + every_epoch) / spec.search.workers_per_trial
    start = WIDE_START_SECONDS if spec.search.workers_per_trial > 1 else 0.0
    return Cost(synthesis=synthesis, trial=trial + start, source="measured on a small run")


def _size(config: RunConfig, most: tuple[int, int]) -> tuple[int, int]:
    """Images and iterations of a small run: whole batches, no more than the real run has."""
    batch = min(config.finetune.batch_size, most[0])
    return max(2, most[0] // batch * batch), most[1]


def _measured(config: RunConfig, most: tuple[int, int]) -> dict[str, float]:
    """Do a small run in a scratch folder; returns its seconds by stage."""
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
        forget_teachers()  # a run in a fresh worker counts the teacher's answers, too
        return pipeline.run(with_overrides(config, changes)).seconds


def _clock(seconds: float) -> str:
    """Return a time for a person: 45 s, 12 min, 3.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
