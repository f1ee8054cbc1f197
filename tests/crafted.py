"""Checkpoints as no honest program writes them, each with what it would do to a credulous reader.

`FILES` maps a name to a function that makes the bytes of a file out of a good checkpoint (a dict).
"""

import copy
import io
import pickle
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict
from types import SimpleNamespace

import torch

from gpt_lightning.checkpoint import KEY, describe
from gpt_lightning.data.tokenizers import CharTokenizer
from gpt_lightning.model import build_model, model_settings

HUGE = 10**12


class Calls:
    """Pickled, it is the result of a call."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def good(name="gpt", **settings) -> dict:
    """A small checkpoint: a model of 5 kB, and what a Trainer adds."""
    torch.manual_seed(1)
    sizes = dict(block_size=4, n_layer=1, n_head=1, n_embd=4)
    model = build_model(name, vocab_size=3, **(sizes | settings))
    text = {"name": "a text", "sha256": "0" * 64, "split": "tail", "val_fraction": 0.1}
    entry = describe(model_settings(name, model), CharTokenizer("\nab").state(), text)
    return {
        "epoch": 0,
        "global_step": 4,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": OrderedDict((f"net.{k}", v) for k, v in model.state_dict().items()),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"processed": 1}}}},
        "callbacks": {"BestAndLast": {"best_val_loss": 1.5, "best_step": 4}},
        "optimizer_states": [
            {
                "state": {0: {"step": torch.tensor(4.0), "momentum": torch.zeros(2, 2)}},
                "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}],
            }
        ],
        "lr_schedulers": [],
        "hyper_parameters": {"name": name, "n_layer": 1, "look_ahead": None},
        KEY: {**entry, "config": "model:\n  n_layer: 1\n"},
    }


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def changed(checkpoint, *keys, value) -> bytes:
    """The checkpoint with another value at one place."""
    place = checkpoint = copy.deepcopy(checkpoint)
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return saved(checkpoint)


def entries(raw: bytes) -> dict[str, bytes]:
    """What is in an archive of torch's, without the common folder."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        names = archive.namelist()
        return {name.partition("/")[2]: archive.read(name) for name in names}


def packed(parts: dict[str, bytes]) -> bytes:
    """An archive written by torch itself; it adds a version and an id."""
    file = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)
    for name, data in parts.items():
        if name not in ("version", ".data/serialization_id"):
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return file.getvalue()


def with_pickle(checkpoint, data: bytes) -> bytes:
    return packed(entries(saved(checkpoint)) | {"data.pkl": data})


def replaced(checkpoint, old: bytes, new: bytes) -> bytes:
    """The checkpoint with other bytes in its pickle, and right checksums."""
    data = entries(saved(checkpoint))["data.pkl"]
    assert old in data
    return with_pickle(checkpoint, data.replace(old, new, 1))


