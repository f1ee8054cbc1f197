"""Checkpoints: found and read; damaged and hostile files."""

import copy
import io
import os
import pickle
import random
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import description
from kills import differences

from gpt_lightning.checkpoint import (
    KEY,
    DamagedCheckpoint,
    find_checkpoint,
    load_model,
    model_and_tokenizer,
    read_checkpoint,
    read_newest_intact,
    shell_command,
)
from gpt_lightning.errors import UserError
from gpt_lightning.model import build_model, config_from_dict


def small() -> dict:
    """A checkpoint of a few kilobytes, with what a Trainer adds."""
    torch.manual_seed(1)
    entry = description()
    weights = build_model(config_from_dict(entry["model"])).state_dict()
    state = {0: {"step": torch.tensor(4.0), "momentum": torch.ones(3, 2).T}}
    groups = [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}]
    return {
        "global_step": 4,
        "state_dict": OrderedDict((f"net.{key}", value) for key, value in weights.items()),
        "callbacks": {"BestAndLast": {"best_val_loss": 1.5, "best_step": 4}},
        "optimizer_states": [{"state": state, "param_groups": groups}],
        KEY: entry,
    }


SMALL = small()


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def changed(*keys, value) -> bytes:
    """The small checkpoint with another value at one place."""
    place = checkpoint = copy.deepcopy(SMALL)
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return saved(checkpoint)


def repacked(compression=zipfile.ZIP_STORED, **replaced: bytes) -> bytes:
    """The small checkpoint's archive with other bytes for some entries, and valid checksums."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(SMALL))) as archive,
        zipfile.ZipFile(file, "w", compression) as new,
    ):
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a duplicate name
            for name, data in [*entries.items(), *replaced.items()]:
                if name != "data.pkl" or "pickled" not in replaced:
                    new.writestr("archive/" + name.replace("pickled", "data.pkl"), data)
    return file.getvalue()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.ckpt"


def refused(path, raw: bytes, kind=UserError, read=read_checkpoint) -> str:
    path.write_bytes(raw)
    with pytest.raises(kind) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"ckpt_path={path}: ") and message.isprintable()
    return message


# reading


def test_a_checkpoint_is_read_as_it_was_written(path):
    checkpoint = copy.deepcopy(SMALL)
    checkpoint["optimizer_states"][0]["state"][1] = {
        "transposed": torch.ones(3, 2, dtype=torch.bfloat16).T,
        "scalar": torch.zeros((), dtype=torch.int64),
        "empty": torch.zeros(0, 3, dtype=torch.bool),
    }
    path.write_bytes(saved(checkpoint))
    assert differences(read_checkpoint(path), checkpoint) == []


def test_a_loaded_model_computes_what_the_saved_one_did(path):
    torch.manual_seed(1)
    model = build_model(config_from_dict(SMALL[KEY]["model"])).eval()
    path.write_bytes(saved(SMALL))
    loaded = load_model(path)
    ids = torch.tensor([[0, 2, 1]])
    assert not loaded.training and torch.equal(loaded(ids), model(ids))
    assert model_and_tokenizer(read_checkpoint(path), path)[1].vocabulary == "\nab"


@pytest.mark.parametrize(
    "keys, value",
    [
        ((KEY,), None),
        ((KEY, "format"), 2),
        ((KEY, "model"), [1]),
        ((KEY, "corpus", "sha256"), 1),
        ((KEY, "settings"), "model: 1"),
        (("state_dict",), [1]),
        (("state_dict", "net.more"), 1.5),
        (("global_step",), "4"),
    ],
)
def test_an_entry_of_another_program_or_version_or_type_is_refused(path, keys, value):
    message = refused(path, changed(*keys, value=value))
    assert "not a checkpoint of this version of gpt_lightning" in message


@pytest.mark.parametrize(
    "key, value",
    [("n_layer", 0), ("n_embd", 2**62), ("block_size", "4"), ("name", "lecture")],
)
def test_model_settings_that_do_not_fit_the_weights_are_refused(path, key, value):
    raw = changed(KEY, "model", key, value=value)
    assert "do not fit its weights" in refused(path, raw, read=load_model)


# hostile files


class Call:
    """Pickled, this is the result of a call."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


