"""The page of the Python API, from the public names in the source; nothing of it is imported."""

import ast
import re

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
    """Return the page of the Python API: signatures and docstrings."""
    lines = [
        "# Python API\n",
        "`import synq` loads neither PyTorch nor Ray; each name is loaded on first use. The same is in Python: "
        "`help(synq.quantize)`.\n",
    ]
    names = sorted(public_names().items(), key=lambda item: (item[0].rpartition(".")[0], item[0].swapcase()))
    rows = [(f"[`{name}`](#{name.replace('.', '').lower()})", summary(path)) for name, path in names]
    sections = [f"## {name}\n\n{described(name, definition(path))}" for name, path in names]
    return "\n".join([*lines, table(("name", ""), rows), *sections])


def described(name: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    """Return a function, or a class with its fields and methods, as Markdown."""
    if isinstance(node, ast.FunctionDef):
        return f"```text\n{signature(name, node)}\n```\n\n{as_markdown(ast.get_docstring(node) or '')}\n"
    parts = [f"{as_markdown(ast.get_docstring(node) or '')}\n"]
    fields = [
        (f"`{part.target.id}`", f"`{ast.unparse(part.annotation)}`", documented(node, number))
        for number, part in enumerate(node.body)
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.target.id[0] != "_"
    ]
    if any(text for *_, text in fields):
        parts.append(
            table(("field", "type", ""), [(field, kind.replace("|", "\\|"), text) for field, kind, text in fields])
        )
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name[0] != "_":
            short = name.rpartition(".")[2]
            is_value = any("property" in ast.unparse(mark) for mark in part.decorator_list)
            head = f"`{short}.{part.name}`" if is_value else f"```text\n{signature(f'{short}.{part.name}', part)}\n```"
            parts.append(f"{head}\n\n{as_markdown(ast.get_docstring(part) or '')}\n")
    return "\n".join(parts)


def documented(node: ast.ClassDef, number: int) -> str:
    """Return the docstring below a field of a class, as one line; "" if there is none."""
    after = node.body[number + 1] if number + 1 < len(node.body) else None
    is_text = (
        isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    )
    return " ".join(str(after.value.value).split()).replace("|", "\\|") if is_text else ""  # type: ignore[union-attr]


def signature(name: str, node: ast.FunctionDef) -> str:
    """Return a call with its parameters, one a line where they are many, and what it returns."""
    given = node.args
    defaults = [None] * (len(given.args) - len(given.defaults)) + list(given.defaults)
    first = [_parameter(part, default) for part, default in zip(given.args, defaults, strict=True)]
    rest = [_parameter(part, default) for part, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    several = [f"*{given.vararg.arg}"] if given.vararg else ["*"] * bool(rest)
    more = [f"**{given.kwarg.arg}"] if given.kwarg else []
    parts = [part for part in (*first, *several, *rest, *more) if part != "self"]
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{name}({', '.join(parts)}){returned}"
    return line if len(line) <= 88 else "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){returned}"])


def _parameter(part: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(part.annotation)}" if part.annotation else ""
    equal = " = " if kind else "="
    return f"{part.arg}{kind}" + (f"{equal}{ast.unparse(default)}" if default else "")


def as_markdown(docstring: str) -> str:
    """Return a docstring whose sections (Args, Returns, Raises, Attributes, Example) are lists or blocks."""
    lines: list[str] = []
    section = ""
    for line in docstring.splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Attributes|Yields|Example):", line):
            section = line.removesuffix(":")
            lines += [f"**{section}**", ""]
        elif section in ("Args", "Raises", "Attributes") and re.match(r"    \S", line):
            names, _, text = line.strip().partition(": ")
            lines.append(f"- `{names}`: {text}" if text else f"- {names}")
        elif section in ("Args", "Raises", "Attributes") and line.startswith("        "):
            lines.append(f"  {line.strip()}")
        elif section == "Returns" or section == "Yields":
            lines.append(line.strip())
        else:
            section = section if line.startswith(" ") or not line else ""
            lines.append(line)
    return "\n".join(lines).strip()


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
