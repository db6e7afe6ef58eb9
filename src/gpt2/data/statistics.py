"""Statistics of the documents in token shards: lengths, duplicates, most common first lines.

The shards form one stream of tokens, validation first, as `gpt2 data` and llm.c write it: a
document that goes on in the next shard counts once. 24 bytes per document are kept: its length and
a hash each of its tokens and of its first line; as many again are needed to count equal ones.

Two different documents count as duplicates if their 64-bit hashes agree, which happens anywhere
among n documents with a probability of at most n² / 2^65: 3 in a million for 10 million documents,
3 % for a billion.
"""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpt2.base.errors import DataError
from gpt2.data import excerpt, token_stream, tokenizer
from gpt2.data.formats import Tokens
from gpt2.data.manifest import Shard, Split
from gpt2.data.shards import DatasetIndex
from gpt2.data.tokenizer import GPT2_TOKENIZER, Tokenizer

LINE_TOKENS = 24
"""a first line is looked for in, and cut after, so many tokens of a document"""
COMMON_LINES = 10
SAMPLED_TOKENS = 500_000
"""on which a tokenizer is compared with GPT-2's"""
HASH_BYTES = 8
NO_LINE = bytes(HASH_BYTES)
Integers = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Bin:
    """How many documents have `first` to `last` tokens."""

    first: int
    last: int
    documents: int


@dataclass(frozen=True)
class Lengths:
    """The lengths of documents, in tokens without <|endoftext|>; all 0 without documents."""

    documents: int
    empty: int
    shortest: int
    median: int
    mean: float
    p90: int
    p99: int
    longest: int
    block_size: int
    longer_than_block: float
    """share of the tokens that are in documents longer than block_size"""
    histogram: tuple[Bin, ...]


@dataclass(frozen=True)
class CommonLine:
    """A first line, and how many documents have it."""

    line: str
    documents: int


@dataclass(frozen=True)
class Statistics:
    """The numbers of `gpt2 data show --stats`; shares are between 0 and 1."""

    tokens: int
    text_bytes: int
    """of the text in UTF-8"""
    bytes_per_token: float
    lengths: Lengths
    duplicate_documents: float
    """share of the documents that equal an earlier one; empty ones do not count as equal"""
    duplicate_tokens: float
    """share of the tokens in these"""
    first_lines: tuple[CommonLine, ...]
    """the most common first lines that are not blank, of those that occur more than once"""


@dataclass(frozen=True)
class Comparison:
    """How many bytes of a sample a token has, with the tokenizer of the shards and GPT-2's."""

    text_bytes: int
    bytes_per_token: float
    gpt2_bytes_per_token: float


class DocumentScan:
    """Divides a stream of tokens, added chunk by chunk, into documents.

    A document begins at its <|endoftext|>, or at the beginning of the stream. In a stream that
    begins without one, as nanoGPT writes it, <|endoftext|> ends a document: nothing follows the
    last one.
    """

    def __init__(self, encoding: Tokenizer) -> None:
        self.text_bytes = 0
        self.tokens = 0
        self.begins_with_mark = False
        self._encoding = encoding
        self._mark = encoding.end_of_text  # no token equals None
        # Gpt2Tokenizer.decode leaves out ids outside the vocabulary: a fifth of all time.
        self._decode = tokenizer.load().decode if encoding is GPT2_TOKENIZER else encoding.decode
        self._lengths = array("q")
        self._hashes = bytearray()
        self._lines = bytearray()
        self._begin()

    def add(self, tokens: Tokens) -> None:
        """Adds the next tokens, whose ids must be in the vocabulary."""
        self.text_bytes += self._encoding.text_bytes(tokens)
        marks = np.flatnonzero(tokens == self._mark).tolist()
        wide, start = tokens.astype("<u4"), 0  # a document has one hash in shards of all types
        for end in marks:
            self._extend(wide[start:end])
            self._close()
            start = end + 1
        self._extend(wide[start:])
        self.tokens += len(tokens)

    def end(self) -> None:
        """Ends the stream."""
        if self._length or self.begins_with_mark:
            self._close()

    @property
    def lengths(self) -> Integers:
        """Tokens of each document."""
        return np.frombuffer(self._lengths, np.int64)

    @property
    def hashes(self) -> Hashes:
        """A hash of the tokens of each document."""
        return np.frombuffer(self._hashes, np.uint64)

    @property
    def line_hashes(self) -> Hashes:
        """A hash of the first line of each document; 0 if there is none."""
        return np.frombuffer(self._lines, np.uint64)

    def start_of(self, document: int) -> int:
        """Where in the stream the text of a document begins."""
        return int(self.lengths[:document].sum()) + document + self.begins_with_mark

    def _begin(self) -> None:
        self._length = 0
        self._digest = hashlib.blake2b(digest_size=HASH_BYTES)
        self._head: list[int] = []

    def _extend(self, tokens: npt.NDArray[np.uint32]) -> None:
        self._length += len(tokens)
        self._digest.update(tokens.data)
        if (missing := LINE_TOKENS - len(self._head)) > 0:
            self._head += tokens[:missing].tolist()

    def _close(self) -> None:
        """Ends a document, unless it is the nothing before the first <|endoftext|> of a stream."""
        if not self._lengths and not self._length and not self.begins_with_mark:
            self.begins_with_mark = True
            return
        line = first_line(self._decode(self._head)).encode(errors="surrogatepass")
        self._lengths.append(self._length)
        self._hashes += self._digest.digest()
        self._lines += hashlib.blake2b(line, digest_size=HASH_BYTES).digest() if line else NO_LINE
        self._begin()


