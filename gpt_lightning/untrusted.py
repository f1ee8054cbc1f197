"""Files from strangers: looked through, within bounds, before anything is made of what they say.

A checkpoint is an archive just as torch.save writes one, with a pickle in it in the two dozen
opcodes that ours have. Both are gone through here by plain arithmetic: nothing is called, and no
memory is taken on the word of the file. `docs/security.md` says what that promises.
"""

import math
import pickletools
import re
import struct
import zlib
from collections import OrderedDict
from typing import Any, BinaryIO, NamedTuple

ENTRIES = 1 << 16  # of an archive; a checkpoint of ours has one to each tensor, and six more
DIRECTORY = 1 << 24  # bytes of its table of contents
PICKLE = 1 << 25  # bytes; vocabulary, settings, and some 150 for each tensor
OPCODES = 1 << 20
VALUES = 1 << 18  # counted wherever they stand, so that what is shared many times counts as often
DEPTH = 32


class Torn(Exception):
    """An archive that is not as torch writes one."""


class Foreign(Exception):
    """A pickle that holds what a checkpoint of ours never does."""


# --- the archive ----------------------------------------------------------------------------------

# APPNOTE.TXT of PKWARE names the fields: 4.3.7, 4.3.9, 4.3.12, and 4.3.14 to 4.3.16 for the end
LOCAL = struct.Struct("<I5H3I2H")
ENTRY = struct.Struct("<I6H3I5H2I")
END = struct.Struct("<IQ2H2I4Q IIQI I4H2IH")
WIDE = 0xFFFFFFFF  # stands where a number takes 64 bits, and is given elsewhere
NAMES = rb"data\.pkl|data/[0-9]+|version|byteorder|\.(format_version|storage_alignment)"
NAME = re.compile(rb"([^/\\\0]+/)(" + NAMES + rb"|\.data/serialization_id)")


def read_archive(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Where each entry of an archive lies: name without the common folder -> (offset, size).

    Everything between the first byte and the last is accounted for, and every checksum is right:
    there is no other way to read it, whichever of its several tables a reader goes by.

    Raises:
        Torn: if it is not so.
    """
    size = file.seek(0, 2)
    count, offset, directory = _directory(file, size)
    found, folder, at, place = {}, None, 0, 0
    for _ in range(count):
        fields, name, extra = _record(ENTRY, directory, place, comments=True)
        place += ENTRY.size + len(name) + len(extra)
        signature, _, _, flags, method, _, _, crc, packed, length, *_, disk, _, kind, start = fields
        match = NAME.fullmatch(name)
        _check(signature == 0x02014B50 and match, "an entry that is none of ours")
        folder = folder or match[1]
        _check(match[1] == folder and packed == length, "an entry that is none of ours")
        # bit 3: checksum and size follow the data; bit 11: the name is UTF-8. Of a kind that is not
        # 0, a folder's say, torch's reader makes whatever lay in memory
        expected = (0, 0, 0, 0x0808 if length else 0x0800)
        _check((method, disk, kind, flags) == expected, "an entry not as ours are")
        length, start = _wide(length, start, extra)
        name = match[2].decode()
        _check(start == at and name not in found, "entries that overlap")
        begin = _local(file, start, flags, folder + match[2])
        _check(begin + length <= offset, "an entry beyond its end")
        _check(_crc(file, begin, length) == crc, "a wrong checksum")
        ends = struct.pack("<II" + ("QQ" if extra else "II"), 0x08074B50, crc, length, length)
        ends = ends if length else b""
        _check(file.read(len(ends)) == ends, "an entry that ends otherwise")
        found[name], at = (begin, length), begin + length + len(ends)
    _check(place == len(directory) and at == offset, "something between its entries")
    return found


def _check(right: object, what: str) -> None:
    if not right:
        raise Torn(what)


def _directory(file: BinaryIO, size: int) -> tuple[int, int, bytes]:
    """Number of entries, and where their table lies, and the table."""
    _check(size > END.size, "too short")
    file.seek(size - END.size)
    fields = END.unpack(file.read(END.size))
    count, _, length, offset = fields[6:10]
    _check(count <= ENTRIES and length <= DIRECTORY, "too many entries")
    _check(offset + length == size - END.size, "cut short")
    versions = fields[2:4]
    narrow = min(count, 0xFFFF), min(count, 0xFFFF), min(length, WIDE), min(offset, WIDE)
    expected = (0x06064B50, END.size - 54, *versions, 0, 0, count, count, length, offset)
    expected += (0x07064B50, 0, size - END.size, 1, 0x06054B50, 0, 0, *narrow, 0)
    _check(fields == expected, "cut short")
    file.seek(offset)
    return count, offset, file.read(length)


def _record(layout: struct.Struct, data: bytes, at: int, comments: bool) -> tuple:
    """The fields of a record at `at`, its name and its extra field."""
    _check(at + layout.size <= len(data), "cut short")
    fields = layout.unpack_from(data, at)
    lengths = fields[10:13] if comments else (*fields[9:11], 0)
    _check(lengths[2] == 0 and at + layout.size + sum(lengths) <= len(data), "cut short")
    middle = at + layout.size + lengths[0]
    return fields, data[at + layout.size : middle], data[middle : middle + lengths[1]]


def _wide(length: int, start: int, extra: bytes) -> tuple[int, int]:
    """Length and offset of an entry, from the extra field if they take 64 bits."""
    wide = [n for n in (length, length, start) if n == WIDE]
    head = struct.pack("<HH", 1, 8 * len(wide)) if wide else b""
    _check(len(extra) == len(head) + 8 * len(wide) and extra.startswith(head), "odd sizes")
    numbers = list(struct.unpack(f"<{len(wide)}Q", extra[len(head) :]))
    if length == WIDE:
        length = numbers.pop(0)
        _check(numbers.pop(0) == length, "odd sizes")
    return length, numbers[0] if start == WIDE else start


def _local(file: BinaryIO, start: int, flags: int, name: bytes) -> int:
    """Where an entry's data begin, behind a header that must agree with the table."""
    file.seek(start)
    head = file.read(LOCAL.size + len(name))
    _check(len(head) == LOCAL.size + len(name), "cut short")
    signature, _, its_flags, method, *_, name_length, extra = LOCAL.unpack_from(head)
    _check((signature, method, name_length) == (0x04034B50, 0, len(name)), "another header")
    _check(its_flags == flags and head[LOCAL.size :] == name, "another header")
    return file.seek(extra, 1)


def _crc(file: BinaryIO, begin: int, length: int) -> int:
    file.seek(begin)
    crc = 0
    while length and (block := file.read(min(length, 1 << 20))):
        crc, length = zlib.crc32(block, crc), length - len(block)
    return crc


# --- the pickle -----------------------------------------------------------------------------------


class Global(NamedTuple):
    """What a pickle names, in place of it."""

    name: str


class Storage(NamedTuple):
    """An entry of the archive that holds so many elements."""

    numel: int


class Tensor(NamedTuple):
    """A tensor that lies within its storage."""

    shape: tuple[int, ...]


MAKE_DICT, MAKE_TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
WIDTHS = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}
WIDTHS |= {"Char": 1, "Byte": 1, "Bool": 1}
STORAGES = {f"torch {kind}Storage": width for kind, width in WIDTHS.items()}
PLAIN = (int, float, str, bool, type(None), Tensor)


