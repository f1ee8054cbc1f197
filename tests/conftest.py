"""Fixtures that several test files use."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gpt_lightning.cli import main

TEXT = "To be, or not to be: that is the question;\nwhether 'tis nobler in the mind.\n" * 20
TINY = (  # flags of a run that takes about a second
    "--data.corpus=text.txt",
    "--data.block_size=8",
    "--data.batch_size=4",
    "--model.n_layer=1",
    "--model.n_head=2",
    "--model.n_embd=16",
    "--trainer.max_steps=4",
    "--trainer.accelerator=cpu",
)


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    """A cache of its own, so that tests leave the user's alone; all tests share it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT_LIGHTNING_CACHE", str(folder))
        yield folder


@pytest.fixture
def cli(tmp_path):
    """Run the command line in a new process: `cli("fit", "--trainer.max_steps=1", cwd=folder)`."""

    def run(*argv, cwd=tmp_path, timeout=120, env=None):
        root = Path(__file__).parent.parent
        return subprocess.run(
            [sys.executable, "-m", "gpt_lightning", *map(str, argv)],
            cwd=cwd,
            timeout=timeout,
            env={
                "OMP_NUM_THREADS": "1",
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
                "PYTHONIOENCODING": "utf-8",
                **(env or {}),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
        )

    return run


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """The folder that `trained` copies; tests must not change it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.chdir(folder)
        main(["fit", *TINY])
    assert end.value.code == 0
    return folder


@pytest.fixture
def trained(trained_once, tmp_path):
    """A folder with `text.txt` and a run of `fit` with TINY on it in `lightning_logs`."""
    return Path(shutil.copytree(trained_once, tmp_path / "trained"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """A folder with the contents of a wheel that is built from this checkout."""
    folder, root = tmp_path_factory.mktemp("wheel"), Path(__file__).parent.parent
    source = folder / "source"  # setuptools leaves a build folder behind
    for name in ("gpt_lightning", "configs"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*build, "-w", str(folder), str(source)], check=True, capture_output=True, timeout=120
    )
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder / "contents")
    return folder / "contents"
