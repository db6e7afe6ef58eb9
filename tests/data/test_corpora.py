import shutil
import sysconfig
from pathlib import Path

import datasets
import pytest

from gpt2.base.errors import DataError
from gpt2.data import corpora, files
from gpt2.data.corpus import Corpus, Place


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
    assert corpora.CORPORA["python_stdlib"].size() == 3


def test_the_standard_library_of_this_python_is_large_enough():
    count = corpora.CORPORA["python_stdlib"].size()
    assert count is not None
    assert count > 500


def test_hyphens_and_underscores_are_equivalent():
    assert corpora.find("python-stdlib") is corpora.find("python_stdlib")
    assert corpora.find("nothing") is None


def texts(corpus: Corpus, skip: int = 0) -> list[str]:
    blocks = corpus.blocks(Place(0, skip), None)
    return [item.text for block in blocks for item in block.content.documents()]


def test_documents_after_the_first_n():
    corpus = corpora.CORPORA["python_stdlib"]
    assert texts(corpus, corpus.size() - 2) == texts(corpus)[-2:]


@pytest.mark.parametrize("streaming", [True, False])
def test_data_set_of_a_local_folder(tmp_path: Path, streaming: bool, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    corpus = corpora.hub("x", str(folder), streaming=streaming)
    assert texts(corpus) == ["one", "two", "three"]
    assert texts(corpus, 1) == ["two", "three"]


def test_hidden_files_in_a_folder_are_left_out_and_a_hidden_folder_is_read(tmp_path: Path):
    folder = tmp_path / ".cache" / "set"
    for name in ("data/train.jsonl", "data/.train.jsonl", ".old/train.jsonl", "data/test.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"text": "{name}"}}\n')
    found = corpora.find_in_folder(folder, "train")
    assert found is not None
    assert found.shown() == (
        "1 file (data/train.jsonl), not 1 file (data/test.jsonl): --split chooses another split"
    )
    assert texts(corpora.of_folder("x", folder, found, None)) == ["data/train.jsonl"]


def test_files_are_identified_by_their_names_their_ends_and_the_field(tmp_path: Path):
    """As earlier versions did: a folder that they have finished stays that of the same corpus."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "one"}\n')
    pattern = str(tmp_path / "*.jsonl")
    corpus = corpora.local_files("x", [pattern])
    assert corpus.source == f"2 files {pattern} text {files.find([pattern]).fingerprint}"
    assert corpora.local_files("x", [pattern], text_field="text").source == corpus.source
    assert texts(corpus) == ["one", "one"]
    assert corpus.size() == 32


def test_other_files_under_the_same_names_are_another_corpus(tmp_path: Path):
    def source(text: str) -> str:
        (tmp_path / "a.txt").write_text(text)
        return corpora.local_files("x", [str(tmp_path / "a.txt")]).source

    assert source("one") == source("one")
    assert len({source("one"), source("two"), source("one more")}) == 3


def test_a_folder_that_the_datasets_library_saved(tmp_path: Path):
    saved = tmp_path / ".cache" / "saved"
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(saved)
    shutil.copy(saved / "data-00000-of-00001.arrow", saved / "cache-0123456789abcdef.arrow")
    found = corpora.find_in_folder(saved, "train")
    assert found is not None
    assert texts(corpora.of_folder("saved", saved, found, None)) == ["one", "two"]


def test_files_without_a_split_in_their_names_are_for_training(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one")
    assert corpora.find_in_folder(tmp_path, "train").files == ("a.txt",)
    with pytest.raises(DataError, match="no file of the split test; choose one of train with"):
        corpora.find_in_folder(tmp_path, "test")
    (tmp_path / "b.jsonl").write_text("")
    assert corpora.find_in_folder(tmp_path, "train") is None  # two kinds
