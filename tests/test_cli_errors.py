"""A user's mistake ends in one clear line on stderr and exit code 2; nothing is written or lost.

Most tests call the front door in this process, which is what the command does; those at the end
start the command itself.
"""

import http.server
import pickle
import socket
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import TINY

from gpt_lightning.checkpoint import KEY, read_checkpoint
from gpt_lightning.cli import main

FIT = ("fit", *TINY)
LAST = "lightning_logs/version_0/checkpoints/last.ckpt"
# each command that reads a checkpoint, as it would be asked to go on from one
RESUME = ("fit", "--trainer.max_steps=8", "--trainer.accelerator=cpu")
VALIDATE = ("validate", "--trainer.accelerator=cpu")
READERS = pytest.mark.parametrize("command", [RESUME, VALIDATE, ("generate",)], ids=lambda c: c[0])


@pytest.fixture
def here(trained, monkeypatch):
    """The working folder: it holds a text and an earlier run, neither of which may be touched."""
    monkeypatch.chdir(trained)
    return trained


@pytest.fixture
def refused(here, capsys):
    """`refused(argv, *parts)`: the command ends as promised, and its line has all `parts`."""

    def run(argv, *parts):
        before = contents(here)
        capsys.readouterr()
        with warnings.catch_warnings(record=True) as warned, pytest.raises(SystemExit) as end:
            main(list(argv))
        said = capsys.readouterr()
        check(end.value.code, said.out, said.err, parts)
        # each would be one more line on stderr
        assert all(issubclass(warning.category, DeprecationWarning) for warning in warned)
        assert contents(here) == before

    return run


def check(code, out, err, parts):
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    assert len(err) < 600
    for part in parts:
        assert str(part) in err
    assert out == ""


def contents(folder: Path) -> dict:
    """All files with their bytes, and all folders."""
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# --- the text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, parts",
    [
        ("", ["given.txt is empty"]),
        ("abc", ["3 tokens", "training part", "--data.block_size=8", "more text"]),
        ("abcdefghijklmnopqrst", ["20 tokens", "validation part", "--data.block_size=8"]),
        (b"abc" * 100 + b"\xff\xfe", ["given.txt is not UTF-8", "byte offset 300"]),
        (b"abc\0\1\2" * 100, ["given.txt looks binary", "byte offset 3"]),
        ("a\nb\n".encode("utf-16"), ["given.txt looks like UTF-16", "convert it to UTF-8"]),
    ],
    ids=["empty", "below a window", "validation below a window", "not UTF-8", "binary", "UTF-16"],
)
def test_a_text_that_cannot_be_trained_on(here, refused, data, parts):
    write(here / "given.txt", data)
    refused([*FIT, "--data.corpus=given.txt"], *parts)


def test_a_text_that_is_not_there(refused):
    refused([*FIT, "--data.corpus=nope.txt"], "--data.corpus=nope.txt is not found")


def test_a_folder_without_text(here, refused):
    write(here / "folder/picture.bin", b"\0\1")
    refused([*FIT, "--data.corpus=folder"], "folder has no text file in it")


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/slow":
            time.sleep(3)
        self.send_response(200 if self.path == "/text" else 404)
        self.end_headers()
        if self.path == "/text":
            self.wfile.write(b"to be or not to be\n" * 100)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch, tmp_path):
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GPT_LIGHTNING_TIMEOUT", "1")
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "path, parts",
    [
        ("/nope", ["could not download", "404", "--data.corpus=FILE"]),
        ("/slow", ["could not download", "no answer within 1 seconds"]),
        ("/text#sha256=" + 64 * "0", ["could not download", "SHA-256", "000000000000..."]),
        ("/text#sha256=12", ["64 hex digits"]),
    ],
    ids=["404", "timeout", "another checksum", "no checksum"],
)
def test_a_url_that_cannot_be_had(site, refused, path, parts):
    refused([*FIT, f"--data.corpus={site}{path}"], f"--data.corpus={site}{path}", *parts)


def test_tinyshakespeare_offline_says_which_file_to_put_where(tmp_path, refused, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, closed)
        monkeypatch.setenv(name.upper(), closed)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    refused(
        [*FIT, "--data.corpus=tinyshakespeare"],
        "could not download https://",
        f"put the file at {tmp_path / 'cache' / 'tinyshakespeare.txt'}",
    )


