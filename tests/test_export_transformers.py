"""Folders of transformers: its GPT2LMHeadModel computes what ours does, in both directions."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import checkpoint_of, seeded

from gpt_lightning.checkpoint import KEY, model_and_tokenizer
from gpt_lightning.errors import UserError
from gpt_lightning.export.transformers import export_transformers, import_transformers
from gpt_lightning.generation.generator import TextGenerator
from gpt_lightning.generation.sampling import Sampling
from gpt_lightning.model import build_model, config_from_dict

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel  # noqa: E402

PROMPT = "a bad\n  cafe"
IDS = torch.tensor([[0, 3, 5, 1, 1, 7, 2, 2], [8, 8, 6, 4, 3, 0, 0, 1]])


def log_probs(model, ids=IDS):
    with torch.no_grad():
        logits = model(ids)
    return getattr(logits, "logits", logits).log_softmax(-1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": False},
        {"scaled": False, "ffwd": 2},
        {"activation": "gelu"},
        {"activation": "gelu_tanh", "qkv_bias": True},
    ],
    ids=str,
)
def test_the_exported_folder_has_equal_probabilities_and_comes_back(tmp_path, settings):
    checkpoint = checkpoint_of("lecture", **settings)
    ours, _ = model_and_tokenizer(checkpoint, "")
    export_transformers(tmp_path, checkpoint, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(theirs, GPT2LMHeadModel)
    torch.testing.assert_close(log_probs(theirs), log_probs(ours), rtol=0, atol=1e-4)
    back = import_transformers(tmp_path / "out")
    assert back[KEY]["tokenizer"] == checkpoint[KEY]["tokenizer"]
    again, _ = model_and_tokenizer(back, "")
    torch.testing.assert_close(log_probs(again), log_probs(ours), rtol=0, atol=1e-4)


def test_greedy_text_is_equal_with_transformers_cache_and_without_this_package(tmp_path):
    checkpoint = checkpoint_of("lecture", block_size=40)
    export_transformers(tmp_path, checkpoint, tmp_path / "out")
    code = f"""
