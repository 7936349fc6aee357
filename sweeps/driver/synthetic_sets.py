"""Make the synthetic sets of a sweep with Ray, each once, before its trials."""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ray
from safetensors import SafetensorError, safe_open

from synq.common.text_tables import duration
from synq.config.plugins import SYNTHESIS_METHOD, unversioned
from synq.config.run import RunConfig

from ..space import METHOD
from ..spec import Group, SweepSpec, run_config
from ..state.ledger import Ledger
from ..state.plans import set_recipe
from .progress import Progress

REPORT_SECONDS = 60.0
"""Seconds without a result after which a line reports that work continues."""


def remote_function(spec: SweepSpec, function: Callable[..., dict[str, Any]]) -> Any:
    """Return a function as a Ray remote function with the resources of one worker of a trial."""
    search = spec.search
    return ray.remote(num_cpus=search.cpus_per_worker, num_gpus=search.gpus_per_worker, max_retries=2)(function)


def replies(tasks: Iterable[Any], waited: Callable[[], None] = lambda: None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield (Ray task, result) as tasks finish; the first error cancels the rest and is raised.

    `waited` is called after each `REPORT_SECONDS` without a result.
    """
    waiting = list(tasks)
    while waiting:
        done, waiting = ray.wait(waiting, timeout=REPORT_SECONDS)
        if not done:
            waited()
            continue
        (ready,) = done
        reply = ray.get(ready)
        if "error" in reply:
            for other in waiting:
                ray.cancel(other, force=True)
            raise ValueError(reply["error"])
        yield ready, reply


def sets_needed(spec: SweepSpec) -> dict[str, tuple[Group, RunConfig]]:
    """Return the distinct (training, held-out) pairs of sets of the trials: recipe -> a group and run that use it."""
    needed: dict[str, tuple[Group, RunConfig]] = {}
    searched = [value for one in spec.dimensions if one.name == METHOD for value in one.values]
    methods: list[dict[str, Any]] = [{METHOD: value} for value in searched] or [{}]
    for group in spec.groups:
        base = group.base
        for seeds in dict.fromkeys([(base.seed, base.data_seed), *((seed, seed) for seed in spec.search.seeds)]):
            for method in methods:
                config = run_config(spec, group, method, seeds=seeds)
                needed.setdefault(set_recipe(config), (group, config))
    return needed


def make_all_sets(spec: SweepSpec, ledger: Ledger, progress: Progress) -> None:
    """Make every set that the trials need, each once, as many concurrently as fit the cluster."""
    from synq.synthesis.run_sets import set_store  # imports torch, which is slow

    from ..workers.trial import make_sets

    needed = sets_needed(spec)
    names = {
        recipe: f"synthetic set {group.model}{by_method(spec, config)} seed {config.data_seed}"
        for recipe, (group, config) in needed.items()
    }
    remote = remote_function(spec, make_sets)
    started = time.monotonic()
    for name in names.values():
        progress.running[name] = "being made"
    progress.log(f"synthetic sets that the trials need: {len(needed)}; those that are not there are made first")

    begun, made = time.time(), set[str]()
    stores = {set_store(config).root for _, config in needed.values()} if not spec.address else set()

    def waited() -> None:
        if progress.live is None:  # else the live table shows it
            ready = sum(name not in progress.running for name in names.values())
            counted = [one for recipe, one in needed.items() if names[recipe] in progress.running or recipe in made]
            images = sum(images_since(store, begun) for store in stores), num_images(counted)
            progress.log(waiting_line(ready, len(names), *images, time.monotonic() - started))

    def start(config: RunConfig) -> Any:
        return remote.remote(config, str(spec.output_dir), spec.address)

    for reply, recipe in _made(start, needed, waited, apart=spec.address != ""):
        progress.running.pop(names[recipe], None)
        ledger.sets[recipe] = reply["sets"]
        if reply["made"]:
            made.add(recipe)
        group, config = needed[recipe]
        model, seed = ledger.teachers[group.key]["name"], config.data_seed
        what = f"ready after {time.monotonic() - started:.0f} s" if reply["made"] else "there already"
        number, name = config.synthesis.num_images, f"{model}{by_method(spec, config)}"
        progress.log(f"synthetic set of {name}, seed {seed}: {number} images, {what}")
        for text in reply["warnings"]:
            progress.log(f"warning: {text}")


def waiting_line(ready: int, total: int, images: int, all_images: int, seconds: float) -> str:
    """Return the line that shows that sets are still being made, how far they are, and that nothing is wrong.

    Args:
        ready: Sets that are there.
        total: Sets that the trials need.
        images: Images that were made since the start, as far as they can be seen from here.
        all_images: Images that are to be made, about.
        seconds: Seconds since the start.
    """
    images = min(images, all_images)
    seen = f", {images} of about {all_images} images" if images else ""
    left = f", about {duration(seconds / images * (all_images - images))} left" if images else ""
    return (
        f"making synthetic images, which the trials wait for (this is normal; they are kept): {ready} of {total} sets"
        f"{seen}, after {seconds:.0f} s{left}"
    )


def num_images(needed: Iterable[tuple[Group, RunConfig]]) -> int:
    """Return the number of images of sets: those of training, and the held-out ones that all sets of a model share."""
    needed = list(needed)
    heldout = {group.model: config.evaluation.heldout_images for group, config in needed}
    return sum(config.synthesis.num_images for _, config in needed) + sum(heldout.values())


def images_since(store: Path, begun: float) -> int:
    """Return how many images in a folder of sets, those of unfinished sets too, were made since a time.

    Args:
        store: Folder of the sets; 0 where it is not there.
        begun: Seconds since 1970.
    """
    number = 0
    for path in [*store.glob("*.partial/shard-*.safetensors"), *store.glob("*/images.safetensors")]:
        try:
            if path.stat().st_mtime >= begun:
                with safe_open(path, framework="numpy") as file:
                    number += file.get_slice("labels").get_shape()[0]
        except (OSError, SafetensorError):  # the set was finished while its folder was read; damage is for its reader
            continue
    return number


def by_method(spec: SweepSpec, config: RunConfig) -> str:
    """Return the synthesis method of a run, for messages, where a sweep searches it; "" elsewhere."""
    searched = any(dimension.name == METHOD for dimension in spec.dimensions)
    return f" by {Path(unversioned(SYNTHESIS_METHOD, config.synthesis.method)).name}" if searched else ""


def _made(
    start: Callable[[RunConfig], Any],
    needed: dict[str, tuple[Group, RunConfig]],
    waited: Callable[[], None],
    *,
    apart: bool,
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (result of `make_sets`, recipe) as the sets are made.

    Args:
        start: Starts the Ray task that makes the sets of a run.
        needed: Runs by recipe.
        waited: Called after each `REPORT_SECONDS` without a result.
        apart: Whether machines share no folder, and so no lock: the held-out set, which all data seeds of a model
            share, is then made with the first of them, before the others start.
    """
    first: dict[str, str] = {}
    for recipe, (group, _) in needed.items():
        first.setdefault(group.model, recipe)
    rest = [recipe for recipe in needed if recipe not in first.values()]
    for recipes in [list(first.values()), rest] if apart else [list(needed)]:
        waiting = {start(needed[recipe][1]): recipe for recipe in recipes}
        for ready, reply in replies(waiting, waited):
            yield reply, waiting[ready]
