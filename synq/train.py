"""One run, any number of processes: `accelerate launch synq/train.py [--config FILE] [--finetune.lr 1e-4 ...]`.

Defines no class: this file runs as `__main__` and would give a class two identities.
"""

import os
import sys

if sys.path and os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__)):
    # Started by file path: make `synq` importable.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from synq.common.exit_codes import INTERRUPTED, RUN_FAILED, USER_ERROR, leave, report_error
from synq.config.budget import planned_keys
from synq.config.command_line import Command, GivenSettings
from synq.config.command_options import budget_options, config_option
from synq.config.finetune import SWITCHED_OFF
from synq.config.parsing import load_config
from synq.config.run import RunConfig, make_absolute

if TYPE_CHECKING:
    from accelerate import Accelerator

PROGRAM = "accelerate launch synq/train.py"
TEACHER_SETTINGS = ("teacher.spec", "teacher.weights", "teacher.input_size", "teacher.mean", "teacher.std")
COMMON = (
    *TEACHER_SETTINGS,
    *("quant.weight_bits", "quant.act_bits", "quant.target"),
    *("finetune.epochs", "finetune.lr", *(f"finetune.{key}" for key, _ in SWITCHED_OFF.values())),
    *("evaluation.dataset", "runtime.output_dir", "seed"),
)
EXAMPLES = """\
  %(prog)s                                   the classifier that ships with SynQ, W4A4, about a minute
  %(prog)s torchvision:resnet18 --teacher.weights IMAGENET1K_V1 --quant.weight_bits 3
  %(prog)s FILE.py:FUNCTION --teacher.weights W.pth --teacher.input_size 3 32 32 --teacher.mean 0.5 --teacher.std 0.5
  %(prog)s --config run.toml --finetune.lr 1e-3 --seed 1"""


@click.command("train", cls=Command, settings="run", common=COMMON, examples=EXAMPLES, resumes=True)
@config_option
@budget_options
def command(config: RunConfig, quality: str | None, max_minutes: float | None) -> int:
    """Quantize a classifier without any data: synthesize images, train a low-bit student on them, and evaluate it.

    Settings come from --config FILE (TOML or JSON, with the keys below) and are overridden on the command line; TEACHER
    is --teacher.spec. The same command started again resumes a run that was stopped, and returns at once if the run is
    finished. How many images and steps it takes is chosen by --quality, unless the settings do.
    """
    given: GivenSettings = click.get_current_context().obj
    chosen = planned_keys(given.overrides, *map(load_config, given.files))

    def work(accelerator: "Accelerator") -> tuple[list[str], list[str]]:
        from synq.budget import budgeted

        return _run(*budgeted(config, quality, max_minutes, chosen, accelerator=accelerator), accelerator)

    return on_every_process(config, work)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `synq train` and return the exit code: 0 done, 1 run failed, 2 input rejected, 130 interrupted."""
    return command.run(argv, PROGRAM)


def _run(config: RunConfig, budget: dict[str, Any], accelerator: "Accelerator") -> tuple[list[str], list[str]]:
    from synq.common.notices import print_notice, was_printed
    from synq.export.targets.formats import missing_note
    from synq.pipeline import run
    from synq.runs.expected_agreement import closing_notes
    from synq.runs.record import run_folder, summary_line

    file = run_folder(make_absolute(config)) / "record.json"
    before = file.stat().st_mtime_ns if file.exists() else None
    if missing := missing_note(config.quant.target):
        print_notice(missing)
    record = run(config, accelerator=accelerator, budget=budget)
    done = "finished before, nothing to do: " if before == file.stat().st_mtime_ns else ""
    notes = [*(note for note in closing_notes(record) if not was_printed(note)), f"{done}{file.parent}"]
    return [summary_line(record)], notes


def on_every_process(config: RunConfig, work: Callable[["Accelerator"], tuple[list[str], list[str]]]) -> int:
    """Run a function on every process of a distributed run; only the main process prints.

    Args:
        config: The settings of the run.
        work: Takes the accelerator; returns the lines of the result, for standard output, and notes, for standard
            error.

    Returns:
        The exit code.
    """
    import torch

    from synq.finetune.loop import NonFiniteLossError
    from synq.runtime import make_accelerator

    rank = int(os.environ.get("RANK", "0"))
    try:
        accelerator = make_accelerator(config.runtime)
        lines, notes = work(accelerator)
        accelerator.end_training()
    except (ValueError, OSError, NonFiniteLossError, torch.OutOfMemoryError) as error:
        # The launcher stops the other processes soon after one has failed. Waiting lets the main process report the
        # error first; an error of this process alone is still reported.
        if rank != 0:
            time.sleep(5)
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        report_error(
            RuntimeError(f"GPU memory is full: lower finetune.batch_size or synthesis.shard_size. {error}")
            if out_of_memory
            else error
        )
        return RUN_FAILED if isinstance(error, RuntimeError) else USER_ERROR
    except KeyboardInterrupt:
        if rank == 0:
            print("synq: interrupted; the same command resumes", file=sys.stderr, flush=True)
        return INTERRUPTED
    if rank == 0:
        for note in notes:
            print(f"synq: {note}", file=sys.stderr)
        print(*lines, sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    leave(main())
