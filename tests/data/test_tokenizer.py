import hashlib
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.base.errors import DataError
from gpt2.data import tokenizer


def test_known_ids():
    assert tokenizer.encode("Hello, I'm a language model,") == [
        15496, 11, 314, 1101, 257, 3303, 2746, 11,
    ]  # fmt: skip
    assert tokenizer.load().n_vocab == 50257
    assert tokenizer.load().encode("<|endoftext|>", allowed_special="all") == [50256]


@given(st.text())
def test_decoding_gives_the_text_back(text: str):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < tokenizer.END_OF_TEXT for token in tokens)
    shard = np.array([tokenizer.END_OF_TEXT, *tokens], dtype=np.uint16)
    assert tokenizer.text_bytes(shard) == len(text.encode())


def test_a_special_token_in_text_is_ordinary_text():
    assert tokenizer.END_OF_TEXT not in tokenizer.encode("a<|endoftext|>b")


def test_ids_of_the_padded_vocabulary_decode_to_nothing():
    assert tokenizer.decode([15496, 50300]) == "Hello"


@given(st.lists(st.integers(0, 50303)))
def test_token_by_token_gives_the_same_text(tokens: list[int]):
    decoder = tokenizer.Decoder()
    pieces = [decoder.add(token) for token in tokens]
    assert "".join([*pieces, decoder.end()]) == tokenizer.decode(tokens)


@pytest.mark.parametrize("text", ["🦜", "👩‍🚀 naïve", "日本語のテキスト", "🇳🇿🏴‍☠️"])
def test_a_character_is_returned_with_its_last_token(text: str):
    tokens, decoder = tokenizer.encode(text), tokenizer.Decoder()
    pieces = [decoder.add(token) for token in tokens]
    assert "".join(pieces) == text
    assert len(tokens) > sum(map(bool, pieces)), "no token ends within a character"
    assert decoder.end() == ""


def test_merges_are_those_of_the_published_encoder():
    """The first lines of its merges.txt; every token of several bytes has one merge."""
    merges = tokenizer.merges(tokenizer.ranks())
    assert merges[:5] == [(b" ", b"t"), (b" ", b"a"), (b"h", b"e"), (b"i", b"n"), (b"r", b"e")]
    joined = [first + second for first, second in merges]
    assert joined == [token for token in tokenizer.ranks() if len(token) > 1]
    assert {part for pair in merges for part in pair} <= tokenizer.ranks().keys()


def test_another_rank_table_is_refused(monkeypatch: pytest.MonkeyPatch):
    table = resources.files("gpt2.data").joinpath("gpt2.tiktoken").read_bytes()
    assert hashlib.sha256(table).hexdigest() == tokenizer.RANKS_SHA256
    monkeypatch.setattr(tokenizer, "RANKS_SHA256", "0" * 64)
    with pytest.raises(DataError, match="rank table"):
        tokenizer.ranks.__wrapped__()
