"""A small tokenizer that is not GPT-2's, and shards of its tokens."""

from dataclasses import replace
from pathlib import Path

import small_tokenizers
from gpt2.data import prepare, tokenizer_files
from gpt2.data.tokenizer_files import Tokenizer
from support import SMALL_CORPUS

NAME = "tok/tokenizer.json"
VOCAB_SIZE = 500
ROWS = 512
"""of a model's embedding"""


def trained(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    return tokenizer_files.parse(small_tokenizers.trained("cl100k", vocab_size), NAME)


def prepared(folder: Path, tokenizer: Tokenizer | None = None, corpus: str = "own") -> Path:
    """The folder, with shards of each split."""
    whole = replace(SMALL_CORPUS, name=corpus)
    prepare.prepare(whole, folder, tokenizer=tokenizer or trained(), workers=1)
    return folder