def read_pickle(data: bytes, sizes: dict[str, int]) -> Any:
    """What a checkpoint's pickle stands for, with a `Tensor` for each tensor.

    This goes by the opcodes as torch's unpickler does, but makes only lists, tuples, and dicts
    whose keys are strings or whole numbers. What it returns has no cycle, `DEPTH` levels and
    `VALUES` values at most. So a file that passes does nothing of note in torch.load, which by
    itself lets a file ask for a bytearray or a tensor of any size, expand one, or read beyond an
    entry.

    Args:
        data: the pickle.
        sizes: bytes of each entry of the archive.

    Raises:
        Foreign: if there is anything else in it.
    """
    try:
        return _run(data, sizes)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Foreign(f"it is no pickle of ours ({type(error).__name__})") from error


def _run(data: bytes, sizes: dict[str, int]) -> Any:
    stack, marked, memo, storages = [], [], {}, set()
    versions, hooks = [], []  # looked at in the end: what is remembered can still be changed
    for count, (opcode, arg, at) in enumerate(pickletools.genops(data)):
        _allow(count < OPCODES, "it is too long")
        match opcode.name:
            case "PROTO":
                _allow(arg == 2, "it is of another protocol")
            case "BININT" | "BININT1" | "BININT2" | "BINFLOAT" | "BINUNICODE":
                stack.append(arg)
            case "LONG1":
                _allow(-(1 << 63) <= arg < 1 << 64, "it has a number of more than 64 bits")
                stack.append(arg)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list}.get(opcode.name, tuple)())
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "MARK":
                _allow(len(marked) < 4 * DEPTH, "it is too deep")
                marked.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, marked.pop()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = tuple(stack.pop() for _ in range(int(opcode.name[-1])))
                stack.append(items[::-1])
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if opcode.name == "APPEND" else stack
                stack = stack if opcode.name == "APPEND" else marked.pop()
                _allow(type(stack[-1]) is list, "it adds to what is no list")
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(), stack.pop()][::-1] if opcode.name == "SETITEM" else stack
                stack = stack if opcode.name == "SETITEM" else marked.pop()
                _allow(type(stack[-1]) in (dict, OrderedDict), "it adds to what is no dict")
                _allow(all(type(key) in (str, int) for key in items[::2]), "it has an odd key")
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                _allow(arg in (MAKE_DICT, MAKE_TENSOR) or arg in STORAGES, f"it names {arg[:60]!r}")
                stack.append(Global(arg))
            case "BINPERSID":
                key = stack.pop()
                stack.append(_storage(key, sizes))
                _allow(key[2] not in storages, "two tensors share a storage")
                storages.add(key[2])
            case "REDUCE":
                args, function = stack.pop(), stack.pop()
                _allow(type(function) is Global and type(args) is tuple, "it calls something")
                if function.name == MAKE_DICT and not args:
                    stack.append(OrderedDict())
                else:
                    _allow(function.name == MAKE_TENSOR, "it calls something")
                    _allow(len(hooks) < ENTRIES, "it has too many tensors")
                    stack.append(_tensor(*args))
                    hooks.append(args[-1])
            case "BUILD":  # what OrderedDict keeps besides: the versions of a model's modules
                state = stack.pop()
                _allow(type(stack[-1]) is OrderedDict and type(state) is dict, "it builds")
                versions.append(state)
            case "STOP":
                _allow(at == len(data) - 1 and len(stack) == 1 and not marked, "it goes on")
            case name:
                raise Foreign(f"it has the opcode {name}")
    _allow(not any(hooks), "it has hooks")
    for state in versions:
        _allow(list(state) == ["_metadata"], "it builds")
        _allow(misfit(state, {str: {str: {str: int}}}) is None, "it builds")
    _bound(stack[0])
    return stack[0]


