"""The safetensors file to share: read back, damaged, hostile."""

import hashlib
import json
import math
import struct
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, checkpoint_of
from safetensors import safe_open
from safetensors.torch import save

from gpt_lightning.checkpoint import (
    KEY,
    DamagedCheckpoint,
    load_model,
    model_and_tokenizer,
    read_checkpoint,
    write_model_file,
)
from gpt_lightning.errors import UserError
from gpt_lightning.safetensors_file import MAX_HEADER, read_safetensors, write_safetensors

MODELS = ["gpt", "lecture", "bigram"]
IDS = torch.tensor([[0, 3, 5, 1, 1, 7]])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("name", MODELS)
def test_the_file_has_the_checkpoints_model_tokenizer_and_settings(path, name):
    checkpoint = checkpoint_of(name)
    write_model_file(path, checkpoint)
    read = read_checkpoint(path)
    assert read[KEY] == checkpoint[KEY] and read["global_step"] == checkpoint["global_step"]
    model, _ = model_and_tokenizer(checkpoint, "")
    assert torch.equal(load_model(path)(IDS), model(IDS))


@pytest.mark.parametrize("precision, bits", [("fp16", 11), ("bf16", 8)])
def test_half_precision_halves_the_file_and_rounds_each_weight_once(path, precision, bits):
    checkpoint = checkpoint_of("lecture")
    write_model_file(path, checkpoint, precision)
    for name, weight in read_checkpoint(path)["state_dict"].items():
        original = checkpoint["state_dict"][name]
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, original, rtol=2.0**-bits, atol=1e-7)
    data = sum(2 * weight.numel() for weight in checkpoint["state_dict"].values())
    assert data < path.stat().st_size < data + 8192


def test_the_safetensors_library_reads_the_weights_and_the_description(path):
    checkpoint = checkpoint_of("gpt")
    write_model_file(path, checkpoint)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()[KEY])["model"] == checkpoint[KEY]["model"]
        for name in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(name), checkpoint["state_dict"][f"net.{name}"])


def test_a_vocabulary_of_any_characters_is_kept(path):
    vocabulary = "".join(sorted('"\\\n\x00\u2028\u00e9\U0001f600\ud800{0'))
    write_model_file(path, checkpoint_of("bigram", vocabulary))
    assert read_checkpoint(path)[KEY]["tokenizer"]["vocabulary"] == vocabulary


