"""Token shards: found by a manifest or by their names, checked when opened and when they change.

`load_index` lists the shards of a storage, `TokenDataset` reads rows from those of one split.
"""

import contextlib
import functools
import hashlib
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from gpt2.base.errors import DataError
from gpt2.base.text import counted
from gpt2.data import formats, hints, manifest, shard_file, vocabulary
from gpt2.data.cache import ShardCache
from gpt2.data.digests import Content, DigestMemory, Fault
from gpt2.data.formats import HEAD_BYTES, Tokens
from gpt2.data.manifest import Manifest, Shard, Split
from gpt2.data.remote import Storage
from gpt2.data.sampler import Rows, Shuffle
from gpt2.data.shard_file import ShardFile
from gpt2.data.tokenizer import GPT2_TOKENIZER, Tokenizer
from gpt2.data.vocabulary import Characters, Vocabulary

Fingerprint = dict[Split, list[str | None]]
ENDS = "ends "
"""what a digest of the ends of a shard begins with in a fingerprint"""
OPEN_REMOTE_SHARDS = 3
"""remote training shards open at a time: the one in use, the one before and the one after it"""
PARALLEL_REQUESTS = 16
"""for the sizes and headers of remote shards"""
SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
}


@dataclass(frozen=True)
class DatasetIndex:
    """The shards of a storage, with or without a manifest."""

    storage: Storage
    shards: tuple[Shard, ...]
    has_manifest: bool
    """whether a manifest gives the SHA-256 of every shard"""
    cache: ShardCache | None = None
    """for copies of remote shards; None if they are not read"""
    corpus: str | None = None
    """name of the corpus; None without a manifest"""
    ends: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of size, beginning and end of each shard, by file, if there is no manifest"""
    tokenizer: Tokenizer = GPT2_TOKENIZER
    """which the manifest names, or the `meta.pkl` of a nanoGPT data set; else it is GPT-2's"""
    content: Content = field(default_factory=Content, compare=False)

    def of(self, split: Split) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The texts of a nanoGPT data set's own token ids; None for other tokenizers."""
        return self.tokenizer.texts if isinstance(self.tokenizer, Characters) else None

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.of(split))

    @property
    def hint(self) -> str:
        """The end of an error message about a shard: how to replace those of a manifest."""
        return hints.repair(self.storage) if self.has_manifest else ""

    def digest(self, shard: Shard) -> str | None:
        """The SHA-256 that a shard has, as far as this process knows."""
        return shard.sha256 or self.content.digests.get(shard.file)

    def fingerprint(self) -> Fingerprint:
        """Identifies the content: the SHA-256 of each shard of a split, in the order of the shards;
        where that is not known yet, one of its size, beginning and end, after ENDS."""
        splits: tuple[Split, ...] = ("train", "val")
        return {
            split: [self.digest(shard) or self.ends_of(shard) for shard in self.of(split)]
            for split in splits
        }

    def ends_of(self, shard: Shard) -> str | None:
        """ENDS and the digest of size, beginning and end; None with a manifest."""
        return f"{ENDS}{self.ends[shard.file]}" if self.ends else None

    def former_fingerprint(self) -> str:
        """What checkpoints of earlier versions have. It covers the training split alone, and of
        shards without a manifest only size, beginning and end."""
        known = [self.ends.get(shard.file) or shard.sha256 or "" for shard in self.of("train")]
        sums = " ".join(known)
        return hashlib.sha256(sums.encode()).hexdigest()[:16]


def file_pattern(corpus: str) -> re.Pattern[str]:
    """What the names of the shards match that `gpt2 data` makes of a corpus."""
    return re.compile(rf"{re.escape(corpus)}_(train|val)_\d{{6}}\.npy")


def load_index(storage: Storage, cache: ShardCache | None = None) -> DatasetIndex:
    """The index of a folder, URL or glob, from its manifest, else from the names of its files.

    Raises DataError if there are no shards, their preparation is not finished, or a file is not a
    shard.
    """
    if not storage.root:
        raise DataError("the name of the training data is empty; use --data_root FOLDER")
    index = _index_by_manifest(storage) or _index_by_names(storage)
    return replace(index, cache=cache)


