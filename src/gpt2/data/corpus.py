"""What a corpus is: a named source of documents. Those with a name are in `gpt2.data.corpora`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text; `replaced` says whether it had bytes that are not UTF-8 and became U+FFFD."""

    text: str
    replaced: bool = False


@dataclass(frozen=True)
class Corpus:
    """A named source of documents, which are the same in the same order each time."""

    name: str
    source: str
    """where the text comes from; name and source identify the corpus"""
    tokens_per_shard: int
    documents: Callable[[int], Iterator[Document]]
    """the documents after the first n"""
    val_tokens: int | None = None
    """tokens of the validation split, at most a tenth of the corpus; None is exactly one shard"""
    count: Callable[[], int | None] = lambda: None
    """number of documents, if it is known without reading them"""
    embedded: bool = False
    """whether every machine has it, so that a run can prepare it without a download"""
