"""Text files in many formats, on disk or in an archive, read as documents in constant memory.

    NAME.gz .bz2 .xz           decompressed; NAME tells the format
    .zip                       every text file in it, sorted by name
    .jsonl .ndjson .csv .tsv   with a `field`: each row is a document, the text in that field
    all other names            one document

Line ends `\\r\\n` and `\\r` become `\\n`. A byte-order mark at the start of a UTF-8 file is
dropped.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TextIO
from zipfile import BadZipFile, ZipFile

from gpt_lightning.errors import UserError

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
JSON_LINES, TABLES = (".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}
RUN_FOLDERS = ("lightning_logs", "checkpoints")  # what runs write is not part of a text
MAX_FIELD = 1 << 30  # characters of a field of a table
UNLIKELY = ["mac_roman", "mac_latin2", "mac_iceland", "mac_turkish", "hp_roman8", "cp775"]
SAMPLE = 1 << 16  # bytes from which an encoding is guessed
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, BadZipFile, RuntimeError)  # encrypted


@dataclass(frozen=True)
class TextFile:
    """A text file on disk or in a .zip archive.

    Args:
        path: the file, or the archive.
        member: its name in the archive; "" for a file on disk.
        encoding: a codec of Python.
        field: the field of each row that is read; None reads the whole file as one document.
    """

    path: Path
    member: str = ""
    encoding: str = "utf-8"
    field: str | None = None

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    @property
    def kind(self) -> str:
        """The suffix that tells the format: ".csv" of `rows.csv.gz`."""
        return split_suffixes(self.member or self.path.name)[0]


def split_suffixes(name: str) -> tuple[str, str]:
    """The suffixes of format and compression, in lower case: (".csv", ".gz") of `rows.csv.gz`."""
    path = PurePath(name.lower())
    if path.suffix in OPENERS:
        return PurePath(path.stem).suffix, path.suffix
    return path.suffix, ""


def listed(before: str, names: Sequence[str], most: int = 5) -> str:
    """`before` and the first `most` of `names`, with the number of others; "" without names."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{before}{', '.join(names[:most])}{more}" if names else ""


def corpus_error(name: object, message: str) -> UserError:
    """The error whose message is `corpus=NAME` and `message`."""
    return UserError(f"corpus={name}{message}")


def check_encoding(encoding: str) -> str:
    """The canonical name of a codec of Python; "auto" stays as it is.

    Raises:
        UserError: if there is no such codec for text.
    """
    if encoding == "auto":
        return encoding
    try:
        b"a".decode(encoding, "replace")  # "hex" is a codec, but not for text
        return codecs.lookup(encoding).name
    except (LookupError, ValueError):
        raise UserError(
            f"encoding={encoding} is neither auto nor a text encoding of Python, such as cp1252"
        ) from None


# --- which files ----------------------------------------------------------------------------------


def find_text_files(
    paths: Iterable[Path], encoding: str, field: str | None
) -> tuple[list[TextFile], dict[str, str]]:
    """The text files at these paths and in their archives, in order.

    Args:
        encoding: of all of them; "auto" detects that of each.
        field: the field that is read, of files that have rows.

    Returns:
        the files, and why each of the others is left out.

    Raises:
        UserError: if a file is damaged, or no encoding fits it.
    """
    found, left_out = [], {}
    for path in paths:
        if not path.is_file():
            left_out[str(path)] = "a link to a folder" if path.is_dir() else "not a regular file"
            continue
        with _damage_reported(path):
            for member, content in _contents(path):
                file = TextFile(path, member, encoding, field)
                if reason := _why_not_text(content.read(8192), encoding):
                    left_out[str(file)] = reason
                    continue
                if encoding == "auto":
                    content.seek(0)
                    file = replace(file, encoding=_detect_encoding(file, content))
                if file.kind not in (*JSON_LINES, *TABLES):
                    file = replace(file, field=None)
                found.append(file)
    return found, left_out


def _contents(path: Path, members: Iterable[str] = ()) -> Iterator[tuple[str, BinaryIO]]:
    """Name and decompressed content of these members of an archive, or of all that are text files.

    Another file is its only member, "".
    """
    archive: Any = ZipFile(path) if path.suffix.lower() == ".zip" else None
    with archive or contextlib.nullcontext():
        for member in members or (_members(archive) if archive else [""]):
            opener = OPENERS.get(split_suffixes(member or path.name)[1], contextlib.nullcontext)
            file = archive.open(member) if archive else path.open("rb")
            with file, opener(file) as content:
                yield member, content


