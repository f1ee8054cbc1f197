"""The ladder: every run a `fit`, the table read from what the runs left behind."""

import csv
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from gpt_lightning import ladder
from gpt_lightning.cli import main
from gpt_lightning.data.datamodule import TextDataModule

SHIPPED = Path(__file__).parent.parent / "configs" / "lecture"
LOW = """\
# The table: a bigram.
data: {corpus: "playwright:3:9000", block_size: 8, batch_size: 4}
model: {name: bigram, optimizer: adamw, eval_iters: 3, learning_rate: 1.0e-2}
trainer: {max_steps: 6, val_check_interval: 3, log_every_n_steps: 1}
checkpoint: {every_n_train_steps: 2}
sample: {every_n_steps: 0}
"""
HIGH = """\
# The block: it looks back.
base: 1_low.yaml
model: {name: lecture, n_layer: 1, n_head: 2, n_embd: 16, dropout: 0.2}
"""
FLAGS = ("--configs=rungs", "--seeds=1,2", "--trainer.accelerator=cpu")


@pytest.fixture(autouse=True)
def rungs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "rungs"
    folder.mkdir()
    for name, text in (("1_low", LOW), ("2_high", HIGH), ("3_huge_gpu", "# Huge: x.\n" + LOW)):
        (folder / f"{name}.yaml").write_text(text)
    return folder


def climb(*flags: str, configs: tuple[str, ...] = FLAGS) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["climb", *configs, *flags])
    return ended.value.code


