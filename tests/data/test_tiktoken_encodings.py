"""tiktoken's encodings as `tokenizer.json`; what they download is replaced by local files."""

import hashlib
from functools import cache
from importlib import resources
from pathlib import Path

import pytest
import requests
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from gpt2.base.errors import ConfigError, DataError
from gpt2.data import tiktoken_encodings, tokenizer_choice, tokenizer_files
from gpt2.data.tokenizer import GPT2_TOKENIZER
from gpt2.data.tokenizer_files import Tokenizer
from small_tokenizers import trained

R50K_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
PARTS = ("a", "Cat", "DOG", " ", "\n", "\r\n", "\t", ")\n", ".\n\n", "'S", "'\u017f", "'ll", "123")
PARTS += ("é", "e\u0301", "ǅ", "日本", "٣", "/", "_", "\x85", "\u2028", "\xa0", "🦜", "<|end|>")
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=30).map("".join)


@pytest.fixture(autouse=True)
def nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(url: str) -> None:
        raise requests.exceptions.ConnectionError(f"no route to {url}")

    monkeypatch.setattr(requests, "get", get)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})


@cache
def encodings(name: str) -> tuple[tiktoken.Encoding, Tokenizer]:
    """One of tiktoken's, with its pattern and special tokens, and few others; and ours."""
    loaded = tokenizer_files.parse(trained("cl100k"), "few")
    ranks = {loaded.token_bytes(number): number for number in range(1498)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
        patch.setattr(tiktoken.registry, "ENCODINGS", {})
        return tiktoken.get_encoding(name), tiktoken_encodings.load(name)


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base", "o200k_harmony"])
@given(text=texts)
@settings(deadline=None)
def test_the_ids_are_tiktoken_s_and_the_library_s(name: str, text: str):
    theirs, ours = encodings(name)
    ids = ours.encode(text)
    assert ids == theirs.encode_ordinary(text)
    library = tokenizers.Tokenizer.from_str(ours.content)
    library.encode_special_tokens = True
    assert ids == library.encode(text).ids
    assert ours.decode(ids) == text


def test_special_tokens_keep_their_ids():
    theirs, ours = encodings("cl100k_base")
    assert (ours.name, ours.vocab_size) == ("tiktoken:cl100k_base", theirs.n_vocab)
    assert ours.end_of_text == theirs.eot_token == 100257
    assert ours.token_bytes(50_000) == b""  # there is none between
    for name in ("cl100k_base", "o200k_harmony"):
        theirs, ours = encodings(name)
        for number in theirs._special_tokens.values():
            assert theirs._special_tokens[ours.token_bytes(number).decode()] == number
    assert ours.token_bytes(200018) == b"<|endofprompt|>"  # also called <|reserved_200018|>
    assert encodings("o200k_harmony")[1].identity != encodings("o200k_base")[1].identity


def test_every_encoding_is_known():
    """`gpt2` is in this package."""
    assert {"gpt2", *tiktoken_encodings.PATTERNS} == set(tiktoken.list_encoding_names())
    assert set(tiktoken_encodings.PATTERNS.values()) <= set(tokenizer_files.PATTERNS)


def test_the_cache_of_tiktoken_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And r50k_base has GPT-2's tokens."""
    ranks = resources.files("gpt2.data").joinpath("gpt2.tiktoken").read_bytes()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(DataError) as refused:
        tokenizer_choice.find("tiktoken:r50k_base")
    assert str(refused.value).startswith("tiktoken:r50k_base cannot be downloaded (no route to ")
    assert "TIKTOKEN_CACHE_DIR=FOLDER" in str(refused.value)
    (tmp_path / hashlib.sha1(R50K_URL.encode()).hexdigest()).write_bytes(ranks)
    assert tokenizer_choice.find("tiktoken:r50k_base") is GPT2_TOKENIZER


def test_an_unknown_encoding():
    with pytest.raises(ConfigError, match="unknown tokenizer tiktoken:cl100k; did you mean"):
        tiktoken_encodings.load("cl100k")
