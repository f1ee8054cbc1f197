"""A run that is killed and resumed ends exactly where the uninterrupted one does."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow  # each starts several real runs

STEPS = 700
FIT = [
    "fit",
    "--data.corpus=playwright:5:30000",
    "--data.block_size=16",
    "--data.batch_size=12",
    "--model.n_layer=2",
    "--model.n_head=2",
    "--model.n_embd=32",
    "--model.dropout=0.2",
    f"--trainer.max_steps={STEPS}",
    "--trainer.val_check_interval=150",
    "--trainer.accelerator=cpu",
    "--checkpoint.every_n_train_steps=50",
    "--sample.every_n_steps=200",
    "--sample.max_new_tokens=20",
]
DDP = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=6"]
LECTURE = ["--model.name=lecture", "--model.optimizer=adamw", "--model.learning_rate=3e-3"]


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "gpt_lightning", *flags]


def start(folder: Path, *flags: str) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    log = open(folder / "log.txt", "ab")  # noqa: SIM115
    # a session of its own, so that a kill reaches the other ranks too
    return subprocess.Popen(
        command(*flags), cwd=folder, stdout=log, stderr=log, start_new_session=True
    )


def fit(folder: Path, *flags: str) -> None:
    process = start(folder, *flags)
    assert process.wait(timeout=240) == 0, (folder / "log.txt").read_text()


def kill_within(folder: Path, seed: int, sign: int, *flags: str) -> int:
    """Start a fit and signal it at a random moment after its first checkpoint; its exit code."""
    process = start(folder, *flags)
    last = folder / "lightning_logs/version_0/checkpoints/last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists():
        assert process.poll() is None and time.monotonic() < deadline, (
            folder / "log.txt"
        ).read_text()
        time.sleep(0.002)
    time.sleep(random.Random(seed).uniform(0.0, 0.8))
    if sign == signal.SIGKILL:
        os.killpg(process.pid, sign)
    else:
        process.send_signal(sign)
    return process.wait(timeout=60)


def checkpoint(folder: Path, name: str = "last") -> dict:
    path = folder / f"lightning_logs/version_0/checkpoints/{name}.ckpt"
    return torch.load(path, weights_only=True)


def assert_equal_runs(one: Path, other: Path) -> None:
    a, b = checkpoint(one), checkpoint(other)
    assert a["global_step"] == b["global_step"] == STEPS
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, tensor in a["state_dict"].items():
        assert torch.equal(tensor, b["state_dict"][name]), name
    states = [c["optimizer_states"][0]["state"] for c in (a, b)]
    assert states[0].keys() == states[1].keys() and states[0]
    for i, state in states[0].items():
        for name, tensor in state.items():
            assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(states[1][i][name]))
    best = [c["callbacks"] for c in (a, b)]
    assert [v for k, v in best[0].items() if "BestAndLast" in k] == [
        v for k, v in best[1].items() if "BestAndLast" in k
    ]


def series(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(
        str(folder / "lightning_logs/version_0"), size_guidance={"scalars": 0, "tensors": 0}
    )
    events.Reload()
    tags = events.Tags()
    found = {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags["scalars"]}
    for tag in tags["tensors"]:
        found[tag] = [(e.step, e.tensor_proto.string_val) for e in events.Tensors(tag)]
    return found


def assert_equal_curves(one: Path, other: Path) -> None:
    a, b = series(one), series(other)
    assert a.keys() == b.keys()
    for tag, points in a.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag
        if tag == "chars_per_second":
            assert steps == [step for step, _ in b[tag]]
        else:
            assert points == b[tag], tag


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    fit(folder, *FIT)
    return folder


def test_tensorboard_reads_every_series(uninterrupted):
    found = series(uninterrupted)
    every_10 = list(range(10, STEPS + 1, 10))
    validations = [150, 300, 450, 600, 700]  # the last step too, though 150 does not divide it
    for tag in ("train/loss", "lr", "lr_muon", "grad_norm", "chars_per_second"):
        assert [step for step, _ in found[tag]] == every_10, tag
    for tag in ("val/loss", "val/bpc", "val/floor"):
        assert [step for step, _ in found[tag]] == validations, tag
    assert [step for step, _ in found["generated/text_summary"]] == [200, 400, 600]
    best = min(value for _, value in found["val/loss"])
    assert found["val/best"] == [(STEPS, best)]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_after_sigkill_gives_identical_weights_and_curves(workers, uninterrupted, tmp_path):
    folder = tmp_path / "killed"
    flags = [*FIT, f"--data.num_workers={workers}"]
    assert kill_within(folder, workers, signal.SIGKILL, *flags) == -signal.SIGKILL
    assert checkpoint(folder)["global_step"] < STEPS
    orphan = folder / "lightning_logs/version_0/checkpoints/.last.ckpt.0123456789abcdef.tmp"
    orphan.write_bytes(b"a save cut short")
    fit(folder, "fit", "--ckpt_path=last")
    assert_equal_runs(uninterrupted, folder)
    assert_equal_curves(uninterrupted, folder)
    assert [p.name for p in (folder / "lightning_logs").iterdir()] == ["version_0"]
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--trainer.precision=bf16-mixed"], "muon, bf16-mixed"),
        ([*LECTURE, "--model.warmup_steps=100", "--model.schedule=cosine"], "adamw, 32-true"),
    ],
)
def test_resume_after_sigkill_in_bf16_and_with_adamw(flags, said, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fit(whole, *FIT, *flags)
    assert kill_within(killed, 4, signal.SIGKILL, *FIT, *flags) == -signal.SIGKILL
    assert checkpoint(killed)["global_step"] < STEPS
    fit(killed, "fit", "--ckpt_path=last")
    assert (killed / "log.txt").read_text().count(said) == 2  # of the resumed run too
    assert_equal_runs(whole, killed)
    assert_equal_curves(whole, killed)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_the_step_and_resumes_exactly(sign, uninterrupted, tmp_path):
    folder = tmp_path / "stopped"
    assert kill_within(folder, sign, sign, *FIT) == 128 + sign
    assert checkpoint(folder)["global_step"] < STEPS
    log = (folder / "log.txt").read_text()
    assert "fit --ckpt_path=lightning_logs/version_0/checkpoints/last.ckpt" in log
    assert "Traceback" not in log
    fit(folder, "fit", "--ckpt_path=lightning_logs/version_0/checkpoints/last.ckpt")
    assert_equal_runs(uninterrupted, folder)
    assert_equal_curves(uninterrupted, folder)


# Muon rounds to bf16: a number that falls the other way grows to 2% of a matrix in these 60 steps.
# Without the other process's gradients it would be 90%, and the losses 0.1 apart.
@pytest.mark.parametrize(
    "flags, share, nats", [([], 0.1, 5e-3), (LECTURE, 1e-4, 2e-4)], ids=["muon", "adamw"]
)
def test_two_processes_with_half_the_batch_follow_one(flags, share, nats, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [*FIT, *flags, "--model.dropout=0", "--trainer.max_steps=60",
             "--trainer.val_check_interval=30"]  # fmt: skip
    fit(one, *flags)
    fit(two, *flags, *DDP)
    a, b = checkpoint(one)["state_dict"], checkpoint(two)["state_dict"]
    for name, tensor in a.items():
        assert (tensor - b[name]).norm() <= share * tensor.norm(), name
    for tag in ("train/loss", "val/loss"):
        one_series, two_series = series(one)[tag], series(two)[tag]
        assert [s for s, _ in one_series] == [s for s, _ in two_series]
        values = [[v for _, v in points] for points in (one_series, two_series)]
        assert values[0] == pytest.approx(values[1], abs=nats)


def test_resume_after_sigkill_in_two_processes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fit(whole, *FIT, *DDP)
    assert kill_within(killed, 3, signal.SIGKILL, *FIT, *DDP) == -signal.SIGKILL
    assert checkpoint(killed)["global_step"] < STEPS
    fit(killed, "fit", "--ckpt_path=last")
    assert_equal_runs(whole, killed)
    assert_equal_curves(whole, killed)


def test_flags_win_over_the_checkpoint_and_later_states_are_kept(uninterrupted, tmp_path):
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", uninterrupted, folder], check=True)
    run = folder / "lightning_logs/version_0"
    fit(folder, "fit", "--ckpt_path=last", f"--trainer.max_steps={STEPS + 20}",
        "--model.learning_rate=0.5", "--model.min_lr=0.5", "--model.muon_learning_rate=0.03",
        "--model.weight_decay=0.3", "--data.batch_size=10")  # fmt: skip
    last = checkpoint(folder)
    groups = last["optimizer_states"][0]["param_groups"]
    assert last["global_step"] == STEPS + 20
    assert [group["muon"] for group in groups] == [False, True]
    assert [group["lr"] for group in groups] == [0.5, 0.03]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.3]
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
    fit(folder, "fit", "--ckpt_path=lightning_logs/version_0/checkpoints/mine.ckpt",
        f"--trainer.max_steps={best_step + 20}")  # fmt: skip
    kept = run / f"checkpoints/last-step{STEPS + 20}.ckpt"
    assert kept.read_bytes() == bytes_before
    assert checkpoint(folder)["global_step"] == best_step + 20

    # a torn last.ckpt is set aside too, and stands in nobody's way
    torn = bytes_before[: len(bytes_before) // 2]
    (run / "checkpoints/last.ckpt").write_bytes(torn)
    fit(folder, "fit", "--ckpt_path=lightning_logs/version_0/checkpoints/mine.ckpt",
        f"--trainer.max_steps={best_step + 20}")  # fmt: skip
    assert (run / "checkpoints/last-unreadable.ckpt").read_bytes() == torn
    assert checkpoint(folder)["global_step"] == best_step + 20
