"""`synq sweep`: hyperparameter search over models, bit-widths and settings, with a leaderboard."""

from pathlib import Path
from typing import Any

import click

from synq.config.command_line import Command
from synq.config.command_options import FLOAT, INT, argument, option
from synq.config.parsing import between

EXAMPLES = """\
  %(prog)s                                              a small demo of the classifier that ships with SynQ
  %(prog)s sweeps/specs/cifar10_resnet20.toml --num-trials 20 --max-concurrent 2
  %(prog)s SPEC --dry-run
  ray job submit --working-dir . -- python launch/sweep.py SPEC        on a cluster"""


@click.command(
    "sweep",
    cls=Command,
    examples=EXAMPLES,
    advice="everything else is set in the spec (see --help and docs/how-to/sweep.md)",
    exit_codes="0 done, 1 a group without a result or too many failed, 2 input rejected, 130 interrupted",
    resumes=True,
)
@argument("spec", required=False, metavar="SPEC", help="a .toml or .json file (default: a small demo)")
@option("--output-dir", metavar="DIR_OR_ADDRESS", help="folder of the sweep, or s3://... (default: runs/NAME)")
@option("--num-trials", metavar="N", help="trials of each (model, bits) group; +N: N more than it has")
@option("--max-concurrent", metavar="N", type=INT, help="maximum number of concurrent trials")
@option("--workers-per-trial", metavar="N", type=INT, help="processes of distributed training per trial")
@option("--cpus-per-worker", metavar="X", type=FLOAT, help="CPU cores and threads of each process")
@option(
    "--gpus-per-worker",
    metavar="X",
    type=FLOAT,
    help="GPUs of each process; fractions such as 0.25 share a GPU, 0 means CPU",
)
@option(
    "--retry",
    metavar="STATUS",
    multiple=True,
    help="run trials again that are failed, diverged, pre-empted or lost; several with commas",
)
@option("--retry-failed", is_flag=True, help="run all of these again")
@option("--no-report", is_flag=True, help="do not write report.html")
@option("--serve", metavar="PORT", type=INT, help="show the page in a browser while the sweep runs; 0: any free port")
@option("--dry-run", is_flag=True, help="print the planned trials, their resources and estimated time, and stop")
def command(
    spec: str | None,
    num_trials: str | None,
    retry: tuple[str, ...],
    retry_failed: bool,
    no_report: bool,
    serve: int | None,
    dry_run: bool,
    **given: Any,
) -> int:
    """Search over models, bit-widths and settings and rank the results.

    The same command resumes a sweep that was stopped.
    """
    from synq.runs.record import FAILURES

    options = {key: value for key, value in given.items() if value is not None}
    if num_trials is not None:
        if not num_trials.removeprefix("+").isdecimal():
            raise ValueError(f"`num-trials` must be a whole number N or +N, but got {num_trials!r}")
        options["more_trials" if num_trials.startswith("+") else "num_trials"] = int(num_trials)
    again = list(FAILURES) if retry_failed else [one.strip() for text in retry for one in text.split(",")]
    options |= ({"retry": again} if again else {}) | ({"report": False} if no_report else {})
    from synq.sweeps.driver.cluster import output_root, prepare_environment
    from synq.sweeps.spec_file import DEMO_SPEC, load_spec

    resolved = load_spec(DEMO_SPEC if spec is None else spec, options, root=output_root())
    if serve is not None:
        between("serve", serve, 0, 65535)
        if resolved.address:
            raise ValueError(f"`serve` must come with a folder of this machine, but the sweep is at {resolved.address}")
    prepare_environment()
    if dry_run:
        from synq.sweeps.driver.dry_run import print_preview

        print_preview(resolved)
        return 0
    from synq.sweeps.driver.tuner import run_sweep

    if serve is None:
        return run_sweep(resolved)
    from synq.sweeps.live.child import live_page

    with live_page(Path(resolved.output_dir), serve) as url:
        print(f"live page: {url}", flush=True)
        return run_sweep(resolved)


main = command.run
