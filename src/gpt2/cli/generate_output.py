"""How `gpt2 generate` prints its texts: when they are done, as a stream, or in a loop of prompts.

Texts go to standard output, messages to standard error.
"""

import contextlib
import io
import itertools
import logging
import os
import sys

from gpt2.base.control_characters import visible
from gpt2.data.tokenizer import Tokenizer
from gpt2.inference import generate
from gpt2.inference.sampling import Sampling
from gpt2.model.base import LanguageModel

logger = logging.getLogger(__name__)


def read_prompt(given: str) -> str:
    """The prompt of --prompt: `-` is standard input without its last newline.

    Bytes that are not UTF-8 become U+FFFD.
    """
    if given == "-":
        return sys.stdin.buffer.read().decode(errors="replace").removesuffix("\n")
    return os.fsencode(given).decode(errors="replace")


def print_texts(
    net: LanguageModel, tokenizer: Tokenizer, prompt: str, sampling: Sampling, seed: int
) -> None:
    """Prints all texts when they are done."""
    _warn_of_context(net, tokenizer, prompt, sampling)
    texts = generate.generate_text(net, prompt, sampling, seed=seed, tokenizer=tokenizer)
    for number, text in enumerate(texts, 1):
        _show(_heading(number, sampling) + text + "\n")


def stream_texts(
    net: LanguageModel, tokenizer: Tokenizer, prompt: str, sampling: Sampling, seed: int
) -> None:
    """Prints the first text token by token, then the others, which are generated beside it."""
    _warn_of_context(net, tokenizer, prompt, sampling)
    others: list[list[str]] = []
    print(_heading(1, sampling), end="")
    for piece, *beside in generate.stream_text(
        net, prompt, sampling, seed=seed, tokenizer=tokenizer
    ):
        _show(piece)
        others.append(beside)
    print()
    for number, text in enumerate(zip(*others, strict=True), 2):
        _show(_heading(number, sampling) + "".join(text) + "\n")


def converse(
    net: LanguageModel, tokenizer: Tokenizer, prompt: str, sampling: Sampling, seed: int
) -> None:
    """Continues each line of standard input separately, until end of file (Ctrl+D).

    An empty line repeats the last prompt, at first `prompt`. Each answer uses the next seed. On a
    terminal, Ctrl+C ends the answer, or the line that is being typed, but not the loop.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    at_terminal = sys.stdin.isatty()
    marker = "> " if at_terminal and sys.stdout.isatty() else ""
    if at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() a history and line editing
        _note("Each line is continued; an empty line repeats the last prompt.")
        _note("Ctrl+C stops an answer, Ctrl+D exits.")
    for turn in itertools.count(seed):
        try:
            prompt = input(marker) or prompt
            stream_texts(net, tokenizer, prompt, sampling, turn)
        except EOFError:
            if marker:
                print()
            return
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print()


def _heading(number: int, sampling: Sampling) -> str:
    """The line before a text, if there are several texts."""
    return f"--- sample {number}\n" if sampling.num_samples > 1 else ""


def _warn_of_context(
    net: LanguageModel, tokenizer: Tokenizer, prompt: str, sampling: Sampling
) -> None:
    for text in generate.context_warnings(net.config.block_size, prompt, sampling, tokenizer):
        logger.warning(text)


def _show(text: str) -> None:
    """Prints a text; on a terminal, with its control characters escaped."""
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
