"""GPT-2's byte-pair encoding: tiktoken with ranks that are part of this package (no download)."""

import binascii
import codecs
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tiktoken

from gpt2.base.errors import DataError

NAME = "gpt2"
VOCAB_SIZE = 50257
END_OF_TEXT = 50256
COUNTED_AT_ONCE = 1 << 20
"""tokens; the memory that counting takes does not grow with a shard"""
NO_RANK = 1 << 32
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# Text is split by this pattern before merging (Radford et al. 2019, section 2.2). Pattern and ranks
# are those of the published encoder.
# Between a character and a space or newline after it, the pattern always divides a text: no token
# has white space after anything else, and no part of the pattern looks behind. (What Python calls
# white space includes all that the pattern calls so.)
EXACT_CUT = re.compile(r"(?<=\S)[ \n]")
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@cache
def ranks() -> dict[bytes, int]:
    """The bytes of each token except <|endoftext|>, and its id, which is its rank in merging.

    Raises DataError if the rank table is not the published one.
    """
    table = resources.files("gpt2.data").joinpath("gpt2.tiktoken").read_bytes()
    digest = hashlib.sha256(table).hexdigest()
    if digest != RANKS_SHA256:
        raise DataError(
            f"the tokeniser's rank table gpt2.tiktoken is damaged: expected SHA-256 "
            f"{RANKS_SHA256[:12]}…, got {digest[:12]}…; reinstall the package: "
            "pip install --force-reinstall ."
        )
    words = table.split()  # a token, its rank, the next token …
    return dict(zip(map(binascii.a2b_base64, words[::2]), map(int, words[1::2]), strict=True))


@cache
def load() -> tiktoken.Encoding:
    """The encoding, built once per process; raises DataError as `ranks` does."""
    return tiktoken.Encoding(
        name=NAME,
        pat_str=PATTERN,
        mergeable_ranks=ranks(),
        special_tokens={"<|endoftext|>": END_OF_TEXT},
        explicit_n_vocab=VOCAB_SIZE,
    )


@cache
def byte_lengths() -> npt.NDArray[np.uint8]:
    """Bytes of text by token id, for all ids of uint16; 0 for <|endoftext|> and above."""
    lengths = np.zeros(1 << 16, dtype=np.uint8)
    for token, rank in ranks().items():
        lengths[rank] = len(token)
    lengths.flags.writeable = False
    return lengths


def text_bytes(tokens: npt.NDArray[np.integer[Any]]) -> int:
    """Bytes of the UTF-8 text that the tokens hold, without their <|endoftext|>."""
    return sum_of_lengths(byte_lengths(), tokens)


def sum_of_lengths(
    lengths: npt.NDArray[np.unsignedinteger[Any]], tokens: npt.NDArray[np.integer[Any]]
) -> int:
    """The sum of `lengths`, which are by token id, over all tokens."""
    parts = range(0, len(tokens), COUNTED_AT_ONCE)
    found = (lengths.take(tokens[start : start + COUNTED_AT_ONCE]) for start in parts)
    return sum(int(part.sum(dtype=np.int64)) for part in found)


def merges(known: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts of each token of several bytes, by rank (Sennrich et al. 2016).

    They follow from merging the token's bytes with all lower ranks of `known`.
    """
    return [_parts(token, known) for token in sorted(known, key=known.__getitem__) if token[1:]]


def _parts(token: bytes, known: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        rated = [known.get(first + second, NO_RANK) for first, second in pairwise(parts)]
        at = rated.index(min(rated))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def encode(text: str) -> list[int]:
    """Token ids of `text`; `<|endoftext|>` in it is encoded as ordinary text."""
    return load().encode_ordinary(text)


def encode_to_numpy(encoding: tiktoken.Encoding, text: str) -> npt.NDArray[np.uint32]:
    """The token ids of a text in which nothing is a special token.

    The regular expression fails on some texts, such as a million empty lines: these are encoded in
    halves, which are divided at the beginning of a line.
    """
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError:  # tiktoken's, from the regular expression
        middle = text.find("\n", len(text) // 2) + 1 or len(text) // 2
        if not 0 < middle < len(text):
            raise
        halves = (text[:middle], text[middle:])
        return np.concatenate([encode_to_numpy(encoding, half) for half in halves])


def decode(tokens: list[int]) -> str:
    """Text of `tokens`; ids of the padding (50257 and above) decode to nothing."""
    return load().decode([token for token in tokens if token < VOCAB_SIZE])


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def name(self) -> str:
        """For messages: "gpt2" for GPT-2's and no other, else "tiktoken:cl100k_base" or a file."""

    @property
    def identity(self) -> str:
        """The same for the same ids of every text: "gpt2" for GPT-2's, else a SHA-256."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; the rows that pad an embedding have none."""

    @property
    def end_of_text(self) -> int | None:
        """The token before each document, if there is one."""

    @property
    def exact_cut(self) -> re.Pattern[str] | None:
        """Where it begins, a text can be divided: the ids of the parts, one after the other, are
        those of the text. None if no such place is known."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text without lone surrogates. Raises DataError for what has no token."""

    def encode_to_numpy(self, text: str) -> npt.NDArray[np.uint32]:
        """As `encode`, and faster."""

    def decode(self, tokens: list[int]) -> str: ...

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one token, which may end within a character."""

    def text_bytes(self, tokens: npt.NDArray[np.integer[Any]]) -> int:
        """UTF-8 bytes of the text of `tokens`, without their <|endoftext|>."""


class Gpt2Tokenizer:
    """GPT-2's, as the functions of this module. GPT2_TOKENIZER is the only one."""

    name = identity = NAME
    vocab_size = VOCAB_SIZE
    end_of_text = END_OF_TEXT
    exact_cut = EXACT_CUT

    def encode(self, text: str) -> list[int]:
        return encode(text)

    def encode_to_numpy(self, text: str) -> npt.NDArray[np.uint32]:
        return encode_to_numpy(load(), text)

    def decode(self, tokens: list[int]) -> str:
        return decode(tokens)

    def token_bytes(self, token: int) -> bytes:
        return load().decode_single_token_bytes(token) if token < VOCAB_SIZE else b""

    def text_bytes(self, tokens: npt.NDArray[np.integer[Any]]) -> int:
        return text_bytes(tokens)

    def __reduce__(self) -> str:
        return "GPT2_TOKENIZER"


GPT2_TOKENIZER = Gpt2Tokenizer()


class Decoder:
    """Decodes tokens one by one; the joined text is that of `decode`.

    A token may end within a character, which is returned with its last byte. Invalid bytes become
    U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer = GPT2_TOKENIZER) -> None:
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The characters that `token` completes."""
        return self._characters.decode(self._tokenizer.token_bytes(token))

    def end(self) -> str:
        """The text of an incomplete character after the last token."""
        return self._characters.decode(b"", final=True)
