"""The drawing of the system as a test: which package may import which."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from support.source_tree import (
    ROOT,
    files,
    imports_of,
    is_sweeps,
    module_of,
    modules,
    name_of,
    own_imports,
    package_of,
    tree_of,
)

# From the ground up: each package, or module at the top of synq/, imports from those before it and from itself.
PACKAGES = (
    "common",
    "config",
    "losses",
    "network",
    "teacher",
    "quant",
    "engines",
    "runtime",
    "synthesis",
    "finetune",
    "evaluation",
    "own_images",
    "runs",
    "pipeline",
    "budget",
    "export",
    "mixed_precision",
    "verification",
    "diagnostics",
    "api",
    "train",
    "commands",
    "cli",
)
SWEEPS = (
    "storage",
    "stats",
    "search_config",
    "conditions",
    "space",
    "constraints",
    "leaderboard",
    "points",
    "spec",
    "spec_tables",
    "spec_file",
    "state",
    "verification",
    "workers",
    "studies",
    "reports",
    "live",
    "driver",
    "doctor",
    "benchmarks",
)
TOP = frozenset(["api", "train", "commands", "cli"])
"""What may import sweeps/, inside functions."""
LAZY = frozenset(["synq", "synq.sweeps"])
"""Modules whose names are loaded on first use: what they import is no part of importing them."""
NO_TORCH = ("common", "config")
NO_CONFIG = ("losses", "network")
REAL_READERS = {"PIL", "sklearn", "torchvision.datasets", "torchvision.io", "gzip", "zipfile"}
ENGINES = {"ray", "optuna"}
ENGINE_ROOMS = ("driver", "workers", "doctor", "benchmarks", "reports.study_figures")
MAX_MODULES = 20


def test_every_package_stands_in_the_list() -> None:
    rooms = {package_of(name) for name in modules() if not is_sweeps(name)} - {"", "__init__"}
    assert rooms == set(PACKAGES)
    inner = {package_of(name) for name in modules() if is_sweeps(name) and name != "synq.sweeps"}
    assert inner == set(SWEEPS)


@pytest.mark.parametrize("path", files("synq", "sweeps"), ids=name_of)
def test_imports_point_downward(path: Path) -> None:
    here = module_of(path)
    order = SWEEPS if is_sweeps(here) else PACKAGES
    if package_of(here) not in order:
        return
    for name in own_imports(path):
        if is_sweeps(name) == is_sweeps(here):
            if package_of(name) in order:
                assert order.index(package_of(name)) <= order.index(package_of(here)), f"{here} imports upward: {name}"
        elif is_sweeps(here):
            assert package_of(name) not in TOP, f"{here} imports upward: {name}"
        else:
            assert package_of(here) in TOP, f"{here} imports upward: {name}"


def test_commands_load_the_sweeps_only_when_they_run() -> None:
    for path in files("synq"):
        top = [node for node in tree_of(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in top for alias in node.names} | {
            getattr(node, "module", "") or "" for node in top
        }
        assert not [name for name in names if name.startswith("synq.sweeps")], (
            f"{name_of(path)} imports them at its top"
        )


def test_no_circle_of_imports() -> None:
    left = {name: own_imports(path) for name, path in modules().items() if name not in LAZY}
    while left:
        free = {name for name, needed in left.items() if not needed & left.keys()}
        assert free, f"these modules import each other in a circle: {sorted(left)}"
        left = {name: needed for name, needed in left.items() if name not in free}


def test_the_mathematics_sees_no_configuration() -> None:
    for path in files("synq"):
        if package_of(module_of(path)) in NO_CONFIG:
            assert not [name for name in own_imports(path) if package_of(name) == "config"], name_of(path)


def test_real_images_enter_through_one_package() -> None:
    found = {
        name_of(path)
        for path in files("synq", "sweeps")
        for name in imports_of(path)
        for real in REAL_READERS
        if f"{name}.".startswith(f"{real}.") and not name_of(path).startswith("sweeps/reports/")
    }
    readers = {f"synq.evaluation.labeled_{part}" for part in ("sources", "images", "arrays")}
    assert found == {f"{name.replace('.', '/')}.py" for name in readers}
    readers |= {"synq.evaluation.image_objects", "synq.evaluation.labeled_memory"}  # of the objects of a program
    importers = defaultdict(set)
    for path in files("synq", "sweeps"):
        for name in own_imports(path):
            importers[name].add(module_of(path))
    entrances = {"synq.evaluation.labeled", "synq.own_images", "synq.api.quantize", "synq.api.run"}
    assert set().union(*(importers[name] for name in readers)) - readers <= entrances
    assert importers["synq.evaluation.labeled"] <= {"synq.evaluation.measure", "synq.own_images"}


def test_ray_and_optuna_stay_in_their_packages() -> None:
    for path in files("synq", "sweeps"):
        if {name.split(".")[0] for name in imports_of(path)} & ENGINES:
            assert module_of(path).startswith(tuple(f"synq.sweeps.{room}" for room in ENGINE_ROOMS)), name_of(path)


@pytest.mark.parametrize("package", NO_TORCH)
def test_the_lowest_packages_need_no_torch(package: str) -> None:
    names = [name for name in modules() if package_of(name) == package and not is_sweeps(name)]
    _imports_none_of(names, "torch", "ray", "optuna", "numpy")


def test_spaces_tables_and_plans_need_neither_ray_nor_torch() -> None:
    names = [
        "space",
        "points",
        "spec",
        "leaderboard.records",
        "state.plans",
        "studies.recipes",
        "studies.ablation",
        "studies.pool",
    ]
    _imports_none_of([f"synq.sweeps.{name}" for name in names], "torch", "ray", "optuna")


def _imports_none_of(modules: list[str], *forbidden: str) -> None:
    code = f"import sys, {', '.join(modules)}; print(sorted({set(forbidden)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", f"{modules} load {done.stdout}"


def test_one_way_to_import() -> None:
    """Inside sweeps/ relatively, because the folder is `synq.sweeps` when installed; everywhere else by the full
    name.
    """
    for path in files("synq", "sweeps", "launch", "tests"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom):
                inside = name_of(path).startswith("sweeps/")
                assert bool(node.level) == (inside and bool(node.level)), (
                    f"{name_of(path)}:{node.lineno} imports relatively"
                )
                assert not (inside and (node.module or "").startswith("synq.sweeps")), f"{name_of(path)}:{node.lineno}"
        assert not [name for name in imports_of(path) if name.split(".")[0] in ("sweeps", "launch")], name_of(path)


def test_the_sweeps_are_linked_into_the_package() -> None:
    link = ROOT / "synq" / "sweeps"
    assert link.is_symlink() and link.resolve() == ROOT / "sweeps"


@pytest.mark.parametrize("folder", sorted({path.parent for path in files("synq", "sweeps", "launch")}), ids=name_of)
def test_no_folder_is_too_full(folder: Path) -> None:
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MAX_MODULES
