"""`manifest.json`: what the shards of a folder are, and the tokenizer that wrote them."""

import glob
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote

from gpt2.base import atomic_files, json_fields
from gpt2.base.control_characters import printable
from gpt2.base.errors import DataError
from gpt2.data import hints, tokenizer, tokenizer_files
from gpt2.data.remote import Storage
from gpt2.data.tokenizer import GPT2_TOKENIZER, Tokenizer

Split = Literal["train", "val"]
MANIFEST, PROGRESS = "manifest.json", "progress.json"
WAY_OUT = "put it back as it was, or prepare the shards again with --overwrite"
NAMING = "file names must have train or val as a word, as in train.bin and x_val_000000.npy"


@dataclass(frozen=True)
class Shard:
    """One shard: its file, relative to the folder, and its expected content."""

    file: str
    split: Split
    tokens: int
    bytes: int
    sha256: str | None
    """None as long as nothing has read a shard that has no manifest"""
    text_bytes: int | None = None
    """UTF-8 bytes of its text; None without a manifest, and in those of earlier versions"""

    def require_inside(self, folder: Path | None, source: object) -> None:
        """Raises DataError if the file lies outside `folder`, or outside that of a remote `source`,
        which lists it: it would be read, downloaded or removed, though another user may have
        written the list."""
        if reason := _outside(self.file, folder):
            raise DataError(f"{source} lists {printable(self.file)}, {reason}; {WAY_OUT}")


@dataclass(frozen=True)
class Manifest:
    """What `gpt2 data` wrote. It is written last: a folder that has one is complete."""

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
    """documents with something that cannot be decoded and became U+FFFD"""
    version: str
    """version of this package that wrote it"""
    shards: tuple[Shard, ...]
    bad_lines: int = 0
    """lines of the source that could not be read and were left out"""
    tokenizer_digest: str | None = None
    """identity of the tokenizer, a copy of which is beside the manifest; None for GPT-2's"""

    def write(self, folder: Path) -> None:
        atomic_files.write_text(folder / MANIFEST, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, storage: Storage) -> "Manifest":
        """Raises DataError, with the command to use, if it is missing or damaged."""
        content, source = storage.read_if_any(MANIFEST), storage.full(MANIFEST)
        if content is None:
            raise DataError(missing(storage))
        try:
            manifest = json_fields.from_json(cls, json_fields.parse(content), source)
        except (ValueError, TypeError) as error:
            raise DataError(f"{source} cannot be read ({error}){hints.repair(storage)}") from error
        for shard in manifest.shards:
            shard.require_inside(storage.path, source)
        return manifest

    @classmethod
    def find(cls, storage: Storage) -> "Manifest | None":
        """The manifest of a storage; None if there is none.

        Raises DataError if it is damaged, or if the preparation is not finished.
        """
        names = (MANIFEST, PROGRESS)
        if storage.pattern or all(storage.read_if_any(name) is None for name in names):
            return None
        return cls.read(storage)

    def read_tokenizer(self, storage: Storage) -> Tokenizer:
        """The tokenizer of the shards, from its copy in the storage.

        Raises DataError if that is missing, damaged, or not the one that the manifest names.
        """
        if self.tokenizer_digest is None:
            if self.tokenizer == tokenizer.NAME:
                return GPT2_TOKENIZER
            raise DataError(
                f"{storage}: expected tokens of {tokenizer.NAME}, got tokens of {self.tokenizer}"
                f"{hints.repair(storage)}"
            )
        content, source = (
            storage.read_if_any(tokenizer_files.FILE),
            storage.full(tokenizer_files.FILE),
        )
        if content is None:
            raise DataError(f"{source} is missing, with the tokenizer of the shards; {WAY_OUT}")
        try:
            text = content.decode("utf-8", "replace")
            found = tokenizer_files.parse(text, source, self.tokenizer)
        except DataError as error:
            raise DataError(f"{error}; {WAY_OUT}") from error
        if found.identity != self.tokenizer_digest:
            raise DataError(
                f"{source} has changed: expected {self.tokenizer} with the digest "
                f"{self.tokenizer_digest[:12]}…, got {found.identity[:12]}…; {WAY_OUT}"
            )
        return found


def _outside(file: str, folder: Path | None) -> str | None:
    """Why a file of a list lies outside the folder; None if it does not."""
    name = PurePosixPath(unquote(file))  # a server takes %2e for a dot
    if name.is_absolute() or ".." in name.parts:
        return "which is outside its folder"
    try:
        is_name = b"\0" not in os.fsencode(file)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        return "which no file can be called"
    if folder is not None:
        home, place = os.path.realpath(folder), os.path.realpath(folder / file)
        if not Path(place).is_relative_to(home):
            return f"which is a link out of its folder, to {printable(place)}"
    return None


def missing(storage: Storage) -> str:
    """The error message for a storage without a manifest and without shards that can be used."""
    nothing = f"no training data in {storage.root}"
    if storage.pattern:
        if storage.files():
            return f"{nothing}; {NAMING}"
        folders = storage.path is not None and any(map(os.path.isdir, glob.iglob(storage.root)))
        hint = f"; for the shards in its folders, use '{storage.root}/*'" if folders else ""
        return f"no file matches {storage.root}{hint}"
    unfinished = storage.read_if_any(PROGRESS) is not None
    if unfinished and storage.path is None:
        return f"{storage} is unfinished: it has a {PROGRESS}, but no {MANIFEST}"
    if unfinished and storage.path is not None:
        command = hints.resume_command(storage.path / PROGRESS)
        return f"{storage} is unfinished: no {MANIFEST}; continue with: {command}"
    if any(name.endswith((".npy", ".bin")) for name in storage.files()):
        return f"no {MANIFEST} in {storage}; without one, {NAMING}"
    if storage.path is None:
        return nothing
    if storage.path.is_file():
        return (
            f"expected a folder of shards, got the file {storage}; name its folder, or put a glob "
            "into quotes"
        )
    return f"{nothing}; make it with: {hints.prepare_command(storage.path)}"
