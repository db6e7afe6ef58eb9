"""Token shards on disk: ours and other people's, checked at opening, read from memory maps.

Three formats: `.npy` (uint16 or uint32), llm.c's `.bin` (256 int32 of header, then uint16; as
modded-nanogpt writes it too) and nanoGPT's `train.bin` and `val.bin` (uint16 and nothing else).
"""

import glob
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpt2 import atomic, tokenizer
from gpt2.data import corpora
from gpt2.data.order import Rows
from gpt2.errors import DataError

Split = Literal["train", "val"]
Tokens = npt.NDArray[np.unsignedinteger[Any]]
DTYPE = np.dtype("<u2")
MANIFEST, PROGRESS = "manifest.json", "progress.json"
LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER_INTS = 20240520, 1, 256
SAMPLED_IDS = 4096
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
    def read(cls, folder: Path) -> "Manifest":
        """Raises DataError, with the command that helps, if there is none or it is damaged."""
        path = folder / MANIFEST
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            shards = tuple(Shard(**shard) for shard in values.pop("shards"))
            return cls(**values, shards=shards)
        except FileNotFoundError:
            raise DataError(_missing(folder)) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); "
                f"make it again with: {command(folder, again=True)}"
            ) from error


@dataclass(frozen=True)
class Catalog:
    """The shards that a run trains on, whoever wrote them."""

    folder: Path
    shards: tuple[Shard, ...]
    vocab_size: int
    ours: bool
    """whether there is a command that makes these shards"""

    def of(self, split: Split) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.of(split))

    def fingerprint(self) -> str:
        """Identity of the training data: the same for the same tokens in the same order."""
        sums = " ".join(shard.sha256 for shard in self.of("train"))
        return hashlib.sha256(sums.encode()).hexdigest()[:16]


def catalog(root: Path) -> Catalog:
    """The shards of a folder or a glob, by its manifest, or by the names of foreign files.

    Raises DataError if there are none, they are unfinished, or one is no shard.
    """
    if (root / MANIFEST).exists() or (root / PROGRESS).exists():
        manifest = Manifest.read(root)
        if manifest.tokenizer != tokenizer.NAME:
            raise DataError(
                f"{root} was tokenised with {manifest.tokenizer}, runs use {tokenizer.NAME}; "
                f"make it again with: {command(root, again=True)}"
            )
        return Catalog(root, manifest.shards, manifest.vocab_size, ours=True)
    folder, files = _foreign_files(root)
    shards = [_foreign_shard(folder, file) for file in files]
    if not shards:
        raise DataError(_missing(root))
    return Catalog(folder, tuple(shards), tokenizer.VOCAB_SIZE, ours=False)


