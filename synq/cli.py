"""The console command `synq`: a list of doors. Code of `sweeps/` and `launch/` is loaded only by the door that needs it."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from synq import __version__
from synq.config.parsing import nearest
from synq.train import USER_ERROR, leave, report_error
from synq.train import main as train

HELP = f"""usage: synq COMMAND ...

SynQ {__version__}: quantizes a pre-trained image classifier without any data.

  synq inspect [TEACHER] [--json] [--KEY VALUE ...]   what would be done with a classifier, layer by layer (--help)
  synq rehearse [TEACHER] [--KEY VALUE ...]           everything once in miniature: does it work on this classifier? (--help)
  synq widths [TEACHER] [--activations] [...]         bits of single tensors under a size and BitOps budget, without data (--help)
  synq train [TEACHER] [--config FILE] [...]          one run; `synq train --help` explains every key
  synq synthesize [TEACHER] [--config FILE] [...]     only make the synthetic images of that run
  synq sweep [SPEC] [...]                             many runs and a ranked table; `synq sweep --help`
  synq recipe SPEC [...]                              chosen settings on several seeds, beside their baselines (--help)
  synq export RUN [--out DIR] [...]                   ONNX, packed weights and torch.export of a finished run, verified (--help)
  synq leaderboard PATH...                            tables from records: merge, filter, compare (--help)
  synq show PATH...                                   the essentials of runs and sweeps, in the terminal
  synq report PATH...                                 one page of a run, a sweep, or several side by side, and its drawings (--help)
  synq check-cluster [--output-dir DIR]               what a sweep will need of a cluster: what works, what does not
  synq bench [--only GROUP ...]                       the speed of this machine and of SynQ on it (--help)

Several processes or GPUs: accelerate launch synq/train.py takes the words of `synq train`."""


def _elsewhere(module: str, words: Sequence[str]) -> int:
    """Call `main(words)` of a module that knows more than this package, and return its exit code."""
    return int(importlib.import_module(module).main(list(words)) or 0)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "inspect": partial(_elsewhere, "synq.commands.inspect_model"),
    "rehearse": partial(_elsewhere, "synq.commands.smoke_run"),
    "widths": partial(_elsewhere, "synq.commands.mixed_precision"),
    "train": partial(train, program="synq train"),
    "synthesize": partial(train, program="synq synthesize", only_images=True),
    "sweep": partial(_elsewhere, "launch.sweep"),
    "recipe": partial(_elsewhere, "synq.commands.recipe"),
    "export": partial(_elsewhere, "synq.commands.export"),
    "leaderboard": partial(_elsewhere, "synq.sweeps.leaderboard.records"),
    "show": partial(_elsewhere, "synq.commands.show"),
    "report": partial(_elsewhere, "synq.commands.report"),
    "check-cluster": partial(_elsewhere, "synq.commands.check_cluster"),
    "bench": partial(_elsewhere, "synq.commands.bench"),
}


def run(argv: Sequence[str]) -> int:
    """Do what the words say and return the exit code: 0 done, 2 the words were refused."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if argv[0] == "--version":
        print(f"synq {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        names = ", ".join(COMMANDS)
        report_error(ValueError(f"`COMMAND` must be one of {names}, but got {argv[0]!r}{nearest(argv[0], COMMANDS)}"))
        return USER_ERROR
    return COMMANDS[argv[0]](argv[1:])


def main() -> None:
    """Entry point of the console script."""
    try:
        code = run(sys.argv[1:])
    except BrokenPipeError:  # who read what was printed, as `head` does, has read enough
        code = 0
    if "ray" in sys.modules:  # its threads may hold the process after the work is done
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    leave(code)


if __name__ == "__main__":
    main()
