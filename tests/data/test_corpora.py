import sysconfig
from pathlib import Path

import pytest

from gpt2.data import corpora
from gpt2.errors import DataError


def test_standard_library_is_its_sources_in_sorted_order(tmp_path: Path, monkeypatch):
    for name, content in {
        "b.py": b"b = 1\n",
        "a/z.py": "é = 2\n".encode(),
        "a/latin.py": b"# caf\xe9\n",
        "a.txt": b"no source",
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


def test_the_running_python_has_a_library_worth_training_on():
    count = corpora.CORPORA["python_stdlib"].count()
    assert count is not None
    assert count > 500


def test_names_in_either_spelling():
    assert corpora.find("python-stdlib") is corpora.find("python_stdlib")
    assert corpora.find("nothing") is None


def test_hugging_face_loader_reads_local_files_in_order(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    documents = corpora.hugging_face(str(tmp_path), None, "train")
    assert [document.text for document in documents] == ["one", "two"]


def test_record_without_the_text_field_is_one_clear_error(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text('{"body": "one"}\n')
    with pytest.raises(DataError, match=r"record 0 has no text in field 'text'; fields: body"):
        list(corpora.hugging_face(str(tmp_path), None, "train"))
