"""Learns a byte-level byte-pair encoding (Sennrich et al. 2016) with the `tokenizers` library.

The same texts and options give the same bytes of `tokenizer.json`, whatever the number of threads:
pieces of text are counted in any order, but the alphabet is sorted, and of pairs that are equally
frequent the one with the lowest ids is merged first.
"""

import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from gpt2.base import atomic_files
from gpt2.base.control_characters import printable
from gpt2.base.errors import ConfigError, DataError
from gpt2.base.validation import require
from gpt2.data import bad_lines, tokenisation, tokenizer, tokenizer_files
from gpt2.data.corpus import BadLines, Block, Corpus, Place
from gpt2.data.tokenizer import GPT2_TOKENIZER, Tokenizer
from gpt2.data.tokenizer_files import END_OF_TEXT, EXACT_CUT, FILE, Ids

logger = logging.getLogger(__name__)

BYTES = 256
MOST_BYTES = 2**31 - 1
"""of text: the library counts a pair of tokens in 32 bits"""
USUAL_MOST_BYTES = 2_000_000_000
PIECE_CHARACTERS = 2_000
"""of a text that are counted at a time, at least"""
HELD_OUT_EVERY = 100
"""pieces of text, of which the last one is kept apart for the report"""
MOST_HELD_OUT = 10_000_000
"""characters that are kept apart"""
LEAST_FREQUENCY = 2
"""of a pair that is merged"""
NAMED_BAD_LINES = 10
SECONDS_TO_STOP = 5.0
CONFIG_FILE = "tokenizer_config.json"
OTHER_FILES = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "added_tokens.json",
    "special_tokens_map.json",
)
"""of other tokenizers, which `transformers` would read with ours"""


@dataclass(frozen=True)
class Recipe:
    """What is learned."""

    vocab_size: int
    """entries, with the 256 bytes and the special tokens"""
    pattern: str = "gpt2"
    """one of PATTERNS"""
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)
    """have the last ids; no text becomes one of them"""

    def __post_init__(self) -> None:
        least = BYTES + len(self.special_tokens)
        require(
            self.vocab_size >= least,
            f"vocab_size={self.vocab_size} is too small; expected {least} or more: one for each "
            "byte and special token",
        )
        require(len({*self.special_tokens}) == len(self.special_tokens), "duplicate special token")
        division = tokenizer_files.pre_tokenizer(self.pattern)
        for token in self.special_tokens:
            # A text never becomes a token that the pattern would divide.
            if not token.isascii() or len(division.pre_tokenize_str(token)) < 2:
                raise ConfigError(
                    f"special token {token!r} could also be learned from a text; expected ASCII "
                    "characters of several kinds, such as <|pad|>"
                )


