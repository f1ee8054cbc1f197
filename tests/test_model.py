"""Configs and models are built from plain types and described by them."""

import json
import re
from dataclasses import asdict

import pytest
import torch

from gpt_lightning.errors import UserError
from gpt_lightning.model import (
    CONFIGS,
    build_model,
    config_from_dict,
    config_to_dict,
    grown_weights,
    num_parameters,
)
from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.model.lecture import Bigram, BigramConfig, LectureConfig, LectureGPT

SIZES = dict(vocab_size=5, block_size=4)
SWITCHES = dict(bias=False, init_std=None, scaled=False, ffwd=0, residual=False, norm=False)
CASES = [
    (GPT, GPTConfig(2, 2, 16, 0.25, 4, multi_token_heads=2, **SIZES)),
    (LectureGPT, LectureConfig(2, 2, 16, 0.25, proj=False, fused=False, **SWITCHES, **SIZES)),
    (Bigram, BigramConfig(None, **SIZES)),
]


@pytest.mark.parametrize(("kind", "config"), CASES, ids=CONFIGS)
def test_a_model_is_rebuilt_from_its_config_as_json(kind, config):
    plain = config_to_dict(build_model(config).config)
    assert plain == {"name": config.name, **asdict(config)}
    again = build_model(config_from_dict(json.loads(json.dumps(plain))))
    assert type(again) is kind and again.config == config


@pytest.mark.parametrize("config", CONFIGS.values())
def test_missing_settings_have_their_defaults(config):
    assert config_from_dict({"name": config.name}) == config()
    with pytest.raises(ValueError, match="must be set before a model is built"):
        build_model(config(vocab_size=5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "lectern"}, "name=lectern is not a model; choose one of gpt, lecture, bigram"),
        ({}, "name=None is not a model"),
        ({"name": "gpt", "residual": False}, "residual=false is not a setting of the gpt model"),
        ({"name": "gpt", "n_layer": "3"}, 'n_layer="3" must be of type int'),
        ({"name": "gpt", "n_layer": True}, "n_layer=true must be of type int"),
        ({"name": "gpt", "dropout": None}, "dropout=null must be of type float"),
        ({"name": "lecture", "init_std": "x"}, 'init_std="x" must be of type float or null'),
        ({"name": "bigram", "block_size": 1 << 18}, "block_size=262144 must be at most 131072"),
        ({"name": "gpt", "n_head": 3}, "n_embd=128 must be a multiple of twice n_head=3"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_raise(settings, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        config_from_dict(settings)


def test_num_parameters_leaves_out_the_multi_token_heads():
    sizes = dict(n_layer=1, n_embd=16, n_head=2, **SIZES)
    plain, model = (build_model(GPTConfig(**sizes, multi_token_heads=n)) for n in (0, 2))
    assert (
        num_parameters(model) == num_parameters(plain) == sum(p.numel() for p in plain.parameters())
    )


@pytest.mark.parametrize(("kind", "config"), CASES, ids=CONFIGS)
def test_a_grown_vocabulary_leaves_the_logits_of_the_old_tokens(kind, config):
    torch.manual_seed(1)
    model = build_model(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    weights, grown_config = grown_weights(model.state_dict(), config, 8)
    grown = build_model(grown_config).eval()
    grown.load_state_dict(weights)
    ids = torch.randint(5, (16, 4))
    logits = grown(ids)
    torch.testing.assert_close(logits[..., :5], model(ids))
    torch.testing.assert_close(logits[..., 5:], model(ids).mean(-1, keepdim=True).expand(-1, -1, 3))
    assert grown(torch.randint(8, (16, 4))).isfinite().all()
    again, again_config = grown_weights(weights, grown_config, 9)
    build_model(again_config).load_state_dict(again)
    assert grown_weights(weights, grown_config, 8) == (weights, grown_config)
