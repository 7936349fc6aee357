"""Random flips of single bits over all files of finished and unfinished work: `python -m fuzz.flips_run --count 200`.

From the folder tests. Work is a finished run with its export, and a sweep that was stopped half way. Each flip must be
noticed (`synq verify` or the driver that resumes names the file, or a notice is printed), or harmless: everything that
is read back is equal. No value that a reader takes from the files may change. Prints a line for each fault and a
summary; ends with 1 if there is a fault.
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import io
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from support.sealed import flip
from support.sweep_tools import LR, tiny
from synq.common.digests import read_sealed, read_sealed_json
from synq.common.notices import forget_notices
from synq.config.run import RunConfig, load_run, with_overrides
from synq.export.export import ExportOptions, export_run
from synq.pipeline import run
from synq.runs.finished import open_run
from synq.runs.record import read_record, run_folder
from synq.sweeps.driver.searcher import SweepSearcher
from synq.sweeps.state.ledger import Ledger
from synq.sweeps.state.trial_task import TrialTask
from synq.sweeps.verification import verify
from synq.synthesis.dataset import load_set

SETTINGS = {
    "synthesis.num_images": 32, "synthesis.shard_size": 16, "synthesis.iterations": 3, "synthesis.start": "white",
    "finetune.epochs": 2, "finetune.batch_size": 16, "evaluation.heldout_images": 16, "evaluation.num_images": 64,
    "quant.calib_images": 16, "quant.act_points": "inputs", "quant.equalization": True, "runtime.progress": False,
}  # fmt: skip
KEYS: dict[str, Any] = {"space": LR, "num_trials": 3, "sampler": "grid", "bits": ["W8A8"], "scheduler": "none"}


class Stopped(BaseException):
    """The sweep is stopped in the middle of a trial."""


def make(root: Path) -> None:
    """Write a finished run with its export to `root`/runs, and a stopped sweep to `root`/sweep."""
    config = with_overrides(RunConfig(), {**SETTINGS, "runtime.output_dir": str(root / "runs")})
    run(config)
    export_run(run_folder(config), options=ExportOptions(rounds=0))
    spec = tiny(root / "sweep", **KEYS)
    ledger = Ledger(spec)
    ledger.open()
    searcher = SweepSearcher(ledger.spec, ledger)
    from synq.sweeps.workers.trial import do_trial

    for number in range(3):
        task = TrialTask.from_dict(searcher.suggest(str(number)))
        history: dict[int, float] = {}

        def report(metrics: dict[str, Any], number: int = number, seen: dict[int, float] = history) -> None:
            if "status" not in metrics and metrics.get("objective_value") is not None:
                seen[metrics["epoch"]] = metrics["objective_value"]
                if number == 2 and len(seen) == 2:
                    raise Stopped

        with contextlib.suppress(Stopped):
            do_trial(task, report)
            ledger.settle(task.trial, status="failed", reason="", history=sorted(history.items()), seconds=1.0)
    ledger.write_tables()
    ledger.close()


def state_digest(path: Path) -> str:
    """Return the digest of what a file of states holds."""
    content, _ = read_sealed(path)
    return repr(torch.load(io.BytesIO(content), weights_only=True)).strip() + hashlib.sha256(content).hexdigest()


def values(root: Path) -> dict[str, Any]:
    """Return everything that readers take from the files."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.name == "record.json" or path.parent.name == "records":
            found[name] = dataclasses.asdict(read_record(path))
        elif path.name == "config.json":
            found[name] = load_run(path)
        elif path.suffix == ".json":
            found[name] = read_sealed_json(path)[0]
        elif path.suffix == ".pt":
            found[name] = state_digest(path)
        elif path.suffix == ".csv":
            with path.open(newline="") as file:
                found[name] = list(csv.reader(file))
        elif path.name == "images.safetensors":
            found[name] = load_set(path.parent).digest
        elif path.is_file() and path.suffix not in (".lock",):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder,) = (root / "runs").glob("run-*")
    state = open_run(folder).student.net.state_dict()
    found["student"] = {name: tensor.tolist() for name, tensor in state.items()}
    return found


def resumed(root: Path) -> dict[str, Any]:
    """Return the plans and records that a driver finds."""
    ledger = Ledger(tiny(root / "sweep", **KEYS))
    ledger.open()
    ledger.close()
    records = {name: dataclasses.asdict(record) for name, record in ledger.records.items()}
    return {"plans": {name: dataclasses.asdict(plan) for name, plan in ledger.plans.items()}, "records": records}


def check(root: Path, file: Path, at: int, bit: int, whole: dict[str, Any], state: dict[str, Any]) -> str:
    """Flip a bit and return "noticed" or "harmless".

    Raises:
        AssertionError: The flip is neither, or a value changes.
    """
    flip(root / file, at, bit)
    forget_notices()
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        findings = verify([root / "runs", root / "sweep"])
        error = ""
        after: dict[str, Any] | None = None
        try:
            after = resumed(root)
        except (ValueError, OSError) as problem:
            error = str(problem)
    texts = [finding.line() for finding in findings.found] + [said.getvalue(), error]
    noticed = any(file.name in text or str(file.parent) in text for text in texts)
    if after is not None:
        for kind, wanted in state.items():  # what a driver takes over is what was there
            for name, value in after[kind].items():
                same = {key: part for key, part in wanted[name].items() if key not in ("params", "history")}
                got = {key: part for key, part in value.items() if key not in ("params", "history")}
                assert got == same, f"{kind} {name} of the driver changed"
    if noticed:
        return "noticed"
    flip(root / file, at, bit)  # the driver writes: compare what was there before it
    flip(root / file, at, bit)
    found = values(root)
    changed = [name for name in whole if whole[name] != found.get(name)]
    assert not changed, f"unnoticed, and {changed} changed"
    return "harmless"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    started, rng = time.perf_counter(), random.Random(f"flips {args.seed}")
    results: Counter[str] = Counter()
    faults = 0
    with tempfile.TemporaryDirectory() as temporary:
        work, kept = Path(temporary) / "work", Path(temporary) / "kept"
        with contextlib.redirect_stderr(io.StringIO()):
            make(work)
            whole, state = values(work), resumed(work)
        shutil.copytree(work, kept)
        files = [path.relative_to(kept) for path in sorted(kept.rglob("*")) if path.is_file() and path.stat().st_size]
        for _ in range(args.count):
            file = rng.choice(files)
            at, bit = rng.randrange((kept / file).stat().st_size), rng.randrange(8)
            shutil.rmtree(work)
            shutil.copytree(kept, work)  # at the same place: the paths in the files are absolute
            try:
                results[f"{file.suffix or file.name} {check(work, file, at, bit, whole, state)}"] += 1
            except Exception as error:
                faults += 1
                print(f"FAULT {file} byte {at} bit {bit}: {type(error).__name__}: {error}"[:400], flush=True)
    seconds = time.perf_counter() - started
    print(f"{args.count} flips, seed {args.seed}, over {len(files)} files: {faults} faults, {seconds:.0f} s")
    print(", ".join(f"{name} {number}" for name, number in sorted(results.items())))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
