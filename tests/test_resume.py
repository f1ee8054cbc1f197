"""A run that is killed and resumed arrives exactly where the uninterrupted run does."""

import shutil

import pytest
from kills import (
    FIT,
    RESUME,
    Strike,
    chain,
    checkpoint,
    differences,
    finish,
    result,
    series,
)

pytestmark = pytest.mark.slow  # each starts several real runs

STEPS = 300
RUN = [*FIT, f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=70"]
DDP = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=6"]
LECTURE = ["--model.name=lecture", "--model.optimizer=adamw", "--model.learning_rate=3e-3"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(folder, *RUN)
    return folder


def test_tensorboard_shows_every_series(uninterrupted):
    found = series(uninterrupted)
    every_10 = list(range(10, STEPS + 1, 10))
    validations = [70, 140, 210, 280, 300]  # the last step too, though 70 does not divide it
    steps = {tag: [step for step, _ in points] for tag, points in found.items()}
    rates = ("optimizer/lr", "optimizer/lr_muon", "optimizer/grad_norm")
    for tag in ("loss/train", *rates, "speed/chars_per_second"):
        assert steps[tag] == every_10, tag
    for tag in ("loss/val", "loss/val_bits", "loss/floor"):
        assert steps[tag] == validations, tag
    assert any(at == [100, 200, 300] for at in steps.values())  # the texts


def assert_resumed_as(whole, folder, flags, strikes):
    """Struck so, a run arrives where the one in `whole` did, with no fault on the way."""
    kills = chain(folder, flags, strikes)
    assert [kill.faults for kill in kills] == [[]] * len(kills)
    assert not any(kill.finished for kill in kills)
    assert differences(result(whole), result(folder)) == []


def test_an_interrupted_and_killed_run_arrives_where_the_uninterrupted_one_does(
    uninterrupted, tmp_path
):
    strikes = [
        Strike("SIGINT", saves=4, delay=0.03),
        Strike("SIGKILL", in_save=True, saves=6, delay=0.002),
        Strike("SIGTERM", saves=4, delay=0.05),
        Strike("SIGKILL", saves=2, delay=0.01),
    ]
    assert_resumed_as(uninterrupted, tmp_path / "run", RUN, strikes)


@pytest.mark.parametrize(
    "flags, words, strikes",
    [
        (
            ["--trainer.precision=bf16-mixed", "--trainer.accumulate_grad_batches=2",
             "--trainer.max_steps=150", "--trainer.val_check_interval=60"],
            "muon, bf16-mixed",
            [Strike("SIGTERM", in_save=True, saves=5, delay=0.001),
             Strike("SIGKILL", saves=4, delay=0.04)],
        ),
        (
            [*LECTURE, "--model.warmup_steps=100", "--model.schedule=cosine"],
            "adamw, 32-true",
            [Strike("SIGKILL", in_save=True, saves=15, delay=0.001)],
        ),
    ],
    ids=["bf16 with accumulation", "adamw"],
)  # fmt: skip
def test_so_does_a_run_with_other_settings_which_are_restored(flags, words, strikes, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole, *RUN, *flags)
    assert_resumed_as(whole, killed, [*RUN, *flags], strikes)
    for log in ("0.txt", "end.txt"):  # of the resumed run too
        assert words in (killed / log).read_text()


# Muon rounds to bf16: a number that is rounded the other way grows to 2% of a matrix in 60 steps.
# Without the other process's gradients it would be 90%, and the losses 0.1 apart.
@pytest.mark.parametrize(
    "flags, share, nats", [([], 0.1, 5e-3), (LECTURE, 1e-4, 2e-4)], ids=["muon", "adamw"]
)
def test_two_processes_with_half_the_batch_follow_one(flags, share, nats, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [*RUN, *flags, "--model.dropout=0", "--trainer.max_steps=60",
             "--trainer.val_check_interval=30"]  # fmt: skip
    finish(one, *flags)
    finish(two, *flags, *DDP)
    a, b = checkpoint(one)["state_dict"], checkpoint(two)["state_dict"]
    for name, tensor in a.items():
        assert (tensor - b[name]).norm() <= share * tensor.norm(), name
    for tag in ("loss/train", "loss/val"):
        one_series, two_series = series(one)[tag], series(two)[tag]
        assert [s for s, _ in one_series] == [s for s, _ in two_series]
        values = [[v for _, v in points] for points in (one_series, two_series)]
        assert values[0] == pytest.approx(values[1], abs=nats)


def test_two_processes_that_are_interrupted_and_killed_resume_exactly(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = [*RUN, *DDP, "--trainer.max_steps=100"]
    finish(whole, *flags)
    signals = ("SIGTERM", "SIGKILL")
    strikes = [Strike(name, saves=3, delay=0.03) for name in signals]
    assert_resumed_as(whole, killed, flags, strikes)


def test_flags_override_the_checkpoints_settings(uninterrupted, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted, folder)
    run = folder / "lightning_logs/version_0"
    finish(folder, *RESUME, f"--trainer.max_steps={STEPS + 20}",
        "--model.learning_rate=0.5", "--model.min_lr=0.5", "--model.muon_learning_rate=0.03",
        "--model.weight_decay=0.3", "--data.batch_size=10")  # fmt: skip
    last = checkpoint(folder)
    groups = last["optimizer_states"][0]["param_groups"]
    assert last["global_step"] == STEPS + 20
    assert {group["lr"] for group in groups} == {0.5, 0.03}
    assert {group["weight_decay"] for group in groups} == {0.1, 0.3}
    settings = last["gpt_lightning"]["settings"]
    assert settings["model"]["dropout"] == 0.2  # not given, so the checkpoint's
    assert settings["data"]["batch_size"] == 10
    configs = sorted(path.name for path in run.glob("config*"))
    assert configs == [f"config-step{STEPS}.yaml", "config.yaml"]
