"""`gpt2 data verify`: reads every byte of the shards and names each file that is wrong."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
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

from gpt2.base import addresses
from gpt2.base.control_characters import visible
from gpt2.base.errors import DataError
from gpt2.base.text import counted, one_line
from gpt2.cli.parse import USER_ERROR, CommandOptions
from gpt2.config import mixture
from gpt2.data import hints, training_data
from gpt2.data.manifest import Split
from gpt2.data.remote import Storage
from gpt2.data.verification import FileReport, Verification

ON_INTERRUPT = "Interrupted; what was verified so far is remembered"


@dataclass(frozen=True)
class Verify(CommandOptions):
    """Read every byte of the shards, and name each file that is wrong. Exit code: 2 if one is."""

    root: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """folder, glob or URL of shards; also NAME=FOLDER:WEIGHT as --data_root takes it"""
    json: bool = False
    """print one JSON object, with what each file holds"""


def verify(command: Verify) -> int:
    """Runs the command; returns the exit code. Raises DataError if a file is wrong.

    A glob over several folders is verified folder by folder, each with its manifest.
    """
    is_folder = Path(command.root).exists()  # also one with "=" in its name
    root = command.root if is_folder else mixture.root_of(command.root)
    roots = training_data.folders_of(root) or {"": root}
    verifications = {name: Verification(Storage(root)) for name, root in roots.items()}
    with _progress_bar() as bar:
        total = sum(verification.bytes for verification in verifications.values())
        task = bar.add_task("Verifying", total=total)
        reports = {
            name: verification.run(lambda count: bar.advance(task, count))
            for name, verification in verifications.items()
        }
    if command.json:
        found = {name: _as_json(verifications[name], reports[name]) for name in roots}
        is_sound = all(one["sound"] for one in found.values())
        several = {
            "root": addresses.without_secrets(root),
            "sound": is_sound,
            "corpora": found,
        }
        print(json.dumps(found.get("", several)))
        return 0 if is_sound else USER_ERROR
    wrong = [line for name in roots for line in _printed(verifications[name], reports[name], name)]
    if wrong:
        count = sum(map(len, reports.values()))
        hints_of = {hints.repair(one.storage) for one in verifications.values() if one.manifest}
        hint = hints_of.pop() if len(verifications) == len(hints_of) == 1 else ""
        head = f"{len(wrong)} of {counted(count, 'file')} failed verification{hint}"
        raise DataError("\n  ".join([head, *wrong]))
    return 0


def _printed(verification: Verification, reports: list[FileReport], name: str) -> list[str]:
    """Prints what is said about a corpus; returns a line for each file that is wrong."""
    storage = verification.storage
    wrong = [report for report in reports if report.wrong]
    if not wrong:
        print(visible(_verdict(verification, len(reports))))
    for split in get_args(Split):
        total = _total(reports, split)
        print(
            f"{f'{name} ' if name else ''}{split}: {counted(total['shards'], 'shard')}, "
            f"{counted(total['tokens'], 'token')}, {counted(total['bytes'], 'byte')}"
        )
    return [one_line(f"{storage.full(report.file)}: {report.wrong}") for report in wrong]


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
        "root": addresses.without_secrets(verification.storage.root),
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
