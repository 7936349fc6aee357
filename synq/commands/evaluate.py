"""`synq evaluate`: the student of a finished run on other labeled images, without any training."""

from dataclasses import asdict
from typing import Any

import click

from synq.common.files import check_paths
from synq.config.command_line import Command
from synq.config.command_options import INT, argument, moved_options, moved_paths, option

EXAMPLES = """\
  %(prog)s runs/run-DIGEST --dataset npz:mine.npz
  %(prog)s runs/run-DIGEST --dataset imagefolder:val --num-images 5000 --json counted.json
  %(prog)s runs/demo/records/TRIAL.json --dataset digits"""


@click.command("evaluate", cls=Command, examples=EXAMPLES, exit_codes="0 done, 2 input rejected, 130 interrupted")
@argument("run", metavar="RUN", help="folder of a finished run, its record.json, or a sweep's records/TRIAL.json")
@option(
    "--dataset",
    metavar="SET",
    help="labeled images: digits, cifar10, cifar100, fashion-mnist, imagefolder:PATH or npz:FILE (default: the run's)",
)
@option("--data-dir", metavar="DIR", help="folder with the files of cifar10, cifar100 and fashion-mnist")
@option("--num-images", type=INT, help="number of images, chosen as in a run (default: all)")
@option("--batch-size", type=INT, help="images per forward pass (default: the run's)")
@option("--json", "json_file", metavar="FILE", help="also write the result as JSON")
@moved_options
def command(
    run: str,
    dataset: str | None,
    data_dir: str | None,
    num_images: int | None,
    batch_size: int | None,
    json_file: str | None,
    **moved: Any,
) -> None:
    """Count the correct predictions of a finished student, and of its teacher, on labeled images.

    Nothing is trained and the run is not changed. Of a run's own images, those that its objective "selection" selects
    by are left out, as in the run. The student runs in its integer form, as in the run's own
    measurement; the drop has its standard error, paired by image. `synq train` with the run's settings and another
    evaluation.dataset does the same and also measures the student before fine-tuning, into a separate record.
    """
    check_paths([run], "RUN")
    from synq.common.files import write_json_atomic
    from synq.runs.finished import open_run
    from synq.runs.recount import recount, recount_settings
    from synq.runtime import make_accelerator
    from synq.teacher.trust import trusting

    with trusting(moved["trust"]):
        found = open_run(run, moved_paths(moved))
    settings = recount_settings(
        found.config, dataset=dataset, data_dir=data_dir, num_images=num_images, batch_size=batch_size
    )
    accelerator = make_accelerator(found.config.runtime)
    result = recount(found, settings, accelerator, progress=found.config.runtime.progress)
    if not accelerator.is_main_process:
        return
    print(result.line())
    if json_file is not None:
        write_json_atomic(json_file, asdict(result))
        print(json_file, flush=True)


main = command.run
