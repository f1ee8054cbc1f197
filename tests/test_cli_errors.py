"""A user's mistake ends in one clear line on stderr and exit code 2, and changes no file."""

import warnings
from pathlib import Path

import pytest
import torch
from conftest import TINY

from gpt_lightning.checkpoint import KEY, read_checkpoint
from gpt_lightning.cli import main

FIT = ("fit", *TINY)
LAST = "lightning_logs/version_0/checkpoints/last.ckpt"
RESUME = ("fit", "--trainer.max_steps=8", "--trainer.accelerator=cpu")
VALIDATE = ("validate", "--trainer.accelerator=cpu")
READERS = pytest.mark.parametrize("command", [RESUME, VALIDATE, ("generate",)], ids=lambda c: c[0])


@pytest.fixture
def here(trained, monkeypatch):
    """The working folder: a text and an earlier run."""
    monkeypatch.chdir(trained)
    return trained


@pytest.fixture
def refused(here, capsys):
    """`refused(argv, *parts)`: the command ends with one line that contains all `parts`."""

    def run(argv, *parts):
        before = contents(here)
        capsys.readouterr()
        with warnings.catch_warnings(record=True) as warned, pytest.raises(SystemExit) as end:
            main(list(argv))
        printed = capsys.readouterr()
        check(end.value.code, printed.out, printed.err, parts)
        # each would be one more line on stderr
        assert all(issubclass(warning.category, DeprecationWarning) for warning in warned)
        assert contents(here) == before

    return run


def check(code, out, err, parts):
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    assert len(err) < 800
    for part in parts:
        assert str(part) in err
    assert out == ""


