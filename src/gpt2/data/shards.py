"""Token shards, ours and other people's: checked at opening, read from memory maps.

Three formats: `.npy` (uint16 or uint32), llm.c's `.bin` (256 int32 of header, then uint16; as
modded-nanogpt writes it too) and nanoGPT's `train.bin` and `val.bin` (uint16 and nothing else).
"""

import hashlib
import io
import json
import re
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpt2 import atomic, tokenizer
from gpt2.data import corpora
from gpt2.data.order import Rows
from gpt2.data.storage import Storage
from gpt2.errors import DataError

Split = Literal["train", "val"]
Tokens = npt.NDArray[np.unsignedinteger[Any]]
DTYPE = np.dtype("<u2")
MANIFEST, PROGRESS = "manifest.json", "progress.json"
LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER_INTS = 20240520, 1, 256
SAMPLED_IDS, HEAD_BYTES = 4096, 4096
MAPS_AT_ONCE = 4
"""far shards that stay open: the one in use, the one before it and those after it"""
AT_ONCE = 16
"""requests at a time for the headers of foreign shards"""
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
        atomic.write_text(folder / MANIFEST, json.dumps(asdict(self), indent=2) + "\n")

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
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{storage.full(MANIFEST)} cannot be read ({error}){way_out(storage)}"
            ) from error


@dataclass(frozen=True)
class Catalog:
    """The shards that a run trains on, whoever wrote them."""

    storage: Storage
    shards: tuple[Shard, ...]
    vocab_size: int
    ours: bool
    """whether there is a manifest, with the SHA-256 of every shard"""

    def of(self, split: Split) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.of(split))

    def fingerprint(self) -> str:
        """Identity of the training data: the same for the same tokens in the same order."""
        sums = " ".join(shard.sha256 for shard in self.of("train"))
        return hashlib.sha256(sums.encode()).hexdigest()[:16]


def catalog(storage: Storage) -> Catalog:
    """The shards of a folder, URL or glob, by its manifest, or by the names of foreign files.

    Raises DataError if there are none, they are unfinished, or one is no shard.
    """
    if not storage.is_glob and any(
        storage.read_if_any(name) is not None for name in (MANIFEST, PROGRESS)
    ):
        manifest = Manifest.read(storage)
        if manifest.tokenizer != tokenizer.NAME:
            raise DataError(
                f"{storage} was tokenised with {manifest.tokenizer}, runs use {tokenizer.NAME}"
                f"{way_out(storage)}"
            )
        return Catalog(storage, manifest.shards, manifest.vocab_size, ours=True)
    files = [
        (name, size, split)
        for name, size in storage.files().items()
        if name.endswith((".npy", ".bin")) and (split := _split_of(name))
    ]
    if not files:
        raise DataError(_missing(storage))
    with ThreadPoolExecutor(AT_ONCE) as threads:  # far away, each answer takes a while
        shards = threads.map(lambda file: _foreign_shard(storage, *file), files)
        return Catalog(storage, tuple(shards), tokenizer.VOCAB_SIZE, ours=False)


