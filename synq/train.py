"""One run, any number of processes: `accelerate launch synq/train.py [--config FILE] [--finetune.lr 1e-4 ...]`.

Defines no class: this file runs as `__main__` and would give a class two identities.
"""

import os
import sys

if sys.path and os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__)):
    sys.path[0] = os.path.dirname(
        os.path.dirname(os.path.abspath(__file__))
    )  # started by file path: make `synq` importable

import contextlib
import time
from collections.abc import Sequence

from synq.config.parsing import parse_overrides
from synq.config.run import RunConfig, load_run, make_absolute, with_overrides
from synq.runs.record import summary_line

PROGRAM = "accelerate launch synq/train.py"
USER_ERROR = 2
WORK = "Quantizes a pre-trained classifier without any data: makes images from it, trains a low-bit copy on them and measures it. "
IMAGES_WORK = (
    "Makes the synthetic images of a run, and the held-out ones, and stops: `synq train` with the same settings finds them in the store. "
    "Every key of the run is accepted; teacher, synthesis, data_seed and evaluation.heldout_images decide the images. "
)
NPZ_HELP = """--npz FILE.npz   also write the training images for other tools' calibration: arrays `images` (N, C, H, W) float32, normalised as the
                 network takes them, `labels` (N,), `mean` and `std` per channel"""


def read_command_line(words: Sequence[str]) -> tuple[RunConfig, bool]:
    """Return the configuration that the words ask for, and whether help was asked for.

    `--config FILE` supplies the starting values; every other word pair replaces one of them. The first word may be FILE or the teacher alone.

    Raises:
        ValueError: For an unknown key, a bad value or a damaged file.
        OSError: The file cannot be read.
    """
    words = name_first_word(words)
    wants_help = any(word in ("-h", "--help") for word in words)
    words = [word for word in words if word not in ("-h", "--help")]
    config, rest, path = RunConfig(), [], None
    while words:
        word = words.pop(0)
        if word != "--config" and not word.startswith("--config="):
            rest.append(word)
            continue
        if path is not None or (word == "--config" and not words):
            raise ValueError(f"`config` must name one file, but got {'two' if path else 'none'}")
        path = words.pop(0) if word == "--config" else word.removeprefix("--config=")
        config = load_run(path)
    return with_overrides(config, parse_overrides(RunConfig, rest)), wants_help


def name_first_word(words: Sequence[str], key: str = "") -> list[str]:
    """Return the words with the key of the first one, where that is no key itself: `key`, or by default that of a settings file or a teacher.

    Raises:
        ValueError: The second word has no key either.
    """
    if not words or words[0].startswith("-"):
        return list(words)
    if len(words) > 1 and not words[1].startswith("-"):
        cure = "" if key else "; `--config FILE` names settings, `--teacher.spec` the teacher"
        raise ValueError(
            f"only the first word may stand without its key, but got {words[1]!r} behind {words[0]!r}{cure}"
        )
    return [key or ("--config" if words[0].endswith((".toml", ".json")) else "--teacher.spec"), *words]


def print_help(config: RunConfig, program: str = PROGRAM, work: str = WORK) -> None:
    """Explain every field with the value it has now (the default, or the one of `--config FILE`)."""
    import tyro

    description = (
        f"{work}Settings come from --config FILE (TOML or JSON, with the keys below), then from the command line; TEACHER is --teacher.spec. "
        "The same command started again resumes a run that was stopped, and returns at once when it is finished."
    )
    tyro.cli(
        RunConfig,
        prog=f"{program} [TEACHER or FILE.toml] [--config FILE]",
        description=description,
        args=["--help"],
        default=config,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )


def report_error(error: BaseException) -> None:
    """Print one line on standard error; SYNQ_TRACEBACK=1 in the environment shows where it came from."""
    if os.environ.get("SYNQ_TRACEBACK", "0") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        text = f"`{error.filename}` cannot be used: {error.strerror or text}"
    print(f"synq: error: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None, *, program: str = PROGRAM, only_images: bool = False) -> int:
    """Do one run and return the exit code: 0 done, 1 the run failed, 2 the input was refused, 130 interrupted.

    Args:
        argv: The words after the program's name; None takes those of the process.
        program: How the user called it, for the help.
        only_images: Stop when the synthetic images are in the store.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        npz = _take_npz(words) if only_images else None
        config, wants_help = read_command_line(words)
        config = make_absolute(config)
    except (ValueError, OSError) as error:
        if rank == 0:  # every process has read the same words
            report_error(error)
        return USER_ERROR
    if wants_help:
        if rank == 0:
            # tyro leaves the process after its help; a reader such as `head` may leave before
            with contextlib.suppress(BrokenPipeError):
                with contextlib.suppress(SystemExit):
                    print_help(config, program, IMAGES_WORK if only_images else WORK)
                if only_images:
                    print(NPZ_HELP)
                sys.stdout.flush()
        return 0
    return _run(config, rank, only_images, npz)


def _take_npz(words: list[str]) -> str | None:
    """Take `--npz FILE` out of the words.

    Raises:
        ValueError: The file's name is missing or of another kind.
    """
    if "--npz" not in words:
        return None
    place = words.index("--npz")
    path = words[place + 1] if place + 1 < len(words) else ""
    if not path.endswith(".npz"):
        raise ValueError(f"`npz` must name a file that ends in .npz, but got {path!r}")
    del words[place : place + 2]
    return path


def _run(config: RunConfig, rank: int, only_images: bool, npz: str | None = None) -> int:
    import torch

    from synq.finetune.loop import NonFiniteLossError
    from synq.pipeline import make_accelerator, prepare, run, run_folder
    from synq.synthesis.generate import write_npz
    from synq.teacher.teacher import load_teacher

    notes: list[str] = []
    try:
        accelerator = make_accelerator(config.runtime)
        if only_images:
            sets = prepare(config, accelerator=accelerator)
            lines = [f"{part.path} | {len(part.labels)} images" for part in sets]
            if npz is not None and accelerator.is_main_process:
                write_npz(npz, sets[0], load_teacher(config.teacher))
                lines.append(f"{npz} | {len(sets[0].labels)} images")
        else:
            file = run_folder(config) / "record.json"
            before = file.stat().st_mtime_ns if file.exists() else None
            record = run(config, accelerator=accelerator)
            done = "finished before, nothing to do: " if before == file.stat().st_mtime_ns else ""
            notes = [*(f"warning: {text}" for text in record.warnings), f"{done}{file.parent}"]
            lines = [summary_line(record)]
        accelerator.end_training()
    except (ValueError, OSError, NonFiniteLossError, torch.OutOfMemoryError) as error:
        # The launcher ends the other processes soon after one has failed. One that waits thus leaves the message to the main
        # process, and still speaks when it alone has failed.
        if rank != 0:
            time.sleep(5)
        full = isinstance(error, torch.OutOfMemoryError)
        report_error(
            RuntimeError(f"GPU memory is full: lower finetune.batch_size or synthesis.shard_size. {error}")
            if full
            else error
        )
        return 1 if isinstance(error, RuntimeError) else USER_ERROR
    except KeyboardInterrupt:
        if rank == 0:
            print("synq: interrupted; the same command resumes", file=sys.stderr, flush=True)
        return 130
    if rank == 0:
        for note in notes:
            print(f"synq: {note}", file=sys.stderr)
        print(*lines, sep="\n", flush=True)  # standard output is the result alone
    return 0


def leave(code: int) -> None:
    """End the process. With several processes the interpreter's own exit is skipped: gloo aborts in it now and then."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
