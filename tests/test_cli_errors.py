"""A user's mistake ends in one clear line on stderr and exit code 2, and changes no file."""

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import TINY, contents, run

from gpt_lightning import TextGenerator
from gpt_lightning.cli import main

FIT = ("fit", *TINY)
LAST = "lightning_logs/version_0/checkpoints/last.ckpt"
RESUME = ("fit", "--trainer.max_steps=8", "--trainer.accelerator=cpu")
VALIDATE = ("validate", "--trainer.accelerator=cpu")
READERS = pytest.mark.parametrize("command", [RESUME, VALIDATE, ("generate",)], ids=lambda c: c[0])


@pytest.fixture
def refused(here, ends):
    """`refused(argv, *parts)`: the command ends with one line that contains all `parts`."""

    def check(argv, *parts):
        before = contents(here)
        with warnings.catch_warnings(record=True) as warned:
            code, out, err = ends(*argv)
        assert code == 2 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1
        assert len(err) < 800 and all(part in err for part in parts), err
        # each would be one more line on stderr
        assert all(issubclass(warning.category, DeprecationWarning) for warning in warned)
        assert contents(here) == before

    return check


# --- data and flags -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, parts",
    [
        (b"", ["given.txt", "empty"]),
        (b"abc", ["3 tokens", "more text"]),
        (b"abcdefghijklmnopqrst", ["20 tokens", "--data.block_size=8"]),
        (b"abc" * 100 + b"\xff\xfe", ["given.txt is not UTF-8"]),
        (None, ["--data.corpus=given.txt is not found"]),
    ],
)
def test_a_text_that_cannot_be_trained_on(here, refused, data, parts):
    if data is not None:
        Path("given.txt").write_bytes(data)
    refused([*FIT, "--data.corpus=given.txt"], *parts)


@pytest.mark.parametrize(
    "flag, parts",
    [
        ("--data.block_size=100000", ["--data.block_size=100000", "is too large", "tokens"]),
        ("--data.val_fraction=0", ["--data.val_fraction=0"]),
        ("--data.tokenizer=chars", ["--data.tokenizer=chars must be one of: char, byte, word"]),
        ("--model.n_layer=two", ["--model.n_layer=two must be a whole number"]),
        ("--data.stride=x", ["--data.stride=x must be one of: a whole number, null"]),
        ("--data.vocabulary=abc", ["the character 'T' (U+0054", "vocabulary of 3"]),
        ("--model.n_layer=-1", ["--model.n_layer=-1 must be at least"]),
        ("--model.n_embd=15", ["--model.n_embd=15", "--model.n_head=2"]),
        ("--model.residual=false", ["--model.residual=false is not a setting of the gpt model"]),
        ("--sample.top_k=0", ["--sample.top_k=0 must be at least 1"]),
        ("--sample.prompt=é", ["--sample.prompt: the character 'é' (U+00E9"]),
        ("--checkpoint.every_n_train_steps=-1", ["every_n_train_steps=-1 must be at least 0"]),
        ("--trainer.precision=foo", ["--trainer.precision=foo must be one of", "bf16-mixed"]),
        ("--trainer.accelerator=foo", ["--trainer.accelerator=foo", "invalid accelerator"]),
        ("--trainer.max_steps=0", ["--trainer.max_steps=0 must be above 0"]),
        ("--trainer.strategy=ddp_spawn", ["use --trainer.strategy=ddp"]),
        ("--trainer.gradient_clip_val=-1", ["must be 0 or more"]),
        ("--trainer.limit_train_batches=0", ["must be above 0"]),
        ("--seed_everything=99999999999999999999", ["must be below 2**32"]),
        ("--data.val_fraction=1", ["leaves no text to train on"]),
        ("--init_from=nosuch", ["--init_from=nosuch: no such file"]),
        ("--trainer.strategy=fsdp", ["splits the parameters", "use --trainer.strategy=ddp"]),
        ("--trainer.strategy=ModelParallelStrategy", ["splits the parameters"]),
        ("--trainer.num_nodes=2", ["num_nodes=2 would wait for the other nodes", "torchrun"]),
        ("--trainer.callbacks+=nothere.Mine", ["No module named 'nothere'"]),
        ("--trainer.callbacks+=EarlyStopping", ["EarlyStopping", "are required: monitor"]),
        ("--trainer.max_time=soon", ["DD:HH:MM:SS"]),
        ("--trainer.limit_val_batches=-1", ["[0.0, 1.0] or an int"]),
        ("--trainer.overfit_batches=7", ["use --data.overfit_batches=7"]),
        ("--config=nope.yaml", ["--config=nope.yaml"]),
        ("--config=lecture/8_residual", ["did you mean lecture/08_residual?"]),
        ("--config=lecture", ["choose one of lecture/01_bigram, "]),
        ("--config=mine.yaml", ["n_layr"]),
        ("--trainer.default_root_dir=text.txt/sub", ["text.txt/sub", "cannot be made"]),
        ("extra", ["extra"]),
    ],
)
def test_an_impossible_value(refused, flag, parts):
    Path("mine.yaml").write_text("model:\n  n_layr: 3\n")
    refused([*FIT, flag], *parts)


