"""File formats of token shards: where in a file the tokens are.

Three formats: `.npy` (uint16 or uint32), llm.c's `.bin` (256 int32 of header, then uint16; also
written by modded-nanogpt) and nanoGPT's `train.bin` and `val.bin` (uint16 without a header).
"""

import io
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gpt2.base.errors import DataError
from gpt2.data import headerless, signatures

Tokens = npt.NDArray[np.unsignedinteger[Any]]
DTYPE = np.dtype("<u2")
WIDE_DTYPE = np.dtype("<u4")
HEAD_BYTES = 4096
"""the beginning of a file that is enough to know its layout"""
NPY_HEADERS: dict[tuple[int, ...], Callable[[BinaryIO], tuple[Any, bool, Any]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
PARSER = threading.Lock()
"""for one header at a time: before Python 3.11.8, parsing in several threads may fail with "AST
constructor recursion depth mismatch" (https://github.com/python/cpython/issues/106905)"""
LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER_INTS = 20240520, 1, 256
LLMC_LLAMA3_MAGIC = 20240801
LLMC_FORMATS = range(20240101, 20250101)
"""the dates that mark them; read as two tokens, the first is outside the vocabulary"""


@dataclass(frozen=True)
class Layout:
    """Where in a file the tokens are."""

    dtype: np.dtype[Any]
    start: int
    """byte of the first token"""
    tokens: int


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The smallest that holds the ids of so many entries."""
    return DTYPE if vocab_size <= 1 << 16 else WIDE_DTYPE


def npy_header(dtype: np.dtype[Any], tokens: int) -> bytes:
    """The beginning of a `.npy` file; as long for any number of tokens."""
    header = io.BytesIO()
    shape = {"descr": dtype.str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(header, shape)
    return header.getvalue()


class _NotAShard(Exception):
    """Says why a file is not a shard in a known format."""


def layout(
    name: str, head: bytes, size: int, read: Callable[[int, int], bytes] | None = None
) -> Layout:
    """The layout of a shard of `size` bytes that begins with `head`.

    `read` returns its bytes from one position to another. Without it, a file without a header is
    taken for uint16, as after it was tested. Raises DataError, naming the file, if it is not a
    shard.
    """
    try:
        return _layout(name, head, size, read)
    except _NotAShard as error:
        raise DataError(f"{name} is truncated, damaged or not a shard ({error})") from error


def _layout(name: str, head: bytes, size: int, read: Callable[[int, int], bytes] | None) -> Layout:
    magic = int.from_bytes(head[:4], "little")
    if name.endswith(".npy") or head.startswith(np.lib.format.MAGIC_PREFIX):
        found = _layout_of_npy(head)
    elif magic in LLMC_FORMATS:
        found = _layout_of_llmc(magic, head)
    elif read and (other := headerless.other_content(size, read)):
        raise _NotAShard(other)
    elif size == 0 or size % 2:
        raise _NotAShard(f"{size} bytes are not a whole number of uint16 tokens")
    else:
        found = Layout(DTYPE, 0, size // 2)
    held = (size - found.start) / found.dtype.itemsize
    if held != found.tokens:
        raise _NotAShard(f"its header says {found.tokens} tokens, the file has {held:g}")
    return found


def _layout_of_llmc(magic: int, head: bytes) -> Layout:
    if magic == LLMC_LLAMA3_MAGIC:
        raise _NotAShard("expected tokens of GPT-2, got tokens of Llama 3 in llm.c's format")
    if magic != LLMC_MAGIC:
        raise _NotAShard(f"expected tokens in llm.c's format, {LLMC_MAGIC}, got its {magic}")
    if len(head) < 4 * LLMC_HEADER_INTS:
        raise _NotAShard("its header is incomplete")
    header = np.frombuffer(head[: 4 * LLMC_HEADER_INTS], dtype="<i4")
    if header[1] != LLMC_VERSION:
        raise _NotAShard(f"expected version {LLMC_VERSION} of llm.c's format, got {header[1]}")
    return Layout(DTYPE, header.nbytes, int(header[2]))


def _layout_of_npy(head: bytes) -> Layout:
    if not head.startswith(np.lib.format.MAGIC_PREFIX):
        is_pickle = head[:1] == pickle.PROTO and head[1:2] <= b"\x05"
        content = signatures.of(head)
        what = content.what if content else "a pickle" if is_pickle else "something else"
        raise _NotAShard(f"expected an array as numpy.save writes it, got {what}")
    file, version = io.BytesIO(head), tuple(head[6:8])
    file.seek(8)
    if version not in NPY_HEADERS:
        raise _NotAShard(f"expected version 1.0 or 2.0 of numpy's format, got {version}")
    try:
        with PARSER:
            shape, _, dtype = NPY_HEADERS[version](file)
    except Exception as error:  # numpy's and its parsers', of many kinds
        raise _NotAShard(f"its header is damaged: {' '.join(str(error).split())}") from error
    if dtype not in (DTYPE, WIDE_DTYPE) or len(shape) != 1:
        kind = "Python objects, a pickle" if dtype.hasobject else dtype
        raise _NotAShard(
            f"expected a 1-dimensional array of uint16 or uint32, got {len(shape)} dimensions of "
            f"{kind}; save the token ids as numpy.save(FILE, ids.ravel().astype(numpy.uint16))"
        )
    return Layout(dtype, file.tell(), int(shape[0]))
