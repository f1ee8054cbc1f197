import itertools
import math
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lecture_oracle import BigramLanguageModel, oracle_of

import gpt_lightning
from gpt_lightning.checkpoint import KEY, describe, find_checkpoint, newest_run, read_checkpoint
from gpt_lightning.data.tokenizers import ByteTokenizer, CharTokenizer
from gpt_lightning.generation.engine import generate
from gpt_lightning.generation.sampling import Sampling
from gpt_lightning.generation.writer import Writer
from gpt_lightning.model import build_model, model_settings

ROOT = Path(gpt_lightning.__file__).parents[1]
quick = settings(max_examples=100, deadline=None)

# logits of a few tokens: distinct values, ties, and some that are far apart
some_logits = st.lists(
    st.one_of(st.floats(-8, 8, width=32), st.sampled_from([-30.0, 0.0, 1.0, 2.0])),
    min_size=1,
    max_size=12,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def softmax(logits, temperature=1.0):
    """Probabilities in double precision."""
    scaled = [x / temperature for x in logits]
    weights = [math.exp(x - max(scaled)) for x in scaled]
    return [w / sum(weights) for w in weights]


def probabilities(logits, **kwargs):
    return Sampling(**kwargs).probabilities(torch.tensor([logits]))[0].tolist()


def kept(probs):
    return {i for i, p in enumerate(probs) if p > 0}


def renormalised(probs, keep):
    total = sum(probs[i] for i in keep)
    return [p / total if i in keep else 0.0 for i, p in enumerate(probs)]


def chi_square(counts, probs) -> float:
    """Distance of counts from probabilities, as a standard normal (Wilson and Hilferty)."""
    n, free = sum(counts), len(counts) - 1
    statistic = sum((c - n * p) ** 2 / (n * p) for c, p in zip(counts, probs, strict=True))
    return ((statistic / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))


def one_line(error) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


# --- sampling -------------------------------------------------------------------------------------


@quick
@given(logits=some_logits, seed=st.integers(0, 2**63 - 1))
def test_temperature_0_takes_the_likeliest_whatever_the_seed(logits, seed):
    expected = max(range(len(logits)), key=lambda i: (logits[i], -i))  # the lowest id of a tie
    logits = torch.tensor([logits])
    assert Sampling(temperature=0).sample(logits, seeded(seed)).tolist() == [expected]
    probs = Sampling(temperature=0, top_k=3, top_p=0.5, min_p=0.1).probabilities(logits)
    assert probs[0].tolist() == [float(i == expected) for i in range(len(probs[0]))]


@quick
@given(
    logits=some_logits,
    temperature=st.floats(0.05, 20),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.floats(0.01, 1),
    min_p=st.none() | st.floats(0.01, 1),
)
def test_probabilities_sum_to_1(logits, temperature, top_k, top_p, min_p):
    probs = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert sum(probs) == pytest.approx(1, abs=1e-5)
    assert all(0 <= p <= 1 for p in probs)
    assert len(probs) == len(logits)


@quick
@given(logits=some_logits, temperature=st.floats(0.05, 20))
def test_temperature_divides_the_logits(logits, temperature):
    expected = softmax(logits, temperature)
    assert probabilities(logits, temperature=temperature) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-42, 1e-60, 5e-324])
def test_a_tiny_temperature_tends_to_the_likeliest(temperature):
    logits = [10.0, 30.0, 30.0, -1e30, 29.9]
    found = probabilities(logits, temperature=temperature)
    assert found == pytest.approx([0, 0.5, 0.5, 0, 0], abs=1e-30)
    sampled = Sampling(temperature=temperature).sample(torch.tensor([[1.0, 3.0]]), seeded())
    assert sampled.tolist() == [1]


@pytest.mark.parametrize("temperature", [1e6, 1e38, 1e60, 1.7e308])
def test_a_huge_temperature_tends_to_a_uniform_choice(temperature):
    found = probabilities([1.0, 3.0, -5.0, 0.0], temperature=temperature)
    assert found == pytest.approx([0.25] * 4, abs=1e-4)


