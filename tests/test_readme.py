"""What the README tells people to type works."""

import re
from pathlib import Path

import pytest

from gpt_lightning.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for kind, text in fenced if kind == language]


def test_python_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = blocks("python")
    for long, short in (
        ('"playwright"', '"playwright:1:20000"'),
        ("max_steps=1000", 'max_steps=2, accelerator="cpu"'),
        ("max_new_tokens=200", "max_new_tokens=5"),
    ):
        assert long in code
        code = code.replace(long, short)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "HUGO:\n" in capsys.readouterr().out


def test_flags_and_files_that_it_names_exist(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    known = set(re.findall(r"--[a-z]+\.\w+", capsys.readouterr().out))
    named = set(re.findall(r"--(?:data|model|trainer|sample|checkpoint)\.\w+", README))
    assert named and named <= known
    paths = set(re.findall(r"(?:configs|docs)/[\w/]+\.\w+", README))
    assert paths and {path for path in paths if not (ROOT / path).exists()} == set()


def test_tree_names_every_module():
    modules = {p.name for p in (ROOT / "gpt_lightning").rglob("*.py")} - {"__init__.py"}
    tree = next(block for block in blocks("") if block.startswith("gpt_lightning/"))
    assert {name for name in modules - {"__main__.py"} if name not in tree} == set()
