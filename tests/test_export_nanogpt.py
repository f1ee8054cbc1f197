"""Import of nanoGPT's and minGPT's checkpoints: equal losses, and no code in them is run."""

import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded

from gpt_lightning.checkpoint import KEY, model_and_tokenizer
from gpt_lightning.cli import main
from gpt_lightning.errors import UserError
from gpt_lightning.export.nanogpt import import_mingpt, import_nanogpt, tokenizer_of_meta
from gpt_lightning.generation.generator import TextGenerator

V, C, T, LAYERS, HEADS = 7, 12, 8, 2, 3
VOCABULARY = "\n abcdé"
TEXT = "a cab\né dad bad" * 3


def random_weights(bias: bool) -> OrderedDict:
    """Weights by nanoGPT's names, the head tied to the embedding."""
    shapes = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C)}
    for i in range(LAYERS):
        block = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "ln_2": (C,)}
        block |= {"mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
        shapes |= {f"transformer.h.{i}.{name}.weight": shape for name, shape in block.items()}
    shapes["transformer.ln_f.weight"] = (C,)
    if bias:
        for name, shape in list(shapes.items())[2:]:
            shapes[name.replace(".weight", ".bias")] = shape[:1]
    generator = seeded(5)
    weights = OrderedDict((n, torch.randn(s, generator=generator) / 2) for n, s in shapes.items())
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def reference_logits(weights, ids, gelu="none"):
    """GPT-2's equations, written down once more: ids (T,) -> logits (T, V)."""

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name, x):
        return F.layer_norm(x, (C,), weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    n = len(ids)
    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][:n]
    for i in range(LAYERS):
        block = f"transformer.h.{i}"
        parts = linear(f"{block}.attn.c_attn", norm(f"{block}.ln_1", x)).split(C, dim=1)
        heads = []
        for q, k, v in zip(*(part.split(C // HEADS, dim=1) for part in parts), strict=True):
            scores = q @ k.T / (C // HEADS) ** 0.5
            allowed = torch.ones(n, n).tril() > 0
            heads.append(torch.where(allowed, scores, -torch.inf).softmax(1) @ v)
        x = x + linear(f"{block}.attn.c_proj", torch.cat(heads, dim=1))
        hidden = F.gelu(linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x)), approximate=gelu)
        x = x + linear(f"{block}.mlp.c_proj", hidden)
    return linear("lm_head", norm("transformer.ln_f", x))


def write_nanogpt(folder: Path, bias=True, weights=None, **changes) -> tuple[Path, Path]:
    """A ckpt.pt with the entries of nanoGPT's train.py, and a meta.pkl."""
    args = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": C, "block_size": T, "bias": bias}
    content = {
        "model": random_weights(bias) if weights is None else weights,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]},
        "model_args": args | {"vocab_size": V, "dropout": 0.1},
        "iter_num": 200,
        "best_val_loss": torch.tensor(2.5),
        "config": {"out_dir": "out", "compile": False, "learning_rate": 1e-3},
    }
    torch.save(content | changes, folder / "ckpt.pt")
    ids = dict(enumerate(VOCABULARY))
    meta = {"vocab_size": V, "itos": ids, "stoi": {c: i for i, c in ids.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder / "ckpt.pt", folder / "meta.pkl"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_the_imported_model_has_the_loss_of_gpt2s_equations(tmp_path, bias, prefix):
    weights = random_weights(bias)
    named = OrderedDict((prefix + name, weight) for name, weight in weights.items())
    checkpoint = import_nanogpt(*write_nanogpt(tmp_path, bias, named))
    assert checkpoint["global_step"] == 200
    assert checkpoint[KEY]["model"]["dropout"] == 0.1
    generator = TextGenerator(*model_and_tokenizer(checkpoint, "ckpt.pt"))
    ids = torch.tensor([VOCABULARY.index(c) for c in TEXT])
    nats = sum(
        F.cross_entropy(reference_logits(weights, x[:-1]), x[1:], reduction="sum").item()
        for i in range(0, len(ids) - 1, T)
        if len(x := ids[i : i + T + 1]) > 1
    )
    assert generator.score(TEXT).nats == pytest.approx(nats, rel=1e-5)


def test_mingpts_model_uses_the_approximate_gelu_and_the_texts_characters(tmp_path):
    weights = random_weights(True)
    weights["lm_head.weight"] = torch.randn(V, C, generator=seeded(6))
    weights |= {"transformer.h.0.attn.bias": torch.ones(1, 1, T, T)}  # its mask
    torch.save(weights, tmp_path / "model.pt")
    checkpoint = import_mingpt(tmp_path / "model.pt", "\n abcdé" * 2, HEADS)
    model, tokenizer = model_and_tokenizer(checkpoint, "model.pt")
    ids = torch.tensor([0, 3, 6, 2, 2, 1])
    expected = reference_logits(weights, ids, gelu="tanh")
    torch.testing.assert_close(model(ids[None])[0], expected, rtol=1e-5, atol=1e-5)
    assert tokenizer.vocabulary == VOCABULARY


@pytest.mark.parametrize("protocol", [4, 5])
def test_the_tokenizer_of_meta_pkl_is_in_the_order_of_ids(tmp_path, protocol):
    characters = [chr(i) for i in range(400, 40, -1)]  # ids of more than one byte
    meta = {"itos": dict(enumerate(characters)), "stoi": {c: i for i, c in enumerate(characters)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    assert tokenizer_of_meta(tmp_path / "meta.pkl").vocabulary == "".join(characters)


class Call:
    """Pickled, this is the result of a call."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("place", ["model", "config", "iter_num", "meta"])
def test_no_code_in_the_files_is_run(tmp_path, place):
    canary = tmp_path / "canary"
    call = Call(open, (str(canary), "w"))
    changes = {} if place == "meta" else {place: {"x": call}}
    ckpt, meta = write_nanogpt(tmp_path, **changes)
    if place == "meta":
        meta.write_bytes(pickle.dumps({"itos": call}))
    with pytest.raises(UserError, match="no code in it was run"):
        import_nanogpt(ckpt, meta)
    assert not canary.exists()


@pytest.mark.parametrize(
    "meta",
    [
        b"",
        pickle.dumps([1]),
        pickle.dumps({"itos": {0: "ab"}})[:-3],
        pickle.dumps({"stoi": {}}),
        pickle.dumps({"itos": {1: "a"}}),
        pickle.dumps({"itos": {0: 5}}),
        b"\x80\x04r\xff\xff\xff\xff.",  # a memo of 2**32 entries
    ],
)
def test_a_meta_pkl_of_another_content_is_one_error(tmp_path, meta):
    (tmp_path / "meta.pkl").write_bytes(meta)
    with pytest.raises(UserError, match="meta=.*not a pickle of a dict of texts and integers"):
        tokenizer_of_meta(tmp_path / "meta.pkl")


def without(name):
    weights = random_weights(True)
    del weights[name]
    return weights


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_args": None}, "not a checkpoint of nanoGPT's train.py"),
        ({"model_args": {"dropout": 0.1}}, "n_head and dropout in model_args"),
        ({"model_args": {"n_head": 5, "dropout": 0}}, "n_embd=12 must be a multiple of n_head=5"),
        ({"model_args": {"n_head": "3", "dropout": 0}}, 'n_head="3" must be of type int'),
        ({"weights": {}}, "not the weights of a GPT-2"),
        ({"weights": without("transformer.h.1.mlp.c_fc.weight")}, "not the weights of a GPT-2"),
        ({"weights": {n: w[:3] for n, w in random_weights(True).items()}}, "vocabulary 7"),
        ({"weights": without("transformer.h.1.mlp.c_fc.bias")}, "^[^=]*do not fit its weights"),
        ({"weights": {n: w[..., :0] for n, w in random_weights(True).items()}}, "of a GPT-2"),
        ({"weights": {n: w[:0] for n, w in random_weights(True).items()}}, "0 tokens"),
        ({"weights": {0: torch.zeros(1)}}, "not the weights of a GPT-2"),
    ],
)
def test_a_checkpoint_of_another_model_is_one_error(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        import_nanogpt(*write_nanogpt(tmp_path, **changes))


def run(*argv) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in argv])
    return ended.value.code


def test_the_command_imports_generates_evaluates_and_fine_tunes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_nanogpt(tmp_path)
    Path("text.txt").write_text(TEXT * 5, encoding="utf-8")
    command = ["import", "--from=nanogpt", "ckpt.pt", "--meta=meta.pkl"]
    assert run(*command) == 0
    assert run(*command) == 2
    assert "--out=imported.safetensors exists" in capsys.readouterr().err
    model = "--ckpt_path=imported.safetensors"
    assert run("generate", model, "--prompt=a cab", "--max_new_tokens=5") == 0
    assert run("evaluate", model, "--text=text.txt") == 0
    start = ("fit", "--init_from=imported.safetensors", "--data.corpus=text.txt")
    assert run(*start, "--trainer.max_steps=2", "--trainer.accelerator=cpu") == 0
    capsys.readouterr()
    for wrong in ("fit", "validate"):
        assert run(wrong, model) == 2
        assert "fit --init_from=imported.safetensors" in capsys.readouterr().err


def test_flags_of_another_program_are_errors(capsys):
    for argv, message in (
        (["--from=nanogpt", "a.pt"], "--from=nanogpt needs --meta"),
        (["--from=transformers", "a", "--n_head=2"], "--n_head=2 is not for --from=transformers"),
        (["--from=keras", "a"], "invalid choice: 'keras'"),
        (["--from=transformers", "a", "--out=b.ckpt"], "--out=b.ckpt must end with .safetensors"),
    ):
        assert run("import", *argv) == 2
        assert message in capsys.readouterr().err


def test_settings_in_the_file_are_not_written_as_flags(tmp_path, capsys):
    path, meta = write_nanogpt(tmp_path, model_args={"n_head": 5, "dropout": 0})
    assert run("import", "--from=nanogpt", path, f"--meta={meta}", f"--out={path}.safetensors") == 2
    assert f"error: {path}: n_embd=12 must be a multiple of n_head=5" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_imported(tmp_path, capsys):
    weights = random_weights(True)
    weights["transformer.ln_f.weight"][0] = torch.inf
    path, meta = write_nanogpt(tmp_path, weights=weights)
    assert run("import", "--from=nanogpt", path, f"--meta={meta}", f"--out={path}.safetensors") == 2
    assert "the weight ln_f.weight is not finite" in capsys.readouterr().err


NANOGPT = os.environ.get("NANOGPT")


@pytest.mark.skipif(NANOGPT is None, reason="NANOGPT is not set to a checkout of nanoGPT")
@pytest.mark.parametrize("bias", [True, False])
def test_a_run_of_nanogpts_train_py_has_the_same_loss_here(tmp_path, bias):
    folder = tmp_path / "data" / "text"
    folder.mkdir(parents=True)
    ids = torch.randint(0, V, (4000,), generator=seeded(8))
    for name in ("train.bin", "val.bin"):
        ids.to(torch.uint16).numpy().tofile(folder / name)
    _, meta = write_nanogpt(folder)
    sizes = f"--n_layer={LAYERS} --n_head={HEADS} --n_embd={C} --block_size={T} --batch_size=4"
    steps = "--max_iters=200 --eval_interval=200 --eval_iters=1 --log_interval=100"
    flags = f"{sizes} {steps} --dataset=text --device=cpu --compile=False --bias={bias}".split()
    environment = {**os.environ, "PYTHONPATH": NANOGPT}
    train = [sys.executable, str(Path(NANOGPT, "train.py")), *flags, "--out_dir=out"]
    # configurator.py and data are looked for in the current folder
    (tmp_path / "configurator.py").write_bytes(Path(NANOGPT, "configurator.py").read_bytes())
    subprocess.run(train, cwd=tmp_path, env=environment, check=True, capture_output=True)
    loss = """
import torch
from model import GPT, GPTConfig
read = torch.load("out/ckpt.pt", weights_only=True)
model = GPT(GPTConfig(**read["model_args"]))
model.load_state_dict(read["model"])
ids = torch.load("ids.pt")
with torch.no_grad():
    print(model.eval()(ids[:, :-1], ids[:, 1:])[1].item())
"""
    torch.save(ids[None, : T + 1], tmp_path / "ids.pt")
    theirs = subprocess.check_output(
        [sys.executable, "-c", loss], cwd=tmp_path, env=environment, text=True
    )
    checkpoint = import_nanogpt(tmp_path / "out" / "ckpt.pt", meta)
    generator = TextGenerator(*model_and_tokenizer(checkpoint, ""))
    text = "".join(VOCABULARY[i] for i in ids[: T + 1])
    expected = float(theirs.splitlines()[-1])
    assert generator.score(text).nats_per_character == pytest.approx(expected, abs=1e-5)
