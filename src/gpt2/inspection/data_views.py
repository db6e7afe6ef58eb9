"""What `gpt2 data show` shows, and how it is printed.

`--json` prints the fields of a view. Texts of a data set are printed without control characters.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from gpt2.base.control_characters import printable, visible
from gpt2.base.text import counted, fitted, table
from gpt2.data import tokenizer
from gpt2.data.excerpt import Excerpt
from gpt2.data.manifest import Shard, Split
from gpt2.data.sampler import Shuffle
from gpt2.data.statistics import LINE_TOKENS, Bin, Statistics

BAR_CELLS = 40
END_OF_TEXT = "--- <|endoftext|> " + 60 * "-"


@dataclass(frozen=True)
class ShardLine:
    """A shard in the table of shards."""

    shard: int
    split: Split
    tokens: int
    bytes: int
    text_bytes: int | None
    bytes_per_token: float | None
    file: str

    @classmethod
    def of(cls, number: int, shard: Shard) -> "ShardLine":
        text_bytes = shard.text_bytes
        ratio = None if text_bytes is None else text_bytes / max(1, shard.tokens)
        return cls(number, shard.split, shard.tokens, shard.bytes, text_bytes, ratio, shard.file)


@dataclass(frozen=True)
class ShardsView:
    """All shards, and the text at the beginning of one."""

    root: str
    tokenizer: str
    vocab_size: int
    shards: tuple[ShardLine, ...]
    excerpt: Excerpt

    def print_to(self, out: Console) -> None:
        has_ratio = any(line.bytes_per_token is not None for line in self.shards)
        columns = ["shard", "split", "tokens", "size", *["bytes/token"] * has_ratio, "file"]
        listing = table(f"Shards in {self.root}", *columns)
        for line in self.shards:
            ratio = "" if line.bytes_per_token is None else f"{line.bytes_per_token:.2f}"
            size = f"{line.bytes / 1e6:,.1f} MB"
            cells = [f"{line.shard}", line.split, f"{line.tokens:,}", size, *[ratio] * has_ratio]
            listing.add_row(*cells, printable(line.file))
        out.print(listing)
        if self.tokenizer != tokenizer.NAME:
            print(f"Tokens of {printable(self.tokenizer)}, {self.vocab_size:,} entries")
        print(f"Shard {self.excerpt.shard} begins with:")
        print_pieces(self.excerpt)


@dataclass(frozen=True)
class RowView:
    """A row and its text."""

    root: str
    block_size: int
    row: int
    excerpt: Excerpt

    def print_to(self, _: Console) -> None:
        print_row(self.excerpt, self.row)


@dataclass(frozen=True)
class RowPlace:
    """Where a row is."""

    shard: int
    row: int


@dataclass(frozen=True)
class StepView:
    """The rows of a step, in their order, and the text of the first ones."""

    root: str
    step: int
    epochs: tuple[int, ...]
    block_size: int
    total_batch_size: int
    batch_ramp: tuple[str, ...]
    seed: int
    shuffle: Shuffle
    rows: tuple[RowPlace, ...]
    excerpts: tuple[Excerpt, ...]

    def print_to(self, out: Console) -> None:
        first, last = self.epochs[0], self.epochs[-1]
        epochs = f"epoch {first}" if first == last else f"epochs {first} to {last}"
        ramp = "".join(f" {text}" for text in ("--batch_ramp", *self.batch_ramp))
        out.print(
            f"After {counted(self.step, 'update')}, a run with --block_size {self.block_size} "
            f"--total_batch_size {self.total_batch_size}{ramp if self.batch_ramp else ''} "
            f"--seed {self.seed} "
            f"--shuffle {self.shuffle} trains on {counted(len(self.rows), 'row')} of "
            f"{epochs}. Its log calls this update step {self.step + 1}.",
            soft_wrap=True,
        )
        listing = table("Rows", "shard", "first row", "last row", "rows")
        for shard, first, last in _runs(self.rows):
            listing.add_row(f"{shard}", f"{first}", f"{last}", f"{last - first + 1:,}")
        out.print(listing)
        for place, excerpt in zip(self.rows, self.excerpts, strict=False):
            print_row(excerpt, place.row)


@dataclass(frozen=True)
class StatisticsView:
    """Statistics of the documents of some splits."""

    root: str
    splits: tuple[Split, ...]
    statistics: Statistics

    def print_to(self, out: Console) -> None:
        found = self.statistics
        listing = table(f"Statistics of {self.root} ({' and '.join(self.splits)})", "what", "")
        for what, value in _numbers(found):
            listing.add_row(what, value)
        out.print(listing)
        if bins := found.lengths.histogram:
            out.print(_histogram(bins, "#" if out.options.ascii_only else "█"))
        if found.first_lines:
            columns = ("documents", "line")
            rows = [(f"{item.documents:,}", item.line) for item in found.first_lines]
            title = f"Most common first lines, up to {LINE_TOKENS} tokens of each"
            out.print(fitted(title, columns, rows, out.width, "line"))


View = ShardsView | RowView | StepView | StatisticsView


def print_row(excerpt: Excerpt, row: int) -> None:
    """Prints the text of a row under a title."""
    print(f"=== row {row} of shard {excerpt.shard}, {printable(excerpt.file)}")
    print_pieces(excerpt)


def print_pieces(excerpt: Excerpt) -> None:
    """Prints a text, with a line wherever a document begins."""
    for piece in excerpt.pieces:
        if piece.is_beginning:
            print(END_OF_TEXT)
        print(visible(piece.text).removesuffix("\n"))


def _runs(rows: tuple[RowPlace, ...]) -> Iterator[tuple[int, int, int]]:
    """(shard, first row, last row) of each run of rows that follow each other in a shard."""
    numbered = enumerate(rows)
    for _, run in itertools.groupby(numbered, lambda item: (item[1].shard, item[1].row - item[0])):
        places = [place for _, place in run]
        yield places[0].shard, places[0].row, places[-1].row


def _numbers(found: Statistics) -> Iterator[tuple[str, str]]:
    lengths = found.lengths
    yield "documents", f"{lengths.documents:,}"
    yield "empty documents", f"{lengths.empty:,}"
    yield "tokens", f"{found.tokens:,}"
    yield "bytes of text", f"{found.text_bytes:,}"
    yield "bytes per token", f"{found.bytes_per_token:.3f}"
    yield "shortest document", counted(lengths.shortest, "token")
    yield "median", counted(lengths.median, "token")
    yield "mean", f"{lengths.mean:,.1f} tokens"
    yield "90 % have at most", counted(lengths.p90, "token")
    yield "99 % have at most", counted(lengths.p99, "token")
    yield "longest document", counted(lengths.longest, "token")
    yield f"longer than {lengths.block_size:,} tokens", f"{lengths.longer_than_block:.1%} of tokens"
    same = f"{found.duplicate_documents:.2%} of documents, {found.duplicate_tokens:.2%} of tokens"
    yield "equal to an earlier document", same


def _histogram(bins: tuple[Bin, ...], cell: str) -> Table:
    """The bins as bars; a bar of at least one cell for a bin that is not empty."""
    listing = table("Lengths of documents", "tokens", "documents")
    listing.add_column("")
    most = max(item.documents for item in bins)
    for item in bins:
        last = f" to {item.last:,}" if item.last > item.first else ""
        cells = -(-item.documents * BAR_CELLS // most)
        listing.add_row(f"{item.first:,}{last}", f"{item.documents:,}", cell * cells)
    return listing
