"""The corpora of a run, and the rows of all of them together.

Shards are numbered corpus after corpus, in the order of the names.
"""

import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from gpt2.base.errors import DataError
from gpt2.data import saved_tokenizer, shards
from gpt2.data.cache import ShardCache
from gpt2.data.digests import Fault
from gpt2.data.manifest import Manifest, Split
from gpt2.data.mixture import corpus_name
from gpt2.data.remote import Storage
from gpt2.data.sampler import Rows, Shuffle
from gpt2.data.shards import DatasetIndex, Fingerprint, TokenDataset, load_index
from gpt2.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
UNNAMED = ""
"""the name of the corpus of a run that is no mixture"""


@dataclass(frozen=True)
class TrainingData:
    """The shards of each corpus, by its name, in the order of the names."""

    corpora: Mapping[str, DatasetIndex]

    def __str__(self) -> str:
        return ", ".join(str(index.storage) for index in self.corpora.values())

    @property
    def is_mixture(self) -> bool:
        return UNNAMED not in self.corpora

    @property
    def validated(self) -> list[str]:
        """The names of the corpora with a validation split."""
        return [name for name, index in self.corpora.items() if name and index.of("val")]

    @property
    def tokenizer(self) -> Tokenizer:
        """Of all corpora."""
        return next(iter(self.corpora.values())).tokenizer

    def tokens(self, split: Split) -> int:
        return sum(index.tokens(split) for index in self.corpora.values())

    def shard_count(self, split: Split) -> int:
        return sum(len(index.of(split)) for index in self.corpora.values())

    def changed(self, change: Callable[[DatasetIndex], DatasetIndex]) -> "TrainingData":
        """The data with the changed index of each corpus."""
        return TrainingData({name: change(index) for name, index in self.corpora.items()})

    def fingerprints(self) -> Fingerprint | dict[str, Fingerprint]:
        """As a checkpoint has them: by name of corpus, if the corpora have names."""
        found = {name: index.fingerprint() for name, index in self.corpora.items()}
        return found if self.is_mixture else found[UNNAMED]

    def fault(self) -> tuple[str, Fault] | None:
        """The first fault that this process has noticed, and the name of its corpus."""
        for name, index in self.corpora.items():
            if index.content.fault is not None:
                return name, index.content.fault
        return None

    def report(self, fault: Fault) -> None:
        """Reports a fault that no shard is known to have."""
        next(iter(self.corpora.values())).content.report(fault)

    def on_fault(self, act: Callable[[], None]) -> None:
        for index in self.corpora.values():
            index.content.on_fault = act


def load(roots: Mapping[str, str], cache: ShardCache | None = None) -> TrainingData:
    """The data in these folders, globs or URLs, by name of corpus.

    Raises DataError as `load_index` does, and if the corpora have tokens of different tokenizers.
    """
    found = {name: load_index(Storage(root), cache) for name, root in sorted(roots.items())}
    (first, one), *others = found.items()
    for name, index in others:
        if index.tokenizer.identity != one.tokenizer.identity:
            ours, theirs = map(saved_tokenizer.described, (one.tokenizer, index.tokenizer))
            raise DataError(
                f"the corpora have tokens of different tokenizers: {first} has those of {ours}, "
                f"{name} those of {theirs}; prepare them with the same --tokenizer"
            )
    return TrainingData(found)


def folders_of(root: str) -> dict[str, str]:
    """The folders that a glob or a folder of folders stands for, by name of corpus; empty if it is
    for one corpus.

    Each folder with training shards is a corpus, if there are several of them, and one at least has
    validation shards, too. A folder of which all shards of the manifest are among these has its
    manifest used. Raises DataError if two folders have the same name.
    """
    storage, files = Storage(root), _files_by_folder(root)
    if not _are_corpora(files):
        return {}
    last = (storage.pattern or "*").rpartition("/")[2].replace("**", "*")
    found = dict[str, str]()
    for folder, splits in files.items():
        name, whole = corpus_name(storage.full(folder)), Storage(storage.full(folder))
        if "train" not in splits.values():
            logger.warning("%s has validation shards alone, which are left out", whole)
            continue
        if name in found:
            raise DataError(
                f"{root} has two folders that would both be the corpus {name}; use --data_root "
                "NAME=FOLDER for each of them"
            )
        manifest = Manifest.find(whole)
        is_whole = manifest and {shard.file for shard in manifest.shards} <= splits.keys()
        levels = "*/" * max(file.count("/") for file in splits)
        found[name] = whole.root if is_whole else whole.full(levels + last)
    return found


def has_several_corpora(root: str) -> bool:
    """Whether `folders_of` has any, also if names are not unique."""
    return _are_corpora(_files_by_folder(root))


def _files_by_folder(root: str) -> dict[str, dict[str, Split]]:
    """The shards in each folder, with their splits; empty for a folder that has a manifest."""
    storage = Storage(root)
    found = dict[str, dict[str, Split]]()
    if not root or Manifest.find(storage) is not None:
        return found
    for file, _, split in shards.files_by_name(storage):
        folder = PurePosixPath(file).parent
        if shards.split_of(folder.name):  # a corpus with a folder for each split
            folder = folder.parent
        name = str(PurePosixPath(file).relative_to(folder))
        found.setdefault(str(folder), {})[name] = split
    return found


def _are_corpora(files: Mapping[str, Mapping[str, Split]]) -> bool:
    with_training = [set(of.values()) for of in files.values() if "train" in of.values()]
    return len(with_training) > 1 and any("val" in splits for splits in with_training)


class MixedDataset:
    """The rows of one split of all corpora, each of which is a `TokenDataset`."""

    def __init__(
        self, data: TrainingData, split: Split, block_size: int, shuffle: Shuffle = "shards"
    ) -> None:
        """Raises DataError as `TokenDataset` does."""
        if split == "train":
            shards.require_room(list(data.corpora.values()), shuffle)
        self.block_size = block_size
        self.corpora = {
            name: TokenDataset(index, split, block_size, shuffle)
            for name, index in data.corpora.items()
        }
        self._parts = list(self.corpora.values())
        counts = (len(part.shards) for part in self._parts)
        self._first_shards = (0, *itertools.accumulate(counts))

    @property
    def rows_per_shard(self) -> dict[str, tuple[int, ...]]:
        """By name of corpus."""
        return {name: part.rows_per_shard for name, part in self.corpora.items()}

    def read(
        self, rows: Rows, stop: threading.Event | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets of `rows`, each (B, T) int64; errors are those of `TokenDataset`."""
        if len(self._parts) == 1:
            return self._parts[0].read(rows, stop)
        inputs = np.empty((len(rows), self.block_size), dtype=np.int64)
        targets = np.empty_like(inputs)
        corpora = np.searchsorted(self._first_shards, rows[:, 0], side="right") - 1
        for corpus in np.unique(corpora).tolist():
            here = corpora == corpus
            of_corpus = rows[here] - (self._first_shards[corpus], 0)
            inputs[here], targets[here] = self._parts[corpus].read(of_corpus, stop)
        return inputs, targets

    def prefetch(self, shard: int) -> None:
        """Starts to download a shard in the background, unless it is open."""
        corpus = int(np.searchsorted(self._first_shards, shard, side="right")) - 1
        self._parts[corpus].prefetch(shard - self._first_shards[corpus])