@pytest.mark.skipif(find_spec("rich") is not None, reason="its package is installed")
def test_a_progress_bar_without_its_package(refused):
    refused([*FIT, "--trainer.callbacks+=RichProgressBar"], "requires `rich`", "pip install")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_does_not_exist(refused):
    refused([*FIT, "--trainer.accelerator=cuda"], "--trainer.accelerator=cuda")
    refused(["generate", "--device=cuda"], "--device=cuda", "--device=cpu")


def test_the_nearest_command_is_suggested(refused):
    refused(["fitt"], "unknown command 'fitt'; did you mean fit?", "validate, test, predict")
    refused(["chat"], "did you mean generate --interactive?")
    refused(["xyz"], "unknown command 'xyz' (choose from fit, validate,")
    for guess, command in {"train": "fit", "sample": "generate", "eval": "evaluate"}.items():
        refused([guess], f"did you mean {command}?")


# --- checkpoints ----------------------------------------------------------------------------------


@READERS
def test_a_file_that_is_not_a_checkpoint(refused, command):
    Path("torn.ckpt").write_bytes(Path(LAST).read_bytes()[:-100])
    torch.save({"epoch": 1, "state_dict": {"weight": torch.zeros(2)}}, "foreign.ckpt")
    for name in ("torn.ckpt", "foreign.ckpt", "nope.ckpt", ""):
        refused([*command, f"--ckpt_path={name}"], f"--ckpt_path={name}")


@READERS
def test_the_last_run_when_there_is_none(tmp_path, refused, monkeypatch, command):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    parts = ["--ckpt_path=last: no run", "lightning_logs", "python -m gpt_lightning fit"]
    refused([*command, "--ckpt_path=last"], *parts)
    refused([command[0] if command[0] != "fit" else "predict"], "no run in lightning_logs")


@pytest.mark.parametrize("command", [RESUME, VALIDATE], ids=lambda c: c[0])
@pytest.mark.parametrize(
    "flag, part", [("--model.n_embd=32", "n_embd=16"), ("--data.block_size=16", "block_size=8")]
)
def test_another_architecture_than_the_checkpoints(refused, command, flag, part):
    refused([*command, "--ckpt_path=last", flag], f"{flag} does not fit", "last.ckpt", part)


def test_resuming_with_another_optimizer_text_split_or_vocabulary(here, refused):
    resume = [*RESUME, "--ckpt_path=last"]
    refused([*resume, "--model.optimizer=adamw"], "--model.optimizer=adamw cannot continue", "muon")
    Path("other.txt").write_text("To be or not to be\n" * 100)
    refused(
        [*resume, "--data.corpus=other.txt"],
        "is not its corpus",
        "--init_from=",
        "--data.corpus=",
    )
    refused([*resume, "--data.split=blocks"], "split=blocks", "held out another part")
    refused([*resume, "--data.tokenizer=byte"], "has another vocabulary")
    with Path("text.txt").open("a") as file:
        file.write("more\n")
    refused(resume, "has changed since its training", "--init_from=")
    refused(["validate", "--trainer.accelerator=cpu"], "has changed since", "evaluate --text=")
    Path("text.txt").unlink()
    refused(resume, "--data.corpus=text.txt is not found")