class TrainingTexts:
    """The texts of blocks, in pieces to learn from. Iterating reads them, once."""

    def __init__(
        self,
        blocks: Iterator[Block],
        *,
        max_bytes: int = USUAL_MOST_BYTES,
        max_bad_lines: float = bad_lines.MAX_SHARE,
        on_read: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Reads the texts up to `max_bytes` of UTF-8, about. `on_read` receives how much of the
        files is read."""
        self.documents = self.bad_lines = self.text_bytes = self.pieces = 0
        self.is_cut = False
        """whether the files have more text than `max_bytes`"""
        self.held_out: list[str] = []
        self._blocks = blocks
        self._max_bytes = max_bytes
        self._max_bad_lines = max_bad_lines
        self._on_read = on_read
        self._held_out_characters = 0
        self._first_bad_line = ""
        self._is_stopped = False

    def __iter__(self) -> Iterator[str]:
        """Raises DataError if the texts cannot be read, or too many lines; InterruptedError after
        `stop`."""
        for piece in self._read():
            if self._is_stopped:
                raise InterruptedError
            if self.text_bytes >= self._max_bytes:
                self.is_cut = True
                break
            self.text_bytes += len(piece.encode())
            self.pieces += 1
            if not self.pieces % HELD_OUT_EVERY and self._held_out_characters < MOST_HELD_OUT:
                self.held_out.append(piece)
                self._held_out_characters += len(piece)
            else:
                yield piece
        bad_lines.require_few(*self._readable(), self._max_bad_lines)

    def stop(self) -> None:
        """Lets another thread read no more."""
        self._is_stopped = True

    def _read(self) -> Iterator[str]:
        for block in self._blocks:
            for item in block.content.documents():
                if isinstance(item, BadLines):
                    self._leave_out(item)
                    continue
                self.documents += not item.continues
                text = tokenisation.without_surrogates(item).text
                if text:
                    yield from tokenisation.pieces(text, EXACT_CUT, PIECE_CHARACTERS)
            bad_lines.require_few_so_far(*self._readable(), self._max_bad_lines)
            self._on_read(block.done)

    def _leave_out(self, lines: BadLines) -> None:
        self._first_bad_line = self._first_bad_line or lines.reason
        if self.bad_lines < NAMED_BAD_LINES:
            logger.warning("%s: left out", lines.reason)
        self.bad_lines += lines.count

    def _readable(self) -> tuple[int, int, str]:
        return self.bad_lines, self.documents, self._first_bad_line


def train(texts: TrainingTexts, recipe: Recipe) -> str:
    """The content of `tokenizer.json`.

    Raises DataError if the texts give fewer entries than are wanted, or as they do.
    """
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = tokenizer_files.pre_tokenizer(recipe.pattern)
    trained.post_processor = processors.ByteLevel(trim_offsets=False)
    trained.decoder = decoders.ByteLevel()
    # The library would let merges form special tokens, which it is therefore given afterwards.
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size - len(recipe.special_tokens),
        min_frequency=LEAST_FREQUENCY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _interruptible(lambda: trained.train_from_iterator(iter(texts), trainer), texts)
    trained.add_special_tokens(
        [
            tokenizers.AddedToken(token, special=True, normalized=False)
            for token in recipe.special_tokens
        ]
    )
    entries = trained.get_vocab_size()
    if entries < recipe.vocab_size:
        raise DataError(
            f"{texts.text_bytes:,} bytes of text give {entries:,} entries, expected "
            f"{recipe.vocab_size:,}; use more text, or --vocab_size {entries}"
        )
    return trained.to_str(pretty=True)


def tokenizer_of(corpus: Corpus) -> Tokenizer:
    """GPT-2's tokenizer, or the one that is learned from the corpus, the same each time.

    Raises DataError if the corpus cannot be read.
    """
    if corpus.vocab_size is None:
        return GPT2_TOKENIZER
    logger.info("Learning a tokenizer of %s entries from %s", f"{corpus.vocab_size:,}", corpus.name)
    texts = TrainingTexts(corpus.blocks(Place(), EXACT_CUT))
    return tokenizer_files.parse(train(texts, Recipe(corpus.vocab_size)), corpus.name)


def _interruptible(learn: Callable[[], object], texts: TrainingTexts) -> None:
    """Calls `learn` in a thread: the library does not notice Ctrl+C, a waiting main thread does.

    Merging cannot be stopped; it ends with the process.
    """
    learned = Future[None]()

    def run() -> None:
        try:
            learn()
        except BaseException as error:  # is raised by the thread that waits
            learned.set_exception(error)
        else:
            learned.set_result(None)

    thread = threading.Thread(target=run, name="tokenizer training", daemon=True)
    try:
        thread.start()
        learned.result()
    except KeyboardInterrupt:
        texts.stop()
        if thread.is_alive():
            thread.join(SECONDS_TO_STOP)
        raise


# The folder


def require_free(folder: Path, overwrite: bool) -> None:
    """Raises DataError if a tokenizer is in `folder`, and it is not to be replaced."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{printable(folder)} is no folder; choose another one with --out")
    for name in OTHER_FILES:
        if (folder / name).exists():
            raise DataError(
                f"{printable(folder)} holds {name} of another tokenizer; choose another folder "
                "with --out"
            )
    for name in (FILE, CONFIG_FILE):
        if (folder / name).exists() and not overwrite:
            raise DataError(
                f"{printable(folder / name)} exists; choose another folder with --out, or replace "
                "it with --overwrite"
            )


def write(folder: Path, content: str) -> None:
    """Writes `tokenizer.json`, and beside it what `transformers` needs for its AutoTokenizer.

    Other files in the folder stay. Raises DataError if they cannot be written.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,  # so that decoding returns the text
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_files.write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        atomic_files.write_text(folder / FILE, content)
    except OSError as error:
        raise DataError(
            f"cannot write {printable(folder)}: {error.strerror or error}; choose another folder "
            "with --out"
        ) from error


# The report


@dataclass(frozen=True)
class Efficiency:
    """How a tokenizer encodes some texts."""

    tokens: int
    bytes_per_token: float
    tokens_used: int
    """different ones"""
    vocab_size: int
    single_byte_share: float
    """share of the bytes that are tokens by themselves"""


def efficiency(
    texts: Sequence[str],
    encode: Callable[[str], Ids],
    byte_lengths: npt.NDArray[np.unsignedinteger],
    vocab_size: int,
) -> Efficiency | None:
    """How `encode` encodes the texts; None without text."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for text in texts:
        counts += np.bincount(encode(text), minlength=vocab_size)
    lengths = byte_lengths[:vocab_size].astype(np.int64)
    text_bytes, tokens = int(counts @ lengths), int(counts.sum())
    if not text_bytes:
        return None
    return Efficiency(
        tokens,
        text_bytes / tokens,
        int(np.count_nonzero(counts)),
        vocab_size,
        int(counts[lengths == 1].sum()) / text_bytes,
    )


def efficiencies(content: str, texts: Sequence[str]) -> dict[str, Efficiency | None]:
    """Of the tokenizer in `content`, and of GPT-2's, which has one for each text."""
    trained = tokenizer_files.parse(content, FILE)
    return {
        "trained": efficiency(
            texts, trained.encode_to_numpy, trained.byte_lengths, trained.vocab_size
        ),
        "gpt2": efficiency(
            texts,
            lambda text: tokenizer.encode_to_numpy(tokenizer.load(), text),
            tokenizer.byte_lengths(),
            tokenizer.VOCAB_SIZE,
        ),
    }
