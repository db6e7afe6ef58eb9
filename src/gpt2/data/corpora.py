"""The corpora that `gpt2 data` knows by name, and those of the hub and of local files.

A new corpus is an entry of CORPORA; where `hub` does not read it, its documents come from a file of
its own.
"""

import glob
import hashlib
import itertools
import logging
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2.base.errors import DataError
from gpt2.data.corpus import Corpus, Document

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
    text_field: str = "text",
    streaming: bool = True,
    tokens_per_shard: int = 100_000_000,
    val_tokens: int | None = None,
) -> Corpus:
    """A data set of the Hugging Face hub or in a local folder; `repo` is its name in `datasets`."""

    def documents(skip: int) -> Iterator[Document]:
        return _records(
            repo, skip, text_field, path=repo, name=config, split=split, streaming=streaming
        )

    source = " ".join(filter(None, (repo, config, split, text_field)))
    return Corpus(name, source, tokens_per_shard, documents, val_tokens)


# For each kind of file, its loader in the `datasets` library and the options of that.
FILE_LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "document", "encoding_errors": "replace"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}
COMPRESSIONS = (".gz", ".zst")
VAL_TOKENS = 10_000_000
FINGERPRINT_BYTES = 4096


def local_files(name: str, patterns: list[str], *, text_field: str = "text") -> Corpus:
    """Files of one kind, in sorted order; a `.txt` file is one document.

    Raises DataError if no file matches or the kinds differ.
    """
    matches = itertools.chain.from_iterable(glob.glob(item, recursive=True) for item in patterns)
    files = sorted({os.path.normpath(file) for file in matches if Path(file).is_file()})
    if not files:
        folders = [item for item in patterns if Path(item).is_dir()]
        hint = f"; for the files of a folder use '{Path(folders[0], '*.txt')}'" if folders else ""
        raise DataError(f"no file matches {' '.join(patterns)}{hint}")
    kinds = {_kind(Path(file)) for file in files}
    known = f"{', '.join(FILE_LOADERS)}, each also with {' or '.join(COMPRESSIONS)}"
    if unknown := sorted(kinds - FILE_LOADERS.keys()):
        raise DataError(
            f"files of kind {', '.join(unknown)} cannot be read; expected one of {known}"
        )
    if len(kinds) > 1:
        raise DataError(
            f"expected files of one kind, got {', '.join(sorted(kinds))}; choose one of them"
        )
    loader, options = FILE_LOADERS[kinds.pop()]
    field = "text" if loader == "text" else text_field

    def documents(skip: int) -> Iterator[Document]:
        return _records(
            " ".join(patterns),
            skip,
            field,
            path=loader,
            data_files=files,
            split="train",
            streaming=True,
            **options,
        )

    source = f"{len(files)} files {' '.join(patterns)} {field} {_fingerprint(files)}"
    return Corpus(name, source, 100_000_000, documents, VAL_TOKENS)


def find(name: str) -> Corpus | None:
    """The corpus of that name, or None; hyphens and underscores are equivalent."""
    return CORPORA.get(name.replace("-", "_"))


def _records(source: str, skip: int, text_field: str, **options: Any) -> Iterator[Document]:
    """Documents after the first `skip`, loaded by the `datasets` library.

    Raises DataError if they cannot be loaded or a record has no text.
    """
    import datasets  # takes seconds, and only this function uses it

    try:
        records = datasets.load_dataset(**options)
        for number, record in enumerate(records.skip(skip) if skip else records, skip):
            if text_field not in record:
                raise DataError(
                    f"{source}: record {number} has no field {text_field!r}; choose one of "
                    f"{', '.join(record)} with --text_field"
                )
            text = "" if record[text_field] is None else record[text_field]  # an empty document
            if not isinstance(text, str):
                raise DataError(
                    f"{source}: record {number}: expected text in field {text_field!r}, got "
                    f"{type(text).__name__}; choose one of {', '.join(record)} with --text_field"
                )
            yield Document(text, replaced="\ufffd" in text)
    except DataError:
        raise
    except Exception as error:  # the library and its readers have no common class of errors
        logger.debug("cannot read %s", source, exc_info=True)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"cannot read {source}: {reason[0]}") from error


def _fingerprint(files: list[str]) -> str:
    """Digest of the sizes, beginnings and ends of files: other files of the same names differ."""
    digest = hashlib.sha256()
    for name in files:
        with open(name, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - FINGERPRINT_BYTES))
            end = file.read()
            file.seek(0)
            digest.update(b"%d " % size + file.read(FINGERPRINT_BYTES) + end)
    return digest.hexdigest()[:16]


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _stdlib_files() -> list[Path]:
    root = sysconfig.get_paths()["stdlib"]
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted((path for path in files if path.is_file()), key=Path.as_posix)


CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            name="python_stdlib",
            source="the running Python's standard library",
            tokens_per_shard=1_000_000,
            documents=python_stdlib,
            count=lambda: len(_stdlib_files()),
            embedded=True,
        ),
        hub("fineweb_edu", "HuggingFaceFW/fineweb-edu", "sample-10BT"),
        hub("fineweb", "HuggingFaceFW/fineweb", "sample-10BT"),
        hub("openwebtext", "Skylion007/openwebtext"),
        hub("tinystories", "roneneldan/TinyStories", tokens_per_shard=10_000_000),
        hub(
            "wikitext_103", "Salesforce/wikitext", "wikitext-103-raw-v1", tokens_per_shard=1_000_000
        ),
    )
}
