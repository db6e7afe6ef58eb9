"""Tokenizers in Hugging Face's format, `tokenizer.json`: byte-level byte-pair encodings.

Only those are read with which every text comes back byte by byte. Where tiktoken gives the same
ids as the `tokenizers` library, it encodes: it is several times faster.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers

from gpt2.base import regular_file
from gpt2.base.control_characters import printable
from gpt2.base.errors import DataError
from gpt2.data import tokenizer

FILE = "tokenizer.json"
PATTERNS = {
    "gpt2": tokenizer.PATTERN,
    # tiktoken_ext/openai_public.py of tiktoken 0.7: later ones have possessive quantifiers, which
    # say the same to tiktoken, and something else to the `tokenizers` library ({1,3}+).
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""how published encoders divide a text before merging, by the name of the encoder"""
# A place at which each of the PATTERNS divides a text: between a character and a space. (cl100k's
# takes a newline together with the punctuation before it.)
EXACT_CUT = re.compile(r"(?<=\S) ")
END_OF_TEXT = "<|endoftext|>"
OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>")  # noqa: RUF001
"""how tokenizers spell their end of a text that have no <|endoftext|>"""
EXPECTED = "expected byte-level BPE without a normalizer, as `gpt2 tokenizer train` writes it"
LOSSLESS_SPLITS = ("Split", "Digits", "Punctuation")
"""pre-tokenizers that divide a text, and keep all of it where they remove nothing"""
SPLIT_FIELDS = ("type", "pattern", "behavior", "invert", "individual_digits", "use_regex")
"""of a pre-tokenizer, those that decide where it divides a text"""