class Rebuilt:
    """Runs code when it is rebuilt: its state is the path of a file to create."""

    def __init__(self, canary):
        self.canary = canary

    def __setstate__(self, state):
        open(state["canary"], "w").close()


PAYLOADS = {
    "REDUCE": lambda canary: Call(open, canary, "w"),
    "BUILD": lambda canary: Rebuilt(canary),
    "a key": lambda canary: {Call(open, canary, "w"): 1},
    "an argument": lambda canary: Call(OrderedDict, [("x", Call(open, canary, "w"))]),
}
PLACES = [("state_dict",), ("optimizer_states", 0, "state", 0, "step"), (KEY, "settings")]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_code_in_a_checkpoint_is_run(tmp_path, path, payload, place):
    canary = tmp_path / "canary"
    raw = changed(*place, value=PAYLOADS[payload](str(canary)))
    assert "no code in it was run" in refused(path, raw, DamagedCheckpoint)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()  # without protection it does run


def test_the_description_holds_plain_types_only(path):
    refused(path, changed(KEY, "settings", "trainer", "callbacks", value=b"os.abort"))


def test_attributes_of_a_dict_are_dropped(path):
    """An OrderedDict's attributes could hide settings from a check."""
    hidden = Call(OrderedDict, [("callbacks", "os.abort")], state={"hidden": 5})
    path.write_bytes(changed(KEY, "settings", "trainer", value=hidden))
    trainer = read_checkpoint(path)[KEY]["settings"]["trainer"]
    assert type(trainer) is dict and trainer == {"callbacks": "os.abort"}


OTHER_FILES = {
    "nothing": b"",
    "text": b"To be, or not to be\n" * 100,
    "a pickle alone": pickle.dumps(Call(print)),
    "a pickle cut short": repacked(pickled=b"\x80\x02}"),
    "code by INST": repacked(pickled=b"\x80\x02(ios\nabort\n."),
    "code by STACK_GLOBAL": repacked(pickled=b"\x80\x04\x8c\x02os\x8c\x05abort\x93)R."),
    "a compressed bomb": repacked(zipfile.ZIP_DEFLATED, bomb=bytes(10 << 20)),
    "two entries of one name": repacked(**{"data.pkl": pickle.dumps({})}),
    "two names that differ in case": repacked(**{"DATA.pkl": pickle.dumps({})}),
    "another archive behind it": saved(SMALL) + saved({"a": 1}),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_refused(path, name):
    refused(path, OTHER_FILES[name])


# damage


def is_damaged(path, raw: bytes) -> bool:
    """Whether the file is recognized as damaged; if not, its content must be the right one."""
    path.write_bytes(raw)
    try:
        assert differences(read_checkpoint(path), SMALL) == []
        return False
    except DamagedCheckpoint:
        return True


def test_a_changed_byte_is_detected_or_changes_nothing(path):
    raw, draw = saved(SMALL), random.Random(1)
    damaged = 0
    for at in draw.sample(range(len(raw)), 200):
        mask = draw.choice([0xFF, 1 << draw.randrange(8)])
        damaged += is_damaged(path, raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :])
    assert damaged > 100  # the others are padding, dates and the like


def test_a_weight_marked_as_a_folder_is_read_correctly(path):
    """This bit is outside all checksums; torch alone takes uninitialized memory for the weight."""
    raw = bytearray(saved(SMALL))
    raw[raw.rindex(b"archive/data/3") - 8] ^= 0x10
    assert not is_damaged(path, bytes(raw))


def test_a_file_cut_anywhere_is_detected(path):
    raw = saved(SMALL)
    for size in [*range(0, len(raw), 300), *range(len(raw) - 30, len(raw))]:
        assert is_damaged(path, raw[:size])


