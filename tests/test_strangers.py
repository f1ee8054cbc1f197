"""Files from strangers: refused in one line, within bounded memory, and nothing in them is run."""

import builtins
import contextlib
import copy
import copyreg
import itertools
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import OrderedDict

import crafted
import pytest
import torch
from crafted import Calls, changed, good, saved

from gpt_lightning import cli
from gpt_lightning.checkpoint import KEY, Damaged, read_checkpoint
from gpt_lightning.cli import main
from gpt_lightning.config_files import TooMuch, load_yaml, stored_settings
from gpt_lightning.data.corpora import find_corpus
from gpt_lightning.data.downloads import download
from gpt_lightning.generation.writer import Writer
from gpt_lightning.model import build_model
from gpt_lightning.model.size import numbers, table_numbers
from gpt_lightning.untrusted import misfit

CHECKPOINT = good()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.ckpt"


def refused(read, path, raw: bytes) -> str:
    path.write_bytes(raw)
    with pytest.raises(ValueError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"--ckpt_path={path}")
    assert message.isprintable() and len(message) < 400 + len(str(path))
    return message


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


# --- crafted files --------------------------------------------------------------------------------


def test_a_good_checkpoint_is_read_as_it_was_written(path):
    path.write_bytes(saved(CHECKPOINT))
    assert same(read_checkpoint(path), CHECKPOINT)
    assert Writer.load(path).write("a", max_new_tokens=9, seed=1)[0]


@pytest.mark.parametrize("name", crafted.FILES)
def test_a_crafted_file_is_refused(path, name):
    refused(read_checkpoint, path, crafted.FILES[name](CHECKPOINT))


def test_no_crafted_file_takes_memory(tmp_path):
    """All of them, in a process that may take 256 MB more than it has after its imports."""
    for i, make in enumerate(crafted.FILES.values()):
        (tmp_path / f"{i}.ckpt").write_bytes(make(CHECKPOINT))
    code = """
import resource, sys, torch
from pathlib import Path
from gpt_lightning.checkpoint import read_checkpoint
pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + (256 << 20),) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in Path(sys.argv[1]).iterdir():
    try:
        read_checkpoint(path)
        print("read", path)
    except ValueError as error:
        assert "MemoryError" not in str(error) and "memory" not in str(error), error
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("memory is bounded and measured on Linux")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path], env=env, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr[-500:]
    assert int(ended.stdout) < 200  # MB


def test_torch_alone_would_have_taken_the_memory(path):
    """The bound above is ours, not one that would hold anyway."""
    raw = changed(CHECKPOINT, "state_dict", "net.more", value=Calls(bytearray, 100 << 20))
    path.write_bytes(raw)
    tracemalloc.start()
    torch.load(path, weights_only=True)
    torch_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    refused(read_checkpoint, path, raw)
    our_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch_peak > 100 << 20 > 10 * our_peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64,
                                   torch.int32, torch.uint8, torch.bool])  # fmt: skip
def test_tensors_of_every_common_type_are_read(path, dtype):
    checkpoint = copy.deepcopy(CHECKPOINT)
    parts = {"a": torch.ones(3, 2, dtype=dtype).T, "b": torch.zeros((), dtype=dtype)}
    checkpoint["optimizer_states"][0]["state"][0] |= {**parts, "c": torch.zeros(0, 3, dtype=dtype)}
    path.write_bytes(saved(checkpoint))
    assert same(read_checkpoint(path), checkpoint)


def test_what_fits_a_pattern():
    pattern = {"a": int, "b?": {str: [(str, float)]}}
    for value in ({"a": 1}, {"a": 1, "b": {}}, OrderedDict(a=1, b={"x": [1.5, "y"]}, c=None)):
        assert misfit(value, pattern) is None
    for value, where in (
        ({}, ""),
        ([], ""),
        ({"a": True}, ".a"),
        ({"a": 1, "b": {"x": [1]}}, ".b.x"),
        ({"a": 1, "b": {1: []}}, ".b"),
    ):
        assert misfit(value, pattern) == where


# --- code -----------------------------------------------------------------------------------------


class Built:
    """Runs where it is rebuilt: by BUILD, which hands __setstate__ the path of a file to make."""

    def __init__(self, canary):
        self.canary = canary

    def __getstate__(self):
        return self.canary

    def __setstate__(self, canary):
        builtins.open(canary, "w").close()


class New(str):
    """Runs where it is made: by NEWOBJ."""

    def __new__(cls, canary):
        builtins.open(canary, "w").close()
        return super().__new__(cls, canary)

    def __reduce_ex__(self, protocol):
        return copyreg.__newobj__, (New, str(self))


class AsKey(Calls):
    """Something that runs, in a place where it is hashed."""


PAYLOADS = {
    "REDUCE": lambda canary: Calls(open, canary, "w"),
    "REDUCE of eval": lambda canary: Calls(eval, f"open({canary!r}, 'w').close()"),
    "NEWOBJ": lambda canary: New(canary),
    "BUILD": lambda canary: Built(canary),
    "a call as a key": lambda canary: {AsKey(open, canary, "w"): 1},
    "a call's state": lambda canary: Calls(OrderedDict, state={"x": Calls(open, canary, "w")}),
}
PLACES = [
    ("state_dict",),
    ("state_dict", "net.lm_head.weight"),
    ("hyper_parameters",),
    ("loops", "fit_loop"),
    ("optimizer_states", 0, "state", 0, "step"),
    (KEY, "model"),
    (KEY, "config"),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
@pytest.mark.parametrize("payload", PAYLOADS)
def test_code_is_not_run_wherever_it_stands(tmp_path, path, payload, place):
    canary = tmp_path / "canary"
    raw = changed(CHECKPOINT, *place, value=PAYLOADS[payload](str(canary)))
    canary.unlink(missing_ok=True)  # New runs as it is made
    assert "nothing in it was run" in refused(read_checkpoint, path, raw)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()  # it would have been run


# --- damage ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good file and what is in it."""
    path = tmp_path_factory.mktemp("whole") / "a.ckpt"
    path.write_bytes(saved(CHECKPOINT))
    return path.read_bytes(), read_checkpoint(path)


