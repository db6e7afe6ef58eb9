"""Tokenises documents in several processes and writes them, in their order, as shards.

A preparation that was killed continues when it is started again: `progress.json` lists the finished
shards, and the token of the document at which the next one begins. It is replaced after each shard,
and removed after `manifest.json`, which is written last and marks the folder as complete.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import gpt2
from gpt2.base import atomic_files, folder_lock, json_fields, regular_file
from gpt2.base.errors import DataError
from gpt2.base.text import counted
from gpt2.data import bad_lines, formats, hints, shards, tokenisation
from gpt2.data.corpus import Corpus, Place
from gpt2.data.formats import Tokens
from gpt2.data.manifest import MANIFEST, PROGRESS, Manifest, Shard, Split
from gpt2.data.remote import Storage
from gpt2.data.tokenisation import Encoded
from gpt2.data.tokenizer import GPT2_TOKENIZER, Tokenizer
from gpt2.data.tokenizer_copy import TokenizerCopy

logger = logging.getLogger(__name__)

NAMED_BAD_LINES = 10


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the bytes of the shards."""

    corpus: str
    source: str
    shard_tokens: int
    val_tokens: int
    """tokens of the first shard"""
    max_tokens: int | None
    vocab_size: int
    tokenizer: str
    tokenizer_digest: str | None
    """None for GPT-2's"""
    version: str = gpt2.__version__


@dataclass(frozen=True)
class Counts:
    """Numbers of documents: all, and those that may be a problem."""

    documents: int = 0
    empty: int = 0
    replaced: int = 0
    """with something that cannot be decoded and became U+FFFD"""
    bad_lines: int = 0
    """lines that cannot be read and were left out; they are no documents"""
    first_bad_lines: tuple[str, ...] = ()

    def plus(self, encoded: Encoded, tokens: int) -> "Counts":
        """The counts with the documents that begin in the first `tokens` of `encoded`."""
        reasons = (*self.first_bad_lines, *(item.reason for item in encoded.bad_lines))
        return Counts(
            self.documents + int(np.searchsorted(encoded.documents, tokens)),
            self.empty + int(np.searchsorted(encoded.empty, tokens)),
            self.replaced + int(np.searchsorted(encoded.replaced, tokens)),
            self.bad_lines + sum(item.count for item in encoded.bad_lines),
            reasons[:NAMED_BAD_LINES],
        )

    def readable(self) -> tuple[int, int, str]:
        """What `bad_lines.require_few` judges: bad lines, documents, and the first bad line."""
        return self.bad_lines, self.documents, next(iter(self.first_bad_lines), "")


@dataclass(frozen=True)
class Position:
    """The end of a shard: in which block of the corpus it is, after how many tokens of that, and
    the counts of what is before the block."""

    place: Place = Place()
    tokens: int = 0
    counts: Counts = Counts()


