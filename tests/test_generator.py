"""Generated text against the lecture's loop, naive decoding of windows, and drawn frequencies."""

import itertools
from bisect import bisect_right
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conftest import checkpoint_of, seeded
from lecture_oracle import oracle_of

from gpt_lightning.checkpoint import KEY, describe, model_and_tokenizer
from gpt_lightning.data.tokenizers import ByteTokenizer, CharTokenizer
from gpt_lightning.errors import UserError
from gpt_lightning.generation.generator import TextGenerator, generate
from gpt_lightning.generation.sampling import Sampling
from gpt_lightning.model import build_model
from gpt_lightning.model.attention import causal_attention
from gpt_lightning.model.lecture import BigramConfig, LectureConfig


def lecture_model(block_size=6, vocab_size=9, **more):
    torch.manual_seed(7)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, init_std=0.5, **more)
    return build_model(LectureConfig(vocab_size=vocab_size, block_size=block_size, **sizes))


def successor(vocab_size, after, block_size=4):
    """A bigram model that always continues token i with after[i]."""
    model = build_model(BigramConfig(vocab_size=vocab_size, block_size=block_size))
    with torch.no_grad():
        model.token_embedding_table.weight.zero_()
        for token, next_token in after.items():
            model.token_embedding_table.weight[token, next_token] = 1e4
    return model


def steps(model, ids, n, sampling=None, seed=0):
    """The ids that `generate` yields, a list for each sample."""
    found = generate(model, torch.tensor(ids), n, sampling or Sampling(), seeded(seed))
    return [list(sample) for sample in zip(*found, strict=True)]


def windows(text, prompt, n, block_size=6):
    """The window at each of n steps: all tokens so far; a full one restarts with three quarters."""
    start = max(0, prompt - block_size)
    for end in range(prompt, prompt + n):
        if end - start > block_size:
            start = end - 1 - block_size * 3 // 4
        yield text[start:end]


@pytest.mark.parametrize(
    ("block_size", "prompt"), [(1, 1), (2, 6), (6, 1), (6, 5), (6, 6), (6, 20), (16, 7)]
)
def test_greedy_text_equals_the_lecture_model_on_each_whole_window(block_size, prompt):
    model = lecture_model(block_size).eval()
    ids = torch.randint(9, (3, prompt), generator=seeded(2))
    generated = steps(model, ids.tolist(), 30, Sampling(temperature=0))
    oracle = oracle_of(model)
    for sample, before in zip(generated, ids.tolist(), strict=True):
        text = before + sample
        seen = windows(text, prompt, 30, block_size)
        assert sample == [int(oracle(torch.tensor([ids]))[0][0, -1].argmax()) for ids in seen]


def test_draws_invert_the_lecture_model_s_distribution():
    """One random number for each sample and step, drawn from the seed."""
    model = lecture_model(vocab_size=5)
    oracle, found = oracle_of(model), steps(model, [[0], [3]], 5, seed=3)
    numbers = torch.rand(5, 2, generator=seeded(3))
    for row, text in enumerate(([0], [3])):
        for number in numbers[:, row].tolist():
            probs = F.softmax(oracle(torch.tensor([text]))[0][0, -1].double(), dim=-1)
            text.append(bisect_right(probs.cumsum(0).tolist(), number))
        assert found[row] == text[1:]


def test_each_token_is_computed_once_until_the_window_restarts():
    model, seen = lecture_model(), []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    steps(model, [[1, 2, 3, 4]], 8)
    # 4 tokens, two more that fill the window of 6, then the last 4 of those and the next one
    assert seen == [4, 1, 1, 5, 1, 5, 1, 5]


def test_the_seed_decides_the_text():
    model = lecture_model()
    first = steps(model, [[1, 2]] * 2, 40, seed=5)
    assert steps(model, [[1, 2]] * 2, 40, seed=6) != first
    assert first[0] != first[1]  # samples of one prompt are drawn independently
    torch.manual_seed(999)  # torch's global generator is not used
    assert steps(model, [[1, 2]] * 2, 40, seed=5) == first


@pytest.mark.parametrize("mode", [True, False])
def test_eval_mode_without_gradients_during_generation_only(mode):
    model = lecture_model(dropout=0.5).train(mode)
    seen = []
    model.register_forward_pre_hook(
        lambda module, _: seen.append((module.training, torch.is_grad_enabled()))
    )
    found = generate(model, torch.tensor([[1]]), 5, Sampling(), seeded())
    next(found)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    next(found)
    assert seen == [(False, False)] * 2  # each step is yielded before the next is computed
    found.close()
    assert all(module.training is mode for module in model.modules())


