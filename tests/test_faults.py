"""Full disks, damaged files, two runs in one folder, time that is up: nothing good is lost."""

import csv
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch
from conftest import TINY, contents
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_lightning.checkpoint import read_checkpoint
from gpt_lightning.training.module import GPTModule

RUN = Path("lightning_logs/version_0")
LAST, BEST = RUN / "checkpoints/last.ckpt", RUN / "checkpoints/best.ckpt"
RESUME = ("fit", "--ckpt_path=last", "--trainer.accelerator=cpu")


def one_line(code: int, err: str) -> str:
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x40
    path.write_bytes(raw)


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(here, ends):
    flags = ("--trainer.max_steps=60", "--checkpoint.every_n_train_steps=1", "--model.min_lr=1e30",
             "--model.learning_rate=1e30", "--model.muon_learning_rate=1e30")  # fmt: skip
    code, out, err = ends(*RESUME, *flags)
    saved = read_checkpoint(LAST)
    assert re.search(r"step \d has a loss of .* at a learning rate of 1e\+30", one_line(code, err))
    assert f"Step {saved['global_step']} is saved.\nResume with: " in out
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of Unix")
def test_a_full_disk_ends_the_run_and_leaves_the_old_checkpoint(here):
    import resource

    before = contents(LAST.parent)
    limit = min(map(len, before.values())) // 2  # bytes that a file may have, as on a full disk
    run = subprocess.run(
        [sys.executable, "-m", "gpt_lightning", *RESUME, "--trainer.max_steps=8"],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    line = one_line(run.returncode, run.stderr)
    assert "best.ckpt could not be written" in line and "File too large" in line
    assert "Step 4 is saved.\nResume with: python -m gpt_lightning fit --ckpt_path=" in run.stdout
    assert contents(LAST.parent) == before


def test_a_damaged_last_is_replaced_by_the_newest_intact_checkpoint(here, ends):
    damage(LAST)
    code, _, err = ends(*RESUME, "--trainer.max_steps=9")
    assert code == 0 and err.count("\n") == 1
    assert f"{LAST}: damaged" in err and f"using {BEST} (step 4)" in err
    assert read_checkpoint(LAST)["global_step"] == 9


def test_a_damaged_best_is_replaced_for_validate_and_generate_too(here, ends):
    damage(BEST)
    for argv in (["validate", "--trainer.accelerator=cpu"], ["generate", "--max_new_tokens=20"]):
        code, _, err = ends(*argv)
        assert code == 0 and f"{BEST}: damaged" in err and f"using {LAST}" in err


def test_a_run_that_another_process_trains_is_left_alone(here, ends):
    before = contents(here)
    with filelock.FileLock(LAST.with_name(".lock")):
        code, _, err = ends(*RESUME, "--trainer.max_steps=8")
    assert f"another process trains in {RUN}" in one_line(code, err)
    assert contents(here) == before


def test_max_time_prints_the_command_that_resumes_exactly(here, ends):
    flags = [*TINY, "--model.dropout=0.1", "--model.schedule=cosine", "--model.lr_decay_steps=600"]
    code, out, _ = ends("fit", *flags, "--trainer.max_steps=100000",
                        "--trainer.max_time=00:00:00:01")  # fmt: skip
    assert code == 0
    step = int(re.search(r"^steps +([\d,]+)", out, re.MULTILINE)[1].replace(",", ""))
    again = re.search(r"^resume +python -m gpt_lightning (.+)$", out, re.MULTILINE)[1]
    assert 0 < step < 100000 and "version_1" in again
    longer = f"--trainer.max_steps={step + 30}"
    assert ends(*shlex.split(again), longer)[0] == 0
    assert ends("fit", *flags, longer)[0] == 0
    paths = [Path(f"lightning_logs/version_{n}/checkpoints/last.ckpt") for n in (1, 2)]
    one, two = (read_checkpoint(path) for path in paths)
    assert one["global_step"] == two["global_step"] == step + 30
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name]), name


@pytest.mark.parametrize(
    "flag, checkpoints, log",
    [("barebones=true", 0, 0), ("enable_checkpointing=false", 0, 1), ("logger=false", 2, 0)],
)
def test_what_lightning_can_turn_off(here, ends, flag, checkpoints, log):
    code, out, _ = ends("fit", *TINY, f"--trainer.{flag}")
    assert code == 0 and "steps            4\n" in out
    folder = Path("lightning_logs/version_1")
    assert len(list(folder.glob("*/*.ckpt"))) == checkpoints
    assert len(list(folder.glob("events.*"))) == log


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        steady = ("loss/train", "loss/val", "step")  # the speed differs
        return [{name: row[name] for name in steady} for row in csv.DictReader(file)]


