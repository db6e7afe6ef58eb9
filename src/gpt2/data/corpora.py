"""Where documents come from. A new corpus is one function and one row of CORPORA."""

import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2.errors import DataError


@dataclass(frozen=True)
class Document:
    """One text; `replaced` says that it had bytes which are no UTF-8 and became U+FFFD."""

    text: str
    replaced: bool = False


@dataclass(frozen=True)
class Corpus:
    """A named source of documents, always in the same order."""

    name: str
    source: str
    """where the text comes from, for the manifest"""
    tokens_per_shard: int
    documents: Callable[[], Iterator[Document]]
    count: Callable[[], int | None] = lambda: None
    """how many documents there are, where that is cheap to know"""
    embedded: bool = False
    """whether it is on every machine, so that a run may prepare it by itself"""


def python_stdlib() -> Iterator[Document]:
    """The running Python's own standard library, a document per `.py` file, sorted by path."""
    for path in _stdlib_files():
        content = path.read_bytes()
        text = content.decode("utf-8", errors="replace")
        yield Document(text, replaced=text.encode() != content)


def hugging_face(
    repo: str, name: str | None, split: str, field: str = "text"
) -> Iterator[Document]:
    """Documents of a data set on the Hugging Face hub (or in a local folder), streamed.

    Raises DataError if it cannot be loaded or a record lacks the text field.
    """
    import datasets  # heavy, and needed here only

    try:
        records = datasets.load_dataset(repo, name, split=split, streaming=True)
        for number, record in enumerate(records):
            text = record.get(field)
            if not isinstance(text, str):
                raise DataError(
                    f"{repo}: record {number} has no text in field {field!r}; "
                    f"fields: {', '.join(record)}"
                )
            yield Document(text)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {repo} from the Hugging Face hub: {error}") from error


def find(name: str) -> Corpus | None:
    """The corpus of that name, hyphens and underscores alike."""
    return CORPORA.get(name.replace("-", "_"))


def _stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _stdlib_files() -> list[Path]:
    root = _stdlib_root()
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    files = [
        path
        for path in root.rglob("*.py")
        if path.is_file() and skipped.isdisjoint(path.relative_to(root).parts)
    ]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


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
        Corpus(
            name="fineweb_edu",
            source="HuggingFaceFW/fineweb-edu, sample-10BT",
            tokens_per_shard=100_000_000,
            documents=lambda: hugging_face("HuggingFaceFW/fineweb-edu", "sample-10BT", "train"),
        ),
    )
}