def test_a_changed_byte_is_refused_or_changes_nothing(path, whole):
    """A sample: `python tests/fuzz.py bytes` goes through all of them."""
    raw, content = whole
    draw = random.Random(1)
    unread = 0
    for at in draw.sample(range(len(raw)), 300):
        for mask in (0xFF, 1 << draw.randrange(8)):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :])
            try:
                assert same(read_checkpoint(path), content)
            except Damaged as error:
                assert str(error).isprintable()
                unread += 1
    assert unread > 300  # the rest are between the entries


def test_a_file_cut_anywhere_is_refused(path, whole):
    raw, _ = whole
    for size in itertools.chain(range(0, len(raw), 1024), range(1, 99), [-1, -2, -22, -98, -99]):
        assert "torn" in refused(read_checkpoint, path, raw[:size])


# --- models that do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt", "lecture", "bigram"])
@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd", "block_size", "vocab_size"])
@pytest.mark.parametrize("value", [-1, 0, 10**9, 2**62, "4", True, 1.5, None])
def test_settings_that_no_weights_have_are_refused_before_memory_is_taken(path, model, name, value):
    raw = changed(good(model), KEY, "model", name, value=value)
    path.write_bytes(raw)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge, unused = value in (10**9, 2**62), ("n_head", "n_embd")
    if model != "bigram" or not (huge and name in unused or (name, value) == ("n_layer", 0)):
        assert "does not fit its weights" in refused(Writer.load, path, raw)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


@pytest.mark.parametrize("settings", [{}, {"name": 5}, {"name": "gpt", "more": 1}, {"": 1}])
def test_settings_that_are_none_are_refused(path, settings):
    raw = changed(CHECKPOINT, KEY, "model", value=settings)
    assert "does not fit its weights" in refused(Writer.load, path, raw)


def test_a_vocabulary_of_another_size_is_refused(path):
    raw = changed(CHECKPOINT, KEY, "tokenizer", "vocabulary", value="\nabc")
    assert "another vocabulary" in refused(Writer.load, path, raw)


def test_weights_that_are_no_numbers_end_in_one_line(path):
    nan = torch.full((3, 4), float("nan"))
    path.write_bytes(changed(CHECKPOINT, "state_dict", "net.lm_head.weight", value=nan))
    with pytest.raises(ValueError, match="no finite numbers"):
        Writer.load(path).write("a", max_new_tokens=3)