def contents(folder: Path) -> dict:
    """All files with their bytes; empty run folders and locks are left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.read_bytes() for path in files}


# --- data and flags -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, parts",
    [
        ("", ["given.txt", "empty"]),
        ("abc", ["3 tokens", "more text"]),
        ("abcdefghijklmnopqrst", ["20 tokens", "--data.block_size=8"]),
        (b"abc" * 100 + b"\xff\xfe", ["given.txt is not UTF-8", "byte offset 300"]),
    ],
    ids=["empty", "below a window", "validation below a window", "not UTF-8"],
)
def test_a_text_that_cannot_be_trained_on(here, refused, data, parts):
    Path("given.txt").write_bytes(data if isinstance(data, bytes) else data.encode())
    refused([*FIT, "--data.corpus=given.txt"], *parts)


def test_a_text_that_does_not_exist(refused):
    refused([*FIT, "--data.corpus=nope.txt"], "--data.corpus=nope.txt is not found")


@pytest.mark.parametrize(
    "flag, parts",
    [
        ("--data.block_size=0", ["must be"]),
        ("--data.block_size=100000", ["is too large", "tokens"]),
        ("--data.batch_size=100000", ["is too large", "tokens"]),
        ("--data.val_fraction=0", []),
        ("--data.tokenizer=chars", ["'char'", "'byte'"]),
        ("--model.n_layer=-1", ["must be at least"]),
        ("--model.n_embd=15", ["n_head=2"]),
        ("--model.dropout=1.5", []),
        ("--model.learning_rate=-1", ["at least 0"]),
        ("--model.beta1=1", []),
        ("--model.residual=false", ["is not a setting of the gpt model"]),
        ("--model.confidence_penalty=-1", ["must be 0 or more"]),
        ("--model.multi_token_heads=-1", []),
        ("--sample.top_k=0", ["must be at least 1"]),
        ("--sample.temperature=-1", ["must be 0 or"]),
        ("--sample.every_n_steps=-1", ["must be 0 or more"]),
        ("--checkpoint.every_n_train_steps=-1", ["must be 0 or more"]),
        ("--seed_everything=-1", ["must be 0 or more"]),
        ("--trainer.precision=foo", ["'bf16-mixed'"]),
        ("--trainer.accelerator=foo", ["invalid accelerator"]),
        ("--trainer.strategy=foo", ["invalid strategy"]),
        ("--trainer.devices=0", []),
        ("--trainer.max_steps=0", ["must be above 0"]),
        ("--trainer.strategy=ddp_spawn", ["use --trainer.strategy=ddp"]),
        ("--trainer.max_time=soon", ["DD:HH:MM:SS"]),
        ("--trainer.val_check_interval=0", ["must be above 0"]),
        ("--trainer.log_every_n_steps=0", ["must be above 0"]),
        ("--trainer.limit_val_batches=-1", ["[0.0, 1.0] or an int"]),
        ("--trainer.gradient_clip_algorithm=foo", ["norm"]),
        ("--trainer.overfit_batches=7", ["--data.overfit_batches=7"]),
        ("--trainer.fast_dev_run=-1", [">= 0"]),
    ],
)
def test_an_impossible_value(refused, flag, parts):
    given, _, value = flag.partition("=")
    value = {"false": "", "-1": "-1"}.get(value, value)
    refused([*FIT, flag], given.removeprefix("--"), value, *parts)


def test_muon_without_matrices_for_it(refused):
    flags = ["--data.corpus=text.txt", "--data.block_size=8", "--model.name=bigram"]
    refused(["fit", *flags], "--model.optimizer=muon", "optimizer=adamw")


def test_a_validation_interval_longer_than_an_epoch(refused):
    flags = ["--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=250"]
    refused([*FIT, *flags], "--trainer.val_check_interval=250 is more than the", "up to 1.0")


def test_a_text_with_characters_that_a_given_vocabulary_lacks(refused):
    parts = ["the character 'T' (U+0054", "position 0", "vocabulary of 3"]
    refused([*FIT, "--data.vocabulary=abc"], *parts)


def test_a_sample_prompt_with_an_unknown_character(refused):
    refused([*FIT, "--sample.prompt=é"], "--sample.prompt: the character 'é' (U+00E9")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_does_not_exist(refused):
    refused([*FIT, "--trainer.accelerator=cuda"], "--trainer.accelerator=cuda")
    refused(["generate", "--device=cuda"], "--device=cuda", "--device=cpu")


def test_the_nearest_flag_or_command_is_suggested(refused):
    refused([*FIT, "--data.blok_size=4"], "--data.blok_size; did you mean --data.block_size?")
    refused(["generate", "--temprature=1"], "did you mean --temperature?")
    refused(["fitt"], "unknown command 'fitt'; did you mean fit?", "validate, test, predict")
    refused(["xyz"], "unknown command 'xyz' (choose from fit, validate,")


def test_a_stray_word(refused):
    refused([*FIT, "extra"], "extra")
    refused(["generate", "extra"], "extra")


def test_a_config_that_does_not_exist_or_is_wrong(here, refused):
    refused([*FIT, "--config=nope.yaml"], "--config=nope.yaml")
    refused([*FIT, "--config=lecture/8_residual"], "did you mean lecture/08_residual?")
    Path("mine.yaml").write_text("model:\n  n_layr: 3\n")
    refused([*FIT, "--config=mine.yaml"], "n_layr")


# --- checkpoints ----------------------------------------------------------------------------------


@READERS
def test_a_file_that_is_not_a_checkpoint(here, refused, command):
    raw = Path(LAST).read_bytes()
    Path("torn.ckpt").write_bytes(raw[: len(raw) // 2])
    torch.save({"epoch": 1, "state_dict": {"weight": torch.zeros(2)}}, "foreign.ckpt")
    for name in ("torn.ckpt", "foreign.ckpt", "text.txt", "nope.ckpt"):
        refused([*command, f"--ckpt_path={name}"], f"--ckpt_path={name}")
    refused([*command, "--ckpt_path="], "--ckpt_path=")


@READERS
def test_the_last_run_when_there_is_none(tmp_path, refused, monkeypatch, command):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    parts = ["--ckpt_path=last: no run", "lightning_logs", "python -m gpt_lightning fit"]
    refused([*command, "--ckpt_path=last"], *parts)
    refused([command[0] if command[0] != "fit" else "predict"], "no run in lightning_logs")


@pytest.mark.parametrize("command", [RESUME, VALIDATE], ids=lambda c: c[0])
@pytest.mark.parametrize(
    "flag, part",
    [
        ("--model.n_embd=32", "n_embd=16"),
        ("--model.n_layer=2", "n_layer=1"),
        ("--data.block_size=16", "block_size=8"),
    ],
)
def test_another_architecture_than_the_checkpoints(refused, command, flag, part):
    name = flag.split(".")[-1]
    refused([*command, "--ckpt_path=last", flag], f"{name} does not fit", "last.ckpt", part)


def test_resuming_with_another_optimizer_text_split_or_vocabulary(here, refused):
    resume = [*RESUME, "--ckpt_path=last"]
    refused([*resume, "--model.optimizer=adamw"], "--model.optimizer=adamw", "muon")
    Path("other.txt").write_text("To be or not to be\n" * 100)
    refused([*resume, "--data.corpus=other.txt"], "other.txt is not the text", "text.txt")
    refused([*resume, "--data.split=blocks"], "split=blocks", "held out with")
    refused([*resume, "--data.tokenizer=byte"], "vocabulary", "256 tokens")
    with Path("text.txt").open("a") as file:
        file.write("more\n")
    refused(resume, "text.txt is not the text", "has changed")
    Path("text.txt").unlink()
    refused(resume, "--data.corpus=text.txt is not found")


def test_weights_that_do_not_fit_the_checkpoints_own_model(here, refused):
    checkpoint = read_checkpoint(LAST)
    checkpoint[KEY]["model"]["n_embd"] = 32
    torch.save(checkpoint, "mixed.ckpt")
    refused(["generate", "--ckpt_path=mixed.ckpt"], "--ckpt_path=mixed.ckpt", "weights")


def test_a_finished_run_names_the_flag_to_train_further(refused):
    refused(["fit", "--ckpt_path=last"], "has done its 4 steps", "--trainer.max_steps=8")
    refused([*FIT, "--ckpt_path=last", "--trainer.max_steps=3"], "has done its 4 steps")


def test_a_run_without_a_step(here, capsys):
    with pytest.raises(SystemExit) as end:
        main([*FIT, "--trainer.max_time=00:00:00:00"])
    assert end.value.code == 2
    assert "no step was taken" in capsys.readouterr().err


@pytest.mark.parametrize("command", [FIT, ("predict", f"--ckpt_path={LAST}")], ids=["fit", "pred"])
def test_a_folder_that_cannot_be_made(refused, command):
    refused([*command, "--trainer.default_root_dir=text.txt/sub"], "text.txt/sub", "cannot be made")


# --- generate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag, parts",
    [
        ("--prompt=é", ["--prompt: the character 'é' (U+00E9", "position 0"]),
        ("--stop=é", ["--stop: the character 'é'"]),
        ("--stop=", ["--stop"]),
        ("--temperature=-1", ["must be 0 or"]),
        ("--temperature=nan", ["must be 0 or"]),
        ("--top_k=four", ["invalid int value: 'four'"]),
        ("--top_p=1.1", ["above 0 and at most 1"]),
        ("--max_new_tokens=0", ["must be at least 1"]),
        ("--num_samples=0", ["must be at least 1"]),
        ("--seed=99999999999999999999", ["64 bits"]),
        ("--unknown=foo", ["'error', 'drop', 'replace'"]),
        ("--device=foo", ["--device=cpu"]),
        ("--precision=fp8", ["auto, fp32, bf16, int8"]),
        ("--prompt_file=nope.txt", ["nope.txt: No such file"]),
        ("--prompt_file=lightning_logs", ["lightning_logs: Is a directory"]),
        ("--temp=1", ["--temp=1"]),  # no abbreviations
    ],
)
@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_generate_refuses(refused, flag, parts, stream):
    refused(["generate", flag, stream], flag.partition("=")[0], *parts)


def test_prompts_that_cannot_be_read(here, refused):
    refused(["generate", "--prompt=To", "--prompt_file=text.txt"], "--prompt and --prompt_file")
    Path("bad.txt").write_bytes(b"To be\xff")
    refused(["generate", "--prompt_file=bad.txt"], "--prompt_file=bad.txt", "byte 5")
    Path("odd.txt").write_text("zé")
    refused(["generate", "--prompt_file=odd.txt"], "--prompt_file=odd.txt: the character 'z'")


# --- what is not the user's mistake ---------------------------------------------------------------


def test_an_error_of_a_users_callback_keeps_its_traceback(here, monkeypatch, capsys):
    Path("mine.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Mine(Callback):\n"
        "    def on_train_batch_end(self, *args):\n"
        "        raise ValueError('my own mistake')\n"
    )
    monkeypatch.syspath_prepend(str(here))
    flags = ["--trainer.callbacks+=mine.Mine"]
    for command in (FIT, [*RESUME, "--ckpt_path=last"]):
        with pytest.raises(ValueError, match="my own mistake"):
            main([*command, *flags])
    assert "Step 4 is saved; resume with: python -m" in capsys.readouterr().out


def test_the_command_itself_ends_in_one_line(cli, trained):
    ended = cli(*FIT, "--trainer.max_step=4", cwd=trained)
    check(ended.returncode, ended.stdout, ended.stderr, ["did you mean --trainer.max_steps?"])
