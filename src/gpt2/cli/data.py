"""`gpt2 data`: prepares a corpus, verifies shards and shows what is in them."""

import logging
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import tyro
from rich.table import Table

from gpt2.base import addresses
from gpt2.base.errors import ConfigError
from gpt2.base.text import console, counted, table
from gpt2.base.validation import LARGEST, MOST_PROCESSES, require_within, suggestion
from gpt2.cli import data_order, data_show, data_verify
from gpt2.cli.data_show import Show
from gpt2.cli.data_verify import Verify
from gpt2.cli.parse import CommandOptions, guarded, run_command, show_text
from gpt2.data import (
    bad_lines,
    corpora,
    files,
    prepare,
    shards,
    statistics,
    tokenizer_choice,
    tokenizer_training,
)
from gpt2.data.corpus import Corpus
from gpt2.data.manifest import Manifest, Split
from gpt2.data.remote import Storage
from gpt2.data.statistics import Comparison
from gpt2.data.tokenizer import GPT2_TOKENIZER

logger = logging.getLogger(__name__)
MANY_REPLACED = 0.01
"""share of the documents with bytes that are not UTF-8, above which the encoding may be another"""
ON_INTERRUPT = "Interrupted; the same command again resumes"


@dataclass(frozen=True)
class OutputOptions:
    """Size and folder of the shards."""

    out: Path | None = None
    """folder of the shards; default is data/NAME"""
    tokenizer: str | None = None
    """gpt2, tiktoken:NAME such as tiktoken:cl100k_base, or a tokenizer.json or its folder, which
    gpt2 tokenizer train makes; default is gpt2, or the one that python-stdlib-4k learns first"""
    shard_tokens: int | None = None
    """tokens per shard; default depends on the corpus"""
    val_tokens: int | None = None
    """tokens of the first shard, which is for validation;
    default is one shard for a corpus of the list, otherwise 10 million, or a tenth of the corpus
    if that is less"""
    max_tokens: int | None = None
    """stop after this many tokens"""
    workers: int | None = None
    """processes that tokenise; default is one per core"""
    max_bad_lines: float = bad_lines.MAX_SHARE
    """share of the lines that may be left out because they cannot be read"""
    overwrite: bool = False
    """start from the beginning, even if shards of this corpus exist"""

    def __post_init__(self) -> None:
        require_within(self, 2, LARGEST, "shard_tokens", "val_tokens")
        require_within(self, 1, 10**15, "max_tokens")
        require_within(self, 1, MOST_PROCESSES, "workers")
        require_within(self, 0, 1, "max_bad_lines")
        if self.out is not None:
            _require_local(self.out)


@dataclass(frozen=True)
class Named(CommandOptions):
    """Prepare a named corpus, one of those that `gpt2 data` lists."""

    output: OutputOptions = OutputOptions()


@dataclass(frozen=True)
class Hub(CommandOptions):
    """Prepare any dataset of the Hugging Face hub, or of a local folder."""

    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPO")]
    """name of the dataset, as for `datasets.load_dataset`"""
    hf_name: str | None = None
    """configuration of the dataset"""
    split: str = "train"
    """split of the dataset"""
    text_field: str | None = None
    """field that holds the text; default is text, content, raw_content or the like"""
    streaming: bool = True
    """read the dataset while it downloads, instead of downloading it first"""
    output: OutputOptions = OutputOptions()


@dataclass(frozen=True)
class Files(CommandOptions):
    """Prepare .txt, .jsonl, .json, .csv, .tsv, .parquet or .arrow files, also compressed."""

    patterns: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="GLOB …")]
    """files or globs, in quotes: 'texts/**/*.txt'"""
    text_field: str | None = None
    """field that holds the text, in all files but .txt;
    default is text, content, raw_content or the like"""
    output: OutputOptions = OutputOptions()


