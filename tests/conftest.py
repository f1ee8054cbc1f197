import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_lightning.cli import main

TEXT = "To be, or not to be: that is the question;\nwhether 'tis nobler in the mind.\n" * 20
TINY = (  # flags of a run that takes a moment
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
    """No test reads or fills the user's cache; the embedded corpus is written once for all."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT_LIGHTNING_CACHE", str(folder))
        yield folder


@pytest.fixture
def cli(tmp_path):
    """The real command line: `cli("fit", "--trainer.max_steps=1", cwd=folder)`."""

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
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.chdir(folder)
        main(["fit", *TINY])
    assert end.value.code == 0
    return folder


@pytest.fixture
def trained(trained_once, tmp_path):
    """A folder of one's own with `text.txt` and a run of TINY on it in `lightning_logs`."""
    return Path(shutil.copytree(trained_once, tmp_path / "trained"))
