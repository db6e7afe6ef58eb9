"""`gpt2 data verify`: reads every byte of the shards and names each file that is wrong."""

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, get_args

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from gpt2.base.errors import DataError
from gpt2.base.text import counted, one_line
from gpt2.cli.parse import USER_ERROR, CommandOptions
from gpt2.data import hints
from gpt2.data.manifest import Split
from gpt2.data.remote import Storage
from gpt2.data.verification import FileReport, Verification

ON_INTERRUPT = "Interrupted; what was verified so far is remembered"


@dataclass(frozen=True)
class Verify(CommandOptions):
    """Read every byte of the shards, and name each file that is wrong. Exit code: 2 if one is."""

    root: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """folder, glob or URL of shards"""
    json: bool = False
    """print one JSON object, with what each file holds"""


def verify(command: Verify) -> int:
    """Runs the command; returns the exit code. Raises DataError if a file is wrong."""
    verification = Verification(Storage(command.root))
    with _progress_bar() as bar:
        task = bar.add_task("Verifying", total=verification.bytes)
        reports = verification.run(lambda count: bar.advance(task, count))
    wrong = [report for report in reports if report.wrong]
    if command.json:
        print(json.dumps(_as_json(verification, reports)))
        return USER_ERROR if wrong else 0
    if not wrong:
        print(_verdict(verification, len(reports)))
    for split in get_args(Split):
        total = _total(reports, split)
        print(
            f"{split}: {counted(total['shards'], 'shard')}, {total['tokens']:,} tokens, "
            f"{total['bytes']:,} bytes"
        )
    if wrong:
        storage = verification.storage
        hint = hints.repair(storage) if verification.manifest else ""
        lines = [one_line(f"{storage.full(report.file)}: {report.wrong}") for report in wrong]
        head = f"{len(wrong)} of {counted(len(reports), 'file')} failed verification{hint}"
        raise DataError("\n  ".join([head, *lines]))
    return 0


def _verdict(verification: Verification, files: int) -> str:
    """What is said about sound shards."""
    if verification.manifest:
        return f"{verification.storage}: all {counted(files, 'shard')} match the manifest"
    return (
        f"{verification.storage}: no manifest to compare {counted(files, 'shard')} with; format "
        "and token ids are sound"
    )


def _total(reports: list[FileReport], split: Split) -> dict[str, Any]:
    """The sums over the sound shards of a split."""
    sound = [report for report in reports if report.split == split and not report.wrong]
    texts = [report.text_bytes for report in sound if report.text_bytes is not None]
    return {
        "shards": len(sound),
        "tokens": sum(report.tokens for report in sound),
        "bytes": sum(report.bytes for report in sound),
        "text_bytes": sum(texts) if len(texts) == len(sound) else None,
    }


def _as_json(verification: Verification, reports: list[FileReport]) -> dict[str, Any]:
    return {
        "root": verification.storage.root,
        "manifest": verification.manifest is not None,
        "sound": not any(report.wrong for report in reports),
        **{split: _total(reports, split) for split in get_args(Split)},
        "files": [asdict(report) for report in reports],
    }


def _progress_bar() -> Progress:
    """A bar in bytes on the standard error, which is a terminal."""
    terminal = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=terminal,
        disable=not terminal.is_terminal,
    )