def table(out: str) -> dict[str, dict[str, str]]:
    with open(Path(out) / "ladder.csv", newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def weights(out: str) -> dict[str, torch.Tensor]:
    path = Path(out) / "2_high" / "seed_2" / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


def test_the_table_has_a_row_a_rung_and_its_figures_are_the_runs(capsys):
    assert climb("--out=out") == 0
    rows = table("out")
    assert list(rows) == ["counted", "1_low", "2_high", "3_huge_gpu"]
    low, high = rows["1_low"], rows["2_high"]
    V = TextDataModule("playwright:3:9000", block_size=8, batch_size=4).vocab_size
    assert int(low["parameters"]) == int(rows["counted"]["parameters"]) == V * V
    # two tables of C channels, one block (12 C^2 + 10 C less the biases of q, k, v: 9 C + C), norm,
    # head with its bias
    C, T = 16, 8
    block = 12 * C * C + 2 * 2 * C + C + 4 * C + C
    assert int(high["parameters"]) == V * C + T * C + block + 2 * C + C * V + V
    for row in (low, high):
        losses = [float(loss) for loss in row["val_losses"].split()]
        assert len(losses) == 2
        assert sum(losses) / 2 == pytest.approx(float(row["val_loss_mean"]), abs=1e-5)
        sd = abs(losses[0] - losses[1]) / math.sqrt(2)
        assert sd == pytest.approx(float(row["val_loss_sd"]), abs=2e-5)
        assert float(row["chars_per_second"]) > 0 and row["sample"] and row["floor"]
    assert not rows["3_huge_gpu"]["val_loss_mean"]
    printed = capsys.readouterr().out
    assert "| The block | " in printed and "| Huge |  | needs a GPU |" in printed
    assert printed.splitlines()[0].startswith("The table") and "The floor of this text" in printed
    assert (Path("out") / "ladder.md").read_text(encoding="utf-8") in printed
    assert (Path("out") / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_s_loss_is_what_validate_says(capsys):
    assert climb("--out=out", "--rungs=2_high") == 0
    loss = float(table("out")["2_high"]["val_losses"].split()[1])
    with pytest.raises(SystemExit):
        path = "out/2_high/seed_2/checkpoints/last.ckpt"
        main(["validate", f"--ckpt_path={path}", "--trainer.accelerator=cpu"])
    printed = [float(number) for number in re.findall(r"\d+\.\d{4,}", capsys.readouterr().out)]
    assert any(number == pytest.approx(loss, abs=1e-5) for number in printed)


def test_the_counted_bigram_is_the_closed_form():
    assert climb("--out=out", "--rungs=1_low") == 0
    data = TextDataModule("playwright:3:9000", block_size=8, batch_size=4)
    train, val = (
        [data.tokens[a:b].tolist() for a, b in spans]
        for spans in (data.train_spans, data.val_spans)
    )
    pairs = Counter(pair for ids in train for pair in zip(ids, ids[1:], strict=False))
    firsts = Counter(first for ids in train for first in ids[:-1])
    costs = [
        -math.log((pairs[a, b] + 1) / (firsts[a] + data.vocab_size))
        for ids in val
        for a, b in zip(ids, ids[1:], strict=False)
    ]
    counted = float(table("out")["counted"]["val_loss_mean"])
    assert counted == pytest.approx(sum(costs) / len(costs), abs=1e-5)


def test_the_same_command_goes_on_where_it_was_stopped(monkeypatch):
    assert climb("--out=whole") == 0
    step = ladder.LadderBar.on_train_batch_end

    def stop(bar, trainer, module, *rest):
        step(bar, trainer, module, *rest)
        if trainer.global_step == 5 and module.hparams.name == "lecture":
            raise RuntimeError("the machine went away")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(ladder.LadderBar, "on_train_batch_end", stop)
        main(["climb", *FLAGS, "--out=broken"])
    assert not Path("broken/ladder.md").exists()
    done = Path("broken/1_low/seed_1/checkpoints/last.ckpt")
    before = done.stat().st_mtime_ns
    assert climb("--out=broken") == 0
    assert done.stat().st_mtime_ns == before  # what was done stays done
    figures = ("val_losses", "parameters", "sample", "estimate_val_mean")
    for name, row in table("whole").items():
        assert [row[f] for f in figures] == [table("broken")[name][f] for f in figures]
    assert all(torch.equal(w, weights("broken")[name]) for name, w in weights("whole").items())


def test_another_seed_is_added_and_another_flag_refused(capsys, rungs):
    assert climb("--out=out", "--rungs=1_low") == 0
    more = ("--configs=rungs", "--seeds=1,2,3", "--trainer.accelerator=cpu")
    assert climb("--out=out", "--rungs=1_low", configs=more) == 0
    assert len(table("out")["1_low"]["val_losses"].split()) == 3
    capsys.readouterr()
    assert climb("--out=out", "--model.learning_rate=0.1") == 2
    assert (
        "--out=out was climbed with the flags --trainer.accelerator=cpu" in capsys.readouterr().err
    )
    (rungs / "1_low.yaml").write_text(LOW.replace("max_steps: 6", "max_steps: 8"))
    assert climb("--out=out", "--rungs=2_high") == 0  # not climbed so far: nothing to mix up
    assert climb("--out=out", "--rungs=1_low") == 2
    assert "1_low.yaml has changed since" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--seeds=one"], "--seeds=one: expected numbers"),
        (["--configs=nowhere"], "--configs=nowhere: no config there"),
        (["--rungs=4_none"], "--rungs=4_none is no config there (there are: 1_low, 2_high"),
        (["--seed_everything=3"], "--seed_everything is climb's own affair; use --seeds"),
        (["--ckpt_path", "last"], "--ckpt_path is climb's own affair; use --out"),
        (["--model.n_lyer=3"], "--model.n_lyer is no flag; did you mean --model.n_layer?"),
    ],
)
def test_a_mistake_ends_in_one_line(flags, says, capsys):
    assert climb("--out=out", *flags) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not list(Path(".").glob("out/*/*/checkpoints"))


def test_a_gpu_rung_is_climbed_anywhere_if_named():
    assert climb("--out=out", "--rungs=3_huge_gpu") == 0
    assert table("out")["3_huge_gpu"]["val_loss_mean"]


def test_the_shipped_ladder_has_every_rung_of_the_lecture():
    titles = [ladder.title(path) for path in sorted(SHIPPED.glob("*.yaml"))]
    assert titles == [
        "Bigram", "Embedding", "One head", "Scaled", "Four heads", "Feed-forward", "Three blocks",
        "Residual connections", "Projections", "Wide feed-forward", "LayerNorm", "Dropout",
        "Scaled up",
    ]  # fmt: skip
