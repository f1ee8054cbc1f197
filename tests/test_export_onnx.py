"""ONNX: onnxruntime computes what the model does, and generates and scores the same texts."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import checkpoint_of, seeded

from gpt_lightning.checkpoint import KEY, model_and_tokenizer
from gpt_lightning.cli import main
from gpt_lightning.errors import UserError
from gpt_lightning.generation.generator import TextGenerator
from gpt_lightning.generation.sampling import Sampling

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
export_onnx = pytest.importorskip("gpt_lightning.export.onnx").export_onnx

BLOCK_SIZE = 24


@pytest.fixture(scope="module", params=["gpt", "lecture"])
def exported(request, tmp_path_factory):
    checkpoint = checkpoint_of(request.param, block_size=BLOCK_SIZE, dropout=0.1)
    checkpoint[KEY]["settings"] = {"data": {"separator": "fed"}}
    out = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(out, checkpoint, out)
    return checkpoint, out


@pytest.fixture(scope="module")
def session(exported):
    return onnxruntime.InferenceSession(exported[1])


@pytest.fixture(scope="module")
def both(exported):
    """The generator of the file, and that of the checkpoint."""
    checkpoint, path = exported
    return TextGenerator.load(path), TextGenerator.from_checkpoint(checkpoint, path)


def run(session, ids, past):
    """Logits, and the past of the next call."""
    logits, *present = session.run(None, {"ids": ids, **past})
    return logits, dict(zip(past, present, strict=True))


def empty(session, batch=1):
    nodes = session.get_inputs()[1:]
    assert [node.shape[1:] for node in nodes] == [[2, "past", 8]] * 4
    return {node.name: np.zeros((batch, 2, 0, 8), np.float32) for node in nodes}


@pytest.mark.parametrize("batch, past, window", [(1, 0, 1), (3, 0, 24), (1, 7, 8), (2, 5, 16)])
def test_prefill_and_steps_equal_the_model_for_any_batch_and_length(
    exported, session, batch, past, window
):
    model, _ = model_and_tokenizer(exported[0], "")
    ids = torch.randint(9, (batch, window), generator=seeded(2))
    cache = empty(session, batch)
    if past:
        _, cache = run(session, ids[:, :past].numpy(), cache)
    logits, cache = run(session, ids.numpy(), cache)
    assert {tensor.shape for tensor in cache.values()} == {(batch, 2, window, 8)}
    with torch.no_grad():
        expected = model(ids)[:, past:]
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)


def test_the_outputs_are_named_after_the_inputs_that_they_become(session):
    past = [node.name for node in session.get_inputs()]
    assert past[:3] == ["ids", "past.0.key", "past.0.value"]
    present = [name.replace("past", "present") for name in past[1:]]
    assert [node.name for node in session.get_outputs()] == ["logits", *present]


def test_the_metadata_describes_the_model_as_a_checkpoint_does(exported, session):
    stored = json.loads(session.get_modelmeta().custom_metadata_map[KEY])
    assert stored == {**exported[0][KEY], "step": 4}


def test_the_bigram_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="name=bigram: a model without attention"):
        export_onnx(tmp_path, checkpoint_of("bigram"), tmp_path / "out.onnx")


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"sampling": Sampling(temperature=0)},
        {"num_samples": 3, "seed": 5},
        {"sampling": Sampling(0.9, top_k=6, repetition_penalty=1.2), "stop": ["ab"], "ban": ["c"]},
    ],
    ids=["greedy", "samples", "filters"],
)
@pytest.mark.parametrize("prompt", ["", "a ba", "abc\n defg" * 5])
def test_the_file_generates_the_texts_of_its_checkpoint_over_several_windows(
    both, prompt, settings
):
    found, expected = (g.generate(prompt, max_new_tokens=4 * BLOCK_SIZE, **settings) for g in both)
    assert found == expected and len(found[0]) > BLOCK_SIZE


def test_two_texts_of_one_generator_do_not_mix(both):
    generator, _ = both
    settings = {"max_new_tokens": 30, "seed": 2}
    streams = [generator.stream(prompt, **settings) for prompt in ("a", "gfe")]
    pieces = [(first, second) for (first,), (second,) in zip(*streams, strict=True)]
    alone = [generator.generate(prompt, **settings)[0] for prompt in ("a", "gfe")]
    assert ["a" + "".join(p for p, _ in pieces), "gfe" + "".join(p for _, p in pieces)] == alone


def test_a_text_costs_what_it_costs_the_checkpoint(both):
    text = "a bad cafe\n" * 10
    found, expected = (generator.score(text, stride=5).nats for generator in both)
    assert found == pytest.approx(expected, rel=1e-5)


def test_onnxruntime_has_as_many_threads_as_torch(both):
    options = both[0].model.session.get_session_options()
    assert options.intra_op_num_threads == torch.get_num_threads()


def test_attention_weights_are_refused(both):
    with pytest.raises(UserError, match="does not give its attention weights"):
        both[0].attention("a")


def command(capsys, *argv):
    """Exit code and output of the command line."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in argv])
    return ended.value.code, "".join(capsys.readouterr())


