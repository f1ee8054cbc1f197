"""Formats and encodings: what is written to a file is read back, in constant memory."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from conftest import error_of, text_of, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt_lightning.data.corpus import find_corpus

ALPHABETS = {
    "utf-8": "a,\"'{}\\\t\r\n é漢😀\ufeff\x85\u2028",
    "utf-16": "a,\"'{}\\\t\r\n é漢😀\ufeff\x85\u2028",
    "utf-32": "a\r\né漢😀\x0a\u010a",
    "latin-1": "a,\"'{}\t\r\n éß",
    "shift_jis": "a,\"'{}\t\r\n あ漢ｱ",
}
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
GERMAN = "Der Bär läuft über die Straße. Ärger gibt es häufig.\n" * 5
RUSSIAN = "Мороз и солнце; день чудесный! Ещё ты дремлешь, друг прелестный.\n" * 5


def write_zip(path: Path, members: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


# --- round trips ----------------------------------------------------------------------------------


def normalized(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def joined(documents: list[str], separator: str) -> str:
    documents = [document for document in documents if document]
    if separator:
        return separator.join(documents)
    ended = [text if text.endswith("\n") else text + "\n" for text in documents[:-1]]
    return "".join(ended + documents[-1:])


def as_json_lines(texts: list[str], ascii_only: bool) -> str:
    rows = ({"id": i, "text": text} for i, text in enumerate(texts))
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)


def as_table(texts: list[str], delimiter: str) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(texts))
    return file.getvalue()


several = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
texts_in = st.sampled_from(sorted(ALPHABETS)).flatmap(
    lambda encoding: st.tuples(
        st.just(encoding), st.lists(st.text(ALPHABETS[encoding], max_size=20), max_size=5)
    )
)
separators = st.sampled_from(["", "\n", "--"])


def check(name: Path, encoding: str, expected: list[str], separator: str, size: int, field=None):
    options = dict(encoding=encoding, separator=separator, field=field)
    if not any(expected):
        return error_of(name, **options)
    corpus = find_corpus(str(name), **options)
    assert "".join(corpus.chunks(size)) == joined(expected, separator)
    assert sum(n for n, _ in corpus.counted_chunks(size)) == sum(map(bool, expected))


@several
@given(texts_in, separators, st.sampled_from([*COMPRESS, "zip"]), st.integers(1, 9))
def test_files_come_back_from_folders_archives_and_compression(
    tmp_path_factory, encoded, separator, form, size
):
    folder, (encoding, texts) = tmp_path_factory.mktemp("texts"), encoded
    files = {f"{i}.txt": text.encode(encoding) for i, text in enumerate(texts)}
    codec = "utf-8-sig" if encoding == "utf-8" else encoding  # which drops a byte-order mark
    expected = [normalized(data.decode(codec)) for data in files.values()]
    if form == "zip":
        folder = write_zip(folder / "texts.zip", files)
    else:
        for name, data in files.items():
            write(folder / f"{name}{form}", COMPRESS[form](data))
    check(folder, encoding, expected, separator, size)


@several
@given(
    texts_in,
    separators,
    st.sampled_from([".jsonl", ".ndjson", ".csv", ".tsv"]),
    st.sampled_from(sorted(COMPRESS)),
    st.integers(1, 9),
    st.booleans(),
)
def test_rows_come_back_from_json_lines_and_tables(
    tmp_path_factory, encoded, separator, kind, compression, size, ascii_only
):
    folder, (encoding, texts) = tmp_path_factory.mktemp("rows"), encoded
    if kind in (".jsonl", ".ndjson"):
        content = as_json_lines(texts, ascii_only)
    else:
        content = as_table(texts, "," if kind == ".csv" else "\t")
    name = write(
        folder / f"rows{kind}{compression}", COMPRESS[compression](content.encode(encoding))
    )
    check(name, encoding, list(map(normalized, texts)), separator, size, field="text")


def test_rows_without_a_field_are_plain_text(tmp_path):
    content = as_json_lines(["one", "two"], True)
    assert text_of(write(tmp_path / "rows.jsonl", content)) == content
    assert text_of(write_zip(tmp_path / "rows.zip", {"a.jsonl": content})) == content


def test_a_field_is_read_from_the_files_that_have_rows(tmp_path):
    write(tmp_path / "books" / "1.csv", as_table(["one", "two"], ","))
    write(tmp_path / "books" / "2.txt", "plain\n")
    write_zip(tmp_path / "books" / "3.zip", {"a.jsonl": as_json_lines(["three"], True)})
    assert text_of(tmp_path / "books", field="text") == "one\ntwo\nplain\nthree"


# --- archives -------------------------------------------------------------------------------------


def test_an_archive_is_its_text_files_sorted_by_name(tmp_path):
    members = {"b.txt": "b\n", "a/c.txt": "c\n", "photo.png": b"\x89PNG\0", "none": ""}
    members |= {".hidden": "no", "__MACOSX/a.txt": "no", "lightning_logs/x.csv": "no"}
    members |= {"z.txt.gz": gzip.compress(b"z")}
    write_zip(tmp_path / "texts.zip", members)
    corpus = find_corpus(str(tmp_path / "texts.zip"))
    assert "".join(corpus.chunks()) == "c\nb\nz"
    assert corpus.left_out == ("texts.zip/none (empty)", "texts.zip/photo.png (binary)")
    in_folder = find_corpus(str(tmp_path))
    assert "".join(in_folder.chunks()) == "c\nb\nz" and in_folder.left_out == corpus.left_out


def test_an_archive_without_text_is_refused(tmp_path):
    error_of(write_zip(tmp_path / "none.zip", {}), "none.zip has no text in it")
    path = write_zip(tmp_path / "secret.zip", {"a.txt": "secret", "b.txt": b"\0"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1  # the first entry's flag of encryption
    path.write_bytes(data)
    error_of(path, "secret.zip is damaged, or not what its suffix says", "'a.txt' is encrypted")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zip"])
@pytest.mark.parametrize("cut", [0.9, 0])
def test_a_damaged_archive_is_named(tmp_path, suffix, cut):
    text = GERMAN.encode()
    path = tmp_path / f"text{suffix}"
    if suffix == ".zip":
        write_zip(path, {"a.txt": text})
    else:
        write(path, COMPRESS[suffix](text))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * cut)] or b"no archive at all")
    error_of(path, path, "is damaged, or not what its suffix says")


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": b}\n', "line 3: not JSONL (Expecting value)"),
        ("a.jsonl", '{"text": "a"}\n{"id": 1}', "line 2 has no field=text; it has id"),
        ("a.jsonl", '["text"]\n', "line 1 has no field=text"),
        ("a.jsonl", '{"text": ["a"]}\n', "line 1: field=text holds list; only strings are read"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSONL"),
        ("a.csv", "id,title\n1,b\n", "line 2 has no field=text; it has id, title"),
        ("a.csv", "id,text\n1,b\n2\n", "line 3 has no field=text; it has id"),
        ("a.csv", 'id,text\n1,b\n2,"c\nd\n', "line 4: not CSV"),
        ("a.tsv", 'id\ttext\n1\t"b"c\n', "line 2: not TSV"),
        ("a.csv", "id,text\n", "is empty"),
        ("a.jsonl", '{"text": null}\n{"text": ""}\n', "is empty"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, name, content, part):
    path = write(tmp_path / name, content)
    error_of(path, path, part, field="text")


def test_reading_a_compressed_text_takes_constant_memory(tmp_path):
    text = b"A line that compresses well.\n" * 1_000_000
    paths = [
        write(tmp_path / "text.gz", gzip.compress(text, 1)),
        write_zip(tmp_path / "text.zip", {"text.txt": text}),
    ]
    for path in paths:
        corpus = find_corpus(str(path))
        tracemalloc.start()
        length = sum(map(len, corpus.chunks(1 << 16)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert length == len(text) and peak < 2_000_000


# --- encodings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf9", "hex", "rot13", "", "nul\0"])
def test_an_unknown_encoding_is_refused(tmp_path, encoding):
    path = write(tmp_path / "a.txt", "a")
    error_of(path, f"encoding={encoding} is neither auto nor a text encoding", encoding=encoding)


def test_the_names_of_an_encoding_are_one(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffä")
    found = [find_corpus(str(path), encoding=name) for name in ("utf-8", "UTF8", "U8")]
    assert len({corpus.sha256() for corpus in found}) == 1
    assert "".join(found[2].chunks()) == "ä"


def test_text_in_another_encoding_is_refused_with_what_reads_it(tmp_path):
    german = write(tmp_path / "german.txt", GERMAN.encode("cp1252"))
    error_of(german, "german.txt is not UTF-8 text", "set encoding=auto to detect it")
    error_of(german, "is not ASCII text", "encoding=NAME", encoding="ascii")
    wide = write(tmp_path / "wide.txt", GERMAN.encode("utf-16"))
    long = write(tmp_path / "long.txt", (GERMAN * 2000).encode("utf-16"))
    assert text_of(long, encoding="auto") == GERMAN * 2000
    error_of(wide, "wide.txt (utf-16; read it with encoding=utf-16 or auto)")
    assert text_of(wide, encoding="utf-16") == text_of(german, encoding="cp1252") == GERMAN


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        (GERMAN, "cp1252"),
        ("Le cœur a ses raisons que la raison ne connaît point, où l’on naît.\n" * 3, "cp1252"),
        ("«Ça coûte 12 €» – et l’élève n’a rien répondu. Où vas-tu?\n" * 9, "cp1252"),
        ("Gemüt über alles, naïve façade. " * 20, "cp1252"),
        ("吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n" * 20, "shift_jis"),
        ("床前明月光，疑是地上霜。举头望明月，低头思故乡。\n" * 20, "gb18030"),
        (GERMAN, "utf-16"),
        (RUSSIAN, "utf-8"),
        ("plain\n" * 100_000 + RUSSIAN, "cp1251"),  # far from the beginning
        ("plain\n" * 100_000 + GERMAN + "plain", "utf-8"),
    ],
)
def test_auto_finds_an_encoding_that_reads_the_text(tmp_path, capsys, text, encoding):
    path = write(tmp_path / "text", text.encode(encoding))
    assert text_of(path, encoding="auto") == text
    err = capsys.readouterr().err
    assert err.startswith("encoding=auto found ") and err.endswith(f": {path}\n")


def test_auto_chooses_for_each_file(tmp_path, capsys):
    write(tmp_path / "a" / "1.txt", RUSSIAN)
    write(tmp_path / "a" / "2.txt", RUSSIAN.encode("cp1251"))
    write_zip(tmp_path / "a" / "3.zip", {"r.txt": RUSSIAN.encode("utf-16")})
    assert text_of(tmp_path / "a", encoding="auto") == RUSSIAN * 3
    assert capsys.readouterr().err.count("\n") == 3


# --- what a digest tells apart --------------------------------------------------------------------


def test_the_digest_tells_how_the_files_are_read(tmp_path):
    content = as_json_lines(["a", "b"], True)
    names = [write(tmp_path / name, content) for name in ("a.jsonl", "a.ndjson", "a.csv")]
    found = [find_corpus(str(name)).sha256() for name in names]
    assert len(set(found)) == 1  # plain text
    options = [{"field": "text"}, {"field": "id"}, {"encoding": "ascii"}, {"separator": "-"}]
    found += [find_corpus(str(names[0]), **option).sha256() for option in options]
    found += [find_corpus(str(names[2]), field="text").sha256()]
    assert len(set(found)) == 6
