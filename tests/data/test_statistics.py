"""The statistics of documents, against a plain count in Python of the same stream."""

import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2.base.errors import DataError
from gpt2.data import prepare, shards, statistics, token_stream, tokenizer
from gpt2.data.corpus import Corpus, Document, in_blocks
from gpt2.data.remote import Storage
from gpt2.data.shards import DatasetIndex
from gpt2.data.statistics import Bin, CommonLine, Statistics

MARK = tokenizer.END_OF_TEXT
LINES = ("A title", " A title\n", "\n\nA title\nand more", "once", "é" * 40, "", "\n \n", "x y z")


def written(folder: Path, stream: list[int], ends: list[int]) -> DatasetIndex:
    """The tokens as shards that end at `ends`, of both types; the first one is for validation."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for number, (start, end) in enumerate(pairwise([0, *ends, len(stream)])):
        split = "train" if number else "val"
        dtype = "<u2" if number % 2 else "<u4"
        np.save(folder / f"small_{split}_{number:02d}.npy", np.array(stream[start:end], dtype))
    return shards.load_index(Storage(str(folder)))


def measured(index: DatasetIndex, block_size: int = 8) -> Statistics:
    return statistics.measure(index, statistics.stream_of(index, None), block_size)


def documents_of(stream: list[int]) -> list[list[int]]:
    """The documents of a stream, cut in the obvious way."""
    found: list[list[int]] = [[]]
    for token in stream:
        if token == MARK:
            found.append([])
        else:
            found[-1].append(token)
    if stream[0] == MARK:
        return found[1:]
    return found if found[-1] else found[:-1]


@given(
    texts=st.lists(st.sampled_from(LINES) | st.text(max_size=20), min_size=1, max_size=12),
    marks=st.sampled_from(["before", "after"]),
    cuts=st.lists(st.integers(0, 400), max_size=4),
    chunk=st.integers(1, 60),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_documents_are_counted_once_wherever_shards_and_chunks_end(
    texts: list[str], marks: str, cuts: list[int], chunk: int, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(token_stream, "CHUNK_TOKENS", chunk)
    encoded = [tokenizer.encode(text) for text in texts]
    parts = [[MARK, *text] if marks == "before" else [*text, MARK] for text in encoded]
    stream = [token for part in parts for token in part]
    index = written(tmp_path / "data", stream, sorted(min(cut, len(stream)) for cut in cuts))
    found = measured(index)

    documents = documents_of(stream)
    sizes = [len(document) for document in documents]
    assert found.tokens == len(stream)
    assert found.text_bytes == len(b"".join(text.encode() for text in texts))
    lengths = found.lengths
    assert (lengths.documents, lengths.empty) == (len(sizes), sizes.count(0))
    assert (lengths.shortest, lengths.longest) == (min(sizes), max(sizes))
    assert lengths.median == sorted(sizes)[(len(sizes) - 1) // 2]
    assert lengths.mean == pytest.approx(sum(sizes) / len(sizes))
    long = sum(size for size in sizes if size > 8)
    assert lengths.longer_than_block == pytest.approx(long / max(1, sum(sizes)))
    for item in lengths.histogram:
        assert item.documents == sum(item.first <= size <= item.last for size in sizes)
    assert sum(item.documents for item in lengths.histogram) == len(sizes)

    known: set[tuple[int, ...]] = set()
    repeated = 0
    for document in documents:
        repeated += len(document) * (tuple(document) in known)
        known.add(tuple(document))
    assert found.duplicate_tokens == pytest.approx(repeated / max(1, sum(sizes)))

    heads = [
        tokenizer.decode(document[: statistics.LINE_TOKENS]).lstrip() for document in documents
    ]
    lines = Counter(head.split("\n")[0].rstrip() for head in heads)
    expected = [(line, count) for line, count in lines.items() if line and count > 1]
    expected.sort(key=lambda item: -item[1])
    assert [(item.line, item.documents) for item in found.first_lines] == expected[:10]


def test_a_prepared_corpus_has_the_numbers_of_its_manifest(tmp_path: Path):
    texts = ["one text", "", "another text", "one text", "", *(f"text {n}" for n in range(60))]
    blocks = in_blocks(lambda skip: map(Document, texts[skip:]))
    corpus = Corpus("small", "texts", 100, blocks)
    manifest = prepare.prepare(corpus, tmp_path, workers=1)
    found = measured(shards.load_index(Storage(str(tmp_path))))
    assert (found.lengths.documents, found.lengths.empty) == (65, 2)
    assert manifest.documents == 65 and manifest.empty_documents == 2
    assert found.text_bytes == sum(shard.text_bytes or 0 for shard in manifest.shards)
    assert found.duplicate_documents == 1 / 65  # empty ones do not count
    assert found.first_lines == (CommonLine("one text", 2),)


def test_one_split_alone(tmp_path: Path):
    index = written(tmp_path, [MARK, 1, 2, 3, MARK, 4, MARK, 5], [3])
    train = statistics.measure(index, statistics.stream_of(index, "train"), 8)
    assert (train.tokens, train.lengths.documents) == (5, 3)  # one of them began before it


def test_a_document_over_many_chunks_is_hashed_whole(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(token_stream, "CHUNK_TOKENS", 100)
    text = np.random.default_rng(0).integers(0, 50000, 5000).tolist()
    other = [*text[:-1], text[-1] ^ 1]
    found = measured(written(tmp_path, [MARK, *text, MARK, *other, MARK, *text], [777]))
    assert found.duplicate_documents == pytest.approx(1 / 3)
    assert found.lengths.histogram == (Bin(4096, 8191, 3),)


def test_a_file_of_nothing_has_no_documents(tmp_path: Path):
    found = measured(written(tmp_path, [], []))
    assert found.lengths == statistics.lengths_of(np.zeros(0, np.int64), 8)
    assert (found.lengths.documents, found.lengths.histogram, found.first_lines) == (0, (), ())
    assert found.duplicate_tokens == found.bytes_per_token == 0


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"small_val_00\.npy holds the token id 50257, outside"):
        measured(written(tmp_path, [MARK, 50257], []))


def test_the_progress_is_all_tokens(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(token_stream, "CHUNK_TOKENS", 3)
    index = written(tmp_path, [MARK, 1, 2, 3, 4], [2])
    read: list[int] = []
    statistics.measure(index, index.shards, 8, read.append)
    assert sum(read) == 5


def test_characters_of_nanogpt(tmp_path: Path):
    """One document: such a vocabulary has no <|endoftext|>."""
    texts = ["Tô be,\nor not", "tô be"]
    characters = sorted(set("".join(texts)))
    stoi = {text: number for number, text in enumerate(characters)}
    meta = {"vocab_size": len(stoi), "stoi": stoi, "itos": dict(enumerate(characters))}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    for name, text in zip(("val", "train"), texts, strict=True):
        np.array([stoi[letter] for letter in text], "<u2").tofile(tmp_path / f"{name}.bin")
    found = measured(shards.load_index(Storage(str(tmp_path))))
    assert (found.tokens, found.text_bytes) == (18, 20)
    assert (found.lengths.documents, found.lengths.longest) == (1, 18)
