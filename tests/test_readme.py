"""What the README tells people to type works."""

import re
from pathlib import Path

from gpt_lightning.config_files import find_config

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
        ("val_check_interval=250", "val_check_interval=2"),
        ("max_new_tokens=200", "max_new_tokens=5"),
    ):
        assert long in code
        code = code.replace(long, short)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "HUGO:\n" in capsys.readouterr().out


def test_named_configs_exist():
    names = set(re.findall(r"--config[ =]([\w/.]+)", README))
    assert names and all(find_config(name) for name in names)


def test_tree_names_every_module():
    modules = {p.name for p in (ROOT / "gpt_lightning").rglob("*.py")}
    tree = next(block for block in blocks("") if block.startswith("gpt_lightning/"))
    named = set(re.findall(r"\w+\.py", tree))
    assert modules - {"__init__.py", "__main__.py"} == named
