"""Files without a header are read as uint16: no text's tokens are refused, no others are taken."""

import base64
import gzip
import json
import pickle
import random
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

import foreign_shards
from gpt2.base.errors import DataError
from gpt2.data import headerless, tokenizer
from gpt2.data.remote import Storage
from gpt2.data.shards import TokenDataset, load_index

RANDOM = random.Random(7)


def chosen(parts: str | list[str], count: int, between: str = "") -> str:
    return between.join(RANDOM.choice(parts) for _ in range(count))


TEXTS = {
    "English": "".join(topics[name] for name in sorted(topics)),
    "code": Path(json.decoder.__file__).read_text() + Path(base64.__file__).read_text(),
    "Russian": chosen(["привет ", "мир ", "как ", "дела ", "сегодня ", "погода. "], 6000),
    "Chinese": chosen([chr(number) for number in range(0x4E00, 0x9000)], 6000),
    "emoji": chosen([chr(number) for number in range(0x1F300, 0x1F600)], 6000),
    "numbers": "\n".join(
        ",".join(str(RANDOM.randrange(999)) for _ in range(9)) for _ in range(999)
    ),
    "quoted": chosen(['"a"', '"bc"', '"x y"'], 6000, ","),
    "digits": chosen("0123456789", 30000),
    "one and zero": chosen("01", 30000),
    "hex": chosen("0123456789abcdef", 30000),
    "base64": base64.b64encode(RANDOM.randbytes(20000)).decode(),
    "DNA": chosen("ACGT", 30000),
    "DNA with spaces": chosen("ACGT", 9000, " "),
    "JSON": json.dumps([{"id": RANDOM.randrange(9999), "name": "x"} for _ in range(999)]),
    "capitals": chosen(["ZYGOTE ", "XENON ", "QUARTZ ", "ÄÖÜ "], 6000),
    "exclamations": "! " * 9000,
    "half exclamations": chosen(["!", "a", "b", "c", "d"], 9000),
    "every second one": "a!" * 9000,
    "empty comments": "#\n" * 9000,
    "brackets": '"a"b' * 9000,
    "lines": "-" * 9000 + "\n" + "=" * 9000,
    "empty lines": "\n" * 4000,
    "spaces": " " * 4000,
}
VOCABULARY = tokenizer.VOCAB_SIZE
IDS = {
    "id 0 alone": np.zeros(9000),
    "mostly id 0": np.where(np.arange(9000) % 97, 0, np.arange(9000) % VOCABULARY),
    "id 0 after each": np.stack([np.full(4500, 7), np.zeros(4500)], 1).ravel(),
    "id 0 before each": np.stack([np.zeros(4500), np.full(4500, 7)], 1).ravel(),
    "rare ids": np.random.default_rng(0).integers(49000, VOCABULARY, 9000),
    "random ids": np.random.default_rng(1).integers(0, VOCABULARY, 9000),
    "every id": np.arange(VOCABULARY),
    "one rare id": np.full(9000, 0x2E2E),
    "two equal bytes": np.full(9000, 0x0101),
    "the last id": np.full(9000, VOCABULARY - 1),
    "a few ids": np.arange(39) * 256,
    "characters": np.random.default_rng(2).integers(0, 65, 9000),
    "two characters": np.random.default_rng(2).integers(0, 2, 9000),
    "rows with padding": np.pad(np.arange(1000).reshape(100, 10), ((0, 0), (0, 90))).ravel(),
}


def other_content(content: bytes) -> str | None:
    return headerless.other_content(len(content), lambda start, end: content[start:end])


@pytest.mark.parametrize("name", TEXTS)
def test_tokens_of_a_text_are_read(name: str):
    documents = [TEXTS[name][start : start + 5000] for start in range(0, len(TEXTS[name]), 5000)]
    ids = [t for part in documents for t in (tokenizer.END_OF_TEXT, *tokenizer.encode(part))]
    for tokens in (ids, ids[1:], ids[:-1], ids[1:3000], ids[1:60], ids[-1000:]):
        assert other_content(np.array(tokens, "<u2").tobytes()) is None


@pytest.mark.parametrize("name", IDS)
def test_unusual_tokens_are_read(tmp_path: Path, name: str):
    for cut in (0, 1):
        tokens = IDS[name][cut:].astype("<u2")
        assert other_content(tokens.tobytes()) is None
    tokens.tofile(tmp_path / "train.bin")
    inputs, _ = TokenDataset(load_index(Storage(str(tmp_path))), "train", 8).read(
        np.array([[0, 1]])
    )
    assert inputs.tolist() == [tokens[8:16].tolist()]


@pytest.mark.parametrize("place", ["first", "last"])
def test_zeros_at_odd_positions_of_one_part_are_no_32_bit_numbers(tmp_path: Path, place: str):
    tokens = np.array(tokenizer.encode(TEXTS["English"][:120_000]), "<u2")
    part = slice(1, 5000, 2) if place == "first" else slice(-5000, None, 2)
    tokens[part] = 0
    tokens.tofile(tmp_path / "train.bin")
    dataset = TokenDataset(load_index(Storage(str(tmp_path))), "train", 8)
    for row in (0, dataset.rows_per_shard[0] - 1):
        inputs, _ = dataset.read(np.array([[0, row]]))
        assert inputs.tolist() == [tokens[8 * row : 8 * row + 8].tolist()]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u4", "i4", "i8", "u8"])
