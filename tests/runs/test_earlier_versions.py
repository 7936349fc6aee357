"""Files that an earlier version of SynQ wrote: one line says so and what to do; none is read as if it meant the
same now.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from support.integer_students import student
from support.made_sweeps import made_sweep
from support.small_nets import plain
from synq import train
from synq.commands.export import main as export
from synq.commands.leaderboard import main as leaderboard
from synq.commands.report import main as report
from synq.common.digests import KEY, write_sealed_json
from synq.common.files import read_json
from synq.config.run import RunConfig, config_to_dict, load_run
from synq.export.packed import read_packed, save_packed
from synq.finetune.checkpoints import load_prepared, save_prepared
from synq.quant.integer_form import integer_form
from synq.runs.finished import open_run
from synq.runs.record import SCHEMA_VERSION, RunRecord, read_record, write_config, write_record
from synq.sweeps.reports.sweep_view import read_sweep
from synq.sweeps.state.plans import FORMAT, read_plan, read_sweep_file
from synq.synthesis.dataset import MANIFEST_FILE, load_set

EARLIER = "written by an earlier version of SynQ: "


def rewrite(path: Path, **changes: Any) -> Path:
    """Change keys of a JSON file; None removes a key."""
    content = {**read_json(path), **changes}
    del content[KEY]
    write_sealed_json(path, {key: value for key, value in content.items() if value is not None})
    return path


def rejected(read: Callable[[], object], path: Path, cure: str) -> None:
    with pytest.raises(ValueError, match=f"^`{re.escape(str(path))}` must hold .*{EARLIER}.*{cure}") as caught:
        read()
    assert "\n" not in str(caught.value)


def one_line(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and EARLIER in line


@pytest.mark.parametrize("format", [3, "absent"])
def test_config_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], format: Any) -> None:
    path = tmp_path / "config.json"
    write_config(path, RunConfig())
    assert load_run(path) == RunConfig()
    content = config_to_dict(RunConfig())
    del content["synthesis"]["start"]  # a key that did not exist yet: its default is not what was done then
    path.write_text(json.dumps(content if format == "absent" else {**content, "format": format}))
    rejected(lambda: load_run(path), path, "run it again")
    assert train.main(["--config", str(path)]) == 2
    one_line(capsys, path)


def test_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run" / "record.json"
    path.parent.mkdir()
    write_record(path, RunRecord(config=config_to_dict(RunConfig())))
    assert read_record(path).schema_version == SCHEMA_VERSION
    rewrite(path, schema_version=1)
    rejected(lambda: read_record(path), path, "run it again")
    rejected(lambda: open_run(path.parent), path, "run it again")
    assert export([str(path.parent)]) == 2
    one_line(capsys, path)
    assert leaderboard([str(path.parent), "--print"]) == 2
    one_line(capsys, path)


def test_sweep_and_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = made_sweep(tmp_path / "sweep", trials=2)
    plan = sorted((sweep / "plans").glob("*.json"))[0]
    assert read_json(plan)["format"] == read_json(sweep / "sweep.json")["format"] == FORMAT
    rewrite(plan, format=FORMAT - 1)
    rejected(lambda: read_plan(plan), plan, "run the sweep again in a new folder")
    path = rewrite(sweep / "sweep.json", format=FORMAT - 1)
    rejected(lambda: read_sweep_file(path), path, "begins a new sweep")
    rejected(lambda: read_sweep(sweep), path, "begins a new sweep")
    assert report([str(sweep)]) == 2
    one_line(capsys, path)


def test_packed_student(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_packed(path, integer_form(student(plain()).net))
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in list(file.keys())}
        metadata = dict(file.metadata())
    save_file(tensors, path, metadata | {"version": "2"})
    rejected(lambda: read_packed(path), path, "run it again and export it")


@pytest.mark.parametrize("format", [None, 1])
def test_checkpoint(tmp_path: Path, format: int | None) -> None:
    path, net = tmp_path / "prepared.pt", torch.nn.Linear(2, 2)
    save_prepared(path, "run", net, None, {})
    state = torch.load(path, weights_only=True)
    del state["format"]
    torch.save(state | ({} if format is None else {"format": format}), path)
    rejected(lambda: load_prepared(path, "run", net, net), path, "remove it and run it again")


def test_stored_set(tmp_path: Path) -> None:
    write_sealed_json(tmp_path / MANIFEST_FILE, {"format_version": 1})
    rejected(lambda: load_set(tmp_path), tmp_path, "remove it and run the same command again")
