"""Which changes of the core do its own tests notice: `python -m mutation.mutants_run --count 500 --seed 0`.

From the folder tests. Works on a copy of the tree. For each module, some of its changes (`mutation_operators`) are
drawn at random; each is written into the copy, and the module's own tests run until the first fails: those first that
reach the changed line. A change that none notices is printed; it needs a test, or a reason in equivalents.toml.

Why a tool of ours: cosmic-ray and its kind start an interpreter for each change, and importing torch takes longer than
these tests; here the imports are made once and each change is tested in a fork. mutmut 3 forks, too, but puts all
changes into one module behind functions that choose, which torch.fx and torch.compile trace into, and changes neither
the top of a module nor decorated functions.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mutation.mutation_operators import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = "tests/sweeps"
TARGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "losses": ("synq/losses.py", ("tests/losses/test_losses.py",)),
    "fake_quant": ("synq/quant/fake_quant.py", ("tests/quant/test_fake_quant.py",)),
    "observers": ("synq/quant/observers.py", ("tests/quant/test_observers.py",)),
    "lowpass": ("synq/synthesis/lowpass.py", ("tests/synthesis/test_lowpass.py",)),
    "gradcam": ("synq/network/gradcam.py", ("tests/network/test_gradcam.py",)),
    "bn_stats": ("synq/network/bn_stats.py", ("tests/network/test_bn_stats.py",)),
    "integer_form": ("synq/quant/integer_form.py", ("tests/quant/test_integer_form.py",)),
    "ranking": (
        "sweeps/leaderboard/ranking.py",
        tuple(f"{SWEEPS}/leaderboard/test_{name}.py" for name in ("ranking", "tables", "leaderboard")),
    ),
    "lease": ("sweeps/storage/lease.py", (f"{SWEEPS}/storage/test_lease.py",)),
    "ledger": (
        "sweeps/state/ledger.py",
        (f"{SWEEPS}/state/test_ledger.py", f"{SWEEPS}/state/test_recovery.py", f"{SWEEPS}/driver/test_search.py"),
    ),
}
IMPORTED = "ignore::pytest.PytestAssertRewriteWarning"
"""Plugins of pytest are imported before the fork."""
LEAST_SECONDS = 20.0
"""Shortest limit of processor time for the tests of a change; a change may make a loop endless."""


class Selection:
    """A plugin of pytest that chooses and orders tests, and notes which lines of a file each of them reaches."""

    def __init__(self, file: Path | None = None, chosen: Sequence[str] | None = None) -> None:
        self.file = None if file is None else str(file)
        self.chosen = chosen
        self.lines: dict[str, set[int]] = defaultdict(set)
        self.seconds: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the chosen tests, in their order."""
        if self.chosen is not None:
            known = {item.nodeid: item for item in items}
            items[:] = [known[name] for name in self.chosen if name in known]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Trace a test."""
        if self.file is None:
            return (yield)
        reached = self.lines[item.nodeid]

        def in_file(frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
            if event == "line":
                reached.add(frame.f_lineno)
            return in_file

        def any_call(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
            if frame.f_code.co_filename != self.file:
                return None
            reached.add(frame.f_lineno)
            return in_file

        threading.settrace(any_call)
        sys.settrace(any_call)
        begun = time.process_time()
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            self.seconds[item.nodeid] = time.process_time() - begun


def copied(folder: Path) -> Path:
    """Copy the files of the tree that are under version control, or would be, and return the copy."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink() or source.exists():
            shutil.copy2(source, target, follow_symlinks=False)
    return folder