@pytest.mark.parametrize("flags", [["csv"], ["CSVLogger", "--trainer.logger.save_dir=logs"]])
def test_the_rows_of_a_csv_log_go_on_after_those_of_the_checkpoint(here, ends, flags):
    fit = ("fit", *TINY, f"--trainer.logger={flags[0]}", *flags[1:],
           "--trainer.log_every_n_steps=1", "--model.lr_decay_steps=12")  # fmt: skip
    assert ends(*fit)[0] == 0
    last = Path("lightning_logs/version_1/checkpoints/last.ckpt")
    at_4 = last.rename(last.with_name("at_4.ckpt"))
    assert ends("fit", f"--ckpt_path={at_4}", "--trainer.max_steps=8")[0] == 0
    (metrics,) = Path().rglob("metrics.csv")
    whole = rows(metrics)
    assert [row["step"] for row in whole if row["loss/train"]] == list("12345678")
    assert ends("validate", "--trainer.accelerator=cpu")[0] == 0
    assert ends("fit", f"--ckpt_path={at_4}", "--trainer.max_steps=12")[0] == 0
    assert list(Path().rglob("metrics.csv")) == [metrics]
    assert rows(metrics)[: len(whole)] == whole and rows(metrics)[-1]["step"] == "12"
    assert rows(metrics.with_name("metrics-step8.csv")) == whole  # later than the checkpoint


OWN = """
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import Logger

class Beep(Callback):
    def __init__(self, times: int = 1):
        self.times = times
    def on_train_end(self, trainer, module):
        print("beep" * self.times)

class Log(Logger):  # without an experiment
    name = "own"
    version = property(lambda self: self.run)
    def __init__(self, version: str | None = None):
        super().__init__()
        self.run = version or "first"
        print("run", version)
    def log_hyperparams(self, *args, **kwargs): pass
    def log_metrics(self, *args, **kwargs): pass
"""


