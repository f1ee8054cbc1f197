"""Imports run one way, and `generate` starts without Lightning."""

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import gpt_lightning

PACKAGE = Path(gpt_lightning.__file__).parent
ROOT = PACKAGE.parent

# What each part may import besides itself.
MAY_IMPORT = {
    "gpt_lightning": set(),  # it imports the public names on first use
    "errors": set(),
    "files": {"errors"},
    "config_files": {"errors"},
    "data": {"errors", "files"},
    "model": {"errors"},
    "checkpoint": {"data", "errors", "files", "model"},
    "generation": {"checkpoint", "data", "errors", "model"},
    "training": {"checkpoint", "data", "errors", "files", "generation", "model"},
    "settings": {"checkpoint", "config_files", "data", "errors", "model", "training"},
    "lightning_cli": {
        "checkpoint", "config_files", "data", "errors", "files", "generation", "model", "settings",
        "training",
    },
    "ladder": {
        "checkpoint", "config_files", "data", "errors", "files", "generation", "lightning_cli",
        "model", "settings", "training",
    },
    "cli": {
        "gpt_lightning", "checkpoint", "data", "errors", "generation", "ladder", "lightning_cli",
        "model",
    },
    "__main__": {"cli"},
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def part(module: str) -> str:
    """The part of the package that a module belongs to: gpt_lightning.data.tokens -> data."""
    names = module.split(".")
    return names[1] if len(names) > 1 else names[0]


def imports(module: str, source: str) -> set[str]:
    """The modules of the package that one imports, at the top or within a function.

    Imports under `if TYPE_CHECKING:` are for type checkers and do not count.
    """
    tree = ast.parse(source)
    ignored = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in set(ast.walk(tree)) - ignored:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from gpt_lightning.data import tokens` imports a module, not a name
            names = [name if name in MODULES else node.module for name in names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "gpt_lightning":
                assert name in MODULES, f"{module}, line {node.lineno}: there is no {name}"
                found.add(name)
    return found


def imports_of(module: str) -> set[str]:
    return imports(module, MODULES[module].read_text(encoding="utf-8"))


def forbidden(module: str, names: set[str]) -> set[str]:
    own = part(module)
    return {name for name in names if part(name) not in MAY_IMPORT[own] | {own}}


def test_the_check_sees_every_form_of_import():
    source = """
from typing import TYPE_CHECKING
import gpt_lightning.model, os
from gpt_lightning import cli
def f():
    if True:
        from gpt_lightning import __version__
if TYPE_CHECKING:
    from gpt_lightning.data.tokens import TokenFile
"""
    assert imports("x", source) == {"gpt_lightning.model", "gpt_lightning.cli", "gpt_lightning"}
    names = {"gpt_lightning.model", "gpt_lightning.data.tokens"}
    assert forbidden("gpt_lightning.data.x", names) == {"gpt_lightning.model"}
    assert forbidden("gpt_lightning.model.x", names) == {"gpt_lightning.data.tokens"}
    assert forbidden("gpt_lightning.training.x", names) == set()


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    assert part(module) in MAY_IMPORT, f"{module}: add its part to MAY_IMPORT"
    found = forbidden(module, imports_of(module))
    assert not found, f"{module} must not import {', '.join(sorted(found))}"


def test_no_two_modules_import_each_other():
    graph = {module: imports_of(module) - {module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle: {' <- '.join(error.args[1])}")


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a new interpreter has loaded after `code`."""
    found = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return {name.split(".")[0] for name in found.stdout.split()}


TRAINING_ONLY = {
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "torchmetrics",
    "jsonargparse",
    "tensorboard",
}


def test_the_command_line_starts_without_torch():
    assert not loaded_by("import gpt_lightning.cli") & {*TRAINING_ONLY, "torch"}


def test_generation_does_not_load_lightning():
    names = "TextGenerator, Sampling, GPTConfig, load_model"
    loaded = loaded_by(f"import gpt_lightning.cli; from gpt_lightning import {names}")
    assert "torch" in loaded and not loaded & TRAINING_ONLY


def test_every_public_name_can_be_imported():
    for name in gpt_lightning.__all__:
        assert getattr(gpt_lightning, name)
    with pytest.raises(AttributeError, match="gpt_lightning.*'Reader'"):
        gpt_lightning.Reader  # noqa: B018
