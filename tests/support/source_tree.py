"""Reading the project's own source: its files, what they import, and in which package a module is."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def files(*folders: str) -> list[Path]:
    """Return the Python files of folders; synq/sweeps, a link to sweeps/, is not followed."""
    link = ROOT / "synq" / "sweeps"
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if not path.is_relative_to(link))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path: Path) -> str:
    """Return the name under which a file is imported: sweeps/spec.py is synq.sweeps.spec."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("synq", *parts) if parts[0] == "sweeps" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports_of(path: Path) -> tuple[str, ...]:
    """Return every module that a file imports anywhere, also lazily; `from a import b` gives both `a` and `a.b`."""
    found: list[str] = []
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*base, source] if source else base)
            found += [source, *(f"{source}.{alias.name}" for alias in node.names)]
    return tuple(found)


def package_of(module: str) -> str:
    """Return the package below synq (below synq.sweeps for its own) that a module belongs to."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["synq", "sweeps"] and len(parts) > 2 else parts[1] if len(parts) > 1 else ""


def is_sweeps(module: str) -> bool:
    return module.split(".")[:2] == ["synq", "sweeps"]


def own_imports(path: Path) -> set[str]:
    """Return the modules of the product that a file imports."""
    known = modules()
    return {name for name in imports_of(path) if name in known} - {module_of(path)}


@cache
def modules() -> dict[str, Path]:
    return {module_of(path): path for path in files("synq", "sweeps")}