def test_huge_logits_do_not_overflow():
    assert probabilities([1e38, -1e38, 1e38]) == [0.5, 0, 0.5]
    assert probabilities([0.0, -math.inf], temperature=0.1) == [1, 0]
    half = Sampling().probabilities(torch.tensor([[6e4, -6e4]], dtype=torch.float16))
    assert half.tolist() == [[1, 0]]


@quick
@given(logits=some_logits, top_k=st.integers(1, 15))
def test_top_k_keeps_exactly_k_ties_or_not(logits, top_k):
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))  # of a tie the lower ids
    keep = set(order[:top_k])
    expected = renormalised(softmax(logits), keep)
    found = probabilities(logits, top_k=top_k)
    assert kept(found) == keep
    assert found == pytest.approx(expected, abs=1e-5)


def test_top_k_among_ties_keeps_the_lower_ids():
    assert probabilities([1.0, 1.0, 1.0, 1.0], top_k=2) == [0.5, 0.5, 0, 0]
    assert probabilities([0.0, 5.0, 0.0, 0.0], top_k=2)[2:] == [0, 0]
    assert kept(probabilities([0.0, 1.0] * 5000, top_k=300)) == set(range(1, 600, 2))


@quick
@given(
    logits=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=7), top_p=st.floats(0.01, 1)
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, top_p):
    probs, found = softmax(logits), probabilities(logits, top_p=top_p)
    keep = kept(found)
    mass = sum(probs[i] for i in keep)
    tiny = 1e-5  # single precision
    assert mass >= top_p - tiny
    for size in range(len(keep)):  # every smaller set there is falls short
        for other in itertools.combinations(probs, size):
            assert sum(other) < top_p + tiny
    for other in itertools.combinations(probs, len(keep)):  # and none as small has more
        assert sum(other) <= mass + tiny
    assert found == pytest.approx(renormalised(probs, keep), abs=1e-5)


def test_top_p_on_probabilities_by_hand():
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    for top_p, keep in [(0.01, {1}), (0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3})]:
        assert kept(probabilities(logits, top_p=top_p)) == keep
    assert kept(probabilities(logits, top_p=0.71)) == {1, 2, 3}
    assert kept(probabilities(logits, top_p=1.0)) == {0, 1, 2, 3}
    assert kept(probabilities([0.0] * 4, top_p=0.6)) == {0, 1, 2}


@quick
@given(logits=some_logits, min_p=st.floats(0.01, 1))
def test_min_p_keeps_what_has_that_share_of_the_likeliest(logits, min_p):
    probs, found = softmax(logits), probabilities(logits, min_p=min_p)
    keep = kept(found)
    for i, p in enumerate(probs):
        if abs(p - min_p * max(probs)) > 1e-6 * max(probs):  # not on the edge, as rounding goes
            assert (i in keep) == (p > min_p * max(probs))
    assert found == pytest.approx(renormalised(probs, keep), abs=1e-5)


def test_filters_apply_each_to_what_the_one_before_left():
    probs = [0.4, 0.3, 0.2, 0.1]
    logits = [math.log(p) for p in probs]
    # of three tokens the first has 4/9, so top_p = 0.44 needs one; of all four it would need two
    assert kept(probabilities(logits, top_k=3, top_p=0.44)) == {0}
    assert kept(probabilities(logits, top_p=0.44)) == {0, 1}
    # the temperature comes first: squared, the first has 16/30
    assert kept(probabilities(logits, temperature=0.5, top_p=0.5)) == {0}
    assert kept(probabilities(logits, top_p=0.5)) == {0, 1}
    assert kept(probabilities(logits, temperature=0.5, min_p=0.5)) == {0, 1}
    assert kept(probabilities(logits, min_p=0.5)) == {0, 1, 2}
    assert kept(probabilities(logits, top_k=3, top_p=0.95, min_p=0.6)) == {0, 1}