def measure(
    index: DatasetIndex,
    shards: Sequence[Shard],
    block_size: int,
    progress: Callable[[int], object] = lambda _: None,
) -> Statistics:
    """The statistics of the stream of `shards`.

    Calls `progress` with each number of tokens that it has read. Raises DataError, naming the file,
    if a shard cannot be read, or holds a token id outside the vocabulary.
    """
    scan = DocumentScan(index.tokenizer)
    for shard in shards:
        for tokens in token_stream.chunks(index.storage, shard):
            if (highest := int(tokens.max())) >= index.vocab_size:
                raise DataError(
                    f"{index.storage.full(shard.file)} holds the token id {highest}, outside the "
                    f"vocabulary of {index.vocab_size}"
                )
            scan.add(tokens)
            progress(len(tokens))
    scan.end()
    lengths = scan.lengths
    same_documents, same_tokens = duplicates(scan.hashes, lengths)
    lines = [
        CommonLine(_line_at(index, shards, scan.start_of(document)), count)
        for document, count in most_common(scan.line_hashes, COMMON_LINES)
    ]
    return Statistics(
        tokens=scan.tokens,
        text_bytes=scan.text_bytes,
        bytes_per_token=scan.text_bytes / max(1, scan.tokens),
        lengths=lengths_of(lengths, block_size),
        duplicate_documents=same_documents / max(1, len(lengths)),
        duplicate_tokens=same_tokens / max(1, int(lengths.sum())),
        first_lines=tuple(lines),
    )


def compare_with_gpt2(index: DatasetIndex) -> Comparison:
    """The index's tokenizer beside GPT-2's on the beginning of the training shards."""
    shard = index.of("train")[0]
    tokens = token_stream.read(index.storage, shard, 0, SAMPLED_TOKENS)
    pieces = excerpt.divided(tokens.tolist(), index.tokenizer)
    text_bytes = index.tokenizer.text_bytes(tokens)
    # Both have one <|endoftext|> per document.
    marks = int(np.count_nonzero(tokens == index.tokenizer.end_of_text))
    gpt2 = marks + sum(len(GPT2_TOKENIZER.encode_to_numpy(piece.text)) for piece in pieces)
    return Comparison(text_bytes, text_bytes / max(1, len(tokens)), text_bytes / max(1, gpt2))


def stream_of(index: DatasetIndex, split: Split | None) -> list[Shard]:
    """The shards of a split, or of both, in the order in which a corpus is written to them."""
    splits: tuple[Split, ...] = ("val", "train") if split is None else (split,)
    return [shard for part in splits for shard in index.of(part)]


def first_line(text: str) -> str:
    """The first line that is not blank, without spaces around it."""
    return text.lstrip().partition("\n")[0].rstrip()


def lengths_of(lengths: Integers, block_size: int) -> Lengths:
    """What the lengths of documents are like; each quantile is the length of a document."""
    known = lengths if len(lengths) else np.zeros(1, np.int64)
    found = np.quantile(known, (0, 0.5, 0.9, 0.99, 1), method="inverted_cdf")
    shortest, median, p90, p99, longest = found.astype(int).tolist()
    return Lengths(
        documents=len(lengths),
        empty=int((lengths == 0).sum()),
        shortest=shortest,
        median=median,
        mean=float(known.mean()),
        p90=p90,
        p99=p99,
        longest=longest,
        block_size=block_size,
        longer_than_block=int(lengths[lengths > block_size].sum()) / max(1, int(lengths.sum())),
        histogram=histogram(lengths),
    )


def duplicates(hashes: Hashes, lengths: Integers) -> tuple[int, int]:
    """The documents that equal an earlier one, and their tokens. Empty ones do not count."""
    full = lengths > 0
    _, first = np.unique(hashes[full], return_index=True)
    return int(full.sum()) - len(first), int(lengths.sum() - lengths[full][first].sum())


def most_common(hashes: Hashes, count: int) -> list[tuple[int, int]]:
    """The `count` most common hashes that occur more than once, without 0.

    Each is given by the first document that has it and the number of documents that have it.
    """
    values, documents, counts = np.unique(hashes, return_index=True, return_counts=True)
    repeated = (counts > 1) & (values != 0)
    documents, counts = documents[repeated], counts[repeated]
    order = np.lexsort((documents, -counts))[:count]
    return list(zip(documents[order].tolist(), counts[order].tolist(), strict=True))


def histogram(lengths: Integers) -> tuple[Bin, ...]:
    """The bins from the shortest length to the longest: 0, 1, 2 to 3, 4 to 7, 8 to 15, …"""
    if not len(lengths):
        return ()
    starts = np.concatenate([[0], 2 ** np.arange(62)])
    places = np.searchsorted(starts, lengths, side="right") - 1
    counts = np.bincount(places)
    shown = range(int(places.min()), len(counts))
    return tuple(Bin(int(starts[i]), int(starts[i + 1]) - 1, int(counts[i])) for i in shown)


def _line_at(index: DatasetIndex, shards: Sequence[Shard], position: int) -> str:
    """The first line of the document whose text begins at `position` in the stream of shards."""
    head: list[int] = []
    for shard in shards:
        if position < shard.tokens and len(head) < LINE_TOKENS:
            missing = LINE_TOKENS - len(head)
            head += token_stream.read(index.storage, shard, position, missing).tolist()
        position = max(0, position - shard.tokens)
    pieces = excerpt.divided(head, index.tokenizer)
    return first_line(pieces[0].text)
