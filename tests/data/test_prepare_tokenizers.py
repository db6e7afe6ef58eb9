"""Shards of another tokenizer than GPT-2's: their tokens, the manifest, the copy, resuming."""

import contextlib
import hashlib
import io
import itertools
import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import support
from gpt2.base.errors import ConfigError, DataError
from gpt2.data import (
    corpus,
    formats,
    prepare,
    readers,
    statistics,
    tokenisation,
    tokenizer,
    tokenizer_choice,
    tokenizer_files,
)
from gpt2.data.corpus import Block, Corpus, Document, Documents, Place, in_blocks
from gpt2.data.manifest import Manifest
from gpt2.data.remote import Storage
from gpt2.data.shards import TokenDataset, load_index
from gpt2.data.tokenizer import GPT2_TOKENIZER
from gpt2.data.tokenizer_files import FILE, Tokenizer
from gpt2.data.verification import Verification
from gpt2.inference import tokenizer_export
from small_tokenizers import of_70_000_entries, trained
from support import shard_tokens

QUIET = Console(quiet=True)
PARTS = ("a", "cat", " ", "  ", "\n", "\r\n", "\t", ".", "!!", "12345", "'s", "é", "日本", "/", "_")
PARTS += (")\n", ".\n\n", '"\n', "\x1c", "\u2028", "\u3000", "\xa0", "<|endoftext|>", "🦜")
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=40).map("".join)


@cache
def of(pattern: str, entries: int = 1500) -> Tokenizer:
    return tokenizer_files.parse(trained(pattern, entries), f"{pattern}/tokenizer.json")


@cache
def that_divides_otherwise() -> Tokenizer:
    """One that takes a space together with what is before it: no cut is known to be exact."""
    file = json.loads(trained("gpt2"))
    file["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": r"\w+ ?|[^\w]+"},
                "behavior": "Isolated",
                "invert": False,
            },
            {**file["pre_tokenizer"], "use_regex": False},
        ],
    }
    return tokenizer_files.parse(json.dumps(file), "other/tokenizer.json")


def in_this_process(blocks, encoder, workers: int):
    """As `encoded_blocks`, without processes."""
    while part := list(itertools.islice(blocks, workers)):
        yield tokenisation.encode(part, encoder)


