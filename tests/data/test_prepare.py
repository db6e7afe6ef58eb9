import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

import support
from gpt2 import tokenizer
from gpt2.data import prepare
from gpt2.data.corpora import Corpus, Document
from gpt2.data.shards import Manifest
from gpt2.errors import DataError


def shard_tokens(folder: Path) -> list[int]:
    files = sorted(folder.glob("*.npy"), key=lambda path: path.stem.split("_")[-1])
    return [token for path in files for token in np.load(path).tolist()]


def plain_loop(documents: list[Document]) -> list[int]:
    return [
        token
        for document in documents
        for token in (tokenizer.END_OF_TEXT, *tokenizer.encode(document.text))
    ]


def test_shards_hold_every_document_behind_its_separator(data_root: Path):
    assert shard_tokens(data_root) == plain_loop(list(support.small_documents()))


def test_layout_and_manifest(data_root: Path):
    files = sorted(path.name for path in data_root.iterdir())
    assert files[:2] == ["manifest.json", "small_train_000001.npy"]
    assert files[-1] == "small_val_000000.npy"
    values = json.loads((data_root / "manifest.json").read_text())
    assert values["tokenizer"] == "gpt2"
    assert values["dtype"] == "uint16"
    assert values["documents"] == 9
    assert values["tokens_per_shard"] == 8000
    assert [shard["split"] for shard in values["shards"]][:2] == ["val", "train"]
    for shard in values["shards"]:
        content = (data_root / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        tokens = np.load(data_root / shard["file"])
        assert tokens.dtype == np.uint16
        assert len(tokens) == shard["tokens"]


def test_number_of_workers_does_not_matter(data_root: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 10_000)
    prepare.prepare(support.SMALL_CORPUS, tmp_path, workers=3)
    assert Manifest.read(tmp_path) == Manifest.read(data_root)


def test_a_finished_folder_stays_and_an_unfinished_one_is_made_again(tmp_path: Path):
    first = prepare.prepare(support.SMALL_CORPUS, tmp_path, workers=1)
    before = (tmp_path / "manifest.json").stat().st_mtime_ns
    assert prepare.prepare(support.SMALL_CORPUS, tmp_path, tokens_per_shard=10) == first
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == before
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "small_train_000009.npy").write_bytes(b"left over")
    assert prepare.prepare(support.SMALL_CORPUS, tmp_path, workers=1) == first
    assert not (tmp_path / "small_train_000009.npy").exists()


def test_overwrite_makes_it_again(tmp_path: Path):
    prepare.prepare(support.SMALL_CORPUS, tmp_path, workers=1)
    again = prepare.prepare(
        support.SMALL_CORPUS, tmp_path, workers=1, tokens_per_shard=5000, overwrite=True
    )
    assert again.tokens_per_shard == 5000
    assert len(list(tmp_path.glob("*.npy"))) == len(again.shards)


def test_max_tokens(tmp_path: Path):
    manifest = prepare.prepare(
        support.SMALL_CORPUS, tmp_path, workers=1, tokens_per_shard=1000, max_tokens=2500
    )
    assert [shard.tokens for shard in manifest.shards] == [1000, 1000, 500]
    assert shard_tokens(tmp_path) == plain_loop(list(support.small_documents()))[:2500]


def test_replaced_documents_are_counted(tmp_path: Path):
    documents = [Document("a" * 50), Document("\ufffd", replaced=True), Document("")]
    corpus = Corpus("odd", "a test", 5, documents=lambda: iter(documents))
    manifest = prepare.prepare(corpus, tmp_path, workers=1)
    assert (manifest.documents, manifest.replaced_documents) == (3, 1)
    assert shard_tokens(tmp_path) == plain_loop(documents)


def test_a_corpus_of_one_shard_has_nothing_to_train_on(tmp_path: Path):
    corpus = Corpus("short", "a test", 1000, documents=lambda: iter([Document("short")]))
    with pytest.raises(DataError, match="use --shard_tokens"):
        prepare.prepare(corpus, tmp_path, workers=1)
    assert not (tmp_path / "manifest.json").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="another folder with --out"):
        prepare.prepare(support.SMALL_CORPUS, tmp_path / "file" / "data", workers=1)
