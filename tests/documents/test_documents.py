"""README and docs/: links, the size of the README, pages made from the code, and the build of the site."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from support.source_tree import ROOT, files, tree_of
from support.terms import BRITISH, FIGURE, PROSE

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "findings" / "README.md", *sorted(DOCS.rglob("*.md"))]
CURRENT = [page for page in PAGES if not {"results", "findings"} & {*page.parts}]
"""Pages of today; results keep the words and names of their day."""
LINK = re.compile(r"(?<!\\)\]\(([^()\s]+(?:\([^()]*\))?)\)")


def _text(path: Path) -> str:
    """Return a page without its code."""
    text = re.sub(r"^[ ]*```.*?^[ ]*```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def _anchors(path: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and Python-Markdown both make them."""
    found = set()
    text = re.sub(r"^[ ]*```.*?^[ ]*```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for title in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").lower()
        found.add(re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain)).strip("-"))
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    wrong = []
    for link in LINK.findall(_text(path)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists():
            wrong.append(f"{link}: no such file")
        elif path.is_relative_to(DOCS) and not target.is_relative_to(DOCS):
            wrong.append(f"{link}: not part of the site")
        elif anchor and anchor not in _anchors(target):
            wrong.append(f"{link}: no such heading")
    assert not wrong


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_speak_the_language_of_the_field(path: Path) -> None:
    found = [
        f"{match[0]!r}: {term}"
        for pattern, term in [*PROSE.items(), *FIGURE.items(), (BRITISH, "American spelling")]
        for match in re.finditer(pattern, _text(path), re.I)
    ]
    assert not found


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1300
    first, second = (part.split("\n```")[0].strip() for part in text.split("```bash\n")[1:3])
    assert "pip install -e . &&" in first and first.endswith("launch/sweep.py")
    assert "<!-- test command -->\n```bash\n" + second in text


def test_pictures_are_small() -> None:
    pictures = [path for suffix in ("png", "svg", "jpg") for path in DOCS.rglob(f"*.{suffix}")]
    assert pictures and all(path.stat().st_size < 100_000 for path in pictures)


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert named == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    index = (DOCS / "how-to" / "index.md").read_text(encoding="utf-8")
    assert {name.removeprefix("how-to/") for name in named if name.startswith("how-to/")} - {"index.md"} == set(
        re.findall(r"\]\(([\w-]+\.md)\)", index)
    )


def test_files_that_documents_name_exist() -> None:
    wrong, found = [], 0
    for path in CURRENT:
        names = re.findall(
            r"(?<![\w/.$-])((?:synq|sweeps|launch|docs|tests|findings)/[\w/.-]+\.[a-z]{2,5})\b",
            path.read_text(encoding="utf-8"),
        )
        found += len(names)
        wrong += [f"{path.name}: {name}" for name in names if not (ROOT / name).exists()]
    assert not wrong and found > 50


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    found = importlib.util.spec_from_file_location("reference_pages", DOCS / "scripts" / "reference.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_code_gives(reference: ModuleType) -> None:
    assert reference.stale() == [], "run: python docs/scripts/reference.py"


def test_a_stale_reference_is_found(reference: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(DOCS / "reference", tmp_path / "reference")
    page = tmp_path / "reference" / "settings.md"
    page.write_text(page.read_text(encoding="utf-8").replace("`0.01`", "`0.02`", 1), encoding="utf-8")
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "reference")
    assert reference.stale() == ["settings.md"] and reference.main(["--check"]) == 1


def _build(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", "mkdocs.yml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(DOCS, tmp_path / "docs")
    (tmp_path / "synq").symlink_to(ROOT / "synq")
    done = _build(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.relative_to(tmp_path / "site").with_suffix(".md") for path in (tmp_path / "site").rglob("*.html")}
    assert pages >= {path.relative_to(DOCS) for path in DOCS.rglob("*.md")}
    shown = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html"))
    loaded = re.findall(
        r"<(?:script|img)[^>]* src=\"?(https?:[^\" >]+)|<link[^>]*stylesheet[^>]* href=\"?(http[^\" >]+)", shown
    )
    assert not loaded, "the pages load nothing from elsewhere"
    (tmp_path / "docs" / "start.md").write_text("# Start\n\n[nowhere](nowhere.md)\n", encoding="utf-8")
    assert _build(tmp_path).returncode != 0


def _python(path: Path) -> ast.Module:
    blocks = re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)
    return ast.parse("\n".join(blocks), filename=path.name)


def _arguments(defined: ast.FunctionDef | ast.ClassDef) -> set[str]:
    """Return the arguments of a function, or the fields of a dataclass."""
    if isinstance(defined, ast.FunctionDef):
        return {arg.arg for arg in (*defined.args.args, *defined.args.kwonlyargs)}
    return {ast.unparse(part.target) for part in defined.body if isinstance(part, ast.AnnAssign)}


def test_names_in_python_are_public(reference: ModuleType) -> None:
    api = importlib.import_module("reference_api")
    public = api.public_names()
    wrong, found = [], 0
    for path in CURRENT:
        tree = _python(path)
        names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names = {name for name in names if name.startswith("synq.")} - {"synq.sweeps"}
        wrong += [f"{path.name}: {name}" for name in names if name not in public]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in public:
                defined = api.definition(public[ast.unparse(node.func)])
                arguments = _arguments(defined)
                unknown = {str(word.arg) for word in node.keywords} - arguments
                wrong += [f"{path.name}: {ast.unparse(node.func)}({name}=)" for name in unknown]
                found += 1
    assert not wrong and found >= 5


def _texts_of_the_code() -> str:
    """Return all texts of the source, one a line, without backticks; a formatted value of an f-string is a blank."""
    lines = []
    for path in files("synq", "sweeps"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.JoinedStr):
                lines.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(lines).replace("`", "")


def test_messages_explained_are_those_of_the_code() -> None:
    text = _texts_of_the_code()
    rows = re.findall(r"^\| (.+?) \| ", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    parts = [part.strip() for row in rows for code in re.findall(r"`([^`]+)`", row)
             for part in re.split(r"\.\.\.|\b[NM]\b|\bmust\b", code) if len(part.strip()) > 6]  # fmt: skip
    assert len(parts) > 60
    missing = [part for part in parts if part not in text]
    assert not missing, missing
