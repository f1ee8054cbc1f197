"""Links of the README and of docs/ lead somewhere, and docs/lecture.md to the lines that it says.

`python tests/test_docs.py` puts the line numbers of docs/lecture.md right after code has moved.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LECTURE = ROOT / "docs" / "lecture.md"
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\)")
ANY_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")  # pictures, and pictures within links, too


def prose(page: Path) -> str:
    """A page without its fenced code, in which brackets may mean anything."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def links(page: Path) -> list[tuple[str, Path, str]]:
    """(text, file, anchor) of every link of a page to a file of ours."""
    found = []
    for match in LINK.finditer(prose(page)):
        path, _, anchor = match["target"].partition("#")
        if path and "://" not in path:
            found.append((match["text"], (page.parent / path).resolve(), anchor))
    return found


def definitions(module: Path) -> dict[str, int]:
    """Line of every class, function and method of a module: `LectureGPT.forward` -> 186."""
    lines = {}

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                lines[prefix + child.name] = child.lineno
                walk(child, f"{prefix}{child.name}.")

    walk(ast.parse(module.read_text(encoding="utf-8")), "")
    return lines


def code_links() -> list[tuple[str, Path, int]]:
    """(name, module, line) of each link to a line; the link's text is the name, as code."""
    return [
        (text.strip("`"), path, int(anchor[1:]))
        for text, path, anchor in links(LECTURE)
        if re.fullmatch(r"L\d+", anchor)
    ]


def named_tests() -> list[tuple[str, Path]]:
    """(test's name, file) of each link to a test; the link's text is the name in words."""
    return [
        ("test_" + re.sub(r"\W+", "_", text).lower(), path)
        for text, path, _ in links(LECTURE)
        if path.parent == ROOT / "tests" and path.name.startswith("test_")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_to_a_file_leads_to_one(page):
    targets = {match["target"].partition("#")[0] for match in ANY_LINK.finditer(prose(page))}
    files = {target for target in targets if target and "://" not in target}
    assert {target for target in files if not (page.parent / target).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_to_a_heading_of_the_same_page_has_one(page):
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    known = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    wanted = {m["target"][1:] for m in ANY_LINK.finditer(prose(page)) if m["target"][0] == "#"}
    assert wanted <= known


def test_every_link_to_a_line_leads_to_the_definition_that_it_names():
    assert code_links()
    for name, module, line in code_links():
        where = f"docs/lecture.md links `{name}` to {module.name}#L{line}"
        known = definitions(module)
        assert name in known, f"{where}; there is no such definition there any more"
        assert known[name] == line, (
            f"{where}; it is at line {known[name]} now. `python tests/test_docs.py` puts all such "
            "numbers right"
        )


def test_every_test_that_the_page_names_exists():
    assert named_tests()
    missing = [f"{p.name}::{name}" for name, p in named_tests() if name not in definitions(p)]
    assert not missing, f"docs/lecture.md names tests that are not there: {', '.join(missing)}"


@pytest.mark.parametrize("pattern", ["configs/lecture/*.yaml", "notebooks/*.ipynb"])
def test_every_config_and_notebook_is_on_the_page(pattern):
    linked = {path for _, path, _ in links(LECTURE)}
    files = set(ROOT.glob(pattern))
    assert files
    assert {path.name for path in files - linked} == set()


def renumbered(page: str) -> str:
    """The page with each link's line number as the code has it now."""

    def renumber(match: re.Match) -> str:
        path, _, anchor = match["target"].partition("#")
        if not re.fullmatch(r"L\d+", anchor):
            return match[0]
        line = definitions((LECTURE.parent / path).resolve()).get(match["text"].strip("`"))
        return f"[{match['text']}]({path}#L{line})" if line else match[0]

    return LINK.sub(renumber, page)


def test_renumbering_puts_a_moved_line_right():
    page = LECTURE.read_text(encoding="utf-8")
    moved = re.sub(r"#L\d+\)", "#L1)", page)
    assert moved != page and renumbered(moved) == renumbered(page)


if __name__ == "__main__":
    LECTURE.write_text(renumbered(LECTURE.read_text(encoding="utf-8")), encoding="utf-8")
