"""Configs that start from others: what a chain amounts to, and that the lecture's is one."""

from pathlib import Path

import pytest
import yaml

from gpt_lightning.cli import main
from gpt_lightning.config_files import chain, expand_configs

LECTURE = sorted((Path(__file__).parent.parent / "configs/lecture").glob("*.yaml"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, **settings) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def loaded(part: str) -> dict:
    return yaml.safe_load(Path(part).read_text("utf-8") if part.endswith(".yaml") else part)


def flat(settings: dict, above: str = "") -> dict:
    """{"model": {"n_layer": 1}} -> {"model.n_layer": 1}"""
    found = {}
    for key, value in settings.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return found


# --- chains ---------------------------------------------------------------------------------------


def test_a_chain_is_the_oldest_file_first():
    write("a.yaml", model={"n_layer": 1})
    write("b.yaml", base="a.yaml", model={"n_layer": 2})
    write("c.yaml", base="b.yaml", model={"n_layer": 3})
    parts = chain("c.yaml")
    assert parts[0] == "a.yaml"
    assert [loaded(part) for part in parts] == [{"model": {"n_layer": n}} for n in (1, 2, 3)]


def test_a_base_is_found_from_the_folder_of_its_file(folder):
    write("far/shared/a.yaml", model={"n_layer": 1})
    write("far/mine/b.yaml", base="../shared/a.yaml", model={"n_layer": 2})
    for path in ("far/mine/b.yaml", str(folder / "far/mine/b.yaml")):
        assert [loaded(part)["model"]["n_layer"] for part in chain(path)] == [1, 2]
    write("c.yaml", base=str(folder / "far/shared/a.yaml"))  # or by its whole path
    assert [loaded(part) for part in chain("c.yaml")] == [{"model": {"n_layer": 1}}, {}]


@pytest.mark.parametrize(
    "flags", [["--config", "b.yaml"], ["--config=b.yaml"], ["-c", "b.yaml"], ["-c=b.yaml"]]
)
def test_each_way_to_give_a_config_is_expanded(flags):
    write("a.yaml", model={"n_layer": 1})
    write("b.yaml", base="a.yaml", model={"n_layer": 2})
    flag = flags[0].removesuffix("=b.yaml")
    found = expand_configs(["fit", "--model.n_head=2", *flags, "--trainer.max_steps", "5"])
    assert found[:2] == ["fit", "--model.n_head=2"]
    assert found[2:5] == [flag, "a.yaml", flag] and loaded(found[5]) == {"model": {"n_layer": 2}}
    assert found[6:] == ["--trainer.max_steps", "5"]


def test_configs_keep_their_order():
    write("a.yaml", model={"n_layer": 1})
    write("b.yaml", base="a.yaml", model={"n_layer": 2})
    write("plain.yaml", model={"n_layer": 3})
    write("d.yaml", base="a.yaml", model={"n_layer": 4})
    argv = ["--config", "b.yaml", "--config=plain.yaml", "--config", "d.yaml"]
    parts = expand_configs(argv)
    assert parts[::2] == ["--config"] * 5
    assert [loaded(part)["model"]["n_layer"] for part in parts[1::2]] == [1, 2, 3, 1, 4]


def test_two_files_may_share_a_base():
    """A base that comes twice is no circle."""
    write("a.yaml", model={"n_layer": 1})
    write("b.yaml", base="a.yaml")
    write("c.yaml", base="a.yaml")
    assert len(expand_configs(["-c", "b.yaml", "-c", "c.yaml"])) == 8


@pytest.mark.parametrize(
    "argv",
    [
        ["fit", "--config", "plain.yaml"],
        ["fit", "--config", "absent.yaml"],
        ["fit", "--config", "broken.yaml"],
        ["fit", "--config", "bytes.yaml"],
        ["fit", "--config", "list.yaml"],
        ["fit", "--config", "empty.yaml"],
        ["fit", "--config", "."],
        ["fit", "--config", "model: {n_layer: 1}"],
        ["fit", "--config", "model: {n_layer: 1}\n" * 500],  # no file has so long a name
        ["fit", "--config", "", "--model.n_layer=1"],
        ["fit", "--config"],
        ["fit", "--sample.prompt", "base: plain.yaml"],
    ],
    ids=lambda argv: " ".join(argv)[:40],
)
def test_what_is_no_file_with_a_base_is_left_to_the_parser(argv):
    write("plain.yaml", model={"n_layer": 1})
    Path("broken.yaml").write_text("base: [plain.yaml")
    Path("bytes.yaml").write_bytes(b"base: \xff\xfe")
    Path("list.yaml").write_text("- base")
    Path("empty.yaml").write_text("")
    assert expand_configs(argv) == argv


def test_a_file_without_a_base_is_given_on_as_it_is():
    write("plain.yaml", model={"n_layer": 1})
    assert chain("plain.yaml") == ["plain.yaml"]
    for flags in (["--config", "plain.yaml"], ["--config=plain.yaml"]):
        assert expand_configs(flags) == ["--config", "plain.yaml"]


@pytest.mark.parametrize("base", ["absent.yaml", ".", 7, ["plain.yaml"], None])
def test_an_absent_base_is_refused_in_one_line_that_names_both_files(base):
    write("b.yaml", base=base)
    with pytest.raises(ValueError) as error:
        expand_configs(["fit", "--config=b.yaml"])
    message = str(error.value)
    assert "\n" not in message and message.startswith("--config=b.yaml: base: ")
    assert message.endswith(f"{Path(str(base))}: no such file")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_circle_is_refused_in_one_line(length):
    for n in range(length):
        write(f"{n}.yaml", base=f"../{Path.cwd().name}/{(n + 1) % length}.yaml")
    write("into_it.yaml", base="0.yaml")
    for start in ("0.yaml", "into_it.yaml"):
        with pytest.raises(ValueError) as error:
            expand_configs(["fit", "--config", start])
        assert "\n" not in str(error.value)
        assert str(error.value).endswith("is based on this file itself")


# --- the lecture's chain --------------------------------------------------------------------------


def test_every_rung_is_based_on_the_one_below_it():
    assert len(LECTURE) == 13
    bases = [loaded(str(path)).get("base") for path in LECTURE]
    assert bases == [None, *(path.name for path in LECTURE[:-1])]
    assert [len(chain(str(path))) for path in LECTURE] == list(range(1, 14))


@pytest.mark.parametrize("path", LECTURE[1:], ids=lambda path: path.stem)
def test_a_rung_holds_only_what_it_changes(path):
    *below, own = chain(str(path))
    before = {}
    for part in below:
        before |= flat(loaded(part))
    own = flat(loaded(own))
    assert own
    assert {key: value for key, value in own.items() if before.get(key, ...) == value} == {}


@pytest.mark.parametrize("path", LECTURE, ids=lambda path: path.stem)
def test_a_rung_begins_with_its_title_and_its_reason(path):
    title, colon, reason = path.read_text(encoding="utf-8").partition("\n")[0].partition(": ")
    assert title.startswith("# ") and title[2].isupper() and colon
    assert reason.endswith(".")


# --- through the command --------------------------------------------------------------------------


def fit(*flags: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["fit", *flags])
    return ended.value.code


def test_flags_beat_a_file_and_a_file_beats_its_base(folder):
    Path("text.txt").write_text("To be, or not to be: that is the question.\n" * 20)
    write(
        "configs/base.yaml",
        data={"corpus": "text.txt", "block_size": 8, "batch_size": 4},
        model={"n_layer": 1, "n_head": 1, "n_embd": 8, "dropout": 0.1},
        trainer={"max_steps": 2, "accelerator": "cpu"},
    )
    mine = "base: base.yaml\nmodel:\n  n_embd: 16\n  n_head: 2\n  learning_rate: 1e-3\n"
    Path("configs/mine.yaml").write_text(mine)
    assert fit("--model.n_head=4", "--config=configs/mine.yaml", "--model.dropout=0.2") == 0
    kept = yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())
    expected = {"n_layer": 1, "n_embd": 16, "learning_rate": 0.001, "dropout": 0.2}
    assert {key: kept["model"][key] for key in expected} == expected
    assert kept["model"]["n_head"] == 2  # a config overrides the flags before it
    assert kept["data"]["block_size"] == 8 and kept["trainer"]["max_steps"] == 2


def test_an_absent_base_ends_in_one_line_and_exit_code_2(capsys):
    write("mine.yaml", base="absent.yaml", model={"n_layer": 1})
    assert fit("--config", "mine.yaml") == 2
    found = capsys.readouterr()
    assert found.err == "error: --config=mine.yaml: base: absent.yaml: no such file\n"
    assert found.out == "" and not Path("lightning_logs").exists()


def test_a_mistyped_key_names_the_file_that_was_given(capsys):
    write("a.yaml", model={"n_layer": 1})
    write("mine.yaml", base="a.yaml", model={"n_heads": 1})
    assert fit("--config", "mine.yaml") == 2
    message = "--config=mine.yaml: model.n_heads is no setting; did you mean model.n_head?"
    assert capsys.readouterr().err == f"error: {message}\n"


def test_what_a_file_with_a_base_says_is_kept_to_the_letter(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "low.yaml").write_text("model: {n_layer: 1}\n")
    rest = 'sample:\n  prompt: "1e-3"   # text, for its quotes\nmodel: {learning_rate: 1e-3}\n'
    (tmp_path / "high.yaml").write_text("base: low.yaml\n" + rest)
    assert chain("~/high.yaml") == [str(tmp_path / "low.yaml"), rest]
