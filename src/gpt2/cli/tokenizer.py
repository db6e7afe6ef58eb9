"""`gpt2 tokenizer`: trains a tokenizer on files, and shows how one encodes a text."""

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from gpt2.base.errors import ConfigError
from gpt2.base.text import console, counted, table
from gpt2.base.validation import require_within, suggestion
from gpt2.cli.parse import CommandOptions, guarded, run_command, show_text
from gpt2.data import (
    bad_lines,
    files,
    readers,
    streams,
    tokenizer_choice,
    tokenizer_files,
    tokenizer_training,
)
from gpt2.data.corpus import Place
from gpt2.data.tokenizer_files import END_OF_TEXT, EXACT_CUT
from gpt2.data.tokenizer_training import Efficiency, Recipe, TrainingTexts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Train(CommandOptions):
    """Learn a byte-level BPE tokenizer from the text of .txt, .jsonl, .json, .csv, .parquet or
    .arrow files, also compressed. Every 100th piece of text is kept apart, to compare the
    tokenizer with GPT-2's."""

    patterns: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="GLOB …")]
    """files or globs, in quotes: 'texts/**/*.txt'"""
    vocab_size: int
    """number of entries, with the 256 bytes and the special tokens"""
    out: Path
    """folder of the tokenizer"""
    pattern: Literal["gpt2", "cl100k"] = "gpt2"
    """how a text is divided before merging: as for GPT-2, or as for GPT-4 (numbers in groups of
    three digits, newlines together with punctuation)"""
    special_tokens: tuple[str, ...] = ()
    """tokens that no text becomes, besides <|endoftext|>"""
    text_field: str | None = None
    """field that holds the text, in all files but .txt;
    default is text, content, raw_content or the like"""
    max_bytes: int = tokenizer_training.USUAL_MOST_BYTES
    """learn from the first text of the files, up to this many bytes"""
    max_bad_lines: float = bad_lines.MAX_SHARE
    """share of the lines that may be left out because they cannot be read"""
    overwrite: bool = False
    """replace a tokenizer in the folder"""
    json: bool = False
    """print one JSON object"""

    def __post_init__(self) -> None:
        require_within(self, 1, 10**6, "vocab_size")
        require_within(self, 1, tokenizer_training.MOST_BYTES, "max_bytes")
        require_within(self, 0, 1, "max_bad_lines")
        self.recipe()

    def recipe(self) -> Recipe:
        """Raises ConfigError for special tokens or a size that cannot be."""
        special = tuple(dict.fromkeys((END_OF_TEXT, *self.special_tokens)))
        return Recipe(self.vocab_size, self.pattern, special)


@dataclass(frozen=True)
class Show(CommandOptions):
    """Show the tokens of a text."""

    tokenizer: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TOKENIZER")]
    """gpt2, tiktoken:NAME, folder of a tokenizer, or a tokenizer.json"""
    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """text to encode"""
    json: bool = False
    """print one JSON object"""


