"""Text out of a shard: a number of its tokens, divided where documents begin."""

from dataclasses import dataclass

from gpt2.data import token_stream
from gpt2.data.shards import DatasetIndex
from gpt2.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """A document, or the part of one that an excerpt holds."""

    is_beginning: bool
    """whether an <|endoftext|> stands before it, with which a document begins"""
    text: str


@dataclass(frozen=True)
class Excerpt:
    """Consecutive tokens of a shard as text."""

    shard: int
    """its number in the index"""
    file: str
    first_token: int
    tokens: int
    pieces: tuple[Piece, ...]


def read(index: DatasetIndex, number: int, start: int, count: int) -> Excerpt:
    """`count` tokens of shard `number` from `start` on, fewer at its end.

    Raises DataError as `token_stream.read` does.
    """
    shard = index.shards[number]
    tokens = token_stream.read(index.storage, shard, start, count).tolist()
    return Excerpt(number, shard.file, start, len(tokens), divided(tokens, index.tokenizer))


def divided(tokens: list[int], tokenizer: Tokenizer) -> tuple[Piece, ...]:
    """The texts between the <|endoftext|>, if the tokeniser has one.

    What stands before the first one is left out if it is empty.
    """
    marks = [at for at, token in enumerate(tokens) if token == tokenizer.end_of_text]
    starts, ends = [0, *(at + 1 for at in marks)], [*marks, len(tokens)]
    texts = [tokenizer.decode(tokens[start:end]) for start, end in zip(starts, ends, strict=True)]
    pieces = [Piece(at > 0, text) for at, text in enumerate(texts)]
    return tuple(pieces if texts[0] else pieces[1:])
