"""File formats of token shards: where in a file the tokens are.

Three formats: `.npy` (uint16 or uint32), llm.c's `.bin` (256 int32 of header, then uint16; also
written by modded-nanogpt) and nanoGPT's `train.bin` and `val.bin` (uint16 without a header).
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2.base.errors import DataError

Tokens = npt.NDArray[np.unsignedinteger[Any]]
DTYPE = np.dtype("<u2")
HEAD_BYTES = 4096
"""the beginning of a file that is enough to know its layout"""
LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER_INTS = 20240520, 1, 256
LLMC_LLAMA3_MAGIC = 20240801


@dataclass(frozen=True)
class Layout:
    """Where in a file the tokens are."""

    dtype: np.dtype[Any]
    start: int
    """byte of the first token"""
    tokens: int


class _NotAShard(Exception):
    """Says why a file is not a shard in a known format."""


def layout(name: str, head: bytes, size: int) -> Layout:
    """The layout of a shard of `size` bytes that begins with `head`.

    Raises DataError, naming the file, if it is not a shard.
    """
    try:
        return _layout(name, head, size)
    except _NotAShard as error:
        raise DataError(f"{name} is truncated, damaged or not a shard ({error})") from error


def _layout(name: str, head: bytes, size: int) -> Layout:
    if name.endswith(".npy") or head.startswith(np.lib.format.MAGIC_PREFIX):
        found = _layout_of_npy(head)
    elif head[:4] == np.int32(LLMC_LLAMA3_MAGIC).tobytes():
        raise _NotAShard("expected tokens of GPT-2, got tokens of Llama 3 in llm.c's format")
    elif head[:4] == np.int32(LLMC_MAGIC).tobytes():
        if len(head) < 4 * LLMC_HEADER_INTS:
            raise _NotAShard("its header is incomplete")
        header = np.frombuffer(head[: 4 * LLMC_HEADER_INTS], dtype="<i4")
        if header[1] != LLMC_VERSION:
            raise _NotAShard(f"expected version {LLMC_VERSION} of llm.c's format, got {header[1]}")
        found = Layout(DTYPE, header.nbytes, int(header[2]))
    elif size == 0 or size % 2:
        raise _NotAShard(f"{size} bytes are not a whole number of uint16 tokens")
    else:
        found = Layout(DTYPE, 0, size // 2)
    held = (size - found.start) / found.dtype.itemsize
    if held != found.tokens:
        raise _NotAShard(f"its header says {found.tokens} tokens, the file has {held:g}")
    return found


def _layout_of_npy(head: bytes) -> Layout:
    file = io.BytesIO(head)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise _NotAShard(f"expected version 1.0 or 2.0 of numpy's format, got {version}")
        shape, _, dtype = readers[version](file)
    except ValueError as error:  # numpy's, for a damaged header
        raise _NotAShard(str(error)) from error
    if dtype not in (np.dtype("<u2"), np.dtype("<u4")) or len(shape) != 1:
        raise _NotAShard(
            f"expected a 1-dimensional array of uint16 or uint32, got {len(shape)} dimensions of "
            f"{dtype}"
        )
    return Layout(dtype, file.tell(), int(shape[0]))
