"""Links, flags and names in the README and in docs/ lead somewhere."""

import ast
import re
from pathlib import Path

import pytest

from gpt_lightning.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LECTURE = ROOT / "docs" / "lecture.md"
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")  # pictures, and pictures within links, too
CODE_LINK = re.compile(r"\[`(?P<name>[\w.]+)`\]\((?P<target>[^)\s]+\.py)\)")


def prose(page: Path) -> str:
    """A page without its fenced code, in which brackets can mean anything."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def links(page: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of every link of a page to a file of this project."""
    found = []
    for match in LINK.finditer(prose(page)):
        path, _, anchor = match["target"].partition("#")
        if "://" not in match["target"]:
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def definitions(module: Path) -> set[str]:
    """Every class, function and method of a module: `LectureGPT.forward`."""
    names = set()

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                names.add(prefix + child.name)
                walk(child, f"{prefix}{child.name}.")

    walk(ast.parse(module.read_text(encoding="utf-8")), "")
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for path, anchor in links(page):
        assert path.exists(), path
        assert not anchor or anchor in anchors(path), f"{path.name}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_to_code_names_a_definition_in_that_file(page):
    for match in CODE_LINK.finditer(prose(page)):
        module = (page.parent / match["target"]).resolve()
        assert match["name"] == module.name or match["name"] in definitions(module), match[0]


@pytest.mark.parametrize("pattern", ["configs/lecture/*.yaml", "notebooks/*.ipynb"])
def test_the_lecture_page_links_every_config_and_notebook(pattern):
    files = set(ROOT.glob(pattern))
    assert files and files <= {path for path, _ in links(LECTURE)}


def test_every_flag_exists(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    known = set(re.findall(r"--[a-z]+\.\w+", capsys.readouterr().out))
    for page in PAGES:
        if page.name.startswith("experiments"):
            continue  # it also tells of settings that were tried and removed
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"--(?:data|model|trainer|sample|checkpoint)\.\w+", text))
        assert named <= known, f"{page.name}: {named - known}"
