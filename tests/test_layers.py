"""The drawing of the system as a test: who may import whom, and the rules a file keeps."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from synq.config.parsing import dotted_keys
from synq.config.run import RunConfig

ROOT = Path(__file__).resolve().parent.parent
# Imports point downward or to a neighbour in the same layer; neighbours make no circle.
LAYERS = (
    {
        "config_io",
        "config_identity",
        "file_kinds",
        "synthesis_config",
        "quant_config",
        "width_patterns",
        "finetune_config",
        "configs",
        "results",
        "table_text",
    },
    {
        "seeding",
        "bars",
        "fake_quant",
        "learned_steps",
        "observers",
        "bn_stats",
        "functional_layers",
        "tracers",
        "lowpass",
        "gradcam",
        "losses",
        "fidelity",
        "augment",
        "packing",
        "tracing",
        "cam_site",
        "swing",
    },
    {
        "cifar_resnet",
        "generators",
        "start_noise",
        "weight_files",
        "teacher_sources",
        "teachers",
        "quant_layers",
        "soft_rounding",
        "accounting",
        "operations",
        "blocks",
        "students",
        "guard",
        "sensitivity",
        "width_choice",
        "width_problem",
        "equalization",
        "bn_correction",
        "fusion",
        "inspection",
        "integer_form",
        "integer_layers",
        "integer_products",
        "synthetic_data",
        "real_sources",
        "real_data",
        "scratch",
    },
    {
        "inversion",
        "image_sources",
        "calib_centers",
        "synthesis",
        "artifacts",
        "network_outputs",
        "averaging",
        "finetune",
        "optimizers",
        "reconstruct",
        "timetable",
        "tracking",
        "checkpoints",
        "evaluation",
        "placement",
        "rounding",
        "records",
        "packed_file",
        "onnx_file",
        "verification",
        "exported_files",
        "model_card",
    },
    {"pipeline", "finished_runs", "export", "packed_student", "rehearsal", "probe_parts", "probe"},
    {"train", "cli"},
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
REAL_READERS = {"PIL", "sklearn", "torchvision.datasets", "torchvision.io", "gzip", "zipfile"}
ENGINES = {"ray", "optuna"}
MAX_LINES = 350
READ_THROUGH = {"swing_conv": "swings"}
"""Keys that only the configuration itself reads, to put in a default that hangs on another key; others read its property."""


def _files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, also lazily; `from a import b` gives both `a` and `a.b`."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _own_imports(path: Path) -> set[str]:
    """Names of the modules of `synq/` that a file imports."""
    parts = (name.split(".") for name in _imports(path))
    return {part[1] for part in parts if part[0] == "synq" and len(part) > 1 and part[1] in LAYER_OF}


def test_every_module_stands_in_the_table() -> None:
    assert {path.stem for path in _files("synq")} - {"__init__"} == set(LAYER_OF)


@pytest.mark.parametrize("path", _files("synq"), ids=_name)
def test_imports_point_downward(path: Path) -> None:
    layer = LAYER_OF.get(path.stem, 0)
    upward = {name for name in _own_imports(path) if LAYER_OF[name] > layer}
    assert not upward, f"{_name(path)} (layer {layer}) imports upward: {upward}"


def _imports_within(package: str) -> dict[str, set[str]]:
    """For each module of a package (dotted, without the package's name) the modules of the same package that it imports."""
    names = {".".join(path.relative_to(ROOT / package).with_suffix("").parts): path for path in _files(package)}
    return {
        name: {found.removeprefix(f"{package}.") for found in _imports(path)} & (names.keys() - {name})
        for name, path in names.items()
    }


@pytest.mark.parametrize("package", ["synq", "sweeps"])
def test_no_circle_of_imports(package: str) -> None:
    left = _imports_within(package)
    while left:
        free = {name for name, needed in left.items() if not needed & left.keys()}
        assert free, f"these modules import each other in a circle: {sorted(left)}"
        left = {name: needed for name, needed in left.items() if name not in free}


def test_the_mathematics_sees_no_configuration() -> None:
    seen = {name: _own_imports(ROOT / "synq" / f"{name}.py") & LAYERS[0] for name in LAYERS[1]}
    assert not {name: modules for name, modules in seen.items() if modules}


def test_real_images_enter_through_one_door() -> None:
    readers = {
        p.stem
        for p in _files("synq")
        for name in _imports(p)
        for real in REAL_READERS
        if f"{name}.".startswith(f"{real}.")
    }
    assert readers == {"real_sources"}
    importers = defaultdict(set)
    for path in _files("synq", "sweeps"):
        for name in _own_imports(path) & {"real_data", "real_sources"}:
            importers[name].add(path.stem)
    assert importers["real_sources"] <= {"real_data"}
    assert importers["real_data"] <= {"pipeline", "evaluation"}


def test_engines_stay_outside_the_package() -> None:
    for path in _files("synq"):
        known = {name.split(".")[0] for name in _imports(path)}
        assert not known & ENGINES, f"{_name(path)} imports {known & ENGINES}"
        if path.stem != "cli":  # the console command calls the doors of the sweep, lazily
            assert not known & {"sweeps", "launch"}, f"{_name(path)} imports {known & {'sweeps', 'launch'}}"


def test_spaces_tables_and_plans_need_neither_ray_nor_torch() -> None:
    modules = "synq.sweeps.space, synq.sweeps.leaderboard.records, synq.sweeps.studies.recipes, synq.sweeps.studies.ablation, synq.sweeps.studies.pool, synq.commands.arguments"
    code = f"import sys, {modules}; print(sorted({{'torch', 'ray', 'optuna'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_no_module_shadows_another_package() -> None:
    installed = {name for name, owners in importlib.metadata.packages_distributions().items() if owners != ["synq"]}
    field = {
        "datasets",
        "evaluate",
        "timm",
        "onnx",
        "ray",
        "optuna",
        "torch",
        "torchvision",
        "transformers",
        "peft",
        "tyro",
    }
    modules = {path.stem for path in _files("synq")} - {"__init__"} | {
        p.name for p in (ROOT / "synq").iterdir() if p.is_dir()
    }
    assert not modules & (set(sys.stdlib_module_names) | installed | field)
    bare = {
        f"{_name(p)}: {name}"
        for p in _files("synq", "sweeps", "launch")
        for name in _imports(p)
        if name.split(".")[0] in modules
    }
    assert not bare, f"import these as synq.x: {bare}"


def test_no_file_is_too_long() -> None:
    paths = _files("synq", "sweeps", "launch", "tests")
    lines = {_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    long = {name: count for name, count in lines.items() if count > MAX_LINES}
    assert not long, f"split these, they have more than {MAX_LINES} lines: {long}"


@pytest.mark.parametrize("path", _files("synq", "sweeps", "launch"), ids=_name)
def test_rules_of_a_file(path: Path) -> None:
    tree = _tree(path)
    assert ast.get_docstring(tree), f"{_name(path)} does not say what it is"
    for node in tree.body:
        call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if ast.unparse(node).startswith("sys.path.insert("):  # a script that is run by its path may need it
            continue
        assert not call and not isinstance(node, ast.For | ast.While | ast.With), (
            f"{_name(path)}:{node.lineno} works at import"
        )
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "type" and isinstance(node.value, ast.Name):
            assert node.value.id != "bool", f"{_name(path)}:{node.value.lineno}: `--flag False` would be true"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{_name(path)}:{node.lineno} swallows every exception"


def test_the_door_defines_no_class() -> None:
    assert not [node for node in ast.walk(_tree(ROOT / "synq" / "train.py")) if isinstance(node, ast.ClassDef)]


def test_files_speak_of_the_project_only() -> None:
    # No path of the machine or the workshop it was made in.
    found = {
        f"{_name(path)}:{number}"
        for path in [*_files("synq", "sweeps", "launch", "tests"), ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search("/" + r"(work|root|home/\w+)/", line)
    }
    assert not found


def _parts_of(leaf: str) -> list[str]:
    return [key for key in dotted_keys(RunConfig) if key.rpartition(".")[2] == leaf]


@cache
def _attributes_read() -> set[str]:
    """Names of all attributes that the package reads, its configuration apart."""
    readers = [path for path in _files("synq") if LAYER_OF.get(path.stem, 0) > 0]
    nodes = (node for path in readers for node in ast.walk(_tree(path)))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


@pytest.mark.parametrize("leaf", sorted({key.rpartition(".")[2] for key in dotted_keys(RunConfig)}))
def test_every_key_of_the_configuration_is_read(leaf: str) -> None:
    assert {leaf, READ_THROUGH.get(leaf, leaf)} & _attributes_read(), f"nothing reads {_parts_of(leaf)}"


def test_keys_of_one_name_in_several_parts_are_all_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_settings: dict[str, object], spy: Callable[[type], set[str]]
) -> None:
    """`lr` of the synthesis and `lr` of the fine-tuning look alike to the test above: watch a run read them."""
    from synq.config.run import EvaluationConfig, FinetuneConfig, ReconstructionConfig, SynthesisConfig, with_overrides
    from synq.pipeline import run

    parts: dict[str, type] = {"synthesis": SynthesisConfig, "finetune": FinetuneConfig, "evaluation": EvaluationConfig}
    parts["reconstruction"] = ReconstructionConfig
    shared = {key for key in dotted_keys(RunConfig) if len(_parts_of(key.rpartition(".")[2])) > 1}
    assert {"synthesis.lr", "finetune.lr"} <= shared and {key.partition(".")[0] for key in shared} <= set(parts)
    config = with_overrides(
        RunConfig(), {**tiny_settings, "runtime.output_dir": str(tmp_path), "quant.rounding": "adaround"}
    )
    config = with_overrides(config, {"reconstruction.iterations": 2})
    seen = {part: spy(cls) for part, cls in parts.items()}
    run(config)
    assert shared <= {f"{part}.{name}" for part, names in seen.items() for name in names}


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], set[str]]:
    """Record which fields of a configuration class are read by code other than the configuration's own."""

    def watch(cls: type) -> set[str]:
        names: set[str] = set()

        def read(self: object, name: str) -> object:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller not in ("dataclasses", "synq.config.parsing", "synq.config.identity") and not caller.endswith(
                ("configs", "_config")
            ):
                names.add(name)
            return object.__getattribute__(self, name)

        monkeypatch.setattr(cls, "__getattribute__", read, raising=False)
        return names

    return watch
