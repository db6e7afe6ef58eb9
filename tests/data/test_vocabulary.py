import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foreign_shards
from gpt2.base.errors import DataError
from gpt2.data import vocabulary
from gpt2.data.remote import Storage
from gpt2.data.shards import TokenDataset, load_index

PLAIN: dict[str, Any] = {"vocab_size": 3, "itos": dict(enumerate("\nab")), "stoi": {}}
PLAIN["stoi"] = {text: number for number, text in PLAIN["itos"].items()}


class Code:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, Any]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickle_is_read(protocol: int):
    meta = {**PLAIN, "comment": [("lower", None), True, 0.5]}
    assert vocabulary.read(pickle.dumps(meta, protocol), "meta.pkl") == ("\n", "a", "b")
    large = {number: chr(0x4E00 + number) for number in range(20_000)}
    inverse = {text: number for number, text in large.items()}
    content = pickle.dumps({"vocab_size": 20_000, "itos": large, "stoi": inverse}, protocol)
    assert vocabulary.read(content, "meta.pkl") == tuple(large.values())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "code",
    [
        Code(os.system, "touch was_run"),
        Code(eval, "open('was_run', 'w')"),
        Code(subprocess.call, ["touch", "was_run"]),
        np.float64(1),
        Path("x"),
    ],
)
@pytest.mark.parametrize("place", ["vocab_size", "itos", "stoi", "extra"])
def test_no_code_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int, code: object, place: str
):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps({**PLAIN, place: code}, protocol)
    with pytest.raises(DataError, match=r"^meta\.pkl is not a plain vocabulary: .*name of code"):
        vocabulary.read(content, "meta.pkl")
    assert not list(tmp_path.iterdir())
    with pytest.raises(vocabulary._NotPlain):  # also if an opcode were overlooked
        vocabulary._PlainUnpickler(__import__("io").BytesIO(content)).load()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated, damaged or no pickle"),
        (b"no pickle", "truncated, damaged or no pickle"),
        (pickle.dumps(PLAIN)[:-9], "truncated, damaged or no pickle"),
        (b"\x80\x04}r\xff\xff\xff\x7f.", "it is damaged"),  # a memo of 16 GB
        (b"(dp99999999999\n.", "it is damaged"),
        (b"\x80\x05\x96\xff\xff\xff\xff\x3f\0\0\0.", "truncated, damaged or no pickle"),
        (b"\x80\x04\x82\x01.", r"more than dicts, lists, texts and numbers \(EXT1\)"),
        (b"P1\n.", r"more than dicts, lists, texts and numbers \(PERSID\)"),
        (b"\x80\x02Q.", r"more than dicts, lists, texts and numbers \(BINPERSID\)"),
        (b"cos\x1b[2J\nsystem\n.", r"the name of code, 'os\\x1b\[2J.system'"),
        (pickle.dumps([1]), "expected a dict, got list"),
        (pickle.dumps({"vocab_size": 50257}), "it has no itos and no stoi"),
        (pickle.dumps({**PLAIN, "vocab_size": 4}), "expected itos to have the keys 0 to 3"),
        (pickle.dumps({**PLAIN, "vocab_size": True}), "expected a vocab_size of 1 to 65536, got T"),
        (pickle.dumps({**PLAIN, "vocab_size": 10**400}), "expected a vocab_size of 1 to 65536"),
        (pickle.dumps({**PLAIN, "itos": ["\n", "a", "b"]}), "expected itos to be a dict"),
        (
            pickle.dumps({**PLAIN, "itos": {1: "\n", 2: "a", 3: "b"}}),
            "itos to have the keys 0 to 2",
        ),
        (pickle.dumps({**PLAIN, "itos": {0: 1, 1: "a", 2: "b"}}), "itos to have texts as values"),
        (pickle.dumps({**PLAIN, "itos": {0: "", 1: "a", 2: "b"}}), "itos to have texts as values"),
        (pickle.dumps({**PLAIN, "stoi": {"a": 0, "b": 1, "\n": 2}}), "the reverse of itos"),
        (pickle.dumps({**PLAIN, "stoi": [1]}), "the reverse of itos"),
        (pickle.dumps({**PLAIN, "pad": "x" * (17 << 20)}), "larger than 16 MiB"),
    ],
)
def test_what_is_not_plain_is_refused_in_one_line(content: bytes, message: str):
    with pytest.raises(DataError, match=message) as caught:
        vocabulary.read(content, "data/meta.pkl")
    assert str(caught.value).startswith("data/meta.pkl is not a plain vocabulary: ")
    assert "if these tokens are GPT-2's, move data/meta.pkl elsewhere" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_damage_at_any_bit_is_refused_or_harmless():
    """No bit of a small file leads to anything but a vocabulary or one line."""
    whole = pickle.dumps(PLAIN, 4)
    for position in range(len(whole)):
        for bit in range(8):
            content = whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :]
            try:
                assert all(isinstance(text, str) for text in vocabulary.read(content, "meta.pkl"))
            except DataError as error:
                assert str(error).isprintable()


def test_ids_are_checked_against_it(tmp_path: Path):
    foreign_shards.nanogpt_characters(tmp_path, "abc" * 100)
    TokenDataset(load_index(Storage(str(tmp_path))), "train", 8)
    np.full(100, 3, dtype="<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"train\.bin holds the token id 3, outside the voc.* of 3"):
        TokenDataset(load_index(Storage(str(tmp_path))), "train", 8)


def test_a_folder_with_one_that_is_not_plain_is_refused(tmp_path: Path):
    foreign_shards.nanogpt_openwebtext(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Code(os.system, "true")))
    with pytest.raises(DataError, match=r"meta\.pkl is not a plain vocabulary: .*name of code"):
        load_index(Storage(str(tmp_path)))
    with pytest.raises(DataError, match=r"meta\.pkl is not a plain vocabulary: .*name of code"):
        load_index(Storage(f"{tmp_path}/*.bin"))


def test_unknown_ids_are_shown_as_such():
    assert vocabulary.Characters(("a", "b")).decode([0, 1, 2, 0]) == "ab\ufffda"
    assert vocabulary.tokenizer_of(None).decode([15496, 11]) == "Hello,"
