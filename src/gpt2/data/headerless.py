"""Whether a file without a header holds uint16 tokens, as it is read. Pure.

Every even number of bytes can be read as uint16, and training on the wrong ones succeeds. So
several places of a file are tested for what else they may be. Each test needs at least
FEWEST tokens, and looks for something that they have in another format at every place, and that
tokens of a text lack at about every second one: it errs with a probability below 2^-FEWEST.
Tokens that repeat are no such evidence, so there must be several different ones. One text cannot be
told apart: that in which every second token is an exclamation mark, whose bytes are those of 32-bit
numbers. Such tokens are read from a file with a header, which no test concerns.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2.data import signatures, tokenizer

Halves = npt.NDArray[np.uint16]

FEWEST = 40
"""tokens; a file with fewer is not tested"""
WIDE = ("<u8", ">u8", "<u4", ">u4", "<f8", ">f8", "<f4", ">f4")
LARGEST_BYTES = 8
PLACES, PLACE_BYTES = 4, 4096
"""of a file that are tested, the first of which is its beginning and the last its end"""
LARGEST_VOCABULARY = 1 << 18
LARGEST_UINT16 = (1 << 16) - 1
LARGEST_UPPER_HALF = LARGEST_VOCABULARY - 1 >> 16
TEXT = "tokenise it: gpt2 data files FILE --out FOLDER"


def other_content(size: int, read: Callable[[int, int], bytes]) -> str | None:
    """What a file of `size` bytes is that is not uint16, and the way out; None for tokens.

    `read` returns its bytes from one position to another.
    """
    sample = b"".join(read(start, end) for start, end in _places(size))
    halves = np.frombuffer(sample, "<u2", len(sample) // 2)
    if len(halves) < FEWEST:
        return None
    if _is_text(sample) or (halves.max() >= tokenizer.VOCAB_SIZE and signatures.of(sample)):
        content = signatures.of(sample) or signatures.FileType("text", TEXT)
        return f"it is {content.what}; {content.advice}"
    if wide := _wide(sample):
        return wide
    if _is_narrow(halves):
        return f"got 8-bit numbers; {_conversion('np.uint8')}"
    if _is_swapped(halves):
        return f"got big-endian numbers; {_conversion(repr('>u2'))}"
    return None


def _places(size: int) -> list[tuple[int, int]]:
    """Where the sample is read: the whole of a small file."""
    if size <= PLACES * PLACE_BYTES:
        return [(0, size)]
    starts = np.linspace(0, size - PLACE_BYTES, PLACES, dtype=np.int64)
    aligned = [-(-int(start) // LARGEST_BYTES) * LARGEST_BYTES for start in starts]
    return [(start, min(size, start + PLACE_BYTES)) for start in aligned]


def _is_text(sample: bytes) -> bool:
    """Whether bytes are text in UTF-8, or in another encoding of mostly ASCII.

    Text has no control characters. Of the tokens of a text, at least 45 % (of code 86 %) have one
    among their two bytes: all those of an id below 2304, for example.
    """
    if sample.translate(None, signatures.CONTROLS) != sample:
        return False
    return _varies(np.frombuffer(sample, "<u2", len(sample) // 2), 8) and (
        _is_utf8(sample) or sum(byte < 128 for byte in sample) > 0.9 * len(sample)
    )


def _is_utf8(sample: bytes) -> bool:
    """Characters may be cut where a place begins and ends."""
    return sample.decode(errors="replace").count("\ufffd") <= 4 * PLACES


def _wide(sample: bytes) -> str | None:
    """What numbers of 32 or 64 bits are called; None for uint16.

    Their upper halves, every second uint16, are 0, or up to 3 with a vocabulary of up to 262,144
    (and near 0x4600 for floats). A larger token of a text is as likely to be at an odd place as at
    an even one: n of them are all at even places with a probability of 2^-n.
    """
    for dtype in map(np.dtype, WIDE):
        numbers = np.frombuffer(sample, dtype, len(sample) // dtype.itemsize)
        with np.errstate(invalid="ignore"):  # NaN is no id
            is_in_range = numbers.min() >= 0 and numbers.max() < LARGEST_VOCABULARY
        if not is_in_range or np.any(numbers % 1) or np.median(numbers) > LARGEST_UINT16:
            continue
        lower_halves = numbers % (LARGEST_UINT16 + 1)
        if np.sum(lower_halves > LARGEST_UPPER_HALF) < FEWEST or not _varies(lower_halves, 16):
            continue
        kind = f"{8 * dtype.itemsize}-bit {'floats' if dtype.kind == 'f' else 'numbers'}"
        if numbers.max() > LARGEST_UINT16:
            return (
                f"got token ids up to {int(numbers.max()):,} or more, as {kind}, of another "
                "tokeniser than GPT-2's; tokenise the text again: gpt2 data files FILE --out FOLDER"
            )
        return f"got {kind}; {_conversion(repr(dtype.str))}"
    return None


def _is_narrow(halves: Halves) -> bool:
    """Whether these are two numbers of 8 bits each.

    Then the two have the same distribution: of 4096, their distance (total variation) is below 0.1.
    It is above 0.7 for the bytes of a text's tokens, whose upper ones are small, and 0.23 for
    random ids. Where both bytes are equal, as in the id 0, they say nothing.
    """
    lower, upper = halves & 0xFF, halves >> 8
    lower, upper = lower[lower != upper], upper[lower != upper]
    counts = [np.bincount(part, minlength=256) for part in (lower, upper)]
    is_enough = len(lower) >= 25 * FEWEST and all(np.sum(count > 0) >= 16 for count in counts)
    return bool(is_enough and np.abs(counts[0] - counts[1]).sum() < 0.15 * 2 * len(lower))


def _is_swapped(halves: Halves) -> bool:
    """Whether these are tokens with their two bytes the wrong way round.

    Of a text's tokens, a quarter have an id that is outside the vocabulary then. None of a small
    vocabulary has, but all ids are multiples of 256 then.
    """
    swapped = halves.byteswap()
    is_outside, is_small = halves.max() >= tokenizer.VOCAB_SIZE, swapped.max() < 256
    is_known = swapped.max() < tokenizer.VOCAB_SIZE
    return bool(is_known and (is_outside or is_small) and _varies(halves, 8))


def _varies(numbers: npt.NDArray[np.number[Any]], fewest: int) -> bool:
    return len(np.unique(numbers)) >= fewest


def _conversion(dtype: str) -> str:
    return f"write them as np.fromfile(FILE, {dtype}).astype(np.uint16).tofile(FILE)"