def test_the_printed_command_resumes_a_run_with_classes_of_the_users_own(here, ends, monkeypatch):
    Path("mine_here.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(here))
    beep = '{"class_path": "mine_here.Beep", "init_args": {"times": 2}}'
    flags = [f"--trainer.callbacks+={beep}", "--trainer.logger=mine_here.Log"]
    limits = ["--trainer.max_steps=100000", "--trainer.max_time=00:00:00:01"]
    code, out, _ = ends("fit", *TINY, *flags, *limits)
    assert code == 0 and "beepbeep\n" in out and "run None\n" in out
    again = shlex.split(re.search(r"^resume +python -m gpt_lightning (.+)$", out, re.M)[1])
    assert set(flags) < set(again)
    steps = read_checkpoint("lightning_logs/version_1/checkpoints/last.ckpt")["global_step"]
    code, out, _ = ends(*again, f"--trainer.max_steps={steps + 2}")
    assert code == 0 and "beepbeep\n" in out and "run first\n" in out
    assert ends("validate", "--trainer.accelerator=cpu")[0] == 0


SLURM = {"JOB_ID": "77", "NTASKS": "1", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0",
         "NODEID": "0", "JOB_NODELIST": "localhost"}  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SLURM")
def test_a_requeued_slurm_job_resumes_its_run_and_no_other_run_does(here, ends, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    Path("scontrol").write_text('#!/bin/sh\necho "$@" > requeued.txt\n')
    Path("scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:/bin:/usr/bin")
    Path("hpc_ckpt_1.ckpt").write_bytes(LAST.read_bytes())  # where Lightning looks for one
    start = GPTModule.on_train_batch_start

    def warned(module, batch, batch_idx):
        if module.global_step == 2:
            signal.raise_signal(signal.SIGUSR1)
        start(module, batch, batch_idx)

    fit = ("fit", *TINY, "--seed_everything=2")
    with monkeypatch.context() as patch:
        patch.setattr(GPTModule, "on_train_batch_start", warned)
        assert ends(*fit)[0] == 128 + signal.SIGUSR1
    assert Path("requeued.txt").read_text() == "requeue 77\n"
    _, other, _ = ends("fit", *TINY)  # another run of the job
    _, again, _ = ends(*fit)
    _, done, _ = ends(*fit)
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    _, later, _ = ends(*fit)
    runs = [re.search(r"version_\d|^$", out)[0] for out in (other, again, done, later)]
    assert runs == ["version_2", "version_1", "version_3", "version_4"]
    resumed = [re.findall(r"^steps +4(.*)$", out, re.M) for out in (other, again, done, later)]
    assert resumed == [[""], [" (resumed at 3)"], [""], [""]]


def test_resume_in_another_folder_says_which_checkpoint_names_the_text(here, ends, monkeypatch):
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    code, _, err = ends("fit", f"--ckpt_path={Path('..', RUN)}", "--trainer.accelerator=cpu")
    line = one_line(code, err)
    assert "--data.corpus=text.txt is not found" in line
    assert "last.ckpt was trained on this text" in line


def test_a_validation_interval_in_epochs_replaces_the_one_that_the_run_chose(here, ends):
    flags = ("--trainer.max_steps=200", "--trainer.check_val_every_n_epoch=1")
    code, out, _ = ends(*RESUME, *flags)
    epoch = re.search(r"characters seen  [\d,]+ \((\d+\.\d) epochs\)", out)
    assert code == 0 and epoch
    validated = [int(step) for step in re.findall(r"^step (\d+)  .*val", out, re.MULTILINE)]
    per_epoch = 200 / float(epoch[1])  # steps
    assert validated == pytest.approx([*range(int(per_epoch), 200, int(per_epoch)), 200], abs=5)


def test_a_wrong_setting_in_a_config_is_blamed_on_the_file(here, ends):
    Path("mine.yaml").write_text("model: {n_layer: many}")
    for given in (["--config=mine.yaml"], ["-c", "mine.yaml"]):
        line = one_line(*ends("fit", *TINY, "--config=debug/few_steps", *given)[::2])
        assert f"{' '.join(given)}: " in line and "many" in line
    line = one_line(*ends("fit", "--model.n_layer=many", "--config=debug/few_steps")[::2])
    assert "few_steps" not in line


def test_generate_under_torchrun_is_done_by_one_process(here, ends, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "0")
    assert len(ends("generate", "--max_new_tokens=5")[1]) > 5
    monkeypatch.setenv("RANK", "1")
    assert ends("generate", "--max_new_tokens=5") == (0, "", "")


def test_predict_under_torchrun_is_refused(here, ends, monkeypatch):
    names = ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK", "MASTER_PORT")
    for name, value in zip(names, "220001", strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    code, _, err = ends("predict", "--trainer.accelerator=cpu")
    assert "runs in one process" in one_line(code, err)


def test_tensorboard_given_by_class_hides_what_a_killed_run_logged_later(here, ends):
    flags = ("--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=tb")
    assert ends("fit", *TINY, *flags)[0] == 0
    logger = TensorBoardLogger("tb", version=0)  # as if the run had reached step 9 and was killed
    logger.log_metrics({"loss/val": 9.0}, step=9)
    logger.finalize("killed")
    assert ends(*RESUME, "--trainer.max_steps=8")[0] == 0
    found = EventAccumulator("tb/lightning_logs/version_0").Reload().Scalars("loss/val")
    assert [event.step for event in found] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    "stop", ["--trainer.max_steps=5", "--trainer.callbacks=StopsEarly", "--trainer.max_epochs=1"]
)
def test_an_epoch_that_was_cut_short_is_completed(here, ends, monkeypatch, stop):
    Path("own.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class StopsEarly(Callback):\n"
        "    def on_train_batch_end(self, trainer, *_):\n"
        "        trainer.should_stop |= trainer.global_step == 5\n"
    )
    monkeypatch.syspath_prepend(here)
    tiny = [flag for flag in TINY if "max_steps" not in flag]
    epochs = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=20"]
    own = stop.replace("StopsEarly", "own.StopsEarly")
    assert ends("fit", *tiny, *epochs, own)[0] == 0
    end = ["--trainer.max_epochs=2", "--trainer.callbacks=null"]
    assert ends("fit", "--ckpt_path=last", *end, "--trainer.accelerator=cpu")[0] == 0
    whole = ends("fit", *tiny, *epochs)
    assert whole[0] == 0
    a, b = (read_checkpoint(LAST.parents[2] / f"version_{n}/checkpoints/last.ckpt") for n in (1, 2))
    assert a["global_step"] == b["global_step"] == 40
    if "StopsEarly" in stop:  # the others have decayed the learning rate at their end
        weights = (a["state_dict"], b["state_dict"])
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_one_batch_is_not_all_batches(here, ends):
    code, out, _ = ends("fit", *TINY, "--trainer.limit_val_batches=1", "--print_config")
    assert code == 0 and "limit_val_batches: 1\n" in out
    code, out, _ = ends("fit", *TINY, "--trainer.limit_val_batches=1")
    assert code == 0
    limited = re.findall(r"val (\d\.\d+) nats", out)[-1]
    whole = re.findall(r"val (\d\.\d+) nats", ends("validate", "--trainer.accelerator=cpu")[1])[-1]
    assert limited != whole  # and `validate` does not take the limit from the checkpoint


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("argv", [["validate", "--trainer.accelerator=cpu"], ["fit", "--help"]])
def test_output_that_is_lost_is_told_at_the_end(cli, here, argv):
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "gpt_lightning", *argv],
            stdout=full, stderr=subprocess.PIPE, encoding="utf-8", timeout=120,
        )  # fmt: skip
    assert "the output could not be written" in one_line(run.returncode, run.stderr)


def test_the_line_of_a_validation_has_the_training_loss_of_its_step(here, ends):
    code, out, _ = ends("fit", *TINY, "--trainer.log_every_n_steps=1")
    exact = re.findall(r"^step (\d+)  train (\S+)", out, re.MULTILINE)
    code, out, _ = ends("fit", *TINY, "--trainer.log_every_n_steps=3")
    assert exact == re.findall(r"^step (\d+)  train (\S+)", out, re.MULTILINE) and len(exact) == 4
