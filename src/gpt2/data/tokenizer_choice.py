"""What `--tokenizer` names: GPT-2's, one of tiktoken's, or a file."""

from pathlib import Path

from gpt2.base.control_characters import printable
from gpt2.base.errors import ConfigError
from gpt2.data import tiktoken_encodings, tokenizer, tokenizer_files
from gpt2.data.tokenizer import GPT2_TOKENIZER, Tokenizer

GPT2_IN_A_FILE = "44fea10777053e6d936eb1c693ac5b765b3c257411489180f8debb9ca04efc41"
"""identity of a `tokenizer.json` with GPT-2's tokens"""


def find(name: str) -> Tokenizer:
    """The tokenizer `gpt2`, `tiktoken:NAME`, or of a folder or `tokenizer.json`.

    One with GPT-2's tokens is GPT-2's, wherever it comes from. Raises ConfigError for what is none
    of these, and DataError as `of_file` and `tiktoken_encodings.load` do.
    """
    encoding = name.removeprefix(tiktoken_encodings.PREFIX)
    if encoding == tokenizer.NAME:
        return GPT2_TOKENIZER
    if encoding != name:
        return _recognised(tiktoken_encodings.load(encoding))
    if Path(name).exists():
        return of_file(Path(name))
    raise ConfigError(
        f"no tokenizer {printable(name)}; expected gpt2, {tiktoken_encodings.PREFIX}NAME, a "
        f"folder with {tokenizer_files.FILE}, or such a file"
    )


def of_file(path: Path) -> Tokenizer:
    """As `tokenizer_files.load`; GPT-2's if the file has its tokens."""
    return _recognised(tokenizer_files.load(path))


def _recognised(found: tokenizer_files.Tokenizer) -> Tokenizer:
    return GPT2_TOKENIZER if found.identity == GPT2_IN_A_FILE else found
