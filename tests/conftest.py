"""What several test files use."""

import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from tensorboard.summary.writer import event_file_writer

from gpt_lightning.checkpoint import KEY, describe
from gpt_lightning.cli import main
from gpt_lightning.data.corpus import find_corpus
from gpt_lightning.data.tokenizers import CharTokenizer
from gpt_lightning.errors import UserError
from gpt_lightning.model import build_model, config_from_dict

ROOT = Path(__file__).parent.parent
TEXT = "To be, or not to be: that is the question;\nwhether 'tis nobler in the mind.\n" * 20
TINY = (  # flags of a run that takes about a second
    "--data.corpus=text.txt",
    "--data.block_size=8",
    "--data.batch_size=4",
    "--model.n_layer=1",
    "--model.n_head=2",
    "--model.n_embd=16",
    "--trainer.max_steps=4",
    "--trainer.accelerator=cpu",
)


SIZES = {"vocab_size": 3, "block_size": 4, "n_layer": 1, "n_head": 1, "n_embd": 4}
CORPUS = {"name": "a text", "sha256": "0" * 64, "split": "tail", "val_fraction": 0.1}


def description(vocabulary="\nab", name="gpt", **model) -> dict:
    config = config_from_dict({"name": name, **SIZES, **model})
    run = {"seed_everything": 1, "trainer": {"max_steps": 4}}
    return describe(config, CharTokenizer(vocabulary).state(), dict(CORPUS), run)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def perturbed(model, noise=0.3):
    """The model in eval mode, every weight moved away from its initial value."""
    generator = seeded(3)
    with torch.no_grad():
        for p in model.parameters():
            p += noise * torch.randn(p.shape, generator=generator)
    return model.eval()


def checkpoint_of(name, vocabulary="\n abcdefg", **settings):
    """A checkpoint, as it is read, of a small perturbed model with a tokenizer of characters."""
    sizes = {"vocab_size": len(vocabulary), "block_size": 8}
    if name != "bigram":
        sizes |= {"n_layer": 2, "n_head": 2, "n_embd": 16}
    config = config_from_dict({"name": name, **sizes, **settings})
    torch.manual_seed(1)
    weights = perturbed(build_model(config), 0.1).state_dict()
    corpus = {"name": "a text", "sha256": "0" * 64, "split": "tail", "val_fraction": 0.1}
    return {
        "global_step": 4,
        "state_dict": {f"net.{key}": weight for key, weight in weights.items()},
        KEY: describe(config, CharTokenizer(vocabulary).state(), corpus, None),
    }


class Page(HTMLParser):
    """Tags, attributes, and the text in each kind of tag."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts = ["outside"], [], {}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        self.tags.append("outside")

    def handle_data(self, data):
        self.texts.setdefault(self.tags[-1], []).append(data)

    def script(self, name):
        """The content of the script with this id."""
        ids = [value for key, value in self.attributes if key == "id"]
        scripts = [i for i in ids if i in ("engine", "description", "weights")]
        return self.texts["script"][scripts.index(name)]


def run(*argv):
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in argv])
    return end.value.code


def write(path, data):
    """Write bytes, or text as UTF-8, to a file in a folder that may not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def text_of(name, **options):
    """The text of a corpus."""
    return "".join(find_corpus(str(name), **options).chunks())


def error_of(name, *parts, **options):
    """The message of the error that reading a corpus raises; all `parts` are in it."""
    with pytest.raises(UserError) as caught:
        text_of(name, **options)
    message = str(caught.value)
    assert message.startswith(("corpus=", "encoding=")) and "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


def contents(folder):
    """All files with their bytes, except locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.read_bytes() for path in files}


@pytest.fixture(scope="session", autouse=True)
def event_files_in_order():
    """Number event files from 1,000,000 on.

    TensorBoard reads them in the order of their names: second, process, number. In one second and
    one process, as in these tests, number 10 would come before 9.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(10**6))
        yield


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    """A cache of its own, so that tests leave the user's alone; all tests share it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT_LIGHTNING_CACHE", str(folder))
        yield folder


@pytest.fixture
def cli(tmp_path):
    """Run the command line in a new process: `cli("fit", "--trainer.max_steps=1", cwd=folder)`."""

    def run(*argv, cwd=tmp_path, timeout=120, env=None):
        ours = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
        return subprocess.run(
            [sys.executable, "-m", "gpt_lightning", *map(str, argv)],
            cwd=cwd,
            timeout=timeout,
            env={"OMP_NUM_THREADS": "1", **os.environ, **ours, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
        )

    return run


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """The folder that `trained` copies; tests must not change it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("fit", *TINY) == 0
    return folder


@pytest.fixture
def trained(trained_once, tmp_path):
    """A folder with `text.txt` and a run of `fit` with TINY on it in `lightning_logs`."""
    return Path(shutil.copytree(trained_once, tmp_path / "trained"))


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty folder as the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def here(trained, monkeypatch):
    """`trained` as the working folder."""
    monkeypatch.chdir(trained)
    return trained


@pytest.fixture
def ends(capsys):
    """`ends(*argv)`: the exit code of the command line, and what it prints to stdout and stderr."""

    def run_alone(*argv):
        capsys.readouterr()
        return run(*argv), *capsys.readouterr()

    return run_alone
