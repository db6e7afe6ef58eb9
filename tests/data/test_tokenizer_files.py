"""A `tokenizer.json` that is read: the library's ids, and every byte of a text."""

import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from gpt2.base.errors import DataError
from gpt2.data import tokenizer, tokenizer_files, tokenizer_training
from gpt2.data.tokenizer_files import Tokenizer
from gpt2.data.vocabulary import Characters
from gpt2.inference import tokenizer_export
from small_tokenizers import trained

ODD_PARTS = (
    *(
        "the cat",
        "The",
        "n't",
        "'s",
        "'S",
        "'LL",
        "'\u017f",
        "\u2019s",
        "'",
        " ",
        "  ",
        "\n",
        "\r\n",
    ),
    *("\t", "\x1c", "\x85", "\u2028", "\u3000", "\xa0", "\u200b", "\ufeff", "1", "12345", "²", "Ⅷ"),
    *(
        "٣",
        "é",
        "e\u0301",
        "ǅ",
        "日本",
        "🦜",
        "👩‍🚀",
        "\U0010ffff",
        "\x00",
        ".",
        "!!\n",
        "--",
        "ß",
        "İ",
    ),
    *("<|endoftext|>", "<|pad|>", "<|", "Ġ", "Ċ", "\ufffd"),
)
odd_texts = st.lists(st.one_of(st.sampled_from(ODD_PARTS), st.text(max_size=4)), max_size=30).map(
    "".join
)


@cache
def gpt2() -> str:
    content: str = tokenizer_export.build().to_str()
    return content


@cache
def with_a_space_token() -> str:
    """One that tiktoken cannot encode: a token that is found before a text is divided."""
    built = tokenizers.Tokenizer.from_str(trained("gpt2"))
    built.add_tokens(["  ", "cat"])
    content: str = built.to_str()
    return content


@cache
def without_a_pattern_that_is_known() -> str:
    def split_digits(file: dict[str, Any]) -> None:
        digits = {"type": "Digits", "individual_digits": True}
        sequence = {"type": "Sequence", "pretokenizers": [digits, file["pre_tokenizer"]]}
        file["pre_tokenizer"] = sequence

    return changed(split_digits)


FILES: dict[str, Callable[[], str]] = {
    "gpt2's pattern": lambda: trained("gpt2"),
    "cl100k's pattern": lambda: trained("cl100k"),
    "o200k's pattern": lambda: trained("o200k"),
    "GPT-2": gpt2,
    "added tokens": with_a_space_token,
    "another pattern": without_a_pattern_that_is_known,
}


@cache
def loaded(name: str) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """Ours and the library's."""
    library = tokenizers.Tokenizer.from_str(FILES[name]())
    library.encode_special_tokens = True
    return tokenizer_files.parse(FILES[name](), name), library


def changed(change: Callable[[dict[str, Any]], object], content: str | None = None) -> str:
    """A trained tokenizer's file after a change of its values."""
    file = json.loads(content or trained("gpt2"))
    change(file)
    return json.dumps(file)


@pytest.mark.parametrize("name", FILES)
def test_a_lone_surrogate_becomes_a_replacement_character(name: str):
    """Command lines and JSON can hold one."""
    ours, _ = loaded(name)
    assert ours.decode(ours.encode("a\ud800b🦜")) == "a\ufffdb🦜"


@pytest.mark.parametrize("name", FILES)
@given(text=odd_texts)
def test_the_ids_are_the_library_s_and_every_byte_comes_back(name: str, text: str):
    ours, library = loaded(name)
    ids = ours.encode_to_numpy(text)
    assert ids.dtype == np.uint32
    assert ids.tolist() == library.encode(text).ids
    assert ours.decode(ids.tolist()) == text
    assert b"".join(map(ours.token_bytes, ids.tolist())) == text.encode()
    assert int(ours.byte_lengths[ids].sum()) == len(text.encode())
    assert ours.end_of_text not in ids


def test_tiktoken_encodes_where_it_can():
    assert {name: loaded(name)[0].is_fast for name in FILES} == {
        "gpt2's pattern": True,
        "cl100k's pattern": True,
        "o200k's pattern": True,
        "GPT-2": True,
        "added tokens": False,
        "another pattern": False,
    }


rules = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=8)


