"""The commands as a user types them."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, TINY, run

from gpt_lightning import TextGenerator, lightning_cli

QUICK = [
    "--trainer.accelerator=cpu",
    "--data.block_size=8",
    "--data.batch_size=4",
    "--model.n_layer=1",
    "--model.n_head=1",
    "--model.n_embd=8",
    "--trainer.max_steps=3",
    "--trainer.val_check_interval=3",
    "--sample.every_n_steps=3",
    "--sample.max_new_tokens=12",
]


def test_generate_needs_only_the_checkpoint_file(trained, tmp_path, cli):
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(trained / "lightning_logs/version_0/checkpoints/best.ckpt", empty / "mine.ckpt")
    shutil.rmtree(trained)
    flags = ["generate", "--ckpt_path=mine.ckpt", "--prompt=To be", "--max_new_tokens=40"]
    texts = [cli(*flags, f"--seed={seed}", cwd=empty) for seed in (7, 7, 8)]
    assert [t.returncode for t in texts] == [0, 0, 0], texts[0].stderr
    assert texts[0].stdout == texts[1].stdout != texts[2].stdout
    assert texts[0].stdout.startswith("To be") and len(texts[0].stdout) == len("To be") + 41
    assert [p.name for p in empty.iterdir()] == ["mine.ckpt"]


@pytest.mark.parametrize(
    "argv", [["generate", "--max_new_tokens=3"], ["evaluate", "--html=a.html"]]
)
def test_generate_and_evaluate_do_not_import_lightning(argv, trained):
    code = (
        f"import sys; from gpt_lightning.cli import run; run({argv});"
        "names = {name.split('.')[0] for name in sys.modules};"
        "sys.exit(len(names & {'lightning', 'torchmetrics', 'jsonargparse', 'tensorboard'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=trained).returncode == 0


def test_generate_takes_newest_run_streams_stops_and_samples(here, capsys):
    whole = ["generate", "--max_new_tokens=60", "--prompt=To be", "--temperature=1"]
    assert run(*whole) == 0
    text = capsys.readouterr().out
    assert run(*whole, "--stream") == 0
    assert capsys.readouterr().out == text
    stop = text[len("To be") + 10]
    assert run(*whole, "--stop", stop) == 0
    assert capsys.readouterr().out == text[: text.index(stop, len("To be")) + 1] + "\n"
    assert run(*whole, "--num_samples=3") == 0
    out = capsys.readouterr().out
    assert out.count("To be") == 3 and "--- 3 of 3 ---" in out


def test_generate_reads_its_prompt_from_a_file_or_stdin(trained, cli, tmp_path):
    (tmp_path / "prompt.txt").write_text("that is\r\nthe", newline="")
    flags = ["generate", "--max_new_tokens=5", "--root", trained]
    assert cli(*flags, "--prompt_file", tmp_path / "prompt.txt").stdout.startswith("that is\nthe")
    piped = subprocess.run(
        [sys.executable, "-m", "gpt_lightning", *map(str, flags), "--prompt_file=-"],
        input="whether",
        capture_output=True,
        text=True,
    )
    assert piped.stdout.startswith("whether") and len(piped.stdout) == len("whether") + 6


def test_generate_continues_each_prompt_of_a_file(here, capsys):
    Path("prompts.txt").write_text("To be\n\nmind")
    flags = ["generate", "--max_new_tokens=30", "--prompts_file=prompts.txt"]
    texts = []
    for prompt in ("To be", "mind"):
        assert run(*flags[:2], f"--prompt={prompt}") == 0
        texts.append(capsys.readouterr().out)
    for stream in ("--stream", "--no-stream"):
        assert run(*flags, stream) == 0
        out = capsys.readouterr().out
        assert out == f"--- 1 of 2 ---\n{texts[0]}--- 2 of 2 ---\n{texts[1]}"
    assert run(*flags, "--num_samples=2") == 0
    assert re.findall(r"^--- .* ---\n.", capsys.readouterr().out, re.M) == [
        "--- 1 of 4 ---\nT", "--- 2 of 4 ---\nT", "--- 3 of 4 ---\nm", "--- 4 of 4 ---\nm"
    ]  # fmt: skip


def test_generate_bans_strings_and_penalizes_repetition(here, capsys):
    whole = ["generate", "--max_new_tokens=100", "--prompt=To be", "--temperature=1"]
    assert run(*whole, "--ban=e", "--ban=t") == 0
    assert not set(capsys.readouterr().out[len("To be") :]) & set("et")
    assert run(*whole, "--repetition_penalty=100", "--temperature=0", "--max_new_tokens=3") == 0
    text = capsys.readouterr().out[:-1]
    assert len(set(text)) == len(text)


def session(monkeypatch, capsys, typed, *flags):
    """What `generate --interactive` prints when these lines are typed."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert run("generate", "--interactive", "--max_new_tokens=20", *flags) == 0
    return capsys.readouterr()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("flags", [["--stream"], ["--no-stream"], ["--interactive"]])
