"""A run that is killed and resumed arrives exactly where the uninterrupted run does."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kills import (
    CHECKPOINTS,
    FIT,
    RESUME,
    ROOT,
    Strike,
    chain,
    checkpoint,
    differences,
    finish,
    result,
    series,
    start,
)

pytestmark = pytest.mark.slow  # each starts several real runs

STEPS = 300
RUN = [*FIT, f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=70"]
DDP = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=6"]
ONE = ["--trainer.devices=1", "--data.batch_size=12"]  # the same windows as DDP
LECTURE = ["--model.name=lecture", "--model.optimizer=adamw", "--model.learning_rate=3e-3"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(folder, *RUN)
    return folder


def test_tensorboard_shows_every_series(uninterrupted):
    steps = {tag: [step for step, _ in points] for tag, points in series(uninterrupted).items()}
    rates = ("optimizer/lr", "optimizer/lr_muon", "optimizer/grad_norm")
    for tag in ("loss/train", *rates, "speed/chars_per_second"):
        assert steps[tag] == list(range(10, STEPS + 1, 10)), tag
    for tag in ("loss/val", "loss/val_bits", "loss/floor"):
        assert steps[tag] == [70, 140, 210, 280, 300], tag  # the last step too
    assert [100, 200, 300] in steps.values()  # the texts


CASES = {
    "muon": (
        [],
        [Strike("SIGINT", saves=4, delay=0.03), Strike("SIGKILL", True, saves=6, delay=0.002),
         Strike("SIGTERM", saves=4, delay=0.05), Strike("SIGKILL", saves=2, delay=0.01)],
    ),
    "bf16 with accumulation": (
        ["--trainer.precision=bf16-mixed", "--trainer.accumulate_grad_batches=2",
         "--trainer.max_steps=150", "--trainer.val_check_interval=60"],
        [Strike("SIGTERM", True, saves=5, delay=0.001), Strike("SIGKILL", saves=4, delay=0.04)],
    ),
    "adamw": (
        [*LECTURE, "--model.warmup_steps=100", "--model.schedule=cosine"],
        [Strike("SIGKILL", True, saves=15, delay=0.001)],
    ),
    "two processes": (
        [*DDP, "--trainer.max_steps=100"],
        [Strike("SIGTERM", saves=3, delay=0.03), Strike("SIGKILL", saves=3, delay=0.03)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_and_killed_run_arrives_where_the_uninterrupted_one_does(case, tmp_path):
    flags, strikes = CASES[case]
    finish(tmp_path / "whole", *RUN, *flags)
    kills = chain(tmp_path / "killed", [*RUN, *flags], strikes)
    assert not any(kill.finished for kill in kills)
    assert differences(result(tmp_path / "whole"), result(tmp_path / "killed")) == []


# Muon rounds to bf16: a number that is rounded the other way grows to 2% of a matrix in 60 steps.
# Without the other process's gradients it would be 90%, and the losses 0.1 apart.
@pytest.mark.parametrize(
    "flags, share, nats", [([], 0.1, 5e-3), (LECTURE, 1e-4, 2e-4)], ids=["muon", "adamw"]
)
def test_two_processes_with_half_the_batch_follow_one(flags, share, nats, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    short = ["--model.dropout=0", "--trainer.max_steps=60", "--trainer.val_check_interval=30"]
    finish(one, *RUN, *flags, *short)
    finish(two, *RUN, *flags, *short, *DDP)
    weights = checkpoint(two)["state_dict"]
    for name, tensor in checkpoint(one)["state_dict"].items():
        assert (tensor - weights[name]).norm() <= share * tensor.norm(), name
    for tag in ("loss/train", "loss/val"):
        assert dict(series(one)[tag]) == pytest.approx(dict(series(two)[tag]), abs=nats)


def test_flags_override_the_checkpoints_settings(uninterrupted, tmp_path):
    folder = Path(shutil.copytree(uninterrupted, tmp_path / "copy"))
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
    configs = sorted(path.name for path in (folder / "lightning_logs/version_0").glob("config*"))
    assert configs == [f"config-step{STEPS}.yaml", "config.yaml"]


def processes_of(group: int) -> set[int]:
    """The processes of a process group, without those that have ended."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(pgrp) == group and state != "Z":
            found.add(int(stat.parent.name))
    return found


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc")
def test_a_killed_process_ends_the_run_and_one_process_continues_it(tmp_path):
    endless = ["--trainer.max_steps=100000", "--model.lr_decay_steps=100000"]
    process = start(tmp_path, *FIT, *DDP, *endless, "--model.dropout=0")
    wait_until((tmp_path / CHECKPOINTS / "last.ckpt").exists, 120)
    (other,) = processes_of(process.pid) - {process.pid}
    os.kill(other, signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    wait_until(lambda: not processes_of(process.pid), 30)
    step = checkpoint(tmp_path)["global_step"]
    finish(tmp_path, *RESUME, f"--trainer.max_steps={step + 30}", *ONE)
    logged = [s for s, _ in series(tmp_path)["loss/train"] if s > step]
    assert logged == list(range(step + 10, step + 31, 10))
    assert checkpoint(tmp_path)["global_step"] == step + 30


def test_two_agents_of_torchrun_train_as_one_process_with_the_whole_batch(tmp_path):
    short = ["--trainer.max_steps=20", "--model.dropout=0", "--sample.every_n_steps=0"]
    run = [*RUN, *LECTURE, *short]
    finish(tmp_path / "one", *run, "--data.batch_size=12")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = tmp_path / "agents"
    agents.mkdir()
    processes = []
    for rank in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        command += [f"--node_rank={rank}", "--nproc_per_node=1"]
        command += ["--master_addr=127.0.0.1", f"--master_port={port}"]
        command += ["-m", "gpt_lightning", *run, "--data.batch_size=6"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        processes.append(subprocess.Popen(command, cwd=agents, env=environment))
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    one, two = (checkpoint(folder)["state_dict"] for folder in (tmp_path / "one", agents))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5)
