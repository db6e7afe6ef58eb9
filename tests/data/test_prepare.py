import contextlib
import hashlib
import itertools
import json
import logging
import os
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import support
from gpt2.base import folder_lock
from gpt2.base.errors import DataError, FolderInUse
from gpt2.data import corpus, prepare, tokenisation, tokenizer
from gpt2.data.corpus import BadLines, Block, Corpus, Document, Documents, Place, in_blocks
from gpt2.data.tokenizer import GPT2_TOKENIZER
from support import shard_tokens


class Killed(BaseException):
    """As sudden as a signal: no code catches it."""


def in_this_process(blocks, encoder, workers: int):
    """As `encoded_blocks`, without processes; the document "kill" raises Killed."""
    while part := list(itertools.islice(blocks, workers)):
        read = [document for block in part for document in block.content.documents()]
        if any(document == Document("kill") for document in read):
            raise Killed
        yield tokenisation.encode(part, encoder)


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What several processes change is in test_prepare_processes.py."""
    monkeypatch.setattr(tokenisation, "encoded_blocks", in_this_process)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 1)


def listed(
    documents: list[Document] | list[BadLines], name: str = "c", tokens_per_shard: int = 5
) -> Corpus:
    blocks = in_blocks(lambda skip: iter(documents[skip:]))
    return Corpus(name, "a test", tokens_per_shard, blocks)


def plain_loop(documents: list[Document]) -> list[int]:
    return [
        token
        for document in documents
        for token in (tokenizer.END_OF_TEXT, *tokenizer.encode(document.text))
    ]


def test_shards_hold_every_document_after_its_separator(data_root: Path):
    assert shard_tokens(data_root) == plain_loop(list(support.small_documents()))


def test_layout_and_manifest(data_root: Path):
    # Digests are of other tests, which have trained on it.
    files = sorted(path.name for path in data_root.glob("[!.]*"))
    assert files[:3] == ["manifest.json", "run.lock", "small_train_000001.npy"]
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


def test_a_finished_folder_is_not_changed(tmp_path: Path):
    first = prepare.prepare(support.SMALL_CORPUS, tmp_path, workers=1)
    before = (tmp_path / "manifest.json").stat().st_mtime_ns
    assert prepare.prepare(support.SMALL_CORPUS, tmp_path, workers=1) == first
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(
        DataError, match=r"is finished with other options \(shard_tokens: 8000 before, 10 now"
    ):
        prepare.prepare(support.SMALL_CORPUS, tmp_path, shard_tokens=10)


def test_overwrite_prepares_it_again(tmp_path: Path):
    prepare.prepare(support.SMALL_CORPUS, tmp_path, workers=1)
    again = prepare.prepare(
        support.SMALL_CORPUS, tmp_path, workers=1, shard_tokens=5000, overwrite=True
    )
    assert again.tokens_per_shard == 5000
    assert len(list(tmp_path.glob("*.npy"))) == len(again.shards)


def test_max_tokens(tmp_path: Path):
    manifest = prepare.prepare(
        support.SMALL_CORPUS, tmp_path, workers=1, shard_tokens=1000, max_tokens=2500
    )
    assert [shard.tokens for shard in manifest.shards] == [1000, 1000, 500]
    assert shard_tokens(tmp_path) == plain_loop(list(support.small_documents()))[:2500]


def test_empty_and_invalid_documents_are_counted(tmp_path: Path):
    documents = [Document("a" * 50), Document("\ufffd", replaced=True), Document("")]
    manifest = prepare.prepare(listed(documents), tmp_path, workers=1)
    assert (manifest.documents, manifest.empty_documents, manifest.replaced_documents) == (3, 1, 1)
    assert shard_tokens(tmp_path) == plain_loop(documents)


def test_a_corpus_without_text(tmp_path: Path):
    with pytest.raises(DataError, match="has no text: 3 documents, all empty"):
        prepare.prepare(listed([Document("")] * 3), tmp_path, workers=1)


def test_a_corpus_of_bad_lines_alone_does_not_advise_to_leave_them_out(tmp_path: Path):
    with pytest.raises(DataError, match="none of 7 lines can be read, such as a:1: x; expected"):
        prepare.prepare(listed([BadLines("a:1: x", count=7)]), tmp_path, workers=1)


def test_a_corpus_of_one_shard_has_nothing_to_train_on(tmp_path: Path):
    short = listed([Document("some words")], tokens_per_shard=1000)
    with pytest.raises(DataError, match="use more text, or --val_tokens 2"):
        prepare.prepare(short, tmp_path, workers=1)
    assert not (tmp_path / "manifest.json").exists()
    prepare.prepare(short, tmp_path, workers=1, val_tokens=2)  # as the error says


@pytest.mark.parametrize(("shard_tokens", "count"), [(100_000, 2), (20_000, 4)])
def test_a_small_corpus_gives_a_tenth_for_validation(tmp_path: Path, shard_tokens, count):
    whole = prepare.prepare(support.SMALL_CORPUS, tmp_path / "whole", workers=1).shards
    sized = replace(support.SMALL_CORPUS, tokens_per_shard=shard_tokens, val_tokens=15_000)
    found = prepare.prepare(sized, tmp_path / "split", workers=1).shards
    tokens = sum(shard.tokens for shard in whole)
    assert [shard.split for shard in found] == ["val", *["train"] * (count - 1)]
    assert found[0].tokens == tokens // 10
    parts = [np.load(tmp_path / "split" / shard.file) for shard in found]
    expected = [np.load(tmp_path / "whole" / shard.file) for shard in whole]
    assert np.array_equal(np.concatenate(parts), np.concatenate(expected))
    assert max(shard.tokens for shard in found) <= shard_tokens


def test_overwrite_removes_nothing_of_another_corpus(tmp_path: Path):
    prepare.prepare(support.SMALL_CORPUS, tmp_path, workers=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = replace(support.SMALL_CORPUS, name="smal")
    with pytest.raises(
        DataError, match=r"small_train_000001\.npy, which does not belong to this corp"
    ):
        prepare.prepare(other, tmp_path, workers=1, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_two_preparations_of_one_folder(tmp_path: Path):
    def second(skip: int):
        with pytest.raises(FolderInUse, match=r"another preparation is using .* with --out"):
            prepare.prepare(support.SMALL_CORPUS, tmp_path, workers=1)
        yield from support.small_documents(skip)

    prepare.prepare(replace(support.SMALL_CORPUS, blocks=in_blocks(second)), tmp_path, workers=1)


def test_runs_that_start_together_wait_for_one_preparation(tmp_path: Path, caplog):
    def first() -> None:
        with folder_lock.held(tmp_path, "preparation"):
            is_held.set()
            while not caplog.messages:
                time.sleep(0.01)

    is_held = threading.Event()
    threading.Thread(target=first).start()
    is_held.wait()
    with caplog.at_level(logging.INFO):
        prepare.prepare(support.SMALL_CORPUS, tmp_path, workers=1, wait=True)
    waiting = f"Waiting: another preparation is using {tmp_path}: process {os.getpid()} on"
    assert caplog.messages[0].startswith(waiting)


def encoded_text(text: str) -> tokenisation.Encoded:
    block = Block(Place(), Documents((Document(text),)), 1)
    return tokenisation.encode([block], GPT2_TOKENIZER)


def test_a_text_on_which_the_regular_expression_fails(tmp_path: Path):
    text = "before\n" + "\n" * 1_000_000 + "after"
    encoded = encoded_text(text)
    assert encoded.documents.tolist() == [0]
    assert tokenizer.decode(encoded.tokens[1:].tolist()) == text


def test_a_failed_preparation_can_be_started_again(tmp_path: Path):
    broken = replace(support.SMALL_CORPUS, source="wrong field", blocks=lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare.prepare(broken, tmp_path, workers=1)
    prepare.prepare(support.SMALL_CORPUS, tmp_path, workers=1)


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="another folder with --out"):
        prepare.prepare(support.SMALL_CORPUS, tmp_path / "file" / "data", workers=1)


def test_the_validation_shard_may_have_another_size(tmp_path: Path):
    manifest = prepare.prepare(
        support.SMALL_CORPUS, tmp_path, workers=1, shard_tokens=9000, val_tokens=500
    )
    assert [shard.tokens for shard in manifest.shards][:2] == [500, 9000]


def test_a_document_longer_than_a_shard_spans_shards(tmp_path: Path):
    documents = [Document("one two " * 100), Document("three")]
    manifest = prepare.prepare(listed(documents, "long", 30), tmp_path, workers=1)
    assert len(manifest.shards) > 5
    assert shard_tokens(tmp_path) == plain_loop(documents)


def test_shards_of_unknown_origin_are_kept(tmp_path: Path):
    (tmp_path / "theirs_000001.npy").touch()
    with pytest.raises(DataError, match=r"holds theirs_000001\.npy of unknown origin"):
        prepare.prepare(support.SMALL_CORPUS, tmp_path)
    assert (tmp_path / "theirs_000001.npy").exists()


@pytest.mark.usefixtures("small_blocks")
def test_other_options_are_refused_for_an_unfinished_folder(tmp_path: Path):

    def broken(skip: int):
        yield from support.small_documents(skip)
        raise DataError("the source broke off")

    broken_off = replace(support.SMALL_CORPUS, blocks=in_blocks(broken))
    with pytest.raises(DataError, match="broke off"):
        prepare.prepare(broken_off, tmp_path, workers=1)
    with pytest.raises(
        DataError, match=r"was started with other options \(val_tokens: 8000 before, 5 now"
    ):
        prepare.prepare(broken_off, tmp_path, workers=1, val_tokens=5)
    (tmp_path / "progress.json").write_text("{")
    with pytest.raises(DataError, match=r"progress\.json cannot be read .*--overwrite"):
        prepare.prepare(broken_off, tmp_path, workers=1)


@pytest.mark.usefixtures("small_blocks")
def test_unknown_fields_of_a_progress_file_are_ignored_with_a_warning(
    data_root: Path, tmp_path: Path, caplog
):
    """A preparation that a later version began continues, and ends with the same shards."""

    def broken(skip: int):
        yield from support.small_documents(skip)
        raise DataError("the source broke off")

    with pytest.raises(DataError, match="broke off"):
        prepare.prepare(
            replace(support.SMALL_CORPUS, blocks=in_blocks(broken)), tmp_path, workers=1
        )
    values = json.loads((tmp_path / "progress.json").read_text()) | {"started": 1.0}
    values["counts"] |= {"duplicates": 0}
    values["shards"] = [shard | {"crc": 1} for shard in values["shards"]]
    assert values["shards"]
    (tmp_path / "progress.json").write_text(json.dumps(values))
    prepare.prepare(support.SMALL_CORPUS, tmp_path, workers=1)
    assert (tmp_path / "manifest.json").read_bytes() == (data_root / "manifest.json").read_bytes()
    assert [message.rpartition("ignored")[2] for message in caplog.messages] == [
        " unknown fields of Counts: duplicates",
        " unknown fields of Shard: crc",
        " unknown fields of PreparationProgress: started",
    ]


@pytest.mark.usefixtures("small_blocks")
def test_an_unfinished_preparation_removes_nothing_outside_its_folder(tmp_path: Path):
    """With few tokens, the shards that it lists are read, removed and divided anew."""

    def broken(skip: int):
        yield from support.small_documents(skip)
        raise DataError("the source broke off")

    folder, victim = tmp_path / "small", tmp_path / "victim.npy"
    broken_off = replace(support.SMALL_CORPUS, blocks=in_blocks(broken))
    with pytest.raises(DataError, match="broke off"):
        prepare.prepare(broken_off, folder, workers=1)
    values = json.loads((folder / "progress.json").read_text())
    values["shards"] = [values["shards"][0] | {"file": "../victim.npy"}]
    (folder / "progress.json").write_text(json.dumps(values))
    np.save(victim, np.arange(8000, dtype=np.uint16))
    with pytest.raises(DataError, match=r"progress\.json lists \.\./victim\.npy, which is outside"):
        prepare.prepare(support.SMALL_CORPUS, folder, workers=1)
    assert victim.exists()


@settings(max_examples=60)
@given(st.data())
def test_killed_at_any_document_it_continues_with_the_same_result(data: st.DataObject):
    """Whatever the documents, the sizes of shards and batches, and the moments of the kills."""
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=12), label="lengths")
    documents = [Document("a " * length, replaced=length == 3) for length in lengths]
    options = {
        "shard_tokens": data.draw(st.integers(2, 9), label="shard_tokens"),
        "val_tokens": data.draw(st.integers(2, 9), label="val_tokens"),
        "max_tokens": data.draw(st.none() | st.integers(20, 40), label="max_tokens"),
        "workers": data.draw(st.integers(1, 4), label="batch size"),
        "command": "the same",
        "console": Console(quiet=True),
    }
    kills = data.draw(st.lists(st.integers(0, 12), max_size=4), label="killed before document")

    def killed(killed_at: int | None = None) -> Corpus:
        def documents_after(skip: int):
            for number in range(skip, len(documents)):
                if number == killed_at:
                    yield Document("kill")
                yield documents[number]

        return Corpus("c", "a test", 5, in_blocks(documents_after))

    def prepared(folder: Path, *moments: int) -> dict[str, bytes]:
        with contextlib.suppress(DataError):  # too few tokens for two shards
            for moment in moments:
                with contextlib.suppress(Killed):
                    prepare.prepare(killed(moment), folder, **options)
            prepare.prepare(killed(), folder, **options)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    with tempfile.TemporaryDirectory() as root:
        at_once = prepared(Path(root, "one"))
        assert prepared(Path(root, "other"), *kills) == at_once
        if "manifest.json" in at_once:
            stream = plain_loop(documents)[: options["max_tokens"]]
            assert shard_tokens(Path(root, "one")) == stream
            begun = stream.count(tokenizer.END_OF_TEXT)
            manifest = json.loads(at_once["manifest.json"])
            assert manifest["documents"] == begun
            assert manifest["empty_documents"] == lengths[:begun].count(0)
            assert manifest["replaced_documents"] == lengths[:begun].count(3)


CHARACTERS = "ab 1.'s\n\t\r\u00a0\u2028\u0085\x1c\u3000é中"


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(CHARACTERS) | st.characters(exclude_categories=["Cs"]), max_size=80))
def test_a_text_in_pieces_has_the_same_tokens(text: str):
    for size in (1, 7):
        parts = list(tokenisation.pieces(text, tokenizer.EXACT_CUT, size))
        assert "".join(parts) == text
        tokens = [token for part in parts for token in tokenizer.encode(part)]
        assert tokens == tokenizer.encode(text)


def test_lone_surrogates_become_replacement_characters():
    documents = (Document("a\ud800b"), Document("\ud83d\ude00"), Document("é"))
    block = Block(Place(), Documents(documents), 1)
    encoded = tokenisation.encode([block], GPT2_TOKENIZER)
    text = tokenizer.decode(encoded.tokens.tolist())
    assert text == "<|endoftext|>a\ufffdb<|endoftext|>\U0001f600<|endoftext|>é"
    assert encoded.replaced.tolist() == encoded.documents.tolist()[:2]
