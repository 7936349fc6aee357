"""Exit codes of commands, and errors as one line on standard error. Loads no torch."""

import os
import sys
from collections.abc import Callable

from synq.common.error_text import first_line
from synq.common.faults import fault_text

RUN_FAILED, USER_ERROR, OWN_FAULT, INTERRUPTED = 1, 2, 70, 130


def report_error(error: BaseException, cause: BaseException | None = None) -> None:
    """Print one line on standard error; SYNQ_TRACEBACK=1 in the environment adds the traceback.

    Args:
        error: The error, whose text is the line.
        cause: The error whose traceback it is, if another one.
    """
    if os.environ.get("SYNQ_TRACEBACK", "0") not in ("", "0"):
        import traceback

        traceback.print_exception(cause or error)
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        text = f"`{error.filename}` cannot be used: {error.strerror or text}"
    print(f"synq: error: {text}", file=sys.stderr, flush=True)


def exit_code(
    work: Callable[[], int | None],
    *,
    resumes: bool = False,
    failures: Callable[[], tuple[type[BaseException], ...]] = tuple,
) -> int:
    """Call `work` and return the exit code of the process; an error is one line on standard error.

    Args:
        work: What to do; a number that it returns is the exit code.
        resumes: Whether the same command, started again, continues where it was interrupted.
        failures: Returns the RuntimeErrors that are the failure of a run.

    Returns:
        0 done, 1 a run failed, 2 the input was rejected, 70 a fault of this program (the line names a log with the
        traceback), 130 interrupted.
    """
    try:
        code = work() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of standard output, such as `head`, has read enough
        return 0
    except (ValueError, OSError) as error:
        report_error(error)
        return USER_ERROR
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "synq":  # a fault of ours, not of the environment
            return report_fault(error)
        report_error(ImportError(_import_reason(error)))
        return USER_ERROR
    except RuntimeError as error:
        from concurrent.futures import BrokenExecutor

        if isinstance(error, BrokenExecutor):
            reason = "a run's process died (too little memory?); the same command resumes, fewer `--jobs` need less"
            error = RuntimeError(reason)
        elif is_out_of_memory(error):
            error = RuntimeError(f"memory is full: {first_line(error)}")
        elif not isinstance(error, failures()):
            return report_fault(error)
        report_error(error)
        return RUN_FAILED
    except MemoryError as error:
        report_error(RuntimeError(f"memory is full: {first_line(error)}"))
        return RUN_FAILED
    except Exception as error:  # whatever a command did not expect
        return report_fault(error)
    except KeyboardInterrupt:
        print("synq: interrupted" + ("; the same command resumes" if resumes else ""), file=sys.stderr, flush=True)
        return INTERRUPTED


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is that of a full GPU (`torch.OutOfMemoryError`), without importing torch."""
    return any(part.__name__ == "OutOfMemoryError" for part in type(error).__mro__)


def report_fault(error: BaseException) -> int:
    """Print one line about an error that nothing expected, with the log of its traceback; return `OWN_FAULT`."""
    report_error(RuntimeError(fault_text(error)), cause=error)
    return OWN_FAULT


def _import_reason(error: BaseException) -> str:
    """Return why a required package cannot be imported; the first error of a chain has the reason."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return (
        f"a required package cannot be imported: {str(error).rstrip('.')}; `python -m pip check` shows which "
        f"installed packages disagree "
        "(a separate virtual environment for SynQ avoids the requirements of others)"
    )


def leave(code: int) -> None:
    """End the process with this exit code.

    The interpreter's own exit is skipped with several processes, where gloo aborts in it now and then, and with Ray,
    whose threads may keep the process alive.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or "ray" in sys.modules:
        os._exit(code)
    sys.exit(code)
