"""From the blocks of a corpus to tokens, in several processes and in the order of the blocks."""

import atexit
import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.queues import Queue

import numpy as np
import numpy.typing as npt

from gpt2.data import corpus, formats
from gpt2.data.corpus import BadLines, Block, Cut, Document, Place
from gpt2.data.formats import Tokens
from gpt2.data.tokenizer import Tokenizer

TASKS_PER_WORKER = 2  # submitted at a time, at least
AHEAD_CHARACTERS = 16 * corpus.BLOCK_CHARACTERS  # per worker: none waits while a shard is ended
PIECE_CHARACTERS = 500_000  # of a text that are encoded at a time: memory is bounded
PR_SET_PDEATHSIG = 1  # prctl.h


@dataclass(frozen=True)
class Encoded:
    """The tokens of consecutive blocks: those of each document after an <|endoftext|>."""

    place: Place
    """of the first block"""
    tokens: Tokens
    text_bytes: int
    """UTF-8 bytes of the text in them"""
    documents: npt.NDArray[np.int64]
    """the position in `tokens` of each document that begins here"""
    empty: npt.NDArray[np.int64]
    """of those without text"""
    replaced: npt.NDArray[np.int64]
    """of those with something that became U+FFFD"""
    bad_lines: tuple[BadLines, ...]
    done: int
    """how much of the corpus' size is read with it"""


def encoded_blocks(
    blocks: Iterator[Block], tokenizer: Tokenizer, workers: int
) -> Generator[Encoded]:
    """The tokens of all blocks, in their order."""
    # Not "fork": the tokeniser's threads can deadlock in a forked process.
    context = multiprocessing.get_context("spawn")
    # Not as an argument: the start of a process writes its arguments to a pipe, and blocks for ever
    # if the process has died and they do not fit. A queue has a thread that writes.
    tokenizers: Queue[Tokenizer] = context.Queue()
    tokenizers.cancel_join_thread()
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(os.getpid(), tokenizers)
    )
    waiting: deque[tuple[Future[Encoded], int]] = deque()
    ahead = 0
    try:
        for number, task in enumerate(tasks(blocks)):
            if number < workers:  # to submit a task starts a process at most
                tokenizers.put(tokenizer)
            with _interrupts_blocked():
                size = sum(block.content.size for block in task)
                waiting.append((pool.submit(_encode, task), size))
            ahead += size
            while ahead > AHEAD_CHARACTERS * workers and len(waiting) > TASKS_PER_WORKER * workers:
                encoded, size = waiting.popleft()
                ahead -= size
                yield encoded.result()
        for encoded, _ in waiting:
            yield encoded.result()
    finally:
        with _interrupts_ignored():
            pool.shutdown(cancel_futures=True)


def tasks(blocks: Iterator[Block]) -> Iterator[list[Block]]:
    """Consecutive blocks together, up to the size of a large one: a file may be small."""
    for first in blocks:
        task, size = [first], first.content.size
        while size < corpus.BLOCK_CHARACTERS and (block := next(blocks, None)):
            task.append(block)
            size += block.content.size
        yield task


def encode(task: list[Block], tokenizer: Tokenizer) -> Encoded:
    """Raises DataError as `Content.documents` does."""
    assert tokenizer.end_of_text is not None  # only the characters of nanoGPT have none
    dtype = formats.dtype_for(tokenizer.vocab_size)
    separator = np.array([tokenizer.end_of_text], dtype=dtype)
    parts, length, text_bytes = list[Tokens](), 0, 0
    documents, empty, replaced = list[int](), list[int](), list[int]()
    bad_lines = list[BadLines]()
    for item in itertools.chain.from_iterable(block.content.documents() for block in task):
        if isinstance(item, BadLines):
            bad_lines.append(item)
            continue
        document = without_surrogates(item)
        text = document.text
        text_bytes += len(text) if text.isascii() else len(text.encode())
        if document.replaced:
            replaced.append(length)
        if not document.continues:
            documents.append(length)
            if not text:
                empty.append(length)
            parts.append(separator)
            length += 1
        for piece in pieces(text, tokenizer.exact_cut):
            parts.append(tokenizer.encode_to_numpy(piece).astype(dtype))
            length += len(parts[-1])
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype=dtype)
    return Encoded(
        task[0].place,
        tokens,
        text_bytes,
        np.array(documents, dtype=np.int64),
        np.array(empty, dtype=np.int64),
        np.array(replaced, dtype=np.int64),
        tuple(bad_lines),
        task[-1].done,
    )


def pieces(text: str, exact_cut: Cut, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Parts of at least `size` characters, whose tokens one after the other are those of `text`."""
    start = 0
    while exact_cut and len(text) - start > size and (cut := exact_cut.search(text, start + size)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def without_surrogates(document: Document) -> Document:
    """A lone surrogate, which JSON can hold and UTF-8 cannot, becomes U+FFFD."""
    if document.text.isascii():  # known without looking at the characters
        return document
    try:
        document.text.encode()
    except UnicodeEncodeError:
        text = document.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return replace(document, text=text, replaced=True)
    return document


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started in the block do not receive Ctrl+C, not even before they can ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A second Ctrl+C does not end the block, as it would in any thread; a pool that is not shut
    down completely would keep the process from exiting."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin(parent: int, tokenizers: "Queue[Tokenizer]") -> None:
    """Lets a worker end with its parent, also if that is killed, and ignore Ctrl+C; it gets the
    tokenizer once."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call above
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    atexit.register(os._exit, 0)  # to free its memory object by object would take a while
    global _tokenizer
    _tokenizer = tokenizers.get()


def _encode(task: list[Block]) -> Encoded:
    """In a worker."""
    return encode(task, _tokenizer)


_tokenizer: Tokenizer
"""of a worker"""
