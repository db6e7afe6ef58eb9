import io
import zlib
from typing import Any

import pytest
import torch

import own_tokens
from gpt2.base.errors import CheckpointError, DataError
from gpt2.data import saved_tokenizer
from gpt2.data.tokenizer import GPT2_TOKENIZER, Tokenizer
from gpt2.data.vocabulary import Characters

TOKENIZERS = [GPT2_TOKENIZER, Characters(("\n", "a", "\u00e9")), own_tokens.trained()]
FILE = "tokenizer.json"


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint that is loaded without running code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("saved", TOKENIZERS, ids=lambda item: item.name)
def test_a_checkpoint_holds_the_whole_tokenizer(saved: Tokenizer):
    state = through_a_file({saved_tokenizer.KEY: saved_tokenizer.to_plain(saved)})
    found = saved_tokenizer.of_checkpoint(state)
    assert found is not None
    assert (found.identity, found.name, found.vocab_size) == (
        saved.identity,
        saved.name,
        saved.vocab_size,
    )
    assert found.encode("aa") == saved.encode("aa")
    for other in TOKENIZERS:
        assert saved_tokenizer.is_same(found, other) == (other is saved)


def test_one_of_a_size_that_matters_is_compressed():
    plain = saved_tokenizer.to_plain(own_tokens.trained())
    assert isinstance(plain, dict)
    assert len(plain[FILE]) < len(own_tokens.trained().content) / 2


def test_a_checkpoint_of_the_first_versions_has_tokens_of_gpt2_or_characters():
    assert saved_tokenizer.of_checkpoint({}) is None
    assert [saved_tokenizer.is_same(None, item) for item in TOKENIZERS] == [True, True, False]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (7, "expected a tokenizer in the checkpoint, got 7"),
        ((), "expected a tokenizer"),
        (("a", 1), "expected a tokenizer"),
        ({"name": "x"}, "expected a tokenizer"),
        ({"name": "x", FILE: b"no zlib"}, "the checkpoint's x is damaged"),
        ({"name": "x", FILE: zlib.compress(b"{}")}, "the checkpoint's x is no tokenizer.json"),
    ],
)
def test_something_else_in_its_place_is_refused(value: object, reason: str):
    with pytest.raises((CheckpointError, DataError), match=f"^{reason}"):
        saved_tokenizer.of_checkpoint({saved_tokenizer.KEY: value})


def test_a_message_tells_two_of_the_same_name_and_size_apart():
    names = [saved_tokenizer.described(Characters(texts)) for texts in (("a", "b"), ("b", "a"))]
    assert names[0] != names[1]
    assert saved_tokenizer.described(GPT2_TOKENIZER) == "gpt2 (50,257 tokens)"
