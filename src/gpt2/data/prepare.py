"""Documents to shards: tokenised by many processes, written in the order of the documents."""

import hashlib
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

import gpt2
from gpt2 import atomic, tokenizer
from gpt2.data.corpora import Corpus, Document
from gpt2.data.shards import DTYPE, MANIFEST, Manifest, Shard, Split
from gpt2.errors import DataError

Tokens = npt.NDArray[np.uint16]
BATCH_CHARACTERS = 500_000  # text that a worker gets at once: large against its hand-over


def prepare(
    corpus: Corpus,
    folder: Path,
    *,
    tokens_per_shard: int | None = None,
    max_tokens: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Writes the shards of `corpus` and, last, their manifest; a finished folder stays as it is.

    The first shard is the validation split. Shards do not depend on the number of workers. Raises
    DataError if the documents cannot be read or the folder cannot be written.
    """
    if (folder / MANIFEST).exists() and not overwrite:
        return Manifest.read(folder)
    size = tokens_per_shard or corpus.tokens_per_shard
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        for left_over in folder.glob(f"{corpus.name}_*.npy*"):
            left_over.unlink()
        return _write(corpus, folder, size, max_tokens, workers or os.cpu_count() or 1, console)
    except OSError as error:
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise DataError(
            f"cannot write {folder}: {error.strerror or error} ({free / 1e9:.1f} GB free); make "
            "room or choose another folder with --out"
        ) from error


def _write(
    corpus: Corpus,
    folder: Path,
    tokens_per_shard: int,
    max_tokens: int | None,
    workers: int,
    console: Console | None,
) -> Manifest:
    writer = _ShardWriter(folder, corpus.name, tokens_per_shard)
    documents = replaced = 0
    with _progress(console) as progress:
        task = progress.add_task(corpus.name, total=corpus.count(), speed="")
        for tokens, counts in _tokenised(corpus.documents(), workers):
            if max_tokens is not None:
                tokens = tokens[: max_tokens - writer.written]
            writer.add(tokens)
            documents += counts[0]
            replaced += counts[1]
            elapsed_s = progress.tasks[task].elapsed or 1e-9
            speed = (
                f"{writer.written / 1e6:.1f} M tokens, {writer.written / elapsed_s / 1e6:.2f} M/s"
            )
            progress.update(task, completed=documents, speed=speed)
            if max_tokens is not None and writer.written >= max_tokens:
                break
    shards = writer.close()
    if len(shards) < 2:
        raise DataError(
            f"{corpus.name} has {writer.written} tokens, which is one shard, and the first is for "
            f"validation; use --shard_tokens {max(2, writer.written // 10)} or less"
        )
    manifest = Manifest(
        corpus=corpus.name,
        source=corpus.source,
        tokenizer=tokenizer.NAME,
        vocab_size=tokenizer.VOCAB_SIZE,
        dtype="uint16",
        tokens_per_shard=tokens_per_shard,
        documents=documents,
        replaced_documents=replaced,
        version=gpt2.__version__,
        shards=tuple(shards),
    )
    manifest.write(folder)
    return manifest


class _ShardWriter:
    """Cuts a stream of tokens into shards of equal size and writes each as soon as it is full."""

    def __init__(self, folder: Path, name: str, tokens_per_shard: int) -> None:
        self.written = 0
        self._folder = folder
        self._name = name
        self._size = tokens_per_shard
        self._parts: list[Tokens] = []
        self._pending = 0
        self._shards: list[Shard] = []

    def add(self, tokens: Tokens) -> None:
        self.written += len(tokens)
        while len(tokens):
            part = tokens[: self._size - self._pending]
            self._parts.append(part)
            self._pending += len(part)
            tokens = tokens[len(part) :]
            if self._pending == self._size:
                self._flush()

    def close(self) -> list[Shard]:
        if self._pending > 1:  # a single token has no target: it makes no row
            self._flush()
        return self._shards

    def _flush(self) -> None:
        split: Split = "train" if self._shards else "val"
        path = self._folder / f"{self._name}_{split}_{len(self._shards):06d}.npy"
        tokens = np.concatenate(self._parts).astype(DTYPE, copy=False)
        with atomic.writing(path) as file:
            np.save(file, tokens, allow_pickle=False)
        with path.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        self._shards.append(Shard(path.name, split, len(tokens), digest))
        self._parts, self._pending = [], 0


def _tokenised(
    documents: Iterator[Document], workers: int
) -> Iterator[tuple[Tokens, tuple[int, int]]]:
    """Tokens of batches of documents, in order, with (documents, replaced documents) of each.

    A few batches per worker are under way at a time, so that memory stays flat for any corpus.
    """
    context = multiprocessing.get_context("spawn")  # forked tokeniser threads can deadlock
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting: deque[tuple[Future[Tokens], tuple[int, int]]] = deque()
        for batch in _batches(documents):
            counts = (len(batch), sum(document.replaced for document in batch))
            waiting.append((pool.submit(_encode, [document.text for document in batch]), counts))
            if len(waiting) > 2 * workers:
                future, counts = waiting.popleft()
                yield future.result(), counts
        for future, counts in waiting:
            yield future.result(), counts


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(texts: list[str]) -> Tokens:
    """Each text preceded by <|endoftext|>."""
    encoding = tokenizer.load()
    parts = []
    for text in texts:
        parts.append(np.array([tokenizer.END_OF_TEXT], dtype=DTYPE))
        parts.append(np.array(encoding.encode_ordinary(text), dtype=DTYPE))
    return np.concatenate(parts)


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.completed} documents, {task.fields[speed]}"),
        TimeRemainingColumn(compact=True),  # all within 80 columns
        console=console,
    )
