"""Samples through training: which are kept, and that checkpoints have them."""

import pytest
import torch
from conftest import TINY, run

from gpt_lightning import TextGenerator
from gpt_lightning.checkpoint import read_checkpoint, run_history
from gpt_lightning.training.callbacks import KEPT_CHARACTERS, KEPT_SAMPLES, GenerateText

EACH_STEP = ("--sample.every_n_steps=1", "--sample.max_new_tokens=10", "--sample.temperature=0")
LAST, BEST = (f"lightning_logs/version_0/checkpoints/{name}.ckpt" for name in ("last", "best"))


def fit(*flags):
    assert run("fit", *flags) == 0


@pytest.mark.parametrize("count", [1, KEPT_SAMPLES, KEPT_SAMPLES + 1, 57, 400])
def test_the_first_and_the_last_sample_stay_and_the_gaps_between_are_even(count):
    callback = GenerateText()
    for step in range(500, 500 * (count + 1), 500):
        callback.keep(step, str(step))
    kept = [*callback.samples]
    assert kept == sorted(kept) and len(kept) == min(count, KEPT_SAMPLES)
    assert (kept[0], kept[-1]) == (500, 500 * count)
    gaps = [b - a for a, b in zip(kept[:-1], kept[1:], strict=True)]
    # gaps are halves of each other, except the one before the last sample
    assert count == 1 or max(gaps) <= 3 * min(gaps[:-1] or gaps)
    assert callback.samples[kept[-1]] == str(kept[-1])


def test_a_long_sample_is_cut():
    callback = GenerateText()
    callback.keep(1, "ab" * KEPT_CHARACTERS)
    assert callback.samples[1] == "ab" * (KEPT_CHARACTERS // 2)


def test_samples_survive_a_resume_and_are_those_of_the_weights(here):
    once, twice = "--trainer.default_root_dir=once", "--trainer.default_root_dir=twice"
    constant = "--model.lr_decay_steps=0"  # the rate must not depend on max_steps
    fit(*TINY, *EACH_STEP, constant, once)
    fit(*TINY, *EACH_STEP, constant, twice, "--trainer.max_steps=2")
    fit(f"--ckpt_path=twice/{LAST}", "--trainer.max_steps=4")
    history = run_history(read_checkpoint(f"twice/{LAST}"))
    assert [step for step, _ in history["samples"]] == [1, 2, 3, 4]
    assert history["samples"] == run_history(read_checkpoint(f"once/{LAST}"))["samples"]
    generator = TextGenerator.load(f"twice/{LAST}", precision="fp32")
    settings = GenerateText(max_new_tokens=10, temperature=0).settings
    assert history["samples"][-1] == (4, generator.generate(**settings)[0])


def test_the_best_checkpoint_has_the_samples_up_to_its_step(here):
    # the loss rises after the first step
    rate = ("--model.optimizer=adamw", "--model.learning_rate=10")
    fit(*TINY, *EACH_STEP, *rate, "--trainer.val_check_interval=1", "--trainer.default_root_dir=x")
    best = read_checkpoint(f"x/{BEST}")
    steps = [step for step, _ in run_history(best)["samples"]]
    assert best["global_step"] < 4 and steps == [*range(1, best["global_step"] + 1)]


def test_a_checkpoint_without_samples_and_floor_resumes(here):
    checkpoint = torch.load(LAST, weights_only=True)
    del checkpoint["callbacks"]["GenerateText"], checkpoint["callbacks"]["TrainingMetrics"]["floor"]
    torch.save(checkpoint, LAST)
    fit(f"--ckpt_path={LAST}", "--trainer.max_steps=6", *EACH_STEP)
    history = run_history(read_checkpoint(LAST))
    assert [step for step, _ in history["samples"]] == [5, 6] and history["floor"] is None
    assert history["val_losses"][0][0] < 4


def test_the_known_entropy_is_kept_beside_the_losses(empty, capsys):
    fit(*TINY[1:], "--data.corpus=playwright:1:20000")
    floor = run_history(read_checkpoint(LAST))["floor"]
    assert f"floor {floor:.4f}" in capsys.readouterr().out
