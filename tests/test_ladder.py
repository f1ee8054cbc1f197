"""The ladder: every run is a `fit`, and the table is read from what the runs left."""

import csv
import json
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import Page, run

from gpt_lightning import ladder
from gpt_lightning.cli import main
from gpt_lightning.config_files import CONFIGS
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.training.module import GPTModule

LOW = """\
# The table: a bigram.
data: {corpus: "playwright:3:9000", block_size: 8, batch_size: 4}
model: {name: bigram, optimizer: adamw, eval_iters: 3, learning_rate: 1.0e-2}
trainer: {max_steps: 6, val_check_interval: 3, log_every_n_steps: 1}
checkpoint: {every_n_train_steps: 2}
sample: {every_n_steps: 0}
"""
HIGH = """\
# The block: it attends to earlier characters.
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


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def climb(*flags: str) -> int:
    return run("climb", *FLAGS, *flags)


def table(out: str) -> dict[str, dict[str, str]]:
    with open(Path(out) / "ladder.csv", newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def losses(row: dict[str, str]) -> list[float]:
    return [float(loss) for loss in row["val_losses"].split()]


def test_the_table_has_a_row_for_each_rung_with_the_figures_of_its_runs(capsys, without_gpu):
    assert climb("--out=out") == 0
    rows = table("out")
    assert list(rows) == ["counted", "1_low", "2_high"]
    data = TextDataModule("playwright:3:9000", block_size=8, batch_size=4)
    data.setup()
    V, C, T = data.vocab_size, 16, 8
    assert rows["1_low"]["parameters"] == rows["counted"]["parameters"] == str(V * V)
    # two tables, one block (12 C^2 + 10 C less the biases of q, k and v), norm, head with its bias
    block = 12 * C * C + 2 * 2 * C + C + 4 * C + C
    assert int(rows["2_high"]["parameters"]) == V * C + T * C + block + 2 * C + C * V + V
    for row in (rows["1_low"], rows["2_high"]):
        a, b = losses(row)
        assert a != b and float(row["val_loss_mean"]) == pytest.approx((a + b) / 2, abs=1e-5)
        assert float(row["val_loss_sd"]) == pytest.approx(abs(a - b) / math.sqrt(2), abs=2e-5)
        assert float(row["chars_per_second"]) > 0 and row["sample"] and row["floor"]
        assert row["estimate_val_mean"]
    printed = capsys.readouterr().out
    loss, deviation = (float(rows["2_high"][f"val_loss_{name}"]) for name in ("mean", "sd"))
    assert f"| {loss:.4f} ± {deviation:.4f} |" in printed
    assert "3_huge_gpu is skipped: it needs a GPU" in printed
    assert (Path("out") / "ladder.md").read_text(encoding="utf-8") in printed
    assert (Path("out") / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_each_rung_has_a_page_that_links_to_the_next_and_the_previous(without_gpu):
    assert climb("--out=out") == 0
    markdown = Path("out/ladder.md").read_text(encoding="utf-8")
    assert "| [The table](pages/1_low.html) |" in markdown and "| Counted bigram |" in markdown
    low, high = (
        Page(Path(f"out/pages/{name}.html").read_text(encoding="utf-8"))
        for name in ("1_low", "2_high")
    )
    assert (low.texts["p"][0], low.texts["a"]) == ("A bigram.", ["Next: The block"])
    assert high.texts["h1"][0].startswith("The block: language model, ")
    assert high.texts["p"][0] == "It attends to earlier characters."
    assert high.texts["a"] == ["Previous: The table"]
    assert [v for k, v in high.attributes if k == "href"] == ["data:,", "1_low.html"]
    run = json.loads(high.script("description"))["run"]
    assert run["losses"][-1][1] == pytest.approx(losses(table("out")["2_high"])[0], abs=1e-5)


def test_the_loss_of_a_run_is_that_of_validate(capsys):
    assert climb("--out=out", "--rungs=2_high", "--seeds=1") == 0
    (loss,) = losses(table("out")["2_high"])
    path = "out/2_high/seed_1/checkpoints/last.ckpt"
    assert run("validate", f"--ckpt_path={path}", "--trainer.accelerator=cpu") == 0
    printed = [float(number) for number in re.findall(r"\d+\.\d{4,}", capsys.readouterr().out)]
    assert any(number == pytest.approx(loss, abs=1e-5) for number in printed)


def test_the_counted_bigram_has_the_loss_of_its_formula():
    assert climb("--out=out", "--rungs=1_low") == 0
    data = TextDataModule("playwright:3:9000", block_size=8, batch_size=4)
    data.setup()
    train, val = (
        [pair for a, b in spans for pair in pairwise(data.tokens[a:b].tolist())]
        for spans in (data.train_spans, data.val_spans)
    )
    pairs, firsts = Counter(train), Counter(a for a, _ in train)
    costs = [-math.log((pairs[a, b] + 1) / (firsts[a] + data.vocab_size)) for a, b in val]
    expected = sum(costs) / len(costs)
    assert losses(table("out")["counted"]) == [pytest.approx(expected, abs=2e-5)]


def test_the_same_command_resumes_an_interrupted_climb(monkeypatch, without_gpu):
    assert climb("--out=whole") == 0
    start = GPTModule.on_train_batch_start

    def stop(module, batch, batch_idx):
        if module.global_step == 5 and module.config.name == "lecture":
            raise RuntimeError("the machine stopped")
        start(module, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(GPTModule, "on_train_batch_start", stop)
        main(["climb", *FLAGS, "--out=broken"])
    done = Path("broken/1_low/seed_1/checkpoints/last.ckpt")
    before = done.stat().st_mtime_ns
    assert climb("--out=broken") == 0
    assert done.stat().st_mtime_ns == before  # a complete run is not repeated
    figures = ("val_losses", "parameters", "sample", "estimate_val_mean")
    for name, row in table("whole").items():
        assert all(row[key] == table("broken")[name][key] for key in figures)


@pytest.mark.parametrize("flags", [["--trainer.max_epochs=1"], ["--trainer.logger=csv"]])
def test_a_complete_climb_is_not_repeated(flags):
    for _ in range(2):
        assert climb("--out=out", "--rungs=1_low", *flags) == 0
        assert len(losses(table("out")["1_low"])) == 2


def test_runs_without_validation_are_refused(capsys):
    assert climb("--out=out", "--trainer.limit_val_batches=0") == 2
    assert "seed_1 was not validated: drop --trainer.limit_val" in capsys.readouterr().err


def test_a_run_that_was_killed_after_its_last_step_is_complete():
    assert climb("--out=out", "--rungs=1_low") == 0
    for seed in (1, 2):
        note = Path(f"out/1_low/seed_{seed}.json")
        note.write_text(note.read_text().replace('"complete": true', '"complete": false'))
    assert climb("--out=out", "--rungs=1_low") == 0
    assert len(losses(table("out")["1_low"])) == 2


def test_the_table_has_the_other_rungs_if_one_diverges(rungs, capsys, without_gpu):
    (rungs / "0_diverges.yaml").write_text(
        "# Too fast: x.\nbase: 1_low.yaml\nmodel: {learning_rate: 1.0e+38}\n"
    )
    assert climb("--out=out", "--seeds=1") == 2
    assert list(table("out")) == ["counted", "1_low", "2_high"]
    error = capsys.readouterr().err
    assert re.match(r"0_diverges, seed 1: step \d+ has a loss of", error)


def test_seeds_can_be_added_and_other_flags_are_an_error(capsys):
    assert climb("--out=out", "--rungs=1_low") == 0
    assert climb("--out=out", "--rungs=1_low", "--seeds=1,2,3") == 0
    assert len(losses(table("out")["1_low"])) == 3
    assert climb("--out=out", "--model.learning_rate=0.1") == 2
    message = "1_low/seed_1 has a run with other flags or configs; give another --out"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--configs=nowhere"], "--configs=nowhere: no such folder"),
        (["--rungs=4_none"], "--rungs=4_none must be among 1_low, 2_high, 3_huge_gpu"),
        (["--rungs="], "--rungs= must be among 1_low, 2_high, 3_huge_gpu"),
        (["--seeds=1,1"], "--seeds=1,1 names a seed twice"),
        (["--seeds=1,b"], "--seeds=1,b must be whole numbers"),
        (["--out=rungs/1_low.yaml"], "--out=rungs/1_low.yaml cannot be a folder: File exists"),
        (["--seed_everything=3"], "--seed_everything=3 is not a flag of climb: --seeds"),
        (["--ckpt_path=last"], "the same command resumes"),
        (["--print_config"], "--print_config is not a flag of climb"),
        (["--model.n_lyer=3"], "did you mean --model.n_layer?"),
    ],
)
def test_a_wrong_flag_is_a_message_of_one_line(flags, message, capsys):
    assert climb("--out=out", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(Path(".").glob("out/*/*/checkpoints"))


def test_the_shipped_ladder_has_every_rung_of_the_lecture():
    rungs = ladder.find_rungs("lecture", None)
    assert all(rung.is_relative_to(CONFIGS) for rung in rungs)
    titles, ideas = zip(*map(ladder.title_and_idea, rungs), strict=True)
    assert all(idea.endswith(".") for idea in ideas)
    assert list(titles) == [
        "Bigram", "Embedding", "One head", "Scaled", "Four heads", "Feed-forward", "Three blocks",
        "Residual connections", "Projections", "Wide feed-forward", "LayerNorm", "Dropout",
        "Scaled up",
    ]  # fmt: skip