# --- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag, parts",
    [
        ("--data.block_size=0", ["must be at least 1"]),
        ("--data.block_size=-3", ["must be at least 1"]),
        ("--data.block_size=100000", ["too short", "smaller block_size"]),
        ("--data.batch_size=100000", ["more than the", "training windows", "smaller batch_size"]),
        ("--data.num_workers=-1", ["must be at least 0"]),
        ("--data.val_fraction=0", ["between 0 and 1"]),
        ("--data.val_fraction=1", ["between 0 and 1"]),
        ("--data.tokenizer=chars", ["expected 'char', 'byte'"]),
        ("--model.n_layer=four", ["expected int"]),
        ("--model.n_layer=-1", ["must be at least 0"]),
        ("--model.n_head=0", ["must be at least 1"]),
        ("--model.n_embd=15", ["not divisible by --model.n_head=2"]),
        ("--model.dropout=1.5", ["[0, 1)"]),
        ("--model.learning_rate=-1", ["must be 0 or more"]),
        ("--model.learning_rate=nan", ["expected float"]),
        ("--model.weight_decay=-1", ["must be 0 or more"]),
        ("--model.embedding_weight_decay=-1", ["must be 0 or more"]),
        ("--model.warmup_steps=-1", ["must be 0 or more"]),
        ("--model.min_lr=-1", ["must be 0 or more"]),
        ("--model.muon_learning_rate=-1", ["must be 0 or more"]),
        ("--model.optimizer=sgd", ["expected 'muon', 'adamw'"]),
        ("--model.schedule=step", ["expected 'linear', 'cosine'"]),
        ("--model.n_layer=0", ["must be at least 1"]),
        ("--model.n_embd=18", ["not divisible by twice --model.n_head=2"]),
        ("--model.residual=false", ["=False is a setting of --model.name=lecture"]),
        ("--model.lr_decay_steps=-1", ["must be 0 or more"]),
        ("--model.init_std=-1", ["must be 0 or more"]),
        ("--sample.top_k=0", ["must be at least 1"]),
        ("--model.name=gtp", ["expected 'gpt', 'lecture', 'bigram'"]),
        ("--checkpoint.every_n_train_steps=-1", ["must be 0 or more"]),
        ("--sample.every_n_steps=-1", ["must be 0 or more"]),
        ("--sample.max_new_tokens=0", ["must be at least 1"]),
        ("--seed_everything=-1", ["must be 0 or more"]),
        ("--seed_everything=foo", ["expected bool or int"]),
        ("--trainer.precision=foo", ["'bf16-mixed'"]),
        ("--trainer.accelerator=foo", ["invalid accelerator"]),
        ("--trainer.strategy=foo", ["invalid strategy"]),
        ("--trainer.devices=0", ["not a valid input"]),
        ("--trainer.devices=-3", ["should be an int > 0"]),
        ("--trainer.num_nodes=0", ["positive integer"]),
        ("--trainer.max_steps=0", ["must be above 0"]),
        ("--trainer.max_epochs=0", ["must be above 0"]),
        ("--trainer.strategy=ddp_spawn", ["use --trainer.strategy=ddp"]),
        ("--trainer.max_time=soon", ["DD:HH:MM:SS"]),
        ("--trainer.val_check_interval=0", ["must be above 0"]),
        ("--trainer.val_check_interval=0.5", ["should be an integer"]),
        ("--trainer.check_val_every_n_epoch=0", ["must be above 0"]),
        ("--trainer.log_every_n_steps=0", ["must be above 0"]),
        ("--trainer.accumulate_grad_batches=0", ["must be above 0"]),
        ("--trainer.limit_train_batches=0", ["must be above 0"]),
        ("--trainer.limit_val_batches=-1", ["[0.0, 1.0] or an int"]),
        ("--trainer.gradient_clip_val=-1", ["must not be negative"]),
        ("--trainer.gradient_clip_algorithm=foo", ["'value', 'norm'"]),
        ("--trainer.overfit_batches=7", ["--data.overfit_batches=7"]),
        ("--trainer.fast_dev_run=-1", [">= 0"]),
    ],
)
def test_a_value_that_cannot_be(refused, flag, parts):
    given, _, value = flag.partition("=")
    refused([*FIT, flag], given, value.capitalize() if value == "false" else value, *parts)


