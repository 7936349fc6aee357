"""Rules that every source file keeps, and that every setting is read."""

import ast
import importlib.metadata
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from support.source_tree import (
    ROOT,
    files,
    imports_of,
    module_of,
    name_of,
    package_of,
    tree_of,
)
from synq.config.parsing import dotted_keys
from synq.config.run import RunConfig

MAX_LINES = 350
READ_THROUGH = {"swing_conv": "swings"}
"""Keys that only the configuration itself reads, to put in a default that hangs on another key; others read its
property.
"""


def test_no_module_shadows_another_package() -> None:
    installed = {
        name for name, owners in importlib.metadata.packages_distributions().items() if set(owners) != {"synq"}
    }
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
    modules = {path.stem for path in (ROOT / "synq").glob("*.py")} - {"__init__"}
    modules |= {path.name for path in (ROOT / "synq").iterdir() if path.is_dir()} - {"__pycache__", "sweeps"}
    assert not modules & (set(sys.stdlib_module_names) | installed | field)
    bare = {
        f"{name_of(p)}: {name}"
        for p in files("synq", "sweeps", "launch")
        for name in imports_of(p)
        if name.split(".")[0] in modules
    }
    assert not bare, f"import these as synq.x: {bare}"


def test_no_file_is_too_long() -> None:
    paths = files("synq", "sweeps", "launch", "tests")
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    long = {name: count for name, count in lines.items() if count > MAX_LINES}
    assert not long, f"split these, they have more than {MAX_LINES} lines: {long}"


@pytest.mark.parametrize("path", files("synq", "sweeps", "launch"), ids=name_of)
def test_rules_of_a_file(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree), f"{name_of(path)} does not say what it is"
    for node in tree.body:
        call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if call and ast.unparse(node).startswith("sys.path.insert("):  # a script that is run by its path may need it
            continue
        assert not call and not isinstance(node, ast.For | ast.While | ast.With), (
            f"{name_of(path)}:{node.lineno} works at import"
        )
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "type" and isinstance(node.value, ast.Name):
            assert node.value.id != "bool", f"{name_of(path)}:{node.value.lineno}: `--flag False` would be true"
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and name_of(path) != "synq/config/command_options.py":
            assert not (called.attr in ("argument", "option") and ast.unparse(called.value) == "click"), (
                f"{name_of(path)}:{called.lineno} must use {called.attr} of command_options: a Command reads no other"
            )
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name_of(path)}:{node.lineno} swallows every exception"


def test_the_door_defines_no_class() -> None:
    assert not [node for node in ast.walk(tree_of(ROOT / "synq" / "train.py")) if isinstance(node, ast.ClassDef)]


def test_files_speak_of_the_project_only() -> None:
    # No path of the machine or the workshop it was made in.
    found = {
        f"{name_of(path)}:{number}"
        for path in [*files("synq", "sweeps", "launch", "tests"), ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search("/" + r"(work|root|home/\w+)/", line)
    }
    assert not found


def _parts_of(leaf: str) -> list[str]:
    return [key for key in dotted_keys(RunConfig) if key.rpartition(".")[2] == leaf]


@cache
def _attributes_read() -> set[str]:
    """Names of all attributes that the package reads, its configuration apart."""
    readers = [path for path in files("synq") if package_of(module_of(path)) not in ("", "common", "config")]
    nodes = (node for path in readers for node in ast.walk(tree_of(path)))
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
            if caller != "dataclasses" and not caller.startswith("synq.config."):
                names.add(name)
            return object.__getattribute__(self, name)

        monkeypatch.setattr(cls, "__getattribute__", read, raising=False)
        return names

    return watch