# finding


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The working folder, with three runs, of which version_1 was written last."""
    monkeypatch.chdir(tmp_path)
    times = {"version_0/best": 100, "version_0/last": 200, "version_1/best": 150,
             "version_1/last": 300, "version_2/best": 250}  # fmt: skip
    for name, seconds in times.items():
        run, _, stem = name.partition("/")
        path = Path("lightning_logs", run, "checkpoints", f"{stem}.ckpt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        os.utime(path, (seconds, seconds))
    Path("lightning_logs/version_3").mkdir()
    return Path("lightning_logs")


def test_last_and_best_are_those_of_the_run_written_last(runs, tmp_path):
    newest = runs / "version_1/checkpoints"
    assert find_checkpoint("last") == newest / "last.ckpt"
    assert find_checkpoint("best", tmp_path) == tmp_path / newest / "best.ckpt"
    (newest / "best.ckpt").unlink()
    assert find_checkpoint("best") == newest / "last.ckpt"
    os.utime(runs / "version_0/checkpoints/best.ckpt", (400, 400))
    assert find_checkpoint("last") == runs / "version_0/checkpoints/last.ckpt"
    only_best = runs / "version_2/checkpoints/best.ckpt"
    os.utime(only_best, (500, 500))
    assert find_checkpoint("last") == only_best


def test_files_and_runs_folders_are_found(runs, tmp_path, monkeypatch):
    folder = runs / "version_0"
    best, last = folder / "checkpoints/best.ckpt", folder / "checkpoints/last.ckpt"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for which in (best, str(best), folder, folder / "checkpoints"):
        assert find_checkpoint(which) == best
    assert find_checkpoint(folder, of_folder="last") == last
    assert find_checkpoint(f"~/{best.as_posix()}") == tmp_path / best
    best.unlink()
    assert find_checkpoint(folder) == last


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("nothing.ckpt", "no such file or folder"),
        ("lightning_logs/version_3", "no checkpoint in "),
        ("", "no checkpoint in "),
    ],
)
def test_a_checkpoint_that_is_not_there_is_refused(runs, which, reason):
    with pytest.raises(UserError, match=f"^ckpt_path={which}: {reason}"):
        find_checkpoint(which)


def test_without_a_run_the_message_names_the_command_that_trains_one(tmp_path):
    with pytest.raises(UserError, match="python -m gpt_lightning fit"):
        find_checkpoint("best", tmp_path)


def test_the_newest_intact_checkpoint_replaces_a_damaged_one(runs, capsys):
    folder = runs / "version_1/checkpoints"
    last, older, oldest = (folder / f"{name}.ckpt" for name in ("last", "best", "mine"))
    for path, seconds in ((oldest, 100), (older, 200), (last, 300)):
        path.write_bytes(saved(SMALL)[: -1 if path == last else None])
        os.utime(path, (seconds, seconds))
    path, checkpoint = read_newest_intact("last")
    assert path == older and differences(checkpoint, SMALL) == []
    said = capsys.readouterr().err
    assert f"{last}: damaged" in said and f"using {older} (step 4)" in said
    with pytest.raises(DamagedCheckpoint):
        read_newest_intact(last)  # asked for by its path


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of Unix")
def test_a_printed_command_survives_the_shell():
    path = "my runs/it's $HOME/last.ckpt"
    command = shell_command("fit", Path(path), "--trainer.max_time=null")
    words = subprocess.check_output(["sh", "-c", f"printf '%s\\n' {command}"], text=True)
    flags = [f"--ckpt_path={path}", "--trainer.max_time=null"]
    assert words.splitlines() == ["python", "-m", "gpt_lightning", "fit", *flags]


def test_a_checkpoint_that_was_trained_without_our_data_says_so(tmp_path):
    path = tmp_path / "own.ckpt"
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": {}, "global_step": 1}, path)
    with pytest.raises(UserError, match="not trained with TextDataModule"):
        read_checkpoint(path)
