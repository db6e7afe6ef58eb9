"""Token shards, ours and other people's: found, checked at opening, read from memory maps."""

import contextlib
import hashlib
import json
import re
import resource
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpt2.base import atomic_files
from gpt2.base.errors import DataError
from gpt2.data import corpora, formats, tokenizer
from gpt2.data.cache import Cache
from gpt2.data.formats import DTYPE, HEAD_BYTES, Tokens
from gpt2.data.remote import Storage
from gpt2.data.sampler import Rows

Split = Literal["train", "val"]
MANIFEST, PROGRESS = "manifest.json", "progress.json"
SAMPLED_IDS = 4096
MAPS_AT_ONCE = 3
"""far training shards that are open: the one in use, the one before it and the one after it"""
AT_ONCE = 16
"""requests at a time for the headers of foreign shards"""
NAMING = "names need train or val as a word, as in train.bin and x_val_000000.npy"
SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
}


@dataclass(frozen=True)
class Shard:
    """One shard: its file, relative to the folder, and what it must hold."""

    file: str
    split: Split
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `gpt2 data` made. It is written last: a folder with one is whole."""

    corpus: str
    source: str
    tokenizer: str
    vocab_size: int
    dtype: str
    tokens_per_shard: int
    val_tokens: int
    max_tokens: int | None
    documents: int
    empty_documents: int
    replaced_documents: int
    """documents with bytes that are no UTF-8, which became U+FFFD"""
    version: str
    """version of this package that wrote it"""
    shards: tuple[Shard, ...]

    def write(self, folder: Path) -> None:
        atomic_files.write_text(folder / MANIFEST, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, storage: Storage) -> "Manifest":
        """Raises DataError, with the command that helps, if there is none or it is damaged."""
        content = storage.read_if_any(MANIFEST)
        if content is None:
            raise DataError(_missing(storage))
        try:
            values: dict[str, Any] = json.loads(content)
            shards = tuple(Shard(**shard) for shard in values.pop("shards"))
            return cls(**values, shards=shards)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{storage.full(MANIFEST)} cannot be read ({error}){way_out(storage)}"
            ) from error


@dataclass(frozen=True)
class DatasetIndex:
    """The shards that a run trains on, whoever wrote them."""

    storage: Storage
    shards: tuple[Shard, ...]
    vocab_size: int
    ours: bool
    """whether there is a manifest, with the SHA-256 of every shard"""
    cache: Cache | None = None
    """for copies of shards that are far away, where they are to be read"""
    corpus: str | None = None
    """its name, where a manifest tells it"""

    def of(self, split: Split) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.of(split))

    def fingerprint(self) -> str:
        """Identity of the training data: the same for the same tokens in the same order."""
        sums = " ".join(shard.sha256 for shard in self.of("train"))
        return hashlib.sha256(sums.encode()).hexdigest()[:16]


def load_index(storage: Storage, cache: Cache | None = None) -> DatasetIndex:
    """The shards of a folder, URL or glob, by its manifest, or by the names of foreign files.

    Raises DataError if there are none, they are unfinished, or one is no shard.
    """
    found = _catalog_of_ours(storage) or _catalog_of_others(storage)
    return replace(found, cache=cache)


def _catalog_of_ours(storage: Storage) -> DatasetIndex | None:
    if storage.is_glob or all(storage.read_if_any(name) is None for name in (MANIFEST, PROGRESS)):
        return None
    manifest = Manifest.read(storage)
    if manifest.tokenizer != tokenizer.NAME:
        raise DataError(
            f"{storage} was tokenised with {manifest.tokenizer}, runs use {tokenizer.NAME}"
            f"{way_out(storage)}"
        )
    if storage.path is None:  # here, opening tells
        with ThreadPoolExecutor(AT_ONCE) as threads:
            sizes = threads.map(lambda shard: storage.size(shard.file), manifest.shards)
            for shard, size in zip(manifest.shards, sizes, strict=True):
                if size != shard.bytes:
                    raise DataError(
                        f"{storage.full(shard.file)} has {size} bytes instead of {shard.bytes}"
                        f"{way_out(storage)}"
                    )
    return DatasetIndex(
        storage, manifest.shards, manifest.vocab_size, ours=True, corpus=manifest.corpus
    )


def _catalog_of_others(storage: Storage) -> DatasetIndex:
    files = [
        (name, size, split)
        for name, size in storage.files().items()
        if name.endswith((".npy", ".bin")) and (split := _split_of(name))
    ]
    if not files:
        raise DataError(_missing(storage))
    with ThreadPoolExecutor(AT_ONCE) as threads:  # far away, each answer takes a while
        shards = threads.map(lambda file: _foreign_shard(storage, *file), files)
        return DatasetIndex(storage, tuple(shards), tokenizer.VOCAB_SIZE, ours=False)


class TokenDataset:
    """The shards of one split as rows of `block_size` tokens, memory-mapped.

    A shard gives `(tokens - 1) // block_size` rows; row r is the inputs [r*T, r*T + T) with the
    targets one further on. Raises DataError, naming the file, for a missing or truncated shard, ids
    outside the vocabulary, and a shard too short for one row (but for a last one, which holds what
    is left of a corpus and may give none).

    Far training shards are fetched when `read` needs them, or ahead of that by `expect`; what lies
    here, and the validation split, is opened at once.
    """

    def __init__(self, shards: DatasetIndex, split: Split, block_size: int) -> None:
        self.block_size = block_size
        self.shards = shards.of(split)
        if not self.shards:
            raise DataError(
                f"{shards.storage} has no {split} shard: its files need {split!r} as a part of "
                f"their names, as in name_{split}_000000.npy or {split}.bin"
            )
        self.rows_per_shard = tuple(max(0, shard.tokens - 1) // block_size for shard in self.shards)
        for shard, rows in zip(self.shards, self.rows_per_shard, strict=True):
            if rows == 0 and (len(self.shards) == 1 or shard is not self.shards[-1]):
                raise DataError(
                    f"{shards.storage.full(shard.file)} has {shard.tokens} tokens, too few for one "
                    f"row of block_size={block_size} and its target; use --block_size "
                    f"{max(1, shard.tokens - 1)} or less, or larger shards"
                )
        self._catalog = shards
        self._come_and_go = shards.storage.path is None and split == "train"
        self._maps: dict[int, Future[_Mapped]] = {}
        """by number, the one not used for longest first"""
        if self._come_and_go:
            _require_room(shards)
            return
        _allow_open_files(len(self.shards))
        for index, shard in enumerate(self.shards):
            self._maps[index] = Future()
            self._maps[index].set_result(_open(shards, shard))

    def read(
        self, rows: Rows, stop: threading.Event | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets of `rows`, each (B, T) int64.

        Raises DataError for a token id outside the vocabulary, for a shard that does not arrive,
        and if `stop` is set while it waits for one.
        """
        length = self.block_size
        tokens = np.empty((len(rows), length + 1), dtype=np.int64)
        for index, (shard, row) in enumerate(rows.tolist()):
            start = row * length
            tokens[index] = self._tokens(shard, stop)[start : start + length + 1]
        if tokens.size and (highest := tokens.max()) >= self._catalog.vocab_size:
            shard = rows[int(tokens.max(axis=1).argmax())][0]
            raise DataError(
                f"{self._catalog.storage.full(self.shards[shard].file)} holds the token id "
                f"{highest}, outside the vocabulary of {self._catalog.vocab_size}"
            )
        return tokens[:, :-1], tokens[:, 1:]

    def expect(self, shard: int) -> None:
        """Begins to fetch a shard that is needed soon, in the background."""
        if not self._come_and_go:
            return
        known = self._maps.pop(shard, None)
        if known is not None and not (known.done() and known.exception()):
            self._maps[shard] = known  # as the one used last
            return
        while len(self._maps) >= MAPS_AT_ONCE:
            oldest = self._maps.pop(next(iter(self._maps)))
            oldest.add_done_callback(_let_go)
        future = self._maps[shard] = Future()
        # A daemon: an exit must not wait for a download.
        threading.Thread(
            target=self._fetch, args=(shard, future), name="fetch", daemon=True
        ).start()

    def _fetch(self, shard: int, future: "Future[_Mapped]") -> None:
        try:
            future.set_result(_open(self._catalog, self.shards[shard]))
        except BaseException as error:
            future.set_exception(error)

    def _tokens(self, shard: int, stop: threading.Event | None) -> Tokens:
        self.expect(shard)
        future = self._maps[shard]
        while not future.done():
            if stop is not None and stop.is_set():
                raise DataError("stopped while a shard was being fetched")
            wait([future], timeout=0.05)
        return future.result().tokens