def in_fork(work: Callable[[], int], seconds: float) -> str:
    """Do the work in a fork with a limit of processor time, and return how it ended: "0", another code, or "time"."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
            quiet = os.open(os.devnull, os.O_WRONLY)
            if not os.environ.get("MUTANTS_SHOW"):
                os.dup2(quiet, 1)
                os.dup2(quiet, 2)
            code = int(work())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    until = time.monotonic() + 10 * seconds + 60
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    else:
        os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        return "time"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what the tests started and did not end
    return "time" if os.WIFSIGNALED(status) else str(os.waitstatus_to_exitcode(status))


def run_tests(tree: Path, files: Sequence[str], plugin: Selection, scratch: Path, *, write: bool) -> int:
    """Run tests of the copy in this process."""
    sys.dont_write_bytecode = not write
    os.chdir(tree)
    sys.path[:0] = [str(tree), str(tree / "tests")]
    os.environ["PYTHONPATH"] = f"{tree}{os.pathsep}{tree / 'tests'}"
    existing = [str(tree / name) for name in files if (tree / name).exists()]
    words = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-W", IMPORTED, f"--basetemp={scratch / 'pytest'}"]
    return int(pytest.main([*words, *existing], plugins=[plugin]))


def prepare(tree: Path, target: str, scratch: Path) -> tuple[dict[str, set[int]], dict[str, float]]:
    """Run the tests of a target unchanged; return the lines and the seconds of each test. Imports what they import.

    Raises:
        RuntimeError: The tests fail without any change.
    """
    name, files = TARGETS[target]
    notes = scratch / "notes.json"

    def work() -> int:
        plugin = Selection(tree / name)
        code = run_tests(tree, files, plugin, scratch, write=True)
        own = [key for key, module in list(sys.modules.items()) if str(tree) in str(getattr(module, "__file__", ""))]
        others = [key for key in sys.modules if key not in own and key.split(".")[0] not in ("conftest", "synq")]
        found = {"lines": {key: sorted(value) for key, value in plugin.lines.items()}, "seconds": plugin.seconds}
        notes.write_text(json.dumps({**found, "modules": others}))
        return code

    code = in_fork(work, 600)
    if code != "0":
        raise RuntimeError(f"the tests of {target} must pass without a change, but ended with {code}")
    found = json.loads(notes.read_text())
    for module in found["modules"]:
        if module not in sys.modules:
            with contextlib.suppress(Exception):  # parts that only exist after another was set up
                importlib.import_module(module)
    return {key: set(value) for key, value in found["lines"].items()}, found["seconds"]


def judge(
    tree: Path, target: str, mutant: Mutant, lines: dict[str, set[int]], seconds: dict[str, float], scratch: Path
) -> str:
    """Return "killed" or "survived"."""
    name, files = TARGETS[target]
    file = tree / name
    before, times = file.read_text(), file.stat()
    last = mutant.line + mutant.before.count("\n")
    reach = [test for test, reached in lines.items() if any(mutant.line <= line <= last for line in reached)]
    first = sorted(reach, key=lambda test: seconds[test])
    rest = [test for test in sorted(lines, key=lambda test: seconds[test]) if test not in reach]
    try:
        file.write_text(mutant.apply(before))
        for part in (first, rest):  # a test that did not reach the line may share what another one computed
            limit = LEAST_SECONDS + 4 * sum(seconds[test] for test in part)
            if part:
                chosen = Selection(chosen=part)
                code = in_fork(lambda: run_tests(tree, files, chosen, scratch, write=False), limit)  # noqa: B023
                if code not in ("0", "5"):
                    return "killed"
    finally:
        file.write_text(before)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        shutil.rmtree(scratch / "pytest", ignore_errors=True)
    return "survived"


def equivalents() -> dict[tuple[str, str, str, str], str]:
    """Return the reasons of the changes that change nothing, by module, function and change."""
    content = tomllib.loads((Path(__file__).parent / "equivalents.toml").read_text())
    keys = ("module", "function", "before", "after")
    return {tuple(str(one[key]) for key in keys): str(one["reason"]) for one in content["equivalent"]}  # type: ignore[misc]


def drawn(target: str, count: int, seed: int) -> list[Mutant]:
    """Return `count` changes of a target, drawn at random, in the order of the lines."""
    found = mutants_of((ROOT / TARGETS[target][0]).read_text())
    chosen = random.Random(f"{target} {seed}").sample(found, min(count, len(found)))
    return sorted(chosen, key=lambda one: (one.start, one.after))


def main(argv: list[str] | None = None) -> int:
    """Draw changes, test each, print the survivors and a table; the exit code is 1 if one survived unexplained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=420, help="changes of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--log", type=Path, help="file that gets one line of JSON for each change")
    parser.add_argument("--again", type=Path, help="log of an earlier run: only the changes that survived there")
    args = parser.parse_args(argv)
    os.nice(5)
    known, table = equivalents(), {}
    earlier = [json.loads(line) for line in args.again.read_text().splitlines()] if args.again else []
    survived = {(one["target"], one["change"]) for one in earlier if one["result"] == "survived"}
    for place, target in enumerate(args.targets):
        share = args.count // len(args.targets) + (place < args.count % len(args.targets))
        chosen = drawn(target, share, args.seed)
        chosen = [one for one in chosen if not args.again or (target, one.describe()) in survived]
        if chosen:
            table[target] = _target(target, chosen, known, args.log)
    for target, results in table.items():
        print(f"{target}: {dict(results)}", flush=True)
    total = sum(table.values(), Counter())
    number, killed = sum(total.values()), total["killed"]
    share_killed = 100 * killed / max(number, 1)
    print(f"{number} changes, seed {args.seed}: {killed} killed ({share_killed:.1f} %), {dict(total)}")
    return 1 if total["survived"] else 0


def _target(
    target: str, chosen: Sequence[Mutant], known: dict[tuple[str, str, str, str], str], log: Path | None
) -> "Counter[str]":
    """Test the changes of one target; each target has a process and a copy of the tree for itself."""
    results: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        tree, scratch = copied(Path(folder) / "tree"), Path(folder)
        lines, seconds = prepare(tree, target, scratch)
        nothing = Mutant(line=0, function="", before="", after="", start=0, end=0)
        if judge(tree, target, nothing, lines, seconds, scratch) != "survived":
            raise RuntimeError(f"the tests of {target} must pass in a fork without a change, but they fail")
        for mutant in chosen:
            begun = time.perf_counter()
            if (target, mutant.function, mutant.before, mutant.after) in known:
                result = "equivalent"
            else:
                result = judge(tree, target, mutant, lines, seconds, scratch)
            results[result] += 1
            if result == "survived":
                print(f"SURVIVED {target} {mutant.describe()}", flush=True)
            if log is not None:
                one = {"target": target, "change": mutant.describe(), "result": result}
                with log.open("a") as file:
                    file.write(json.dumps({**one, "seconds": round(time.perf_counter() - begun, 1)}) + "\n")
    print(f"{target}: {len(chosen)} changes, {dict(results)}", flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main())
