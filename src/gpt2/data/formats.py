"""Where in a file of token shards the tokens are, whoever wrote it.

Three formats: `.npy` (uint16 or uint32), llm.c's `.bin` (256 int32 of header, then uint16; as
modded-nanogpt writes it too) and nanoGPT's `train.bin` and `val.bin` (uint16 and nothing else).
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2.base.errors import DataError

Tokens = npt.NDArray[np.unsignedinteger[Any]]
DTYPE = np.dtype("<u2")
HEAD_BYTES = 4096
"""enough of a file's beginning to know its layout"""
LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER_INTS = 20240520, 1, 256
LLMC_LLAMA3_MAGIC = 20240801


@dataclass(frozen=True)
class Layout:
    """Where in a file the tokens are."""

    dtype: np.dtype[Any]
    start: int
    tokens: int


def layout(name: str, head: bytes, size: int) -> Layout:
    """The layout of a shard of `size` bytes that begins with `head`.

    Raises DataError, naming the file, if it is none.
    """
    try:
        return _layout(name, head, size)
    except ValueError as error:
        raise DataError(f"{name} is truncated, damaged or no shard ({error})") from error


def load(path: Path, name: str | None = None) -> Tokens:
    """All tokens of a shard, memory-mapped. Raises DataError, with `name`, if it is none."""
    name = name or str(path)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        found = layout(name, head, path.stat().st_size)
        return np.memmap(path, found.dtype, "r", found.start, (found.tokens,))
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from error


def _layout(name: str, head: bytes, size: int) -> Layout:
    if name.endswith(".npy") or head.startswith(np.lib.format.MAGIC_PREFIX):
        found = _layout_of_npy(head)
    elif head[:4] == np.int32(LLMC_LLAMA3_MAGIC).tobytes():
        raise ValueError("it holds tokens of Llama 3 in llm.c's format; runs use GPT-2's")
    elif head[:4] == np.int32(LLMC_MAGIC).tobytes():
        header = np.frombuffer(head[: 4 * LLMC_HEADER_INTS], dtype="<i4")
        if len(header) < LLMC_HEADER_INTS:
            raise ValueError("its header is cut off")
        if header[1] != LLMC_VERSION:
            raise ValueError(f"version {header[1]} of llm.c's format; only {LLMC_VERSION} is known")
        found = Layout(DTYPE, header.nbytes, int(header[2]))
    elif size == 0 or size % 2:
        raise ValueError(f"{size} bytes are no whole number of uint16 tokens")
    else:
        found = Layout(DTYPE, 0, size // 2)
    held = (size - found.start) / found.dtype.itemsize
    if held != found.tokens:
        raise ValueError(f"its header says {found.tokens} tokens, the file has {held:g}")
    return found


def _layout_of_npy(head: bytes) -> Layout:
    file = io.BytesIO(head)
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"version {version} of numpy's format")
    shape, _, dtype = read[version](file)
    if dtype not in (np.dtype("<u2"), np.dtype("<u4")) or len(shape) != 1:
        raise ValueError(
            f"{len(shape)}-dimensional {dtype}; needed: 1-dimensional uint16 or uint32"
        )
    return Layout(dtype, file.tell(), int(shape[0]))