import sys
sys.modules["gpt_lightning"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("out")
tokenizer = AutoTokenizer.from_pretrained("out")
ids = tokenizer({PROMPT!r}, return_tensors="pt")
text = model.generate(**ids, max_new_tokens=28, do_sample=False, use_cache=True)
print(ascii(tokenizer.decode(text[0])))
"""
    theirs = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True)
    ours = TextGenerator(*model_and_tokenizer(checkpoint, ""))
    (text,) = ours.generate(PROMPT, max_new_tokens=28, sampling=Sampling(temperature=0))
    assert theirs.splitlines()[-1] == ascii(text)


def test_the_tokenizer_of_characters_has_our_ids_and_keeps_every_text(tmp_path):
    vocabulary = "\n\r .,'ab\u0301é\u4e2d\U0001f600"
    checkpoint = checkpoint_of("lecture", vocabulary)
    export_transformers(tmp_path, checkpoint, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    _, ours = model_and_tokenizer(checkpoint, "")
    text = "a  b\r\n\n .,' \u4e2d\u4e2dé b\u0301a\U0001f600 "
    assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert theirs.decode(ours.encode(text).tolist()) == text
    with pytest.raises(Exception, match="Missing .UNK. token from the vocabulary"):
        theirs("a?")


@pytest.mark.parametrize(
    "state", [{"kind": "byte"}, {"kind": "bpe", "vocabulary": "t h\nth e\n\u0120 the"}]
)
def test_the_tokenizer_of_bytes_has_our_ids_and_comes_back(tmp_path, state):
    size = 256 if state["kind"] == "byte" else 259
    checkpoint = checkpoint_of("lecture", vocab_size=size, n_embd=size, n_head=1)
    checkpoint[KEY]["tokenizer"] = state
    export_transformers(tmp_path, checkpoint, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    _, ours = model_and_tokenizer(checkpoint, "")
    text = "the  the cat,\n\u4e2dé then"
    assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert theirs.decode(ours.encode(text).tolist()) == text
    assert import_transformers(tmp_path / "out")[KEY]["tokenizer"] == state


def test_the_heads_bias_needs_a_wide_enough_model(tmp_path):
    vocabulary = "".join(map(chr, range(97, 97 + 18)))
    # n_embd + 1 = 17 tokens are the most
    export_transformers(tmp_path, checkpoint_of("lecture", vocabulary[:17]), tmp_path / "fits")
    with pytest.raises(UserError, match=r"vocab_size=18: .* n_embd \+ 1 = 17 tokens"):
        export_transformers(tmp_path, checkpoint_of("lecture", vocabulary), tmp_path / "out")
    without_bias = checkpoint_of("lecture", vocabulary)
    without_bias["state_dict"]["net.lm_head.bias"].zero_()
    export_transformers(tmp_path, without_bias, tmp_path / "zero")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gpt", "bigram"])
def test_other_models_load_after_the_import_that_registers_them(tmp_path, name):
    checkpoint = checkpoint_of(name, block_size=40)
    code = export_transformers(tmp_path, checkpoint, tmp_path / "out")
    scope = {}
    exec(code, scope)
    theirs = scope["model"]
    ours = TextGenerator(*model_and_tokenizer(checkpoint, ""))
    torch.testing.assert_close(log_probs(theirs), log_probs(ours.model), rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(PROMPT, return_tensors="pt")
    (text,) = ours.generate(PROMPT, max_new_tokens=28, sampling=Sampling(temperature=0))
    found = theirs.generate(**ids, max_new_tokens=28, do_sample=False)
    assert tokenizer.decode(found[0]) == text
    loss = theirs(IDS, labels=IDS).loss.item()
    expected = -log_probs(ours.model)[:, :-1].gather(2, IDS[:, 1:, None]).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="no padding"):
        theirs(IDS, attention_mask=IDS)


@pytest.fixture(scope="module")
def default_model(tmp_path_factory):
    """The default GPT in transformers, with a context of 20 tokens."""
    import gpt_lightning.export.transformers_model  # noqa: F401

    out = tmp_path_factory.mktemp("default") / "out"
    export_transformers(out, checkpoint_of("gpt", block_size=20, n_gram=4), out)
    return AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["greedy", "beams", "sampled"],
)
def test_texts_are_equal_with_and_without_cache_also_beyond_the_window(default_model, settings):
    computed, found = [], []
    hook = default_model.net.lm_head.register_forward_hook(
        lambda _, args, out: computed.append(out.shape[1])
    )
    for use_cache in ({}, {"use_cache": False}):  # the cache is the default
        torch.manual_seed(3)
        found.append(default_model.generate(IDS, max_new_tokens=24, **use_cache, **settings))
    hook.remove()
    # the prompt, tokens up to the end of the window, then windows that move
    assert computed[:24] == [8] + [1] * 12 + [20] * 11
    assert computed[24:] == [*range(8, 20), *[20] * 12]
    assert torch.equal(*found) and found[0].shape[1] == 32


def test_a_cache_that_is_not_dynamic_is_refused(default_model):
    with pytest.raises(ValueError, match="StaticCache: .* DynamicCache only"):
        default_model.generate(IDS, max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("part", [{"residual": False}, {"norm": False}, {"ffwd": 0}], ids=str)
def test_rungs_without_a_part_of_gpt2_are_refused(tmp_path, part):
    ((name, value),) = part.items()
    with pytest.raises(UserError, match=f"{name}={value}: GPT-2 always has"):
        export_transformers(tmp_path, checkpoint_of("lecture", **part), tmp_path / "out")


def random_gpt2(folder, **settings):
    """A folder of a GPT2LMHeadModel with random weights, biases included."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 8, "vocab_size": 261}
    model = GPT2LMHeadModel(GPT2Config(**(sizes | settings))).eval()
    generator = seeded(4)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(folder)
    return model


def test_gpt2_with_its_own_order_of_bytes_and_a_tied_head_is_imported(tmp_path):
    import tokenizers

    model = random_gpt2(tmp_path)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the")]
    tokens = [*alphabet, "th", "the", "\u0120the", "<|endoftext|>", "<|pad|>"]
    own = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    )
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.save(str(tmp_path / "tokenizer.json"))
    checkpoint = import_transformers(tmp_path)
    ours, tokenizer = model_and_tokenizer(checkpoint, "")
    text = "the  the é"
    theirs = own.encode(text).ids
    assert len(theirs) <= 8
    ids = torch.tensor(tokenizer.encode(text)[None].astype("int64"))
    # the cost of the text's tokens among those that our vocabulary has
    known = [tokens.index(token) for token in tokens[:259]]
    expected = log_probs(model, torch.tensor([theirs]))[0, :, known].log_softmax(-1)
    found = log_probs(ours, ids)[0]
    next_theirs, next_ours = torch.tensor(theirs[1:]), ids[0, 1:]
    torch.testing.assert_close(
        found[:-1].gather(1, next_ours[:, None]),
        expected[:-1].gather(1, next_theirs[:, None]),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("model_type", "llama", "model_type=llama is not the lecture's model"),
        ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon=1e-06 is not"),
        ("activation_function", "silu", "activation=silu must be one of"),
        ("n_head", "2", 'n_head="2" must be of type int'),
    ],
)
def test_a_folder_of_another_model_is_refused(tmp_path, name, value, message):
    export_transformers(tmp_path, checkpoint_of("lecture"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(UserError, match=message):
        import_transformers(tmp_path / "out")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_or_damaged_file_is_one_error(tmp_path, file):
    export_transformers(tmp_path, checkpoint_of("lecture"), tmp_path / "out")
    (tmp_path / "out" / file).write_text("[" * 100_000)
    with pytest.raises(UserError, match="not a folder of a GPT2LMHeadModel"):
        import_transformers(tmp_path / "out")
    (tmp_path / "out" / file).unlink()
    with pytest.raises(UserError, match=f"{file}.* cannot be read"):
        import_transformers(tmp_path / "out")


def test_the_default_model_is_refused_by_its_name(tmp_path):
    export_transformers(tmp_path, checkpoint_of("gpt"), tmp_path / "out")
    with pytest.raises(UserError, match="model_type=gpt_lightning is not the lecture's model"):
        import_transformers(tmp_path / "out")


def test_new_settings_of_the_lecture_model_keep_its_defaults():
    sizes = {"name": "lecture", "vocab_size": 5, "block_size": 4, "n_embd": 8}
    with pytest.raises(UserError, match="activation=tanh must be one of relu, gelu, gelu_tanh"):
        config_from_dict({**sizes, "activation": "tanh"})
    assert "blocks.0.sa.qkv.bias" not in build_model(config_from_dict(sizes)).state_dict()
