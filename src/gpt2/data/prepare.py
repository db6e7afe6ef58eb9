"""Documents to shards: tokenised by many processes, written in the order of the documents.

A preparation that is killed goes on where it was: `progress.json` says which shards are finished
and at which token of which document the next one begins. It is replaced after each shard and
removed when `manifest.json`, written last, says that the folder is whole.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tiktoken
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import gpt2
from gpt2.base import atomic_files
from gpt2.base.errors import DataError
from gpt2.data import shards, tokenizer
from gpt2.data.corpora import Corpus, Document
from gpt2.data.formats import DTYPE
from gpt2.data.remote import Storage
from gpt2.data.shards import MANIFEST, PROGRESS, Manifest, Shard, Split

Tokens = npt.NDArray[np.uint16]
BATCH_CHARACTERS = 500_000  # text that a worker gets at once: large against its hand-over
BATCHES_PER_WORKER = 2  # under way at a time: no worker waits, and memory stays flat
PR_SET_PDEATHSIG = 1  # prctl.h


@dataclass(frozen=True)
class Recipe:
    """What decides every byte of the shards."""

    corpus: str
    source: str
    shard_tokens: int
    val_tokens: int
    """tokens of the first shard"""
    max_tokens: int | None
    vocab_size: int = tokenizer.VOCAB_SIZE
    tokenizer: str = tokenizer.NAME
    version: str = gpt2.__version__


@dataclass(frozen=True)
class Counts:
    """Documents, and those that a person should know of."""

    documents: int = 0
    empty: int = 0
    replaced: int = 0
    """with bytes that are no UTF-8, which became U+FFFD"""

    def plus(self, documents: list[Document]) -> "Counts":
        return Counts(
            self.documents + len(documents),
            self.empty + sum(not document.text for document in documents),
            self.replaced + sum(document.replaced for document in documents),
        )


@dataclass(frozen=True)
class Position:
    """Where a shard ends: the counts of the documents that end before it, and how many tokens of
    the next document it holds."""

    counts: Counts = Counts()
    offset: int = 0


@dataclass(frozen=True)
class Batch:
    """Tokens of consecutive documents, each behind its <|endoftext|>."""

    documents: list[Document]
    tokens: Tokens
    lengths: npt.NDArray[np.int64]

    def position(self, consumed: int, before: Position) -> Position:
        """The position after `consumed` of the tokens; the batch itself begins at `before`."""
        ends = np.cumsum(self.lengths)
        whole = int(np.searchsorted(ends, consumed + before.offset, side="right"))
        start = int(ends[whole - 1]) if whole else 0
        counts = before.counts.plus(self.documents[:whole])
        return Position(counts, consumed + before.offset - start)

    def counts_with_cut(self, before: Position, after: Position) -> Counts:
        """The counts at `after`, with the document that is cut there."""
        whole = after.counts.documents - before.counts.documents
        return after.counts.plus(self.documents[whole : whole + 1] if after.offset else [])


def prepare(
    corpus: Corpus,
    folder: Path,
    *,
    shard_tokens: int | None = None,
    val_tokens: int | None = None,
    max_tokens: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    wait: bool = False,
    command: str | None = None,
    console: Console | None = None,
) -> Manifest:
    """Writes the shards of `corpus` and, last, their manifest; a finished folder stays as it is.

    The first shard is the validation split. Every byte is the same whatever the number of workers
    and however often the preparation was killed and started again; `command` is what a person
    types for that. While another process prepares the folder, `wait` waits for it. Raises DataError
    if the folder holds other shards, the documents cannot be read, or the disk is full.
    """
    shard_tokens = shard_tokens or corpus.tokens_per_shard
    default_val_tokens = min(shard_tokens, corpus.val_tokens or shard_tokens)
    recipe = Recipe(
        corpus.name, corpus.source, shard_tokens, val_tokens or default_val_tokens, max_tokens
    )
    journal = _Journal(folder, recipe, command or shards.command(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder, wait):
            if overwrite:
                _clear(folder, corpus.name)
            if (folder / MANIFEST).exists():
                return _finished(folder, recipe)
            done, position = journal.begin()
            writer = _ShardWriter(folder, recipe, done)
            tenth = corpus.val_tokens is not None and val_tokens is None
            processes = workers or len(os.sched_getaffinity(0))
            counts = _write(corpus, recipe, writer, journal, position, processes, console)
            if tenth and writer.leaves_too_little():
                journal.record([], Position())  # what is on the disk is replaced
                writer.split_anew()
            return _finish(folder, recipe, writer, counts)
    except BrokenProcessPool:
        raise DataError(
            "a tokenising process was killed (out of memory?); the same command goes on, "
            "--workers 1 needs the least"
        ) from None
    except OSError as error:
        reason = f"cannot write {folder}: {error.strerror or error}"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            raise DataError(f"{reason}; choose another folder with --out") from error
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise DataError(
            f"{reason} ({free / 1e9:.1f} GB free); finished shards are kept: make room and type "
            "the same command again, or choose another folder with --out"
        ) from error


@contextlib.contextmanager
def _alone_in(folder: Path, wait: bool) -> Iterator[None]:
    """Two preparations of one folder would take each other's files."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            print(f"Waiting: another process prepares {folder}", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    except BlockingIOError:
        raise DataError(
            f"another process prepares {folder} at this moment; wait until it has ended, or choose "
            "another folder with --out"
        ) from None
    finally:
        os.close(handle)


