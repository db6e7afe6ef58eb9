"""Shards as other tools write them: the same bytes, from small texts."""

import pickle
from pathlib import Path

import numpy as np

from gpt2.data import tokenizer

TEXTS = [
    "Fusion joins light nuclei.\n\nIt powers stars: the Sun burns 600 million tons a second.",
    "def area(r):\n    return 3.14159 * r ** 2  # naïve — but it works\n",
    "Ein Satz mit Umlauten: äöüß. 日本語のテキスト。 🙂",
] * 4


def llmc(path: Path, tokens: list[int], *, big_vocabulary: bool = False) -> None:
    """A shard as `write_datafile` of llm.c's dev/data/data_common.py writes it; modded-nanogpt's
    fineweb.py writes the same bytes. `big_vocabulary` is its model_desc of Llama 3."""
    magic, version, dtype = (20240801, 7, np.uint32) if big_vocabulary else (20240520, 1, np.uint16)
    header = np.zeros(256, dtype=np.int32)
    header[0], header[1], header[2] = magic, version, len(tokens)
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(np.array(tokens, dtype=dtype).tobytes())


def llmc_fineweb(folder: Path, shard_size: int, model: str = "edu_fineweb") -> list[int]:
    """The shards of llm.c's dev/data/fineweb.py: each document after an <|endoftext|>, the first
    shard for validation, the last one as long as the rest. Returns all tokens in their order."""
    tokens = [token for text in TEXTS for token in (tokenizer.END_OF_TEXT, *tokenizer.encode(text))]
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(tokens), shard_size)):
        split = "val" if number == 0 else "train"
        shard = tokens[start : start + shard_size]
        llmc(folder / f"{model}_{split}_{number:06d}.bin", shard)
    return tokens


def nanogpt_openwebtext(folder: Path) -> dict[str, list[int]]:
    """`train.bin` and `val.bin` of nanoGPT's data/openwebtext/prepare.py: each document before an
    <|endoftext|>, through a memory map. Returns the tokens of each split."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, texts in {"train": TEXTS[1:], "val": TEXTS[:1]}.items():
        ids = [[*tokenizer.encode(text), tokenizer.END_OF_TEXT] for text in texts]
        length = np.sum([len(document) for document in ids], dtype=np.uint64)
        array = np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="w+", shape=(length,))
        position = 0
        for document in ids:
            array[position : position + len(document)] = document
            position += len(document)
        array.flush()
        splits[split] = [token for document in ids for token in document]
    return splits


def nanogpt_characters(folder: Path, text: str = "\n".join(TEXTS)) -> dict[str, str]:
    """`train.bin`, `val.bin` and `meta.pkl` of nanoGPT's data/shakespeare_char/prepare.py. Returns
    the text of each split."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = sorted(set(text))
    stoi = {character: number for number, character in enumerate(characters)}
    itos = dict(enumerate(characters))
    splits = {"train": text[: int(len(text) * 0.9)], "val": text[int(len(text) * 0.9) :]}
    for split, part in splits.items():
        np.array([stoi[c] for c in part], dtype=np.uint16).tofile(folder / f"{split}.bin")
    meta = {"vocab_size": len(characters), "itos": itos, "stoi": stoi}
    with (folder / "meta.pkl").open("wb") as file:
        pickle.dump(meta, file)
    return splits