def test_fine_tuning_needs_a_text(here, refused):
    refused(["fit", "--init_from=last"], "--init_from=last needs a text", "--data.corpus=NAME")


def test_a_finished_run_names_the_flag_to_train_further(refused):
    refused(["fit", "--ckpt_path=last"], "has done its 4 steps", "--trainer.max_steps=8")
    refused([*FIT, "--ckpt_path=last", "--trainer.max_steps=3"], "has done its 4 steps")


def test_a_run_without_a_step(here, capsys):
    assert run(*FIT, "--trainer.max_time=00:00:00:00") == 2
    assert "no step was taken" in capsys.readouterr().err


# --- generate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag, parts",
    [
        ("--prompt=é", ["--prompt: the character 'é' (U+00E9"]),
        ("--stop=é", ["--stop='é'", "never occurs"]),
        ("--temperature=-1", ["must be 0 or"]),
        ("--top_k=four", ["invalid int value: 'four'"]),
        ("--top_p=1.1", ["above 0 and at most 1"]),
        ("--max_new_tokens=0", ["must be at least 1"]),
        ("--num_samples=1000000000", ["must be at most 65536"]),
        ("--unknown=foo", ["'error', 'drop', 'replace'"]),
        ("--device=foo", ["--device=cpu"]),
        ("--precision=fp8", ["auto, fp32, bf16, int8"]),
        ("--repetition_penalty=0", ["between 0.01 and 100"]),
        ("--ban=", ["--ban='' must have at least one character"]),
        ("--prompts_file=lines.txt", ["--prompts_file=lines.txt, line 3: the character 'é'"]),
        ("--prompts_file=empty.txt", ["is empty; write one prompt a line"]),
        ("--prompt_file=nope.txt", ["nope.txt cannot be read", "No such file"]),
        ("--prompt_file=bad.txt", ["bad.txt is not UTF-8", "convert it"]),
        ("--prompt_file=odd.txt", ["--prompt_file=odd.txt: the character 'z'"]),
        ("--temprature=1", ["--temprature=1; did you mean --temperature?"]),
        ("extra", ["extra", "such as --prompt=..."]),
    ],
)
@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_generate_refuses(refused, flag, parts, stream):
    Path("bad.txt").write_bytes(b"To be\xff")
    Path("odd.txt").write_text("zé")
    Path("lines.txt").write_text("To\n\né\n", encoding="utf-8")
    Path("empty.txt").write_text("\n")
    refused(["generate", flag, stream], flag.partition("=")[0], *parts)


def test_too_little_memory(here, monkeypatch, refused):
    def fails(*_, **__):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    monkeypatch.setattr(TextGenerator, "generate", fails)
    refused(["generate", "--num_samples=9"], "out of memory", "--num_samples=9")


def test_two_prompts(refused):
    refused(["generate", "--prompt=To", "--prompt_file=text.txt"], "--prompt_file: not allowed")
    refused(["generate", "--interactive", "--num_samples=2"], "--num_samples=2 must be 1")


# --- what is not the user's mistake ---------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        "ValueError('my mistake')",
        "RuntimeError('my printer is out of memory')",
        "OSError(28, 'my disk')",
    ],
)
def test_an_error_of_a_users_callback_keeps_its_traceback(here, monkeypatch, capsys, error):
    Path("mine.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Mine(Callback):\n"
        "    def on_train_batch_end(self, *args):\n"
        f"        raise {error}\n"
    )
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # of the case before
    flags = ["--trainer.callbacks+=mine.Mine"]
    for command in (FIT, [*RESUME, "--ckpt_path=last"]):
        with pytest.raises((ValueError, RuntimeError, OSError), match="my "):
            main([*command, *flags])
    assert "Step 4 is saved.\nResume with: python -m" in capsys.readouterr().out


def test_the_command_itself_ends_in_one_line(cli, trained):
    ended = cli(*FIT, "--trainer.max_step=4", cwd=trained)
    message = "error: unknown flag --trainer.max_step; did you mean --trainer.max_steps?\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", message)
