"""A new run that begins with the weights of a checkpoint."""

import pytest
import torch
from conftest import TINY, run

from gpt_lightning.checkpoint import KEY, read_checkpoint
from gpt_lightning.errors import UserError
from gpt_lightning.fine_tuning import begin_from

OLD, NEW = "that is the question: to be or not to be\n" * 40, "Ärger! 42 Übel im Ohr\n" * 80
LAST = "lightning_logs/version_{}/checkpoints/last.ckpt"


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.txt").write_text(OLD)
    (tmp_path / "new.txt").write_text(NEW, encoding="utf-8")
    assert run("fit", *TINY, "--data.corpus=old.txt") == 0
    return read_checkpoint(LAST.format(0))


def test_the_new_run_starts_from_the_old_weights_with_a_larger_vocabulary(old_run, capsys):
    fixed = ["--model.optimizer=adamw", "--model.learning_rate=0", "--model.weight_decay=0"]
    flags = ["--init_from=last", "--data.corpus=new.txt", *fixed, "--trainer.max_steps=1"]
    assert run("fit", *flags, "--trainer.accelerator=cpu", "--data.batch_size=4") == 0
    assert f"start  {LAST.format(0)}, step 4" in capsys.readouterr().out
    new_run = read_checkpoint(LAST.format(1))
    before, after = old_run[KEY], new_run[KEY]
    vocabulary = before["tokenizer"]["vocabulary"]
    grown = after["tokenizer"]["vocabulary"]
    assert grown.startswith(vocabulary) and set(grown) == set(OLD) | set(NEW)
    old, new = (c["state_dict"]["net.token_embedding.weight"] for c in (old_run, new_run))
    assert torch.equal(new[: len(old)], old)
    torch.testing.assert_close(new[len(old) :], old.mean(0).expand(len(grown) - len(old), -1))
    assert run("fit", "--ckpt_path=last", "--trainer.max_steps=3") == 0
    assert read_checkpoint(LAST.format(1))["global_step"] == 3


def test_a_given_setting_must_fit_the_weights(old_run):
    for data, model, message in [
        ({}, {"n_layer": 7}, "^n_layer=7 does not fit init_from=a.ckpt, which has n_layer=1"),
        ({"tokenizer": "byte"}, {}, "^tokenizer=byte does not fit"),
        ({"vocabulary": "ab"}, {}, "^vocabulary=ab cannot be given: init_from=a.ckpt sets it"),
    ]:
        with pytest.raises(UserError, match=message):
            begin_from(old_run, "a.ckpt", {"corpus": "new.txt", **data}, model)


def test_unknown_characters_can_be_dropped_instead(old_run):
    data = {"corpus": "new.txt", "unknown": "drop"}
    begin_from(old_run, "a.ckpt", data, {})
    assert data["vocabulary"] == old_run[KEY]["tokenizer"]["vocabulary"]


def test_resuming_and_starting_anew_exclude_each_other(old_run, capsys):
    assert run("fit", "--init_from=last", "--ckpt_path=last") == 2
    assert "error: --init_from is for a new run" in capsys.readouterr().err
