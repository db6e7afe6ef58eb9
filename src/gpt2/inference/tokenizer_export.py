"""Tokenizers in the folders of Hugging Face's format, as `transformers` reads them."""

import contextlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from gpt2.base.errors import CheckpointError, DataError
from gpt2.data import tiktoken_encodings, tokenizer, tokenizer_choice, tokenizer_files
from gpt2.data.tokenizer import GPT2_TOKENIZER, Tokenizer

END_OF_TEXT = "<|endoftext|>"
CONFIG = "tokenizer_config.json"


@cache
def build() -> tokenizers.Tokenizer:
    """GPT-2's tokenizer for the `tokenizers` library, built once per process: the same ids as
    `gpt2.data.tokenizer`, but <|endoftext|> in a text becomes the special token."""
    special = {END_OF_TEXT: tokenizer.END_OF_TEXT}
    return tiktoken_encodings.build(tokenizer.ranks(), special, "gpt2")


def write(folder: Path, exported: Tokenizer, context: int) -> None:
    """Writes the files from which `AutoTokenizer` gives the ids of `exported`, for a model with a
    context of `context` tokens.

    Raises CheckpointError for the tokens of a nanoGPT data set, for which the format has no place,
    and OSError if a file cannot be written.
    """
    config: dict[str, Any] = {
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,  # so that decoding returns the text
    }
    if exported is GPT2_TOKENIZER:
        built = build()
        with _errors_of_disk():
            built.model.save(str(folder))  # vocab.json and merges.txt, for older readers
        ends = {f"{kind}_token": END_OF_TEXT for kind in ("bos", "eos", "unk")}
        config |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **ends}
    elif isinstance(exported, tokenizer_files.Tokenizer):
        built = _with_nothing_added(exported)
        end = exported.token_bytes(exported.end_of_text).decode()
        ends = {f"{kind}_token": end for kind in ("bos", "eos")}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", **ends}
    else:
        raise CheckpointError(f"cannot export the tokens of {exported.name}")
    with _errors_of_disk():
        built.save(str(folder / tokenizer_files.FILE))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


@contextlib.contextmanager
def _errors_of_disk() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library, which is in Rust, raises no other kind
        raise OSError(str(error)) from error


def read(folder: Path) -> Tokenizer:
    """The tokenizer in a folder; GPT-2's if there is none.

    Raises CheckpointError if it cannot be read.
    """
    if not (folder / tokenizer_files.FILE).exists():
        return GPT2_TOKENIZER
    try:
        return tokenizer_choice.of_file(folder)
    except DataError as error:
        raise CheckpointError(str(error)) from error


def _with_nothing_added(exported: tokenizer_files.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer for the library, so that it adds nothing to a text and cuts nothing off, which
    the file may ask for: the model was trained on the ids of the text alone."""
    built = tokenizers.Tokenizer.from_str(exported.content)
    built.no_padding()
    built.no_truncation()
    built.post_processor = processors.ByteLevel(trim_offsets=False)
    return built