def _write(
    corpus: Corpus,
    recipe: Recipe,
    writer: "_ShardWriter",
    journal: "_Journal",
    position: Position,
    workers: int,
    console: Console | None,
) -> Counts:
    """Writes all that comes after `position`; returns the counts of all documents."""
    already = writer.written
    limit = recipe.max_tokens
    with _progress(console) as progress:
        task = progress.add_task(corpus.name, total=corpus.count(), speed="")
        for batch in _tokenised(corpus.documents(position.counts.documents), workers):
            tokens = batch.tokens[position.offset :]
            if limit is not None:
                tokens = tokens[: limit - writer.written]
            for consumed in writer.add(tokens):
                journal.record(writer.shards, batch.position(consumed, position))
            before, position = position, batch.position(len(tokens), position)
            rate = (writer.written - already) / (progress.tasks[task].elapsed or 1e-9)
            speed = f"{writer.written / 1e6:.1f} M tokens, {rate / 1e6:.2f} M/s"
            progress.update(task, completed=position.counts.documents, speed=speed)
            if limit is not None and writer.written >= limit:
                return batch.counts_with_cut(before, position)
    return position.counts


def _finish(folder: Path, recipe: Recipe, writer: "_ShardWriter", counts: Counts) -> Manifest:
    writer.close()
    if len(writer.shards) < 2:
        raise DataError(
            f"{recipe.corpus} has {writer.written} tokens, which is one shard, and the first is "
            f"for validation; use more text, or --val_tokens {max(2, writer.written // 10)}"
        )
    manifest = Manifest(
        corpus=recipe.corpus,
        source=recipe.source,
        tokenizer=recipe.tokenizer,
        vocab_size=recipe.vocab_size,
        dtype="uint16",
        tokens_per_shard=recipe.shard_tokens,
        val_tokens=recipe.val_tokens,
        max_tokens=recipe.max_tokens,
        documents=counts.documents,
        empty_documents=counts.empty,
        replaced_documents=counts.replaced,
        version=recipe.version,
        shards=tuple(writer.shards),
    )
    manifest.write(folder)
    (folder / PROGRESS).unlink(missing_ok=True)
    return manifest


