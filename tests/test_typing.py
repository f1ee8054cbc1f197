"""Type checkers see the public names after a plain installation."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

CORRECT = """\
from lightning.pytorch import Trainer

from gpt_lightning import (
    GPTConfig, GPTModule, OptimizerConfig, Sampling, TextDataModule, TextGenerator, load_model
)

data = TextDataModule("playwright", block_size=128, batch_size=16)
model = GPTModule(GPTConfig(n_layer=4), OptimizerConfig(learning_rate=1e-3))
trainer = Trainer(max_steps=1000)
trainer.fit(model, data)
generator = TextGenerator(model.net, data.tokenizer)
texts: list[str] = generator.generate("HUGO:", max_new_tokens=200, sampling=Sampling(top_k=5))
for pieces in generator.stream("HUGO:", seed=1):
    print("".join(pieces))
parameters = sum(p.numel() for p in load_model("best.ckpt").parameters())
"""
MISTAKES = {
    "block_size=128": 'block_size="128"',  # a wrong type
    "n_layer=4": "n_layers=4",  # a misspelt argument
    "sampling=Sampling(top_k=5)": "sampling=5",  # a wrong argument of a method
}


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment with the wheel installed and the rest borrowed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    scheme = sysconfig.get_preferred_scheme("prefix") if sys.version_info < (3, 11) else "venv"
    paths = sysconfig.get_paths(scheme, {"base": str(folder), "platbase": str(folder)})
    borrowed = f"{wheel}\n{sysconfig.get_path('purelib')}\n"
    (Path(paths["purelib"]) / "packages.pth").write_text(borrowed)
    return Path(paths["scripts"]) / ("python.exe" if sys.platform == "win32" else "python")


def mypy(python: Path, folder: Path, script: str) -> list[str]:
    """The errors that mypy finds in a script: a line for each."""
    (folder / "script.py").write_text(script)
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", str(python), "--no-error-summary"]
        + ["--hide-error-context", "--no-pretty", "--disable-error-code=import-untyped"]
        + ["--cache-dir", str(python.parent.parent / "mypy"), "script.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not found.stderr, found.stderr
    return [line for line in found.stdout.splitlines() if ": error: " in line]


@pytest.mark.slow
def test_a_correct_script_has_no_type_errors(python, tmp_path):
    assert mypy(python, tmp_path, CORRECT) == []


@pytest.mark.slow
def test_each_of_three_mistakes_in_a_script_is_a_type_error(python, tmp_path):
    script = CORRECT
    for right, wrong in MISTAKES.items():
        assert right in script
        script = script.replace(right, wrong)
    errors = mypy(python, tmp_path, script)
    lines = [
        i for i, line in enumerate(script.splitlines(), 1) for w in MISTAKES.values() if w in line
    ]
    assert [int(error.split(":")[1]) for error in errors] == lines
