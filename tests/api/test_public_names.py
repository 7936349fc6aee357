"""The public names of the package: held stable, loaded on first use."""

import inspect
import json
import subprocess
import sys

import synq

NAMES = {
    *(
        "__version__",
        "quantize",
        "synthesize",
        "inspect",
        "load_teacher",
        "open_run",
        "load_student",
        "sweeps",
        "loss_term",
        "synthesis_method",
        "teacher_source",
        "dataset_source",
        "sampler",
    ),
    *(
        "Run",
        "RunConfig",
        "RunRecord",
        "Recount",
        "Export",
        "Inspection",
        "Progress",
        "SyntheticSet",
        "Teacher",
        "LossInputs",
        "SynthesisInputs",
        "SourceModel",
        "SamplerInputs",
    ),
}
ARGUMENTS = {
    "quantize": "model weight_bits act_bits target weights input_size mean std preprocessing images dataset config "
    "quality max_minutes num_images epochs seed device output_dir name progress on_progress",
    "synthesize": "model num_images weights input_size mean std preprocessing config quality seed device output_dir "
    "progress",
    "load_teacher": "model weights input_size mean std preprocessing config",
    "inspect": "model weight_bits act_bits target weights input_size mean std preprocessing config",
    "open_run": "path model dataset moved trust",
    "load_student": "path model trust",
    "Run.evaluate": "self dataset data_dir num_images batch_size progress",
    "Run.export": "self folder formats containers rounds threads progress",
    "Run.report": "self output num_images",
}
RUN = {
    "path",
    "record",
    "config",
    "teacher",
    "student",
    "deployed",
    "metrics",
    "images",
    "evaluate",
    "export",
    "report",
}


def test_the_public_names() -> None:
    assert set(synq.__all__) == NAMES
    assert {name for name in dir(synq) if name in NAMES} == NAMES
    for name in NAMES:
        assert getattr(synq, name) is not None


def test_the_arguments_of_every_function() -> None:
    for name, expected in ARGUMENTS.items():
        target = synq
        for part in name.split("."):
            target = getattr(target, part)
        assert " ".join(inspect.signature(target).parameters) == expected, name  # type: ignore[arg-type]


def test_every_public_name_is_documented() -> None:
    for name in NAMES - {"__version__"}:
        assert inspect.getdoc(getattr(synq, name)), name
    for name in RUN - {"path", "record", "config", "teacher"}:
        assert inspect.getdoc(getattr(synq.Run, name)), name
    for name in ("path", "record", "config", "teacher"):
        assert f"{name}:" in (inspect.getdoc(synq.Run) or "")


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(synq, "quantise")


def test_import_loads_neither_torch_nor_ray() -> None:
    code = "import sys, synq, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & {"torch", "ray", "optuna", "numpy", "pandas", "accelerate", "click"}