# --- TextGenerator --------------------------------------------------------------------------------

LETTERS = CharTokenizer("\n abcdef")


@pytest.fixture
def letters():
    return TextGenerator(lecture_model(vocab_size=8), LETTERS)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of `letters` with what generation needs of it."""
    model = lecture_model(vocab_size=8)
    corpus = {"name": "a text", "sha256": "0" * 64, "split": "tail", "val_fraction": 0.1}
    weights = {f"net.{name}": weight for name, weight in model.state_dict().items()}
    entry = describe(model.config, LETTERS.state(), corpus, None)
    torch.save({"state_dict": weights, "global_step": 0, KEY: entry}, tmp_path / "best.ckpt")
    return tmp_path / "best.ckpt"


def speller(text):
    """A generator over bytes that begins with `text`, whose bytes all differ."""
    path = [*b"\n", *text.encode()]
    assert len(set(path)) == len(path)
    return TextGenerator(successor(256, dict(itertools.pairwise(path))), ByteTokenizer())


def test_a_loaded_generator_equals_the_saved_model(saved, letters):
    loaded = TextGenerator.load(saved)
    assert not loaded.model.training and loaded.tokenizer.vocabulary == "\n abcdef"
    text = loaded.generate("fad", max_new_tokens=30, seed=3)
    assert text == letters.generate("fad", max_new_tokens=30, seed=3)
    ids = steps(letters.model, [[7, 2, 5]], 30, seed=3)[0]
    assert text == ["fad" + "".join("\n abcdef"[i] for i in ids)]


def test_streamed_pieces_join_to_the_generated_texts(letters):
    settings = dict(max_new_tokens=60, seed=2, num_samples=3, stop=["b"])
    generated = letters.generate("face", **settings)
    pieces = list(letters.stream("face", **settings))
    assert all(len(step) == 3 for step in pieces)
    assert ["face" + "".join(sample) for sample in zip(*pieces, strict=True)] == generated
    # each text ends with the stop or has the full length
    assert all(t[4:].find("b") == len(t) - 5 if "b" in t else len(t) == 64 for t in generated)
    assert len(set(generated)) == 3
    assert letters.generate("face", **{**settings, "seed": 3}) != generated


def test_a_stop_ends_one_sample_and_others_continue():
    writer = speller("abcdefghijkl")
    found = [list(s) for s in zip(*writer.stream("a", max_new_tokens=5, stop=["cde"]), strict=True)]
    assert found == [["b", "c", "d", "e", ""]]  # the stop is included; "" is the end of the text
    assert writer.generate("cde", max_new_tokens=3, stop=["cde", "de"]) == ["cdefgh"]
    assert writer.generate("a", max_new_tokens=9, stop="c") == ["abc"]  # a string is one stop


def test_stops_do_not_change_the_other_samples(letters):
    settings = dict(max_new_tokens=40, num_samples=4, seed=8)
    free = [text[1:] for text in letters.generate("f", **settings)]
    stop = free[0][3:5]
    expected = [text[: text.find(stop) + 2] if stop in text else text for text in free]
    assert len({len(text) for text in expected}) > 1
    assert [t[1:] for t in letters.generate("f", **settings, stop=[stop])] == expected


def test_banned_strings_do_not_occur(letters):
    settings = dict(max_new_tokens=300, num_samples=5, seed=1)
    free = letters.generate("e", **settings)
    ban = ["e", *(text[50:52] for text in free), free[0][60:63]]
    banned = letters.generate("e", **settings, ban=ban)
    assert not any(string in text[1:] for text in banned for string in ban)
    assert all(len(text) == 301 for text in banned)
    with pytest.raises(UserError, match="^ban=.* leaves no token"):
        letters.generate("a", ban=list("\n abcdef"))


def test_a_shorter_text_is_the_beginning_of_a_longer_one(letters):
    short = letters.generate("abc", max_new_tokens=20, seed=3, num_samples=3)
    long = letters.generate("abc", max_new_tokens=300, seed=3, num_samples=3)
    assert [text[: len("abc") + 20] for text in long] == short


def test_bytes_are_streamed_as_whole_characters():
    text = "é€🙃"
    writer = speller(text)
    pieces = [piece for (piece,) in writer.stream(max_new_tokens=9)]
    assert pieces == ["", "é", "", "", "€", "", "", "", "🙃", ""]
    assert writer.generate(max_new_tokens=9, stop=["🙃"]) == [text]
    assert writer.generate(max_new_tokens=4) == ["é\N{REPLACEMENT CHARACTER}"]  # incomplete


def test_an_unknown_character_raises_and_is_named(letters):
    with pytest.raises(UserError, match=r"^prompt: .*☃.*U\+2603"):
        letters.generate("cab\N{SNOWMAN}")
    for unknown in ("error", "drop", "replace"):  # what is dropped from a prompt stays in a stop
        letters.tokenizer.unknown = unknown
        with pytest.raises(UserError, match="^stop='az' .* never occurs"):
            letters.generate("cab", stop=["a", "az"])


def test_unknown_characters_are_dropped_or_replaced_on_request(saved):
    dropping = TextGenerator.load(saved, unknown="drop")
    assert dropping.generate("c☃ab")[0][4:] == dropping.generate("cab")[0][3:]
    replacing = TextGenerator.load(saved, unknown="replace")  # by a space, in this vocabulary
    assert replacing.generate("☃")[0][1:] == replacing.generate(" ")[0][1:]


def test_an_empty_prompt_starts_after_the_separator_of_documents(letters, saved):
    checkpoint = torch.load(saved, weights_only=True)
    for data, start in (({}, "\n"), ({"separator": ""}, "\n"), ({"separator": "fed"}, "fed")):
        checkpoint[KEY]["settings"] = {"data": data}
        torch.save(checkpoint, saved)
        expected = letters.generate(start)[0].removeprefix(start)
        assert TextGenerator.load(saved).generate() == [expected]


@pytest.mark.parametrize("unknown", ["error", "drop"])
def test_an_empty_prompt_starts_a_line_or_follows_the_first_token(letters, unknown):
    text = letters.generate(seed=4)[0]
    assert text == letters.generate("\n", seed=4)[0].removeprefix("\n")
    generator = TextGenerator(successor(3, {0: 1, 1: 2, 2: 0}), CharTokenizer("abc", unknown))
    assert generator.generate("", max_new_tokens=4) == ["bcab"]


@pytest.mark.parametrize(
    "settings",
    [dict(max_new_tokens=0), dict(num_samples=0), dict(stop=["a", ""]), dict(ban=[""])],
    ids=str,
)
def test_settings_out_of_range_raise(letters, settings):
    with pytest.raises(UserError, match=f"^{next(iter(settings))}=.* must "):
        letters.generate("a", **settings)


@pytest.mark.parametrize("name", ["gpt", "lecture"])
def test_attention_is_the_softmax_of_the_allowed_scores_of_each_layer_and_head(name):
    checkpoint = checkpoint_of(name)
    model, tokenizer = model_and_tokenizer(checkpoint, "")
    scores = []

    def recorded(q, k, v, scale, dropout=0.0):
        scores.append(torch.einsum("bhid,bhjd->bhij", q, k)[0] * scale)
        return causal_attention(q, k, v, scale, dropout)

    with patch(f"gpt_lightning.model.{name}.causal_attention", recorded), torch.no_grad():
        model(torch.tensor(tokenizer.encode("a bad\n c")[None].astype("int64")))
    weights = TextGenerator(model, tokenizer).attention("a bad\n c")
    assert weights.shape == (2, 2, 8, 8)
    for t in range(8):  # row t: the tokens up to t
        expected = torch.stack(scores)[:, :, t, : t + 1].softmax(-1)
        torch.testing.assert_close(weights[:, :, t, : t + 1], expected, rtol=1e-5, atol=1e-6)
    assert weights.triu(1).count_nonzero() == 0


def test_attention_is_for_texts_that_fit_and_for_models_that_have_it():
    generator = TextGenerator(*model_and_tokenizer(checkpoint_of("lecture"), ""))
    for text in ("", "a" * 9):
        with pytest.raises(UserError, match=f"text has {len(text)} tokens; .* 1 to 8"):
            generator.attention(text)
    with pytest.raises(UserError, match="name=bigram: this model has no attention"):
        TextGenerator(*model_and_tokenizer(checkpoint_of("bigram"), "")).attention("a")