def test_the_command_generates_from_the_file(exported, both, capsys):
    flags = ("--prompt=cab", "--max_new_tokens=40", "--temperature=1", "--seed=3")
    code, out = command(capsys, "generate", f"--ckpt_path={exported[1]}", *flags)
    assert code == 0 and out == both[1].generate("cab", max_new_tokens=40, seed=3)[0] + "\n"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["generate", "--precision=int8"], "--precision=int8 is not for an ONNX file"),
        (["evaluate"], "only generate reads an ONNX file"),
        (["export", "--to=safetensors"], "only generate reads an ONNX file"),
        (["fit"], "only generate reads an ONNX file"),
    ],
    ids=str,
)
def test_what_such_a_file_is_not_for_is_one_line(exported, capsys, argv, message):
    code, out = command(capsys, *argv, f"--ckpt_path={exported[1]}")
    assert code == 2 and message in out and out.count("\n") == 1


def test_another_device_is_refused(exported):
    with pytest.raises(UserError, match="^device=cuda cannot run an ONNX file"):
        TextGenerator.load(exported[1], device="cuda")


def test_without_onnxruntime_the_error_names_its_installation(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r'needs onnxruntime: pip install -e "\.\[export\]"'):
        TextGenerator.load(exported[1])


def changed(path, out, **model):
    """Write the ONNX file `path` with other model settings in its metadata."""
    import onnx

    program = onnx.load(path)
    (entry,) = (entry for entry in program.metadata_props if entry.key == KEY)
    description = json.loads(entry.value)
    entry.value = json.dumps({**description, "model": {**description["model"], **model}})
    onnx.save(program, out)


@pytest.mark.parametrize(
    "model",
    [{"block_size": 10**12}, {"block_size": 0}, {"vocab_size": 10**12}, {"n_embd": "x"}],
    ids=str,
)
def test_settings_that_are_not_those_of_the_graph_are_refused(exported, tmp_path, model):
    changed(exported[1], tmp_path / "other.onnx", **model)
    with pytest.raises(UserError, match="damaged, or not a file that export --to=onnx wrote"):
        TextGenerator.load(tmp_path / "other.onnx")


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_a_damaged_file_is_one_error(exported, tmp_path, size):
    path = tmp_path / "cut.onnx"
    path.write_bytes(exported[1].read_bytes()[:size])
    with pytest.raises(UserError, match="damaged, or not a file that export --to=onnx wrote"):
        TextGenerator.load(path)


def test_numbers_in_further_files_are_not_read(exported, tmp_path, monkeypatch):
    import onnx

    monkeypatch.chdir(tmp_path)
    outside = {"save_as_external_data": True, "location": "numbers", "size_threshold": 500}
    onnx.save(onnx.load(exported[1]), "model.onnx", **outside)
    onnxruntime.InferenceSession("model.onnx")  # onnxruntime alone would read them
    with pytest.raises(UserError, match="damaged, or not a file that"):
        TextGenerator.load("model.onnx")
