"""The pages of docs/: their code runs and prints what they show, and they have every message of the library."""

import ast
import pathlib
import re
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "docs"))
import fill_tables
import pictures

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# A block, and what it prints where a block without a language follows.
PYTHON = re.compile(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
ELSEWHERE = "# Runs on "  # several GPUs or hosts: such a block is compiled only


def python_of(page: pathlib.Path) -> list[tuple[str, str]]:
    return PYTHON.findall(page.read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=lambda page: page.stem)
def test_code_of_a_page_runs_and_prints_what_it_shows(page, capsys, tmp_path, monkeypatch, as_in_a_new_python):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code, shown in python_of(page):
        compiled = compile(code, str(page), "exec")
        if not code.startswith(ELSEWHERE):
            exec(compiled, names)
            assert capsys.readouterr().out == shown


def test_nearly_all_code_runs_here():
    blocks = [code for page in PAGES for code, _ in python_of(page)]
    assert sum(code.startswith(ELSEWHERE) for code in blocks) <= 3
    assert len(blocks) == sum(len(re.findall("^```python", page.read_text(), re.MULTILINE)) for page in PAGES)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_files_that_links_name_are_there(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_pictures_are_drawn_by_the_library(tmp_path, monkeypatch, as_in_a_new_python):
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--out", str(tmp_path)])
    pictures.main()
    kept = DOCS / "pictures"
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in kept.iterdir()}
    for name in drawn:  # curves and ticks depend on matplotlib; what is said in a picture does not
        said = [re.findall(r">([^<>]*[a-z][^<>]*)</text>", (folder / name).read_text()) for folder in (tmp_path, kept)]
        assert said[0] == said[1] != []


def test_tables_of_performance_are_those_of_the_results():
    page = DOCS / "performance.md"
    assert page.read_text() == fill_tables.filled(page.read_text())
    assert all(f"<!-- table: {name} -->" in page.read_text() for name in fill_tables.TABLES)


def said(node: ast.AST) -> str:
    """The text of an expression, with … for what is known only as it runs."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(said(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return said(left) + said(right)
    return "…"


def messages(path: pathlib.Path) -> list[str]:
    """What a module raises, warns of, logs, or gives as a reason why something cannot be."""
    found: list[str] = []

    def visit(node: ast.AST, gives_reasons: bool) -> None:
        match node:
            case ast.FunctionDef(name=name):
                gives_reasons = name.startswith("why_")
            case ast.Raise(exc=ast.Call(args=[text, *_])):
                found.append(said(text))
            case ast.Call(func=ast.Attribute(attr="info" | "warn"), args=[text, *_]):
                found.append(said(text))
            case ast.Call(func=ast.Name(id="say_once" | "reverse_only"), args=[_, text]):
                found.extend(map(said, [text.body, text.orelse] if isinstance(text, ast.IfExp) else [text]))
            case ast.Assign(targets=[ast.Name(id="why_not" | "verdict" | "message" | "slow")], value=text):
                found.append(said(text))
            case ast.Return(value=text) if gives_reasons and text is not None:
                found.append(said(text))
        for child in ast.iter_child_nodes(node):
            visit(child, gives_reasons)

    visit(ast.parse(path.read_text()), False)
    return found


def test_every_message_is_explained():
    """By its first words in docs/troubleshooting.md. The command line's say in their one line what is wrong."""
    page = (DOCS / "troubleshooting.md").read_text()
    modules = [path for path in (ROOT / "jax_lplb").rglob("*.py") if path.parent.name != "_cli"]
    found = {re.sub("%s|…+", "…", message).lstrip("…:;, ") for path in modules for message in messages(path)}
    first_words = {" ".join(message.split()[:5]) for message in found} - {""}
    assert len(first_words) > 150  # or they were not found
    assert not [words for words in sorted(first_words) if words not in page], "explain these in docs/troubleshooting.md"


def test_every_status_is_explained():
    import jax_lplb as lplb

    page = (DOCS / "troubleshooting.md").read_text()
    assert all(f"`{status.name}`" in page for status in lplb.Status)