def test_each_sample_of_a_batch_is_filtered_alone():
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    sampling = Sampling(temperature=0.7, top_k=2, top_p=0.9, min_p=0.05)
    alone = [sampling.probabilities(row[None])[0] for row in logits]
    assert torch.equal(sampling.probabilities(logits), torch.stack(alone))
    assert torch.equal(logits[0], torch.tensor([0.0, 1.0, 2.0]))  # left as they were


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits, generator = [0.3, -1.0, 1.2, 0.0, -0.4], seeded(1)
    for settings_ in (dict(), dict(temperature=0.6), dict(temperature=2.0, top_k=3)):
        probs = softmax(logits, settings_.get("temperature", 1.0))
        if "top_k" in settings_:
            probs = renormalised(probs, {0, 2, 3})
        batch = torch.tensor([logits]).repeat(20000, 1)
        drawn = Sampling(**settings_).sample(batch, generator).bincount(minlength=5).tolist()
        assert all(c == 0 for c, p in zip(drawn, probs, strict=True) if p == 0)
        counts = [c for c, p in zip(drawn, probs, strict=True) if p > 0]
        assert chi_square(counts, [p for p in probs if p > 0]) < 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_k", -3),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", 0.0),
        ("min_p", -0.2),
        ("min_p", 1.5),
    ],
)
def test_a_setting_out_of_range_is_refused_in_one_line(name, value):
    with pytest.raises(ValueError) as error:
        Sampling(**{name: value})
    assert one_line(error).startswith(f"--{name}={value} must be")


# --- engine ---------------------------------------------------------------------------------------


def lecture_model(block_size=6, vocab_size=9, **more):
    torch.manual_seed(7)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, init_std=0.5, **more)
    return build_model("lecture", vocab_size=vocab_size, block_size=block_size, **sizes)


def chain(vocab_size, after, block_size=4):
    """A bigram that goes from token i to after[i], for sure."""
    model = build_model("bigram", vocab_size=vocab_size, block_size=block_size)
    with torch.no_grad():
        model.token_embedding_table.weight.zero_()
        for token, next_token in after.items():
            model.token_embedding_table.weight[token, next_token] = 1e4
    return model


def steps(model, ids, n, sampling=None, seed=0, stop=()):
    """Everything that `generate` yields, a list of samples."""
    found = generate(model, torch.tensor(ids), n, sampling or Sampling(), seeded(seed), stop)
    return [list(sample) for sample in zip(*found, strict=True)]


def windows(text, prompt, n, block_size=6):
    """What the model is to see at each of n steps: all so far, and of a full window three quarters
    and what comes after, until that is full."""
    start = max(0, prompt - block_size)
    for end in range(prompt, prompt + n):
        if end - start > block_size:
            start = end - 1 - block_size * 3 // 4
        yield text[start:end]


@pytest.mark.parametrize("prompt", [1, 5, 6, 7, 20])
@pytest.mark.parametrize("block_size", [1, 2, 6, 16])
def test_greedy_text_is_what_the_lecture_s_model_says_of_each_whole_window(prompt, block_size):
    model = lecture_model(block_size).eval()
    ids = torch.randint(9, (3, prompt), generator=seeded(2))
    written = steps(model, ids.tolist(), 30, Sampling(temperature=0))
    oracle = oracle_of(model)
    for sample, before in zip(written, ids.tolist(), strict=True):
        text = before + sample
        seen = windows(text, prompt, 30, block_size)
        assert sample == [int(oracle(torch.tensor([ids]))[0][0, -1].argmax()) for ids in seen]


@pytest.mark.parametrize("prompt", [1, 4])
def test_up_to_block_size_the_text_is_that_of_the_lecture_s_loop(prompt):
    model = lecture_model(block_size=12).eval()
    ids = torch.randint(9, (2, prompt), generator=seeded(2))
    oracle, naive = oracle_of(model), ids
    for _ in range(12 - prompt + 1):
        logits = oracle(naive[:, -12:])[0][:, -1, :]
        naive = torch.cat([naive, logits.argmax(-1, keepdim=True)], dim=1)
    n = naive.shape[1] - prompt
    assert steps(model, ids.tolist(), n, Sampling(temperature=0)) == naive[:, prompt:].tolist()


