"""A tokenizer that is trained: by the rules of byte-pair encoding, the same each time."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from gpt2.base.errors import ConfigError, DataError
from gpt2.data import corpus, readers, tokenizer_files, tokenizer_training
from gpt2.data.corpus import BadLines, Block, Corpus, Document, Documents, Place
from gpt2.data.tokenizer import GPT2_TOKENIZER
from gpt2.data.tokenizer_files import END_OF_TEXT, EXACT_CUT, PATTERNS
from gpt2.data.tokenizer_training import Recipe, TrainingTexts

TEXTS = ["the cat sat on the mat, the cat's hat\n", "don't sit; 1234 cats sat\r\n\r\n", "für Käse "]


def texts_of(*documents: str, **options: int) -> TrainingTexts:
    blocks = corpus.in_blocks(lambda _: iter([Document(text) for text in documents]))
    return TrainingTexts(blocks(Place(), EXACT_CUT), **options)


def many_ties(seed: int) -> list[str]:
    """Texts in which many pairs are equally frequent; none is kept apart."""
    words = ["".join(random.Random(seed + n).choices("abcdefgh", k=6)) for n in range(300)]
    return [" ".join(words[at : at + 5] * 2) for at in range(0, 300, 5)]


def train(*documents: str, size: int = 300, **options: str) -> str:
    return tokenizer_training.train(texts_of(*documents), Recipe(size, **options))


def merged(content: str) -> list[bytes]:
    """The tokens of several bytes, in the order in which they were learned."""
    loaded = tokenizer_files.parse(content, "test")
    return [loaded.token_bytes(token) for token in range(256, loaded.end_of_text)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_merges_are_those_of_the_textbook(pattern: str):
    """The most frequent pair is merged; of equal ones, that of the lowest ids."""
    content = train(*TEXTS * 5, size=280, pattern=pattern)
    built = tokenizer_files.pre_tokenizer(pattern)
    vocab = json.loads(content)["model"]["vocab"]
    words = Counter(word for text in TEXTS * 5 for word, _ in built.pre_tokenize_str(text))
    divided = {word: list(word) for word in words}
    ids = {letter: vocab[letter] for letter in tokenizer_files.byte_letters().values()}
    rules = []
    while len(ids) < 279:
        counts: Counter[tuple[str, str]] = Counter()
        for word, parts in divided.items():
            for pair in pairwise(parts):
                counts[pair] += words[word]
        best = min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))
        rules.append(list(best))
        ids["".join(best)] = len(ids)
        for parts in divided.values():
            at = 0
            while at + 1 < len(parts):
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = ["".join(best)]
                at += 1
    assert json.loads(content)["model"]["merges"] == rules
    assert vocab == ids


def test_the_same_bytes_whatever_the_threads_and_the_order(monkeypatch: pytest.MonkeyPatch):
    texts = many_ties(0)
    content = train(*texts, size=600)
    assert train(*reversed(texts), size=600) == content
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert train(*texts, size=600) == content
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setenv("RAYON_NUM_THREADS", "5")  # read once by a process
    program = f"import {__name__} as test; print(test.train(*test.many_ties(0), size=600), end='')"
    folder = str(Path(__file__).parent)
    other = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r}); {program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout == content


def test_special_tokens_have_the_last_ids_and_are_learned_from_no_text():
    special = (END_OF_TEXT, "<|pad|>")
    text = "<|endoftext|><|pad|> <|pad|>" * 50
    content = tokenizer_training.train(texts_of(text), Recipe(272, special_tokens=special))
    loaded = tokenizer_files.parse(content, "test")
    assert [loaded.token_bytes(token) for token in (270, 271)] == [b"<|endoftext|>", b"<|pad|>"]
    assert set(merged(content)) >= {b"endoftext", b"pad"}
    assert max(loaded.encode(text)) < 270
    assert loaded.decode(loaded.encode(text)) == text


@pytest.mark.parametrize("token", ["BOS", " the", "123", "<>", "", "é<|", "Ġthe"])
def test_a_special_token_that_could_be_learned_is_refused(token: str):
    with pytest.raises(ConfigError, match=r"could also be learned from a text.*<\|pad\|>"):
        Recipe(300, special_tokens=(END_OF_TEXT, token))


def test_every_hundredth_piece_is_kept_apart():
    texts = texts_of(
        *["common words " if number % 100 else "zebra zebra" for number in range(1, 401)]
    )
    content = tokenizer_training.train(texts, Recipe(262))
    assert texts.held_out == ["zebra zebra"] * 4
    assert (texts.documents, texts.text_bytes) == (400, 396 * 13 + 4 * 11)
    assert not any(b"z" in token for token in merged(content))
    found = tokenizer_training.efficiencies(content, texts.held_out)["trained"]
    assert found is not None
    assert (found.tokens, found.bytes_per_token, found.single_byte_share) == (44, 1.0, 1.0)
    assert (found.tokens_used, found.vocab_size) == (len(set("zebra ")), 262)
    assert tokenizer_training.efficiencies(content, [])["gpt2"] is None


def test_a_long_document_is_divided_where_the_pattern_divides_it():
    text = "well.\n\n  Yes, 12345 'tis \n" * 1000
    pieces = list(texts_of(text))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    for pattern in PATTERNS:
        built = tokenizer_files.pre_tokenizer(pattern)
        whole = [word for word, _ in built.pre_tokenize_str(text)]
        assert [word for piece in pieces for word, _ in built.pre_tokenize_str(piece)] == whole


def test_reading_ends_after_some_bytes():
    texts = texts_of("ä" * 10, "b" * 10, "c" * 10, max_bytes=25)
    assert list(texts) == ["ä" * 10, "b" * 10]
    assert texts.is_cut and texts.text_bytes == 30
    texts = texts_of("a" * 10, max_bytes=10)
    assert list(texts) == ["a" * 10]
    assert not texts.is_cut


def test_what_cannot_be_decoded_becomes_a_replacement_character():
    assert list(texts_of("a\ud800b", "")) == ["a\ufffdb"]


def test_bad_lines_are_counted_and_limited(caplog: pytest.LogCaptureFixture):
    read = (*[Document("text")] * 3, BadLines("file:4: broken", 2))
    block = Block(Place(), Documents(read), 1)
    texts = TrainingTexts(iter([block]), max_bad_lines=0.5)
    assert list(texts) == ["text"] * 3
    assert texts.bad_lines == 2
    assert caplog.messages == ["file:4: broken: left out"]
    refused = TrainingTexts(iter([block]), max_bad_lines=0.1)
    with pytest.raises(DataError, match=r"2 of 5 lines cannot be read, such as file:4: broken"):
        tokenizer_training.train(refused, Recipe(257))


def test_memory_does_not_grow_with_a_file(tmp_path: Path):
    """One block of text is read at a time."""
    path = tmp_path / "long.txt"
    path.write_text("word " * 600_000)
    done = list[int]()
    texts = TrainingTexts(readers.blocks([path], ".txt")(Place(), EXACT_CUT), on_read=done.append)
    next(iter(texts))
    assert done == []
    assert sum(map(len, texts)) > 0
    assert len(done) > 3 and done == sorted(done) and done[-1] == path.stat().st_size


def test_ctrl_c_while_texts_are_read():
    """The library calls the reader from its own threads, and takes all that it gives."""

    def endless(_: int) -> Iterator[Document]:
        for number in itertools.count():
            yield Document("text " * 400)
            if number == 1000:  # the main thread waits by now
                os.kill(os.getpid(), signal.SIGINT)

    texts = TrainingTexts(corpus.in_blocks(endless)(Place(), EXACT_CUT))
    with pytest.raises(KeyboardInterrupt):
        tokenizer_training.train(texts, Recipe(300))
    names = [thread.name for thread in threading.enumerate()]
    assert "tokenizer training" not in names


def test_the_tokenizer_of_a_corpus_is_learned_from_it():
    texts = many_ties(seed=3)
    blocks = corpus.in_blocks(lambda skip: iter([Document(text) for text in texts[skip:]]))
    own = Corpus("ties", "made up", 1000, blocks, vocab_size=300)
    learned = tokenizer_training.tokenizer_of(own)
    assert learned.vocab_size == 300
    assert learned.identity == tokenizer_files.parse(train(*texts), "test").identity
    assert tokenizer_training.tokenizer_of(replace(own, vocab_size=None)) is GPT2_TOKENIZER


def test_too_little_text_names_the_size_that_it_gives():
    with pytest.raises(DataError, match=r"8 bytes of text give 259 .*, expected 300; .*_size 259"):
        train("aaaaaaaa")


@pytest.mark.parametrize("size", [0, 256])
def test_too_few_entries(size: int):
    with pytest.raises(ConfigError, match="expected 257 or more"):
        Recipe(size)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_transformers_reads_the_folder_and_gives_the_same_ids(tmp_path: Path, pattern: str):
    import transformers

    content = train(*TEXTS * 5, size=280, pattern=pattern)
    tokenizer_training.write(tmp_path / "tok", content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tok")
    ours = tokenizer_files.load(tmp_path / "tok")
    for text in (*TEXTS, " The  CAT'S\t12345!!\n\n🦜 日本", "\r\n ' é", "  x"):
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_of_text == len(theirs) - 1


def test_a_tokenizer_is_replaced_only_on_request(tmp_path: Path):
    folder = tmp_path / "deep" / "tok"
    tokenizer_training.require_free(folder, False)
    tokenizer_training.write(folder, "{}")
    (folder / "notes.md").write_text("mine")
    with pytest.raises(DataError, match=r"tokenizer\.json exists; .*--out.*--overwrite"):
        tokenizer_training.require_free(folder, False)
    tokenizer_training.require_free(folder, True)
    tokenizer_training.write(folder, "[]")
    names = ["notes.md", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "tokenizer.json").read_text() == "[]"
    (folder / "merges.txt").touch()
    with pytest.raises(DataError, match=r"merges\.txt of another tokenizer"):
        tokenizer_training.require_free(folder, True)


def test_a_folder_that_cannot_be(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is no folder"):
        tokenizer_training.require_free(tmp_path / "file", True)
    with pytest.raises(DataError, match=r"cannot write .*--out"):
        tokenizer_training.write(tmp_path / "file" / "tok", "{}")
