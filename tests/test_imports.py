"""Imports run one way, and the command line starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gpt_lightning

PACKAGE = Path(gpt_lightning.__file__).parent
# Modules and subpackages import only from rows above their own.
LAYERS = [
    {"errors"},
    {"files", "config_files", "terminal"},
    {"data", "model"},
    {"safetensors_file"},
    {"checkpoint"},
    {"compatibility"},
    {"generation"},
    {"export"},
    {"commands"},
    {"training"},
    {"settings", "launchers", "fine_tuning"},
    {"run_loggers"},
    {"lightning_cli"},
    {"ladder"},
    {"cli"},
    {"__main__"},
]
TRAINING_ONLY = {"lightning", "torchmetrics", "jsonargparse", "tensorboard"}


def imported_parts(path: Path) -> set[str]:
    """The modules and subpackages of gpt_lightning that a file imports, also within functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    # `from gpt_lightning import TextGenerator` imports no module: the name is resolved on first use
    parts = {name.split(".")[1] for name in names if name.startswith("gpt_lightning.")}
    return parts & set().union(*LAYERS)


def test_imports_run_one_way():
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue  # it imports the public names on first use
        layer = next((i for i, parts in enumerate(LAYERS) if own in parts), None)
        assert layer is not None, f"add {own} to LAYERS"
        wrong = imported_parts(path) - {own}.union(*LAYERS[:layer])
        assert not wrong, f"{path} must not import {', '.join(sorted(wrong))}"


def test_the_command_line_starts_without_torch():
    code = "import sys, gpt_lightning.cli; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=PACKAGE.parent)
    assert not {name.split(".")[0] for name in loaded.split()} & {*TRAINING_ONLY, "torch"}


def test_every_public_name_can_be_imported():
    for name in gpt_lightning.__all__:
        assert getattr(gpt_lightning, name)
    with pytest.raises(AttributeError, match="gpt_lightning.*'Reader'"):
        gpt_lightning.Reader  # noqa: B018