class ShardSet:
    """The shards of one split as rows of `block_size` tokens, memory-mapped.

    A shard gives `(tokens - 1) // block_size` rows; row r is the inputs [r*T, r*T + T) with the
    targets one further on. Raises DataError, naming the file, for a missing or truncated shard, ids
    outside the vocabulary, and a shard too short for one row (but for a last one, which holds what
    is left of a corpus and may give none).

    Far training shards are fetched when `read` needs them, or ahead of that by `expect`; what lies
    here, and the validation split, is opened at once.
    """

    def __init__(self, shards: Catalog, split: Split, block_size: int) -> None:
        self.block_size = block_size
        self.shards = shards.of(split)
        if not self.shards:
            raise DataError(
                f"{shards.storage} has no {split} shard: its files need {split!r} as a part of "
                f"their names, as in name_{split}_000000.npy or {split}.bin"
            )
        self.rows_per_shard = tuple((shard.tokens - 1) // block_size for shard in self.shards)
        for shard, rows in zip(self.shards, self.rows_per_shard, strict=True):
            if rows == 0 and (len(self.shards) == 1 or shard is not self.shards[-1]):
                raise DataError(
                    f"{shards.storage.full(shard.file)} has {shard.tokens} tokens, too few for one "
                    f"row of block_size={block_size} and its target; use --block_size "
                    f"{max(1, shard.tokens - 1)} or less, or larger shards"
                )
        self._catalog = shards
        self._come_and_go = shards.storage.path is None and split == "train"
        self._maps: dict[int, Future[Tokens]] = {}
        self._closed = threading.Event()
        if self._come_and_go:
            _require_room(shards)
        else:
            for index in range(len(self.shards)):
                self._maps[index] = Future()
                self._maps[index].set_result(_open(shards, self.shards[index]))

    def read(self, rows: Rows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets of `rows`, each (B, T) int64."""
        length = self.block_size
        tokens = np.empty((len(rows), length + 1), dtype=np.int64)
        for index, (shard, row) in enumerate(rows.tolist()):
            start = row * length
            tokens[index] = self._tokens(shard)[start : start + length + 1]
        return tokens[:, :-1], tokens[:, 1:]

    def expect(self, shard: int) -> None:
        """Begins to fetch a shard that is needed soon, in the background."""
        known = self._maps.get(shard)
        failed = known is not None and known.done() and known.exception() is not None
        if known is None or failed:
            while len(self._maps) >= MAPS_AT_ONCE:
                del self._maps[next(iter(self._maps))]
            future: Future[Tokens] = Future()
            self._maps[shard] = future
            # A daemon: an exit must not wait for a download.
            threading.Thread(target=self._fetch, args=(shard, future), daemon=True).start()

    def close(self) -> None:
        """Ends a `read` that waits for a shard, with an error."""
        self._closed.set()

    def _fetch(self, shard: int, future: "Future[Tokens]") -> None:
        try:
            future.set_result(_open(self._catalog, self.shards[shard]))
        except BaseException as error:
            future.set_exception(error)

    def _tokens(self, shard: int) -> Tokens:
        self.expect(shard)
        future = self._maps[shard]
        while not future.done():
            if self._closed.wait(0.01):
                raise DataError("the shards were closed while one of them was being fetched")
        return future.result()


def verify(storage: Storage, shard: Shard) -> str | None:
    """What is wrong with a shard of ours, by size and SHA-256, or None."""
    try:
        if (size := storage.size(shard.file)) != shard.bytes:
            return f"{size} bytes instead of {shard.bytes}"
        with storage.open(shard.file) as file:
            return _wrong_sum(file, shard)
    except DataError as error:
        return str(error).removeprefix(f"{storage.full(shard.file)} ")


def load(path: Path) -> Tokens:
    """All tokens of a shard of any format, memory-mapped. Raises DataError if it is none."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        layout = _layout(head, path.stat().st_size)
        return np.memmap(path, layout.dtype, "r", layout.start, (layout.tokens,))
    except (OSError, ValueError) as error:
        raise DataError(_no_shard(str(path), error)) from error


def first_tokens(storage: Storage, shard: Shard, count: int) -> list[int]:
    """The first `count` tokens of a shard, read from where it lies."""
    layout = _layout(storage.read(shard.file, 0, HEAD_BYTES), shard.bytes)
    end = layout.start + min(count, layout.tokens) * layout.dtype.itemsize
    content = storage.read(shard.file, layout.start, end)
    return [int(token) for token in np.frombuffer(content, layout.dtype)]


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
    return f"; make it again with: {command(storage.path, again=True)}"


def _open(shards: Catalog, shard: Shard) -> Tokens:
    """The tokens of a shard, fetched if it is far away, and checked."""
    storage, name = shards.storage, shards.storage.full(shard.file)
    mend = way_out(storage) if shards.ours else ""

    def wrong_on_arrival(path: Path) -> str | None:
        with path.open("rb") as file:
            if shards.ours:
                return _wrong_sum(file, shard)
        same = _foreign_shard(Storage(str(path.parent)), path.name, path.stat().st_size, "train")
        return None if same.sha256 == shard.sha256 else "it is not the file that was there before"

    try:
        with storage.local_copy(shard.file, shard.bytes, wrong_on_arrival) as path:
            if not path.exists():
                raise DataError(f"{name} is in the manifest, but it is missing")
            tokens = load(path)
    except DataError as error:
        raise DataError(f"{error}{mend}") from error
    if len(tokens) != shard.tokens:
        raise DataError(
            f"{name} holds {len(tokens)} tokens, the manifest says {shard.tokens}{mend}"
        )
    highest = int(_sample(tokens).max(initial=0))
    if highest >= shards.vocab_size:
        raise DataError(
            f"{name} holds the token id {highest}, outside the vocabulary of {shards.vocab_size}: "
            f"it was written with another tokeniser{mend}"
        )
    return tokens


@dataclass(frozen=True)
class _Layout:
    """Where in a file the tokens are."""

    dtype: np.dtype[Any]
    start: int
    tokens: int


def _layout(head: bytes, size: int) -> _Layout:
    """The layout of a shard of `size` bytes that begins with `head`; ValueError if it is none."""
    if head.startswith(np.lib.format.MAGIC_PREFIX):
        layout = _layout_of_npy(head)
    elif head[:4] == np.int32(LLMC_MAGIC).tobytes():
        header = np.frombuffer(head[: 4 * LLMC_HEADER_INTS], dtype="<i4")
        if len(header) < LLMC_HEADER_INTS:
            raise ValueError("its header is cut off")
        if header[1] != LLMC_VERSION:
            raise ValueError(f"version {header[1]} of llm.c's format; only {LLMC_VERSION} is known")
        layout = _Layout(DTYPE, header.nbytes, int(header[2]))
    elif size == 0 or size % 2:
        raise ValueError(f"{size} bytes are no whole number of uint16 tokens")
    else:
        layout = _Layout(DTYPE, 0, size // 2)
    held = (size - layout.start) / layout.dtype.itemsize
    if held != layout.tokens:
        raise ValueError(f"its header says {layout.tokens} tokens, the file has {held:g}")
    return layout


def _layout_of_npy(head: bytes) -> _Layout:
    file = io.BytesIO(head)
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"version {version} of numpy's format")
    shape, _, dtype = read[version](file)
    if dtype not in (np.dtype("<u2"), np.dtype("<u4")) or len(shape) != 1:
        raise ValueError(f"{len(shape)}-dimensional {dtype}; needed: uint16 or uint32")
    return _Layout(dtype, file.tell(), int(shape[0]))


def _foreign_shard(storage: Storage, name: str, size: int, split: Split) -> Shard:
    """A shard without a manifest; its digest is of its size, its beginning and its end."""
    try:
        head = storage.read(name, 0, min(size, HEAD_BYTES))
        layout = _layout(head, size)
        tail = storage.read(name, max(0, size - HEAD_BYTES), size)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(_no_shard(storage.full(name), error)) from error
    digest = hashlib.sha256(b"%d " % size + head + tail).hexdigest()
    return Shard(name, split, layout.tokens, size, digest)


def _wrong_sum(file: BufferedReader, shard: Shard) -> str | None:
    whole = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    return None if whole else "its SHA-256 is not that of the manifest"


def _require_room(shards: Catalog) -> None:
    """The cache must hold the validation split, the shard in use and the one after it."""
    limit = shards.storage.cache.limit_bytes
    train = sorted((shard.bytes for shard in shards.of("train")), reverse=True)
    needed = sum(shard.bytes for shard in shards.of("val")) + sum(train[:2])
    if limit is not None and needed > limit:
        raise DataError(
            f"cache_gb={limit / 1e9:g} is too small for {shards.storage}: its validation split and "
            f"two training shards take {needed / 1e9:.3g} GB; use --cache_gb "
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


def _no_shard(name: str, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return f"{name} is truncated, damaged or no shard ({reason})"


def _missing(storage: Storage) -> str:
    unfinished = not storage.is_glob and storage.read_if_any(PROGRESS) is not None
    if storage.path is None and unfinished:
        return f"no {MANIFEST} in {storage}, but a {PROGRESS}: it is unfinished"
    if storage.path is None:
        return f"no training data in {storage.root}"
    if unfinished:
        begun = _begun_with(storage.path)
        return f"{storage} is unfinished: it has no {MANIFEST}; go on with: {begun}"
    return f"no training data in {storage.root}; make it with: {command(storage.path)}"


def _begun_with(folder: Path) -> str:
    """The command that began an unfinished folder, as its journal has it."""
    try:
        begun = str(json.loads((folder / PROGRESS).read_text())["command"])
    except (OSError, ValueError, KeyError, TypeError):
        return command(folder)
    return begun