def _let_go(future: "Future[_Mapped]") -> None:
    """The copy of a shard that is no longer read may be removed from the cache."""
    if future.exception() is None:
        future.result().copy.close()


def open_files_wanted(shards: int) -> int:
    """Each memory map keeps a file open; the rest is for sockets, libraries and all else."""
    return 2 * shards + 1024


def _allow_open_files(count: int) -> None:
    """Many machines allow 1024 unless asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = open_files_wanted(count)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def verify(storage: Storage, shard: Shard) -> str | None:
    """What is wrong with a shard of ours, by size and SHA-256, or None."""
    try:
        if (size := storage.size(shard.file)) != shard.bytes:
            return f"{size} bytes instead of {shard.bytes}"
        with storage.open(shard.file) as file:
            return _wrong_sum(file, shard)
    except DataError as error:
        return str(error).removeprefix(f"{storage.full(shard.file)} ")


def first_tokens(storage: Storage, shard: Shard, count: int) -> list[int]:
    """The first `count` tokens of a shard, read from where it lies."""
    head = storage.read(shard.file, 0, HEAD_BYTES)
    found = formats.layout(storage.full(shard.file), head, storage.size(shard.file))
    end = found.start + min(count, found.tokens) * found.dtype.itemsize
    content = storage.read(shard.file, found.start, end)
    return [int(token) for token in np.frombuffer(content, found.dtype)]


def command(folder: Path, again: bool = False) -> str:
    """The command that makes `folder`; its name is that of the corpus, by convention."""
    corpus = corpora.find(folder.name)
    name = corpus.name.replace("_", "-") if corpus else "NAME"
    out = "" if corpus and folder == Path("data") / folder.name else f" --out {folder}"
    names = "" if corpus else " (gpt2 data --help lists the names)"
    return f"gpt2 data {name}{out}{' --overwrite' if again else ''}{names}"


def way_out(storage: Storage) -> str:
    """The end of an error about shards of ours: what to do about it."""
    if storage.path is None:
        return "; upload it again"
    if corpora.find(storage.path.name) is None:
        return "; make it again with the command that made it and --overwrite"
    return f"; make it again with: {command(storage.path, again=True)}"


@dataclass(frozen=True)
class _Mapped:
    """The tokens of a shard, and what keeps its copy in the cache meanwhile."""

    tokens: Tokens
    copy: contextlib.ExitStack


def _open(shards: DatasetIndex, shard: Shard) -> _Mapped:
    """The tokens of a shard, fetched if it is far away, and checked."""
    storage, name = shards.storage, shards.storage.full(shard.file)
    mend = way_out(storage) if shards.ours else ""

    def wrong_on_arrival(path: Path) -> str | None:
        if (size := path.stat().st_size) != shard.bytes:
            return f"{size} bytes instead of {shard.bytes}"
        if shards.ours:
            with path.open("rb") as file:
                return _wrong_sum(file, shard)
        here = Storage(str(path.parent))
        same = _foreign_shard(here, path.name, size, shard.split).sha256 == shard.sha256
        return None if same else "it is not the file that was there before"

    with contextlib.ExitStack() as stack:
        if storage.path is None:
            assert shards.cache is not None
            copy = shards.cache.copy(storage, shard.file, shard.bytes, wrong_on_arrival)
            path = stack.enter_context(copy)
        else:
            path = Path(name)
            if not path.exists():
                raise DataError(f"{name} is in the manifest, but it is missing{mend}")
        try:
            tokens = formats.load(path, name)
        except DataError as error:
            unreadable = isinstance(error.__cause__, OSError)
            raise DataError(f"{error}{'' if unreadable else mend}") from error
        _require_sound(shards, shard, tokens, mend)
        return _Mapped(tokens, stack.pop_all())


def _require_sound(shards: DatasetIndex, shard: Shard, tokens: Tokens, mend: str) -> None:
    name = shards.storage.full(shard.file)
    if len(tokens) != shard.tokens:
        raise DataError(
            f"{name} holds {len(tokens)} tokens, the manifest says {shard.tokens}{mend}"
        )
    halves = tokens[1 : 2 * SAMPLED_IDS : 2]
    if not shards.ours and tokens.dtype == DTYPE and len(halves) and not halves.any():
        raise DataError(f"{name} holds 32-bit numbers; without a header only uint16 is known")
    highest = int(_sample(tokens).max(initial=0))
    if highest >= shards.vocab_size:
        raise DataError(
            f"{name} holds the token id {highest}, outside the vocabulary of {shards.vocab_size}: "
            f"it was written with another tokeniser{mend}"
        )


def _foreign_shard(storage: Storage, name: str, size: int, split: Split) -> Shard:
    """A shard without a manifest; its digest is of its size, its beginning and its end."""
    head = storage.read(name, 0, min(size, HEAD_BYTES))
    tail = storage.read(name, max(0, size - HEAD_BYTES), size)
    found = formats.layout(storage.full(name), head, size)
    digest = hashlib.sha256(b"%d " % size + head + tail).hexdigest()
    return Shard(name, split, found.tokens, size, digest)


def _wrong_sum(file: BufferedReader, shard: Shard) -> str | None:
    whole = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    return None if whole else "its SHA-256 is not that of the manifest"


def _require_room(shards: DatasetIndex) -> None:
    """The cache must hold the validation split and all training shards that are open at once."""
    limit = shards.cache.limit_bytes if shards.cache else None
    train = sorted((shard.bytes for shard in shards.of("train")), reverse=True)
    needed = sum(shard.bytes for shard in shards.of("val")) + sum(train[:MAPS_AT_ONCE])
    if limit is not None and needed > limit:
        raise DataError(
            f"cache_gb={limit / 1e9:g} is too small for {shards.storage}: its validation split and "
            f"{MAPS_AT_ONCE} training shards take {needed / 1e9:.3g} GB; use --cache_gb "
            f"{needed / 1e9 * 1.01:.3g} or more"
        )


def _split_of(name: str) -> Split | None:
    """`train` or `val` as a whole word of the name, not of the folder that was given."""
    for word in reversed(re.split(r"[/_.\-]", name.lower())):
        if word in SPLIT_WORDS:
            return SPLIT_WORDS[word]
    return None


def _sample(tokens: Tokens) -> Tokens:
    """Tokens at even distances over the whole shard."""
    count = min(SAMPLED_IDS, len(tokens))
    places = np.arange(count, dtype=np.int64) * len(tokens) // max(count, 1)
    sampled: Tokens = tokens[places].astype("<u4")
    return sampled


def _missing(storage: Storage) -> str:
    nothing = f"no training data in {storage.root}"
    if storage.is_glob:
        return f"{nothing}; {NAMING}"
    unfinished = storage.read_if_any(PROGRESS) is not None
    if unfinished and storage.path is None:
        return f"no {MANIFEST} in {storage}, but a {PROGRESS}: it is unfinished"
    if unfinished and storage.path is not None:
        return f"{storage} is unfinished: no {MANIFEST}; go on with: {_begun_with(storage.path)}"
    if any(name.endswith((".npy", ".bin")) for name in storage.files()):
        return f"no {MANIFEST} in {storage}; shards of others: {NAMING}"
    return nothing if storage.path is None else f"{nothing}; make it with: {command(storage.path)}"


def _begun_with(folder: Path) -> str:
    """The command that began an unfinished folder, as its journal has it."""
    try:
        begun = str(json.loads((folder / PROGRESS).read_text())["command"])
    except (OSError, ValueError, KeyError, TypeError):
        return command(folder)
    return begun