def _members(archive: ZipFile) -> list[str]:
    """The files in an archive, as a folder would have them: none that are hidden or of runs."""
    ignored = {*RUN_FOLDERS, "__MACOSX"}
    return sorted(
        name
        for name in set(archive.namelist())
        if not name.endswith("/")
        and not any(part.startswith(".") or part in ignored for part in name.split("/"))
    )


def _why_not_text(head: bytes, encoding: str) -> str:
    """Why a file that begins with `head` is not a text file; "" if it may be one."""
    if not head:
        return "empty"
    if head.startswith(UTF_16) and encoding == "utf-8":
        return "utf-16; read it with encoding=utf-16 or auto"
    if encoding == "auto":
        encoding = "utf-16" if head.startswith(UTF_16) else "utf-8"
    return "binary" if "\0" in head.decode(encoding, "replace") else ""


def _detect_encoding(file: TextFile, content: BinaryIO) -> str:
    """`utf-8` if all of the content is UTF-8; otherwise what charset-normalizer guesses.

    It guesses from the lines around the first character that is not UTF-8.

    Raises:
        UserError: if it has no guess.
    """
    from charset_normalizer import from_bytes

    decoder, sample = codecs.getincrementaldecoder("utf-8")(), b""
    try:
        # whole lines, so that no character is cut
        for sample in iter(lambda: content.read(SAMPLE) + content.readline(SAMPLE), b""):
            decoder.decode(sample)
        decoder.decode(b"", final=True)
        return "utf-8"
    except UnicodeDecodeError:
        if sample.startswith(UTF_16):
            return "utf-16"
        sample = b"".join(line for line in sample.splitlines(True) if not line.isascii())
    matches = from_bytes(sample, cp_exclusion=UNLIKELY)
    if not matches:
        raise corpus_error(file, " is in no encoding that is known; name it with encoding=NAME")
    # of those that make as few odd characters the most widely used
    best = min(matches, key=lambda m: (m.chaos, m.encoding != "cp1252", -m.coherence))
    return codecs.lookup(best.encoding).name


@contextlib.contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    """Turn what the readers of archives and compressed files raise into a UserError."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file cannot be read at all
        raise corpus_error(path, f" is damaged, or not what its suffix says ({error})") from error


# --- what is in them ------------------------------------------------------------------------------


def read_documents(files: Sequence[TextFile], size: int) -> Iterator[tuple[bool, str]]:
    """The documents of these files in order, in pieces of at most `size` characters.

    Yields whether a piece begins a document, and the piece. Empty documents are left out.

    Raises:
        UserError: if a file is damaged, is not in its encoding, or has a row without the field.
    """
    for path, group in groupby(files, key=lambda file: file.path):
        members = {file.member: file for file in group}
        with _damage_reported(path):
            for member, content in _contents(path, members):
                yield from _pieces(members[member], content, size)


def _pieces(file: TextFile, content: BinaryIO, size: int) -> Iterator[tuple[bool, str]]:
    codec = "utf-8-sig" if file.encoding == "utf-8" else file.encoding
    text = io.TextIOWrapper(content, codec)
    try:
        for document in [text] if file.field is None else _fields(file, text):
            begins = True
            while piece := document.read(size):
                yield begins, piece
                begins = False
    except UnicodeError as error:
        name, reason = file.encoding.upper(), getattr(error, "reason", error)
        advice = "name its encoding with encoding=NAME, or set encoding=auto to detect it"
        raise corpus_error(file, f" is not {name} text ({reason}); {advice}") from None


def _fields(file: TextFile, text: TextIO) -> Iterator[TextIO]:
    """The text in the field of each row."""
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        for line in text:
            number += 1
            yield line

    try:
        for row in _rows(file.kind, lines()):
            if file.field not in row:
                names = listed("; it has ", list(row))
                raise corpus_error(file, f", line {number} has no field={file.field}{names}")
            value = row[file.field]
            if not isinstance(value, str | None):
                kind = f"field={file.field} holds {type(value).__name__}; only strings are read"
                raise corpus_error(file, f", line {number}: {kind}")
            yield io.StringIO(value, newline=None)
    except (UserError, UnicodeError):
        raise
    except (ValueError, csv.Error, RecursionError) as error:
        kind, reason = file.kind[1:].upper(), getattr(error, "msg", error)
        raise corpus_error(file, f", line {number}: not {kind} ({reason})") from error


def _rows(kind: str, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The fields of each row."""
    if kind in JSON_LINES:
        rows = (json.loads(line) for line in lines if not line.isspace())
        return (row if isinstance(row, dict) else {} for row in rows)
    csv.field_size_limit(MAX_FIELD)
    table = csv.DictReader(lines, delimiter=TABLES[kind], strict=True)
    # a short row has None in its last fields, and a long one a list under None
    return ({k: v for k, v in row.items() if isinstance(v, str)} for row in table)
