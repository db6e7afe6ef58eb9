"""Tokenises documents in several processes and writes them, in their order, as shards.

A preparation that was killed continues when it is started again: `progress.json` lists the finished
shards, and the token of the document at which the next one begins. It is replaced after each shard,
and removed after `manifest.json`, which is written last and marks the folder as complete.
"""

import contextlib
import ctypes
import errno
import hashlib
import itertools
import json
import logging
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
from gpt2.base import atomic_files, folder_lock
from gpt2.base.errors import DataError
from gpt2.base.json_fields import from_json
from gpt2.data import hints, tokenizer
from gpt2.data.corpus import Corpus, Document
from gpt2.data.formats import DTYPE, Tokens
from gpt2.data.remote import Storage
from gpt2.data.shards import MANIFEST, PROGRESS, Manifest, Shard, Split

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 500_000  # per task of a worker: enough to make its overhead negligible
BATCHES_PER_WORKER = 2  # submitted at a time: no worker waits, and memory is bounded
PR_SET_PDEATHSIG = 1  # prctl.h


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the bytes of the shards."""

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
    """Numbers of documents: all, and those that may be a problem."""

    documents: int = 0
    empty: int = 0
    replaced: int = 0
    """with bytes that are not UTF-8 and became U+FFFD"""

    def plus(self, documents: list[Document]) -> "Counts":
        return Counts(
            self.documents + len(documents),
            self.empty + sum(not document.text for document in documents),
            self.replaced + sum(document.replaced for document in documents),
        )


@dataclass(frozen=True)
class Position:
    """The end of a shard: the counts of the documents that end before it, and the number of tokens
    of the next document that the shard holds."""

    counts: Counts = Counts()
    offset: int = 0


@dataclass(frozen=True)
class Batch:
    """Tokens of consecutive documents, each after an <|endoftext|>."""

    documents: list[Document]
    tokens: Tokens
    lengths: npt.NDArray[np.int64]

    def position(self, consumed: int, before: Position) -> Position:
        """The position after `consumed` tokens of the batch, which begins at `before`."""
        ends = np.cumsum(self.lengths)
        whole = int(np.searchsorted(ends, consumed + before.offset, side="right"))
        start = int(ends[whole - 1]) if whole else 0
        counts = before.counts.plus(self.documents[:whole])
        return Position(counts, consumed + before.offset - start)

    def counts_with_cut(self, before: Position, after: Position) -> Counts:
        """The counts at `after`, including the document that is cut there."""
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
    """Writes the shards of `corpus`, then their manifest; a finished folder is not changed.

    The first shard is the validation split. The bytes do not depend on the number of workers, nor
    on how often the preparation was killed and started again. Messages name `command` as the one
    that continues it. With `wait`, waits for another process that prepares the same folder; else
    raises FolderInUse. Raises DataError if the folder holds other shards, the documents cannot be
    read, or the disk is full.
    """
    shard_tokens = shard_tokens or corpus.tokens_per_shard
    default_val_tokens = min(shard_tokens, corpus.val_tokens or shard_tokens)
    recipe = Recipe(
        corpus.name, corpus.source, shard_tokens, val_tokens or default_val_tokens, max_tokens
    )
    progress = _ProgressFile(folder, recipe, command or hints.prepare_command(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists() and not overwrite:  # it may be read-only
            return _finished(folder, recipe)
        with folder_lock.held(folder, "preparation", "--out", wait):
            if overwrite:
                _clear(folder, corpus.name)
            if (folder / MANIFEST).exists():
                return _finished(folder, recipe)
            done, position = progress.begin()
            writer = _ShardWriter(folder, recipe, done)
            tenth = corpus.val_tokens is not None and val_tokens is None
            processes = workers or len(os.sched_getaffinity(0))
            counts = _write(corpus, recipe, writer, progress, position, processes, console)
            if tenth and writer.leaves_too_little():
                progress.record([], Position())  # all shards are written again
                writer.split_again()
            return _finish(folder, recipe, writer, counts)
    except BrokenProcessPool:
        raise DataError(
            "a tokenising process was killed, possibly for lack of memory; type the same command "
            "again to continue, with --workers 1 to use the least memory"
        ) from None
    except OSError as error:
        reason = f"cannot write {folder}: {error.strerror or error}"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            raise DataError(f"{reason}; choose another folder with --out") from error
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise DataError(
            f"{reason} ({free / 1e9:.1f} GB free); finished shards are kept: free disk space and "
            "type the same command again, or choose another folder with --out"
        ) from error


def _write(
    corpus: Corpus,
    recipe: Recipe,
    writer: "_ShardWriter",
    progress: "_ProgressFile",
    position: Position,
    workers: int,
    console: Console | None,
) -> Counts:
    """Writes the shards after `position`; returns the counts of all documents."""
    already = writer.written
    limit = recipe.max_tokens
    with _progress_bar(console) as bar:
        task = bar.add_task(corpus.name, total=corpus.count(), speed="")
        for batch in tokenised_batches(corpus.documents(position.counts.documents), workers):
            tokens = batch.tokens[position.offset :]
            if limit is not None:
                tokens = tokens[: limit - writer.written]
            for consumed in writer.add(tokens):
                progress.record(writer.shards, batch.position(consumed, position))
            before, position = position, batch.position(len(tokens), position)
            rate = (writer.written - already) / (bar.tasks[task].elapsed or 1e-9)
            speed = f"{writer.written / 1e6:.1f} M tokens, {rate / 1e6:.2f} M/s"
            bar.update(task, completed=position.counts.documents, speed=speed)
            if limit is not None and writer.written >= limit:
                return batch.counts_with_cut(before, position)
    return position.counts


def _finish(folder: Path, recipe: Recipe, writer: "_ShardWriter", counts: Counts) -> Manifest:
    writer.close()
    if len(writer.shards) < 2:
        raise DataError(
            f"{recipe.corpus} has {writer.written} tokens, which fit into one shard, the "
            f"validation split; use more text, or --val_tokens {max(2, writer.written // 10)}"
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


class _ProgressFile:
    """`progress.json`: from it, a preparation that was killed continues."""

    def __init__(self, folder: Path, recipe: Recipe, command: str) -> None:
        self._folder = folder
        self._recipe = recipe
        self._command = command

    def begin(self) -> tuple[list[Shard], Position]:
        """The finished shards, and where the next one begins; writes the file if there is none."""
        path = self._folder / PROGRESS
        if not path.exists():
            if others := sorted(self._folder.glob("*.npy")):
                raise DataError(
                    f"{self._folder} holds {others[0].name} of unknown origin; choose another "
                    "folder with --out, or remove old shards of this corpus with --overwrite"
                )
            self.record([], Position())
            return [], Position()
        try:
            values = json.loads(path.read_text())
            done = [from_json(Shard, item, path) for item in values["shards"]]
            position = Position(from_json(Counts, values["counts"], path), values["offset"])
            begun_with = values["recipe"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); start again with --overwrite"
            ) from error
        if done:  # without a finished shard, another recipe contradicts nothing
            _require_same(self._folder, self._recipe, begun_with, "was started")
        else:
            self.record([], Position())
        atomic_files.remove_temporary(
            self._folder, owns=lambda name: name.startswith(self._recipe.corpus)
        )
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
        f"{name}: {other.get(name)} before, {value} now"
        for name, value in now.items()
        if other.get(name) != value
    ]
    if differences:
        raise DataError(
            f"{folder} {state} with other options ({'; '.join(differences)}); use the same "
            "options, choose another folder with --out, or start again with --overwrite"
        )


def _clear(folder: Path, name: str) -> None:
    """Removes the files of this corpus, the manifest first: an incomplete folder never has one."""
    shard = re.compile(rf"{re.escape(name)}_(train|val)_\d{{6}}\.npy(\.tmp)?")
    others = [path.name for path in folder.glob("*.npy") if not shard.fullmatch(path.name)]
    if others:
        raise DataError(
            f"{folder} holds {sorted(others)[0]}, which does not belong to this corpus; nothing "
            "was removed: choose another folder with --out"
        )
    found = [path for path in sorted(folder.iterdir()) if shard.fullmatch(path.name)]
    for path in (folder / MANIFEST, folder / PROGRESS, *found):
        path.unlink(missing_ok=True)


class _ShardWriter:
    """Divides a stream of tokens into shards and writes each one when it is full."""

    def __init__(self, folder: Path, recipe: Recipe, done: list[Shard]) -> None:
        self.shards = list(done)
        self.written = sum(shard.tokens for shard in done)
        self._folder = folder
        self._recipe = recipe
        self._parts: list[Tokens] = []
        self._pending = 0

    def add(self, tokens: Tokens) -> Iterator[int]:
        """Adds `tokens`; for each finished shard, yields how many of them have been written."""
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
        """Whether the validation split would be more than a tenth of all tokens."""
        return 1 < self.written < 10 * self._recipe.val_tokens

    def split_again(self) -> None:
        """Writes all shards again: a tenth of the tokens for validation, the rest for training."""
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
        size, text_bytes = path.stat().st_size, tokenizer.text_bytes(tokens)
        self.shards.append(Shard(path.name, split, len(tokens), size, digest, text_bytes))
        self._parts, self._pending = [], 0


# Tokenisation


def tokenised_batches(documents: Iterator[Document], workers: int) -> Iterator[Batch]:
    """Tokens of batches of documents, in the order of the documents."""
    # Not "fork": the tokeniser's threads can deadlock in a forked process.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)
    )
    waiting: deque[tuple[list[Document], Future[tuple[Tokens, npt.NDArray[np.int64]]]]] = deque()
    try:
        for documents_of_batch in _batches(documents):
            texts = [document.text for document in documents_of_batch]
            with _interrupts_blocked():
                waiting.append((documents_of_batch, pool.submit(encode_texts, texts)))
            if len(waiting) > BATCHES_PER_WORKER * workers:
                first, future = waiting.popleft()
                yield Batch(first, *future.result())
        while waiting:
            first, future = waiting.popleft()
            yield Batch(first, *future.result())
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started in the block do not receive Ctrl+C, not even before they can ignore it."""
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


