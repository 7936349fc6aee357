"""Commands of `synq`, one module each; only they import `sweeps`, and only when a command is called."""


def run_failures() -> tuple[type[BaseException], ...]:
    """Return the RuntimeErrors that mean a failed run (exit code 1), not a bug."""
    from synq.finetune.loop import NonFiniteLossError  # imports torch, which is loaded by the time it is raised

    return (NonFiniteLossError,)
