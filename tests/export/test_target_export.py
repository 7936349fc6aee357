"""A student for an engine, from its run to its file: one network in the record, the simulation and the engine."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


from synq.commands.export import main
from synq.config.quant import TARGETS
from synq.config.run import RunConfig, with_overrides
from synq.engines.deployed import deployed_network, program_of
from synq.engines.program import Program
from synq.engines.simulation import Simulation
from synq.evaluation.measure import Measure
from synq.export.card_text import SLOWER, card_markdown, session_warning
from synq.export.export import ExportOptions
from synq.export.files import Checker, ExportRejectedError
from synq.export.targets.export import export_target
from synq.export.targets.formats import FORMATS, format_of, missing_note
from synq.export.verify import Tolerance, engine_of, open_session
from synq.pipeline import run
from synq.runs.finished import Run, open_run
from synq.runs.record import read_record, run_folder


@pytest.fixture(scope="module")
def for_engine(tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, object]) -> Path:
    """The folder of a finished run of a W4A4 student for ONNX Runtime."""
    folder = str(tmp_path_factory.mktemp("engine"))
    config = with_overrides(
        RunConfig(),
        {**tiny_settings, "runtime.output_dir": folder, "quant.weight_bits": 4, "quant.target": "onnxruntime"},
    )
    run(config)
    return run_folder(config)


@pytest.fixture(scope="module")
def exported(for_engine: Path) -> Path:
    assert main([str(for_engine), "--rounds", "3"]) == 0
    return for_engine / "export"


def _checker(opened: Run, program: Program) -> Checker:
    """Return the comparison of files with the simulation of a program, on 64 images of noise."""
    return Checker(
        form=Simulation(program),
        simulated=opened.student.net,
        images={"synthetic": torch.randn(64, *opened.teacher.input_size)},
        measure=Measure.prepare(
            with_overrides(opened.config, {"evaluation.dataset": "none"}).evaluation,
            opened.teacher,
            Accelerator(cpu=True),
            quant=opened.config.quant,
        ),
        tolerance=Tolerance(agreement=0, mean_difference=9),
        exact=True,
    )


def test_the_file_is_the_student_to_the_last_bit(for_engine: Path, exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {"model.onnx", "README.md", "card.json"}
    record = read_record(for_engine / "record.json")
    (file,) = record.deployment["files"]
    assert (file["name"], file["container"], file["float_kernels"]) == ("model.onnx", "onnxruntime", 0)
    for found in file["comparisons"]:
        assert found["identical"] == found["images"] > 0 and found["max_difference"] == 0
    assert file["comparisons"][1]["file_top1"] == record.top1, "what the run promised is what the file does"
    assert record.act_points == "onnxruntime" and record.deployment["exact"]
    student = open_run(for_engine)
    images = torch.randn(7, *student.teacher.input_size, generator=torch.Generator().manual_seed(0))
    session = open_session((exported / "model.onnx").read_bytes(), entries=file["session_entries"])
    network = deployed_network(student.student.net, student.config.quant, student.teacher.input_size)
    assert torch.equal(engine_of(session)(images), network(images))


def test_a_student_for_litert_is_its_file_to_the_last_bit(
    tmp_path: Path,
    tiny_settings: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("ai_edge_litert")
    given = {"runtime.output_dir": str(tmp_path), "quant.weight_bits": 4, "quant.target": "litert"}
    config = with_overrides(RunConfig(), {**tiny_settings, **given})
    run(config)
    folder = run_folder(config)
    assert main([str(folder), "--rounds", "2"]) == 0
    assert {path.name for path in (folder / "export").iterdir()} == {"model.tflite", "README.md", "card.json"}
    record = read_record(folder / "record.json")
    (file,) = record.deployment["files"]
    assert all(found["identical"] == found["images"] > 0 for found in file["comparisons"])
    assert file["comparisons"][1]["file_top1"] == record.top1 and record.deployment["engine"] == "LiteRT"
    (code,) = (part.split("```")[0] for part in (folder / "export/README.md").read_text().split("```python\n")[1:])
    monkeypatch.chdir(folder / "export")
    exec(code, {})
    assert "[" in capsys.readouterr().out


def test_a_student_for_openvino_agrees_with_its_file(tmp_path: Path, tiny_settings: dict[str, object]) -> None:
    pytest.importorskip("openvino")
    given = {"runtime.output_dir": str(tmp_path), "quant.weight_bits": 8, "quant.act_bits": 8}
    config = with_overrides(RunConfig(), {**tiny_settings, **given, "quant.target": "openvino"})
    run(config)
    folder = run_folder(config)
    assert main([str(folder), "--rounds", "2"]) == 0
    (file,) = read_record(folder / "record.json").deployment["files"]
    assert all(found["agreement_all"] >= 99 for found in file["comparisons"])
    assert "in OpenVINO: the student's class for" in (folder / "export/README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("target", "engine"), [("tensorrt", "TensorRT"), ("qnn", "QNN HTP")])
def test_a_student_for_an_engine_that_does_not_run_here(
    target: str,
    engine: str,
    tmp_path: Path,
    tiny_settings: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Record and card name what was checked, and that nothing was run or timed in the engine."""
    given = {"runtime.output_dir": str(tmp_path), "quant.weight_bits": 4, "quant.act_bits": 8}
    config = with_overrides(RunConfig(), {**tiny_settings, **given, "quant.target": target})
    run(config)
    folder = run_folder(config)
    assert main([str(folder), "--rounds", "2"]) == 0
    record = read_record(folder / "record.json")
    (file,) = record.deployment["files"]
    assert all(found["agreement_all"] == 100 for found in file["comparisons"])
    assert file["integer_kernels"] is None and file["latency_ms"] is None
    assert (record.deployment["checked_for"], record.deployment["exact"]) == (engine, False)
    assert record.deployment["conformance"][target]["violations"] == 0
    text = (folder / "export/README.md").read_text()
    assert f"against the published rules of {engine}, all kept; not run in it" in text
    assert f"not measured: {engine} does not run here" in text
    (code,) = (part.split("```")[0] for part in text.split("```python\n")[1:])
    monkeypatch.chdir(folder / "export")
    exec(code, {})
    assert "[" in capsys.readouterr().out