def test_the_numbers_of_a_model_are_counted_as_it_is_built():
    draw = random.Random(1)
    for _ in range(60):
        name = draw.choice(["gpt", "lecture", "bigram"])
        settings = dict(vocab_size=draw.choice([3, 300]), block_size=draw.choice([1, 5]), n_head=2)
        settings |= dict(n_layer=draw.choice([1, 3]), n_embd=draw.choice([4, 12]))
        if name != "gpt":
            settings |= {k: draw.random() < 0.5 for k in ("bias", "norm", "proj")}
            settings["ffwd"] = draw.choice([0, 1, 4] if settings["proj"] else [0, 1])
        model = build_model(name, **settings)
        assert sum(p.numel() for p in model.parameters()) == numbers(name, model.config)
        assert sum(b.numel() for b in model.buffers()) == table_numbers(name, model.config)


@pytest.mark.parametrize("name", ["gpt", "lecture"])
@pytest.mark.parametrize("setting", ["n_layer", "n_embd", "block_size", "vocab_size"])
@pytest.mark.parametrize("value", [10**10, 10**30])
def test_a_model_without_room_in_memory_is_refused(name, setting, value):
    settings = dict(vocab_size=57, block_size=128) | {setting: value}
    with pytest.raises(ValueError, match="[0-9.e+]+ GB, where this machine has") as error:
        build_model(name, **settings)
    assert str(value) in str(error.value).replace(",", "")


# --- configurations -------------------------------------------------------------------------------

LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join(9 * ['*' + old])}]\n"
    for old, new in itertools.pairwise("abcdefghi")
)
BOMBS = {
    "a billion laughs": LAUGHS,
    "a billion laughs in merged mappings": LAUGHS.replace("[", "{<<: [").replace("]", "]}"),
    "lists in lists": "a: " + "[" * 5000,
    "mappings in mappings": "{a: " * 5000,
    "mappings by indentation": "\n".join(" " * n + "a:" for n in range(500)),
    "an alias of its own": "a: &a [*a]",
    "many values": "a: [" + "1, " * 50_000 + "]",
    "a long text": "a: " + "b" * (5 << 20),
    "a number on sixty": "a: " + "1:" * 100_000 + "1",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_configuration_that_would_take_too_much_is_refused(tmp_path, capsys, name):
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text(BOMBS[name])
    start = time.process_time()
    with pytest.raises(TooMuch) as error:
        load_yaml(BOMBS[name])
    assert str(error.value).isprintable()
    with pytest.raises(SystemExit):
        cli.main(["fit", f"--config={bomb}"])
    said = capsys.readouterr().err
    assert said.startswith(f"error: --config={bomb}") and said.count("\n") == 1
    assert time.process_time() - start < 20


def test_aliases_are_written_out_as_yaml_has_them():
    text = "a: &a {x: 1, y: [2, 3]}\nb: {<<: *a, y: 4}\nc: [*a, *a]"
    a = {"x": 1, "y": [2, 3]}
    assert load_yaml(text) == {"a": a, "b": {"x": 1, "y": 4}, "c": [a, a]}


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['true']",
        "!!python/name:os.system",
        "a: [",
        "{[1]: 2}",
        "a: !!int x",
        "!!timestamp 2020-99-99",
        "a: \0",
        "*a",
    ],
)
def test_text_that_is_no_plain_yaml_is_refused_in_one_line(text):
    with pytest.raises(ValueError) as error:
        load_yaml(text)
    assert str(error.value).isprintable()


def test_a_checkpoint_brings_its_settings_back():
    text = "model: {n_layer: 2}\ntrainer: {max_steps: 5, precision: bf16-mixed, callbacks: null}\n"
    stored = {"model": {"n_layer": 2}}
    stored["trainer"] = {"max_steps": 5, "precision": "bf16-mixed", "callbacks": None}
    assert stored_settings(text, {}) == stored
    assert stored_settings("", {}) == {"trainer": {}}
    text = "trainer: {default_root_dir: /elsewhere}"  # would be written to
    assert stored_settings(text, {}) == {"trainer": {}}
    stop = {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}
    text = f"trainer: {{callbacks: [{stop}]}}"
    assert stored_settings(text, {}) == {"trainer": {"callbacks": [stop]}}


