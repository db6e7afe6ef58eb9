"""How `gpt2 generate` gives its texts: at once, as they are made, or in a loop of prompts.

Standard output holds the texts; what there is to say about them goes to standard error.
"""

import contextlib
import io
import itertools
import logging
import os
import sys

from gpt2.inference import generate
from gpt2.inference.sampling import Sampling
from gpt2.model.base import LanguageModel

logger = logging.getLogger(__name__)


def read_prompt(given: str) -> str:
    """The prompt that --prompt means: `-` is all of standard input but its last newline.

    Bytes that are no UTF-8 become U+FFFD.
    """
    if given == "-":
        return sys.stdin.buffer.read().decode(errors="replace").removesuffix("\n")
    return os.fsencode(given).decode(errors="replace")


def print_texts(net: LanguageModel, prompt: str, sampling: Sampling, seed: int) -> None:
    """Prints the texts when all are done."""
    _warn_of_context(net, prompt, sampling)
    texts = generate.generate_text(net, prompt, sampling, seed=seed)
    for number, text in enumerate(texts, 1):
        print(_heading(number, sampling) + text)


def stream_texts(net: LanguageModel, prompt: str, sampling: Sampling, seed: int) -> None:
    """Prints the same, the first text while it is made; the others are made beside it."""
    _warn_of_context(net, prompt, sampling)
    others: list[list[str]] = []
    print(_heading(1, sampling), end="")
    for piece, *beside in generate.stream_text(net, prompt, sampling, seed=seed):
        print(piece, end="", flush=True)
        others.append(beside)
    print()
    for number, text in enumerate(zip(*others, strict=True), 2):
        print(_heading(number, sampling) + "".join(text))


def converse(net: LanguageModel, prompt: str, sampling: Sampling, seed: int) -> None:
    """Continues each line of standard input by itself, until its end (Ctrl+D); an empty line takes
    the last prompt again, at first `prompt`. Each answer has the next seed.

    On a terminal, Ctrl+C ends the answer, or the line, and not the loop.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    at_terminal = sys.stdin.isatty()
    sign = "> " if at_terminal and sys.stdout.isatty() else ""
    if at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() a history and keys to edit with
        _note("Each line is continued; an empty one takes the last prompt again.")
        _note("Ctrl+C stops an answer, Ctrl+D leaves.")
    for turn in itertools.count(seed):
        try:
            prompt = input(sign) or prompt
            stream_texts(net, prompt, sampling, turn)
        except EOFError:
            if sign:
                print()
            return
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print()


def _heading(number: int, sampling: Sampling) -> str:
    """What stands before a text, where there are several to tell apart."""
    return f"--- sample {number}\n" if sampling.num_samples > 1 else ""


def _warn_of_context(net: LanguageModel, prompt: str, sampling: Sampling) -> None:
    for text in generate.context_warnings(net.config.block_size, prompt, sampling):
        logger.warning(text)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