def _index_by_manifest(storage: Storage) -> DatasetIndex | None:
    if (found := Manifest.find(storage)) is None:
        return None
    if storage.path is None:  # TokenDataset checks local shards when it opens them
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as threads:
            sizes = threads.map(lambda shard: storage.size(shard.file), found.shards)
            for shard, size in zip(found.shards, sizes, strict=True):
                if size != shard.bytes:
                    raise DataError(
                        f"{storage.full(shard.file)}: expected {shard.bytes} bytes, got {size}"
                        f"{hints.repair(storage)}"
                    )
    return DatasetIndex(
        storage,
        found.shards,
        has_manifest=True,
        corpus=found.corpus,
        tokenizer=found.read_tokenizer(storage),
    )


def files_by_name(storage: Storage) -> list[tuple[str, int, Split]]:
    """The shards of a storage without a manifest: name, size in bytes and split.

    Raises DataError if there are none.
    """
    files = [
        (name, size, split)
        for name, size in storage.files().items()
        if name.endswith((".npy", ".bin")) and (split := split_of(name))
    ]
    if not files:
        raise DataError(manifest.missing(storage))
    return files


def _index_by_names(storage: Storage) -> DatasetIndex:
    files = files_by_name(storage)
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as threads:  # remote storage answers slowly
        found = list(threads.map(lambda file: _shard_by_header(storage, *file), files))
    shards = tuple(shard for shard, _ in found)
    ends = {shard.file: digest for shard, digest in found}
    own = vocabulary.of_shards(storage, ends)
    return DatasetIndex(
        storage,
        shards,
        has_manifest=False,
        ends=ends,
        tokenizer=vocabulary.tokenizer_of(own) if own else _tokenizer_of_manifests(storage, ends),
    )


def _tokenizer_of_manifests(storage: Storage, files: Iterable[str]) -> Tokenizer:
    """The tokenizer that the manifests in the folders of `files` name, GPT-2's without any. Raises
    DataError if they name several."""
    found = dict[str, tuple[Tokenizer, str]]()
    for folder in sorted({str(PurePosixPath(file).parent) for file in files}):
        place = Storage(storage.full(folder))
        known = Manifest.find(place)
        tokenizer = known.read_tokenizer(place) if known else GPT2_TOKENIZER
        found.setdefault(tokenizer.identity, (tokenizer, place.root))
    if len(found) > 1:
        places = " and ".join(place for _, place in found.values())
        raise DataError(f"{places} have tokens of different tokenizers; name one of these folders")
    return next(iter(found.values()))[0] if found else GPT2_TOKENIZER


