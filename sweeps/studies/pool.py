"""Parallel runs in processes of one machine, without Ray."""

import os
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from multiprocessing import get_context
from typing import TypeVar

from synq.common.progress import passing_bar
from synq.config.run import RunConfig
from synq.runs.record import RunRecord

Cell = TypeVar("Cell", bound=Hashable)
Task = TypeVar("Task")
Result = TypeVar("Result")


def run_all(
    runs: Mapping[Cell, RunConfig], jobs: int, on_done: Callable[[Cell, RunRecord], None]
) -> dict[Cell, RunRecord]:
    """Execute all runs: sequentially in this process, or in `jobs` processes at a time; completed runs are only read.

    Parallel processes share the cores evenly, unless the runs set their threads. A terminal shows how many runs are
    done and, if they are sequential, the progress of the current one.

    Args:
        runs: The runs by key.
        jobs: Number of parallel runs.
        on_done: Called in this process with each run as it ends.

    Returns:
        The records by the same keys, in the order in which the runs ended.

    Raises:
        ValueError: `jobs` is below 1.
        Exception: The first error of a run, after the current runs have ended.
    """
    if jobs < 1:
        raise ValueError(f"`jobs` must be >= 1, but got {jobs}")
    is_shown = all(run.runtime.progress for run in runs.values())
    done: dict[Cell, RunRecord] = {}
    with (
        passing_bar(len(runs), "runs", "run", is_shown=is_shown) as bar,
        # Closed by an error, too, which cancels the other runs at once.
        closing(_parallel(runs, jobs) if jobs > 1 else _sequential(runs)) as finished,
    ):
        for cell, record in finished:
            done[cell] = record
            bar.clear()  # `on_done` prints; the bar is drawn again below
            on_done(cell, record)
            bar.update()
    return done


def _sequential(runs: Mapping[Cell, RunConfig]) -> Generator[tuple[Cell, RunRecord], None, None]:
    from synq.pipeline import run  # imports torch, which is slow

    for cell, config in runs.items():
        yield cell, run(config)


def _parallel(runs: Mapping[Cell, RunConfig], jobs: int) -> Generator[tuple[Cell, RunRecord], None, None]:
    threads = threads_each(jobs)
    shared = {
        cell: replace(run, runtime=replace(run.runtime, progress=False, num_threads=run.runtime.num_threads or threads))
        for cell, run in runs.items()
    }
    return in_processes(_run_one, shared, jobs)


def threads_each(jobs: int) -> int:
    """Return the number of threads of each of `jobs` processes that share this machine's cores."""
    return max(1, (os.cpu_count() or 1) // jobs)


def in_processes(
    work: Callable[[Task], Result], tasks: Mapping[Cell, Task], jobs: int
) -> Generator[tuple[Cell, Result], None, None]:
    """Yield (key, `work(task)`) of every task as it completes, `jobs` at a time in new processes.

    Closing the generator, also by an error, cancels the tasks that have not started.
    """
    # Spawned interpreters: a forked torch may hang on the locks of threads that no longer exist.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(work, task): cell for cell, task in tasks.items()}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def surviving_crashes(
    work: Callable[[Task], Result], tasks: Mapping[Cell, Task], jobs: int, crashed: Callable[[Task], Result]
) -> Iterator[tuple[Cell, Result]]:
    """Yield (key, `work(task)`) of every task as it completes, also if the process of a task dies.

    Args:
        work: Computes the result of a task.
        tasks: The tasks by key.
        jobs: Number of parallel tasks, in new processes; 1 computes them in this process.
        crashed: Returns the result of a task whose process died.
    """
    if jobs == 1:
        yield from ((cell, work(task)) for cell, task in tasks.items())
        return
    waiting = dict(tasks)
    while waiting:
        try:
            for cell, result in in_processes(work, dict(waiting), jobs):
                del waiting[cell]
                yield cell, result
        except BrokenProcessPool:  # by one of the running tasks: each of them is repeated in a separate process
            for cell in list(waiting)[:jobs]:
                yield cell, _in_one_process(work, waiting.pop(cell), crashed)


def _in_one_process(work: Callable[[Task], Result], task: Task, crashed: Callable[[Task], Result]) -> Result:
    try:
        ((_, result),) = in_processes(work, {0: task}, 1)
    except BrokenProcessPool:
        return crashed(task)
    return result


def _run_one(config: RunConfig) -> RunRecord:
    os.environ["OMP_NUM_THREADS"] = str(config.runtime.num_threads)
    from synq.pipeline import run

    return run(config)
