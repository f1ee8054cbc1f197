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
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TextIO
from zipfile import BadZipFile, ZipFile

from gpt_lightning.errors import UserError, did_you_mean

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
JSON_LINES, TABLES = (".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}
RUN_FOLDERS = ("lightning_logs", "checkpoints")  # what runs write is not part of a text
MAX_ROW = 1 << 26  # characters: a row is read as a whole
SAMPLE = 1 << 16  # bytes from which an encoding is guessed
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, BadZipFile, NotImplementedError)
BOMS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


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

    @property
    def how(self) -> str:
        """How the file is read, if not as plain UTF-8 text; "" if it is."""
        if self.field is None:
            return "" if self.encoding == "utf-8" else self.encoding
        return f"{self.encoding}, {self.kind}: {self.field}"

    @contextlib.contextmanager
    def open(self, archive: ZipFile | None = None) -> Iterator[BinaryIO]:
        """The decompressed bytes. `archive` is that of a member, if it is open already."""
        compression = split_suffixes(self.member or self.path.name)[1]
        with contextlib.ExitStack() as stack:
            if self.member:
                archive = archive or stack.enter_context(ZipFile(self.path))
                file = stack.enter_context(archive.open(self.member))
            else:
                file = stack.enter_context(self.path.open("rb"))
            if compression:
                file = stack.enter_context(OPENERS[compression](file))
            yield file


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


# --- which files ----------------------------------------------------------------------------------


def check_encoding(encoding: str) -> str:
    """The canonical name of a codec of Python; "auto" stays as it is.

    Raises:
        UserError: if there is no such codec for text.
    """
    if encoding == "auto":
        return encoding
    try:
        b"a".decode(encoding, "replace")
        return codecs.lookup(encoding).name
    except (LookupError, UnicodeError, ValueError):
        hint = did_you_mean(encoding.lower(), ["utf-8", "utf-16", "latin-1", "cp1252", "auto"])
        raise UserError(
            f"encoding={encoding} is neither auto nor a text encoding of Python{hint}"
        ) from None


def find_text_files(
    paths: Iterable[Path], encoding: str, field: str | None
) -> tuple[list[TextFile], dict[str, str]]:
    """The text files at these paths and in their archives, in order.

    Args:
        paths: files.
        encoding: of all of them; "auto" detects that of each.
        field: the field that is read, of files that have rows.

    Returns:
        the files, and why each of the others is left out.

    Raises:
        UserError: if a file is damaged, or no encoding fits it.
    """
    found, left_out = [], {}
    for path in paths:
        with _damage_reported(path), _open_archive(path) as archive:
            for member in [""] if archive is None else _members(archive):
                file = TextFile(path, member, encoding)
                if reason := _why_not_text(file, archive):
                    left_out[str(file)] = reason
                    continue
                found.append(
                    TextFile(
                        path,
                        member,
                        detect_encoding(file, archive) if encoding == "auto" else encoding,
                        field if file.kind in (*JSON_LINES, *TABLES) else None,
                    )
                )
    return found, left_out


def _open_archive(path: Path) -> contextlib.AbstractContextManager[ZipFile | None]:
    """The archive at this path; None if another file is there."""
    if path.suffix.lower() == ".zip" and path.is_file():
        return ZipFile(path)
    return contextlib.nullcontext()


def _members(archive: ZipFile) -> list[str]:
    """The files in an archive, as a folder would have them: none that are hidden or of runs."""
    ignored = {*RUN_FOLDERS, "__MACOSX"}
    return sorted(
        name
        for name in set(archive.namelist())
        if not name.endswith("/")
        and not any(part.startswith(".") or part in ignored for part in name.split("/"))
    )


def _why_not_text(file: TextFile, archive: ZipFile | None) -> str:
    """Why this is not a text file, as far as its first bytes tell; "" if it is one."""
    if file.path.is_dir():
        return "a link to a folder"
    if not file.path.is_file():
        return "not a regular file"
    if archive and archive.getinfo(file.member).flag_bits & 1:
        return "encrypted"
    with file.open(archive) as content:
        head = content.read(8192)
    bom = next((name for mark, name in BOMS.items() if head.startswith(mark)), None)
    if bom and file.encoding == "utf-8":
        return f"{bom}; read it with encoding={bom} or auto"
    encoding = file.encoding if file.encoding != "auto" else bom or "utf-8"
    return "empty" if not head else "binary" if "\0" in head.decode(encoding, "replace") else ""


