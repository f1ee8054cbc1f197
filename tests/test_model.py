"""Configs and models are built from plain types and described by them."""

import json
from dataclasses import asdict, fields

import pytest
import torch
from docstring_parser import parse

from gpt_lightning.errors import UserError
from gpt_lightning.model import (
    CONFIGS,
    build_model,
    config_from_dict,
    config_to_dict,
    num_parameters,
)
from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.model.lecture import Bigram, BigramConfig, LectureConfig, LectureGPT

SIZES = dict(vocab_size=5, block_size=4)
OTHER = [
    GPTConfig(2, 2, 16, 0.25, 4, 2, **SIZES),
    LectureConfig(2, 2, 16, 0.25, False, None, False, 0, False, False, False, False, **SIZES),
    BigramConfig(None, **SIZES),
]
KINDS = {"gpt": GPT, "lecture": LectureGPT, "bigram": Bigram}


@pytest.mark.parametrize("config", OTHER, ids=lambda config: config.name)
def test_a_model_is_rebuilt_from_its_config_as_json(config):
    model = build_model(config)
    assert type(model) is KINDS[config.name]
    plain = config_to_dict(model.config)
    assert plain == {"name": config.name, **asdict(config)}
    again = build_model(config_from_dict(json.loads(json.dumps(plain))))
    assert type(again) is type(model) and again.config == config
    again.load_state_dict(model.state_dict())
    ids = torch.tensor([[1, 0, 4, 2]])
    assert torch.equal(again.eval()(ids), model.eval()(ids))


@pytest.mark.parametrize("config", CONFIGS.values())
def test_missing_settings_have_their_defaults(config):
    assert config_from_dict({"name": config.name}) == config()
    assert (config().vocab_size, config().block_size) == (0, 0)
    assert config_from_dict({"name": "gpt", "dropout": 0}).dropout == 0  # an int is a valid float


@pytest.mark.parametrize("config", CONFIGS.values())
def test_every_field_is_documented(config):
    documented = {param.arg_name: param.description for param in parse(config.__doc__).params}
    assert list(documented) == [field.name for field in fields(config)]
    assert all(documented.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "lectern"}, "name=lectern is not a model; choose one of gpt, lecture, bigram"),
        ({}, "name=None is not a model"),
        ({"name": "gpt", "residual": False}, "residual=false is not a setting of the gpt model"),
        ({"name": "gpt", "n_hed": 2}, "n_hed=2 is not a setting of the gpt model; did you mean"),
        ({"name": "gpt", "n_layer": "3"}, 'n_layer="3" must be of type int'),
        ({"name": "gpt", "n_layer": True}, "n_layer=true must be of type int"),
        ({"name": "gpt", "dropout": None}, "dropout=null must be of type float"),
        ({"name": "lecture", "init_std": "x"}, 'init_std="x" must be of type float or null'),
        ({"name": "gpt", "n_head": 3}, "n_embd=128 must be a multiple of twice n_head=3"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_raise(settings, message):
    with pytest.raises(UserError) as error:
        config_from_dict(settings)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("config", CONFIGS.values())
def test_a_model_needs_vocab_size_and_block_size(config):
    for missing in SIZES:
        with pytest.raises(ValueError, match="must be set before a model is built"):
            build_model(config(**{**SIZES, missing: 0}))


def test_num_parameters_leaves_out_the_multi_token_heads():
    model = build_model(GPTConfig(n_layer=1, n_embd=16, n_head=2, multi_token_heads=2, **SIZES))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters(model) == total - 2 * 5 * 16
    assert num_parameters(build_model(BigramConfig(**SIZES))) == 25