@pytest.mark.parametrize("name", ["English", "code", "Russian", "Chinese", "numbers", "hex"])
def test_wide_numbers_are_refused(order: str, kind: str, name: str):
    ids = tokenizer.encode(TEXTS[name][:30000])
    for tokens in (ids, ids[:60], ids[1:]):
        content = np.array(tokens, order + kind).tobytes()
        for cut in (0, 2, 4, 6):  # a file may be truncated
            assert other_content(content[: len(content) - cut]) == (
                f"got {8 * int(kind[1])}-bit numbers; write them as np.fromfile(FILE, "
                f"'{order}u{kind[1]}').astype(np.uint16).tofile(FILE)"
            )


@pytest.mark.parametrize("vocabulary", [100_277, 128_256, 200_019, 256_000])  # to Gemma's
@pytest.mark.parametrize("order", ["<", ">"])
def test_ids_of_other_tokenisers_are_refused(vocabulary: int, order: str):
    """Most tokens of a text have small ids: as Zipf found, the n-th is n times rarer."""
    draws = np.random.default_rng(0).zipf(1.1, 20_000)
    ids = draws[draws < vocabulary]
    message = other_content(ids.astype(f"{order}u4").tobytes())
    assert message is not None and message.startswith("got token ids up to ")
    assert "of another tokeniser than GPT-2's; tokenise the text again" in message


@pytest.mark.parametrize("name", ["English", "code", "Russian", "Chinese", "emoji", "numbers"])
def test_swapped_bytes_are_refused(name: str):
    ids = np.array(tokenizer.encode(TEXTS[name][:30000]), ">u2")
    assert other_content(ids.tobytes()) == (
        "got big-endian numbers; write them as np.fromfile(FILE, '>u2').astype(np.uint16)"
        ".tofile(FILE)"
    )
    assert other_content(np.random.default_rng(0).integers(0, 65, 9000).astype(">u2").tobytes())


def test_numbers_of_8_bits_are_refused():
    text = TEXTS["English"][:9000]
    ids = {character: number for number, character in enumerate(sorted(set(text)))}
    message = other_content(np.array([ids[character] for character in text], np.uint8).tobytes())
    assert message is not None and message.startswith("got 8-bit numbers")


HTML = b"<!DOCTYPE html>\n<html><head><title>404: Not Found</title></head><body>\n</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0123456789abcdef" * 4 + b"\n"
FLOATS = np.random.default_rng(0).normal(size=999)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (TEXTS["English"].encode(), "text; tokenise it: gpt2 data files"),
        (TEXTS["English"].encode()[:101], "text"),
        (TEXTS["Russian"].encode(), "text"),
        (b"\xef\xbb\xbf" + TEXTS["Russian"].encode(), "text"),
        (TEXTS["Chinese"].encode(), "text"),
        (("Die Größe und das Ausmaß bestimmen die Wahl. " * 999).encode("latin-1"), "text"),
        (TEXTS["DNA"].encode(), "text"),
        (TEXTS["JSON"].encode(), "text"),
        (LFS, "a Git LFS pointer, not the file; get the file with: git lfs pull"),
        (HTML, "a web page"),
        (gzip.compress(RANDOM.randbytes(9000), mtime=0), "compressed by gzip"),
        (b"\xff\xfe" + TEXTS["English"].encode("utf-16-le"), None),
        (pickle.dumps([0.5] * 999), None),
        (np.arange(999, dtype=np.float32).tobytes(), "32-bit floats; write them as np.fromfile("),
        (np.arange(999, dtype=">f8").tobytes(), "64-bit floats; write them as np.fromfile("),
        (FLOATS.tobytes(), None),
        (np.full(999, -1, np.int32).tobytes(), None),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(tmp_path: Path, content: bytes, what: str | None):
    """By name, or at least because of ids outside the vocabulary."""
    found = other_content(content)
    assert (found is None) if what is None else found is not None and what in found
    (tmp_path / "train.bin").write_bytes(content[: len(content) // 2 * 2])
    with pytest.raises(DataError, match=r"train\.bin (is|holds) ") as caught:
        TokenDataset(load_index(Storage(str(tmp_path))), "train", 8)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["<i4", "<u4", "<i8", ">u2"])
def test_they_are_refused_wherever_they_are(tmp_path: Path, kind: str):
    """Also in the middle of a data set whose first shards are sound, before anything is read."""
    tokens = tokenizer.encode(TEXTS["English"][:20000])
    foreign_shards.nanogpt_openwebtext(tmp_path)
    np.array(tokens, "<u2").tofile(tmp_path / "x_train_1.bin")
    np.array(tokens, kind).tofile(tmp_path / "x_train_2.bin")
    with pytest.raises(DataError, match=r"x_train_2\.bin is .* \(got .*numbers; write them as np"):
        load_index(Storage(str(tmp_path)))
