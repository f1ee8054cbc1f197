"""What the benchmarks read and reckon; their speeds are nobody's test."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import big_text, nanogpt, ours, scale, soak, step
from benchmarks.__main__ import main
from benchmarks.loss import line
from benchmarks.report import spread, table, write

CLOSING = """\
step 240  train 1.7501  val 1.9036 nats (2.7463 bits)

steps            1,240
time             8.3 s, validation and samples included
training alone   6.40 s
characters seen  184,320 (0.2 epochs)
final val loss   1.9036 nats per character (2.7463 bits)
best val loss    1.8036 nats (2.7463 bits), step 240
"""


def test_the_closing_table_is_read():
    assert ours.read(CLOSING) == {
        "loss": 1.9036,
        "training": 6.4,
        "steps": 1240,
        "chars_per_second": pytest.approx(28800.0),
    }


def test_nanogpt_s_steps_are_added_up_without_its_evaluations():
    log = "step 0: train loss 4.2, val loss 4.2\niter 0: loss 4.2, time 900.00ms, mfu -100.00%\n"
    log += "".join(f"iter {i}: loss 3.0, time 30.00ms, mfu 1.00%\n" for i in range(1, 30))
    log += "step 30: train loss 2.5, val loss 2.6\nsaving checkpoint to out\n"
    log += "iter 30: loss 2.5, time 530.00ms, mfu 1.00%\n"
    found = nanogpt.read(log)
    assert found["training"] == pytest.approx(31 * 0.03)
    assert found["with_evaluations"] == pytest.approx(0.9 + 29 * 0.03 + 0.53)
    assert found["steps"] == 31 and found["chars_per_second"] == pytest.approx(768 / 0.03)


class Peer(nn.Module):
    """A model with nanoGPT's interface: the logits of a token follow from that token alone."""

    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(5, 5)

    def forward(self, ids, targets):
        return self.table(ids), None


@pytest.mark.parametrize("length", [2, 9, 13, 17])
def test_the_peer_s_loss_is_exact(tmp_path, length):
    torch.manual_seed(length)
    model = Peer(None)
    weights = {f"_orig_mod.{name}": w for name, w in model.state_dict().items()}
    torch.save({"model": weights, "model_args": {"block_size": 4}}, tmp_path / "ckpt.pt")
    peer = object.__new__(nanogpt.NanoGPT)
    peer.val = torch.randint(5, (length,))
    peer.model = lambda: SimpleNamespace(GPT=Peer, GPTConfig=lambda block_size: None)
    expected = F.cross_entropy(model.table(peer.val[:-1]), peer.val[1:]).item()
    assert peer.exact_loss(tmp_path / "ckpt.pt") == pytest.approx(expected, abs=1e-6)


def test_a_row_has_means_of_losses_and_medians_of_seconds():
    mine = [{"loss": x, "training": t, "command": t + 1} for x, t in ((1, 2), (2, 9), (3, 3))]
    peers = [{"loss": 1.9, "training": t, "command": 8} for t in (30, 12, 10)]
    cells = line("ours", mine, peers)
    assert cells == ["ours", "2.0000 ± 1.0000", "3", "3.0 s", "1/4.0", "4.0 s", "1/2.0"]
    assert line("ours", mine[:1], [])[1:] == ["1.0000", "1", "2.0 s", "", "3.0 s", ""]
    assert spread([1.0, 1.0 + math.sqrt(2)], 2) == "1.71 ± 1.00"


