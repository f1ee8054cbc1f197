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

# what each room may import besides itself
MAY_IMPORT = {
    "gpt_lightning": set(),  # the version, and names that it imports on first use
    "messages": set(),
    "data": {"messages"},
    "model": {"messages"},
    "config_files": set(),
    "untrusted": set(),
    "checkpoint": {"data", "messages", "model", "untrusted"},
    "generation": {"checkpoint", "data", "messages", "model"},
    "training": {"checkpoint", "data", "generation", "messages", "model"},
    "lightning_cli": {
        "checkpoint", "config_files", "data", "generation", "messages", "model", "training",
    },
    "ladder": {
        "checkpoint", "config_files", "data", "generation", "lightning_cli", "messages", "training",
    },
    "cli": {
        "gpt_lightning", "checkpoint", "data", "generation", "ladder", "lightning_cli", "messages",
        "model",
    },
    "__main__": {"cli"},
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imported(module: str, source: str, modules=MODULES) -> set[tuple[str, bool]]:
    """The modules of the package that one imports, each with whether it does so when it loads."""
    tree = ast.parse(source)
    in_functions = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: imports are written in full"
            # what is imported from a package may be a module of it
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in names]
        for name in names:
            if name.split(".")[0] == "gpt_lightning":
                assert name in modules, f"{module}, line {node.lineno}: there is no {name}"
                found.add((name, node not in in_functions))
    return found


def imports_of(module: str) -> set[tuple[str, bool]]:
    return imported(module, MODULES[module].read_text(encoding="utf-8"))


def steps_back(module: str, names) -> list[str]:
    own = room(module)
    return sorted(n for n in names if room(n) != own and room(n) not in MAY_IMPORT[own])


def test_the_walk_sees_every_form_of_import():
    source = """
import gpt_lightning.model, os
from gpt_lightning import cli
from gpt_lightning.data.tokens import TokenFile as T
def f():
    if True:
        from gpt_lightning import __version__
"""
    assert imported("x", source) == {
        ("gpt_lightning.model", True),
        ("gpt_lightning.cli", True),
        ("gpt_lightning.data.tokens", True),
        ("gpt_lightning", False),
    }
    assert steps_back("gpt_lightning.data.x", ["gpt_lightning.model", "gpt_lightning.data.tokens"])
    assert steps_back("gpt_lightning.model.x", ["gpt_lightning.data"])
    assert steps_back("gpt_lightning.training.x", ["gpt_lightning.cli"])
    assert not steps_back("gpt_lightning.training.x", ["gpt_lightning.generation.writer"])


def test_every_module_lies_in_a_room_that_has_its_rules():
    assert {room(module) for module in MODULES} <= MAY_IMPORT.keys()
    assert len(MODULES) > 15


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    found = steps_back(module, {name for name, _ in imports_of(module)})
    assert not found, f"{module} must not import {', '.join(found)}"


def test_the_front_door_is_imported_by_nobody_else():
    importers = {f"gpt_lightning.{name}": set() for name in ("cli", "lightning_cli", "ladder")}
    for module in MODULES:
        for name, _ in imports_of(module):
            if name in importers:
                importers[name].add(module)
    assert importers["gpt_lightning.cli"] <= {"gpt_lightning.__main__"}
    assert importers["gpt_lightning.ladder"] <= {"gpt_lightning.cli"}
    assert importers["gpt_lightning.lightning_cli"] <= {"gpt_lightning.cli", "gpt_lightning.ladder"}
    # and there only once a command needs them
    when_it_loads = {name for name, at_once in imports_of("gpt_lightning.cli") if at_once}
    assert not when_it_loads & {"gpt_lightning.lightning_cli", "gpt_lightning.ladder"}


def test_no_circle_of_imports():
    graph = {
        module: {name for name, _ in imports_of(module) if name != module} for module in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after `code`."""
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


def test_the_front_door_opens_without_torch():
    assert not loaded_by("import gpt_lightning.cli") & {*TRAINING_ONLY, "torch"}


def test_generation_does_not_load_lightning():
    loaded = loaded_by("import gpt_lightning.cli; from gpt_lightning import Writer")
    assert "torch" in loaded and not loaded & TRAINING_ONLY


def test_public_names_are_there():
    assert gpt_lightning.__version__ and "Writer" in gpt_lightning.__all__
    for name in gpt_lightning.__all__:
        assert getattr(gpt_lightning, name)
    with pytest.raises(AttributeError, match="gpt_lightning.*'Reader'"):
        gpt_lightning.Reader  # noqa: B018
