"""A wheel, unpacked elsewhere, contains all that a user needs, types included."""

import configparser
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from gpt_lightning.config_files import CONFIGS

SMALL = (
    "--data.corpus=playwright:3:9000",
    "--data.batch_size=4",
    "--trainer.max_steps=10",
    "--trainer.val_check_interval=10",
    "--trainer.accelerator=cpu",
    "--model.eval_iters=2",
    "--sample.every_n_steps=0",
)
SCRIPT = """\
from lightning.pytorch import Trainer
from gpt_lightning import GPTConfig, GPTModule, OptimizerConfig, Sampling
from gpt_lightning import TextDataModule, TextGenerator, load_model

data = TextDataModule("playwright", block_size=128, batch_size=16)
model = GPTModule(GPTConfig(n_layer=4), OptimizerConfig(learning_rate=1e-3))
Trainer(max_steps=1000).fit(model, data)
generator = TextGenerator(model.net, data.tokenizer)
texts: list[str] = generator.generate("HUGO:", max_new_tokens=200, sampling=Sampling(top_k=5))
for pieces in generator.stream("HUGO:", seed=1):
    print("".join(pieces))
parameters = sum(p.numel() for p in load_model("best.ckpt").parameters())
TextDataModule("playwright", block_size="128")  # mistake: a wrong type
GPTConfig(n_layers=4)  # mistake: a misspelt argument
generator.generate("HUGO:", sampling=5)  # mistake: a wrong argument of a method
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A folder with the contents of a wheel that is built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools leaves a build folder behind
    for name in ("gpt_lightning", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command = [*build, "-w", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder / "contents")
    return folder / "contents"


def test_wheel_contains_the_package_and_its_configs_only(wheel):
    names = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    package = {n for n in names if not n.startswith("gpt_lightning-0.1.0.dist-info/")}
    modules = {path.relative_to(ROOT) for path in (ROOT / "gpt_lightning").rglob("*.py")}
    configs = {"gpt_lightning/configs" / path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.*")}
    page = {path.relative_to(ROOT) for path in (ROOT / "gpt_lightning/export/page").iterdir()}
    expected = {path.as_posix() for path in modules | configs | page} | {"gpt_lightning/py.typed"}
    assert package == expected


def test_wheel_fits_generates_and_climbs_in_an_empty_folder(wheel, cli, tmp_path):
    for argv, output in (
        (["fit", "--config=lecture/08_residual", *SMALL], "final val loss"),
        (["generate", "--prompt=HUGO", "--max_new_tokens=20"], "HUGO"),
        (["climb", "--seeds=1", "--rungs=01_bigram,08_residual", *SMALL], "written to ladder"),
    ):
        done = cli(*argv, env={"PYTHONPATH": str(wheel)}, timeout=300)
        assert done.returncode == 0 and output in done.stdout, done.stderr
    assert "Residual connections" in (tmp_path / "ladder" / "ladder.md").read_text("utf-8")


@pytest.mark.slow
def test_a_type_checker_finds_the_mistakes_of_a_script_and_no_others(wheel, tmp_path):
    environment = tmp_path / "environment"  # the wheel, and the other packages borrowed
    venv.create(environment, with_pip=False)
    scheme = sysconfig.get_preferred_scheme("prefix") if sys.version_info < (3, 11) else "venv"
    paths = sysconfig.get_paths(scheme, {"base": str(environment), "platbase": str(environment)})
    borrowed = f"{wheel}\n{sysconfig.get_path('purelib')}\n"
    (Path(paths["purelib"]) / "packages.pth").write_text(borrowed)
    python = Path(paths["scripts"]) / ("python.exe" if sys.platform == "win32" else "python")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", f"--python-executable={python}", "script.py"]
    command += ["--hide-error-context", "--no-pretty", "--disable-error-code=import-untyped"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    errors = re.findall(r"^script.py:(\d+): error: ", found.stdout, re.M)
    lines = [n for n, line in enumerate(SCRIPT.splitlines(), 1) if "# mistake" in line]
    assert list(map(int, errors)) == lines, found.stdout + found.stderr


def test_every_imported_package_is_a_dependency():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    declared = set(re.findall(r"^([\w-]+)", config["options"]["install_requires"], re.M))
    names = {
        "yaml": "pyyaml",
        "docstring_parser": "docstring-parser",
        "charset_normalizer": "charset-normalizer",
    }
    # their absence is reported
    optional = {"matplotlib", "tokenizers", "transformers", "onnx", "onnxscript", "onnxruntime"}
    known = sys.stdlib_module_names | optional | {"gpt_lightning"}
    for path in (ROOT / "gpt_lightning").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        imported = set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.M)) - known
        assert {names.get(name, name) for name in imported} <= declared, path.name
