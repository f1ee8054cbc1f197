"""What the fuzzers found, kept; and properties over any input, by hypothesis.

`python tests/fuzz.py` runs the fuzzers themselves.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from crafted import good, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from test_strangers import same

from gpt_lightning.checkpoint import Damaged, read_checkpoint
from gpt_lightning.config_files import expand_configs, load_yaml
from gpt_lightning.generation.sampling import Sampling

quick = settings(max_examples=100, deadline=None)


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_weight_marked_as_a_folder_is_refused(tmp_path):
    """One bit, outside of every checksum: torch's reader then takes whatever lies in memory."""
    content, path = good(), tmp_path / "a.ckpt"
    raw = bytearray(saved(content))
    name = raw.rindex(b"archive/data/3")  # in the table of contents
    raw[name - 8] ^= 0x10
    path.write_bytes(raw)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with pytest.raises(Damaged):
        read_checkpoint(path)


def test_the_disk_of_an_entry_is_refused_as_damage(tmp_path):
    raw, path = bytearray(saved(good())), tmp_path / "a.ckpt"
    raw[raw.index(b"PK\x01\x02") + 34] ^= 1
    path.write_bytes(raw)
    with pytest.raises(Damaged):
        read_checkpoint(path)


@quick
@given(at=st.integers(0, 10**6), size=st.integers(0, 9), data=st.binary(max_size=9))
def test_any_replaced_bytes_are_refused_or_change_nothing(tmp_path_factory, at, size, data):
    content = good()
    raw = saved(content)
    at %= len(raw)
    path = tmp_path_factory.getbasetemp() / "replaced.ckpt"
    path.write_bytes(raw[:at] + data + raw[at + size :])
    try:
        assert same(read_checkpoint(path), content)
    except Damaged as error:
        assert str(error).isprintable()


# --- configurations -------------------------------------------------------------------------------

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab:#&*!-\n '\"", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab:*", max_size=3), inner),
    max_leaves=12,
)


@quick
@given(value=plain)
def test_yaml_is_loaded_as_it_was_dumped(value):
    import yaml

    assert load_yaml(yaml.safe_dump(value)) == value


@quick
@given(text=st.text("ab:[]{}&*!<-#|>\n ?,'\"\t0.", max_size=40))
def test_any_configuration_is_expanded_or_refused_in_one_line(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    for read in (lambda: load_yaml(text), lambda: expand_configs(["fit", f"--config={path}"])):
        try:
            read()
        except ValueError as error:
            assert str(error) and "\n" not in str(error)


# --- samplers -------------------------------------------------------------------------------------


@quick
@given(
    logits=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
    temperature=st.sampled_from([0.0, 5e-324, 1e-30, 1.0, 1e308]),
    top_k=st.none() | st.integers(1, 10**20),
    top_p=st.none() | st.floats(5e-324, 1),
    min_p=st.none() | st.floats(5e-324, 1),
)
def test_any_finite_logits_and_settings_draw_a_token_of_the_vocabulary(
    logits, temperature, top_k, top_p, min_p
):
    rows = torch.tensor([logits, logits[::-1]])
    ids = Sampling(temperature, top_k, top_p, min_p).sample(rows, torch.Generator().manual_seed(0))
    assert ids.shape == (2,) and all(0 <= i < len(logits) for i in ids.tolist())


# --- the tool -------------------------------------------------------------------------------------


def test_the_fuzzer_says_what_it_lacks_or_runs():
    tool = Path(__file__).parent / "fuzz.py"
    argv = [sys.executable, tool, "corpus", "--minutes=0.03"]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert "pip install atheris" in ended.stderr or "corpus: " in ended.stdout
