"""Console command `synq`; the module of a command is imported when the command is called."""

import sys
from collections.abc import Sequence

from synq import __version__
from synq.common.exit_codes import leave
from synq.config.command_line import CommandGroup

SECTIONS = {
    "inspect a classifier": {
        "inspect": ("synq.commands.inspect_model", "what would be quantized in a classifier, layer by layer"),
        "smoke-run": ("synq.commands.smoke_run", "the pipeline in miniature: does everything work on this classifier?"),
    },
    "quantize it": {
        "train": ("synq.train", "one run: synthesize images, train the low-bit student, evaluate it"),
        "evaluate": ("synq.commands.evaluate", "a finished student on other labeled images, nothing trained"),
        "synthesize": ("synq.commands.synthesize", "only the synthetic images of a run"),
        "mixed-precision": ("synq.commands.mixed_precision", "bits of single layers under a size and BitOps budget"),
        "export": ("synq.commands.export", "ONNX, packed weights and torch.export of a finished run, verified"),
    },
    "run many": {
        "sweep": ("synq.commands.sweep", "a search over models, bit-widths and settings, with a leaderboard"),
        "recipe": ("synq.commands.recipe", "fixed settings on several seeds, compared with baselines"),
        "ablate": ("synq.commands.ablate", "the contribution of each component of the method, paired by seed"),
        "fidelity-study": ("synq.commands.fidelity_study", "which label-free metric ranks settings as top-1 does"),
    },
    "read results": {
        "show": ("synq.commands.show", "summary of runs and sweeps in the terminal"),
        "leaderboard": ("synq.commands.leaderboard", "tables from records: merge, filter, compare"),
        "verify": ("synq.commands.verify", "are files as they were written, do records and tables fit each other?"),
        "report": ("synq.commands.report", "HTML page of a run, a sweep, or a comparison of several"),
        "serve": ("synq.commands.serve", "the same pages in a browser while a sweep runs"),
    },
    "check the machines": {
        "check-cluster": ("synq.commands.check_cluster", "check that a Ray cluster can run a sweep"),
        "bench": ("synq.commands.bench", "benchmark of this machine and of SynQ on it"),
    },
}  # fmt: skip
GROUP = CommandGroup("synq", __version__, SECTIONS)
COMMANDS = tuple(GROUP.modules)


def run(argv: Sequence[str]) -> int:
    """Run the command given by the arguments and return the exit code."""
    return GROUP.run(argv)


def main() -> None:
    """Run the console script."""
    leave(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