def encode_texts(texts: list[str]) -> tuple[Tokens, npt.NDArray[np.int64]]:
    """The tokens of all texts, each after an <|endoftext|>, and their numbers of tokens."""
    encoding = tokenizer.load()
    separator = np.array([tokenizer.END_OF_TEXT], dtype=np.uint32)
    parts = []
    for text in texts:
        parts += [separator, _encode_one(encoding, text)]
    lengths = np.array([len(part) for part in parts[1::2]], dtype=np.int64) + 1
    return np.concatenate(parts).astype(DTYPE), lengths


def _encode_one(encoding: tiktoken.Encoding, text: str) -> npt.NDArray[np.uint32]:
    """The tokens of a text.

    The regular expression fails on some texts, such as a million empty lines: these are encoded in
    halves, which are divided at the beginning of a line.
    """
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError:  # tiktoken's, from the regular expression
        middle = text.find("\n", len(text) // 2) + 1 or len(text) // 2
        if not 0 < middle < len(text):
            raise
        halves = (text[:middle], text[middle:])
        return np.concatenate([_encode_one(encoding, half) for half in halves])


def _end_with(parent: int) -> None:
    """Lets a worker end with its parent, also if that is killed, and ignore Ctrl+C."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call above
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _progress_bar(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("documents: {task.completed:,}, {task.fields[speed]}"),
        TimeRemainingColumn(compact=True),  # short enough for 80 columns
        console=console,
    )
