"""The way out in messages about training data: commands that can be typed as they are printed."""

import shlex
from pathlib import Path

from gpt2.base import json_fields
from gpt2.base.text import one_line
from gpt2.data import corpora, tokenizer_files
from gpt2.data.remote import Storage


def prepare_command(folder: Path, overwrite: bool = False) -> str:
    """The command that prepares `folder`, which is named after its corpus by convention."""
    corpus = corpora.find(folder.name)
    name = corpus.name.replace("_", "-") if corpus else "NAME"
    is_default = corpus and folder == Path("data") / folder.name
    out = "" if is_default else f" --out {shlex.quote(str(folder))}"
    names = "" if corpus else " (gpt2 data --help lists the names)"
    return f"gpt2 data {name}{out}{' --overwrite' if overwrite else ''}{names}"


def resume_command(progress: Path) -> str:
    """The command that began an unfinished folder, as its progress file records it."""
    try:
        return one_line(str(json_fields.read(progress)["command"]))
    except json_fields.UNREADABLE:
        return prepare_command(progress.parent)


def repair(storage: Storage) -> str:
    """The end of an error message about shards of a manifest: how to replace them."""
    if storage.path is None:
        return "; upload it again"
    has_tokenizer = (storage.path / tokenizer_files.FILE).exists()
    if corpora.find(storage.path.name) is None or has_tokenizer:
        return "; prepare it again with the command that made it and --overwrite"
    return f"; prepare it again with: {prepare_command(storage.path, overwrite=True)}"