def test_a_run_in_float64_records_what_the_file_does(tmp_path: Path, tiny_settings: dict[str, object]) -> None:
    given = {"runtime.output_dir": str(tmp_path), "quant.target": "onnxruntime", "runtime.precision": "fp64"}
    config = with_overrides(RunConfig(), {**tiny_settings, **given})
    record = run(config)
    opened = open_run(run_folder(config))
    from accelerate import Accelerator

    evaluation, quant = opened.config.evaluation, opened.config.quant
    measure = Measure.prepare(evaluation, opened.teacher, Accelerator(cpu=True), quant=quant)
    measure.hold_out(opened.synthetic_sets()[1].images)
    student = opened.student.net
    taken = measure.deployed_form(student.double())
    assert isinstance(taken, Simulation)
    found = measure(student.float())
    assert found.top1 == record.top1
    assert found.fidelity["kl"] == pytest.approx(record.fidelity["kl"], rel=1e-4)


def test_the_card_names_engine_and_target(for_engine: Path, exported: Path) -> None:
    text = (exported / "README.md").read_text()
    for fact in (
        "protocol B (8/8)",
        "target onnxruntime",
        "in ONNX Runtime: every logit of",
        "bit-identical",
        "QNN HTP ",
    ):
        assert fact in text
    assert "act_points" not in text.split("## Settings")[0]


def test_a_slow_file_says_so_first() -> None:
    metrics = {
        "latency_ms": 2.0,
        "float_latency_ms": 1.0,
        "latency_ratio": 2.0,
        "latency_spread": 0.01,
        "engine": "ONNX Runtime",
        "machine": {"threads": 1},
        "files": [{"name": "model.onnx", "latency_ms": 2.0, "integer_kernels": 3, "float_kernels": 0}],
    }
    from synq.export.card_text import speed_text

    assert speed_text(metrics).startswith(SLOWER) and "0.50 times as fast" in speed_text(metrics)
    assert not speed_text({**metrics, "latency_ratio": 0.5}).startswith(SLOWER)


