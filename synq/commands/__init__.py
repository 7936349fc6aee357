"""The commands of `synq`, one file each. They alone may import `sweeps`, and only when a command is called."""


def run_failures() -> tuple[type[BaseException], ...]:
    """Return the RuntimeErrors that are the failure of a run, not of this program."""
    from synq.finetune.loop import NonFiniteLossError  # torch, which is there when it is raised

    return (NonFiniteLossError,)