@pytest.mark.parametrize(
    "tokenizer, message",
    [
        ({"kind": "char", "vocabulary": "\n abcdea"}, "must be a string of distinct characters"),
        ({"kind": "char", "vocabulary": "\n abc"}, "its tokenizer has 5 tokens, and its model 9"),
        ({"kind": "byte"}, "its tokenizer has 256 tokens"),
        ({"kind": "x"}, "not the state of a tokenizer"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_an_error_that_names_the_file(path, tokenizer, message):
    checkpoint = checkpoint_of("lecture")
    checkpoint[KEY]["tokenizer"] = tokenizer
    write_model_file(path, checkpoint)
    with pytest.raises(UserError, match=f"ckpt_path=.*a.safetensors: .*{message}"):
        load_model(path)


def test_every_changed_byte_is_noticed(path):
    write_safetensors(path, {"w": torch.arange(5.0)}, {"text": "a \u00e9"})
    data = path.read_bytes()
    for i in range(len(data)):
        for changed in {data[i] ^ 1, data[i] ^ 32, data[i] ^ 128}:
            path.write_bytes(data[:i] + bytes([changed]) + data[i + 1 :])
            with pytest.raises(Exception):  # noqa: B017
                read_safetensors(path)


def test_a_file_that_is_cut_short_is_an_error_in_one_line(path):
    write_model_file(path, checkpoint_of("lecture"))
    data = path.read_bytes()
    for length in (0, 5, 8, 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedCheckpoint, match="a.safetensors: damaged"):
            read_checkpoint(path)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def sign(data: bytes) -> bytes:
    """The file with a valid digest: the SHA-256 of the file that has zeros in its place."""
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)


def entry(**changes) -> bytes:
    """A signed file whose tensor w has a changed entry in the header."""
    metadata = {KEY: '{"step": 1}', "sha256": "0" * 64}
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    header = json.dumps({"__metadata__": metadata, "w": tensor})
    return sign(with_header(header.encode(), bytes(8)))


def described(tensors, description: str) -> bytes:
    return sign(save(tensors, {KEY: description, "sha256": "0" * 64}))


HOSTILE = {
    "a header of an exabyte": struct.pack("<Q", 1 << 60),
    "a header above the limit": with_header(b"{}" + b" " * MAX_HEADER),
    "deep nesting": with_header(b"[" * 100_000 + b"]" * 100_000),
    "a large shape": entry(shape=[1 << 40]),
    "a large offset": entry(data_offsets=[0, 1 << 40]),
    "a negative offset": entry(data_offsets=[-8, 0]),
    "a shape beyond 64 bits": entry(shape=[10**30]),
    "a shape that overflows 64 bits": entry(shape=[1 << 32, 1 << 32], data_offsets=[0, 0]),
    "a shape that is not a number": entry(shape=[math.nan]),
    "an integer of many digits": with_header(b"[1" + b"0" * 10_000 + b"]"),
    "an unknown dtype": entry(dtype="F31"),
    "8-bit floats": entry(dtype="F8_E4M3", shape=[8]),
    "no metadata": save({"w": torch.zeros(2)}),
    "no digest": save({"w": torch.zeros(2)}, {KEY: "{}"}),
    "a wrong digest": save({"w": torch.zeros(2)}, {KEY: "{}", "sha256": "0" * 64}),
    "integers": described({"w": torch.zeros(2, dtype=torch.int8)}, '{"step": 1}'),
    "a description that is no dict": described({"w": torch.zeros(2)}, "[1]"),
    "a description of deep nesting": described(
        {"w": torch.zeros(2)}, "[" * 100_000 + "]" * 100_000
    ),
}


def test_of_two_tensors_with_one_name_the_library_takes_the_last(path):
    """So that such a file, which its author can sign, has one meaning for all readers."""
    tensor = '"w": {"dtype": "F32", "shape": [%d], "data_offsets": [0, 4]}'
    header = f'{{"__metadata__": {{"{KEY}": "1", "sha256": "{"0" * 64}"}}, '
    data = with_header(f"{header}{tensor % 2}, {tensor % 1}}}".encode(), struct.pack("<f", 5))
    path.write_bytes(sign(data))
    weights, _ = read_safetensors(path)
    assert weights["w"].tolist() == [5]


def test_a_file_of_another_program_is_named_as_one(path):
    path.write_bytes(save({"w": torch.zeros(2)}, {"format": "pt"}))
    with pytest.raises(DamagedCheckpoint, match="another program wrote it"):
        read_checkpoint(path)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(path, case):
    path.write_bytes(HOSTILE[case])
    with pytest.raises(DamagedCheckpoint, match="no code in it was run"):
        read_checkpoint(path)


def test_hostile_headers_take_bounded_memory(path):
    pytest.importorskip("resource")  # not on Windows
    code = f"""
import resource
from gpt_lightning.checkpoint import read_checkpoint
from gpt_lightning.errors import UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_checkpoint({str(path)!r})
except UserError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    for case in ("a header of an exabyte", "a large shape", "a header above the limit"):
        path.write_bytes(HOSTILE[case])
        grown = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
        unit = 1 if sys.platform == "darwin" else 1024
        assert int(grown) * unit < 64 << 20, case


def test_weights_that_fp16_cannot_hold_and_a_vocabulary_too_long_are_errors(path):
    with pytest.raises(UserError, match="precision=fp16: the weight w .* use fp32 or bf16"):
        write_safetensors(path, {"w": torch.tensor([1e6])}, {}, "fp16")
    with pytest.raises(UserError, match="smaller max_vocab_size"):
        write_safetensors(path, {"w": torch.zeros(1)}, {"vocabulary": "x" * MAX_HEADER})
    assert not path.exists()
