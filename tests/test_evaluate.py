"""`evaluate` as a user types it: against `validate`, hashlib, statistics and the text itself."""

import hashlib
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TEXT, TINY, run

from gpt_lightning.checkpoint import KEY, find_checkpoint, read_checkpoint

BEST = "lightning_logs/version_0/checkpoints/best.ckpt"
EMBEDDED = (
    "--data.corpus=playwright:3:30000",
    "--data.block_size=16",
    "--model.n_layer=1",
    "--model.n_head=1",
    "--model.n_embd=32",
    "--trainer.max_steps=150",
    "--trainer.accelerator=cpu",
    "--sample.every_n_steps=0",
)


def figures(capsys, *argv) -> dict:
    """What `evaluate --json` prints."""
    assert run("evaluate", "--json", "--device=cpu", *argv) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """A folder with two runs on an embedded corpus that differ in their seed."""
    folder = tmp_path_factory.mktemp("embedded")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed, root in ((1, "."), (2, "two")):
            flags = (f"--seed_everything={seed}", f"--trainer.default_root_dir={root}")
            assert run("fit", *EMBEDDED, *flags) == 0
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--data.tokenizer=byte"],
        ["--data.tokenizer=word"],
        ["--data.split=blocks", "--data.val_fraction=0.5"],
        ["--data.max_val_tokens=50"],
        ["--data.val_corpus=val.txt"],
        ["--data.min_count=25"],
        ["--model.name=bigram", "--model.optimizer=adamw"],
    ],
    ids=lambda flags: " ".join(flags) or "char",
)
def test_without_a_text_the_figure_is_that_of_validate(flags, empty, capsys):
    (empty / "text.txt").write_text(TEXT + "春眠不觉晓,处处闻啼鸟。\n" * 30, encoding="utf-8")
    (empty / "val.txt").write_text("to be or not to be: 春眠\n" * 9, encoding="utf-8")
    tiny = [f for f in TINY if "bigram" not in str(flags) or "model" not in f]
    assert run("fit", *tiny, *flags) == 0
    assert run("validate", "--trainer.accelerator=cpu") == 0
    out = capsys.readouterr().out
    ours = figures(capsys)["results"][0]
    for name, key in (("loss/val", "nats_per_character"), ("loss/val_bits", "bits_per_character")):
        exact = float(re.search(rf"{name}\W+(\d[\d.]+)", out)[1])
        assert ours[key] == pytest.approx(exact, rel=1e-6, abs=1e-6)
    assert ours["protocol"]["part"] == "held out"


def test_sliding_windows_lower_the_loss_and_the_entropy_is_below_it(embedded, monkeypatch, capsys):
    monkeypatch.chdir(embedded)
    losses = []
    for flags in ([], ["--stride=8"], ["--stride=1"]):
        (one,) = figures(capsys, *flags)["results"]
        assert one["protocol"]["windows"] == ("sliding" if flags else "non-overlapping")
        losses.append(one["nats_per_character"])
    floor = one["floor_nats_per_character"]
    assert losses[0] > max(losses[1:]) and min(losses) > floor > 0.3
    assert figures(capsys, "--stride=16")["results"][0]["nats_per_character"] == losses[0]
    assert run("evaluate", "--stride=8") == 0
    assert re.search(
        r"^sliding nats per character +\d.*\n(.*\n)*floor", capsys.readouterr().out, re.M
    )
    whole = figures(capsys, "--text=playwright:3:30000")["results"][0]
    assert whole["characters"] > 29_000 and whole["floor_nats_per_character"] > 0.3


def test_runs_that_differ_in_their_seed_have_a_mean(embedded, trained, monkeypatch, capsys):
    monkeypatch.chdir(embedded)
    paths = ["lightning_logs/version_0", "two/lightning_logs/version_0"]
    both = figures(capsys, "--ckpt_path", *paths)
    losses = [one["nats_per_character"] for one in both["results"]]
    assert losses[0] != losses[1]
    assert both["mean"]["nats_per_character"] == pytest.approx(statistics.mean(losses))
    error = statistics.stdev(losses) / math.sqrt(2)
    assert both["standard_error"]["nats_per_character"] == pytest.approx(error)
    # the same run twice, or another text
    other = trained / BEST
    for pair in ([paths[0], paths[0]], [paths[0], other]):
        assert "mean" not in figures(capsys, "--ckpt_path", *pair)
    assert run("evaluate", "--ckpt_path", *paths) == 0
    out = capsys.readouterr().out
    assert re.search(r"^checkpoint +1 +2 +mean +standard error$", out, re.M)
    assert out.count("protocol ") == 2
    assert run("evaluate", "--ckpt_path", paths[0], other) == 0
    assert "different texts" in capsys.readouterr().out


def test_models_with_different_vocabularies_score_the_same_text(
    embedded, trained, monkeypatch, capsys
):
    monkeypatch.chdir(embedded)
    Path("both.txt").write_text("to be or not to be\n")
    result = figures(capsys, "--text=both.txt", "--ckpt_path", "best", trained / BEST)
    assert [one["characters"] for one in result["results"]] == [18, 18]
    assert run("evaluate", "--text=both.txt", "--ckpt_path", "best", trained / BEST) == 0
    assert "different texts" not in capsys.readouterr().out