def test_draws_are_those_of_the_lecture_s_generate():
    """In sorted order, in which we draw too: then one seed gives the oracle's very tokens."""
    model = chain(5, {})
    with torch.no_grad():  # every row falls with the id
        model.token_embedding_table.weight.copy_(torch.linspace(1, -1, 5).repeat(5, 1))
    oracle = BigramLanguageModel(5)
    oracle.load_state_dict(model.state_dict())
    ids, generator = torch.zeros(2, 1, dtype=torch.long), seeded(3)
    for _ in range(50):
        probs = F.softmax(oracle(ids)[0][:, -1, :], dim=-1)
        ids = torch.cat([ids, torch.multinomial(probs, 1, generator=generator)], dim=1)
    assert steps(model, [[0], [0]], 50, seed=3) == ids[:, 1:].tolist()


def test_a_token_is_read_once_until_the_window_starts_anew():
    model, seen = lecture_model(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()[0]))
    (written,) = steps(model, [[1, 2, 3, 4]], 8)
    text = [1, 2, 3, 4, *written]
    # 4 tokens, two more that fill the window of 6, then the last 4 of those and the next one
    assert seen == [
        text[:4], text[4:5], text[5:6], text[2:7], text[7:8], text[4:9], text[9:10], text[6:11],
    ]  # fmt: skip


def test_tokens_follow_the_model_s_probabilities():
    torch.manual_seed(1)
    model = build_model("bigram", vocab_size=4, block_size=2, init_std=1.0)
    (written,) = steps(model, [[0]], 8000, seed=3)
    pairs = list(zip([0, *written], written, strict=False))
    table = model.token_embedding_table.weight.tolist()
    for token in range(4):
        counts = [pairs.count((token, i)) for i in range(4)]
        assert sum(counts) > 100
        assert chi_square(counts, softmax(table[token])) < 4


def test_the_same_seed_draws_the_same_and_another_seed_does_not():
    model = lecture_model()
    first = steps(model, [[1, 2]] * 2, 40, seed=5)
    assert steps(model, [[1, 2]] * 2, 40, seed=5) == first
    assert steps(model, [[1, 2]] * 2, 40, seed=6) != first
    assert first[0] != first[1]  # samples of one prompt are drawn apart
    torch.manual_seed(999)  # nothing but the generator decides
    assert steps(model, [[1, 2]] * 2, 40, seed=5) == first


def test_samples_of_a_batch_do_not_see_each_other():
    model = lecture_model()
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 0]]
    greedy = Sampling(temperature=0)
    together = steps(model, prompts, 12, greedy)
    assert together == [steps(model, [prompt], 12, greedy)[0] for prompt in prompts]


def test_a_stop_ends_a_sample_exactly_there_and_the_others_go_on():
    model = chain(10, {i: (i + 1) % 10 for i in range(10)})
    found = steps(model, [[0], [4], [7]], 9, stop=[[3, 4], [8, 9, 0]])
    assert found[0] == [1, 2, 3, 4, None, None]  # both tokens of the stop are written
    assert found[1] == [5, 6, 7, 8, 9, 0]
    assert found[2] == [8, 9, 0, None, None, None]
    assert steps(model, [[0], [1]], 50, stop=[[3]]) == [[1, 2, 3], [2, 3, None]]  # all have ended


def test_a_stop_in_the_prompt_does_not_count():
    model = chain(10, {i: (i + 1) % 10 for i in range(10)})
    assert steps(model, [[3, 4]], 3, stop=[[3, 4]]) == [[5, 6, 7]]
    assert steps(model, [[3]], 3, stop=[[3, 4]]) == [[4, 5, 6]]  # half of it is in the prompt