class _Journal:
    """What is kept between a kill and the next start."""

    def __init__(self, folder: Path, recipe: Recipe, command: str) -> None:
        self._folder = folder
        self._recipe = recipe
        self._command = command

    def begin(self) -> tuple[list[Shard], Position]:
        """The finished shards and where the next one begins; announces a new preparation."""
        path = self._folder / PROGRESS
        if not path.exists():
            if strangers := sorted(self._folder.glob("*.npy")):
                raise DataError(
                    f"{self._folder} holds {strangers[0].name} of unknown origin; choose another "
                    "folder with --out, or remove what this corpus left there with --overwrite"
                )
            self.record([], Position())
            return [], Position()
        try:
            values = json.loads(path.read_text())
            done = [Shard(**shard) for shard in values["shards"]]
            position = Position(Counts(**values["counts"]), values["offset"])
            begun_with = values["recipe"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); start anew with --overwrite"
            ) from error
        if done:  # else nothing is there that another recipe could contradict
            _require_same(self._folder, self._recipe, begun_with, "was begun")
        else:
            self.record([], Position())
        atomic_files.sweep(self._folder, mine=lambda name: name.startswith(self._recipe.corpus))
        return done, position

    def record(self, done: list[Shard], position: Position) -> None:
        values = {
            "command": self._command,
            "recipe": asdict(self._recipe),
            "counts": asdict(position.counts),
            "offset": position.offset,
            "shards": [asdict(shard) for shard in done],
        }
        atomic_files.write_text(self._folder / PROGRESS, json.dumps(values, indent=1) + "\n")


def _finished(folder: Path, recipe: Recipe) -> Manifest:
    manifest = Manifest.read(Storage(str(folder)))
    made_with = asdict(recipe) | {
        "corpus": manifest.corpus,
        "source": manifest.source,
        "shard_tokens": manifest.tokens_per_shard,
        "val_tokens": manifest.val_tokens,
        "max_tokens": manifest.max_tokens,
    }
    _require_same(folder, recipe, made_with, "is finished")
    return manifest


def _require_same(folder: Path, recipe: Recipe, other: dict[str, object], state: str) -> None:
    now = asdict(recipe)
    differences = [
        f"{name} {other.get(name)}, now {value}"
        for name, value in now.items()
        if other.get(name) != value
    ]
    if differences:
        raise DataError(
            f"{folder} {state} with other options ({'; '.join(differences)}); type the same "
            "options, choose another folder with --out, or start anew with --overwrite"
        )


def _clear(folder: Path, name: str) -> None:
    """Removes this corpus's files; the manifest first, so that no half of it looks whole."""
    shard = re.compile(rf"{re.escape(name)}_(train|val)_\d{{6}}\.npy(\.tmp)?")
    others = [path.name for path in folder.glob("*.npy") if not shard.fullmatch(path.name)]
    if others:
        raise DataError(
            f"{folder} holds {sorted(others)[0]}, which is not of this corpus; nothing was "
            "removed: choose another folder with --out"
        )
    found = [path for path in sorted(folder.iterdir()) if shard.fullmatch(path.name)]
    for path in (folder / MANIFEST, folder / PROGRESS, *found):
        path.unlink(missing_ok=True)