def test_a_model_that_muon_has_nothing_to_do_in(refused):
    refused([*FIT, "--model.name=bigram"], "--model.optimizer=muon", "use adamw")


def test_validating_within_an_epoch_that_is_shorter(refused):
    flags = ["--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=250"]
    refused([*FIT, *flags], "--trainer.val_check_interval=250 is more than the", "up to 1.0")


def test_a_text_with_characters_that_the_vocabulary_lacks(refused):
    parts = ["text.txt: the character 'T' (U+0054", "position 0", "vocabulary of 3", "unknown=drop"]
    refused([*FIT, "--data.vocabulary=abc"], *parts)


def test_a_sample_prompt_with_an_unknown_character(refused):
    refused([*FIT, "--sample.prompt=é"], "--sample.prompt: the character 'é' (U+00E9")


def test_a_sample_temperature_below_0(refused):
    refused([*FIT, "--sample.temperature=-1"], "--sample.temperature=-1.0 must be 0 or more")


@pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU"
)
@pytest.mark.parametrize(
    "argv, flag",
    [
        ([*FIT, "--trainer.accelerator=gpu"], "--trainer.accelerator=gpu"),
        ([*FIT, "--trainer.accelerator=cuda"], "--trainer.accelerator=cuda"),
        (["generate", "--device=cuda"], "--device=cuda"),
    ],
)
def test_a_gpu_where_there_is_none(refused, argv, flag):
    refused(argv, flag)


@pytest.mark.parametrize(
    "given, meant",
    [
        ("--data.blok_size=4", "--data.block_size"),
        ("--trainer.max_step=4", "--trainer.max_steps"),  # no abbreviations
        ("--model.n_layr=4", "--model.n_layer"),
        ("--modle.n_layer=4", "--model.n_layer"),
        ("--ckpt=last", "--ckpt_path"),
    ],
)
def test_the_flag_nearest_to_an_unknown_one(refused, given, meant):
    name = given.partition("=")[0]
    refused([*FIT, given], f"{name} is no flag; did you mean {meant}?")


@pytest.mark.parametrize("given, meant", [("fitt", "fit"), ("generat", "generate")])
def test_the_command_nearest_to_an_unknown_one(refused, given, meant):
    refused([given], f"'{given}' is no command; did you mean {meant}?", "validate, test, predict")


def test_a_command_that_resembles_none(refused):
    refused(["xyz"], "'xyz' is no command (there are: fit, validate,")


def test_a_stray_word(refused):
    refused([*FIT, "extra"], "extra")
    refused(["generate", "extra"], "extra")


# --- configuration files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, parts",
    [
        ("trainer:\n  max_step: 3\n", ["trainer.max_step is no setting", "trainer.max_steps?"]),
        ("model:\n  n_layr: 3\n", ["model.n_layr is no setting", "did you mean model.n_layer?"]),
        ("data:\n  blok_size: 8\n", ["data.blok_size is no setting", "data.block_size?"]),
        ("trainer:\n  max_steps: 3\n bad: [1\n", ["line 3"]),
        ("trainer:\n\tmax_steps: 3\n", ["line 2"]),
        ("model:\n  bias: [4]\n", ["--model.bias", "expected bool"]),
        ("- 1\n- 2\n", ["no mapping of settings"]),
        ("", ["no mapping of settings"]),
        (b"model:\n  name: \xff\n", ["utf-8", "position 15"]),
    ],
    ids=["trainer key", "model key", "data key", "YAML", "tab", "type", "list", "empty", "latin-1"],
)
def test_a_bad_configuration_file_is_named(here, refused, text, parts):
    write(here / "mine.yaml", text)
    refused([*FIT, "--config", "mine.yaml"], "--config=mine.yaml: ", *parts)


def test_a_section_that_is_no_mapping(here, refused):
    write(here / "mine.yaml", "trainer: 3\n")
    refused([*FIT, "--config=mine.yaml"], "--config", "trainer: 3")


@pytest.mark.parametrize("name", ["nope.yaml", "lightning_logs"])
def test_a_configuration_file_that_is_none(refused, name):
    refused([*FIT, f"--config={name}"], "--config", name)


