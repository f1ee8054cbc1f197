"""The command `export`: formats, file names, mistakes."""

import math
from pathlib import Path

import pytest
import torch

from gpt_lightning.cli import main
from gpt_lightning.commands import export

BEST = "lightning_logs/version_0/checkpoints/best.ckpt"


def run(*argv) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in argv])
    return ended.value.code


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def test_a_shared_file_generates_the_same_text_and_is_not_overwritten(here, capsys):
    assert run("generate", "--prompt=To be") == 0
    text = capsys.readouterr().out
    assert run("export", "--to=safetensors") == 0
    assert "--ckpt_path=model.safetensors" in capsys.readouterr().out
    assert run("generate", "--prompt=To be", "--ckpt_path=model.safetensors") == 0
    assert capsys.readouterr().out == text
    before = (here / "model.safetensors").read_bytes()
    assert run("export", "--to=safetensors") == 2
    assert "--out=model.safetensors exists" in capsys.readouterr().err
    assert (here / "model.safetensors").read_bytes() == before


def test_a_shared_file_is_exported_again_in_another_precision(here):
    assert run("export", "--to=safetensors", "--out=a.safetensors") == 0
    again = ("export", "--to=safetensors", "--ckpt_path=a.safetensors", "--out=b.safetensors")
    assert run(*again, "--precision=bf16") == 0
    small, large = ((here / f"{name}.safetensors").stat().st_size for name in "ba")
    assert small < 0.6 * large


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "the following arguments are required: --to"),
        (["--to=gguf"], "invalid choice: 'gguf'"),
        (["--to=safetensors", "--out=a.bin"], "--out=a.bin must end with .safetensors"),
        (["--to=onnx", "--out=a.bin"], "--out=a.bin must end with .onnx"),
        (["--to=html", "--out="], "--out=. must end with .html"),
        (["--to=html", "--out=a"], "--out=a must end with .html"),
        (["--to=safetensors", "--out=no/a.safetensors"], "there is no such folder"),
        (["--to=onnx", "--precision=fp16"], "--precision=fp16 is not one of --to=onnx: drop it"),
        (["--to=onnx", "--ckpt_path=no.ckpt"], "--ckpt_path=no.ckpt: no such file or folder"),
        (["--to=onnx", "--outs=x"], "did you mean --out?"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(here, capsys, flags, message):
    before = set(here.iterdir())
    assert run("export", *flags) == 2
    assert message in capsys.readouterr().err
    assert set(here.iterdir()) == before


def test_a_missing_package_is_named(here, capsys, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="onnx")

    monkeypatch.setattr(export, "import_module", missing)
    assert run("export", "--to=onnx") == 2
    assert 'needs onnx: pip install -e ".[export]"' in capsys.readouterr().err


def test_a_failed_export_removes_nothing_that_someone_else_wrote(here, capsys, monkeypatch):
    def export_while_a_user_writes(path, checkpoint, out):
        out.mkdir()
        (out / "theirs").touch()
        raise FileExistsError("it exists")

    monkeypatch.setattr(export, "exporter", lambda name: export_while_a_user_writes)
    assert run("export", "--to=transformers", "--out=a") == 2
    assert "--out=a cannot be written" in capsys.readouterr().err
    assert (here / "a/theirs").exists()


def test_weights_that_are_not_finite_are_not_exported(here, capsys):
    checkpoint = torch.load(BEST, weights_only=True)
    checkpoint["state_dict"]["net.lm_head.weight"][0, 0] = torch.nan
    torch.save(checkpoint, "bad.ckpt")
    for to in ("safetensors", "html"):
        assert run("export", f"--to={to}", "--ckpt_path=bad.ckpt") == 2
        assert "lm_head.weight is not finite: its training diverged" in capsys.readouterr().err
    assert not list(here.glob("model.*"))


def test_settings_without_a_number_in_json_do_not_break_the_page(here, capsys):
    checkpoint = torch.load(BEST, weights_only=True)
    checkpoint["gpt_lightning"]["settings"]["trainer"]["gradient_clip_val"] = math.inf
    torch.save(checkpoint, "inf.ckpt")
    assert run("export", "--to=html", "--ckpt_path=inf.ckpt") == 0
    assert "open it in a browser" in capsys.readouterr().out
    page = Path("model.html").read_text()
    assert '"gradient_clip_val":"Infinity"' in page and ":Infinity" not in page


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_layer": 3_000_000},
        {"n_embd": 1 << 20},
        {"n_layer": "x"},
        {"block_size": 1 << 40},
        {"multi_token_heads": 1 << 40},
        {"n_gram": 16},
    ],
    ids=str,
)
def test_sizes_that_the_weights_do_not_have_take_no_memory(here, sizes, capsys):
    checkpoint = torch.load(BEST, weights_only=True)
    checkpoint["gpt_lightning"]["model"] |= sizes
    torch.save(checkpoint, "large.ckpt")
    for command in (["generate", "--ckpt_path"], ["fit", "--data.corpus=text.txt", "--init_from"]):
        assert run(*command[:-1], f"{command[-1]}=large.ckpt") == 2
        assert f"{command[-1]}=large.ckpt: the model's settings do not" in capsys.readouterr().err
