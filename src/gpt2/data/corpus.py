"""What a corpus is: a named source of text, in blocks that worker processes read.

Those with a name are in `gpt2.data.corpora`, files of the user's own in `gpt2.data.readers`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

BLOCK_CHARACTERS = 500_000
"""in a block, about: enough to make the overhead of a task negligible"""


class Place(NamedTuple):
    """Where a block begins, from which a preparation continues."""

    file: int = 0
    """number of the file"""
    number: int = 0
    """number of the block in its file; without files, of its first document"""


@dataclass(frozen=True)
class Document:
    """One text, or the rest of the one before it.

    `replaced` says whether it had what cannot be decoded and became U+FFFD; of a text in several
    parts, one says it.
    """

    text: str
    replaced: bool = False
    continues: bool = False
    """whether it is the rest of the document before it"""


@dataclass(frozen=True)
class BadLines:
    """Lines or rows that cannot be read and are left out."""

    reason: str
    """begins with the file and the number of the first one"""
    count: int = 1


Cut = re.Pattern[str] | None
"""where a text may be divided: `exact_cut` of the tokenizer that encodes it"""


class Content(Protocol):
    """What a block holds. It is pickled for a worker process, which reads its documents."""

    @property
    def size(self) -> int:
        """Characters or bytes of text, about."""

    def documents(self) -> Iterator[Document | BadLines]:
        """Raises DataError for what ends the preparation."""


@dataclass(frozen=True)
class Block:
    """Consecutive documents of a corpus."""

    place: Place
    content: Content
    done: int
    """how much of the corpus' `size` is read with it"""


Blocks = Callable[[Place, Cut], Iterator[Block]]
"""The blocks of a corpus from a place on. A text that is larger than a block is divided at cuts."""


@dataclass(frozen=True)
class Corpus:
    """A named source of text, which is the same in the same order each time."""

    name: str
    source: str
    """where the text comes from; name and source identify the corpus"""
    tokens_per_shard: int
    blocks: Blocks
    val_tokens: int | None = None
    """tokens of the validation split, at most a tenth of the corpus; None is exactly one shard"""
    size: Callable[[], int | None] = lambda: None
    """number of documents, or bytes of all files, if it is known without reading them"""
    embedded: bool = False
    """whether every machine has it, so that a run can prepare it without a download"""
    vocab_size: int | None = None
    """entries of the tokenizer that is learned from it; None is GPT-2's tokenizer"""


@dataclass(frozen=True)
class Documents:
    """Documents that the main process has read: the content of a block."""

    items: tuple[Document | BadLines, ...]

    @property
    def size(self) -> int:
        return sum(len(item.text) for item in self.items if isinstance(item, Document))

    def documents(self) -> Iterator[Document | BadLines]:
        return iter(self.items)


def in_blocks(documents: Callable[[int], Iterator[Document | BadLines]]) -> Blocks:
    """The blocks of a corpus without files of ours; `documents(n)` are those after the first n."""

    def blocks(place: Place, _: Cut) -> Iterator[Block]:
        number = place.number
        for content in grouped(documents(number)):
            done = number + len(content.items)
            yield Block(Place(0, number), content, done)
            number = done

    return blocks


def grouped(documents: Iterator[Document | BadLines]) -> Iterator[Documents]:
    """The documents in groups of about BLOCK_CHARACTERS."""
    group: list[Document | BadLines] = []
    characters = 0
    for item in documents:
        group.append(item)
        characters += len(item.text if isinstance(item, Document) else item.reason)
        if characters >= BLOCK_CHARACTERS:
            yield Documents(tuple(group))
            group, characters = [], 0
    if group:
        yield Documents(tuple(group))
