"""Every shipped config parses and takes training steps, a validation and a sample."""

import re
from pathlib import Path

import pytest

from gpt_lightning.cli import main

CONFIGS = Path(__file__).parent.parent / "configs"
OVERLAYS = sorted(CONFIGS.glob("debug/*.yaml"))
WHOLE = sorted(set(CONFIGS.rglob("*.yaml")) - set(OVERLAYS))
QUICK = [
    "--data.corpus=playwright:3:9000",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--model.eval_iters=2",
    "--sample.every_n_steps=2",
    "--sample.max_new_tokens=5",
]


def fit(*flags: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["fit", *flags])
    return ended.value.code


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_there_are_configs():
    assert {p.stem for p in WHOLE} >= {"laptop", "nanogpt_cpu", "01_bigram", "13_scaled_up_gpu"}
    assert {p.stem for p in OVERLAYS} == {"overfit", "few_steps"}


@pytest.mark.parametrize("path", WHOLE, ids=lambda p: p.stem)
def test_config_trains_validates_and_samples(path, capsys, tmp_path):
    assert fit("--config", str(path), "--data.batch_size=4", *QUICK) == 0
    out = capsys.readouterr().out
    assert "step 2  " in out and "final val loss" in out and "- step 2 -" in out
    assert (tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt").exists()


def test_overlays_compose_with_a_config(capsys):
    laptop = ["--config", str(CONFIGS / "laptop.yaml"), "--data.corpus=playwright:3:9000"]
    small = ["--model.n_layer=1", "--model.n_embd=32", "--trainer.accelerator=cpu"]
    assert fit(*laptop, "--config", str(CONFIGS / "debug/few_steps.yaml"), *small) == 0
    out = capsys.readouterr().out
    assert re.search(r"^steps +10$", out, re.MULTILINE) and "block 128" in out


def test_overfit_overlay_learns_its_batch_by_heart(capsys):
    flags = ["--config", str(CONFIGS / "debug/overfit.yaml"), "--data.corpus=playwright:3:9000"]
    small = ["--data.block_size=16", "--data.batch_size=4", "--model.n_embd=64",
             "--model.learning_rate=3e-3", "--sample.every_n_steps=0"]  # fmt: skip
    assert fit(*flags, *small, "--trainer.accelerator=cpu") == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("step 300"))
    assert float(line.split("train ")[1].split()[0]) < 0.3
    assert float(line.split("val ")[1].split()[0]) > 2