def test_control_characters_do_not_reach_a_terminal(here, monkeypatch, capsys, flags, terminal):
    evil = "\x1b]0;title\x07 \x9b31m\ttext\n"
    stream = [[piece] for piece in evil]
    monkeypatch.setattr(TextGenerator, "stream", lambda *_, **__: iter(stream))
    monkeypatch.setattr("sys.stdin", io.StringIO("To\n"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    prompt = [] if "--interactive" in flags else ["--prompt=To"]
    assert run("generate", *flags, *prompt) == 0
    shown = "\\x1b]0;title\\x07 \\x9b31m\ttext\n" if terminal else evil
    assert capsys.readouterr().out == f"To{shown}\n"


def test_interactive_texts_have_the_earlier_ones_as_context(here, monkeypatch, capsys):
    def alone(prompt, seed):
        assert run("generate", "--max_new_tokens=20", f"--prompt={prompt}", f"--seed={seed}") == 0
        return capsys.readouterr().out.removesuffix("\n")

    first = alone("To be", 7)
    second = alone(first + "\nthat", 8).removeprefix(first + "\n")
    third = alone(f"{first}\n{second}", 9).removeprefix(f"{first}\n{second}")
    fourth = alone("that", 10)
    found = session(monkeypatch, capsys, "To be\nthat\n\n/new\nthat\n", "--seed=7")
    assert found.out == "".join(f"{text}\n" for text in (first, second, third, fourth))


def test_interactive_goes_on_after_an_unknown_character(here, monkeypatch, capsys):
    expected = session(monkeypatch, capsys, "To be")
    found = session(monkeypatch, capsys, "é\nTo be\n")
    assert found.out == expected.out
    assert "'é' (U+00E9)" in found.err and "--unknown=drop" in found.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("To be"))
    assert run("generate", "--interactive", "--stop=é") == 2


def test_ctrl_c_ends_an_interactive_text_not_the_program(here, monkeypatch, capsys):
    calls = []

    def stream(self, prompt, **settings):
        calls.append(prompt)
        yield from (["e"], ["t"])
        raise KeyboardInterrupt

    monkeypatch.setattr(TextGenerator, "stream", stream)
    assert session(monkeypatch, capsys, "To\nbe\n").out == "Toet\nbeet\n"
    assert calls == ["To", "Toet\nbe"]


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
@pytest.mark.parametrize(
    "text, prompt",
    [
        ("春眠不觉晓,处处闻啼鸟。夜来风雨声,花落知多少。\n" * 40, "春眠"),
        ("a\u0301 nai\u0308ve 👩‍👩‍👧 family 🏳️‍🌈 e\u0323\u0302\n" * 40, "👩‍👩‍👧"),
        ("one line\r\nand another\r\n" * 60, "one line\r\nand"),
    ],
    ids=["chinese", "emoji and marks", "windows line ends"],
)
def test_any_language_trains_and_generates(text, prompt, tokenizer, empty, capsys):
    (empty / "text.txt").write_bytes(text.encode())
    (empty / "prompt.txt").write_bytes(prompt.encode())
    flags = [f"--data.tokenizer={tokenizer}", *QUICK, "--data.val_fraction=0.2"]
    assert run("fit", "--data.corpus=text.txt", *flags) == 0
    capsys.readouterr()
    assert run("generate", "--prompt_file=prompt.txt", "--max_new_tokens=30") == 0
    out = capsys.readouterr().out
    assert out.startswith(prompt.replace("\r\n", "\n")) and len(out) > len(prompt)
    if tokenizer == "char":
        assert set(out) <= set(text.replace("\r\n", "\n"))


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def test_characters_that_stdout_s_encoding_lacks(empty, monkeypatch):
    Path("text.txt").write_text("春眠不觉晓,处处闻啼鸟。" * 40, encoding="utf-8")

    def output(stream, *argv):
        monkeypatch.setattr(sys, "stdout", stream)
        assert run(*argv) == 0
        return stream.getvalue() if isinstance(stream, io.StringIO) else stream.buffer.getvalue()

    fit = ("fit", "--data.corpus=text.txt", *QUICK)
    assert b"?" in output(Terminal(io.BytesIO(), "cp1252"), *fit)
    generate = ("generate", "--max_new_tokens=30", "--no-stream")
    text = output(io.StringIO(), *generate)  # as in a notebook, without `reconfigure`
    assert set(text) <= set("春眠不觉晓,处处闻啼鸟。\n")
    file = io.TextIOWrapper(io.BytesIO(), "cp1252", newline="\n")
    assert output(file, *generate).decode("utf-8") == text


class Gone(io.StringIO):
    """A pipe whose reader has ended."""

    def write(self, text):
        raise BrokenPipeError


def test_a_run_goes_on_when_its_reader_ends(here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone())
        patch.setattr(sys, "stderr", Gone())
        assert run("fit", "--ckpt_path=last", "--trainer.max_steps=8") == 0
        patch.setattr(sys, "stderr", None)  # `2>&-`
        assert run("generate") == 141
    last = torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 8


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
def test_file_names_need_not_be_utf_8(empty, capsys):
    name = os.fsdecode(b"caf\xe9")
    Path(name).write_text("\ufeffto be or not to be\n" * 40, encoding="utf-8")
    fit = ("fit", f"--data.corpus={name}", *QUICK, "--trainer.logger=true")
    assert run(*fit) == 0
    assert run("fit", "--ckpt_path=last", "--trainer.max_steps=4") == 0
    capsys.readouterr()
    assert run("generate", f"--prompt_file={name}", "--max_new_tokens=1") == 0
    assert capsys.readouterr().out.startswith("to be or not")
    assert run(*fit, f"--trainer.default_root_dir={name}2") == 2
    assert "--trainer.default_root_dir=caf" in capsys.readouterr().err


def test_rare_characters_can_be_left_out(empty, capsys):
    Path("text.txt").write_text("to be or not to be\n" * 40 + "xyyzzz")
    Path("other.txt").write_text("to be\n" * 40)
    fit = ("fit", "--data.corpus=text.txt", "--data.min_count=3", *QUICK)
    assert run(*fit, "--data.unknown=error") == 2
    assert "'x' (U+0078)" in capsys.readouterr().err
    assert run(*fit, "--data.unknown=drop") == 0
    assert "vocabulary 9\n" in capsys.readouterr().out  # "\n bentorz", each three times at least
    assert run(*fit) == 0
    out = capsys.readouterr().out
    assert "vocabulary 10\n" in out
    assert "3 of 766 characters of " in out and "not in the vocabulary and are replaced" in out
    assert run("fit", "--ckpt_path=last", "--trainer.max_steps=4") == 0
    assert run("validate", "--data.corpus=other.txt") == 0


def test_many_characters_that_occur_once_are_reported(empty, capsys):
    Path("text.txt").write_text("to be\n" * 99 + "".join(map(chr, range(0x4E00, 0x4E00 + 100))))
    assert run("fit", "--data.corpus=text.txt", *QUICK) == 0
    assert "100 characters occur only once: --data.min_count=2, " in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_all_commands_work_with_words_and_subwords(here, kind, capsys):
    (here / "other.txt").write_text("that is the mind: to be the question\n" * 20)
    (here / "new.txt").write_text("that is the mind: Ä\n" * 40, encoding="utf-8")
    assert run("fit", *TINY, f"--data.tokenizer={kind}", "--sample.every_n_steps=2") == 0
    assert "tokens seen" in capsys.readouterr().out
    assert run("fit", "--ckpt_path=last", "--trainer.max_steps=6") == 0
    assert run("validate", "--ckpt_path=last") == 0
    assert run("predict", "--ckpt_path=last") == 0
    loss = re.search(r"^step 6  val (\S+)", capsys.readouterr().out, re.MULTILINE)[1]
    costs = np.load("predictions.npy")
    tokenizer = TextGenerator.load("lightning_logs/version_1/checkpoints/last.ckpt").tokenizer
    characters = len(tokenizer.decode(costs["id"]))
    assert costs["nats"].sum() / characters == pytest.approx(float(loss), abs=1e-4)
    assert run("validate", "--ckpt_path=last", "--data.corpus=other.txt") == 0
    assert run("fit", *TINY, "--init_from=last", "--data.corpus=new.txt") == 0
    capsys.readouterr()
    assert run("generate", "--prompt=that is Ä", "--max_new_tokens=5") == 0
    assert capsys.readouterr().out.startswith("that is Ä")


def test_validate_test_and_predict_agree_on_the_exact_loss(here, capsys):
    before = sorted(p.name for p in (here / "lightning_logs").iterdir())
    assert run("validate", "--ckpt_path=last") == 0
    assert "loss/val" in capsys.readouterr().out
    assert run("test", "--ckpt_path=last") == 0
    assert "loss/test" in capsys.readouterr().out
    assert run("predict", "--ckpt_path=last") == 0
    assert run("predict", "--ckpt_path=last") == 0
    assert np.array_equal(np.load("predictions.npy"), np.load("predictions-1.npy"))
    nats = np.load("predictions.npy")["nats"].mean()
    saved = torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    kept = next(v for k, v in saved["callbacks"].items() if "BestAndLast" in k)
    assert kept["best_step"] == 4 and nats == pytest.approx(kept["best_val_loss"], abs=1e-5)
    assert sorted(p.name for p in (here / "lightning_logs").iterdir()) == before


def test_validate_accepts_another_text_in_the_same_vocabulary(here, capsys):
    (here / "other.txt").write_text("that is the mind: to be the question\n" * 20)
    assert run("validate", "--data.corpus=other.txt") == 0
    (here / "odd.txt").write_text("that is the WEIRD mind\n" * 40)
    assert run("validate", "--data.corpus=odd.txt") == 2
    assert "'W' (U+0057" in capsys.readouterr().err
    assert run("validate", "--data.corpus=odd.txt", "--data.unknown=drop") == 0


def test_validate_accepts_a_validation_text_of_its_own(here, capsys):
    Path("other.txt").write_text("To be, or not to be.\n" * 30)
    assert run("validate", "--data.val_corpus=other.txt", "--trainer.accelerator=cpu") == 0
    assert "other.txt: 629 of 630 tokens" in capsys.readouterr().out


def test_saved_config_reproduces_the_run(trained, empty):
    shutil.copy(trained / "text.txt", empty / "text.txt")
    assert run("fit", "--config", trained / "lightning_logs/version_0/config.yaml") == 0
    one, two = (
        torch.load(f / "lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
        for f in (trained, empty)
    )
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name])