# --- checkpoints ----------------------------------------------------------------------------------


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def torn(path, raw):
    path.write_bytes(raw[: len(raw) // 2])


def flipped(path, raw):
    weight = torch.load(LAST, weights_only=True)["state_dict"]["net.lm_head.weight"]
    data = weight.numpy().tobytes()
    changed = bytearray(raw)
    changed[raw.index(data) + len(data) // 2] ^= 0x10
    path.write_bytes(changed)


def zeroed(path, raw):  # what some file systems make of a file after a power cut
    path.write_bytes(bytes(len(raw)))


def empty(path, raw):
    path.write_bytes(b"")


def a_text(path, raw):
    path.write_text("To be, or not to be\n" * 20)


def foreign(path, raw):
    torch.save({"epoch": 1, "state_dict": {"weight": torch.zeros(2)}}, path)


def foreign_tensor(path, raw):
    torch.save(torch.zeros(2), path)


def later(path, raw):
    checkpoint = read_checkpoint(LAST)
    checkpoint[KEY]["format"] = 99
    torch.save(checkpoint, path)


@READERS
@pytest.mark.parametrize(
    "spoil, part",
    [
        (torn, "cannot be read: torn"),
        (flipped, "cannot be read: torn"),
        (zeroed, "cannot be read: torn"),
        (empty, "cannot be read: torn"),
        (a_text, "no checkpoint at all"),
        (foreign, "not written by gpt_lightning"),
        (foreign_tensor, "not written by gpt_lightning"),
        (later, "has format 99, this version reads 1"),
    ],
)
def test_a_file_that_is_no_checkpoint(here, refused, command, spoil, part):
    spoil(here / "bad.ckpt", (here / LAST).read_bytes())
    refused([*command, "--ckpt_path=bad.ckpt"], "--ckpt_path=bad.ckpt", part)


def test_a_checkpoint_of_a_model_with_other_weights_is_refused(here, refused):
    saved = torch.load(here / LAST, weights_only=True)
    saved["state_dict"]["net.blocks.0.attn.more"] = torch.zeros(2)
    torch.save(saved, here / "other.ckpt")
    for command in (RESUME, VALIDATE):
        said = ("--ckpt_path=other.ckpt", "use the gpt_lightning", "net.blocks.0.attn.more")
        refused([*command, "--ckpt_path=other.ckpt"], *said)


@READERS
def test_a_checkpoint_never_runs_code(here, refused, command, tmp_path):
    canary = tmp_path / "canary"
    torch.save({KEY: {"format": 1}, "state_dict": Evil(canary)}, here / "zip.ckpt")
    write(here / "pickle.ckpt", pickle.dumps(Evil(canary)))
    torch.save(Evil(canary), here / "old.ckpt", _use_new_zipfile_serialization=False)
    refused([*command, "--ckpt_path=zip.ckpt"], "--ckpt_path=zip.ckpt", "nothing in it was run")
    for name in ("pickle.ckpt", "old.ckpt"):
        refused([*command, f"--ckpt_path={name}"], f"--ckpt_path={name} cannot be read")
    assert not canary.exists()
    pickle.loads((here / "pickle.ckpt").read_bytes()).close()
    assert canary.exists()  # it would have


def test_no_flipped_bit_changes_what_is_read(here):
    raw, whole = (here / LAST).read_bytes(), read_checkpoint(LAST)
    unread = 0
    for at in range(0, len(raw), len(raw) // 200):
        changed = bytearray(raw)
        changed[at] ^= 0x10
        path = write(here / "changed.ckpt", bytes(changed))
        try:
            assert same(read_checkpoint(path), whole)  # between the entries of the archive
        except ValueError:
            unread += 1
    assert unread > 100


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@READERS
@pytest.mark.parametrize("name", ["nope.ckpt", "folder"])
def test_a_checkpoint_that_is_not_there(here, refused, command, name):
    (here / "folder").mkdir()
    refused([*command, f"--ckpt_path={name}"], f"--ckpt_path={name}: ")


@READERS
def test_an_empty_checkpoint_path(refused, command):
    refused([*command, "--ckpt_path="], "--ckpt_path is empty")


@pytest.fixture
def elsewhere(here, tmp_path, monkeypatch):
    """A working folder without a run."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@READERS
def test_the_last_run_where_there_is_none(elsewhere, refused, command):
    parts = ["--ckpt_path=last: no run", "lightning_logs", "python -m gpt_lightning fit"]
    refused([*command, "--ckpt_path=last"], *parts)
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("command", ["validate", "test", "predict", "generate"])
def test_no_run_yet(elsewhere, refused, command):
    refused([command], "no run with a checkpoint in lightning_logs", "gpt_lightning fit")
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("command", [RESUME, VALIDATE], ids=lambda c: c[0])
@pytest.mark.parametrize(
    "flag, part",
    [
        ("--model.n_embd=32", "n_embd=16"),
        ("--model.n_layer=2", "n_layer=1"),
        ("--model.name=lecture", "name=gpt"),
        ("--data.block_size=16", "block_size=8"),
    ],
)
def test_a_checkpoint_of_another_architecture(refused, command, flag, part):
    parts = [f"{flag} does not fit --ckpt_path=", "last.ckpt", part, "without --ckpt_path"]
    refused([*command, "--ckpt_path=last", flag], *parts)


def test_going_on_with_another_optimizer(refused):
    parts = ["--model.optimizer=adamw", "last.ckpt", "muon"]
    refused([*RESUME, "--ckpt_path=last", "--model.optimizer=adamw"], *parts)


def test_weights_that_are_not_of_the_checkpoints_own_model(here, refused):
    checkpoint = read_checkpoint(LAST)
    checkpoint[KEY]["model"]["n_embd"] = 32
    torch.save(checkpoint, here / "mixed.ckpt")
    refused(["generate", "--ckpt_path=mixed.ckpt"], "--ckpt_path=mixed.ckpt", "its weights")
    refused([*VALIDATE, "--ckpt_path=mixed.ckpt"], "--ckpt_path=mixed.ckpt", "n_embd=32")


def test_going_on_with_another_text(here, refused):
    write(here / "other.txt", "To be or not to be\n" * 100)
    flags = ["--ckpt_path=last", "--data.corpus=other.txt"]
    parts = ["other.txt is not the text", "last.ckpt was trained on", "text.txt"]
    refused([*RESUME, *flags], *parts)


@pytest.mark.parametrize("flag", ["--data.split=blocks", "--data.val_fraction=0.2"])
def test_going_on_with_another_split_would_train_on_held_out_text(refused, flag):
    refused([*RESUME, "--ckpt_path=last", flag], flag, "held out with", "without --ckpt_path")


def test_going_on_with_a_text_that_has_changed(here, refused):
    with (here / "text.txt").open("a") as file:
        file.write("more\n")
    refused([*RESUME, "--ckpt_path=last"], "text.txt is not the text", "has changed since")


@pytest.mark.parametrize("command", [RESUME, VALIDATE], ids=lambda c: c[0])
def test_going_on_with_a_text_that_is_gone(here, refused, command):
    (here / "text.txt").unlink()
    refused([*command, "--ckpt_path=last"], "--data.corpus=text.txt is not found")


def test_another_vocabulary(here, refused):
    flags = ["--ckpt_path=last", "--data.tokenizer=byte"]
    refused([*RESUME, *flags], "vocabulary", "byte, 256 tokens", "last.ckpt (char, 24 tokens)")
    write(here / "other.txt", "To be, zzz\n" * 100)
    parts = ["other.txt: the character 'z'", "position 7", "vocabulary of 24"]
    refused([*VALIDATE, "--ckpt_path=last", "--data.corpus=other.txt"], *parts)


def test_a_finished_run_says_how_to_go_further(refused):
    refused(["fit", "--ckpt_path=last"], "has done its 4 steps", "--trainer.max_steps=8")
    refused([*FIT, "--ckpt_path=last", "--trainer.max_steps=3"], "has done its 4 steps")
    flags = ["--trainer.max_steps=-1", "--trainer.max_epochs=1"]
    refused(["fit", "--ckpt_path=last", *flags], "its 1 epochs", "--trainer.max_epochs=2")


def test_a_time_that_is_used_up(here, capsys):
    before = contents(here)
    with pytest.raises(SystemExit) as end:
        main([*FIT, "--trainer.max_time=00:00:00:00"])
    assert end.value.code == 2
    assert "no step was taken: the time of --trainer.max_time" in capsys.readouterr().err
    assert contents(here).items() >= before.items()


# --- where runs are written -----------------------------------------------------------------------


@pytest.mark.parametrize("root", ["text.txt/sub", "/proc/nope"])
@pytest.mark.parametrize("more", [[], ["--trainer.logger=false"]], ids=["logger", "no logger"])
def test_a_folder_that_cannot_be_written(refused, root, more):
    flag = f"--trainer.default_root_dir={root}"
    refused([*FIT, flag, *more], flag, "cannot be made")


def test_predictions_that_cannot_be_written(refused):
    flags = [f"--ckpt_path={LAST}", "--trainer.default_root_dir=text.txt/sub"]
    refused(["predict", *flags], flags[1], "cannot be made")


def test_nothing_to_predict(refused):
    flag = "--trainer.limit_predict_batches=0"
    refused(["predict", flag], flag)


# --- generate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag, parts",
    [
        ("--prompt=é", ["--prompt: the character 'é' (U+00E9", "position 0"]),
        ("--stop=é", ["--stop: the character 'é'"]),
        ("--stop=", ["--stop=''"]),
        ("--temperature=-1", ["must be 0 or more"]),
        ("--temperature=nan", ["must be 0 or more"]),
        ("--temperature=inf", ["must be 0 or more"]),
        ("--top_k=0", ["must be at least 1"]),
        ("--top_k=four", ["invalid int value: 'four'"]),
        ("--top_p=0", ["above 0 and at most 1"]),
        ("--top_p=1.1", ["above 0 and at most 1"]),
        ("--min_p=2", ["above 0 and at most 1"]),
        ("--max_new_tokens=0", ["must be at least 1"]),
        ("--num_samples=0", ["must be at least 1"]),
        ("--seed=99999999999999999999", ["64 bits"]),
        ("--unknown=foo", ["'error', 'drop', 'replace'"]),
        ("--device=foo", ["--device=cpu"]),
        ("--precision=fp8", ["choose one of auto, fp32, bf16, int8"]),
        ("--device=meta", ["--device=cpu"]),
        ("--prompt_file=nope.txt", ["nope.txt: No such file"]),
        ("--prompt_file=lightning_logs", ["lightning_logs: Is a directory"]),
        ("--temprature=1", ["did you mean --temperature?"]),
        ("--max_tokens=3", ["did you mean --max_new_tokens?"]),
        ("--temp=1", ["--temp=1"]),  # no abbreviations
    ],
)
@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_generate_refuses(refused, flag, parts, stream):
    refused(["generate", flag, stream], flag.partition("=")[0], *parts)


def test_a_prompt_given_twice(here, refused):
    flags = ["--prompt=To", "--prompt_file=text.txt"]
    refused(["generate", *flags], "--prompt and --prompt_file", "choose one")


def test_a_prompt_file_that_is_not_utf8(here, refused):
    write(here / "bad.txt", b"To be\xff")
    refused(["generate", "--prompt_file=bad.txt"], "--prompt_file=bad.txt", "byte 5")


# --- the command itself ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["fitt"], ["did you mean fit?"]),
        ([*FIT, "--trainer.max_step=4"], ["did you mean --trainer.max_steps?"]),
        ([*FIT, "--trainer.default_root_dir=text.txt/sub"], ["--trainer.default_root_dir"]),
        ([*RESUME, "--ckpt_path=last", "--model.n_embd=32"], ["--model.n_embd=32 does not fit"]),
        (["generate", "--ckpt_path=text.txt"], ["--ckpt_path=text.txt"]),
        (["generate", "--prompt=é"], ["the character 'é'"]),
    ],
    ids=lambda value: value[-1],
)
def test_the_command_ends_in_one_line(cli, trained, argv, parts):
    before = contents(trained)
    ended = cli(*argv, cwd=trained)
    check(ended.returncode, ended.stdout, ended.stderr, parts)
    assert contents(trained) == before


def test_the_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("GPT_LIGHTNING_DEBUG", "1")
    with pytest.raises(ValueError, match="is no command"):
        main(["fitt"])