def test_figures_are_written_with_the_machine_they_belong_to(tmp_path, capsys):
    text = table(["", "a"], [["x", "1"]])
    assert text == "|  | a |\n| --- | ---: |\n| x | 1 |\n"
    write(tmp_path / "new", "some", {"runs": [1.5]}, text)
    found = json.loads((tmp_path / "new" / "some.json").read_text())
    assert found["runs"] == [1.5] and found["machine"]["torch"] == torch.__version__
    assert (tmp_path / "new" / "some.md").read_text() == text and text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["generation"], "--nanogpt=PATH is missing"),
        (["same_shape", "--nanogpt=nowhere"], "--nanogpt=nowhere: no train.py"),
        (["loss", "--config=none.yaml", "--rounds=0"], "--config=none.yaml: no such file"),
        (["overhead", "--rounds=0"], "--rounds=0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, said, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_operations_are_sorted_by_kind():
    assert step.kind_of("aten::mm") == step.kind_of("aten::baddbmm") == "matrix products"
    assert step.kind_of("aten::copy_") == "copies and conversions"
    assert step.kind_of("aten::mul") == "element by element"


def test_a_step_s_operations_are_counted(tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "data: {block_size: 16, batch_size: 4}\nmodel: {n_layer: 1, n_embd: 16, n_head: 2}\n"
    )
    figures, text = step.measure(config, rounds=2)
    # 12 C^2 weights in a block, C V in the head, and 2 T C for attention's two products
    products = 12 * 16 * 16 + 16 * step.VOCABULARY + 2 * 16 * 16
    assert figures["flop"] == 6 * 64 * products
    for part in ("forward and backward", "optimizer"):
        assert figures["seconds"][part] > 0 and figures["kinds"][part]["matrix products"] > 0
    assert "matrix products" in text and "GFLOP/s" in text


def test_scale_leaves_out_the_first_turn_and_compares_with_the_first_row(monkeypatch):
    calls = []

    def fit(config, *flags):
        calls.append(flags)
        turn = (len(calls) - 1) // len(scale.VARIANTS)
        wide = "--model.n_embd=512" in flags
        return {"chars_per_second": [1.0, 100.0, 300.0][turn] / (1 + wide), "memory": 500 + wide}

    monkeypatch.setattr(ours, "fit", fit)
    figures, text = scale.measure(rounds=2, steps=7)
    assert len(calls) == 3 * len(scale.VARIANTS)
    assert all("--trainer.max_steps=7" in flags for flags in calls)
    assert all(len(runs) == 2 for runs in figures["runs"].values())
    assert "| width 512 | 100 | 0.50 | 501 MB | 1.00 |" in text


def test_a_big_text_is_prepared_its_order_proven_and_its_steps_compared(monkeypatch):
    prepared, fitted = [], []

    def fit(config, *flags):
        path = next(flag.partition("=")[2] for flag in flags if "corpus" in flag)
        fitted.append(path.rpartition("/")[2])
        steps = [2.0, 1.0, 3.0][(len(fitted) - 1) // 2]
        slower = 1.5 if "big" in path else 1.0
        return {"training": steps * slower, "steps": 10, "memory": 500 * slower}

    def prepare(path):
        text = path.read_text(encoding="utf-8")
        prepared.append(text)
        return {"tokens": len(text), "memory": 3.0 + len(prepared), "mb_per_second": 100.0}

    monkeypatch.setattr(ours, "fit", fit)
    monkeypatch.setattr(big_text, "prepare", prepare)
    figures, text = big_text.measure(gigabytes=0.001, rounds=2, steps=10)
    assert fitted == ["big.txt", "small.txt", "small.txt", "big.txt", "big.txt", "small.txt"]
    assert prepared[0].isascii() and "😀" in prepared[2] and "龥" > prepared[2].split()[-1] > "ÿ"
    for whole in prepared:
        assert 1e6 <= len(whole.encode()) < 1.6e6
        assert whole[:250_000] != whole[250_000:500_000]
    assert figures["preparation"]["windows"] == 7030  # of 900,014 tokens, at any of 128 phases
    assert "| of the small text's | 1.500 |" in text and "above the imports' | 6 MB |" in text


def test_an_order_that_is_no_permutation_is_noticed(monkeypatch):
    assert big_text.prove_order(3 * 10**6, 128, epoch=1) == (2_700_000 - 1 - 127) // 128
    permute = big_text.windows.permute
    monkeypatch.setattr(
        big_text.windows, "permute", lambda index, n, *keys: permute(index, n, *keys) // 2 * 2
    )
    with pytest.raises(ValueError, match="epoch 0 of .* windows is no permutation"):
        big_text.prove_order(3 * 10**6, 128, epoch=0)


def test_a_soak_s_trend_is_between_quarters_and_by_the_hour():
    early, late, slope = soak.trend([[minute, 100.0 + 2 * minute] for minute in range(60)])
    assert (early, late, slope) == (114.0, 204.0, pytest.approx(120.0))
    assert len(soak.thin([(i, i) for i in range(1000)])) == soak.POINTS
