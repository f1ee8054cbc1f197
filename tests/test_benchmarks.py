"""What the benchmarks read and compute; no test asserts a speed."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch import nn

from benchmarks import big_text, common, generation, loss, nanogpt
from benchmarks.__main__ import main


def test_a_run_of_fit_gives_the_figures_of_its_closing_table(monkeypatch, session_cache):
    monkeypatch.setitem(common.ENVIRONMENT, "GPT_LIGHTNING_CACHE", str(session_cache))
    figures = common.fit(*TINY, "--data.corpus=playwright:3:9000")
    assert figures["steps"] == 4 and 0 < figures["loss"] < 10
    assert 0 < figures["training"] < figures["command"] and figures["memory"] > 10
    assert figures["chars_per_second"] == pytest.approx(4 * 8 * 4 / figures["training"])


def test_the_closing_table_is_read_below_a_sample_that_looks_like_it():
    output = """\
steps            9

steps            1,240
training alone   6.40 s
characters seen  184,320 (0.2 epochs)
final val loss   1.9036 nats per character (2.7463 bits)
"""
    expected = {"loss": 1.9036, "training": 6.4, "steps": 1240, "chars_per_second": 28800.0}
    assert common.read_closing_table(output) == pytest.approx(expected)


def test_the_log_of_nanogpt_is_summed_without_its_evaluations():
    log = "step 0: train loss 4.2, val loss 4.2\niter 0: loss 4.2, time 900.00ms, mfu -100.00%\n"
    log += "".join(f"iter {i}: loss 3.0, time 30.00ms, mfu 1.00%\n" for i in range(1, 30))
    log += "step 30: train loss 2.5, val loss 2.6\nsaving checkpoint to out\n"
    log += "iter 30: loss 2.5, time 530.00ms, mfu 1.00%\n"
    expected = {"training": 31 * 0.03, "steps": 31, "chars_per_second": 768 / 0.03}
    assert nanogpt.read_log(log) == pytest.approx(expected)


class Peer(nn.Module):
    """A model with nanoGPT's interface: the logits of a token follow from that token alone."""

    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(5, 5)

    def forward(self, ids, targets):
        return self.table(ids), None


@pytest.mark.parametrize("length", [2, 13, 17])
def test_the_loss_of_nanogpt_is_exact(tmp_path, length):
    torch.manual_seed(length)
    model = Peer(None)
    weights = {f"_orig_mod.{name}": w for name, w in model.state_dict().items()}
    torch.save({"model": weights, "model_args": {"block_size": 4}}, tmp_path / "ckpt.pt")
    module = SimpleNamespace(GPT=Peer, GPTConfig=lambda block_size: None)
    ids = torch.randint(5, (length,))
    expected = F.cross_entropy(model.table(ids[:-1]), ids[1:]).item()
    assert nanogpt.exact_loss(module, tmp_path / "ckpt.pt", ids) == pytest.approx(expected)


def test_a_row_has_the_mean_of_losses_and_medians_of_seconds():
    ours = [{"loss": x, "training": t, "command": t + 1} for x, t in ((1, 2), (2, 9), (3, 3))]
    peers = [{"loss": 1.9, "training": t, "command": 8} for t in (30, 12, 10)]
    cells = loss.row("ours", ours, peers)
    assert cells == ["ours", "2.0000 ± 1.0000", "3", "3.0 s", "1/4.0", "4.0 s", "1/2.0"]
    assert loss.row("ours", ours[:1], [])[1:] == ["1.0000", "1", "2.0 s", "", "3.0 s", ""]


def test_results_are_written_with_their_machine_and_lists_in_a_line(tmp_path, capsys):
    table = common.markdown(["", "a"], [["x", "1"]])
    assert table == "|  | a |\n| --- | ---: |\n| x | 1 |\n"
    runs = common.columns([{"s": 1.234567, "n": 10}, {"s": 2.0, "n": 123456}])
    common.write_results(tmp_path / "new", "some", {"runs": runs}, table)
    text = (tmp_path / "new" / "some.json").read_text()
    assert '"s": [ 1.2346, 2.0 ]' in text
    assert json.loads(text)["runs"] == {"s": [1.2346, 2.0], "n": [10, 123456]}
    assert json.loads(text)["machine"]["torch"] == torch.__version__
    assert (tmp_path / "new" / "some.md").read_text() == table and table in capsys.readouterr().out


def test_a_wrong_checkout_ends_with_a_message():
    with pytest.raises(SystemExit, match="--nanogpt=nowhere: no train.py there"):
        main(["same_shape", "--nanogpt=nowhere"])


@pytest.mark.slow
def test_overhead_runs_the_trainer_and_the_plain_loop(tmp_path):
    main(["overhead", "--rounds=1", "--steps=20", f"--out={tmp_path}"])
    figures = json.loads((tmp_path / "overhead.json").read_text())
    assert figures["32-true"]["turns"] == 1 and figures["bf16-mixed"]["loop_ms"] > 0


def test_generation_measures_ours_and_nanogpt(monkeypatch, tmp_path):
    class Model(nn.Module):
        def __init__(self, config):
            super().__init__()

        def generate(self, ids, length, **settings):
            assert length == 2

    (tmp_path / "train.py").touch()
    module = SimpleNamespace(GPT=Model, GPTConfig=SimpleNamespace)
    monkeypatch.setattr(generation, "LENGTH", 2)
    monkeypatch.setattr(generation, "SHAPE", {"n_layer": 1, "n_head": 1, "n_embd": 8})
    monkeypatch.setattr(nanogpt.NanoGPT, "model", lambda self: module)
    figures, table = generation.measure(SimpleNamespace(nanogpt=tmp_path, rounds=3))
    assert len(figures["characters_per_second"]["ours, 32 texts"]) == 3
    assert "| ours (`lecture`) |" in table


def test_preparing_a_text_reports_its_tokens(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be " * 100)
    figures = big_text.prepare(tmp_path / "text.txt", str(tmp_path / "cache"))
    assert figures["tokens"] == 1900 and figures["seconds"] > 0


def test_the_gpu_measurements_run_on_a_cpu(tmp_path, session_cache):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be: that is the question.\n" * 3000)
    command = [sys.executable, "-m", "benchmarks.gpu", "--accelerator=cpu", "--sections=equal,step"]
    command += [f"--text={text}", f"--out={tmp_path}", f"--work={tmp_path / 'work'}"]
    subprocess.run(command, cwd=common.ROOT, check=True, capture_output=True, timeout=300)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    assert [line["name"] for line in lines] == ["gpt, bf16-mixed", "bare eager"]
    assert lines[0]["repeats"] and lines[0]["equal"] and lines[1]["ms"] > 0
