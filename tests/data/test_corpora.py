import gzip
import json
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from gpt2.base.errors import DataError
from gpt2.data import corpora
from gpt2.data.corpus import Corpus, Document


def test_the_standard_library_is_its_source_files_in_sorted_order(tmp_path: Path, monkeypatch):
    for name, content in {
        "b.py": b"b = 1\n",
        "a/z.py": "é = 2\n".encode(),
        "a/latin.py": b"# caf\xe9\n",
        "a.txt": b"not Python",
        "site-packages/x.py": b"not ours",
        "a/__pycache__/z.py": b"a cache",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    documents = list(corpora.python_stdlib())
    assert [document.text for document in documents] == ["# caf\ufffd\n", "é = 2\n", "b = 1\n"]
    assert [document.replaced for document in documents] == [True, False, False]
    assert corpora.CORPORA["python_stdlib"].count() == 3


def test_the_standard_library_of_this_python_is_large_enough():
    count = corpora.CORPORA["python_stdlib"].count()
    assert count is not None
    assert count > 500


def test_hyphens_and_underscores_are_equivalent():
    assert corpora.find("python-stdlib") is corpora.find("python_stdlib")
    assert corpora.find("nothing") is None


def texts(corpus: Corpus, skip: int = 0) -> list[str]:
    return [document.text for document in corpus.documents(skip)]


def test_documents_after_the_first_n():
    corpus = corpora.CORPORA["python_stdlib"]
    assert texts(corpus, corpus.count() - 2) == texts(corpus)[-2:]


@pytest.mark.parametrize("streaming", [True, False])
def test_data_set_of_a_local_folder(tmp_path: Path, streaming: bool, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    corpus = corpora.hub("x", str(folder), streaming=streaming)
    assert texts(corpus) == ["one", "two", "three"]
    assert texts(corpus, skip=1) == ["two", "three"]


def write_files(folder: Path, kind: str) -> None:
    """Two files with the texts a0, a1, b0 (a `.txt` file is one document)."""
    rows = {"a": ["a0", "a1 é"], "b": ["b0"]}
    for name, values in rows.items():
        path = folder / f"{name}{kind}"
        if kind.startswith(".parquet"):
            parquet.write_table(pyarrow.table({"body": values}), path)
            continue
        text = "\n".join(values)
        if kind.startswith(".jsonl"):
            text = "".join(json.dumps({"body": value}) + "\n" for value in values)
        if kind.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode()))
        elif kind.endswith(".zst"):
            path.write_bytes(zstandard.compress(text.encode()))
        else:
            path.write_text(text)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (".txt", ["a0\na1 é", "b0"]),
        (".txt.gz", ["a0\na1 é", "b0"]),
        (".txt.zst", ["a0\na1 é", "b0"]),
        (".jsonl", ["a0", "a1 é", "b0"]),
        (".jsonl.gz", ["a0", "a1 é", "b0"]),
        (".jsonl.zst", ["a0", "a1 é", "b0"]),
        (".parquet", ["a0", "a1 é", "b0"]),
    ],
)
def test_files_in_sorted_order(tmp_path: Path, kind: str, expected: list[str]):
    write_files(tmp_path, kind)
    corpus = corpora.local_files("x", [str(tmp_path / f"*{kind}")], text_field="body")
    assert texts(corpus) == expected
    assert texts(corpus, skip=1) == expected[1:]


def test_bytes_that_are_not_utf8_are_replaced_and_noted(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (document,) = corpora.local_files("x", [str(tmp_path / "*.txt")]).documents(0)
    assert document == Document("caf\ufffd", replaced=True)


def test_files_that_are_not_one_corpus(tmp_path: Path):
    with pytest.raises(DataError, match="no file matches"):
        corpora.local_files("x", [str(tmp_path / "*")])
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.parquet").touch()
    with pytest.raises(DataError, match=r"expected files of one kind, got \.parquet, \.txt"):
        corpora.local_files("x", [str(tmp_path / "*")])
    (tmp_path / "c.csv").touch()
    with pytest.raises(
        DataError, match=r"files of kind \.csv cannot be read; expected one of \.txt, "
    ):
        corpora.local_files("x", [str(tmp_path / "*")])
    with pytest.raises(
        DataError, match=r"no file matches .*; for the files of a folder use '.*\*\.txt'"
    ):
        corpora.local_files("x", [str(tmp_path)])


def test_a_file_that_matches_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.chdir(tmp_path)
    assert texts(corpora.local_files("x", ["a.txt", "*.txt", "./a.txt"])) == ["one"]


def test_other_files_under_the_same_names_are_another_corpus(tmp_path: Path):
    def source(text: str) -> str:
        (tmp_path / "a.txt").write_text(text)
        return corpora.local_files("x", [str(tmp_path / "a.txt")]).source

    assert source("one") == source("one")
    assert len({source("one"), source("two"), source("one more")}) == 3


def test_a_null_is_an_empty_document(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n')
    assert texts(corpora.local_files("x", [str(tmp_path / "a.jsonl")])) == ["one", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"body": "one"}\n', "record 0 has no field 'text'; choose one of body with --text_field"),
        ('{"text": 1}\n', "record 0: expected text in field 'text', got int; choose one of text"),
        ("not JSON", "cannot read .*a.jsonl"),
    ],
)
def test_records_that_cannot_be_read_are_one_error(tmp_path: Path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        texts(corpora.local_files("x", [str(tmp_path / "a.jsonl")]))