def rezipped(checkpoint, method=zipfile.ZIP_STORED, twice=False, prefix=b"", comment=b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in entries(saved(checkpoint)).items():
            archive.writestr(f"archive/{name}", data)
        if twice:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.comment = comment
    return prefix + file.getvalue()


def bomb(checkpoint) -> bytes:
    """A hundred kilobytes that are a hundred megabytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100 << 20))
    return file.getvalue()


def tensor(size, stride, offset=0, numel=4, **more):
    """A tensor of any size over a storage of a few elements."""
    with warnings.catch_warnings():  # TypedStorage is deprecated, and what files still name
        warnings.simplefilter("ignore")
        storage = torch.zeros(numel).storage()
    args = (storage, offset, size, stride, False, OrderedDict(), *more.values())
    return Calls(torch._utils._rebuild_tensor_v2, *args)


def weight(make):
    return lambda checkpoint: changed(checkpoint, "state_dict", "net.more", value=make())


def set_to(*keys, value):
    return lambda checkpoint: changed(checkpoint, *keys, value=value)


def deep(opcodes: bytes, end: bytes = b""):
    """A pickle of a hundred thousand levels."""
    return lambda checkpoint: with_pickle(checkpoint, b"\x80\x02" + opcodes * 100_000 + end + b".")


def laughs(kind):
    """Twenty levels, each of which holds the one below ten times."""
    value = kind([0])
    for _ in range(20):
        value = kind([value] * 10)
    return value


def circle():
    value = []
    value.append(value)
    return value


def directory_lie(field: int, value: int):
    """The first entry's record in the table with another number in it (by its offset)."""

    def make(checkpoint):
        raw = bytearray(saved(checkpoint))
        at = raw.index(b"PK\x01\x02")
        raw[at + field : at + field + 4] = struct.pack("<I", value)
        return bytes(raw)

    return make


def end_lie(field: int, value: int):
    def make(checkpoint):
        raw = bytearray(saved(checkpoint))
        at = raw.index(b"PK\x06\x06")
        raw[at + field : at + field + 8] = struct.pack("<Q", value)
        return bytes(raw)

    return make


STORAGE = b"X\x0c\x00\x00\x00FloatStorage"
FILES = {
    # what is called, allowed by torch or not
    "a bytearray": weight(lambda: Calls(bytearray, HUGE)),
    "a tensor by its size": weight(lambda: Calls(torch.Tensor, HUGE)),
    "a storage by its size": weight(lambda: Calls(torch.FloatStorage, HUGE)),
    "a counter": weight(lambda: Calls(Counter, "ab" * 1000)),
    "a set": weight(lambda: {1, 2}),
    "a complex number": weight(lambda: 1j),
    "a parameter": weight(lambda: torch.nn.Parameter(torch.zeros(2))),
    "a dict filled by a call": weight(lambda: Calls(OrderedDict, [("a", 1)] * 1000)),
    "a dict with methods of its own": weight(lambda: Calls(OrderedDict, state={"items": 1})),
    "a namespace": weight(lambda: SimpleNamespace(a=1)),
    "bytes": weight(lambda: b"abc"),
    "a sparse tensor": weight(lambda: torch.eye(3).to_sparse()),
    "a tensor without a place": weight(lambda: torch.empty(HUGE, device="meta")),
    "a tensor of complex numbers": weight(lambda: torch.zeros(2, dtype=torch.complex64)),
    # tensors that do not lie in their storage
    "an expanded tensor": weight(lambda: torch.zeros(1).expand(HUGE)),
    "an expanded tensor of a call": weight(lambda: tensor((HUGE,), (0,))),
    "a tensor larger than its storage": weight(lambda: tensor((10**10,), (1,))),
    "a tensor that begins outside": weight(lambda: tensor((1,), (1,), offset=4)),
    "a tensor with a negative offset": weight(lambda: tensor((1,), (1,), offset=-1)),
    "a tensor with a negative stride": weight(lambda: tensor((2,), (-1,))),
    "a tensor with a huge stride": weight(lambda: tensor((2,), (2**62,))),
    "a tensor of nothing, large": weight(lambda: tensor((2**40, 2**40, 0), (1, 1, 1))),
    "a tensor of many dimensions": weight(lambda: tensor((1,) * 1000, (1,) * 1000)),
    "a tensor of floats by the metre": weight(lambda: tensor((1.5,), (1,))),
    "a tensor with hooks": weight(lambda: tensor((1,), (1,), more=1)),
    "a storage for two": lambda c: saved(
        c | {"state_dict": c["state_dict"] | {"net.more": c["state_dict"]["net.lm_head.weight"]}}
    ),
    "a storage larger than its entry": lambda c: replaced(c, b"K\x0ctq", b"J\0\0\0\x7ftq"),
    # opcodes
    "lists in lists": deep(b"](", b"e" * 100_000),
    "lists in lists, one by one": deep(b"]", b"a" * 99_999),
    "tuples in tuples": deep(b")\x85"),
    "marks": deep(b"("),
    "a stack of dicts": deep(b"}" * 20),
    "a far place in the memo": lambda c: with_pickle(c, b"\x80\x02}r\xff\xff\xff\x7f."),
    "a large number": lambda c: with_pickle(c, b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b"."),
    "a very large number": lambda c: with_pickle(c, b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\x7f" * 99),
    "a long string announced": lambda c: with_pickle(c, b"\x80\x02X\xff\xff\xff\x7fabc."),
    "a frame": lambda c: with_pickle(c, pickle.dumps(c[KEY], protocol=4)),
    "a text pickle": lambda c: with_pickle(c, pickle.dumps(c[KEY], protocol=0)),
    "a pickle cut short": lambda c: with_pickle(c, entries(saved(c))["data.pkl"][:-1]),
    "a pickle with more behind it": lambda c: with_pickle(c, entries(saved(c))["data.pkl"] + b"N."),
    "no pickle at all": lambda c: packed({"data/0": b"abcd"}),
    "a billion laughs in lists": set_to("callbacks", "x", value=laughs(list)),
    "a billion laughs in tuples": set_to("callbacks", "x", value={"y": laughs(tuple)}),
    "a list in itself": set_to("callbacks", "x", value={"y": circle()}),
    "keys that are tuples": set_to("callbacks", "x", value={(1, 2): 3}),
    "hundreds of thousands of values": set_to("callbacks", "x", value={"y": list(range(300_000))}),
    # archives
    "a compressed bomb": bomb,
    "compressed": lambda c: rezipped(c, zipfile.ZIP_DEFLATED),
    "written by another program": lambda c: rezipped(c),
    "two of one name": lambda c: rezipped(c, twice=True),
    "something before it": lambda c: b"PK\x03\x04" + saved(c),
    "something behind it": lambda c: saved(c) + b"\0",
    "another archive behind it": lambda c: saved(c) + saved({"a": 1}),
    "a comment": lambda c: saved(c)[:-2] + b"\x04\0" + b"abcd",
    "encrypted": directory_lie(8, 0x0809),
    "a size that is not there": directory_lie(24, 0x7FFFFFFF),
    "another size in the archive": directory_lie(20, 5),
    "a size of 64 bits that is not given": directory_lie(24, 0xFFFFFFFF),
    "a folder with a weight's name": directory_lie(38, 0x10),
    "an entry elsewhere": directory_lie(42, 64),
    "more entries than there are": end_lie(32, 2**40),
    "a table longer than the file": end_lie(40, 2**40),
    "a table elsewhere": end_lie(48, 0),
    "an entry outside the folder": lambda c: packed(entries(saved(c)) | {"../evil": b"x"}),
    "a program of TorchScript": lambda c: packed(entries(saved(c)) | {"constants.pkl": b"x"}),
    # what the entry says
    "a model that is a list": set_to(KEY, "model", value=[1]),
    "a model with odd settings": set_to(KEY, "model", "n_layer", value=[1]),
    "a tokenizer of numbers": set_to(KEY, "tokenizer", "vocabulary", value=7),
    "a tokenizer that is none": set_to(KEY, "tokenizer", value=None),
    "a corpus that is none": set_to(KEY, "corpus", value="a text"),
    "a corpus with odd parts": set_to(KEY, "corpus", "sha256", value=1),
    "a config that is a dict": set_to(KEY, "config", value={"model": 1}),
    "a step that is text": set_to("global_step", value="4"),
    "weights that are a list": set_to("state_dict", value=[1]),
    "weights that are numbers": set_to("state_dict", "net.more", value=1.5),
    "loops that are none": set_to("loops", value=None),
    "loops that count nothing": set_to("loops", "fit_loop", "epoch_progress", value={}),
    "a best loss that is text": set_to("callbacks", "BestAndLast", "best_val_loss", value="1"),
    "an optimizer without parameters": set_to("optimizer_states", 0, "param_groups", 0, value={}),
    "an optimizer that is text": set_to("optimizer_states", value="muon"),
    "an optimizer's state that is text": set_to("optimizer_states", 0, "state", value="muon"),
    "a format that is long": set_to(KEY, "format", value="9" * 10_000),
}  # fmt: skip
