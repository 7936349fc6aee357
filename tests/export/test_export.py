"""Export of a finished run: files with the student's logits, and a model card that describes them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from synq.commands.export import main
from synq.export.card import card_values, siblings_of
from synq.export.card_text import NOISE, SELECTED, STATEMENT, card_markdown
from synq.export.export import ExportOptions
from synq.export.load import load_student
from synq.export.out_folder import DRAFT
from synq.export.packed import load_packed
from synq.quant.integer_form import integer_form
from synq.runs.finished import open_run
from synq.runs.record import DEPLOYED, read_record, write_record

ANY = ["--agreement", "0", "--mean-difference", "9"]
"""Of an untrained tiny student nearly every logit is a tie."""


@pytest.fixture(scope="module")
def exported(finished: Path) -> Path:
    assert main([str(finished), "--container", "int8", "int4", "--rounds", "3", "--threads", "1", *ANY]) == 0
    return finished / "export"


def test_every_file_is_there_and_described(finished: Path, exported: Path) -> None:
    names = {"model_int8.onnx", "model_int4.onnx", "model.safetensors", "model.pt2", "README.md", "card.json"}
    assert {path.name for path in exported.iterdir()} == names
    record = read_record(finished / "record.json")
    figures = record.deployment
    files = {file["name"]: file for file in figures["files"]}
    assert files.keys() == names - {"README.md", "card.json"}
    for name, file in files.items():
        assert file["bytes"] == (exported / name).stat().st_size
        synthetic, labeled = file["comparisons"]
        assert (synthetic["source"], labeled["source"], labeled["images"]) == (
            "synthetic",
            "labeled",
            record.num_eval,
        )
        assert synthetic["images"] == sum(
            record.config[a][b] for a, b in (("synthesis", "num_images"), ("evaluation", "heldout_images"))
        )
        assert labeled["student_top1"] == record.top1 == labeled["file_top1"], "what the run promised"
        assert labeled["agreement_all"] == 100 if name != "model.pt2" else labeled["agreement_all"] > 99
        assert labeled["max_difference"] == 0 or name == "model.pt2", "the very logits"
    assert figures["packed_bytes"] == files["model.safetensors"]["bytes"] < 0.3 * figures["float_bytes"]
    assert figures["onnx_bytes"] == files["model_int8.onnx"]["bytes"] > files["model_int4.onnx"]["bytes"]
    first = files["model_int8.onnx"]
    assert figures.get("latency_ms") == first["latency_ms"] and figures["latency_spread"] >= first["latency_spread"]
    if figures.get("latency_ms") is not None:  # on a busy machine none is stored
        ratio = figures["latency_ms"] / figures["float_latency_ms"]
        assert 0.5 * ratio < figures["latency_ratio"] == first["latency_ratio"] < 2 * ratio
    assert figures["bitops"] == record.bitops and figures["float_onnx_bytes"] > figures["onnx_bytes"]


def test_the_packed_file_alone_gives_the_model(finished: Path, exported: Path) -> None:
    student = open_run(finished).student
    sample = torch.randn(4, 1, 16, 16)
    assert torch.equal(load_student(exported / "model.safetensors")(sample), integer_form(student.net)(sample))
    program = torch.export.load(exported / "model.pt2").module()
    assert torch.allclose(program(sample), integer_form(student.net)(sample), atol=1e-4)


def test_the_cards_example_runs(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (exported / "README.md").read_text()
    examples = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    monkeypatch.chdir(exported)
    for code, kind in zip(examples, ("onnxruntime", "torch.export", "load_student"), strict=True):
        assert len(code.strip().splitlines()) <= 10 and kind in code
        exec(code, {})
        assert "[" in capsys.readouterr().out
    card = json.loads((exported / "card.json").read_text())
    assert card["weight_bits"] == 4 and card["data_free"] and STATEMENT in text
    for fact in (card["teacher"]["digest"][:16], "protocol A", "act_points inputs", "model_int4.onnx", "SynQ"):
        assert fact in text
    assert json.loads(text.split("```json\n")[1].split("```")[0])["finetune"] == card["config"]["finetune"]


def test_a_student_that_is_not_the_measured_one_is_not_exported(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    run = tmp_path / "runs" / finished.name
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("export"))
    tensors = load_file(run / "student.safetensors")
    last = max((name for name in tensors if name.endswith("weight") and tensors[name].ndim == 2), key=len)
    save_file({**tensors, last: tensors[last].flip(0).contiguous()}, run / "student.safetensors")
    out = tmp_path / "out"
    assert main([str(run), "--formats", "packed", "--out", str(out), *ANY]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("synq: error: `") and "its digest: it is damaged" in line and not out.exists()


def test_the_card_knows_the_other_seeds_of_its_settings(finished: Path, tmp_path: Path) -> None:
    record = read_record(finished / "record.json")
    for seed, top1, changes in ((1, 50.0, {}), (2, 60.0, {}), (3, 0.0, {"quant.calib_images": 8})):
        other = {**record.config, "seed": seed, "data_seed": seed}
        for key, value in changes.items():
            part, name = key.split(".")
            other[part] = {**other[part], name: value}
        write_record(
            tmp_path / f"run-{seed}" / "record.json",
            replace(record, config=other, seed=seed, data_seed=seed, top1=top1),
        )
    own = tmp_path / "run-own"
    own.mkdir()
    found = siblings_of(replace(record, top1=40.0), own)
    assert [run.top1 for run in found] == [40.0, 50.0, 60.0]
    accuracy = card_values(replace(record, deployment=record.deployment or {}), found)["accuracy"]
    assert (accuracy["top1_mean"], accuracy["top1_std"], len(accuracy["seeds"])) == (50.0, 10.0, 3)


def test_a_selected_student_does_not_claim_to_be_free_of_data(finished: Path, exported: Path) -> None:
    record = replace(read_record(finished / "record.json"), objective="selection")
    text = card_markdown(card_values(record, [record]))
    assert SELECTED in text and STATEMENT not in text
    noise = {**record.config, "synthesis": {**record.config["synthesis"], "method": "gaussian"}}
    text = card_markdown(card_values(replace(record, objective="synthetic", config=noise), [record]))
    assert NOISE in text and STATEMENT not in text
    own = {**record.config, "synthesis": {**record.config["synthesis"], "method": "/opt/mine.py:images@1a2b"}}
    values = card_values(replace(record, objective="synthetic", config=own), [record])
    text = card_markdown(values)
    assert not values["data_free"] and STATEMENT not in text and "a function of its maker, mine.py:images@1a2b" in text


def test_a_moved_run_gets_the_path_of_its_images(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("export"))
    record = read_record(folder / "record.json")
    there = {**record.config, "runtime": {**record.config["runtime"], "store_dir": str(tmp_path / "gone")}}
    write_record(folder / "record.json", replace(record, config=there))
    words = [str(folder), "--formats", "packed", "--rounds", "0", *ANY]
    assert main(words) == 2
    assert "give its new folder by `--runtime.store_dir`" in capsys.readouterr().err
    shutil.copytree(finished.parent / "store", tmp_path / "images")
    assert main([*words, "--runtime.store_dir", str(tmp_path / "images")]) == 0
    after = read_record(folder / "record.json")
    assert after.deployment["packed_bytes"] and after.config == there, "the record stays that of its run"
    assert main([*words, "--quant.act_bits", "8"]) == 2
    assert "`--quant.act_bits` must be an option of this command, but is not" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"`path_overrides` must be one of teacher\.spec"):
        ExportOptions(path_overrides={"quant.act_bits": 8})


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed files come back with their logits turned around."""

    def load(path: Path, student: fx.GraphModule) -> nn.Module:
        return nn.Sequential(load_packed(path, student), Turned())

    monkeypatch.setattr("synq.export.files.load_packed", load)


