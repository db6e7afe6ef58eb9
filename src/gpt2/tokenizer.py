"""GPT-2's byte-pair encoding: tiktoken on ranks that ship with the package, no network."""

import base64
import hashlib
from functools import cache
from importlib import resources

import tiktoken

from gpt2.errors import DataError

NAME = "gpt2"
VOCAB_SIZE = 50257
END_OF_TEXT = 50256
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# How text is cut before merging (Radford et al. 2019, section 2.2; the pattern is part of the
# published encoder, as the ranks are).
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@cache
def load() -> tiktoken.Encoding:
    """The encoding, built once per process.

    Raises DataError if the rank table is not the published one.
    """
    table = resources.files("gpt2").joinpath("gpt2.tiktoken").read_bytes()
    digest = hashlib.sha256(table).hexdigest()
    if digest != RANKS_SHA256:
        raise DataError(
            f"the tokeniser's rank table gpt2.tiktoken has SHA-256 {digest[:12]}…, "
            f"needed {RANKS_SHA256[:12]}…; reinstall the package: pip install --force-reinstall ."
        )
    ranks = {}
    for line in table.splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    return tiktoken.Encoding(
        name=NAME,
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": END_OF_TEXT},
        explicit_n_vocab=VOCAB_SIZE,
    )


def encode(text: str) -> list[int]:
    """Token ids of `text`; the text of a special token is encoded as ordinary text."""
    return load().encode_ordinary(text)


def decode(tokens: list[int]) -> str:
    """Text of `tokens`; ids of the padded vocabulary (50257 and above) decode to nothing."""
    return load().decode([token for token in tokens if token < VOCAB_SIZE])
