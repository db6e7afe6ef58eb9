"""A tokenizer as plain values, as checkpoints hold it: nothing of it is code."""

import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from gpt2.base.errors import CheckpointError
from gpt2.base.text import counted
from gpt2.data import tokenizer_files
from gpt2.data.tokenizer import GPT2_TOKENIZER, Tokenizer
from gpt2.data.vocabulary import Characters

KEY = "vocabulary"
"""in a checkpoint; those of the first versions, which knew GPT-2's tokens alone, do not have it"""


def to_plain(tokenizer: Tokenizer) -> tuple[str, ...] | dict[str, Any] | None:
    """None for GPT-2's, the texts of nanoGPT's tokens, or the name and the compressed content of a
    `tokenizer.json`."""
    if isinstance(tokenizer, Characters):
        return tokenizer.texts
    if isinstance(tokenizer, tokenizer_files.Tokenizer):
        return {"name": tokenizer.name, tokenizer_files.FILE: _compressed(tokenizer.content)}
    return None


@lru_cache(maxsize=1)  # a run saves the same one again and again
def _compressed(content: str) -> bytes:
    return zlib.compress(content.encode())


def of_checkpoint(state: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer in a checkpoint; None if it does not say, as those of the first versions.

    Raises CheckpointError if it has something else in its place, and DataError as
    `tokenizer_files.parse`.
    """
    match state.get(KEY):
        case {"name": str(name), tokenizer_files.FILE: bytes(content)}:
            try:
                text = zlib.decompress(content).decode()
            except (zlib.error, UnicodeDecodeError) as error:
                raise CheckpointError(f"the checkpoint's {name} is damaged: {error}") from error
            return tokenizer_files.parse(text, f"the checkpoint's {name}", name)
        case [*texts] if texts and all(isinstance(text, str) for text in texts):
            return Characters(tuple(texts))
        case None:
            return GPT2_TOKENIZER if KEY in state else None
        case other:
            raise CheckpointError(f"expected a tokenizer in the checkpoint, got {other!r:.40}")


def is_same(recorded: Tokenizer | None, now: Tokenizer) -> bool:
    """Whether a checkpoint with the `recorded` tokenizer can go on with the tokens of `now`. If it
    does not say, its tokens are GPT-2's or those of a nanoGPT data set."""
    if recorded is None:
        return now is GPT2_TOKENIZER or isinstance(now, Characters)
    return recorded.identity == now.identity


def described(tokenizer: Tokenizer) -> str:
    """What a message calls a tokenizer: two that differ never have the same text."""
    digest = "" if tokenizer is GPT2_TOKENIZER else f", {tokenizer.identity[:8]}…"
    return f"{tokenizer.name} ({counted(tokenizer.vocab_size, 'token')}{digest})"