def detect_encoding(file: TextFile, archive: ZipFile | None = None) -> str:
    """`utf-8` if the whole file is UTF-8; otherwise what charset-normalizer guesses.

    It guesses from the lines around the first character that is not UTF-8.

    Raises:
        UserError: if it has no guess.
    """
    from charset_normalizer import from_bytes

    decoder, sample = codecs.getincrementaldecoder("utf-8")(), b""
    with file.open(archive) as content:
        try:
            # whole lines, so that no character is cut
            for sample in iter(lambda: content.read(SAMPLE) + content.readline(SAMPLE), b""):
                decoder.decode(sample)
            decoder.decode(b"", final=True)
            return "utf-8"
        except UnicodeDecodeError:
            pass
    for mark, name in BOMS.items():
        if sample.startswith(mark):
            return name
    lines = [line for line in sample.splitlines(True) if not line.isascii()]
    matches = from_bytes(b"".join(lines))
    if not matches:
        raise corpus_error(file, " is in no encoding that is known; name it with encoding=NAME")
    # of equally good ones the most widely used
    best = min(matches, key=lambda m: (m.chaos, -m.coherence, m.encoding != "cp1252"))
    return codecs.lookup(best.encoding).name


# --- what is in them ------------------------------------------------------------------------------


def read_documents(files: Sequence[TextFile], size: int) -> Iterator[tuple[bool, str]]:
    """The documents of these files in order, in pieces of at most `size` characters.

    Yields whether a piece begins a document, and the piece. Empty documents are left out.

    Raises:
        UserError: if a file is damaged, is not in its encoding, or has a row without the field.
    """
    for path, group in groupby(files, key=lambda file: file.path):
        with _damage_reported(path), _open_archive(path) as archive:
            for file in group:
                with file.open(archive) as content, _encoding_reported(file):
                    codec = "utf-8-sig" if file.encoding == "utf-8" else file.encoding
                    text = io.TextIOWrapper(content, codec)
                    documents = [text] if file.field is None else _fields(file, text)
                    for document in documents:
                        begins = True
                        while piece := document.read(size):
                            yield begins, piece
                            begins = False


def _fields(file: TextFile, text: TextIO) -> Iterator[TextIO]:
    """The text in the field of each row."""
    for number, row in _rows(file, text):
        if not isinstance(row, dict) or file.field not in row:
            names = listed("; it has ", list(row)) if isinstance(row, dict) else ""
            raise corpus_error(file, f", line {number} has no field={file.field}{names}")
        value = row[file.field]
        if not isinstance(value, str | None):
            kind = type(value).__name__
            raise corpus_error(file, f", line {number}: field={file.field} is no text but {kind}")
        yield io.StringIO(value, newline=None)


def _rows(file: TextFile, text: TextIO) -> Iterator[tuple[int, Any]]:
    """Line number and content of each row."""
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        while line := text.readline(MAX_ROW):
            number += 1
            if len(line) == MAX_ROW:
                raise ValueError(f"longer than {MAX_ROW:,} characters")
            yield line

    try:
        if file.kind in JSON_LINES:
            for line in lines():
                if not line.isspace():
                    yield number, json.loads(line)
            return
        csv.field_size_limit(MAX_ROW)
        for row in csv.DictReader(lines(), delimiter=TABLES[file.kind], strict=True):
            # a short row has None in its last fields, and a long one a list under None
            yield number, {name: value for name, value in row.items() if isinstance(value, str)}
    except UnicodeError:
        raise
    except (ValueError, csv.Error, RecursionError) as error:
        kind = "JSON" if file.kind in JSON_LINES else file.kind[1:].upper()
        reason = getattr(error, "msg", error)
        raise corpus_error(file, f", line {number}: not {kind} ({reason})") from error


# --- errors ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    """Turn what the readers of archives and compressed files raise into a UserError."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file cannot be read at all
        raise corpus_error(path, f" is damaged, or not what its suffix says ({error})") from error


@contextlib.contextmanager
def _encoding_reported(file: TextFile) -> Iterator[None]:
    try:
        yield
    except UnicodeError as error:
        reason, advice = getattr(error, "reason", error), "name the right one with encoding=NAME"
        if file.encoding == "utf-8":
            advice = "convert it to UTF-8"
            with contextlib.suppress(UserError):
                advice += f", or set encoding=auto, which takes it for {detect_encoding(file)}"
        name = file.encoding.upper()
        raise corpus_error(file, f" is not {name} text ({reason}); {advice}") from None