def rows_per_shard(index: DatasetIndex, split: Split, block_size: int) -> tuple[int, ...]:
    """The rows of each shard of a split, `(tokens - 1) // block_size`: a row has a last target.

    Raises DataError if there is no shard, and for one that is too short for one row (except the
    last one, which holds the rest of a corpus).
    """
    found = index.of(split)
    if not found:
        raise DataError(
            f"{index.storage} has no {split} shard; its file names must have {split!r} as a "
            f"word, as in name_{split}_000000.npy or {split}.bin"
        )
    rows = tuple(max(0, shard.tokens - 1) // block_size for shard in found)
    for shard, count in zip(found, rows, strict=True):
        if count == 0 and (len(found) == 1 or shard is not found[-1]):
            raise DataError(
                f"{index.storage.full(shard.file)} has {counted(shard.tokens, 'token')}, too few "
                f"for one row of block_size={block_size} and its target; use --block_size "
                f"{max(1, shard.tokens - 1)} or less, or larger shards"
            )
    return rows


class TokenDataset:
    """The shards of one split as rows of `block_size` tokens.

    Row r of a shard has the inputs [r*T, r*T + T); its targets are the same tokens shifted by one.
    Raises DataError as `rows_per_shard` does, and, naming the file, for a missing or truncated
    shard and for ids outside the vocabulary.

    Remote training shards are downloaded when `read` needs them, or before that by `prefetch`. With
    the shuffle `global` they stay open; with others, only the last ones that were read.
    Local shards, and those of the validation split, are opened by the constructor.
    """

    def __init__(
        self, index: DatasetIndex, split: Split, block_size: int, shuffle: Shuffle = "shards"
    ) -> None:
        self.block_size = block_size
        self.shards = index.of(split)
        self.rows_per_shard = rows_per_shard(index, split, block_size)
        self._index = index
        self._on_demand = index.storage.path is None and split == "train"
        """whether shards are opened when they are needed, and closed after that"""
        self._open: dict[int, Future[_OpenShard]] = {}
        """by shard index, the least recently used one first"""
        self._most_open = _most_open(index, shuffle)
        self._is_scattered = shuffle in ("rows", "global")
        """whether the next rows are elsewhere in the files, where the system does not look ahead"""
        shard_file.allow_open_files(2 * len(index.shards))  # of both splits, with locks of copies
        if self._on_demand:
            require_room([index], shuffle)
            return
        for number, shard in enumerate(self.shards):
            self._open[number] = Future()
            self._open[number].set_result(_open_shard(index, shard))

    def read(
        self, rows: Rows, stop: threading.Event | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets of `rows`, each (B, T) int64.

        Raises DataError for a token id outside the vocabulary, for a shard that has changed or
        cannot be read or downloaded, and if `stop` is set during a download.
        """
        length = self.block_size
        tokens = np.empty((len(rows), length + 1), dtype=np.int64)
        places, starts = {}, {}
        for shard in np.unique(rows[:, 0]).tolist():
            here = np.flatnonzero(rows[:, 0] == shard)
            places[shard], starts[shard] = here.tolist(), (rows[here, 1] * length).tolist()
        if self._is_scattered:
            self._announce(starts)
        for shard in places:
            parts = self._parts(shard, starts[shard], stop)
            for place, part in zip(places[shard], parts, strict=True):
                tokens[place] = part
        if tokens.size and (highest := tokens.max()) >= self._index.vocab_size:
            shard = rows[int(tokens.max(axis=1).argmax())][0]
            raise DataError(
                f"{self._index.storage.full(self.shards[shard].file)} holds the token id "
                f"{highest}, outside the vocabulary of {self._index.vocab_size}"
            )
        return tokens[:, :-1], tokens[:, 1:]

    def text_bytes(self, tokens: npt.NDArray[np.int64]) -> int:
        """UTF-8 bytes of the text of `tokens`; <|endoftext|> has none."""
        return self._index.tokenizer.text_bytes(tokens)

    def prefetch(self, shard: int) -> None:
        """Starts to download a shard in the background, unless it is open."""
        if not self._on_demand:
            return
        known = self._open.pop(shard, None)
        if known is not None and not (known.done() and known.exception()):
            self._open[shard] = known  # now the most recently used one
            return
        while len(self._open) >= self._most_open:
            oldest = self._open.pop(next(iter(self._open)))
            oldest.add_done_callback(_close)
        future = self._open[shard] = Future()
        # A daemon thread: the process can exit during a download.
        threading.Thread(
            target=self._download, args=(shard, future), name="download", daemon=True
        ).start()

    def _download(self, shard: int, future: "Future[_OpenShard]") -> None:
        try:
            future.set_result(_open_shard(self._index, self.shards[shard]))
        except BaseException as error:  # raised by read
            future.set_exception(error)

    def _opened(self, shard: int, stop: threading.Event | None) -> ShardFile:
        self.prefetch(shard)
        future = self._open[shard]
        while not future.done():
            if stop is not None and stop.is_set():
                raise DataError("stopped while a shard was downloaded")
            wait([future], timeout=0.05)
        return future.result().file

    def _announce(self, starts: Mapping[int, list[int]]) -> None:
        """Lets the system fetch the rows of open shards from the disk, all at once."""
        for shard, starts_in_shard in starts.items():
            future = self._open.get(shard)
            if future is not None and future.done() and future.exception() is None:
                future.result().file.announce(starts_in_shard, self.block_size + 1)

    def _parts(self, shard: int, starts: list[int], stop: threading.Event | None) -> list[Tokens]:
        """`block_size + 1` tokens of a shard from each of `starts` on.

        A local shard that has changed is hashed, and read again if its content is the same. The
        cache alone writes a local copy of a remote one.
        """
        file = self._opened(shard, stop)
        try:
            while True:
                parts = [file.read(start, self.block_size + 1) for start in starts]
                if self._index.storage.path is None or file.is_unchanged():
                    return parts
                known = self._index.digest(self.shards[shard])
                if known is None:  # the process that verified it may have been another one
                    memory = DigestMemory(Path(self._index.storage.folder))
                    known = memory.get(self.shards[shard].file, file.version)
                if file.hash() != known:
                    reason = f"{file.name} has changed since the run opened it"
                    self._index.content.report(Fault(reason + self._index.hint))
                    raise DataError(reason + self._index.hint)
        except OSError as error:
            raise DataError(f"{file.name} cannot be read: {error.strerror or error}") from error


def _close(future: "Future[_OpenShard]") -> None:
    """Allows the cache to remove the copy of a shard that is no longer read."""
    if future.exception() is None:
        future.result().copy.close()


@dataclass(frozen=True)
class _OpenShard:
    """A shard; until `copy` is closed, it is open, and the cache keeps its local copy."""

    file: ShardFile
    copy: contextlib.ExitStack


def _open_shard(index: DatasetIndex, shard: Shard) -> _OpenShard:
    """A shard, checked; a remote one is downloaded."""
    storage, name = index.storage, index.storage.full(shard.file)
    with contextlib.ExitStack() as stack:
        if storage.path is None:
            assert index.cache is not None
            copy = index.cache.copy(
                storage, shard.file, shard.bytes, lambda path: _check_download(index, shard, path)
            )
            path = stack.enter_context(copy)
        else:
            path = Path(name)
            if not path.exists():
                raise DataError(f"{name} is in the manifest, but the file is missing{index.hint}")
        try:
            file = shard_file.open_shard(path, name)
            stack.callback(file.close)
            shard_file.require_sound(file, shard.tokens, index.vocab_size)
        except DataError as error:
            raise DataError(f"{error}{index.hint}") from error
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror or error}") from error
        return _OpenShard(file, stack.pop_all())


def _check_download(index: DatasetIndex, shard: Shard, path: Path) -> str | None:
    """What is wrong with a local copy, or None. The first copy of a shard without a digest gives it
    one."""
    if (size := path.stat().st_size) != shard.bytes:
        return f"expected {shard.bytes} bytes, got {size}"
    with path.open("rb") as file:
        if index.has_manifest:
            return _check_digest(file, shard)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if index.digest(shard) is None:
        _, ends = _shard_by_header(Storage(str(path.parent)), path.name, size, shard.split)
        if ends == index.ends[shard.file]:
            index.content.digests[shard.file] = digest
    return None if digest == index.digest(shard) else "the file has changed since the run began"


def _shard_by_header(storage: Storage, name: str, size: int, split: Split) -> tuple[Shard, str]:
    """A shard without a manifest, and a digest of its size, its beginning and its end."""
    head = storage.read(name, 0, min(size, HEAD_BYTES))
    tail = storage.read(name, max(0, size - HEAD_BYTES), size)
    found = formats.layout(storage.full(name), head, size, functools.partial(storage.read, name))
    digest = hashlib.sha256(b"%d " % size + head + tail).hexdigest()
    return Shard(name, split, found.tokens, size, sha256=None), digest


def _check_digest(file: BufferedReader, shard: Shard) -> str | None:
    same = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    return None if same else "its SHA-256 differs from the manifest's"


def _most_open(index: DatasetIndex, shuffle: Shuffle) -> int:
    """The remote training shards that are open at a time."""
    return len(index.of("train")) if shuffle == "global" else OPEN_REMOTE_SHARDS


def require_room(indices: Sequence[DatasetIndex], shuffle: Shuffle) -> None:
    """Raises DataError if the cache is too small for the validation splits of all these corpora and
    the training shards that are open at a time."""
    remote = [index for index in indices if index.storage.path is None and index.cache]
    if not remote:
        return
    limit = remote[0].cache.limit_bytes if remote[0].cache else None
    needed = count = 0
    for index in remote:
        train = sorted((shard.bytes for shard in index.of("train")), reverse=True)
        opened = train[: _most_open(index, shuffle)]
        count += len(opened)
        needed += sum(shard.bytes for shard in index.of("val")) + sum(opened)
    if limit is not None and needed > limit:
        other = "--shuffle rows, or " if shuffle == "global" else ""
        names = ", ".join(str(index.storage) for index in remote)
        raise DataError(
            f"cache_gb={limit / 1e9:g} is too small for {names} with --shuffle {shuffle}: the "
            f"validation split and {counted(count, 'training shard')} take {needed / 1e9:.3g} GB; "
            f"use {other}--cache_gb {needed / 1e9 * 1.01:.3g} or more"
        )


def split_of(name: str) -> Split | None:
    """The split that is a word of a file's name or subfolder, or None."""
    for word in reversed(re.split(r"[/_.\-]", name.lower())):
        if word in SPLIT_WORDS:
            return SPLIT_WORDS[word]
    return None