def prepared(folder: Path, encoder, **options) -> Manifest:
    source = options.pop("corpus", support.SMALL_CORPUS)
    options = {"tokenizer": encoder, "workers": 1, "console": QUIET, **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenisation, "encoded_blocks", in_this_process)
        return prepare.prepare(source, folder, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small corpus in shards of a tokenizer with 4,096 entries."""
    folder = tmp_path_factory.mktemp("prepared") / "small"
    prepared(folder, of("gpt2", 4096), command="the same")
    return folder


@pytest.fixture
def folder(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "small"))


# Tokens


def test_the_shards_decode_to_the_texts_and_have_the_library_s_ids(small: Path):
    encoder = of("gpt2", 4096)
    library = tokenizers.Tokenizer.from_str(trained("gpt2", 4096))
    library.encode_special_tokens = True
    expected = [
        token
        for document in support.small_documents()
        for token in (encoder.end_of_text, *library.encode(document.text).ids)
    ]
    assert shard_tokens(small) == expected
    index = load_index(Storage(str(small)))
    assert (index.tokenizer, index.vocab_size) == (encoder, 4096)
    documents = "".join(document.text for document in support.small_documents())
    texts = index.tokenizer.decode(shard_tokens(small)).replace("<|endoftext|>", "")
    assert texts == documents.replace("<|endoftext|>", "")
    assert sum(shard.text_bytes or 0 for shard in index.shards) == len(documents.encode())


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k", "other"])
@given(text=texts, size=st.integers(1, 9))
@settings(deadline=None)
def test_the_tokens_do_not_depend_on_where_a_text_is_divided(pattern: str, text: str, size: int):
    """In pieces, and in the blocks of a file, whatever their size."""
    encoder = that_divides_otherwise() if pattern == "other" else of(pattern)
    pieces = list(tokenisation.pieces(text, encoder.exact_cut, size))
    assert [token for piece in pieces for token in encoder.encode(piece)] == encoder.encode(text)
    assert "".join(pieces) == text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", size)
        content = io.BytesIO(text.encode("utf-8", "replace"))
        blocks = [
            Block(Place(0, number), part, 1)
            for number, part in enumerate(readers.read_text(content, encoder.exact_cut))
        ]
    read = content.getvalue().decode().replace("\r\n", "\n").replace("\r", "\n")
    tokens = tokenisation.encode(blocks, encoder).tokens.tolist()
    assert tokens == [encoder.end_of_text, *encoder.encode(read)]


def test_texts_are_divided_where_that_is_known_to_be_exact():
    """What the test above would not notice: that nothing is divided, or that everything may be."""
    for encoder in (GPT2_TOKENIZER, of("gpt2"), of("cl100k"), of("o200k")):
        assert len(list(tokenisation.pieces("one two three four", encoder.exact_cut, 4))) == 3
    assert that_divides_otherwise().exact_cut is None
    text = "(a):\n\nb"
    parts = list(tokenisation.pieces(text, tokenizer.EXACT_CUT, 1))
    ids = [token for part in parts for token in of("cl100k").encode(part)]
    assert ids != of("cl100k").encode(text)


def test_lone_surrogates_and_spelled_special_tokens():
    encoder = of("cl100k")
    documents = Documents((Document("a\ud800"), Document("<|endoftext|><|pad|>")))
    encoded = tokenisation.encode([Block(Place(), documents, 1)], encoder)
    assert encoded.tokens.dtype == np.uint16
    assert encoded.replaced.tolist() == [0]
    marks = np.flatnonzero(encoded.tokens == encoder.end_of_text)
    assert marks.tolist() == encoded.documents.tolist()
    first, second = np.split(encoded.tokens, marks[1:])
    assert encoder.decode(first[1:].tolist()) == "a\ufffd"
    assert encoder.decode(second[1:].tolist()) == "<|endoftext|><|pad|>"


def test_more_than_65_536_entries_give_uint32_that_can_be_read(tmp_path: Path):
    encoder = tokenizer_files.parse(of_70_000_entries(), "large/tokenizer.json")
    assert encoder.vocab_size == 70_000 and encoder.is_fast
    manifest = prepared(tmp_path, encoder, shard_tokens=9000)
    assert (manifest.dtype, manifest.vocab_size) == ("uint32", 70_000)
    index = load_index(Storage(str(tmp_path)))
    stream = shard_tokens(tmp_path)
    assert max(stream) == encoder.end_of_text == 69_999
    assert any(1 << 16 <= token < 69_999 for token in stream)
    for split in ("val", "train"):
        data = TokenDataset(index, split, block_size=64)
        inputs, targets = data.read(np.array([[0, 0], [0, 7]]))
        whole = np.load(tmp_path / data.shards[0].file)
        assert whole.dtype == np.uint32
        assert inputs.tolist() == [whole[:64].tolist(), whole[448:512].tolist()]
        assert targets.tolist() == [whole[1:65].tolist(), whole[449:513].tolist()]
        assert data.text_bytes(targets) == len(index.tokenizer.decode(targets.ravel()).encode())
    reports = Verification(Storage(str(tmp_path))).run(lambda _: None)
    assert [report.wrong for report in reports] == [None] * len(index.shards)


def test_65_536_entries_fit_into_uint16():
    """The largest id is one less."""
    assert formats.dtype_for(65_536) == np.uint16
    assert formats.dtype_for(65_537) == np.uint32


# Manifest and copy


def test_the_manifest_names_the_tokenizer_and_a_copy_is_beside_it(small: Path):
    encoder = of("gpt2", 4096)
    values = json.loads((small / "manifest.json").read_text())
    assert (values["tokenizer"], values["vocab_size"]) == ("gpt2/tokenizer.json", 4096)
    assert (values["tokenizer_digest"], values["dtype"]) == (encoder.identity, "uint16")
    assert (small / FILE).read_text() == trained("gpt2", 4096)


def test_gpt2_needs_no_copy_and_a_file_beside_it_says_nothing(tmp_path: Path, data_root: Path):
    assert json.loads((data_root / "manifest.json").read_text())["tokenizer_digest"] is None
    (tmp_path / FILE).write_text(trained("gpt2"))
    prepared(tmp_path, GPT2_TOKENIZER, command="x")
    assert (tmp_path / FILE).read_text() == trained("gpt2")
    assert (tmp_path / "manifest.json").read_bytes() == (data_root / "manifest.json").read_bytes()
    assert load_index(Storage(str(tmp_path))).tokenizer is GPT2_TOKENIZER


def test_shards_without_a_manifest_count_as_gpt2_s(folder: Path):
    (folder / "manifest.json").unlink()
    assert load_index(Storage(str(folder))).tokenizer is GPT2_TOKENIZER


def test_manifests_of_earlier_versions_are_gpt2_s(data_root: Path, tmp_path: Path):
    copy = Path(shutil.copytree(data_root, tmp_path / "copy"))
    values = json.loads((copy / "manifest.json").read_text())
    del values["tokenizer_digest"]
    (copy / "manifest.json").write_text(json.dumps(values))
    assert load_index(Storage(str(copy))).tokenizer is GPT2_TOKENIZER
    (copy / "manifest.json").write_text(json.dumps({**values, "tokenizer": "llama"}))
    with pytest.raises(DataError, match="expected tokens of gpt2, got tokens of llama"):
        load_index(Storage(str(copy)))


def without_last_merge(content: str) -> str:
    file = json.loads(content)
    file["model"]["merges"].pop()
    return json.dumps(file)


@pytest.mark.parametrize("read", [load_index, Verification], ids=["run", "verify"])
def test_a_copy_that_has_changed_is_refused_by_name(folder: Path, read):
    copy = folder / FILE
    before = copy.read_text()
    for content, reason in (
        (without_last_merge(before), "has changed: expected gpt2/tokenizer.json"),
        (trained("cl100k", 4096), "has changed: expected gpt2/tokenizer.json"),
        (before[: len(before) // 2], "is no tokenizer.json that can be read"),
        (None, "is missing"),
    ):
        copy.unlink(missing_ok=True)
        if content is not None:
            copy.write_text(content)
        with pytest.raises(DataError) as refused:
            read(Storage(str(folder)))
        assert str(refused.value).startswith(f"{copy} {reason}")
        assert str(refused.value).endswith("or prepare the shards again with --overwrite")
    copy.write_text(json.dumps(json.loads(before)))  # as another version of the library writes it
    read(Storage(str(folder)))


# The same folder again


def test_a_finished_folder_accepts_the_same_tokenizer_only(folder: Path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    elsewhere = tokenizer_files.parse(trained("gpt2", 4096), "moved/tokenizer.json")
    prepared(folder, elsewhere)
    for other, shown in ((of("cl100k"), "cl100k/tokenizer.json"), (GPT2_TOKENIZER, "gpt2 now")):
        with pytest.raises(DataError, match="is finished with another tokenizer") as refused:
            prepared(folder, other)
        assert "(gpt2/tokenizer.json " in str(refused.value) and shown in str(refused.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / FILE).unlink()
    with pytest.raises(DataError, match="is missing"):
        prepared(folder, elsewhere)


def test_overwrite_replaces_shards_and_copy(folder: Path, data_root: Path):
    prepared(folder, of("cl100k"), overwrite=True)
    assert (folder / FILE).read_text() == trained("cl100k")
    assert load_index(Storage(str(folder))).tokenizer == of("cl100k")
    prepared(folder, GPT2_TOKENIZER, overwrite=True)
    assert not (folder / FILE).exists()
    assert shard_tokens(folder) == shard_tokens(data_root)


def test_a_tokenizer_that_is_not_a_copy_is_never_replaced(tmp_path: Path):
    (tmp_path / FILE).write_text(trained("gpt2"))
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"tokenizer\.json is another tokenizer than cl100k"):
            prepared(tmp_path, of("cl100k"), overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir() if path.name != "run.lock"] == [FILE]
    prepared(tmp_path, of("gpt2"))  # of a folder that is also that of the tokenizer
    assert (tmp_path / FILE).read_text() == trained("gpt2")


class Killed(BaseException):
    """As sudden as a signal: no code catches it."""


def killed_at(number: int | None) -> Corpus:
    """The small corpus, which ends the process before document `number`."""

    def documents(skip: int):
        for at, document in enumerate(support.small_documents(skip), skip):
            if at == number:
                raise Killed
            yield document

    return replace(support.SMALL_CORPUS, blocks=in_blocks(documents))


@pytest.mark.parametrize("kills", [(1,), (5, 7), (8, 8)])
def test_killed_it_continues_with_the_same_bytes(
    kills: tuple[int, ...], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 1)
    for number in kills:
        with contextlib.suppress(Killed):
            prepared(tmp_path, of("gpt2", 4096), corpus=killed_at(number), command="the same")
        assert not (tmp_path / "manifest.json").exists()
    prepared(tmp_path, of("gpt2", 4096), command="the same")
    assert contents(tmp_path) == contents(small)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


def test_a_begun_folder_accepts_the_same_tokenizer_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 1)
    with pytest.raises(Killed):
        prepared(tmp_path, of("gpt2"), corpus=killed_at(8), shard_tokens=1000)
    assert json.loads((tmp_path / "progress.json").read_text())["shards"]
    for other in (of("cl100k"), GPT2_TOKENIZER):
        with pytest.raises(DataError, match="was started with another tokenizer"):
            prepared(tmp_path, other, shard_tokens=1000)
        assert (tmp_path / FILE).read_text() == trained("gpt2")
    prepared(tmp_path, of("gpt2"), shard_tokens=1000)


def test_before_the_first_shard_another_tokenizer_may_be_chosen(tmp_path: Path):
    with pytest.raises(Killed):
        prepared(tmp_path, of("gpt2"), corpus=killed_at(0))
    assert (tmp_path / FILE).exists()
    assert prepared(tmp_path, of("cl100k")).tokenizer == "cl100k/tokenizer.json"
    assert load_index(Storage(str(tmp_path))).tokenizer == of("cl100k")


def test_progress_of_an_earlier_version_is_gpt2_s(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 1)
    with pytest.raises(Killed):
        prepared(tmp_path, GPT2_TOKENIZER, corpus=killed_at(8))
    values = json.loads((tmp_path / "progress.json").read_text())
    assert values["shards"] and values["recipe"].pop("tokenizer_digest", "none") is None
    (tmp_path / "progress.json").write_text(json.dumps(values))
    prepared(tmp_path, GPT2_TOKENIZER)
    assert (tmp_path / "manifest.json").read_bytes() == (data_root / "manifest.json").read_bytes()


# What reads the shards


def test_verify_knows_the_vocabulary_and_the_bytes_of_text(folder: Path):

    def wrong() -> list[str]:
        reports = Verification(Storage(str(folder))).run(lambda _: None)
        return [report.wrong for report in reports if report.wrong]

    assert wrong() == []
    values = json.loads((folder / "manifest.json").read_text())
    path, entry = folder / "small_train_000001.npy", values["shards"][1]
    assert entry["file"] == path.name
    tokens = np.load(path)
    tokens[17] = 4096  # GPT-2 has this one
    np.save(path, tokens)
    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(values))
    assert wrong() == ["1 token id outside the vocabulary of 4096, first 4096 at token 17"]
    entry["text_bytes"] += 1
    tokens[17] = 0
    np.save(path, tokens)
    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(values))
    assert wrong()[0].startswith(f"expected {entry['text_bytes']} bytes of text as in the manifest")


def test_statistics(small: Path):
    index = load_index(Storage(str(small)))
    documents = [document.text for document in support.small_documents()]
    found = statistics.measure(index, statistics.stream_of(index, None), block_size=64)
    assert found.lengths.documents == len(documents)
    assert found.text_bytes == sum(len(text.encode()) for text in documents)
    longest = max(len(index.tokenizer.encode(text)) for text in documents)
    assert found.lengths.longest == longest


def test_the_comparison_with_gpt2(small: Path):
    index = load_index(Storage(str(small)))
    found = statistics.compare_with_gpt2(index)
    shard = index.of("train")[0]
    tokens = np.load(small / shard.file)
    assert found.text_bytes == shard.text_bytes
    assert found.bytes_per_token == pytest.approx(found.text_bytes / len(tokens))
    text = index.tokenizer.decode(tokens.tolist())
    gpt2 = len(tokenizer.load().encode(text, allowed_special="all"))
    assert found.gpt2_bytes_per_token == pytest.approx(found.text_bytes / gpt2, rel=1e-3)


# The choice


def test_gpt2_s_tokens_are_gpt2_s_wherever_they_come_from(tmp_path: Path):
    (tmp_path / FILE).write_text(tokenizer_export.build().to_str())
    for name in ("gpt2", "tiktoken:gpt2", str(tmp_path)):
        assert tokenizer_choice.find(name) is GPT2_TOKENIZER
    (tmp_path / FILE).write_text(trained("cl100k"))
    assert tokenizer_choice.find(str(tmp_path)) == of("cl100k")


def test_what_is_no_tokenizer(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no tokenizer gtp2; expected gpt2, tiktoken:NAME, a f"):
        tokenizer_choice.find("gtp2")
    with pytest.raises(ConfigError, match=r"unknown tokenizer tiktoken:cl100k.*tiktoken:cl100k_ba"):
        tokenizer_choice.find("tiktoken:cl100k")
    with pytest.raises(DataError, match=r"no .*tokenizer\.json; expected a folder with"):
        tokenizer_choice.find(str(tmp_path))