class _ShardWriter:
    """Cuts a stream of tokens into shards and writes each as soon as it is full."""

    def __init__(self, folder: Path, recipe: Recipe, shards: list[Shard]) -> None:
        self.shards = list(shards)
        self.written = sum(shard.tokens for shard in shards)
        self._folder = folder
        self._recipe = recipe
        self._parts: list[Tokens] = []
        self._pending = 0

    def add(self, tokens: Tokens) -> Iterator[int]:
        """Takes `tokens`; yields, each time a shard is finished, how many of them are on disk."""
        consumed = 0
        while consumed < len(tokens):
            size = self._recipe.shard_tokens if self.shards else self._recipe.val_tokens
            part = tokens[consumed : consumed + size - self._pending]
            self._parts.append(part)
            self._pending += len(part)
            self.written += len(part)
            consumed += len(part)
            if self._pending == size:
                self._flush()
                yield consumed

    def close(self) -> None:
        if self._pending:
            self._flush()

    def leaves_too_little(self) -> bool:
        """Whether the validation split would be more than a tenth of all."""
        return 1 < self.written < 10 * self._recipe.val_tokens

    def split_anew(self) -> None:
        """Writes a tenth for validation and the rest for training."""
        begun = [np.load(self._folder / shard.file) for shard in self.shards]
        tokens = np.concatenate([*begun, *self._parts])
        for shard in self.shards:
            (self._folder / shard.file).unlink()
        self.shards = []
        first = max(1, len(tokens) // 10)
        size = self._recipe.shard_tokens
        for part in (tokens[:first], *np.split(tokens[first:], range(size, len(tokens), size))):
            if len(part):
                self._parts = [part]
                self._flush()

    def _flush(self) -> None:
        split: Split = "train" if self.shards else "val"
        path = self._folder / f"{self._recipe.corpus}_{split}_{len(self.shards):06d}.npy"
        tokens = np.concatenate(self._parts)
        with atomic_files.writing(path) as file:
            np.save(file, tokens, allow_pickle=False)
        with path.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        self.shards.append(Shard(path.name, split, len(tokens), path.stat().st_size, digest))
        self._parts, self._pending = [], 0


# Tokenising


def _tokenised(documents: Iterator[Document], workers: int) -> Iterator[Batch]:
    """Tokens of batches of documents, in the order of the documents."""
    context = multiprocessing.get_context("spawn")  # forked tokeniser threads can deadlock
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_die_with, initargs=(os.getpid(),)
    )
    waiting: deque[tuple[list[Document], Future[tuple[Tokens, npt.NDArray[np.int64]]]]] = deque()
    try:
        for documents_of_batch in _batches(documents):
            texts = [document.text for document in documents_of_batch]
            with _deaf_to_interrupts():
                waiting.append((documents_of_batch, pool.submit(_encode, texts)))
            if len(waiting) > BATCHES_PER_WORKER * workers:
                first, future = waiting.popleft()
                yield Batch(first, *future.result())
        while waiting:
            first, future = waiting.popleft()
            yield Batch(first, *future.result())
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that start now never get Ctrl+C, not even before they can ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    for first in documents:
        batch, characters = [first], len(first.text)
        while characters < BATCH_CHARACTERS and (more := list(itertools.islice(documents, 1))):
            batch += more
            characters += len(more[0].text)
        yield batch


def _encode(texts: list[str]) -> tuple[Tokens, npt.NDArray[np.int64]]:
    """Each text behind <|endoftext|>, and the number of tokens of each."""
    encoding = tokenizer.load()
    separator = np.array([tokenizer.END_OF_TEXT], dtype=np.uint32)
    parts = []
    for text in texts:
        parts += [separator, _encode_one(encoding, text)]
    lengths = np.array([len(part) for part in parts[1::2]], dtype=np.int64) + 1
    return np.concatenate(parts).astype(DTYPE), lengths


def _encode_one(encoding: tiktoken.Encoding, text: str) -> npt.NDArray[np.uint32]:
    """The tokens of a text; of its halves, cut where a line begins, if the regular expression
    cannot take it (a million empty lines, say)."""
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError:
        middle = text.find("\n", len(text) // 2) + 1 or len(text) // 2
        if not 0 < middle < len(text):
            raise
        halves = (text[:middle], text[middle:])
        return np.concatenate([_encode_one(encoding, half) for half in halves])


def _die_with(parent: int) -> None:
    """A worker must not outlive a preparation that was killed; Ctrl+C is the owner's to handle."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("documents: {task.completed:,}, {task.fields[speed]}"),
        TimeRemainingColumn(compact=True),  # all within 80 columns
        console=console,
    )
