"""A wheel, unpacked elsewhere, contains all that a user needs."""

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_lightning.config_files import CONFIGS

ROOT = Path(__file__).parent.parent
SMALL = (
    "--data.corpus=playwright:3:9000",
    "--data.batch_size=4",
    "--trainer.max_steps=10",
    "--trainer.val_check_interval=10",
    "--trainer.accelerator=cpu",
    "--model.eval_iters=2",
    "--sample.every_n_steps=0",
)


@pytest.fixture
def installed(wheel, tmp_path):
    """Run the command line of the unpacked wheel in an empty folder."""

    def run(*argv: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(wheel), "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(
            [sys.executable, "-m", "gpt_lightning", *argv],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_wheel_contains_the_package_and_its_configs_only(wheel):
    names = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    package = {n for n in names if not n.startswith("gpt_lightning-0.1.0.dist-info/")}
    modules = {path.relative_to(ROOT) for path in (ROOT / "gpt_lightning").rglob("*.py")}
    configs = {"gpt_lightning/configs" / path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.*")}
    expected = {path.as_posix() for path in modules | configs} | {"gpt_lightning/py.typed"}
    assert package == expected


def test_wheel_fits_generates_and_climbs_in_an_empty_folder(installed, tmp_path):
    assert "final val loss" in installed("fit", "--config=lecture/08_residual", *SMALL)
    assert len(installed("generate", "--max_new_tokens=20")) >= 20
    installed("climb", "--seeds=1", "--rungs=01_bigram,08_residual", *SMALL)
    assert "Residual connections" in (tmp_path / "ladder" / "ladder.md").read_text("utf-8")


def test_every_imported_package_is_a_dependency():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = config["options"]["install_requires"]
    declared = set(re.findall(r"^([\w-]+)", listed, re.M))
    # aiohttp comes with fsspec[http]
    names = {"yaml": "pyyaml", "docstring_parser": "docstring-parser", "aiohttp": "fsspec"}
    optional = {"matplotlib"}  # for the ladder's picture; its absence is reported
    for path in (ROOT / "gpt_lightning").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"^\s*(?:import|from) (\w+)", text, re.M):
            if name not in sys.stdlib_module_names | optional | {"gpt_lightning"}:
                assert names.get(name, name) in declared, f"{path.name} imports {name}"
