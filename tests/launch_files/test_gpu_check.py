"""`.ci/gpu`: one line where no GPU is, parts that end by themselves or are ended, and a page that has all of them."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.source_tree import ROOT


def _script(name: str) -> Any:
    """A script of launch/, which finds its neighbors as it does when it is started."""
    sys.path.insert(0, str(ROOT / "launch"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "launch"))


gpu_check, gpu_parts = _script("gpu_check"), _script("gpu_parts")


def test_without_a_gpu_nothing_runs_and_one_line_explains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "run_part", lambda *_: pytest.fail("a part ran"))
    folder = tmp_path / "out"
    assert gpu_check.main(["--output-dir", str(folder)]) == gpu_check.NO_GPU == 3
    printed = capsys.readouterr().err
    assert "no CUDA device here" in printed and printed.count("\n") == 1 and not folder.exists()
    assert gpu_check.main(["--device", "cpu", "--output-dir", str(folder)]) == 2
    assert "must come with `--quick`" in capsys.readouterr().err


def test_the_parts_fit_into_eight_minutes() -> None:
    given = gpu_check._arguments([])
    assert given.limit < 480 and all(limit <= given.limit for _, limit in gpu_parts.PARTS.values())
    text = (ROOT / ".ci" / "gpu").read_text()
    assert "launch/gpu_check.py" in text and "3: no GPU here" in text
    for line in text.splitlines():
        if line.startswith("#   .ci/gpu --"):
            gpu_check._arguments(line.partition(".ci/gpu")[2].split("   ")[0].split())


PART = """
import sys, time
name = sys.argv[1]
print("a line of the part")
if name == "slow": time.sleep(60)
if name == "absent": print("needs what is not here"); sys.exit(77)
if name == "broken": print("ValueError: one reason"); sys.exit(1)
if name == "silent": sys.exit(0)
print('{"figure": 3, "other": "x"}')
print("a warning of a library at exit", file=sys.stderr)
"""


def test_a_part_passes_is_skipped_fails_or_is_ended_and_the_page_has_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "gpu_parts.py").write_text(PART)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 0)
    names = ("good", "absent", "broken", "slow")
    limits = {name: (None, 2 if name == "slow" else 30) for name in (*names, "silent")}
    monkeypatch.setattr(gpu_check, "PARTS", limits)
    folder = tmp_path / "out"
    folder.mkdir()
    results: list[dict[str, Any]] = [gpu_check.run_part(name, "cpu", gpu_parts.FULL, folder, 60.0) for name in names]
    results.append(gpu_check.run_part("good", "cpu", gpu_parts.FULL, folder, -1.0))
    silent = gpu_check.run_part("silent", "cpu", gpu_parts.FULL, folder, 60.0)
    assert (silent["status"], silent["detail"]) == ("failed", "printed no values (silent.log)")
    assert [one["status"] for one in results] == ["passed", "skipped", "failed", "failed", "skipped"]
    assert results[0]["values"] == {"figure": 3, "other": "x"} and results[1]["detail"] == "needs what is not here"
    assert "ValueError: one reason" in results[2]["detail"] and "took longer than 2 s" in results[3]["detail"]
    assert results[4]["detail"] == "no time left (--limit)"
    gpu_check.write_report(folder, gpu_check._arguments(["--device", "cpu", "--quick"]), results)
    assert [one["status"] for one in json.loads((folder / "gpu.json").read_text())["parts"]] == [
        one["status"] for one in results
    ]
    page = (folder / "gpu.md").read_text()
    assert all(one["detail"] in page for one in results) and "no GPU: the parts themselves were tested" in page


def test_one_process_reduces_a_tensor(tmp_path: Path) -> None:
    found = gpu_parts.collective("cpu", gpu_parts.QUICK, tmp_path)
    assert (found["backend"], found["processes"], found["values"]) == ("gloo", 1, 1024)
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_small_forms_of_the_parts_run_on_a_processor_without_ray(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n\n\nclass NoRay:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('ray', 'optuna'):\n            raise ImportError(name)\n\n\n"
        "sys.meta_path.insert(0, NoRay())\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    names = ["collective", "memory_fraction", "tests", "resnet20", "students"]
    done = subprocess.run(
        [
            *(ROOT / ".ci" / "gpu", "--device", "cpu", "--quick", "--limit", "800"),
            *("--output-dir", str(tmp_path / "out"), "--only", *names),
        ],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = {one["part"]: one for one in json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]}
    skipped = {name for name, one in parts.items() if one["status"] == "skipped"}
    assert list(parts) == names and skipped == {"memory_fraction", "tests"}
    assert "not trained again" not in (tmp_path / "out" / "students.log").read_text()
    assert parts["resnet20"]["values"]["status"] == "completed" and parts["students"]["values"]["students"] == 2