class Turned(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return -logits


@pytest.mark.usefixtures("broken")
def test_the_command_reports_rejected_files_in_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(finished), "--formats", "packed", "--out", str(tmp_path / "x")]) == 1
    line = capsys.readouterr().err
    assert line.startswith("synq: error: model.safetensors was not written: it predicts another class")
    assert line.count("\n") == 1 and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--agreement", "101"], "`agreement` must be a number in [0, 100], but got 101"),
        (["--mean-difference", "nan"], "`mean_difference` must be a finite number >= 0"),
        (["--margin", "-1"], "`margin` must be"),
        (["--rounds", "-1"], "`rounds` must be"),
        (["--threads", "-1"], "`threads` must be"),
        (["--formats", "packed", "--container", "int4"], "`container` must be left out"),
    ],
)
def test_invalid_options_are_rejected(
    finished: Path, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(finished), *words]) == 2
    assert complaint in capsys.readouterr().err


def test_nothing_of_others_is_overwritten(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("precious")
    (tmp_path / "file").write_text("precious")
    words = [str(finished), "--formats", "packed", "--rounds", "0", *ANY, "--out"]
    for place, complaint in ((mine, "has README.md and no card.json of an export"), (tmp_path / "file", "is a file")):
        assert main([*words, str(place)]) == 2
        assert complaint in capsys.readouterr().err
    (mine / "card.json").write_text('{"cards": 52}')
    assert main([*words, str(mine)]) == 2
    assert (mine / "README.md").read_text() == "precious" and len(list(mine.iterdir())) == 2
    (mine / DRAFT).mkdir()  # killed while it put its files in place
    assert main([*words, str(mine)]) == 0
    assert "card_version" in (mine / "card.json").read_text() and not (mine / DRAFT).exists()


def test_a_narrower_export_leaves_the_figures_of_the_tables(finished: Path, exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("export"))
    figures = dict.fromkeys(DEPLOYED, 3)
    write_record(
        folder / "record.json", replace(read_record(folder / "record.json"), deployment={**figures, "files": []})
    )
    assert main([str(folder), "--formats", "packed", "--rounds", "0", "--out", str(tmp_path / "side"), *ANY]) == 0
    after = read_record(folder / "record.json").deployment
    size = (tmp_path / "side" / "model.safetensors").stat().st_size
    assert [file["format"] for file in after["files"]] == ["packed"]
    assert {name: after[name] for name in DEPLOYED} == {**figures, "packed_bytes": size}


def damaged(change: Callable[[Path], None]) -> Callable[[Path, Path], Path]:
    def copy(finished: Path, tmp_path: Path) -> Path:
        shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns("export"))
        change(tmp_path / "copy")
        return tmp_path / "copy"

    return copy