def test_the_protocol_identifies_checkpoint_and_text(here, capsys):
    Path("mine.txt").write_bytes("\ufeffto be\r\nor not".encode())
    protocol = figures(capsys, "--text=mine.txt")["results"][0]["protocol"]
    assert protocol["checkpoint_sha256"] == hashlib.sha256(Path(BEST).read_bytes()).hexdigest()
    assert protocol["text_sha256"] == hashlib.sha256(b"to be\nor not").hexdigest()
    assert protocol["step"] == 4 and protocol["part"] == "all" and protocol["precision"] == "fp32"
    assert run("evaluate", "--text=mine.txt") == 0
    out = capsys.readouterr().out
    assert all(f" {name}=" in out for name in protocol)


def test_standard_input_is_a_text(here, capsys):
    (here / "mine.txt").write_text("to be")
    command = [sys.executable, "-m", "gpt_lightning", "evaluate", "--text=-", "--json"]
    done = subprocess.run(command, input=b"to be", capture_output=True, check=True)
    (one,) = json.loads(done.stdout)["results"]
    assert one["nats_per_character"] == pytest.approx(
        figures(capsys, "--text=mine.txt")["results"][0]["nats_per_character"]
    )


def test_unknown_characters_follow_the_policy_and_are_counted(here, capsys):
    Path("odd.txt").write_text("to be XX or not")
    Path("known.txt").write_text("to be  or not")
    assert run("evaluate", "--text=odd.txt") == 2
    assert re.search(r"'X' .*--unknown=drop", capsys.readouterr().err)
    (known,) = figures(capsys, "--text=known.txt")["results"]
    for unknown, characters in (("drop", 12), ("replace", 14)):
        (one,) = figures(capsys, "--text=odd.txt", f"--unknown={unknown}")["results"]
        assert one["unknown_characters"] == 2 and one["characters"] == characters
        assert (one["nats_per_character"] == known["nats_per_character"]) == (unknown == "drop")
    assert run("evaluate", "--text=odd.txt", "--unknown=drop") == 0
    assert re.search(r"^unknown characters +2$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("tokenizer", ["char", "byte", "word"])
def test_the_costs_of_the_lines_sum_to_that_of_the_text(tokenizer, empty, capsys):
    text = "春眠 to be\n\nor not, né\nto be"
    Path("text.txt").write_text(text * 50, encoding="utf-8")
    Path("mine.txt").write_text(text, encoding="utf-8")
    assert run("fit", *TINY, f"--data.tokenizer={tokenizer}") == 0
    capsys.readouterr()
    (one,) = figures(capsys, "--text=mine.txt")["results"]
    assert run("evaluate", "--text=mine.txt", "--lines") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == text.splitlines(keepends=True)
    assert sum(line["characters"] for line in lines) == one["characters"]
    nats = one["nats_per_character"] * one["characters"]
    assert sum(line["nats"] for line in lines) == pytest.approx(nats, rel=1e-6)


def test_show_prints_the_text_in_colors_and_html_writes_a_page(here, capsys):
    Path("mine.txt").write_text("to be or not")
    assert run("evaluate", "--text=mine.txt", "--show", "--html=page.html") == 0
    out = capsys.readouterr().out
    assert "\x1b[38;5;16;48;5;" in out
    assert "to be or not" in re.sub(r"\x1b\[[\d;]*m", "", out)
    assert "mine.txt" in Path("page.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text=empty.txt"], "empty.txt has no text in it"),
        (["--text=one.txt"], "the text has fewer than two tokens"),
        (["--text=missing.txt"], "--text=missing.txt is not found"),
        (["--lines", "--json"], "not allowed with"),
        (["--text=text.txt", "--ckpt_path=other.ckpt"], "--ckpt_path=other.ckpt"),
        (["--text=text.txt", "--ckpt_path=missing.ckpt"], "--ckpt_path=missing.ckpt"),
        (["--stride=0"], "--stride=0 must be from 1 to the model's block_size=8"),
        (["--html=no/such/page.html"], "--html=no/such/page.html: there is no such folder"),
        (["--show", "--ckpt_path", "best", "last"], "--show is for one checkpoint"),
        (["--texts=a.txt"], "did you mean --text"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(flags, message, here, capsys):
    Path("empty.txt").touch()
    Path("one.txt").write_text("t")
    Path("other.ckpt").write_bytes(b"of another program")
    before = sorted(here.rglob("*"))
    assert run("evaluate", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert sorted(here.rglob("*")) == before


def test_a_training_text_that_changed_or_is_gone_is_an_error(here, capsys):
    # the run of the fixture was trained on its own copy
    path = read_checkpoint(find_checkpoint("best"))[KEY]["corpus"]["name"]
    shutil.copy(path, kept := here / "kept.txt")
    try:
        Path(path).write_text(TEXT + "to be\n", encoding="utf-8")
        assert run("evaluate") == 2
        assert "has changed since the training" in capsys.readouterr().err
        Path(path).unlink()
        assert run("evaluate") == 2
        assert "give another one with --text" in capsys.readouterr().err
    finally:
        shutil.copy(kept, path)
