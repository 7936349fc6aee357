"""`synq ablate`: the contribution of each component of the method on one teacher."""

from dataclasses import replace
from typing import Any

import click

from synq.commands import run_failures
from synq.config.command_line import Command
from synq.config.command_options import INT, option
from synq.config.finetune import check_own_weight
from synq.config.run import RunConfig, load_run, make_absolute, with_overrides

EXAMPLES = """\
  %(prog)s sweeps/specs/ablations/demo.toml                        the classifier that ships with SynQ, no download
  %(prog)s sweeps/specs/ablations/cifar10_resnet20.toml --jobs 2
  %(prog)s --config run.toml --bits W3A3 --seeds 0 1 2 --rows none "soft labels" """


@click.command(
    "ablate",
    cls=Command,
    settings="overrides",
    usage="[SPEC | --config FILE] [options] [--KEY VALUE ...]",
    first="--spec",
    common=("teacher.spec", "finetune.lr", "runtime.output_dir", "runtime.device", "runtime.num_threads"),
    examples=EXAMPLES,
    resumes=True,
    failures=run_failures,
)
@option("--spec", metavar="SPEC", help="file of an ablation; --spec may be omitted if it is the first argument")
@option("--config", metavar="FILE", rule="name one file", help="file of one run, as for `synq train`, instead of SPEC")
@option("--bits", several=True, metavar="LABEL", help="bit-widths (default: those of SPEC, or W4A4 W3A3)")
@option("--seeds", several=True, type=INT, help="seeds of data and training (default: those of SPEC, or 0 1 2)")
@option(
    "--rows",
    several=True,
    metavar="ROW",
    help="some of: none, filter, CAM, soft labels, filter + CAM, filter + soft labels, CAM + soft labels, all, "
    "distillation only (default: those of SPEC, or all)",
)
@option("--jobs", type=INT, default=1, help="concurrent runs, which share the CPU cores (default: 1)")
def command(
    spec: str | None,
    config: str | None,
    bits: tuple[str, ...],
    seeds: tuple[int, ...],
    rows: tuple[str, ...],
    jobs: int,
    overrides: dict[str, Any],
) -> None:
    """Run a configuration with each combination of filter, CAM and soft labels on shared seeds; print a paired table.

    All three must be enabled in the configuration. It is read from SPEC, a file of the whole ablation, or from
    --config, a file of one run. Tables are written to <output_dir>/<name>; settings of `synq train` on the command line
    override the file's, and get a separate folder, <output_dir>/<name>-<teacher>-<digest of the settings>. The same
    command resumes an ablation that was stopped.
    """
    from synq.runs.record import summary_line
    from synq.sweeps.studies.ablation import AblationSpec, load_ablation, markdown, plan, table, write_tables
    from synq.sweeps.studies.pool import run_all
    from synq.sweeps.studies.settings_file import check_overrides
    from synq.sweeps.studies.study_folder import tables_folder, with_finished

    if spec is not None and config is not None:
        raise ValueError(f"`config` must be left out where SPEC is given, but got {config!r}")
    check_overrides(overrides)
    if spec is not None:
        study = load_ablation(spec)
    else:
        run = load_run(config) if config else RunConfig()
        study = AblationSpec(name=run.name, bits=("W4A4", "W3A3"), seeds=(0, 1, 2), base=run)
    written = study.base
    study = replace(study, base=make_absolute(with_overrides(written, overrides)))
    check_own_weight(study.base.finetune)
    runs = plan(study.base, list(bits) or study.bits, list(seeds) or study.seeds, list(rows) or study.rows)
    records = run_all(
        runs,
        jobs,
        lambda cell, record: print(f"{cell[0]} seed {cell[2]} {cell[1]}: {summary_line(record)}", flush=True),
    )
    done = with_finished(runs, records, plan(study.base, study.bits, study.seeds, study.rows))
    lines = table(done)
    folder = tables_folder(study.base.name, written, study.base, next(iter(done.values())).model)
    write_tables(folder, lines)
    print(markdown(lines), end="")
    print(folder / "ablation.csv", flush=True)


main = command.run
