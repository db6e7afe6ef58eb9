"""The corpora that `gpt2 data` knows by name, and those of the hub and of local files.

A new corpus is an entry of CORPORA; where `hub` does not read it, its documents come from a file of
its own.
"""

import logging
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt2.base.control_characters import printable
from gpt2.base.errors import DataError
from gpt2.base.text import counted
from gpt2.data import fields, files, readers, remote, streams
from gpt2.data.corpus import BadLines, Corpus, Document, in_blocks
from gpt2.data.files import FoundFiles

logger = logging.getLogger(__name__)


def python_stdlib(skip: int = 0) -> Iterator[Document]:
    """The running Python's own standard library, one document per `.py` file, sorted by path."""
    for path in _stdlib_files()[skip:]:
        content = path.read_bytes()
        text = content.decode("utf-8", errors="replace")
        yield Document(text, replaced=text.encode() != content)


def hub(
    name: str,
    repo: str,
    config: str | None = None,
    *,
    split: str = "train",
    text_field: str | None = "text",
    streaming: bool = True,
    tokens_per_shard: int = 100_000_000,
    val_tokens: int | None = None,
) -> Corpus:
    """A data set of the Hugging Face hub or in a local folder; `repo` is its name in `datasets`.

    Without a `text_field`, it is the usual one that the first record has.
    """

    def documents(skip: int) -> Iterator[Document | BadLines]:
        return _records(
            repo, skip, text_field, path=repo, name=config, split=split, streaming=streaming
        )

    source = " ".join(filter(None, (repo, config, split, text_field or fields.USUAL[0])))
    return Corpus(name, source, tokens_per_shard, in_blocks(documents), val_tokens)


VAL_TOKENS = 10_000_000


def local_files(name: str, patterns: Sequence[str], *, text_field: str | None = None) -> Corpus:
    """Files of one kind, in sorted order; a `.txt` file is one document.

    Without a `text_field`, it is the usual one that the first record has. Raises DataError if no
    file matches, a file cannot be training data, or no field is the text.
    """
    return of_files(name, " ".join(patterns), files.find(patterns), text_field)


def of_files(name: str, described: str, found: FoundFiles, text_field: str | None) -> Corpus:
    """As `local_files`, for files that have been found."""
    field = readers.choose_field(found.paths, found.kind, text_field)
    source = f"{len(found.paths)} files {described} {field or 'text'} {found.fingerprint}"
    return Corpus(
        name,
        source,
        100_000_000,
        readers.blocks(found.paths, found.kind, field),
        VAL_TOKENS,
        size=lambda: sum(streams.size(path) for path in found.paths),
    )


NOT_DATA = ("dataset_info.json", "dataset_dict.json", "state.json")
"""what the `datasets` library writes beside the data"""
CACHED = re.compile(r"cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow")
"""names of what `map` and `filter` of that library leave beside the data"""
MOST_NAMES = 6
"""of files that a message lists"""
SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""words in the name of a file or folder that say to which split it belongs"""


@dataclass(frozen=True)
class SplitOfFolder:
    """The files of a split in a folder that may be a data set, by their names relative to it."""

    split: str
    files: tuple[str, ...]
    others: tuple[str, ...]
    """files of other splits"""

    def shown(self) -> str:
        """`2 files (a.jsonl, b.jsonl), not 1 file (c.jsonl): --split chooses another split`."""
        shown = _some(self.files)
        if self.others:
            shown += f", not {_some(self.others)}: --split chooses another split"
        return shown


def find_in_folder(folder: Path, split: str) -> SplitOfFolder | None:
    """None where it is not clear which files are the split. Raises DataError for a folder that has
    other splits alone."""
    below = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    data = [
        file
        for file in below
        if files.kind_of(file) in files.KINDS.values()
        and not file.endswith(NOT_DATA)
        and not remote.is_hidden(file)
        and not CACHED.fullmatch(os.path.basename(file))
    ]
    if not data:
        return None
    named = {file: _split_of(file) for file in data}
    if not any(named.values()):
        named = dict.fromkeys(data, "train")
    chosen = tuple(file for file in data if named[file] == split)
    others = tuple(file for file in data if named[file] != split)
    if len({files.kind_of(file) for file in chosen}) > 1:
        return None
    if not chosen:
        known = ", ".join(sorted(set(filter(None, named.values()))))
        raise DataError(
            f"{folder} has no file of the split {split}; choose one of {known} with --split"
        )
    return SplitOfFolder(split, chosen, others)


def of_folder(name: str, folder: Path, found: SplitOfFolder, text_field: str | None) -> Corpus:
    """The corpus of a split, identified as `hub` identifies it."""
    checked = files.find([str(folder / file) for file in found.files])
    source = " ".join((str(folder), found.split, text_field or fields.USUAL[0]))
    return replace(of_files(name, str(folder), checked, text_field), source=source)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:MOST_NAMES])
    more = ", …" if len(names) > MOST_NAMES else ""
    return f"{counted(len(names), 'file')} ({shown}{more})"


def _split_of(file: str) -> str | None:
    words = re.split(r"[^a-z]+", file.lower())
    return next((split for split, known in SPLITS.items() if set(known) & set(words)), None)


def find(name: str) -> Corpus | None:
    """The corpus of that name, or None; hyphens and underscores are equivalent."""
    return CORPORA.get(name.replace("-", "_"))


def _records(
    source: str, skip: int, text_field: str | None, **options: Any
) -> Iterator[Document | BadLines]:
    """Documents after the first `skip`, loaded by the `datasets` library.

    Raises DataError if they cannot be loaded or a record has no text.
    """
    import datasets  # takes seconds, and only this function uses it

    try:
        records = datasets.load_dataset(**options)
        for number, record in enumerate(records.skip(skip) if skip else records, skip):
            place = f"{source}: record {number}"
            text_field = text_field or fields.choose(list(record), None, place)
            yield readers.from_record(record, text_field, place)
    except DataError:
        raise
    except Exception as error:  # the library and its readers have no common class of errors
        logger.debug("cannot read %s", source, exc_info=True)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"cannot read {source}: {reason[0]}") from error


def _stdlib_files() -> list[Path]:
    root = sysconfig.get_paths()["stdlib"]
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted((path for path in files if path.is_file()), key=Path.as_posix)


PYTHON_STDLIB = Corpus(
    name="python_stdlib",
    source="the running Python's standard library",
    tokens_per_shard=1_000_000,
    blocks=in_blocks(python_stdlib),
    size=lambda: len(_stdlib_files()),
    embedded=True,
)
CORPORA = {
    corpus.name: corpus
    for corpus in (
        PYTHON_STDLIB,
        replace(PYTHON_STDLIB, name="python_stdlib_4k", vocab_size=4096),
        hub("fineweb_edu", "HuggingFaceFW/fineweb-edu", "sample-10BT"),
        hub("fineweb", "HuggingFaceFW/fineweb", "sample-10BT"),
        hub("openwebtext", "Skylion007/openwebtext"),
        hub("tinystories", "roneneldan/TinyStories", tokens_per_shard=10_000_000),
        hub(
            "wikitext_103", "Salesforce/wikitext", "wikitext-103-raw-v1", tokens_per_shard=1_000_000
        ),
    )
}
