"""Token shards on disk: the manifest, the checks at opening, and rows read from memory maps."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpt2 import atomic
from gpt2.data import corpora
from gpt2.data.order import Rows
from gpt2.errors import DataError

Split = Literal["train", "val"]
DTYPE = np.dtype("<u2")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One shard of the manifest."""

    file: str
    split: Split
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a data folder holds. It is written last: a folder with one is whole."""

    corpus: str
    source: str
    tokenizer: str
    vocab_size: int
    dtype: str
    tokens_per_shard: int
    documents: int
    replaced_documents: int
    """documents with bytes that are no UTF-8, which became U+FFFD"""
    version: str
    """version of this package that wrote it"""
    shards: tuple[Shard, ...]

    def write(self, folder: Path) -> None:
        atomic.write_text(folder / MANIFEST, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises DataError if there is none or it cannot be read."""
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
                f"make it again with: {_command(folder, again=True)}"
            ) from error

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def fingerprint(self) -> str:
        """Identity of the training data: the same for the same tokens in the same order."""
        sums = [shard.sha256 for shard in self.shards if shard.split == "train"]
        return hashlib.sha256(" ".join(sums).encode()).hexdigest()[:16]


class ShardSet:
    """The shards of one split as rows of `block_size` tokens, memory-mapped.

    A shard gives `(tokens - 1) // block_size` rows; row r is the inputs [r*T, r*T + T) with the
    targets one further on. Raises DataError, naming the file, for a missing or truncated shard, and
    for a context longer than a shard.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: Split, block_size: int) -> None:
        self.block_size = block_size
        self.shards = [shard for shard in manifest.shards if shard.split == split]
        if not self.shards:
            raise DataError(f"{folder} has no {split} shard; make it with: {_command(folder)}")
        self._tokens = [_open(folder, shard, block_size) for shard in self.shards]
        self.rows_per_shard = tuple((len(part) - 1) // block_size for part in self._tokens)

    def read(self, rows: Rows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets of `rows`, each (B, T) int64."""
        length = self.block_size
        tokens = np.empty((len(rows), length + 1), dtype=np.int64)
        for index, (shard, row) in enumerate(rows.tolist()):
            start = row * length
            tokens[index] = self._tokens[shard][start : start + length + 1]
        return tokens[:, :-1], tokens[:, 1:]


def _open(folder: Path, shard: Shard, block_size: int) -> npt.NDArray[np.uint16]:
    path = folder / shard.file
    again = f"make it again with: {_command(folder, again=True)}"
    try:
        tokens: npt.NDArray[np.uint16] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path} is in the manifest, but it is missing; {again}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is truncated or damaged ({error}); {again}") from error
    if tokens.dtype != DTYPE or tokens.shape != (shard.tokens,):
        raise DataError(
            f"{path} holds {tokens.shape} {tokens.dtype}, the manifest says "
            f"({shard.tokens},) {DTYPE}; {again}"
        )
    if len(tokens) <= block_size:
        raise DataError(
            f"{path} has {len(tokens)} tokens, too few for one row of block_size={block_size} and "
            f"its target; use --block_size {max(1, len(tokens) - 1)} or less, or larger shards"
        )
    return tokens


def _missing(folder: Path) -> str:
    if any(folder.glob("*.npy*")):
        return f"{folder} has shards but no {MANIFEST}: it is unfinished; run: {_command(folder)}"
    return f"no training data in {folder}; make it with: {_command(folder)}"


def _command(folder: Path, again: bool = False) -> str:
    """The command that makes `folder`; its name is that of the corpus, by convention."""
    corpus = corpora.find(folder.name)
    name = corpus.name.replace("_", "-") if corpus else "NAME"
    out = "" if corpus and folder == Path("data") / folder.name else f" --out {folder}"
    names = "" if corpus else " (gpt2 data --help lists the names)"
    return f"gpt2 data {name}{out}{' --overwrite' if again else ''}{names}"
