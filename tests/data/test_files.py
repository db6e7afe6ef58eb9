"""Patterns become a checked list of files of one kind."""

import bz2
import gzip
import hashlib
import lzma
import os
import socket
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from gpt2.base.errors import DataError
from gpt2.data import files

TEXT = "Some text, é.\n" * 40
COMPRESS = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress}
COMPRESS[".xz"] = lzma.compress


def write(*names: str, content: bytes | str = TEXT) -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fingerprint(*names: str) -> str:
    """As finished folders have it, which must stay valid."""
    digest = hashlib.sha256()
    for content in (Path(name).read_bytes() for name in names):
        digest.update(b"%d " % len(content) + content[:4096] + content[-4096:])
    return digest.hexdigest()[:16]


def found(*patterns: str) -> list[str]:
    return [str(path) for path in files.find(patterns).paths]


ODD_NAMES = [
    "a[1]",
    "a*",
    "a?",
    "[!a]",
    "a::b",
    " a b ",
    "~a",
    "a\nb",
    "-a",
    "{a,b}",
    "a#b%20",
    "é",
    "$A",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_is_a_name_in_files_folders_and_the_working_directory(
    name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Beside what the name would match as a pattern."""
    for other in ("a1", "ab", "a", "b", "x"):
        write(f"{other}.txt", f"{other}/in.txt")
    write(f"{name}.txt", f"{name}/in.txt", f"{name}/{name}.txt", f"{name}/deep/{name}/z.txt")
    assert found(f"{name}.txt") == [f"{name}.txt"]
    assert found(f"{name}/*.txt") == sorted([f"{name}/in.txt", f"{name}/{name}.txt"])
    assert found(f"{name}/{name}.txt") == [f"{name}/{name}.txt"]
    assert found(f"{name}/deep/{name}/*") == [f"{name}/deep/{name}/z.txt"]
    assert len(found(f"{name}/**/*.txt")) == 3
    assert found(f"{tmp_path}/{name}/i*.txt") == [f"{tmp_path}/{name}/in.txt"]
    monkeypatch.chdir(name)
    assert found("i*.txt") == ["in.txt"]
    assert found(f"../{name}/i*.txt") == [f"../{name}/in.txt"]


def test_names_that_are_not_utf8():
    name = os.fsdecode(b"caf\xe9.txt")
    write(name, "b.txt")
    assert found("*.txt") == sorted(["b.txt", name])
    assert found(name) == [name]
    Path(name).write_bytes(b"%PDF-1.4")
    with pytest.raises(DataError, match=r"^'caf\\udce9.txt' is a PDF") as error:
        found("*.txt")
    str(error.value).encode()  # a terminal can show it


def test_the_longest_name():
    name = "é" * 125 + ".txt"
    write(name)
    assert found("*") == found(name) == [name]


def test_patterns_are_expanded_in_sorted_order_once():
    write("b.txt", "a.txt", "c/b.txt", "c/d/e.txt", ".hidden.txt", ".git/x.txt", "c/d/f.csv")
    os.mkdir("folder.txt")
    assert files.expand(["*.txt"]) == ["a.txt", "b.txt"]
    assert files.expand(["**/*.txt"]) == ["a.txt", "b.txt", "c/b.txt", "c/d/e.txt"]
    assert files.expand(["c/**"]) == ["c/b.txt", "c/d/e.txt", "c/d/f.csv"]
    assert files.expand(["b.txt", "./a.txt", "c/../a.txt", "*.txt"]) == ["a.txt", "b.txt"]
    assert files.expand([".*.txt"]) == [".hidden.txt"]
    assert files.expand(["[ab].txt", "?.txt"]) == ["a.txt", "b.txt"]


def test_an_absolute_and_a_relative_name_are_one_file(tmp_path: Path):
    write("a.txt")
    result = files.find(["a.txt", f"{tmp_path}/a.txt"])
    assert result.paths == (Path("a.txt"),)
    assert result.skipped == ()


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write("home/a.txt", "home/w[1]/b.txt", "home/w1/c.txt", "~/d.txt")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert found("~/a.txt") == [f"{tmp_path}/home/a.txt"]
    assert found("~/w[1]/*") == [f"{tmp_path}/home/w[1]/b.txt"]
    assert found("~/d.txt") == ["~/d.txt"]


def test_two_names_of_one_file_are_read_once_with_a_note():
    write("a.txt", "c.txt", "folder/d.txt")
    os.symlink("a.txt", "b.txt")
    os.link("c.txt", "e.txt")
    os.symlink("folder", "link")
    result = files.find(["**/*.txt"])
    assert [str(path) for path in result.paths] == ["a.txt", "c.txt", "folder/d.txt"]
    assert result.skipped == (
        "b.txt: the same file as a.txt",
        "e.txt: the same file as c.txt",
        "link/d.txt: the same file as folder/d.txt",
    )


def test_a_link_to_its_own_folder_ends():
    write("a.txt")
    os.symlink(".", "loop")
    assert found("**/*.txt") == ["a.txt"]


def test_a_folder_before_two_dots_may_be_a_link(tmp_path: Path):
    write("a.txt", content="the wrong one")
    write("real/a.txt", "real/sub/b.txt", content="the right one")
    os.symlink("real/sub", "link")
    (path,) = files.find(["link/../a.txt"]).paths
    assert path.read_text() == "the right one"


@pytest.mark.parametrize(
    "pattern", ["none.txt", "*.csv", "none/*.txt", "**/*.csv", "", "a.txt/", "a.txt/*"]
)
def test_a_pattern_that_matches_nothing_is_named_even_if_others_match(pattern):
    write("a.txt")
    with pytest.raises(DataError) as error:
        files.find(["*.txt", pattern])
    assert str(error.value).startswith(f"no file matches {pattern}")
    assert "*.txt;" not in str(error.value)


def test_a_bracket_of_a_name_in_a_pattern():
    write("x/part[1]-a.txt")
    with pytest.raises(DataError, match=r"\[\[\] stands for a \[ of the name"):
        files.expand(["*/part[1]-*.txt"])
    assert files.expand(["*/part[[]1]-*.txt"]) == ["x/part[1]-a.txt"]


@pytest.mark.parametrize(
    ("names", "pattern", "hint"),
    [
        (["d/a.JSONL.gz", "d/b.JSONL.gz", "d/c.txt"], "d", "use 'd/*.JSONL.gz'"),
        (["d/a.txt"], "d/", r"use 'd/*.txt'"),
        (["d/a.txt"], ".", r"use '**/*.txt'"),
        (["d/e/f/a.parquet"], "d", "use 'd/**/*.parquet'"),
        (["d[1]/e/a.csv", "d1/e/b.txt"], "d[1]/*", "use 'd[1]/e/*.csv'"),
        (["d/a.docx"], "d", "the folder d has no .txt, .jsonl"),
        (["d/a.docx"], "*", "the folder d has no .txt, .jsonl"),
    ],
)
def test_a_folder_is_answered_with_a_pattern_for_its_files(names, pattern, hint):
    write(*names)
    with pytest.raises(DataError) as error:
        files.find([pattern])
    assert str(error.value).startswith(f"no file matches {pattern}; ")
    assert hint in str(error.value)
    if "use" in hint:
        assert files.expand([hint.split("'")[1]])


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (".txt", ["a.txt", "b.TXT", "c.txt.gz", "d.Txt.ZST", "e.txt.bz2", "f.txt.xz"]),
        (".jsonl", ["a.jsonl", "b.ndjson.GZ", "c.v2.jsonl"]),
        (".json", ["a.json"]),
        (".csv", ["a.csv"]),
        (".tsv", ["a.tsv.xz"]),
    ],
)
def test_kinds_in_any_case_and_compression(kind, names):
    for name in names:
        compress = COMPRESS.get(os.path.splitext(name)[1].lower(), bytes)
        write(name, content=compress(TEXT.encode()))
    result = files.find(["*"])
    assert result.kind == kind
    assert result.paths == tuple(Path(name) for name in names)
    assert result.fingerprint == fingerprint(*names)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192, 100_000])
def test_the_fingerprint_is_that_of_old_folders(size):
    write("a.txt", "b.txt", content=b"a" * (size // 2) + b"b" * (size - size // 2))
    assert files.find(["*.txt"]).fingerprint == fingerprint("a.txt", "b.txt")


def test_files_of_several_or_unknown_kinds():
    write("a.txt", "b.jsonl", "c.json")
    with pytest.raises(DataError, match=r"files of one kind, got \.json, \.jsonl, \.txt; choose"):
        files.find(["*"])
    write("d.doc", "e")
    with pytest.raises(DataError, match=r"kind .*\.doc.* cannot be read; expected one of \.txt, "):
        files.find(["*"])
    with pytest.raises(DataError, match=r"kind without an ending cannot be read.* leave out e,"):
        files.find(["e"])
    write("f.txt.gz.gz")
    with pytest.raises(DataError, match=r"kind \.gz cannot be read"):
        files.find(["f.txt.gz.gz"])


@pytest.mark.parametrize("name", ["._a.txt", ".DS_Store", "Thumbs.db"])
def test_what_the_system_made_is_left_out_of_a_pattern_and_refused_as_a_name(name):
    write("a.txt", ".b.txt", name)
    result = files.find(["*", ".*"])
    assert [str(path) for path in result.paths] == [".b.txt", "a.txt"]
    assert len(result.skipped) == 1 and name in result.skipped[0]
    with pytest.raises(DataError, match=f"{name} is .*Windows|macOS.*; leave it out"):
        files.find(["a.txt", name])


def test_a_broken_link_is_refused_by_name():
    write("a.txt")
    os.symlink("../.git/annex/objects/x", "b.txt")
    for pattern in ("*.txt", "b.txt"):
        with pytest.raises(DataError, match=r"^b\.txt is a broken link to \.\./\.git/annex/obj"):
            files.find([pattern])
    os.symlink("c.txt", "c.txt")
    with pytest.raises(DataError, match=r"c\.txt is a broken link to c\.txt"):
        files.find(["c.txt"])


def test_pipes_sockets_and_devices_are_refused_by_name():
    os.mkfifo("pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        for name, what in {
            "pipe.txt": "a pipe",
            "socket.txt": "a socket",
            "/dev/null": "a device",
        }.items():
            with pytest.raises(DataError, match=f"^{name} is {what}; expected a file"):
                files.expand([name])
    with pytest.raises(DataError, match="a pipe"):
        files.expand(["*.txt"])


def test_folders_and_files_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch):
    write("a/x.txt", "b/y.txt", "b/c/z.txt")
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "b" not in Path(path).parts and allowed(path, mode)
    )
    result = files.find(["**/x.txt"])  # root reads everything, so y and z are there
    assert result.skipped == ("b/: may not be read", "b/c/: may not be read")
    for pattern in ("b/none", "b"):
        with pytest.raises(DataError, match=f"no file matches {pattern}: b may not be read"):
            files.find([pattern])


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_one_line():
    write("a.txt")
    os.chmod("a.txt", 0)
    with pytest.raises(DataError, match=r"^cannot read a\.txt: Permission denied$"):
        files.find(["a.txt"])


def test_a_file_that_disappears_is_one_line(monkeypatch: pytest.MonkeyPatch):
    write("a.txt", "b.txt")
    expand = files._expand

    def then_remove(patterns: list[str]) -> tuple[list[str], list[str]]:
        result = expand(patterns)
        os.remove("a.txt")
        return result

    monkeypatch.setattr(files, "_expand", then_remove)
    with pytest.raises(DataError, match=r"^cannot read a\.txt: No such file or directory$"):
        files.find(["*.txt"])


REFUSED = [
    (b"<!DOCTYPE html>\n<html><body>404", "web page.*download or copy it again"),
    (b"\xef\xbb\xbf\r\n <!-- saved from url --> <!-- x\n --><HTML lang=en>", "web page"),
    (b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0">', "web page"),
    (b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code>', "web page"),
    ("\ufeff<!doctype html>".encode("utf-16-le"), "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1", "git lfs pull"),
    (b"/annex/objects/SHA256E-s1048576--abc.txt\n", "git annex get"),
    (gzip.compress(b"text", mtime=0), r"compressed by gzip; add \.gz to its name"),
    (zstandard.compress(b"text"), r"compressed by zstd; add \.zst to its name"),
    (bz2.compress(b"text"), r"compressed by bzip2; add \.bz2 to its name"),
    (lzma.compress(b"text"), r"compressed by xz; add \.xz to its name"),
    (b"PK\x03\x04\x14\x00" + bytes(100), "a zip archive"),
    (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "a PDF"),
    (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "a PNG"),
    (b"\xff\xd8\xff\xe0\x00\x10JFIF", "a JPEG"),
    (b"\x7fELF\x02\x01\x01", "a program"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"PAR1\x15\x04\x15", r"a Parquet file; give it the ending \.parquet"),
    (b"a.txt".ljust(257, b"\x00") + b"ustar\x0000" + bytes(200), "a tar archive"),
    (TEXT.encode("utf-16-le"), "UTF-16LE without .*iconv -f UTF-16LE -t UTF-8"),
    (TEXT.encode("utf-16-be"), "UTF-16BE without"),
    ("日本語のテキスト。\n2024年\n".encode("utf-16-le") * 100, "UTF-16LE without"),
    (TEXT.encode("utf-32-le"), "UTF-32LE without"),
    (TEXT.encode("utf-32-be"), "UTF-32BE without"),
    (bytes(5000), "binary, not text, with many NUL bytes"),
    (bytes(range(256)) * 16, "binary, not text"),
    (b"\x00\x01\x02text" * 100, "binary"),
]


@pytest.mark.parametrize(
    ("kind", "compression"),
    [("txt", ""), ("csv", ".gz"), ("jsonl", ".zst"), ("json", ".bz2"), ("tsv", ".xz")],
)
@pytest.mark.parametrize(("content", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_not_text_is_refused_by_name(kind, content, message, compression):
    if compression and "to its name" in message:
        message = "twice; decompress it with"
    compress = COMPRESS.get(compression, bytes)
    write(f"good.{kind}{compression}", content=compress(TEXT.encode()))
    write(f"bad.{kind}{compression}", content=compress(content))
    with pytest.raises(DataError, match=rf"^bad\.{kind}{compression} is .*{message}"):
        files.find(["*"])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"a",
        b"caf\xe9 " * 1000,
        b"before \x00 and after a NUL byte\n",
        "\ufeffwith a mark".encode(),
        "with a mark".encode("utf-16"),
        "with a mark".encode("utf-32"),
        "日本語".encode("shift-jis") * 1000,
        "русский".encode("koi8-r") * 1000,
        "日本語のテキスト。\n".encode("iso-2022-jp") * 100,
        "中文 ".encode("gb18030") * 1000,
        b"\x1b[31mred\x1b[0m\n" * 1000,
        b"no html: <p>a paragraph</p>",
        b"html> <html",
        b"<htmlish>",
        b"BZh is no magic number alone",
        b"PAR1 is a word too",
        b"PK and RAR and GIF89a are words",
        b"the end in DOS\r\n\x1a",
        b"\x0c\x0cpages\x0c" * 10,
        b"fields\x01of\x01Hive\n" * 10,
        "🙂".encode() * 1024,
        "x🙂".encode() * 1024,  # cut in the middle of a character after 4096 bytes
    ],
)
def test_text_is_text(content):
    write("a.txt", content=content)
    for ending, compress in COMPRESS.items():
        write(f"a.txt{ending}", content=compress(content))
    assert len(found("*")) == 5


def test_compressed_files_that_are_something_else_or_empty():
    for name in ("a.txt.gz", "b.parquet.zst"):
        write(name, content=b"")
        with pytest.raises(DataError, match=rf"^{name} is empty \(0 bytes\); download or copy"):
            files.find([name])
        write(name, content=b"<html><head><title>404")
        with pytest.raises(DataError, match=f"^{name} is a web page"):
            files.find([name])
        write(name, content="text")
        with pytest.raises(DataError, match=f"^{name} is not compressed by .*rename it to "):
            files.find([name])
        os.remove(name)


def test_the_other_files_that_cannot_be_used_are_counted():
    write("a.txt", *(f"b{number}.txt" for number in range(3)), content=b"%PDF-1.4")
    write("c.txt")
    with pytest.raises(DataError, match=r"^a\.txt is a PDF.* \(3 other files cannot be used"):
        files.find(["*.txt"])


def parquet_bytes(**options: str) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), sink, **options)
    return sink.getvalue().to_pybytes()


def arrow_bytes(new: type) -> bytes:
    table = pyarrow.table({"text": ["a", "b"] * 1000})
    sink = pyarrow.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_parquet_files():
    whole = parquet_bytes()
    write("a.parquet", content=whole)
    write("b.PARQUET.GZ", content=gzip.compress(whole))
    write("c.parquet.zst", content=zstandard.compress(whole))
    assert len(found("*")) == 3
    for size in (*range(0, len(whole), 7), len(whole) - 1):
        write("cut.parquet", content=whole[:size])
        with pytest.raises(DataError, match=r"^cut\.parquet is (truncated|empty|not a Parquet)"):
            files.find(["cut.parquet"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PARE" + bytes(100) + b"PARE", "an encrypted Parquet file"),
        (b"PAR1" + bytes(100) + b"PARE", "an encrypted Parquet file"),
        (b"text\n1\n", "not a Parquet file"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"<html>", "a web page"),
        (gzip.compress(b"text", mtime=0), "compressed by gzip; add .gz"),
        (b"", "empty"),
        (b"PAR1", "truncated"),
    ],
)
def test_what_is_not_parquet_is_refused_by_name(content, message):
    write("a.parquet", content=content)
    with pytest.raises(DataError, match=rf"^a\.parquet is .*{message}"):
        files.find(["*"])


def test_arrow_files_and_streams():
    file, stream = arrow_bytes(pyarrow.ipc.new_file), arrow_bytes(pyarrow.ipc.new_stream)
    legacy = pyarrow.ipc.IpcWriteOptions(use_legacy_format=True)
    old = arrow_bytes(lambda sink, schema: pyarrow.ipc.new_stream(sink, schema, options=legacy))
    write("a.arrow", content=file)
    write("b.arrow", content=stream)
    write("c.arrow.xz", content=lzma.compress(file))
    write("d.arrow.xz", content=lzma.compress(stream))
    write("e.arrow", content=old)
    assert len(found("*")) == 5
    for size in (0, 1, 7, 8, 100, len(file) - 1):
        write("cut.arrow", content=file[:size])
        with pytest.raises(DataError, match=r"^cut\.arrow is (truncated|empty|not an Arrow)"):
            files.find(["cut.arrow"])
    for content in (b"text,other\n", b"PAR1\x15", bytes(100), b"<html>"):
        write("other.arrow", content=content)
        with pytest.raises(DataError, match=r"^other\.arrow is "):
            files.find(["other.arrow"])


def test_a_parquet_file_of_another_name_says_its_ending():
    write("a.csv", content=parquet_bytes())
    with pytest.raises(DataError, match=r"a Parquet file; give it the ending \.parquet"):
        files.find(["a.csv"])
