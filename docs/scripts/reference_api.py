"""The page of the Python API, from the public names in the source; nothing of it is imported."""

import ast

from reference_text import ROOT, table


def public_names(package: str = "synq") -> dict[str, str]:
    """Return the public names of a lazy package with the paths of what they are, from its source.

    They are the imports `from X import Y as Y` below `if TYPE_CHECKING:` in its __init__.py; those of a module of such
    a package follow with its name before them.
    """
    folder = ROOT / package.replace(".", "/")
    found: dict[str, str] = {}
    for block in ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body:
        if not isinstance(block, ast.If) or ast.unparse(block.test) != "TYPE_CHECKING":
            continue
        for node in block.body:
            assert isinstance(node, ast.ImportFrom)
            source = f"{package}.{node.module}" if node.level else str(node.module)
            found |= {f"{package}.{name.asname}": f"{source}.{name.name}" for name in node.names if name.asname}
    packages = [name for name, path in found.items() if name == path]
    for name in packages:
        del found[name]
        found |= public_names(name)
    return found


def api_page() -> str:
    """Return the page of the Python API; mkdocstrings fills in signatures and docstrings."""
    lines = [
        "# Python API\n",
        "`import synq` loads neither PyTorch nor Ray; each name is loaded on first use. Signatures and docstrings are "
        "on the built page (`zensical build`), and in Python by `help(synq.quantize)`.\n",
    ]
    names = sorted(public_names().items(), key=lambda item: (item[0].rpartition(".")[0], item[0].swapcase()))
    rows = [(f"[`{name}`](#{name.replace('.', '').lower()})", summary(path)) for name, path in names]
    options = "    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
    sections = [f"## {name}\n\n::: {path}\n{options}" for name, path in names]
    return "\n".join([*lines, table(("name", ""), rows), *sections])


def summary(path: str) -> str:
    """Return the first line of the docstring of a function or class, from its source."""
    return (ast.get_docstring(definition(path)) or "").partition("\n")[0]


def definition(path: str) -> ast.FunctionDef | ast.ClassDef:
    """Return the source of a function or class, given as `package.module.name`.

    Raises:
        ValueError: The module does not define it.
    """
    module, _, name = path.rpartition(".")
    file = ROOT / module.replace(".", "/")
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
    raise ValueError(f"`{path}` must be a function or class of its module, but is not there")
