"""Configs found by path or name, and configs based on others."""

import re
from pathlib import Path

import pytest
import yaml

from gpt_lightning.config_files import CONFIGS, expand_configs, find_config, load_config
from gpt_lightning.errors import UserError

LECTURE = sorted((CONFIGS / "lecture").glob("*.yaml"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, **settings) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(yaml.safe_dump(settings), encoding="utf-8")
    return Path(path)


# --- finding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lecture/08_residual", "lecture/08_residual.yaml", "laptop"])
def test_a_shipped_config_is_found_by_name_from_any_folder(name):
    assert find_config(name) == (CONFIGS / name).with_suffix(".yaml")


def test_a_file_is_found_by_its_path_and_wins_over_a_shipped_name(folder, monkeypatch):
    write("laptop.yaml")
    assert find_config("laptop.yaml") == Path("laptop.yaml")
    assert find_config(str(folder / "laptop.yaml")) == folder / "laptop.yaml"
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    assert find_config("~/laptop.yaml") == folder / "laptop.yaml"


@pytest.mark.parametrize(
    ("name", "end"),
    [("lecture/08_residuals", "did you mean lecture/08_residual?"), ("mine.yaml", "that name")],
)
def test_an_unknown_name_is_an_error_that_suggests_the_nearest(name, end):
    with pytest.raises(UserError, match=f"^config={name}: no such .*{re.escape(end)}$"):
        find_config(name)


# --- bases ----------------------------------------------------------------------------------------


def test_a_config_overrides_its_base_setting_by_setting():
    write("a.yaml", model={"n_layer": 1, "n_head": 1}, trainer={"precision": "32-true"})
    write("b.yaml", base="a.yaml", model={"n_layer": 2})
    c = write("c.yaml", base="b.yaml", model={"n_embd": 3}, trainer={"precision": None})
    expected = {"model": {"n_layer": 2, "n_head": 1, "n_embd": 3}, "trainer": {"precision": None}}
    assert load_config(c) == expected


def test_a_base_is_relative_to_its_config_or_a_shipped_name(folder):
    write("far/shared/a.yaml", model={"n_layer": 7})
    b = write("far/mine/b.yaml", base="../shared/a.yaml")
    assert load_config(b) == load_config(folder / b) == {"model": {"n_layer": 7}}
    mine = load_config(write("c.yaml", base="cpu/minutes_5", model={"n_layer": 7}))
    shipped = load_config(find_config("cpu/minutes_5"))
    assert mine == {**shipped, "model": {**shipped["model"], "n_layer": 7}}


@pytest.mark.parametrize("base", ["absent.yaml", ".", 7])
def test_a_missing_base_is_an_error_that_names_both_files(base):
    with pytest.raises(UserError, match=f"^config=b.yaml: base: {base}: no such file"):
        load_config(write("b.yaml", base=base))


@pytest.mark.parametrize("length", [1, 3])
def test_a_base_that_leads_back_to_itself_is_an_error(length):
    for n in range(length):
        write(f"{n}.yaml", base=f"../{Path.cwd().name}/{(n + 1) % length}.yaml")
    with pytest.raises(UserError, match="config=0.yaml: base: .* leads back to itself"):
        load_config(Path("0.yaml"))


@pytest.mark.parametrize("content", [b"base: [plain.yaml", b"base: \xff\xfe", b"- base"])
def test_a_file_that_is_no_mapping_is_an_error_in_one_line(content):
    Path("broken.yaml").write_bytes(content)
    with pytest.raises(UserError, match="config=broken.yaml [^\n]*$"):
        load_config(Path("broken.yaml"))


def test_an_empty_file_changes_nothing():
    Path("empty.yaml").write_text("# nothing\n")
    assert load_config(Path("empty.yaml")) == {}


# --- on the command line --------------------------------------------------------------------------


def test_every_spelling_of_the_flag_is_expanded_in_order():
    write("a.yaml", model={"n_layer": 1, "n_head": 3})
    write("b.yaml", base="a.yaml", model={"n_layer": 2})
    argv = ["fit", "--config", "b.yaml", "--config=a.yaml", "-c", "b.yaml", "-c=laptop", "--x=1"]
    command, *configs, rest = expand_configs(argv)
    assert (command, rest) == ("fit", "--x=1")
    settings = [yaml.safe_load(config.removeprefix("--config=")) for config in configs]
    a, b = load_config(Path("a.yaml")), {"model": {"n_layer": 2, "n_head": 3}}
    assert settings == [b, a, b, load_config(CONFIGS / "laptop.yaml")]


# --- the lecture's chain --------------------------------------------------------------------------


def test_every_rung_is_based_on_the_one_before_it():
    bases = [yaml.safe_load(path.read_text(encoding="utf-8")).get("base") for path in LECTURE]
    assert len(LECTURE) == 13 and bases == [None, *(path.name for path in LECTURE[:-1])]


@pytest.mark.parametrize("path", LECTURE, ids=lambda path: path.stem)
def test_a_rung_begins_with_its_title_and_its_reason(path):
    title, colon, reason = path.read_text(encoding="utf-8").partition("\n")[0].partition(": ")
    assert title.startswith("# ") and title[2].isupper() and colon and reason.endswith(".")
