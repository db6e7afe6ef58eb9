"""What `--tokenizer` names: GPT-2's, one of tiktoken's, or a file."""

from pathlib import Path

from gpt2.base.errors import ConfigError
from gpt2.base.text import printable
from gpt2.data import tiktoken_encodings, tokenizer, tokenizer_files
from gpt2.data.tokenizer import GPT2_TOKENIZER, Tokenizer

GPT2_IN_A_FILE = "44fea10777053e6d936eb1c693ac5b765b3c257411489180f8debb9ca04efc41"
"""identity of a `tokenizer.json` with GPT-2's tokens"""


def find(name: str) -> Tokenizer:
    """The tokenizer `gpt2`, `tiktoken:NAME`, or of a folder or `tokenizer.json`.

    One with GPT-2's tokens is GPT-2's, wherever it comes from. Raises ConfigError for what is none
    of these, and DataError as `tokenizer_files.load` and `tiktoken_encodings.load` do.
    """
    encoding = name.removeprefix(tiktoken_encodings.PREFIX)
    if encoding == tokenizer.NAME:
        return GPT2_TOKENIZER
    if encoding != name:
        found = tiktoken_encodings.load(encoding)
    elif Path(name).exists():
        found = tokenizer_files.load(Path(name))
    else:
        raise ConfigError(
            f"no tokenizer {printable(name)}; expected gpt2, {tiktoken_encodings.PREFIX}NAME, a "
            f"folder with {tokenizer_files.FILE}, or such a file"
        )
    return GPT2_TOKENIZER if found.identity == GPT2_IN_A_FILE else found