@pytest.mark.parametrize(
    "trainer",
    [
        "{callbacks: [{class_path: mine.Callback}]}",
        "{callbacks: mine.Callback}",
        "{callbacks: [{class_path: lightning.pytorch.callbacks.LambdaCallback, "
        "init_args: {on_fit_start: os.abort}}]}",
        "{logger: {class_path: lightning.pytorch.cli.os.Abort}}",
        "{strategy: {class_path: DDPStrategy, init_args: {ddp_comm_hook: os.abort}}}",
        "{profiler: {dict_kwargs: {os.abort: 1}}}",
    ],
)
def test_a_checkpoint_has_nothing_run_by_name(trainer):
    with pytest.raises(ValueError, match="which is not taken from a checkpoint"):
        stored_settings(f"trainer: {trainer}", {"max_steps": 3})
    key = trainer[1:].partition(":")[0]
    stored_settings(f"trainer: {trainer}", {key: "my own"})  # which wins


@pytest.mark.parametrize("text", ["- 1", "1", "1: 2", "model: 3", "trainer: [1]", "data: {1: 2}"])
def test_settings_that_are_no_mapping_are_refused(text):
    with pytest.raises(ValueError, match="settings"):
        stored_settings(text, {})


# --- downloads ------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(*parts: bytes, pause: float = 0.1):
    """A web server whose only answer is these parts, sent one after the other."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            with contextlib.suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1 << 16)
                    for part in parts:
                        connection.sendall(part)
                        if ended.wait(pause):
                            return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/text"
        ended.set()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GPT_LIGHTNING_TIMEOUT", "0.5")
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache"


HEAD = b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n"


@pytest.mark.parametrize(
    "parts",
    [[HEAD, *[b"a"] * 100], [HEAD[i : i + 1] for i in range(len(HEAD))]],
    ids=["body", "head"],
)
def test_a_server_that_sends_a_byte_now_and_then_is_not_waited_for(cache, parts):
    start = time.monotonic()
    with server(*parts) as url, pytest.raises(ValueError) as error:
        find_corpus(url)
    assert "could not download" in str(error.value) and "0.5 seconds" in str(error.value)
    assert time.monotonic() - start < 5  # of the ten and four that it would have taken
    assert not list(cache.glob("*.txt"))


def test_what_a_server_says_is_shown_as_text(cache):
    answer = b"HTTP/1.0 404 \x1b]0;evil\x07" + b"x" * 9999 + b"\r\n\r\n"
    with server(answer) as url, pytest.raises(ValueError, match="answered 404") as error:
        find_corpus(url)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


@pytest.mark.parametrize("url", ["http://example.org/text", "HTTP://93.184.216.34/text"])
def test_plain_http_needs_a_checksum(cache, url):
    with pytest.raises(ValueError, match="use https://, or add its checksum"):
        find_corpus(url)


@pytest.mark.parametrize("end", [".part", ".part.json", ".lock"])
def test_a_link_in_the_cache_is_not_written_through(cache, tmp_path, end):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    cache.mkdir()
    (cache / f"text{end}").symlink_to(mine)
    with server(HEAD + b"a" * 100) as url, pytest.raises((ValueError, OSError)):
        download(url, url, cache / "text", None, "advice")
    assert mine.read_text() == "precious" and not (cache / "text").exists()


# --- on the command line --------------------------------------------------------------------------

LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"
PRINT = f"{{class_path: {LAMBDA}, init_args: {{on_fit_start: builtins.print}}}}"


@pytest.mark.parametrize(
    "keys, value, part",
    [
        ((KEY, "config"), f"trainer: {{callbacks: [{PRINT}]}}", "'builtins.print'"),
        ((KEY, "config"), "trainer: {strategy: os.abort}", "'os.abort' for trainer.strategy"),
        ((KEY, "config"), "model: {n_layer: 1}\ntrainer: {max_steps: 8}", "not what this version"),
        (("loops",), {}, "odd.ckpt was not written by gpt_lightning: 'loops'"),
        (("optimizer_states", 0, "param_groups"), [], "--ckpt_path=odd.ckpt: loaded state"),
        (("state_dict", "net.lm_head.weight"), torch.zeros(2), "odd.ckpt"),
    ],
)
def test_going_on_with_an_odd_checkpoint_ends_in_one_line(
    trained, monkeypatch, capsys, keys, value, part
):
    monkeypatch.chdir(trained)
    odd = torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    place = odd
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    torch.save(odd, "odd.ckpt")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--ckpt_path=odd.ckpt", "--trainer.max_steps=8", "--trainer.accelerator=cpu"])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.err.count("\n") == 1 and part in said.err, said.err
