"""ONNX: onnxruntime computes what the model does, for any batch, window and past."""

import json

import numpy as np
import pytest
import torch
from conftest import checkpoint_of, seeded

from gpt_lightning.checkpoint import KEY, model_and_tokenizer
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
    out = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(out, checkpoint, out)
    return checkpoint, onnxruntime.InferenceSession(out)


def empty(session, batch=1):
    layers, two, _, heads, _, size = session.get_inputs()[1].shape
    return np.zeros((layers, two, batch, heads, 0, size), np.float32)


@pytest.mark.parametrize("batch, past, window", [(1, 0, 1), (3, 0, 24), (1, 7, 8), (2, 5, 16)])
def test_prefill_and_steps_equal_the_model_for_any_batch_and_length(exported, batch, past, window):
    checkpoint, session = exported
    model, _ = model_and_tokenizer(checkpoint, "")
    ids = torch.randint(9, (batch, window), generator=seeded(2))
    cache = empty(session, batch)
    if past:
        _, cache = session.run(None, {"ids": ids[:, :past].numpy(), "past": cache})
    logits, present = session.run(None, {"ids": ids.numpy(), "past": cache})
    assert present.shape[4] == window
    with torch.no_grad():
        expected = model(ids)[:, past:]
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)


def test_greedy_text_is_equal(exported):
    checkpoint, session = exported
    generator = TextGenerator(*model_and_tokenizer(checkpoint, ""))
    settings = {"max_new_tokens": BLOCK_SIZE - 4, "sampling": Sampling(temperature=0)}
    (text,) = generator.generate("a ba", **settings)
    ids, cache = generator.tokenizer.encode("a ba")[None].astype(np.int64), empty(session)
    for _ in range(BLOCK_SIZE - 4):
        logits, cache = session.run(None, {"ids": ids, "past": cache})
        ids = np.append(ids, logits[:, -1:].argmax(-1), axis=1)
    assert generator.tokenizer.decode(ids[0]) == text


def test_the_metadata_has_model_and_tokenizer(exported):
    checkpoint, session = exported
    stored = json.loads(session.get_modelmeta().custom_metadata_map[KEY])
    assert stored == {name: checkpoint[KEY][name] for name in ("model", "tokenizer")}


def test_the_bigram_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="name=bigram: a model without attention"):
        export_onnx(tmp_path, checkpoint_of("bigram"), tmp_path / "out.onnx")