def test_a_file_that_differs_in_one_bit_is_not_written(for_engine: Path, tmp_path: Path) -> None:
    opened = open_run(for_engine)
    program = program_of(opened.student.net, opened.config.quant, opened.teacher.input_size)
    form = format_of("onnxruntime")
    first = next(program.layers())
    bias = first.bias.clone()
    bias[0] += 4000
    steps = tuple(replace(step, bias=bias) if step is first else step for step in program.steps)
    check = _checker(opened, program)
    with pytest.raises(ExportRejectedError, match=r"model.onnx was not written: .*bit-identical"):
        export_target(tmp_path, replace(program, steps=steps), form, check)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--formats", "packed"], "`formats` must be left out for a student of target onnxruntime, whose one file is"),
        (["--container", "int4"], "`container` must be left out for a student of target onnxruntime"),
    ],
)
def test_options_of_research_files_are_rejected(
    words: list[str], message: str, for_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(for_engine), "--out", str(tmp_path / "out"), *words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("synq: error: ") and message in line and line.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_engine_has_a_file() -> None:
    assert {*FORMATS} == {*TARGETS} - {"research"}
    with pytest.raises(ValueError, match=r"must be one of .* to write a file, but got abacus"):
        ExportOptions().format_for("abacus")


def test_a_missing_package_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synq.export.targets.formats.find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(ValueError, match=r"onnxruntime is missing: pip install 'synq\[export\]'"):
        ExportOptions().format_for("onnxruntime")


def test_a_second_measurement_gives_the_records_values(for_engine: Path) -> None:
    """Only the teacher's float sums may differ in their last digits."""
    opened, record = open_run(for_engine), read_record(for_engine / "record.json")
    from accelerate import Accelerator

    measure = Measure.prepare(
        opened.config.evaluation, opened.teacher, Accelerator(cpu=True), quant=opened.config.quant
    )
    measure.hold_out(opened.synthetic_sets()[1].images)
    found = measure(opened.student.net)
    assert found.top1 == record.top1 and found.fidelity["kl"] == pytest.approx(record.fidelity["kl"], rel=1e-4)


def test_card_markdown_of_a_mobile_file_has_an_example(exported: Path) -> None:
    import json

    values = json.loads((exported / "card.json").read_text())
    (file,) = values["deployment"]["files"]
    for kind, name, word in (("tflite", "model.tflite", "ai_edge_litert"), ("pte", "model.pte", "executorch.runtime")):
        file |= {"format": kind, "name": name}
        assert word in card_markdown(values) and name in card_markdown(values)


def test_a_missing_package_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synq.export.targets.formats.find_spec", lambda name: None if name == "executorch" else name)
    assert missing_note("executorch").endswith("executorch is needed: pip install 'synq[executorch]'")
    assert missing_note("onnxruntime") == missing_note("research") == ""


def test_without_vnni_a_file_is_verified_with_the_entry_that_it_needs(
    for_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine whose default session computes another network stands for one on such a processor."""
    opened = open_run(for_engine)
    program = program_of(opened.student.net, opened.config.quant, opened.teacher.input_size)
    check = _checker(opened, program)
    right = FORMATS["onnxruntime"]
    form = replace(right, open=lambda content, threads: lambda batch: right.open(content, threads)(batch).flip(1))
    monkeypatch.setattr("synq.export.targets.export.sums_saturate", lambda: False)
    with pytest.raises(ExportRejectedError):
        export_target(tmp_path, program, form, check)
    monkeypatch.setattr("synq.export.targets.export.sums_saturate", lambda: True)
    file, _ = export_target(tmp_path, program, form, check)
    assert file.session_entries == right.session_entries and file.comparisons[0].identical == 64
    assert "session.x64quantprecision = 1" in session_warning(file.session_entries)