def test_other_samples_draw_the_same_whether_or_not_one_has_ended():
    model = lecture_model()
    free = steps(model, [[1], [2]], 25, seed=8)
    stop = free[0][3:5]
    stopped = steps(model, [[1], [2]], 25, seed=8, stop=[stop])
    ends = [next((i + 2 for i in range(24) if s[i : i + 2] == stop), 25) for s in free]
    assert ends[0] <= 5
    expected = [s[:end] + [None] * (25 - end) for s, end in zip(free, ends, strict=True)]
    assert stopped == [s[: max(ends)] for s in expected]


def test_each_step_is_yielded_before_the_next_is_computed():
    model, calls = lecture_model(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = generate(model, torch.tensor([[1]]), 5, Sampling(), seeded())
    assert calls == []
    next(found)
    assert len(calls) == 1
    next(found)
    assert len(calls) == 2


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("end", ["run to its end", "closed", "abandoned", "an error"])
def test_the_model_s_mode_is_as_it_was_afterwards(mode, end):
    model = lecture_model(dropout=0.5).train(mode)
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    found = generate(model, torch.tensor([[1]]), 3, Sampling(), seeded())
    assert model.training is mode
    next(found)
    assert model.training is False  # while it goes on
    if end == "run to its end":
        list(found)
    elif end == "closed":
        found.close()
    elif end == "abandoned":
        del found
    else:
        with pytest.raises(KeyError):
            found.throw(KeyError())
    assert model.training is mode
    assert all(module.training is mode for module in model.modules())
    assert not any(seen)


def test_gradients_are_off_in_the_model_and_as_the_caller_has_them_between_the_steps():
    model, seen = lecture_model(), []
    hook = model.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    list(generate(model, torch.tensor([[1]]), 2, Sampling(), seeded()))
    assert seen == [False, False]
    hook.remove()
    for _ in generate(model, torch.tensor([[1]]), 2, Sampling(), seeded()):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert model(torch.tensor([[1]])).requires_grad


# --- writer ---------------------------------------------------------------------------------------


TEXT = {"name": "a text", "sha256": "0" * 64, "split": "tail", "val_fraction": 0.1}


def save(path, model, tokenizer, name="bigram", **entry):
    """A checkpoint as training would leave one, less what only the Trainer needs."""
    kept = describe(model_settings(name, model), tokenizer.state(), TEXT) | entry
    weights = {f"net.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"state_dict": {**weights, "val_loss.value": torch.zeros(1)}, KEY: kept}, path)
    return path


@pytest.fixture
def saved(tmp_path):
    tokenizer = CharTokenizer("\n abcdef")
    model = lecture_model(vocab_size=8)
    return save(tmp_path / "best.ckpt", model, tokenizer, "lecture")


def speller(text, start="\n"):
    """A writer in bytes that goes on from `start` with `text`, whose bytes are all different."""
    path = [*start.encode()[-1:], *text.encode()]
    assert len(set(path)) == len(path)
    return Writer(chain(256, dict(itertools.pairwise(path))), ByteTokenizer())


def test_a_loaded_writer_is_the_model_that_was_saved(saved):
    writer = Writer.load(saved)
    assert writer.tokenizer.vocabulary == "\n abcdef"
    assert not writer.model.training
    model = lecture_model(vocab_size=8).eval()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(writer.model(ids), model(ids))
    assert writer.write("fad", max_new_tokens=30, seed=3)[0] == "fad" + "".join(
        "\n abcdef"[i] for i in steps(model, [[7, 2, 5]], 30, seed=3)[0]
    )


def test_streaming_writes_what_writing_does(saved):
    writer = Writer.load(saved)
    settings_ = dict(max_new_tokens=60, seed=2, num_samples=3, stop=["b"])
    written = writer.write("face", **settings_)
    pieces = list(writer.stream("face", **settings_))
    assert ["face" + "".join(sample) for sample in zip(*pieces, strict=True)] == written
    assert all(len(step) == 3 for step in pieces)
    assert all(text.startswith("face") for text in written)
    # each ends with the stop, or is as long as it may be
    assert all(t[4:].find("b") == len(t) - 5 if "b" in t else len(t) == 64 for t in written)
    assert len(set(written)) == 3
    assert writer.write("face", **settings_) == written
    assert writer.write("face", **{**settings_, "seed": 3}) != written


def test_temperature_0_writes_the_same_text_for_every_seed(saved):
    writer, greedy = Writer.load(saved), Sampling(temperature=0)
    texts = {writer.write("a", sampling=greedy, seed=seed)[0] for seed in range(3)}
    assert len(texts) == 1 and len(texts.pop()) == 501


def test_bytes_are_streamed_as_whole_characters():
    text = "é€🙃"
    writer = speller(text)
    pieces = [piece for (piece,) in writer.stream(max_new_tokens=9)]
    assert pieces == ["", "é", "", "", "€", "", "", "", "🙃", ""]
    assert writer.write(max_new_tokens=9) == [text]


def test_a_character_that_is_cut_short_is_marked_at_the_end():
    pieces = [piece for (piece,) in speller("é€").stream(max_new_tokens=4)]
    assert pieces == ["", "é", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_stop_of_several_bytes_ends_the_text():
    assert speller("é€🙃").write(max_new_tokens=99, stop=["€"]) == ["é€"]


def test_a_prompt_of_several_bytes_is_gone_on_from():
    assert speller("é🙃", start="€").write("€", max_new_tokens=6) == ["€é🙃"]


def test_an_unknown_character_of_the_prompt_is_named_in_one_line(saved):
    with pytest.raises(ValueError) as error:
        Writer.load(saved).write("cab\N{SNOWMAN}")
    message = one_line(error)
    assert message.startswith("--prompt: ") and "☃" in message and "SNOWMAN" in message
    with pytest.raises(ValueError, match=r"^--stop: .*'z'") as error:
        Writer.load(saved).write("cab", stop=["a", "z"])
    one_line(error)


def test_unknown_characters_are_dropped_where_that_is_asked_for(saved):
    writer = Writer.load(saved, unknown="drop")
    written = [text.removeprefix("c☃ab") for text in writer.write("c☃ab", seed=1)]
    assert written == [text.removeprefix("cab") for text in writer.write("cab", seed=1)]
    replacing = Writer.load(saved, unknown="replace")  # by a blank, here
    assert [text[1:] for text in replacing.write("☃", seed=1)] == [
        text[1:] for text in replacing.write(" ", seed=1)
    ]


def test_an_empty_prompt_begins_a_line(saved):
    writer = Writer.load(saved)
    assert writer.write("", seed=4)[0] == writer.write("\n", seed=4)[0].removeprefix("\n")
    assert writer.write(seed=4) == writer.write("", seed=4)


@pytest.mark.parametrize("unknown", ["error", "drop", "replace"])
def test_an_empty_prompt_does_where_the_vocabulary_has_no_line_end(unknown):
    writer = Writer(chain(3, {0: 1, 1: 2, 2: 0}), CharTokenizer("abc", unknown))
    assert writer.write("", max_new_tokens=4) == ["bcab"]  # as if after the first token, an a


@pytest.mark.parametrize(
    ("settings_", "flag"),
    [
        (dict(max_new_tokens=0), "--max_new_tokens=0"),
        (dict(num_samples=0), "--num_samples=0"),
        (dict(stop=["a", ""]), "--stop=''"),
    ],
)
def test_a_writer_refuses_what_cannot_be_in_one_line(saved, settings_, flag):
    with pytest.raises(ValueError) as error:
        Writer.load(saved).write("a", **settings_)
    assert one_line(error).startswith(flag)


def test_weights_of_another_model_are_refused_in_one_line(tmp_path):
    tokenizer = CharTokenizer("abc")
    path = save(tmp_path / "a.ckpt", chain(3, {}), tokenizer)
    checkpoint = torch.load(path)
    checkpoint[KEY]["model"]["vocab_size"] = 4
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"a\.ckpt: .* does not fit its weights") as error:
        Writer.load(path)
    one_line(error)


def test_a_modern_gpt_that_knew_pairs_alone_writes_on(tmp_path):
    tokenizer = CharTokenizer("\n abcdef")
    settings = dict(block_size=6, n_layer=1, n_head=2, n_embd=16, n_gram=2)
    model = build_model("gpt", vocab_size=8, **settings)
    torch.nn.init.normal_(model.lm_head.weight, std=5.0, generator=seeded())
    expected = Writer(model, tokenizer).write("abc", max_new_tokens=30)
    path = save(tmp_path / "old.ckpt", model, tokenizer, "gpt")
    checkpoint = torch.load(path)
    del checkpoint[KEY]["model"]["n_gram"]
    torch.save(checkpoint, path)
    assert Writer.load(path).write("abc", max_new_tokens=30) == expected


def test_a_writer_needs_no_lightning(saved):
    code = (
        "import sys; from gpt_lightning.generation.writer import Writer; "
        f"text = Writer.load({str(saved)!r}).write('a', max_new_tokens=5)[0]; "
        "assert len(text) == 6; "
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('lightning', 'pytorch_lightning', 'lightning_fabric', 'torchmetrics', 'jsonargparse')])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert found.stderr == "" and found.stdout.strip() == "[]"


# --- checkpoints: reading -------------------------------------------------------------------------


class RunsCode:
    """Pickled, it would make the file named when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def refused(path) -> str:
    with pytest.raises(ValueError) as error:
        read_checkpoint(path)
    message = one_line(error)
    assert message.startswith(f"--ckpt_path={path}")
    return message


def test_a_checkpoint_is_read_as_it_was_written(saved):
    found = read_checkpoint(saved)
    assert found[KEY]["model"]["name"] == "lecture" and found[KEY]["format"] == 1
    assert found[KEY]["tokenizer"] == {"kind": "char", "vocabulary": "\n abcdef"}
    assert found[KEY]["corpus"] == TEXT
    expected = lecture_model(vocab_size=8).state_dict()
    assert all(torch.equal(found["state_dict"][f"net.{k}"], v) for k, v in expected.items())


def test_a_missing_file_is_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "nothing.ckpt")
    assert "no such file" in refused(tmp_path)


def test_a_torn_file_is_refused_wherever_it_is_torn(saved, recwarn):
    whole = saved.read_bytes()
    for size in [
        0,
        1,
        2,
        3,
        4,
        30,
        64,
        65,
        1000,
        len(whole) // 2,
        len(whole) - 200,
        len(whole) - 1,
    ]:
        saved.write_bytes(whole[:size])
        refused(saved)
    saved.write_bytes(bytes(len(whole)))
    refused(saved)
    saved.write_bytes(whole)
    read_checkpoint(saved)


def test_a_file_with_a_bit_flipped_in_its_weights_is_refused(saved):
    whole = saved.read_bytes()
    weight = lecture_model(vocab_size=8).state_dict()["blocks.1.sa.qkv.weight"]
    at = whole.index(weight.numpy().tobytes())
    for place in (at, at + 500, at + weight.numel() * 4 - 1):
        torn = bytearray(whole)
        torn[place] ^= 64
        saved.write_bytes(torn)
        assert "torn" in refused(saved)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"To be, or not to be",
        "Ob's edler im Gemüt".encode(),
        b"\n",
        b"\x80",
        b"\x80\x02",
        b"PK\x03\x04",
        bytes(range(256)),
        pickle.dumps({"state_dict": {}}),
        pickle.dumps([1, 2]),
    ],
    ids=repr,
)
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    refused(path)


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.txt", "To be, or not to be")
    refused(path)


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(3),
        [1, 2],
        {"state_dict": {}},
        {KEY: {"format": 1}},
        {"state_dict": {}, KEY: 1},
        {"state_dict": {}, KEY: None},
    ],
    ids=str,
)
def test_a_checkpoint_of_another_program_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    assert "not written by gpt_lightning" in refused(tmp_path / "a.ckpt")


@pytest.mark.parametrize("form", ["pickle", "torch", "torch, old"])
def test_code_in_a_file_is_not_run(tmp_path, form):
    canary, path = tmp_path / "canary", tmp_path / "a.ckpt"
    content = {"state_dict": {}, KEY: RunsCode(canary)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    message = refused(path)
    if form == "torch":
        assert "nothing in it was run" in message
    assert not canary.exists()
    # the canary does sing where it is let
    if form == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("number", [0, 2, None])
def test_another_format_is_refused_with_its_number(tmp_path, number):
    path = save(tmp_path / "a.ckpt", chain(3, {}), CharTokenizer("abc"), format=number)
    assert f"has format {number}, this version reads 1" in refused(path)


# --- checkpoints: finding -------------------------------------------------------------------------


def touch(path, seconds):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    os.utime(path, (seconds, seconds))
    return path


@pytest.fixture
def runs(tmp_path):
    """Three runs, of which version_1 was written last."""
    logs = tmp_path / "lightning_logs"
    touch(logs / "version_0/checkpoints/best.ckpt", 100)
    touch(logs / "version_0/checkpoints/last.ckpt", 200)
    touch(logs / "version_1/checkpoints/best.ckpt", 150)
    touch(logs / "version_1/checkpoints/last.ckpt", 300)
    touch(logs / "version_2/checkpoints/best.ckpt", 250)
    touch(logs / "version_2/checkpoints/other.ckpt", 900)
    (logs / "version_3").mkdir()
    return tmp_path


def none_found(which, root=".") -> str:
    with pytest.raises(ValueError) as error:
        find_checkpoint(which, root)
    message = one_line(error)
    assert message.startswith(f"--ckpt_path={which}")
    return message


def test_last_and_best_are_those_of_the_run_written_last(runs, monkeypatch):
    newest = runs / "lightning_logs/version_1"
    assert newest_run(runs) == newest
    assert find_checkpoint("last", runs) == newest / "checkpoints/last.ckpt"
    assert find_checkpoint("best", runs) == newest / "checkpoints/best.ckpt"
    monkeypatch.chdir(runs)
    assert find_checkpoint("best").resolve() == newest / "checkpoints/best.ckpt"
    os.utime(runs / "lightning_logs/version_0/checkpoints/best.ckpt", (400, 400))
    assert newest_run(runs) == runs / "lightning_logs/version_0"


def test_a_run_without_the_one_asked_for_is_not_passed_over(runs):
    os.utime(runs / "lightning_logs/version_2/checkpoints/best.ckpt", (400, 400))
    message = none_found("last", runs)
    assert "version_2" in message and "only best.ckpt" in message


def test_a_folder_without_a_logger_is_a_run_of_its_own(runs):
    last = touch(runs / "checkpoints/last.ckpt", 500)
    assert newest_run(runs) == runs and find_checkpoint("last", runs) == last


def test_a_folder_stands_for_its_best(runs):
    folder = runs / "lightning_logs/version_0"
    assert find_checkpoint(folder) == folder / "checkpoints/best.ckpt"
    assert find_checkpoint(str(folder)) == folder / "checkpoints/best.ckpt"
    assert find_checkpoint(folder / "checkpoints") == folder / "checkpoints/best.ckpt"
    (folder / "checkpoints/best.ckpt").unlink()
    assert find_checkpoint(folder) == folder / "checkpoints/last.ckpt"
    assert "no best.ckpt or last.ckpt" in none_found(runs / "lightning_logs/version_3")


def test_a_file_stands_for_itself(runs, monkeypatch):
    other = runs / "lightning_logs/version_2/checkpoints/other.ckpt"
    assert find_checkpoint(other) == other and find_checkpoint(str(other)) == other
    monkeypatch.setenv("HOME", str(runs))
    assert find_checkpoint("~/lightning_logs/version_2/checkpoints/other.ckpt") == other
    assert "no such file" in none_found(runs / "nothing.ckpt")
    none_found("~a-user-that-is-not-there/best.ckpt")


@pytest.mark.parametrize("which", ["last", "best"])
def test_where_there_is_no_run_the_command_that_makes_one_is_named(tmp_path, which):
    assert newest_run(tmp_path) is None
    assert "python -m gpt_lightning fit" in none_found(which, tmp_path)