def test_a_trial_of_a_sweep_is_exported_by_its_record_and_the_sweep_knows(finished: Path, tmp_path: Path) -> None:
    record = read_record(finished / "record.json")
    folder = tmp_path / "runs" / finished.name
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("export"))
    write_record(folder / "record.json", replace(record, deployment={}))
    write_record(tmp_path / "records" / "t1.json", replace(record, name="t1", deployment={}))
    write_record(tmp_path / "records" / "t2.json", replace(record, name="t2", config_digest="0" * 16, deployment={}))
    words = ["--formats", "packed", "--rounds", "0", "--out", str(tmp_path / "out"), *ANY]
    assert main([str(tmp_path / "records" / "t1.json"), *words]) == 0
    own, first, other = (
        read_record(path)
        for path in (folder / "record.json", tmp_path / "records" / "t1.json", tmp_path / "records" / "t2.json")
    )
    assert own.deployment == first.deployment and first.name == "t1" and other.deployment == {}
    assert own.deployment["packed_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert own.deployment["onnx_bytes"] is None


def test_an_export_is_whole_whatever_lies_around(
    finished: Path,
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "runs" / finished.name
    shutil.copytree(finished, folder)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "x.json").write_text("{")
    (tmp_path / "runs" / "run-other").mkdir()
    (tmp_path / "runs" / "run-other" / "record.json").write_text("[]")
    (folder / "export" / "mine.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (folder / "export").iterdir()}
    # Rejected: the earlier files stay, including the card.
    request.getfixturevalue("broken")
    assert main([str(folder), "--formats", "packed"]) == 1
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (folder / "export").iterdir()} == before
    # Done: files of the export before are gone, those of others are not.
    assert main([str(folder), "--formats", "packed", "--rounds", "0", *ANY]) == 0
    assert {p.name for p in (folder / "export").iterdir()} == {
        "model.safetensors",
        "README.md",
        "card.json",
        "mine.txt",
    }
    capsys.readouterr()
    assert not list(folder.glob(".*draft"))


def test_images_that_are_gone_are_not_made_anew(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / finished.name, ignore=shutil.ignore_patterns("export"))
    path = tmp_path / finished.name / "record.json"
    record = read_record(path)
    runtime = {**record.config["runtime"], "store_dir": str(tmp_path / "store")}
    write_record(path, replace(record, config={**record.config, "runtime": runtime}))
    assert main([str(path.parent)]) == 2
    assert "must find its synthetic images, but" in capsys.readouterr().err and not (tmp_path / "store").exists()


def rewrite(path: Path, **fields: Any) -> None:
    """Replace fields of a record in its file."""
    write_record(path, replace(read_record(path), **fields))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda finished, tmp: tmp, "`RUN` must hold record.json, but"),
        (damaged(lambda f: (f / "record.json").unlink()), "it is not finished, start its command again"),
        (damaged(lambda f: (f / "student.safetensors").unlink()), "must hold student.safetensors"),
        (damaged(lambda f: (f / "student.safetensors").write_bytes(b"\0" * 64)), "student.safetensors"),
        (damaged(lambda f: rewrite(f / "record.json", status="failed", reason="NaN")), "is failed: NaN"),
        (damaged(lambda f: rewrite(f / "record.json", teacher={"digest": "0"})), "of other weights"),
    ],
)  # fmt: skip
def test_a_folder_without_a_finished_run_is_rejected(
    make: Callable[[Path, Path], Path], message: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(make(finished, tmp_path))]) == 2
    line = capsys.readouterr().err
    assert line.startswith("synq: error: ") and message in line and line.count("\n") == 1


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"`formats` must be one of onnx, packed, torch, but got 'onxx'; did you mean"):
        ExportOptions(formats=["onxx"])
    with pytest.raises(ValueError, match="`container` must be one of int4, int8, matmul"):
        ExportOptions(containers=["int2"])  # type: ignore[list-item]