SMALL = ("--data.corpus=a.txt", "--data.block_size=8", "--data.batch_size=4",
         "--model.n_layer=1", "--model.n_embd=16", "--trainer.accelerator=cpu")  # fmt: skip


def test_a_short_run_is_validated_and_sampled_four_times(empty, capsys):
    Path("a.txt").write_text("to be or not to be\n" * 42)
    assert run("fit", *SMALL) == 0
    out = capsys.readouterr().out
    assert "batch 4 x 8, 64 steps" in out
    for line in (r"^step (\d+)  train", r"-- step (\d+) --"):
        assert re.findall(line, out, re.MULTILINE) == ["16", "32", "48", "64"]
    assert run("fit", "--ckpt_path=last", "--trainer.max_steps=66") == 0


def test_the_last_step_of_a_run_measured_in_epochs_is_validated(empty, capsys):
    Path("a.txt").write_text("to be or not to be\n" * 42)  # 22 steps in an epoch
    flags = ["--sample.every_n_steps=0", "--trainer.val_check_interval=30"]
    assert run("fit", *SMALL, *flags, "--trainer.max_epochs=2") == 0
    assert run("fit", "--ckpt_path=last", "--trainer.max_epochs=3") == 0
    out = capsys.readouterr().out
    assert re.findall(r"^step (\d+)  train", out, re.M) == ["30", "44", "60", "66"]
    losses = re.findall(r"^step (?:44|66)  .* val (.*?) nats", out, re.M)
    assert re.findall(r"^final val loss  +(.*?) nats", out, re.M) == losses


def test_compiling_is_chosen_for_a_new_run_by_its_tokens_and_kept_on_resume(empty, monkeypatch):
    def choose(device, config, tokens):
        asked.append(tokens)
        return False

    asked = []
    Path("text.txt").write_text(TEXT)
    monkeypatch.setattr(lightning_cli, "choose_compile", choose)
    assert run("fit", *TINY, "--trainer.accumulate_grad_batches=2") == 0
    assert asked == [4 * 2 * 4 * 8]  # steps, accumulation, batch_size, block_size
    assert run("fit", "--ckpt_path=last", "--trainer.max_steps=6") == 0
    assert run("fit", *TINY, "--model.compile=false") == 0
    assert len(asked) == 1


def test_fast_dev_run_leaves_nothing_behind(empty):
    assert run("fit", "--data.corpus=playwright:3:9000", *QUICK, "--trainer.fast_dev_run=2") == 0
    assert not list(empty.rglob("*.ckpt"))
