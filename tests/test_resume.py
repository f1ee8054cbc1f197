"""A run that is killed and resumed ends exactly where the uninterrupted one does."""

import subprocess

import pytest
from kills import CHECKPOINTS, FIT, RESUME, Strike, chain, checkpoint, finish, series, unequal

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


def test_tensorboard_reads_every_series(uninterrupted):
    found = series(uninterrupted)
    every_10 = list(range(10, STEPS + 1, 10))
    validations = [70, 140, 210, 280, 300]  # the last step too, though 70 does not divide it
    for tag in ("train/loss", "lr", "lr_muon", "grad_norm", "chars_per_second"):
        assert [step for step, _ in found[tag]] == every_10, tag
    for tag in ("val/loss", "val/bpc", "val/floor"):
        assert [step for step, _ in found[tag]] == validations, tag
    assert [step for step, _ in found["generated/text_summary"]] == [100, 200, 300]
    best = min(value for _, value in found["val/loss"])
    assert found["val/best"] == [(STEPS, best)]


def assert_resumed_as(whole, folder, flags, strikes):
    """Struck so, a run ends as the one in `whole` did, with nothing amiss on the way."""
    kills = chain(folder, flags, strikes)
    assert [kill.faults for kill in kills] == [[]] * len(kills)
    assert not any(kill.ended or kill.step is None for kill in kills)
    assert unequal(whole, folder) == []


def test_a_run_with_workers_that_is_stopped_and_killed_ends_as_the_uninterrupted_one(
    uninterrupted, tmp_path
):
    def strikes():
        yield Strike(("SIGINT",), saves=4, delay=0.03)
        yield Strike(("SIGKILL",), "save", saves=6, delay=0.002, group=False)
        (tmp_path / "run" / CHECKPOINTS / ".best.ckpt.0123456789abcdef.tmp").write_bytes(b"torn")
        yield Strike(("SIGTERM",), saves=4, delay=0.05)

    assert_resumed_as(uninterrupted, tmp_path / "run", [*RUN, "--data.num_workers=2"], strikes())


@pytest.mark.parametrize(
    "flags, said, strikes",
    [
        (
            ["--trainer.precision=bf16-mixed"],
            "muon, bf16-mixed",
            [
                Strike(("SIGTERM",), "save", saves=9, delay=0.001),
                Strike(("SIGKILL",), saves=9, delay=0.04),
            ],
        ),
        (
            [*LECTURE, "--model.warmup_steps=100", "--model.schedule=cosine"],
            "adamw, 32-true",
            [Strike(("SIGKILL",), "save", saves=15, delay=0.001)],
        ),
    ],
    ids=["bf16", "adamw"],
)
def test_so_does_one_in_bf16_and_one_with_adamw(flags, said, strikes, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole, *RUN, *flags)
    assert_resumed_as(whole, killed, [*RUN, *flags], strikes)
    for log in ("0.txt", "end.txt"):  # of the resumed run too
        assert said in (killed / log).read_text()


# Muon rounds to bf16: a number that falls the other way grows to 2% of a matrix in these 60 steps.
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
    for tag in ("train/loss", "val/loss"):
        one_series, two_series = series(one)[tag], series(two)[tag]
        assert [s for s, _ in one_series] == [s for s, _ in two_series]
        values = [[v for _, v in points] for points in (one_series, two_series)]
        assert values[0] == pytest.approx(values[1], abs=nats)


def test_two_processes_that_are_killed_go_on_exactly(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = [*RUN, *DDP, "--trainer.max_steps=100"]
    finish(whole, *flags)
    assert_resumed_as(whole, killed, flags, [Strike(("SIGKILL",), saves=5, delay=0.03)])


def test_flags_win_over_the_checkpoint_and_later_states_are_kept(uninterrupted, tmp_path):
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", uninterrupted, folder], check=True)
    run = folder / "lightning_logs/version_0"
    finish(folder, *RESUME, f"--trainer.max_steps={STEPS + 20}",
        "--model.learning_rate=0.5", "--model.min_lr=0.5", "--model.muon_learning_rate=0.03",
        "--model.weight_decay=0.3", "--data.batch_size=10")  # fmt: skip
    last = checkpoint(folder)
    groups = last["optimizer_states"][0]["param_groups"]
    assert last["global_step"] == STEPS + 20
    assert [group["muon"] for group in groups] == [False, True]
    assert [group["lr"] for group in groups] == [0.5, 0.03]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.3]
    assert last["hyper_parameters"]["dropout"] == 0.2  # not given, so the checkpoint's
    assert last["datamodule_hyper_parameters"]["batch_size"] == 10
    assert sorted(p.name for p in run.glob("config*")) == [
        f"config-step{STEPS}.yaml",
        "config.yaml",
    ]

    # going back to an earlier state: what came later is set aside, not overwritten
    bytes_before = (run / "checkpoints/last.ckpt").read_bytes()
    best_step = checkpoint(folder, "best")["global_step"]
    subprocess.run(["cp", run / "checkpoints/best.ckpt", run / "checkpoints/mine.ckpt"], check=True)
    finish(folder, "fit", f"--ckpt_path={CHECKPOINTS}/mine.ckpt",
        f"--trainer.max_steps={best_step + 20}")  # fmt: skip
    kept = run / f"checkpoints/last-step{STEPS + 20}.ckpt"
    assert kept.read_bytes() == bytes_before
    assert checkpoint(folder)["global_step"] == best_step + 20

    # a torn last.ckpt is set aside too, and stands in nobody's way
    torn = bytes_before[: len(bytes_before) // 2]
    (run / "checkpoints/last.ckpt").write_bytes(torn)
    finish(folder, "fit", f"--ckpt_path={CHECKPOINTS}/mine.ckpt",
        f"--trainer.max_steps={best_step + 20}")  # fmt: skip
    assert (run / "checkpoints/last-unreadable.ckpt").read_bytes() == torn
    assert checkpoint(folder)["global_step"] == best_step + 20
