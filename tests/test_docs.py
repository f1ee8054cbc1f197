"""Links, flags, names and examples in the README and in docs/ are right."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, run

from gpt_lightning.config_files import find_config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its fenced code, in which brackets can mean anything."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def links(page: Path) -> list[tuple[str, Path, str]]:
    """(text, file, anchor) of every link of a page, pictures too, to a file of this project."""
    found = re.findall(r"([^\[]*)\]\(([^)\s#]*)#?([^)\s]*)\)", prose(page))
    return [
        (text, (page.parent / path).resolve() if path else page, anchor)
        for text, path, anchor in found
        if "://" not in path
    ]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def readme_code(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.S | re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_to_a_file_and_a_heading_or_a_definition(page):
    for text, path, anchor in links(page):
        assert path.exists(), path
        assert not anchor or anchor in anchors(path), f"{path.name}#{anchor}"
        name = text.strip("`").rpartition(".")[2]  # such as `forward`, of `LectureGPT.forward`
        if path.suffix == ".py" and name != "py":
            definition = rf"^ *(def|class) {name}\b"
            assert re.search(definition, path.read_text("utf-8"), re.M), f"{path.name}: {text}"


@pytest.mark.parametrize("pattern", ["configs/lecture/*.yaml", "notebooks/*.ipynb"])
def test_the_lecture_page_links_every_config_and_notebook(pattern):
    files = set(ROOT.glob(pattern))
    assert files and files <= {path for _, path, _ in links(ROOT / "docs" / "lecture.md")}


def test_every_flag_exists(capsys):
    assert run("fit", "--help") == 0
    known = set(re.findall(r"--[a-z]+\.\w+", capsys.readouterr().out))
    for page in PAGES:
        if page.name.startswith("experiments"):
            continue  # it also tells of settings that were tried and removed
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"--(?:data|model|trainer|sample|checkpoint)\.\w+", text))
        assert named <= known, f"{page.name}: {named - known}"


def test_the_readmes_python_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = readme_code("python")
    for long, short in (
        ('"playwright"', '"playwright:1:20000"'),
        ("max_steps=1000", 'max_steps=2, accelerator="cpu"'),
        ("val_check_interval=250", "val_check_interval=2"),
        ("max_new_tokens=200", "max_new_tokens=5"),
    ):
        assert long in code
        code = code.replace(long, short)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "HUGO:\n" in capsys.readouterr().out


def test_the_configs_that_the_readme_names_exist():
    names = set(re.findall(r"--config[ =]([\w/.]+)", README))
    assert names and all(find_config(name) for name in names)


def test_the_readmes_tree_names_every_module():
    modules = {p.name for p in (ROOT / "gpt_lightning").rglob("*.py")}
    tree = re.search(r"^```\ngpt_lightning/\n(.*?)^```$", README, re.S | re.M)[1]
    assert modules - {"__init__.py", "__main__.py"} == set(re.findall(r"\w+\.py", tree))
