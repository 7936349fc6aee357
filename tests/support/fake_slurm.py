"""Slurm's commands for scripts under launch/clusters, as programs that run everything on this machine."""

import os
from pathlib import Path

SRUN = """#!/usr/bin/env bash
number=1 line="srun $*"
while [[ "${1:-}" == -* ]]; do
    case "$1" in --ntasks=*) number="${1#*=}" ;; esac
    shift
done
echo "$line" >>"$FAKE_LOG"
pids=()
for ((i = 0; i < number; i++)); do "$@" & pids+=("$!"); done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
while :; do
    code=0
    wait "${pids[0]}" || code=$?
    kill -0 "${pids[0]}" 2>/dev/null || break
done
wait
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$FAKE_LOG"
if [ "$1 $2" = "show hostnames" ]; then printf '%s\\n' $FAKE_NODES; fi
"""
HOSTNAME = "#!/usr/bin/env bash\necho 127.0.0.1\n"


def write_programs(folder: Path, programs: dict[str, str]) -> None:
    """Write executable programs into a folder.

    Args:
        folder: Made if absent.
        programs: Text by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def slurm_environment(folder: Path, *, nodes: str = "node0", **variables: str) -> dict[str, str]:
    """Return the environment of a batch script of Slurm with fake commands, whose calls are lines of folder/calls.

    Args:
        folder: Gets the commands and the file of calls.
        nodes: Names of the machines, with spaces between.
        variables: Further variables.
    """
    write_programs(folder / "bin", {"srun": SRUN, "scontrol": SCONTROL, "hostname": HOSTNAME})
    left_out = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    return {
        **{name: value for name, value in os.environ.items() if name not in left_out},
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "FAKE_LOG": str(folder / "calls"),
        "FAKE_NODES": nodes,
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[0-9]",
        "SLURM_CPUS_PER_TASK": "1",
        **variables,
    }


def calls(folder: Path) -> list[str]:
    """Return the calls of the fake commands, the first one first."""
    file = folder / "calls"
    return file.read_text().splitlines() if file.exists() else []