def prepare(
    corpus: Corpus,
    folder: Path,
    *,
    tokenizer: Tokenizer = GPT2_TOKENIZER,
    shard_tokens: int | None = None,
    val_tokens: int | None = None,
    max_tokens: int | None = None,
    max_bad_lines: float = bad_lines.MAX_SHARE,
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
    read, more than the share `max_bad_lines` of the lines cannot be read, or the disk is full.
    """
    recipe = _recipe(corpus, tokenizer, shard_tokens, val_tokens, max_tokens)
    progress = _ProgressFile(folder, recipe, command or hints.prepare_command(folder))
    with _errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists() and not overwrite:  # it may be read-only
            return _finished(folder, recipe)
        with folder_lock.held(folder, "preparation", "--out", wait):
            if (folder / MANIFEST).exists() and not overwrite:
                return _finished(folder, recipe)
            copy = TokenizerCopy(folder, tokenizer)
            if overwrite:
                _clear(folder, corpus.name, copy)
            done, position = progress.begin()
            copy.write()
            tenth = corpus.val_tokens is not None and val_tokens is None
            processes = workers or len(os.sched_getaffinity(0))
            blocks = corpus.blocks(position.place, tokenizer.exact_cut)
            found = tokenisation.encoded_blocks(blocks, tokenizer, processes)
            with _ShardWriter(folder, recipe, done, tokenizer) as writer:
                counts = _write(
                    corpus, recipe, found, writer, progress, position, max_bad_lines, console
                )
                bad_lines.require_few(*counts.readable(), max_bad_lines)
                if tenth and writer.leaves_too_little():
                    progress.record([], Position())  # all shards are written again
                    writer.split_again()
                return _finish(folder, recipe, writer, counts)


def _recipe(
    corpus: Corpus,
    tokenizer: Tokenizer,
    shard_tokens: int | None,
    val_tokens: int | None,
    max_tokens: int | None,
) -> Recipe:
    shard_tokens = shard_tokens or corpus.tokens_per_shard
    default_val_tokens = min(shard_tokens, corpus.val_tokens or shard_tokens)
    return Recipe(
        corpus.name,
        corpus.source,
        shard_tokens,
        val_tokens or default_val_tokens,
        max_tokens,
        tokenizer.vocab_size,
        tokenizer.name,
        tokenizer_digest=None if tokenizer is GPT2_TOKENIZER else tokenizer.identity,
    )


@contextlib.contextmanager
def _errors(folder: Path) -> Iterator[None]:
    """Turns the errors of the system into what the user can do."""
    try:
        yield
    except BrokenProcessPool:
        raise DataError(
            "a tokenising process has died, possibly for lack of memory; type the same command "
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
    found: Generator[Encoded],
    writer: "_ShardWriter",
    progress: "_ProgressFile",
    position: Position,
    max_bad_lines: float,
    console: Console | None,
) -> Counts:
    """Writes the shards after `position`; returns the counts of all documents."""
    already, limit = writer.written, recipe.max_tokens
    counts, skipped = position.counts, position.tokens  # of the first blocks
    with _progress_bar(console) as bar, contextlib.closing(found) as encoded_blocks:
        task = bar.add_task(corpus.name, total=corpus.size(), documents=counts.documents, speed="")
        for encoded in encoded_blocks:
            # An earlier version may have counted them in a task of more files.
            already_here = min(skipped, len(encoded.tokens))
            tokens = encoded.tokens[already_here:]
            if limit is not None:
                tokens = tokens[: limit - writer.written]
            # To count the bytes again costs time; it is necessary where tokens are left out.
            is_whole = len(tokens) == len(encoded.tokens)
            for consumed in writer.add(tokens, encoded.text_bytes if is_whole else None):
                position = Position(encoded.place, already_here + consumed, counts)
                progress.record(writer.shards, position)
            counts, before = counts.plus(encoded, already_here + len(tokens)), counts
            skipped -= already_here
            for reason in counts.first_bad_lines[len(before.first_bad_lines) :]:
                logger.warning("%s: left out", reason)
            bad_lines.require_few_so_far(*counts.readable(), max_bad_lines)
            rate = (writer.written - already) / (bar.tasks[task].elapsed or 1e-9)
            speed = f"{writer.written / 1e6:.1f} M tokens, {rate / 1e6:.2f} M/s"
            bar.update(task, completed=encoded.done, documents=counts.documents, speed=speed)
            if limit is not None and writer.written >= limit:
                break
        bar.update(task, total=bar.tasks[task].completed)  # nothing is left to do
    return counts


def _finish(folder: Path, recipe: Recipe, writer: "_ShardWriter", counts: Counts) -> Manifest:
    writer.close()
    if not writer.written:
        raise DataError(f"{recipe.corpus} has no documents: {recipe.source}")
    if counts.documents == counts.empty:
        raise DataError(
            f"{recipe.corpus} has no text: {counted(counts.documents, 'document')}, all empty"
        )
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
        dtype=formats.dtype_for(recipe.vocab_size).name,
        tokens_per_shard=recipe.shard_tokens,
        val_tokens=recipe.val_tokens,
        max_tokens=recipe.max_tokens,
        documents=counts.documents,
        empty_documents=counts.empty,
        replaced_documents=counts.replaced,
        bad_lines=counts.bad_lines,
        version=recipe.version,
        shards=tuple(writer.shards),
        tokenizer_digest=recipe.tokenizer_digest,
    )
    manifest.write(folder)
    (folder / PROGRESS).unlink(missing_ok=True)
    return manifest


@dataclass(frozen=True)
class PreparationProgress:
    """The content of `progress.json`."""

    command: str
    recipe: Mapping[str, Any]
    counts: Counts
    place: tuple[int, ...]
    tokens: int
    shards: tuple[Shard, ...]


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
            values = json_fields.read(path)
            if "place" not in values:
                raise ValueError("it was begun by an earlier version")
            begun = json_fields.from_json(PreparationProgress, values, path)
            position = Position(Place(*begun.place), begun.tokens, begun.counts)
        except json_fields.UNREADABLE as error:
            raise DataError(
                f"{path} cannot be read ({error}); start again with --overwrite"
            ) from error
        for shard in begun.shards:
            shard.require_inside(self._folder, path)
        done = list(begun.shards)
        if done:  # without a finished shard, another recipe contradicts nothing
            _require_same(self._folder, self._recipe, begun.recipe, "was started")
        else:
            self.record([], Position())
        atomic_files.remove_temporary(
            self._folder, owns=lambda name: name.startswith(self._recipe.corpus)
        )
        return done, position

    def record(self, done: list[Shard], position: Position) -> None:
        progress = PreparationProgress(
            self._command,
            asdict(self._recipe),
            position.counts,
            position.place,
            position.tokens,
            tuple(done),
        )
        text = json.dumps(asdict(progress), indent=1) + "\n"
        atomic_files.write_text(self._folder / PROGRESS, text)


def _finished(folder: Path, recipe: Recipe) -> Manifest:
    storage = Storage(str(folder))
    manifest = Manifest.read(storage)
    made_with = asdict(recipe) | {
        "corpus": manifest.corpus,
        "source": manifest.source,
        "shard_tokens": manifest.tokens_per_shard,
        "val_tokens": manifest.val_tokens,
        "max_tokens": manifest.max_tokens,
        "vocab_size": manifest.vocab_size,
        "tokenizer": manifest.tokenizer,
        "tokenizer_digest": manifest.tokenizer_digest,
    }
    _require_same(folder, recipe, made_with, "is finished")
    manifest.read_tokenizer(storage)
    return manifest


def _require_same(folder: Path, recipe: Recipe, other: Mapping[str, object], state: str) -> None:
    now = asdict(recipe)
    names = [name for name, value in now.items() if other.get(name) != value]
    if "tokenizer_digest" in names:
        raise DataError(
            f"{folder} {state} with another tokenizer ({_tokenizer_of(other)} before, "
            f"{_tokenizer_of(now)} now); use the same --tokenizer, choose another folder with "
            "--out, or start again with --overwrite"
        )
    if recipe.tokenizer_digest is not None:
        names = [name for name in names if name != "tokenizer"]  # the same, wherever its file is
    differences = "; ".join(f"{name}: {other.get(name)} before, {now[name]} now" for name in names)
    if names == ["source"]:
        raise DataError(
            f"{folder} {state} from other files, or with another --text_field ({differences}); "
            "choose another folder with --out, or start again with --overwrite"
        )
    if names:
        raise DataError(
            f"{folder} {state} with other options ({differences}); use the same options, choose "
            "another folder with --out, or start again with --overwrite"
        )


def _tokenizer_of(recipe: Mapping[str, object]) -> str:
    digest = recipe.get("tokenizer_digest")
    return f"{recipe.get('tokenizer')} {str(digest)[:12]}…" if digest else GPT2_TOKENIZER.name


def _clear(folder: Path, name: str, copy: TokenizerCopy) -> None:
    """Removes the files of this corpus, the manifest first: an incomplete folder never has one.

    The copy of a tokenizer is replaced before that: the manifest says whether it may be.
    """
    is_shard = shards.file_pattern(name).fullmatch
    others = [path.name for path in folder.glob("*.npy") if not is_shard(path.name)]
    if others:
        raise DataError(
            f"{folder} holds {sorted(others)[0]}, which does not belong to this corpus; nothing "
            "was removed: choose another folder with --out"
        )
    found = [
        path
        for path in sorted(folder.iterdir())
        if is_shard(path.name.removesuffix(atomic_files.TEMPORARY_SUFFIX))
    ]
    copy.write()
    for path in (folder / MANIFEST, folder / PROGRESS, *found):
        path.unlink(missing_ok=True)


class _ShardWriter:
    """Divides a stream of tokens into shards, and writes them as they come."""

    def __init__(
        self, folder: Path, recipe: Recipe, done: list[Shard], tokenizer: Tokenizer
    ) -> None:
        self.shards = list(done)
        self.written = sum(shard.tokens for shard in done)
        self._folder = folder
        self._recipe = recipe
        self._val_tokens = recipe.val_tokens
        self._tokenizer = tokenizer
        self._dtype = formats.dtype_for(recipe.vocab_size)
        self._begun = contextlib.ExitStack()
        self._file: BinaryIO | None = None
        self._tokens = self._text_bytes = 0  # of the shard that is begun

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self._begun.__exit__(*error)

    def add(self, tokens: Tokens, text_bytes: int | None = None) -> Iterator[int]:
        """Adds `tokens`; for each finished shard, yields how many of them have been written.
        `text_bytes` are the bytes of their text, if that is known."""
        consumed = 0
        while consumed < len(tokens):
            size = self._recipe.shard_tokens if self.shards else self._val_tokens
            part = tokens[consumed : consumed + size - self._tokens]
            self._append(part, text_bytes if len(part) == len(tokens) else None)
            consumed += len(part)
            if self._tokens == size:
                self.close()
                yield consumed

    def leaves_too_little(self) -> bool:
        """Whether the validation split would be more than a tenth of all tokens."""
        return 1 < self.written < 10 * self._recipe.val_tokens

    def split_again(self) -> None:
        """Writes all shards again: a tenth of the tokens for validation, the rest for training."""
        self.close()
        begun = []
        for shard in self.shards:
            with regular_file.open_to_read(self._folder / shard.file) as file:
                begun.append(np.load(file))
        for shard in self.shards:
            (self._folder / shard.file).unlink()
        self.shards, self.written = [], 0
        tokens = np.concatenate(begun)
        self._val_tokens = max(1, len(tokens) // 10)
        for _ in self.add(tokens):
            pass

    def _append(self, tokens: Tokens, text_bytes: int | None) -> None:
        if self._file is None:
            self._file = self._begun.enter_context(atomic_files.writing(self._path))
            self._file.write(formats.npy_header(self._dtype, 0))
        self._file.write(tokens.astype(self._dtype, copy=False).data)
        self._tokens += len(tokens)
        if text_bytes is None:
            text_bytes = self._tokenizer.text_bytes(tokens)
        self._text_bytes += text_bytes
        self.written += len(tokens)

    def close(self) -> None:
        """Ends the shard that is begun, if there is one."""
        if self._file is None:
            return
        path = self._path
        self._file.seek(0)
        self._file.write(formats.npy_header(self._dtype, self._tokens))
        self._begun.close()
        with path.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        size, split = path.stat().st_size, self._split
        shard = Shard(path.name, split, self._tokens, size, digest, self._text_bytes)
        self.shards.append(shard)
        self._file, self._tokens, self._text_bytes = None, 0, 0

    @property
    def _split(self) -> Split:
        return "train" if self.shards else "val"

    @property
    def _path(self) -> Path:
        name = f"{self._recipe.corpus}_{self._split}_{len(self.shards):06d}.npy"
        return self._folder / name


def _progress_bar(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("documents: {task.fields[documents]:,}, {task.fields[speed]}"),
        TimeRemainingColumn(compact=True),  # short enough for 80 columns
        console=console,
    )
