"""The command `export`: formats, file names, mistakes."""

import pytest

from gpt_lightning.cli import main
from gpt_lightning.commands import export


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
        (["--to=safetensors", "--out=no/a.safetensors"], "there is no such folder"),
        (["--to=onnx", "--precision=fp16"], "--precision=fp16 is not one of --to=onnx: drop it"),
        (["--to=onnx", "--ckpt_path=no.ckpt"], "--ckpt_path=no.ckpt: no checkpoint"),
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