def data_main() -> int:
    """`gpt2 data …`."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        return show_text(_usage())
    sys.argv = [f"{sys.argv[0]} {name}", *rest]
    if name == "order":
        return data_order.main(rest)
    if name in ACTIONS:
        kind, run = ACTIONS[name]
        on_interrupt = {Verify: data_verify.ON_INTERRUPT, Show: ""}.get(kind, ON_INTERRUPT)
        return run_command(kind, run, rest, on_interrupt=on_interrupt)
    if corpus := corpora.find(name):
        return run_command(
            Named, lambda command: _prepare(corpus, command.output), rest, on_interrupt=ON_INTERRUPT
        )
    return guarded(lambda: _refuse(name))


def _refuse(name: str) -> NoReturn:
    known = [*ACTIONS, "order", *(_typed(item) for item in corpora.CORPORA)]
    way_out = suggestion(name, known) or "; see gpt2 data --help"
    raise ConfigError(f"unknown corpus {name}{way_out}")


def _hub(command: Hub) -> int:
    name, local = _slug(command.repo.rstrip("/").rpartition("/")[2]), Path(command.repo)
    if command.hf_name is None and local.is_dir():
        folder = corpora.find_in_folder(local, command.split)
        if folder is not None:
            logger.info("Reading %s of %s", folder.shown(), local)
            corpus = corpora.of_folder(name, local, folder, command.text_field)
            return _prepare(corpus, command.output, file_count=len(folder.files))
    if local.is_file():
        raise ConfigError(
            f"{command.repo} is a file; type gpt2 data files {shlex.quote(command.repo)}"
        )
    corpus = corpora.hub(
        name,
        command.repo,
        command.hf_name,
        split=command.split,
        text_field=command.text_field,
        streaming=command.streaming,
        val_tokens=corpora.VAL_TOKENS,
    )
    return _prepare(corpus, command.output)


def _files(command: Files) -> int:
    if not command.patterns:
        raise ConfigError("no files given; type gpt2 data files 'texts/*.txt'")
    folder = command.output.out or Path(command.patterns[0]).absolute().parent
    name = _slug(re.sub(r"[*?\[\]]", "", folder.name)) or "files"
    found = files.find(command.patterns)
    for line in found.skipped:
        logger.warning("%s", line)
    corpus = corpora.of_files(name, " ".join(command.patterns), found, command.text_field)
    return _prepare(corpus, command.output, file_count=len(found.paths))


def _prepare(corpus: Corpus, options: OutputOptions, file_count: int | None = None) -> int:
    folder = options.out or Path("data") / corpus.name
    started = time.perf_counter()
    if options.tokenizer is None:
        tokenizer = tokenizer_training.tokenizer_of(corpus)
    else:
        tokenizer = tokenizer_choice.find(options.tokenizer)
    manifest = prepare.prepare(
        corpus,
        folder,
        tokenizer=tokenizer,
        shard_tokens=options.shard_tokens,
        val_tokens=options.val_tokens,
        max_tokens=options.max_tokens,
        max_bad_lines=options.max_bad_lines,
        workers=options.workers,
        overwrite=options.overwrite,
        command=_typed_command(),
    )
    elapsed_s = time.perf_counter() - started
    out = console()
    index = shards.load_index(Storage(str(folder)))
    out.print(_split_table(index))
    read = counted(manifest.documents, "document")
    if file_count is not None:
        read += f" of {counted(file_count, 'file')}"
    notes = [
        (manifest.empty_documents, "empty"),
        (manifest.replaced_documents, "with bytes that are not UTF-8 (now U+FFFD)"),
    ]
    found = [f"{count:,} {what}" for count, what in notes if count]
    if manifest.bad_lines:
        found.append(f"{counted(manifest.bad_lines, 'bad line')} left out")
    out.print(f"{', '.join([read, *found])}; {elapsed_s:.0f} s")
    if manifest.replaced_documents > MANY_REPLACED * manifest.documents:
        logger.warning(
            "many documents have bytes that are not UTF-8: if the files have another encoding, "
            "their letters are lost; convert them, as with iconv -f cp1252 -t utf-8, and use "
            "--overwrite"
        )
    if tokenizer is not GPT2_TOKENIZER:
        out.print(_efficiency(manifest, statistics.compare_with_gpt2(index)), soft_wrap=True)
    out.print(f"Train on it with --data_root {shlex.quote(str(folder))}", soft_wrap=True)
    return 0


def _efficiency(manifest: Manifest, sample: Comparison) -> str:
    text_bytes = sum(shard.text_bytes or 0 for shard in manifest.shards)
    ratio = text_bytes / max(1, sum(shard.tokens for shard in manifest.shards))
    return (
        f"Bytes per token: {ratio:.3f} in all shards, with {manifest.tokenizer} "
        f"({manifest.vocab_size:,} entries); in the first {sample.text_bytes / 1e6:.2f} MB to "
        f"train on, {sample.bytes_per_token:.3f} with it and {sample.gpt2_bytes_per_token:.3f} "
        "with GPT-2's tokenizer"
    )


def _require_local(folder: Path) -> None:
    """Raises ConfigError for a URL, in which pathlib has made one slash of two."""
    is_url = re.match(r"[a-z][a-z0-9+.]*:/", str(folder))
    if is_url and not Path(folder.parts[0]).exists():
        raise ConfigError(
            f"--out {folder} looks like a URL; expected a local folder: prepare there, then upload "
            "the folder"
        )


def _split_table(index: shards.DatasetIndex) -> Table:
    listing = table(f"Shards in {index.storage}", "split", "shards", "tokens", "size")
    for split in get_args(Split):
        size = sum(shard.bytes for shard in index.of(split))
        tokens = f"{index.tokens(split):,}"
        listing.add_row(split, f"{len(index.of(split))}", tokens, f"{size / 1e6:,.1f} MB")
    return listing


ACTIONS: dict[str, tuple[type[CommandOptions], Callable[[Any], int]]] = {
    "hf": (Hub, _hub),
    "files": (Files, _files),
    "verify": (Verify, data_verify.verify),
    "show": (Show, data_show.show),
}


def _described(corpus: Corpus) -> str:
    if corpus.vocab_size is None:
        return corpus.source
    return f"the same, with a tokenizer of {corpus.vocab_size:,} entries learned from it"


def _usage() -> str:
    rows = [(_typed(corpus.name), _described(corpus)) for corpus in corpora.CORPORA.values()]
    rows += [
        ("hf REPO", "any dataset of the Hugging Face hub, or of a local folder"),
        ("files GLOB…", "files of your own: .txt, .jsonl, .csv, .parquet and more"),
        ("verify DIR", "read every byte of the shards and name each file that is wrong"),
        ("show DIR", "look at shards: their text, the rows of a step, statistics"),
        ("order", "the rows of a step of any run, also of a mixture of corpora"),
    ]
    listing = "\n".join(f"  {name:<16} {text}" for name, text in rows)
    return (
        f"usage: gpt2 data WHAT [OPTIONS]\n\n{listing}\n\n`gpt2 data WHAT --help` lists its options"
    )


def _typed(name: str) -> str:
    return name.replace("_", "-")


def _typed_command() -> str:
    """The command that resumes this one: without --overwrite, which would start again."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--overwrite"]
    return shlex.join([*sys.argv[0].split(), *addresses.public(arguments)])


def _slug(text: str) -> str:
    return re.sub(r"\W+", "_", text.lower()).strip("_")
