"""A small tokenizer that is not GPT-2's, and shards of its tokens."""

import hashlib
from pathlib import Path

import numpy as np

import small_tokenizers
from gpt2.data import tokenizer_files
from gpt2.data.manifest import Manifest, Shard, Split
from gpt2.data.tokenizer_files import Tokenizer
from support import small_documents

NAME = "tok/tokenizer.json"
VOCAB_SIZE = 500
ROWS = 512
"""of a model's embedding"""


def trained(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    return tokenizer_files.parse(small_tokenizers.trained("cl100k", vocab_size), NAME)


def prepared(folder: Path, tokenizer: Tokenizer | None = None, corpus: str = "own") -> Path:
    """The folder, with a shard of each split."""
    tokenizer = tokenizer or trained()
    folder.mkdir()
    parts = [[tokenizer.end_of_text, *tokenizer.encode(item.text)] for item in small_documents()]
    splits: dict[Split, list[int]] = {
        "val": parts[0],
        "train": [token for part in parts[1:] for token in part],
    }
    shards = []
    for split, tokens in splits.items():
        file = folder / f"{corpus}_{split}_000000.npy"
        np.save(file, np.array(tokens, np.uint16))
        content = file.read_bytes()
        text_bytes = tokenizer.text_bytes(np.array(tokens))
        digest = hashlib.sha256(content).hexdigest()
        shards.append(Shard(file.name, split, len(tokens), len(content), digest, text_bytes))
    (folder / tokenizer_files.FILE).write_text(tokenizer.content)
    manifest = Manifest(
        corpus=corpus,
        source="some modules",
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        dtype="uint16",
        tokens_per_shard=10**6,
        val_tokens=10**6,
        max_tokens=None,
        documents=len(parts),
        empty_documents=0,
        replaced_documents=0,
        version="",
        shards=tuple(shards),
        tokenizer_digest=tokenizer.identity,
    )
    manifest.write(folder)
    return folder