def _allow(right: object, what: str) -> None:
    if not right:
        raise Foreign(what)


def _storage(key: Any, sizes: dict[str, int]) -> Storage:
    _allow(type(key) is tuple, "it has an odd storage")
    word, kind, name, place, numel = key
    types = tuple(map(type, key))
    _allow(types == (str, Global, str, str, int) and word == "storage", "it has an odd storage")
    # torch takes the number at its word, and would read what lies behind the entry
    _allow(sizes.get(f"data/{name}") == numel * STORAGES[kind.name], "a storage is not as it says")
    return Storage(numel)


def _tensor(storage, offset, size, stride, requires_grad, hooks) -> Tensor:
    _allow(type(storage) is Storage and requires_grad is False, "it has an odd tensor")
    _allow(type(size) is type(stride) is tuple, "it has an odd tensor")
    _allow(type(hooks) is OrderedDict and len(size) == len(stride) <= 8, "it has an odd tensor")
    numbers = (offset, *size, *stride)
    _allow(all(type(n) is int and 0 <= n < 1 << 48 for n in numbers), "it has an odd tensor")
    room = math.prod(max(n, 1) for n in size)  # of an expanded tensor more than is there
    if 0 in size:
        _allow(room < 1 << 48 and offset <= storage.numel, "a tensor does not fit")
    else:
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        _allow(last < storage.numel and room <= storage.numel, "a tensor does not fit")
    return Tensor(size)


def _bound(value: Any) -> None:
    left, todo, tensors = VALUES, [(value, 0)], set()
    while todo:
        value, depth = todo.pop()
        if type(value) is Tensor:  # once: who copies it takes no more memory than the file has
            _allow(id(value) not in tensors, "a tensor stands in two places")
            tensors.add(id(value))
        if type(value) in PLAIN:
            continue
        _allow(type(value) in (dict, OrderedDict, list, tuple), "it holds a value of no plain type")
        parts = value.values() if isinstance(value, dict) else value
        left -= len(parts)
        _allow(left >= 0 and depth < DEPTH, "it is too deep, or too large")
        todo += [(part, depth + 1) for part in parts]


# --- what it stands for ---------------------------------------------------------------------------


def misfit(value: Any, pattern: Any, name: str = "") -> str | None:
    """The name of the first thing in `value` that is not of its pattern's kind, if any.

    A pattern is a type, a tuple of types, `[pattern]` for a list, `{str: pattern}` for a dict of
    such keys, or `{"name": pattern}` for a dict that has what is named, and may have more; a name
    that ends in `?` may be missing.
    """
    if isinstance(pattern, type | tuple):
        kinds = pattern if isinstance(pattern, tuple) else (pattern,)
        return None if type(value) in kinds else name
    if isinstance(pattern, list):
        parts = [(part, pattern[0], name) for part in value] if type(value) is list else None
    elif type(value) not in (dict, OrderedDict):
        parts = None
    elif isinstance(key := next(iter(pattern)), type):
        right = all(type(each) is key for each in value)
        parts = [(part, pattern[key], f"{name}.{k}") for k, part in value.items()]
        parts = parts if right else None
    else:
        wanted = {k.removesuffix("?"): k for k in pattern}
        missing = [k for k in wanted if k not in value and not wanted[k].endswith("?")]
        parts = [(value[k], pattern[wanted[k]], f"{name}.{k}") for k in wanted if k in value]
        parts = parts if not missing else None
    if parts is None:
        return name
    return next((found for part in parts if (found := misfit(*part))), None)
