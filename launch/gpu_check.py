"""`.ci/gpu`: what a machine with a GPU can show of SynQ in eight minutes, as one JSON file and one page.

Every part runs in a separate process with a time limit; one that fails or is too slow does not stop the others. A
part that cannot run here, or for which no time is left, is in the page with the reason.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_parts import FULL, PARTS, QUICK, SKIPPED

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = 3
LEAST_SECONDS = 20
"""Time that must be left for a part to be started."""
EPILOG = (
    "exit codes: 0 every part that can run here passed, 1 a part failed, 2 input rejected, 3 no GPU here: nothing ran"
)


def main(argv: list[str] | None = None) -> int:
    """Run the parts and return the exit code."""
    given = _arguments(argv)
    if given.device == "cpu" and not given.quick:
        print("gpu: error: `--device cpu` must come with `--quick`; the full form is for a GPU", file=sys.stderr)
        return 2
    try:
        import torch
    except ImportError:
        print("gpu: error: PyTorch must be installed, but is not; see docs/start.md", file=sys.stderr)
        return 2
    if given.device == "cuda" and not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        print(
            f"gpu: no CUDA device here (torch {torch.__version__}, {build}), so nothing was run; "
            "`.ci/gpu --device cpu --quick` runs small forms of the parts on this processor",
            file=sys.stderr,
        )
        return NO_GPU
    folder = Path(given.output_dir).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu: error: `output-dir` must be a writable folder, but got {error}", file=sys.stderr)
        return 2
    end, results = time.monotonic() + given.limit, []
    for name in given.only or PARTS:
        result = run_part(name, given.device, QUICK if given.quick else FULL, folder, end - time.monotonic())
        results.append(result)
        print(f"{result['status']:<8} {name:<16} {result['seconds']:6.1f} s  {result['detail']}", flush=True)
    write_report(folder, given, results)
    return int(any(result["status"] == "failed" for result in results))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=".ci/gpu", description=(__doc__ or "").partition("\n")[0], epilog=EPILOG)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tests the parts themselves")
    parser.add_argument("--quick", action="store_true", help="the smallest form of each part")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"some of: {' '.join(PARTS)}")
    parser.add_argument("--limit", type=float, default=460, metavar="SECONDS", help="time for all parts (default: 460)")
    parser.add_argument("--output-dir", default="runs/gpu", metavar="DIR", help="folder of gpu.json and gpu.md")
    return parser.parse_args(argv)


def run_part(name: str, device: str, size: str, folder: Path, left: float) -> dict[str, Any]:
    """Run a part in a separate process; its output goes to NAME.log.

    Args:
        name: Name in `PARTS`.
        device: cuda or cpu.
        size: `FULL` or `QUICK`.
        folder: Folder of the results.
        left: Seconds that are left for all parts.

    Returns:
        part, status (passed, failed or skipped), seconds, detail (a line) and values.
    """
    result: dict[str, Any] = {"part": name, "status": "skipped", "seconds": 0.0, "detail": "", "values": {}}
    if left < LEAST_SECONDS:
        return result | {"detail": "no time left (--limit)"}
    limit, started = min(left, PARTS[name][1] if size == FULL else left), time.monotonic()
    log = folder / f"{name}.log"
    command = [sys.executable, str(ROOT / "launch" / "gpu_parts.py"), name, device, size, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    seconds = round(time.monotonic() - started, 1)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    values = _values(lines)
    if code == 0 and values is not None:
        detail = ", ".join(f"{key} {value}" for key, value in list(values.items())[:4])
        return result | {"status": "passed", "seconds": seconds, "detail": detail, "values": values}
    if code == SKIPPED:
        return result | {"seconds": seconds, "detail": last}
    if code == 0:
        reason = "printed no values"
    else:
        reason = f"took longer than {limit:.0f} s" if code is None else last or f"ended with code {code}"
    return result | {"status": "failed", "seconds": seconds, "detail": f"{reason} ({log.name})"}


def _values(lines: list[str]) -> dict[str, Any] | None:
    """Return the last line that is a JSON object; None if there is none. Libraries may warn after it, at exit."""
    for line in reversed(lines):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            return values
    return None


def write_report(folder: Path, given: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Write gpu.json and gpu.md.

    Args:
        folder: Where to.
        given: The arguments of the command.
        results: What `run_part` returned.
    """
    import torch

    from synq.common.environment import environment

    name = torch.cuda.get_device_name() if given.device == "cuda" else "no GPU: the parts themselves were tested"
    facts = {"device": name, "form": QUICK if given.quick else FULL, "cuda": torch.version.cuda, **environment()}
    (folder / "gpu.json").write_text(json.dumps({**facts, "parts": results}, indent=1) + "\n")
    lines = [
        "# What a GPU shows of SynQ",
        "",
        f"{name}; {facts['form']} form; torch {torch.__version__}, CUDA {facts['cuda']}; commit {facts['commit']}.",
        "",
        "| part | | s | |",
        "| --- | --- | --- | --- |",
        *(f"| {one['part']} | {one['status']} | {one['seconds']} | {one['detail']} |" for one in results),
    ]
    for one in results:
        if one["values"]:
            lines += ["", f"## {one['part']}", "", "| | |", "| --- | --- |"]
            lines += [f"| {key} | {value} |" for key, value in one["values"].items()]
    (folder / "gpu.md").write_text("\n".join(lines) + "\n")
    print(f"{folder / 'gpu.json'}\n{folder / 'gpu.md'}", flush=True)


if __name__ == "__main__":
    sys.path.insert(1, str(ROOT))  # a checkout that is not installed
    sys.exit(main())