@given(rules, st.lists(st.text("abc", max_size=12), max_size=8))
def test_merging_by_ids_is_merging_by_rules(numbers: list[tuple[int, int]], texts: list[str]):
    """Whatever the rules are: where `follows_ids` says so, tiktoken gives the library's ids."""
    vocab = {letter: byte for byte, letter in tokenizer_files.byte_letters().items()}
    known, merges = ["a", "b", "c"], []
    for first, second in numbers:
        pair = (known[first % len(known)], known[second % len(known)])
        if "".join(pair) not in vocab:
            vocab["".join(pair)] = len(vocab)
            known.append("".join(pair))
            merges.append(pair)
    if not tokenizer_files.follows_ids(vocab, merges):
        return
    by_rules = tokenizers.models.BPE(vocab=vocab, merges=merges)
    by_ids = tokenizer_files._by_tiktoken(
        tokenizer.PATTERN,
        {
            number: token.encode("latin-1")
            for token, number in vocab.items()
            if number > 255 or token in "abc"
        }
        | {b: bytes([b]) for b in range(256)},
    )
    for text in filter(None, texts):
        assert by_ids(text).tolist() == [token.id for token in by_rules.tokenize(text)]


@pytest.mark.parametrize(
    ("vocab", "merges", "reason"),
    [
        ("abc bc ab", "ab bc a-bc", "a token that is formed before its parts"),
        ("ab bc abc", "a-b b-c a-bc", "a token that its own bytes do not become: they are ab, c"),
        ("bc ab", "a-b b-c", "rules in another order than the ids"),
        ("ab abc", "a-b", "a token without a rule"),
        ("ab abc", "a-b ab-c ab-c", "a rule that stands there twice"),
    ],
)
def test_what_does_not_follow_the_ids(vocab: str, merges: str, reason: str):
    ids = {token: number for number, token in enumerate([*"abc", *vocab.split()])}
    pairs = [tuple(rule.split("-")) for rule in merges.split() if "-" in rule]
    assert not tokenizer_files.follows_ids(ids, pairs), reason
    assert tokenizer_files.follows_ids({"a": 0, "b": 1, "ab": 2}, [("a", "b")])


def test_gpt2_s_file_has_the_ids_of_the_published_encoder():
    ours, _ = loaded("GPT-2")
    text = "Hello, I'm a language model,<|endoftext|>\n\n"
    assert ours.encode(text) == tokenizer.encode(text)
    assert (ours.vocab_size, ours.end_of_text) == (tokenizer.VOCAB_SIZE, tokenizer.END_OF_TEXT)
    assert ours.byte_lengths.tolist() == tokenizer.byte_lengths()[: ours.vocab_size].tolist()
    assert ours.token_bytes(ours.end_of_text) == b"<|endoftext|>"
    assert (ours.token_bytes(60000), ours.decode([15496, 60000])) == (b"", "Hello")
    assert ours.decode([tokenizer.ranks()[b"\xe3"]]) == "\ufffd"


def test_it_is_sent_to_another_process():
    ours, _ = loaded("cl100k's pattern")
    sent = pickle.loads(pickle.dumps(ours))
    assert sent.encode("it's 1234") == ours.encode("it's 1234")
    assert (sent.identity, sent.name) == (ours.identity, ours.name)


def test_a_million_empty_lines():
    ours, _ = loaded("gpt2's pattern")
    text = "\n" * 1_000_000
    assert ours.decode(ours.encode(text)) == text