Ids = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Tokenizer:
    """What a `tokenizer.json` says: a `gpt2.data.tokenizer.Tokenizer`."""

    identity: str
    """SHA-256 of what decides about the ids of a text and the text of ids: the same for files of
    the same tokenizer that several versions of the library wrote"""
    name: str = field(compare=False)
    content: str = field(compare=False)
    """of the file"""
    vocab_size: int = field(compare=False)
    """the largest id, and 1"""
    end_of_text: int = field(compare=False)
    """id of the token that begins each document"""
    byte_lengths: npt.NDArray[np.unsignedinteger[Any]] = field(compare=False, repr=False)
    """bytes of text by id; 0 for special tokens, and for ids without a token"""
    is_fast: bool = field(compare=False)
    """whether tiktoken encodes"""
    exact_cut: re.Pattern[str] | None = field(compare=False)
    """where a text can be divided; None if it may be divided in a way that is not known"""
    _tokens: Mapping[int, bytes] = field(compare=False, repr=False)
    _encode: Callable[[str], Ids] = field(compare=False, repr=False)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens in it are ordinary text, lone surrogates become U+FFFD."""
        encodable = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = self._encode(encodable).tolist()
        return ids

    def encode_to_numpy(self, text: str) -> Ids:
        """As `encode`, and faster, of a text without lone surrogates."""
        return self._encode(text)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token, or a special token's spelling; nothing for an id without one."""
        return self._tokens.get(token, b"")

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of `tokens`; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    def text_bytes(self, tokens: npt.NDArray[np.integer[Any]]) -> int:
        """UTF-8 bytes of the text of `tokens`; special ones have none."""
        return tokenizer.sum_of_lengths(self.byte_lengths, tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        return parse, (self.content, self.name, self.name)


def load(path: Path) -> Tokenizer:
    """The tokenizer of a file, or of the `tokenizer.json` of a folder, called `folder/file`.

    Raises DataError if there is none, or as `parse` does.
    """
    file = path / FILE if path.is_dir() else path
    try:
        return parse(regular_file.read_bytes(file).decode(), str(file), "/".join(file.parts[-2:]))
    except FileNotFoundError:
        raise DataError(
            f"no {printable(file)}; expected a folder with {FILE}, or such a file"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {printable(file)}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{printable(file)} is no {FILE}: it is not UTF-8") from error


@lru_cache(maxsize=4)  # it takes a second, and several parts of a command read the same file
def parse(content: str, source: str, name: str | None = None) -> Tokenizer:
    """The tokenizer that a file's content describes; its name is `source` without another.

    Raises DataError, naming `source`, if it is damaged, of a kind that does not give every text
    back byte by byte, or without a token for the end of a text.
    """
    shown = printable(source)
    library = _library(content, shown)
    library.no_padding()
    library.no_truncation()
    library.encode_special_tokens = True  # as ordinary text
    described = json.loads(library.to_str())
    model, added = described["model"], described["added_tokens"]
    splits = _splits(described["pre_tokenizer"])
    if loss := _what_is_lost(described, splits):
        raise DataError(f"{shown} has {loss}; {EXPECTED}")
    special = {token["content"]: token["id"] for token in added if token["special"]}
    texts = {token["content"]: token["id"] for token in added if not token["special"]}
    spelled = {
        spelling: number
        for spelling, number in model["vocab"].items()
        if spelling not in special and spelling not in texts
    }
    merged = _bytes_of(spelled, shown)
    ordinary = merged | {number: text.encode() for text, number in texts.items()}
    tokens = ordinary | {number: text.encode() for text, number in special.items()}
    pattern = _known_pattern(splits)
    is_fast = pattern is not None and not texts and follows_ids(spelled, model["merges"])
    lengths = [len(ordinary.get(number, b"")) for number in range(max(tokens) + 1)]
    return Tokenizer(
        identity=_digest(
            {number: token.hex() for number, token in sorted(merged.items())},
            model["merges"],
            bool(model["ignore_merges"]),
            pattern or [{key: split.get(key) for key in SPLIT_FIELDS} for split in splits],
            sorted(special.items()),
            sorted((token["content"], token["id"], token["single_word"]) for token in added),
        ),
        name=name or source,
        content=content,
        vocab_size=len(lengths),
        end_of_text=_end_of_text(special, shown),
        byte_lengths=np.array(lengths, dtype=np.min_scalar_type(max(lengths))),
        is_fast=is_fast,
        exact_cut=EXACT_CUT if pattern is not None and not texts else None,
        _tokens=tokens,
        _encode=_by_tiktoken(pattern, merged) if pattern and is_fast else _by_library(library),
    )


def pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Divides a text by one of the PATTERNS."""
    if PATTERNS[pattern] == tokenizer.PATTERN:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)  # it is built in
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pattern]), behavior="isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


@cache
def byte_letters() -> dict[int, str]:
    """The character of each byte in Hugging Face's files: its own in Latin-1 if that is visible,
    else one from U+0100 on (`bytes_to_unicode` of the published encoder)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(0x100 + number) for number, byte in enumerate(others)
    }


def follows_ids(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> bool:
    """Whether merging by the order of `merges` is merging by the ids of what is formed.

    tiktoken knows no merges: it joins the two neighbours that form the token of the lowest id. It
    differs from merging by rules only where two neighbours form a token that another rule forms.
    There are none if the rules form each token once, in the order of the ids, from earlier ones,
    and make each token from its own bytes: a part of an encoded text, looked at alone, has the
    same encoding at every stage, so the two neighbours would be what the token's bytes become.
    """
    formed = [vocab.get(first + second, -1) for first, second in merges]
    if sorted(formed) != sorted(vocab[token] for token in vocab if len(token) > 1):
        return False
    if any(later <= earlier for earlier, later in itertools.pairwise(formed)):
        return False
    parts = zip(formed, merges, strict=True)
    if any(vocab[part] >= token for token, pair in parts for part in pair if len(part) > 1):
        return False
    model = models.BPE(vocab=dict(vocab), merges=[(first, second) for first, second in merges])
    return all(len(model.tokenize(token)) == 1 for token in vocab)


def _library(content: str, name: str) -> tokenizers.Tokenizer:
    try:
        file = json.loads(content)
        model: Any = file.get("model") if isinstance(file, dict) else None
        is_bpe = isinstance(model, dict) and model.get("type") != "WordPiece"
        if is_bpe and model.get("continuing_subword_prefix"):  # the library may abort the process
            raise ValueError("its model has a continuing_subword_prefix")
        return tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library has no narrower class
        raise DataError(f"{name} is no {FILE} that can be read: {error}; {EXPECTED}") from error


def _splits(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] != "Sequence":
        return [pre_tokenizer]
    return [split for part in pre_tokenizer["pretokenizers"] for split in _splits(part)]


def _what_is_lost(described: dict[str, Any], splits: list[dict[str, Any]]) -> str | None:
    """Why some texts would not come back byte by byte, or None."""
    model = described["model"]
    if model["type"] != "BPE":
        return f"a {model['type']} model"
    if described["normalizer"]:
        return f"a normalizer ({described['normalizer']['type']}), which changes texts"
    for option in ("dropout", "end_of_word_suffix"):
        if model[option]:
            return f"a model with {option}={model[option]!r}"
    if not splits or splits[-1]["type"] != "ByteLevel":
        return "a pre-tokenizer that does not end in ByteLevel"
    if splits[-1]["add_prefix_space"]:
        return "add_prefix_space=true, which changes texts"
    for split in splits[:-1]:
        if split["type"] not in LOSSLESS_SPLITS or split.get("behavior") == "Removed":
            return f"a pre-tokenizer ({split['type']}) that may remove something"
    missing = sum(letter not in model["vocab"] for letter in byte_letters().values())
    if missing:
        return f"no token for {missing} of the 256 bytes"
    for token in described["added_tokens"]:
        if not token["special"] and (token["lstrip"] or token["rstrip"]):
            return f"a token {token['content']!r} that takes the white space beside it"
    return None


def _bytes_of(vocab: Mapping[str, int], name: str) -> dict[int, bytes]:
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    try:
        return {
            number: bytes(byte_of[letter] for letter in token) for token, number in vocab.items()
        }
    except KeyError as error:
        raise DataError(
            f"{name} has a token with {error.args[0]!r}, which stands for no byte; {EXPECTED}"
        ) from error


def _known_pattern(splits: list[dict[str, Any]]) -> str | None:
    """The one of PATTERNS by which a text is divided."""
    if len(splits) == 1 and splits[0]["use_regex"]:
        return tokenizer.PATTERN  # it is built in
    if len(splits) != 2 or splits[0]["type"] != "Split" or splits[1]["use_regex"]:
        return None
    pattern = splits[0]["pattern"].get("Regex")
    is_plain = splits[0]["behavior"] == "Isolated" and not splits[0]["invert"]
    return pattern if is_plain and pattern in PATTERNS.values() else None


def _end_of_text(special: Mapping[str, int], name: str) -> int:
    if END_OF_TEXT in special:
        return special[END_OF_TEXT]
    ends = [end for end in OTHER_ENDS if end in special]
    if len(ends) != 1:
        found = f"{' and '.join(ends)}" if ends else "no token for the end of a text"
        raise DataError(
            f"{name} has {found} among its special tokens; expected {END_OF_TEXT}, or one of "
            f"{', '.join(OTHER_ENDS)}"
        )
    return special[ends[0]]


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _by_tiktoken(pattern: str, tokens: Mapping[int, bytes]) -> Callable[[str], Ids]:
    encoding = tiktoken.Encoding(
        name=FILE,
        pat_str=pattern,
        mergeable_ranks={token: number for number, token in tokens.items()},
        special_tokens={},
    )
    return lambda text: tokenizer.encode_to_numpy(encoding, text)


def _by_library(library: tokenizers.Tokenizer) -> Callable[[str], Ids]:
    return lambda text: np.array(library.encode(text, add_special_tokens=False).ids, np.uint32)
