"""Tokenizers for tests, as the content of `tokenizer.json`."""

from functools import cache
from pydoc_data.topics import topics

from gpt2.data import corpus, tiktoken_encodings, tokenizer_training
from gpt2.data.corpus import Document, Place
from gpt2.data.tokenizer_files import END_OF_TEXT, EXACT_CUT
from gpt2.data.tokenizer_training import Recipe, TrainingTexts


@cache
def trained(pattern: str = "gpt2", entries: int = 1500) -> str:
    """One that the topics of Python's help() trained."""
    blocks = corpus.in_blocks(lambda _: (Document(topics[name]) for name in sorted(topics)))
    recipe = Recipe(entries, pattern, (END_OF_TEXT, "<|pad|>"))
    return tokenizer_training.train(TrainingTexts(blocks(Place(), EXACT_CUT)), recipe)


@cache
def of_70_000_entries() -> str:
    """Every byte, every pair of bytes, and as many of three letters as are missing."""
    letters = bytes(range(ord("a"), ord("z") + 1))
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes([first, second]) for first in range(256) for second in range(256)]
    triples = (bytes([x, y, z]) for x in letters for y in letters for z in letters)
    tokens += [triple for triple, _ in zip(triples, range(70_000 - 1 - len(tokens)), strict=False)]
    ranks = {token: number for number, token in enumerate(tokens)}
    content: str = tiktoken_encodings.build(ranks, {END_OF_TEXT: 69_999}, "cl100k").to_str()
    return content
