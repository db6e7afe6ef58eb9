"""The vocabulary of a nanoGPT data set: `meta.pkl` beside its shards.

Nothing of it is executed: a pickle of anything but plain values is refused before it is loaded.
"""

import hashlib
import io
import json
import pickle
import pickletools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import PurePosixPath
from typing import Any, ClassVar, NoReturn

import numpy as np
import numpy.typing as npt

from gpt2.base.control_characters import printable
from gpt2.base.errors import DataError
from gpt2.base.text import counted
from gpt2.data.remote import Storage
from gpt2.data.tokenizer import GPT2_TOKENIZER, Tokenizer

META_PKL = "meta.pkl"
LARGEST_BYTES = 16 << 20
MOST_TEXTS = 1 << 16
"""what uint16 can number"""
PLAIN_OPCODES = re.compile(
    "PROTO|FRAME|MARK|STOP|(EMPTY_)?(DICT|LIST|TUPLE)|TUPLE[123]|SETITEMS?|APPENDS?|NONE|NEWTRUE"
    "|NEWFALSE|(BIN)?FLOAT|(BIN)?INT[12]?|LONG1?|UNICODE|(SHORT_)?BINUNICODE8?|(LONG_)?BIN(PUT|GET)"
    "|PUT|GET|MEMOIZE"
)
"""those of dicts, lists, texts and numbers, and of references to them, in every protocol"""
WAY_OUT = (
    "if these tokens are GPT-2's, move {source} elsewhere; else write it again as nanoGPT's "
    "data/shakespeare_char/prepare.py does"
)

Vocabulary = tuple[str, ...]
"""the text of each token, by its id"""


class _NotPlain(Exception):
    """Says why a file is not a plain vocabulary."""


def of_shards(storage: Storage, files: Iterable[str]) -> Vocabulary | None:
    """The vocabulary of these files, from the nearest `meta.pkl` in their folder or one above it;
    None if there is none, and the tokens are GPT-2's.

    Raises DataError, naming the file, for one that is not plain, and if files have several ones.
    """

    @cache
    def of_folder(folder: PurePosixPath) -> tuple[str | None, Vocabulary | None]:
        name = str(folder / META_PKL)
        content = storage.read_if_any(name, LARGEST_BYTES + 1)
        if content is not None:
            return storage.full(name), read(content, storage.full(name))
        return of_folder(folder.parent) if folder.parts else (None, None)

    sources = dict[Vocabulary | None, str]()
    for file in sorted(files):
        source, vocabulary = of_folder(PurePosixPath(file).parent)
        sources.setdefault(vocabulary, source or "GPT-2's")
    if len(sources) > 1:
        raise DataError(
            f"{storage} has shards of several vocabularies, {' and '.join(sources.values())}; name "
            "the folder of one of them"
        )
    return next(iter(sources), None)


def read(content: bytes, source: str) -> Vocabulary:
    """The vocabulary in the content of a `meta.pkl`. Raises DataError if it is not plain."""
    try:
        return _checked(_load(content))
    except _NotPlain as error:
        way_out = WAY_OUT.format(source=source)
        raise DataError(f"{source} is not a plain vocabulary: {error}; {way_out}") from error


@dataclass(frozen=True)
class Characters:
    """A `Tokenizer` whose tokens are the texts of a vocabulary, which nanoGPT's are characters."""

    texts: Vocabulary
    name: ClassVar[str] = META_PKL
    end_of_text: ClassVar[None] = None
    exact_cut: ClassVar[re.Pattern[str]] = re.compile("")

    @cached_property
    def identity(self) -> str:
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        return len(self.texts)

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise DataError(
                f"{error.args[0]!r} is not in the vocabulary of {counted(len(self.texts), 'token')}"
            ) from error

    def encode_to_numpy(self, text: str) -> npt.NDArray[np.uint32]:
        return np.array(self.encode(text), np.uint32)

    def decode(self, tokens: list[int]) -> str:
        """Ids outside the vocabulary, as in a damaged shard, become U+FFFD."""
        size = len(self.texts)
        return "".join(self.texts[token] if token < size else "\ufffd" for token in tokens)

    def token_bytes(self, token: int) -> bytes:
        return self.texts[token].encode(errors="surrogatepass")

    def text_bytes(self, tokens: npt.NDArray[np.integer[Any]]) -> int:
        return int(self._byte_lengths[tokens].sum())

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {text: token for token, text in enumerate(self.texts)}

    @cached_property
    def _byte_lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(text.encode(errors="surrogatepass")) for text in self.texts])


def tokenizer_of(vocabulary: Vocabulary | None) -> Tokenizer:
    """The tokeniser of a vocabulary; GPT-2's where it is None."""
    return GPT2_TOKENIZER if vocabulary is None else Characters(vocabulary)


def _load(content: bytes) -> object:
    if len(content) > LARGEST_BYTES:
        raise _NotPlain(f"it is larger than {LARGEST_BYTES >> 20} MiB")
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if not PLAIN_OPCODES.fullmatch(opcode.name):
                raise _NotPlain(f"it holds {_described(opcode.name, argument)}")
            if opcode.name in ("PUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= number:
                raise _NotPlain("it is damaged")  # the unpickler would reserve that much memory
        return _PlainUnpickler(io.BytesIO(content)).load()
    except _NotPlain:
        raise
    except Exception as error:  # both have many kinds, for a file that is damaged or no pickle
        raise _NotPlain("it is truncated, damaged or no pickle") from error


def _described(opcode: str, argument: object) -> str:
    if opcode == "GLOBAL":
        return f"the name of code, {printable(str(argument).replace(' ', '.'))}"
    if opcode in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"):
        return "the name of code"
    return f"more than dicts, lists, texts and numbers ({opcode})"


class _PlainUnpickler(pickle.Unpickler):
    """Loads no code, whatever the opcodes are."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise _NotPlain(f"it holds the name of code, {printable(f'{module_name}.{global_name}')}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _NotPlain("it refers to another file")


def _checked(value: object) -> Vocabulary:
    if not isinstance(value, dict):
        raise _NotPlain(f"expected a dict, got {type(value).__name__}")
    missing = [key for key in ("vocab_size", "itos", "stoi") if key not in value]
    if missing:
        raise _NotPlain(f"it has no {' and no '.join(missing)}")
    size, itos, stoi = value["vocab_size"], value["itos"], value["stoi"]
    if type(size) is not int or not 0 < size <= MOST_TEXTS:
        raise _NotPlain(f"expected a vocab_size of 1 to {MOST_TEXTS}, got {size!r:.40}")
    if not (isinstance(itos, dict) and all(type(key) is int for key in itos)):
        raise _NotPlain("expected itos to be a dict with whole numbers as keys")
    if itos.keys() != set(range(size)):
        raise _NotPlain(f"expected itos to have the keys 0 to {size - 1}")
    vocabulary = tuple(itos[token] for token in range(size))
    if not all(type(text) is str and text for text in vocabulary):
        raise _NotPlain("expected itos to have texts as values")
    if stoi != {text: token for token, text in itos.items()}:
        raise _NotPlain("expected stoi to be the reverse of itos")
    return vocabulary