class ShardSet:
    """The shards of one split as rows of `block_size` tokens, memory-mapped.

    A shard gives `(tokens - 1) // block_size` rows; row r is the inputs [r*T, r*T + T) with the
    targets one further on. Raises DataError, naming the file, for a missing or truncated shard, ids
    outside the vocabulary, and a shard too short for one row (but for a last one, which holds what
    is left of a corpus and may give none).
    """

    def __init__(self, shards: Catalog, split: Split, block_size: int) -> None:
        self.block_size = block_size
        self.shards = shards.of(split)
        if not self.shards:
            raise DataError(
                f"{shards.folder} has no {split} shard: its files need {split!r} as a part of "
                f"their names, as in name_{split}_000000.npy or {split}.bin"
            )
        self._tokens = [_open(shards, shard) for shard in self.shards]
        self.rows_per_shard = tuple((len(part) - 1) // block_size for part in self._tokens)
        for shard, rows in zip(self.shards, self.rows_per_shard, strict=True):
            if rows == 0 and (len(self.shards) == 1 or shard is not self.shards[-1]):
                raise DataError(
                    f"{shards.folder / shard.file} has {shard.tokens} tokens, too few for one row "
                    f"of block_size={block_size} and its target; use --block_size "
                    f"{max(1, shard.tokens - 1)} or less, or larger shards"
                )

    def read(self, rows: Rows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets of `rows`, each (B, T) int64."""
        length = self.block_size
        tokens = np.empty((len(rows), length + 1), dtype=np.int64)
        for index, (shard, row) in enumerate(rows.tolist()):
            start = row * length
            tokens[index] = self._tokens[shard][start : start + length + 1]
        return tokens[:, :-1], tokens[:, 1:]


def verify(folder: Path, shard: Shard) -> str | None:
    """What is wrong with a shard of ours, by size and SHA-256, or None."""
    path = folder / shard.file
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            return f"{size} bytes instead of {shard.bytes}"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                return "its SHA-256 is not that of the manifest"
    except OSError as error:
        return error.strerror or str(error)
    return None


def load(path: Path) -> Tokens:
    """All tokens of a shard of any format, memory-mapped. Raises DataError if it is none."""
    try:
        return _load_npy(path) if path.suffix == ".npy" else _load_bin(path)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} is truncated, damaged or no shard ({reason})") from error


def command(folder: Path, again: bool = False) -> str:
    """The command that makes `folder`; its name is that of the corpus, by convention."""
    corpus = corpora.find(folder.name)
    name = corpus.name.replace("_", "-") if corpus else "NAME"
    out = "" if corpus and folder == Path("data") / folder.name else f" --out {folder}"
    names = "" if corpus else " (gpt2 data --help lists the names)"
    return f"gpt2 data {name}{out}{' --overwrite' if again else ''}{names}"


def _open(shards: Catalog, shard: Shard) -> Tokens:
    path = shards.folder / shard.file
    way_out = f"; make it again with: {command(shards.folder, again=True)}" if shards.ours else ""
    if not path.exists():
        raise DataError(f"{path} is in the manifest, but it is missing{way_out}")
    try:
        tokens = load(path)
    except DataError as error:
        raise DataError(f"{error}{way_out}") from error
    if len(tokens) != shard.tokens:
        raise DataError(
            f"{path} holds {len(tokens)} tokens, the manifest says {shard.tokens}{way_out}"
        )
    highest = int(_sample(tokens).max(initial=0))
    if highest >= shards.vocab_size:
        raise DataError(
            f"{path} holds the token id {highest}, outside the vocabulary of {shards.vocab_size}: "
            f"it was written with another tokeniser{way_out}"
        )
    return tokens


def _load_npy(path: Path) -> Tokens:
    tokens: Tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    if tokens.dtype not in (np.dtype("<u2"), np.dtype("<u4")) or tokens.ndim != 1:
        raise ValueError(f"{tokens.ndim}-dimensional {tokens.dtype}; needed: uint16 or uint32")
    return tokens


def _load_bin(path: Path) -> Tokens:
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=LLMC_HEADER_INTS)
    if not len(header) or header[0] != LLMC_MAGIC:
        if size == 0 or size % 2:
            raise ValueError(f"{size} bytes are no whole number of uint16 tokens")
        return np.memmap(path, dtype=DTYPE, mode="r")
    start = 4 * LLMC_HEADER_INTS
    if len(header) < LLMC_HEADER_INTS:
        raise ValueError("its header is cut off")
    if header[1] != LLMC_VERSION:
        raise ValueError(f"version {header[1]} of llm.c's format; only {LLMC_VERSION} is known")
    if size != start + 2 * int(header[2]):
        raise ValueError(f"its header says {header[2]} tokens, the file has {(size - start) / 2:g}")
    return np.memmap(path, dtype=DTYPE, mode="r", offset=start)


def _foreign_files(root: Path) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files: of a folder, or of a glob."""
    pattern = str(root)
    if glob.has_magic(pattern):
        folder = Path(pattern[: re.search(r"[*?\[]", pattern).start()])  # type: ignore[union-attr]
        folder = folder if pattern[len(str(folder))] == "/" else folder.parent
        files = [Path(name) for name in glob.glob(pattern, recursive=True)]
    else:
        folder, files = root, [path for path in root.rglob("*") if path.suffix in (".npy", ".bin")]
    return folder, sorted(path for path in files if _split_of(path.relative_to(folder)))


def _foreign_shard(folder: Path, path: Path) -> Shard:
    """A shard without a manifest; its digest is of its size and a sample of its tokens."""
    tokens = load(path)
    digest = hashlib.sha256(f"{len(tokens)} ".encode() + _sample(tokens).tobytes()).hexdigest()
    name = path.relative_to(folder)
    split = _split_of(name)
    assert split is not None
    return Shard(str(name), split, len(tokens), path.stat().st_size, digest)


def _split_of(name: Path) -> Split | None:
    """`train` or `val` as a whole word of the name, not of the folder that was given."""
    for word in reversed(re.split(r"[/_.\-]", str(name).lower())):
        if word in SPLIT_WORDS:
            return SPLIT_WORDS[word]
    return None


def _sample(tokens: Tokens) -> Tokens:
    """Tokens at even distances over the whole shard."""
    count = min(SAMPLED_IDS, len(tokens))
    places = np.arange(count, dtype=np.int64) * len(tokens) // max(count, 1)
    sampled: Tokens = tokens[places].astype("<u4")
    return sampled


def _missing(folder: Path) -> str:
    if (folder / PROGRESS).exists():
        return f"{folder} is unfinished: it has no {MANIFEST}; go on with: {_begun_with(folder)}"
    return f"no training data in {folder}; make it with: {command(folder)}"


def _begun_with(folder: Path) -> str:
    """The command that began an unfinished folder, as its journal has it."""
    try:
        begun = str(json.loads((folder / PROGRESS).read_text())["command"])
    except (OSError, ValueError, KeyError, TypeError):
        return command(folder)
    return begun
