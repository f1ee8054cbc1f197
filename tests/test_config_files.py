"""Configs found by path or name, and configs based on others."""

import re
from pathlib import Path

import pytest
import yaml

from gpt_lightning.config_files import (
    CONFIGS,
    expand_configs,
    find_config,
    load_config,
    read_mapping,
)
from gpt_lightning.errors import UserError

pytestmark = pytest.mark.usefixtures("empty")


def write(path: str, **settings) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(yaml.safe_dump(settings), encoding="utf-8")
    return Path(path)


def test_a_shipped_config_is_found_by_name_from_any_folder():
    assert find_config("laptop") == CONFIGS / "laptop.yaml"
    for name in ("lecture/08_residual", "lecture/08_residual.yaml"):
        assert find_config(name) == CONFIGS / "lecture/08_residual.yaml"


def test_a_file_is_found_by_its_path_and_wins_over_a_shipped_name(empty, monkeypatch):
    write("laptop.yaml")
    monkeypatch.setenv("HOME", str(empty))
    monkeypatch.setenv("USERPROFILE", str(empty))
    assert find_config("laptop.yaml") == Path("laptop.yaml")
    assert find_config("~/laptop.yaml") == empty / "laptop.yaml"


@pytest.mark.parametrize(
    ("name", "end"),
    [("lecture/08_residuals", "did you mean lecture/08_residual?"), ("mine.yaml", "configs")],
)
def test_an_unknown_name_is_an_error_that_suggests_the_nearest(name, end):
    with pytest.raises(UserError, match=f"^config={name}: no such .*{re.escape(end)}$"):
        find_config(name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_config_may_have_a_byte_order_mark(encoding):
    write("a.yaml", data={"corpus": "é"})
    Path("b.yaml").write_text("base: a.yaml\nseed_everything: 2\n", encoding=encoding)
    assert load_config(Path("b.yaml")) == {"data": {"corpus": "é"}, "seed_everything": 2}


def test_a_config_overrides_its_base_setting_by_setting():
    write("a.yaml", model={"n_layer": 1, "n_head": 1}, trainer={"precision": "32-true"})
    write("b.yaml", base="a.yaml", model={"n_layer": 2})
    c = write("c.yaml", base="b.yaml", model={"n_embd": 3}, trainer={"precision": None})
    expected = {"model": {"n_layer": 2, "n_head": 1, "n_embd": 3}, "trainer": {"precision": None}}
    assert load_config(c) == expected


def test_a_base_is_relative_to_its_config_or_a_shipped_name():
    write("far/shared/a.yaml", model={"n_layer": 7})
    b = write("far/mine/b.yaml", base="../shared/a.yaml")
    assert load_config(b) == {"model": {"n_layer": 7}}
    mine = load_config(write("c.yaml", base="cpu/minutes_5", model={"n_layer": 7}))
    shipped = load_config(find_config("cpu/minutes_5"))
    assert mine == {**shipped, "model": {**shipped["model"], "n_layer": 7}}


def test_a_missing_base_is_an_error_that_names_both_files():
    with pytest.raises(UserError, match="^config=b.yaml: base: 7: no such file"):
        load_config(write("b.yaml", base=7))


def test_a_base_that_leads_back_to_itself_is_an_error():
    a = write("a.yaml", base="b.yaml")
    write("b.yaml", base="a.yaml")
    with pytest.raises(UserError, match="config=a.yaml: base: .* leads back to itself"):
        load_config(a)


@pytest.mark.parametrize("content", [b"base: [plain.yaml", b"base: \xff\xfe", b"- base"])
def test_a_file_that_is_no_mapping_is_an_error(content):
    Path("broken.yaml").write_bytes(content)
    with pytest.raises(UserError, match="^config=broken.yaml "):
        load_config(Path("broken.yaml"))


def test_every_spelling_of_the_flag_is_expanded_in_order():
    write("a.yaml", model={"n_layer": 1, "n_head": 3})
    write("b.yaml", base="a.yaml", model={"n_layer": 2})
    argv = ["fit", "--config", "b.yaml", "--config=a.yaml", "-c", "b.yaml", "-c=laptop", "--x=1"]
    command, *configs, rest = expand_configs(argv)
    assert (command, rest) == ("fit", "--x=1")
    settings = [yaml.safe_load(config.removeprefix("--config=")) for config in configs]
    a, b = load_config(Path("a.yaml")), {"model": {"n_layer": 2, "n_head": 3}}
    assert settings == [b, a, b, load_config(CONFIGS / "laptop.yaml")]


def test_every_rung_is_based_on_the_one_before_it():
    rungs = sorted((CONFIGS / "lecture").glob("*.yaml"))
    bases = [read_mapping(path).get("base") for path in rungs]
    assert len(rungs) == 13 and bases == [None, *(path.name for path in rungs[:-1])]