def tokenizer_main() -> int:
    """`gpt2 tokenizer …`."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        return show_text(USAGE)
    sys.argv[0] += f" {name}"
    if name in ACTIONS:
        kind, run = ACTIONS[name]
        return run_command(kind, run, rest, on_interrupt=ON_INTERRUPT if kind is Train else "")
    return guarded(lambda: _refuse(name))


def _refuse(name: str) -> int:
    way_out = suggestion(name, list(ACTIONS)) or "; see gpt2 tokenizer --help"
    raise ConfigError(f"unknown action {name}{way_out}")


def _train(command: Train) -> int:
    if not command.patterns:
        raise ConfigError("no files given; type gpt2 tokenizer train 'texts/*.txt' …")
    tokenizer_training.require_free(command.out, command.overwrite)
    found = files.find(command.patterns)
    for line in found.skipped:
        logger.warning("%s", line)
    field = readers.choose_field(found.paths, found.kind, command.text_field)
    size = sum(streams.size(path) for path in found.paths)
    with _progress(size) as on_read:
        texts = TrainingTexts(
            readers.blocks(found.paths, found.kind, field)(Place(), EXACT_CUT),
            max_bytes=command.max_bytes,
            max_bad_lines=command.max_bad_lines,
            on_read=on_read,
        )
        content = tokenizer_training.train(texts, command.recipe())
    if texts.is_cut:
        logger.warning(
            "learned from the first %s bytes of text (--max_bytes)", f"{texts.text_bytes:,}"
        )
    efficiencies = tokenizer_training.efficiencies(content, texts.held_out)
    tokenizer_training.write(command.out, content)
    if command.json:
        print(json.dumps(_described(command, texts, efficiencies)))
    else:
        _print(command, texts, efficiencies)
    return 0


@contextmanager
def _progress(size: int) -> Iterator[Callable[[int], None]]:
    """A progress bar; yields the function that advances it to a number of bytes."""
    bar = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        DownloadColumn(),
        TimeRemainingColumn(compact=True),
        console=bar,
        transient=True,
        disable=not bar.is_terminal,
    ) as progress:
        task = progress.add_task("Reading", total=size)

        def on_read(done: int) -> None:
            progress.update(task, completed=done)
            if done >= size:
                progress.update(task, description="Merging")

        yield on_read


def _described(
    command: Train, texts: TrainingTexts, efficiencies: dict[str, Efficiency | None]
) -> dict[str, Any]:
    held_out_bytes = sum(len(text.encode()) for text in texts.held_out)
    return {
        "folder": str(command.out),
        "vocab_size": command.vocab_size,
        "pattern": command.pattern,
        "special_tokens": command.recipe().special_tokens,
        "digest": tokenizer_files.load(command.out).identity,
        "documents": texts.documents,
        "bad_lines": texts.bad_lines,
        "text_bytes": texts.text_bytes,
        "held_out_bytes": held_out_bytes,
        **{name: found and asdict(found) for name, found in efficiencies.items()},
    }


def _print(
    command: Train, texts: TrainingTexts, efficiencies: dict[str, Efficiency | None]
) -> None:
    out = console()
    read = f"{counted(texts.documents, 'document')}, {texts.text_bytes / 1e6:,.1f} MB of text"
    out.print(f"{read}, {counted(texts.bad_lines, 'bad line')} left out")
    held_out = f"{sum(len(text.encode()) for text in texts.held_out) / 1e6:,.2f} MB kept apart"
    listing = table(
        f"{held_out}: every {tokenizer_training.HELD_OUT_EVERY}th piece of text",
        "tokenizer", "entries", "bytes per token", "tokens used", "text in single bytes",
    )  # fmt: skip
    for name, found in efficiencies.items():
        if found is not None:
            listing.add_row(
                name,
                f"{found.vocab_size:,}",
                f"{found.bytes_per_token:.3f}",
                f"{found.tokens_used:,}",
                f"{found.single_byte_share:.1%}",
            )
    if listing.row_count:
        out.print(listing)
    else:
        out.print(
            f"Too little text to keep some apart (fewer than {tokenizer_training.HELD_OUT_EVERY} "
            "pieces): no comparison with GPT-2's tokenizer"
        )
    out.print(f"The tokenizer is in {shlex.quote(str(command.out))}", soft_wrap=True)


def _show(command: Show) -> int:
    loaded = tokenizer_choice.find(command.tokenizer)
    ids = loaded.encode(os.fsencode(command.text).decode("utf-8", "replace"))
    tokens = [loaded.token_bytes(number) for number in ids]
    texts = [token.decode("utf-8", "backslashreplace") for token in tokens]
    if command.json:
        print(json.dumps({"ids": ids, "tokens": texts}))
        return 0
    for number, token, text in zip(ids, tokens, texts, strict=True):
        is_text = text.encode() == token  # else a part of a character
        print(f"{number:>7} {text!r}" if is_text else f"{number:>7} {token!r}")
    return 0


ON_INTERRUPT = "Interrupted; nothing was written"
ACTIONS: dict[str, tuple[type[CommandOptions], Callable[[Any], int]]] = {
    "train": (Train, _train),
    "show": (Show, _show),
}
USAGE = """\
usage: gpt2 tokenizer WHAT [OPTIONS]

  train GLOB…    learn a tokenizer from .txt, .jsonl, .csv, .parquet or .arrow files
  show TOK TEXT  show the tokens of a text

`gpt2 tokenizer WHAT --help` lists its options"""
