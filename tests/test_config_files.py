"""Configs found by path or name, and configs based on others."""

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


def flat(settings: dict, prefix: str = "") -> dict:
    """{"model": {"n_layer": 1}} -> {"model.n_layer": 1}"""
    found = {}
    for key, value in settings.items():
        nested = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        found |= {prefix + key: value} if nested is None else nested
    return found


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
    "name, suggestion",
    [
        ("lecture/08_residuals", "lecture/08_residual"),
        ("configs/cpu/minutes_5.yaml", "cpu/minutes_5"),
        ("mine.yaml", None),
        ("", None),
    ],
)
def test_an_unknown_name_is_an_error_that_suggests_the_nearest(name, suggestion):
    with pytest.raises(UserError) as error:
        find_config(name)
    assert str(error.value).startswith("config") and str(error.value).startswith(
        f"config={name}: no such"
    )
    assert str(error.value).endswith(f"did you mean {suggestion}?" if suggestion else "that name")


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


@pytest.mark.parametrize("base", ["absent.yaml", ".", 7, ["a.yaml"]])
def test_a_missing_base_is_an_error_that_names_both_files(base):
    with pytest.raises(UserError) as error:
        load_config(write("b.yaml", base=base))
    assert str(error.value).startswith(f"config=b.yaml: base: {base}: no such file")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_base_that_leads_back_to_itself_is_an_error(length):
    for n in range(length):
        write(f"{n}.yaml", base=f"../{Path.cwd().name}/{(n + 1) % length}.yaml")
    for start in (Path("0.yaml"), write("start.yaml", base="0.yaml")):
        with pytest.raises(UserError, match=f"config={start}: base: .* leads back to itself"):
            load_config(start)


@pytest.mark.parametrize("content", [b"base: [plain.yaml", b"base: \xff\xfe", b"- base", b"text"])
def test_a_file_that_is_no_mapping_is_an_error_in_one_line(content):
    Path("broken.yaml").write_bytes(content)
    with pytest.raises(UserError, match="config=broken.yaml") as error:
        load_config(Path("broken.yaml"))
    assert "\n" not in str(error.value)


def test_an_empty_file_changes_nothing():
    Path("empty.yaml").write_text("# nothing\n")
    assert load_config(Path("empty.yaml")) == {}


# --- on the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [["--config", "b.yaml"], ["--config=b.yaml"], ["-c", "b.yaml"], ["-c=b.yaml"]]
)
def test_every_spelling_of_the_flag_is_expanded(flags):
    write("a.yaml", model={"n_layer": 1, "n_head": 3})
    write("b.yaml", base="a.yaml", model={"n_layer": 2})
    argv = expand_configs(["fit", "--model.n_head=2", *flags, "--trainer.max_steps", "5"])
    assert argv[:2] == ["fit", "--model.n_head=2"] and argv[3:] == ["--trainer.max_steps", "5"]
    settings = yaml.safe_load(argv[2].removeprefix("--config="))
    assert settings == {"model": {"n_layer": 2, "n_head": 3}}


def test_configs_keep_their_order():
    a = write("a.yaml", model={"n_layer": 1})
    write("b.yaml", base="a.yaml")
    argv = expand_configs(["--config", "b.yaml", "--config=a.yaml", "--config", "laptop"])
    settings = [yaml.safe_load(arg.removeprefix("--config=")) for arg in argv]
    assert settings == [load_config(a), load_config(a), load_config(CONFIGS / "laptop.yaml")]


def test_other_arguments_are_left_alone():
    argv = ["fit", "--sample.prompt", "base: plain.yaml", "--ckpt_path=last"]
    assert expand_configs(argv) == argv


# --- the lecture's chain --------------------------------------------------------------------------


def test_every_rung_is_based_on_the_one_before_it():
    bases = [yaml.safe_load(path.read_text(encoding="utf-8")).get("base") for path in LECTURE]
    assert len(LECTURE) == 13 and bases == [None, *(path.name for path in LECTURE[:-1])]


@pytest.mark.parametrize("below, path", list(zip(LECTURE, LECTURE[1:], strict=False)))
def test_a_rung_holds_only_what_it_changes(below, path):
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    own.pop("base")
    before = flat(load_config(below))
    assert own and {k: v for k, v in flat(own).items() if before.get(k, ...) == v} == {}


@pytest.mark.parametrize("path", LECTURE, ids=lambda path: path.stem)
def test_a_rung_begins_with_its_title_and_its_reason(path):
    title, colon, reason = path.read_text(encoding="utf-8").partition("\n")[0].partition(": ")
    assert title.startswith("# ") and title[2].isupper() and colon and reason.endswith(".")