def as_older_versions_write_it(file: dict[str, Any]) -> None:
    """`tokenizers` 0.13: rules as text, and without the fields that came later."""
    model = file["model"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    del model["ignore_merges"], model["byte_fallback"], file["pre_tokenizer"]["use_regex"]
    model["vocab"] = dict(reversed(model["vocab"].items()))
    file["post_processor"] = None
    file["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }


def test_the_digest_is_that_of_the_tokenizer_and_not_of_the_file():
    ours = loaded("gpt2's pattern")[0]
    older = tokenizer_files.parse(changed(as_older_versions_write_it), "older")
    assert older.identity == ours.identity
    assert older.is_fast and older.encode("the cat sat") == ours.encode("the cat sat")


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "rules": lambda file: file["model"]["merges"].pop(),
    "ids": lambda file: file["model"]["vocab"].update({"!": 1, '"': 0}),
    "spelling": lambda file: file["added_tokens"][1].update(content="<|user|>"),
    "division": lambda file: file["pre_tokenizer"].update(use_regex=False),
    "added": lambda file: file["added_tokens"][1].update(special=False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_tokenizer_has_another_digest(name: str):
    other = tokenizer_files.parse(changed(CHANGES[name]), "other")
    assert other.identity != loaded("gpt2's pattern")[0].identity


def refused(**model: Any) -> Callable[[dict[str, Any]], object]:
    return lambda file: file["model"].update(model)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "WordPiece": (
        lambda file: file.update(
            model={
                "type": "WordPiece",
                "unk_token": "[UNK]",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
                "vocab": {"[UNK]": 0},
            }
        ),
        "a WordPiece model",
    ),
    "Unigram": (
        lambda file: file.update(
            model={"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
        ),
        "a Unigram model",
    ),
    "normalizer": (lambda file: file.update(normalizer={"type": "NFC"}), r"normalizer \(NFC\)"),
    "dropout": (refused(dropout=0.1), "dropout=0.1"),
    "suffix": (refused(end_of_word_suffix="</w>"), "end_of_word_suffix='</w>'"),
    "space": (
        lambda file: file["pre_tokenizer"].update(add_prefix_space=True),
        "add_prefix_space=true",
    ),
    "characters": (lambda file: file.update(pre_tokenizer=None), "not end in ByteLevel"),
    "removed": (
        lambda file: file.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [{"type": "WhitespaceSplit"}, file["pre_tokenizer"]],
            }
        ),
        r"\(WhitespaceSplit\) that may remove something",
    ),
    "bytes": (
        lambda file: file.update(
            model=file["model"] | {"vocab": {"a": 0}, "merges": []}, added_tokens=[]
        ),
        "no token for 255 of the 256 bytes",
    ),
    "letters": (lambda file: file["model"]["vocab"].update({"▁": 5000}), "'▁', which stands for"),
    "white space": (
        lambda file: file["added_tokens"][1].update(special=False, lstrip=True),
        "takes the white space",
    ),
    "no end": (
        lambda file: file["added_tokens"][0].update(content="<|start|>"),
        "no token for the end of a text",
    ),
    "two ends": (
        lambda file: [
            token.update(content=end)
            for token, end in zip(file["added_tokens"], ("</s>", "<eos>"), strict=True)
        ],
        "</s> and <eos> among its special tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_byte_exact_is_refused_by_name(name: str):
    change, reason = REFUSED[name]
    with pytest.raises(DataError, match=f"^my/file.* has .*{reason}.*; expected") as caught:
        tokenizer_files.parse(changed(change), "my/file")
    assert "\n" not in str(caught.value)


def test_the_end_of_a_text_may_have_another_name():
    other = changed(lambda file: file["added_tokens"][0].update(content="</s>"))
    assert tokenizer_files.parse(other, "other").end_of_text == 1498


def test_a_file_on_which_the_library_aborts():
    broken = changed(refused(continuing_subword_prefix="x"))
    with pytest.raises(DataError, match=r"^my/file is no .*: its model has a continuing_subword"):
        tokenizer_files.parse(broken, "my/file")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": 1}', "\x00", "a text"])
def test_what_is_no_tokenizer(content: str, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json is no tokenizer\.json that can be read"):
        tokenizer_files.load(tmp_path)


def test_a_file_or_a_folder(tmp_path: Path):
    with pytest.raises(DataError, match=r"no .*/tokenizer\.json; expected a folder"):
        tokenizer_files.load(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        tokenizer_files.load(path)
    tokenizer_training.write(tmp_path, trained("gpt2"))
    assert tokenizer_files.load(path).identity == tokenizer_files.load(tmp_path).identity


def test_a_tokenizer_is_known_by_what_it_does():
    """GPT-2's by its name, any other by a digest, wherever it comes from and whatever its name."""
    ours, _ = loaded("gpt2's pattern")
    elsewhere = tokenizer_files.parse(trained("gpt2"), "/some/where.json", "another name")
    characters = Characters(("a", "b"))
    assert ours == elsewhere and ours != loaded("cl100k's pattern")[0]
    assert characters.identity == Characters(("a", "b")).identity != Characters(("b", "a")).identity
    assert tokenizer.GPT2_TOKENIZER.identity == tokenizer.GPT2_TOKENIZER.name == "gpt2"
    assert pickle.loads(pickle.dumps(tokenizer.GPT2_TOKENIZER)) is tokenizer.GPT2_TOKENIZER
    assert len({ours.identity, characters.identity, "gpt2"}) == 3


def test_a_file_is_named_by_its_folder(tmp_path: Path):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text(trained("gpt2"))
    assert tokenizer_files.load(tmp_path / "tok").name == "tok/tokenizer.json"
