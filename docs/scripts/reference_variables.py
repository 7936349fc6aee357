"""The page of the environment variables: what is written here, checked against the names in the code."""

import ast
import re

from reference_text import ROOT, table

VARIABLE = re.compile(
    r"(?:SYNQ|RAY|TUNE|AWS|MLFLOW|WANDB|XDG|OMP|CUDA|NCCL|GLOO)_[A-Z0-9_]+|(?:LOCAL_)?(?:RANK|WORLD_SIZE)|PYTHONPATH"
)
"""A text of the code that is the name of an environment variable."""
VARIABLES = {
    "For you to set": {
        "SYNQ_DATA_DIR": "Folder with the files of `cifar10`, `cifar100` and `fashion-mnist`, unless "
        "`evaluation.data_dir` is given (default: `data` in the current folder); the settings files of the CIFAR "
        "networks name it, too",
        "SYNQ_TRACEBACK": "`1` prints the traceback with the one line of an error",
        "SYNQ_COMMIT": "commit that records name where the code is no git checkout (a job's uploaded copy)",
        "SYNQ_CACHE_DIR": "folder of a machine's local copies for a sweep in an object store; not shared by machines "
        "(default: `synq` in `XDG_CACHE_HOME`)",
        "XDG_CACHE_HOME": "cache folder of the user (default: `~/.cache`)",
        "XDG_STATE_HOME": "folder of the key by which own code is known (default: `~/.local/state`)",
        "RAY_ADDRESS": "cluster that `synq sweep` and `synq check-cluster` join, from a machine of that cluster; "
        "without it they start Ray on this machine alone",
        "RAY_TMPDIR": "folder of Ray's session files (default: `/tmp`)",
        "AWS_ENDPOINT_URL_S3": "address of an object store other than Amazon's; before `AWS_ENDPOINT_URL`",
        "AWS_ENDPOINT_URL": "address of an object store other than Amazon's",
        "AWS_REGION": "region of the bucket; before `AWS_DEFAULT_REGION`",
        "AWS_DEFAULT_REGION": "region of the bucket (default: `us-east-1`)",
        "MLFLOW_TRACKING_URI": "server of `runtime.tracker` mlflow (default: `mlflow.db` in the run's folder)",
        "WANDB_PROJECT": "project of `runtime.tracker` wandb (default: `synq`)",
        "CUDA_VISIBLE_DEVICES": "GPUs that a process may use",
    },
    "Set by SynQ for Ray, unless you have set them": {
        "RAY_AUTH_MODE": "`disabled` for a local Ray, which listens on 127.0.0.1 only; on a cluster set `token` on the "
        "head and for `ray job submit`",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "`0` for a local Ray: loopback only",
        "RAY_USAGE_STATS_ENABLED": "`0` for a local Ray: no usage report",
        "RAY_AIR_NEW_OUTPUT": "`0`: Tune's display is off",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "`0`: Ray does not hide GPUs from CPU trials",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "`0.2`: how often trials of several processes forward their reports",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "`1`: Tune's loggers are off",
        "TUNE_DISABLE_SIGINT_HANDLER": "`1`: Ctrl-C is handled by SynQ",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "`0`: errors of trials are in their records",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "`0`: no warning about slow checkpoints of Tune",
        "PYTHONPATH": "extended by the root of a checkout, for Ray's workers",
    },
    "Always set by SynQ or a launcher": {
        "TUNE_FUNCTION_THREAD_TIMEOUT_S": "`60`: seconds in which a stopped trial may end its writes",
        "OMP_NUM_THREADS": "`runtime.num_threads`, in the processes of `--jobs`",
        "RAY_JOB_CONFIG_JSON_ENV_VAR": "set by `ray job submit`, whose environment then is that of the workers",
        "WORLD_SIZE": "set by `accelerate launch`: number of processes",
        "LOCAL_WORLD_SIZE": "set by `accelerate launch`: number of processes on this machine",
        "RANK": "set by `accelerate launch`: number of this process; process 0 prints",
    },
}
"""What each environment variable does that the code names; a page is not made while one is missing here."""


def variables_read() -> set[str]:
    """Return the names of the environment variables in the texts of the code."""
    found: set[str] = set()
    for path in [*sorted((ROOT / "synq").rglob("*.py")), *sorted((ROOT / "sweeps").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and VARIABLE.fullmatch(node.value):
                found.add(node.value)
    return found


def environment_page() -> str:
    """Return the page of the environment variables.

    Raises:
        ValueError: `VARIABLES` lacks a variable that the code names, or has one that it does not name.
    """
    described = {name for part in VARIABLES.values() for name in part}
    if described != variables_read():
        names = ", ".join(sorted(described ^ variables_read()))
        raise ValueError(f"`VARIABLES` must have the variables of the code, but they differ in {names}")
    lines = ["# Environment variables\n"]
    for title, part in VARIABLES.items():
        lines += [f"## {title}\n", table(("variable", ""), [(f"`{name}`", text) for name, text in part.items()])]
    lines += ["Variables of `MALLOC_...`, `GLIBC_TUNABLES` and `LD_PRELOAD` that tune or replace the C allocator keep "
              "SynQ from tuning it. Weights & Biases, MLflow and object stores have more.\n"]  # fmt: skip
    return "\n".join(lines)
