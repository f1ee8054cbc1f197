"""Every shipped config holds only differences, and trains, validates and generates a sample."""

import inspect
import re

import pytest
from conftest import run

from gpt_lightning import GPTModule, OptimizerConfig, TextDataModule
from gpt_lightning.config_files import CONFIGS, load_config, read_mapping
from gpt_lightning.model import CONFIGS as MODELS

pytestmark = pytest.mark.usefixtures("empty")

OVERLAYS = sorted(CONFIGS.glob("debug/*.yaml"))
WHOLE = sorted(set(CONFIGS.rglob("*.yaml")) - set(OVERLAYS))
QUICK = [
    "--data.corpus=playwright:3:9000",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--model.eval_iters=2",
    "--model.compile=false",  # the configs for a GPU compile, which takes long on a CPU
    "--sample.every_n_steps=2",
    "--sample.max_new_tokens=5",
]


@pytest.mark.parametrize("path", WHOLE, ids=lambda p: p.stem)
def test_config_holds_only_what_differs_from_base_and_defaults(path):
    own = read_mapping(path)
    base = load_config(path.parent / own["base"]) if "base" in own else {}
    model = MODELS[load_config(path).get("model", {}).get("name", "gpt")]
    defaults = {
        "data": parameters(TextDataModule),
        "model": {"name": "gpt"}
        | parameters(GPTModule)
        | parameters(OptimizerConfig)
        | parameters(model),
        "trainer": {"log_every_n_steps": 10, "gradient_clip_val": 1.0, "precision": None},
    }
    for section in own.keys() - {"base"}:
        before = defaults.get(section, {}) | base.get(section, {})
        repeated = {k for k, v in own[section].items() if k in before and before[k] == v}
        assert not repeated, f"{section}: {repeated}"


def parameters(function) -> dict:
    """The default of each argument of a function or class."""
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


@pytest.mark.parametrize("path", WHOLE, ids=lambda p: p.stem)
def test_config_trains_validates_and_generates(path, capsys, tmp_path):
    assert run("fit", "--config", str(path), "--data.batch_size=4", *QUICK) == 0
    out = capsys.readouterr().out
    assert "step 2  " in out and "final val loss" in out and "- step 2 -" in out
    assert (tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt").exists()


def test_overlays_compose_with_a_config(capsys):
    small = ["--model.n_layer=1", "--model.n_embd=32", "--trainer.accelerator=cpu"]
    flags = ["--config", "laptop", "--data.corpus=playwright:3:9000", *small]
    assert run("fit", *flags, "--config", "debug/few_steps") == 0
    assert re.search(r"^steps +10$", capsys.readouterr().out, re.MULTILINE)


def test_overfit_overlay_memorizes_its_batch(capsys):
    flags = ["--config=debug/overfit", "--data.corpus=playwright:3:9000", "--data.block_size=16"]
    small = ["--data.batch_size=4", "--model.n_embd=64", "--model.learning_rate=3e-3"]
    assert run("fit", *flags, *small, "--sample.every_n_steps=0", "--trainer.accelerator=cpu") == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("step 300"))
    assert float(line.split("train ")[1].split()[0]) < 0.3
    assert float(line.split("val ")[1].split()[0]) > 2
