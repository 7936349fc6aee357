"""Finished students for runs that differ in their measurement only.

The settings of `evaluation` change no weight of a student (the wall is `synq/evaluation`), but they are part of the
digest of a run, because a record holds one measurement. A run asked again with other labeled images therefore has a
separate folder and record, and takes over the student that another run of the same output folder has finished.
"""

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from synq.common.digests import check_file
from synq.common.files import DamagedFileError
from synq.common.notices import print_notice
from synq.config.run import RunConfig, config_digest, load_run
from synq.finetune.loop import Epoch
from synq.runs.record import RunRecord, read_record, run_folder
from synq.runtime import synchronize_parameters
from synq.teacher.weight_files import read_weights

STUDENT_FILE = "student.safetensors"
CURE = "the command of the run makes it again from its checkpoint"


def finished_student(config: RunConfig, teacher_digest: str, accelerator: Accelerator) -> tuple[Path, RunRecord] | None:
    """Return folder and record of a completed run whose student is that of `config`, on all processes; None without.

    The run that trained it goes before those that only measured it: it also has the student as it was calibrated.

    Args:
        config: The run, with absolute paths.
        teacher_digest: Digest of its teacher's weights.
        accelerator: Process group.
    """
    found = [_search(config, teacher_digest) if accelerator.is_main_process else None]
    return broadcast_object_list(found)[0]  # type: ignore[no-any-return]


def _search(config: RunConfig, teacher_digest: str) -> tuple[Path, RunRecord] | None:
    wanted, own = config_digest(config, with_evaluation=False), run_folder(config).name
    measured_only = None
    for file in sorted(Path(config.runtime.output_dir).glob("*/config.json")):
        folder = file.parent
        if folder.name == own or not (folder / "record.json").is_file() or not (folder / STUDENT_FILE).is_file():
            continue
        try:
            if config_digest(load_run(file), with_evaluation=False) != wanted:
                continue
            record = read_record(folder / "record.json")
            if record.status == "completed" and record.teacher.get("digest") == teacher_digest:
                check_student(folder, record)
                if not record.student_of:
                    return folder, record
                measured_only = measured_only or (folder, record)
        except DamagedFileError as error:
            print_notice(f"warning: {error}; that run is not reused")
        except (ValueError, OSError):  # of another run or version, which its own start reports
            continue
    return measured_only


def check_student(folder: Path, record: RunRecord) -> None:
    """Compare the student's file with its digest in the record of a completed run.

    Args:
        folder: Folder of the run.
        record: Its record; one of an earlier version has no digest, which a notice reports.

    Raises:
        FileNotFoundError: The file is missing.
        DamagedFileError: The file is damaged or of another run.
    """
    check_file(folder / STUDENT_FILE, record.files, CURE)


def take_student(source: Path, record: RunRecord, net: nn.Module, accelerator: Accelerator) -> list[Epoch]:
    """Load the weights of a finished student, in place, and return the loss history of its run.

    Args:
        source: Folder of the run.
        record: Its record.
        net: Network of the student that `build_student` returns for the same settings.
        accelerator: Process group; only the main process reads the file.

    Raises:
        ValueError: The file is damaged or holds another student; on all processes, of which none may wait for another.
    """
    reason = ""
    if accelerator.is_main_process:
        try:
            net.load_state_dict(read_weights(source / STUDENT_FILE))
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
    reason = broadcast_object_list([reason])[0]
    if reason:
        raise ValueError(
            f"`{source / STUDENT_FILE}` must hold the student of its run, but: {reason}; without that folder the "
            "student is trained again"
        )
    synchronize_parameters(net)
    return [dict(epoch) for epoch in record.loss_history]
