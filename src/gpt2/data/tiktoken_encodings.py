"""tiktoken's encodings in Hugging Face's format, in which shards and exported models carry them."""

import logging
from collections.abc import Mapping

import tiktoken
import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from gpt2.base.errors import ConfigError, DataError
from gpt2.base.validation import suggestion
from gpt2.data import tokenizer, tokenizer_files
from gpt2.data.tokenizer_files import Tokenizer

logger = logging.getLogger(__name__)

PREFIX = "tiktoken:"
PATTERNS = {
    "r50k_base": "gpt2",
    "p50k_base": "gpt2",
    "p50k_edit": "gpt2",
    "cl100k_base": "cl100k",
    "o200k_base": "o200k",
    "o200k_harmony": "o200k",
}
"""by encoding, which of `tokenizer_files.PATTERNS` divides a text as its own pattern does"""


def load(name: str) -> Tokenizer:
    """The encoding that tiktoken calls `name`, which it downloads where its cache has none.

    Raises ConfigError for a name that is not known, and DataError if it cannot be downloaded.
    """
    if name not in PATTERNS:
        known = [PREFIX + other for other in PATTERNS]
        way_out = suggestion(PREFIX + name, known) or f"; expected one of {', '.join(known)}"
        raise ConfigError(f"unknown tokenizer {PREFIX}{name}{way_out}")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSError
        logger.debug("cannot load %s", name, exc_info=True)
        raise DataError(
            f"{PREFIX}{name} cannot be downloaded ({_cause(error)}); run it once where there is a "
            "network, with the environment variable TIKTOKEN_CACHE_DIR=FOLDER, and use that "
            "folder here"
        ) from error
    # o200k_harmony has two spellings of one id, of which the first is kept.
    spelled = {number: text for text, number in reversed(encoding._special_tokens.items())}
    special = {text: number for number, text in sorted(spelled.items())}
    built = build(encoding._mergeable_ranks, special, PATTERNS[name])
    found = tokenizer_files.parse(built.to_str(), PREFIX + name)
    if not found.is_fast:
        raise DataError(f"{PREFIX}{name} has tokens that no merges form; use another tokenizer")
    return found


def build(
    ranks: Mapping[bytes, int], special: Mapping[str, int], pattern: str
) -> tokenizers.Tokenizer:
    """The encoding of `ranks` for the `tokenizers` library; a special token in a text becomes one
    there, unless that is switched off."""
    letters = tokenizer_files.byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in ranks.items()} | dict(special)
    merges = [(spell(first), spell(second)) for first, second in tokenizer.merges(ranks)]
    built = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    built.pre_tokenizer = tokenizer_files.pre_tokenizer(pattern)
    built.post_processor = processors.ByteLevel(trim_offsets=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return built


def _cause(error: BaseException) -> str:
    """What the error arose from: requests' own texts are several lines of objects and addresses."""
    while error.__context__ is not None:
        error = error.__context__
    return (isinstance(error, OSError) and error.strerror) or str(error)
