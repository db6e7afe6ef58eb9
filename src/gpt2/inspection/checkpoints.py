"""The table of checkpoints, of `--list_checkpoints`."""

import time
from pathlib import Path

from rich.console import Console

from gpt2.base.text import table
from gpt2.checkpoint import store
from gpt2.config.flops import duration
from gpt2.inspection.run_status import run_folders


def print_checkpoints(root: Path, out: Console) -> None:
    """Prints the complete checkpoints in `root` and the folders below it, from their metadata."""
    folders = [path for path in run_folders(root, "step_*.json") if _table_rows(path)]
    if not folders:
        out.print(f"No checkpoints in {root}")
        return
    for folder in folders:
        listing = table(
            f"Checkpoints in {folder}",
            "step",
            "epoch",
            "train loss",
            "val loss",
            "best",
            "size",
            "age",
            "path",
        )
        for row in _table_rows(folder):
            listing.add_row(*row)
        out.print(listing)


def _table_rows(folder: Path) -> list[tuple[str, ...]]:
    complete = store.list_checkpoints(folder)
    best = store.find_best(complete)
    return [
        (
            f"{item.training.step}",
            f"{item.training.epoch}",
            _loss(item.training.train_loss),
            _loss(item.training.val_loss),
            "*" if item is best else "",
            f"{item.metadata.bytes / 1e6:,.1f} MB",
            duration(time.time() - item.metadata.time),
            str(item.path),
        )
        for item in complete
    ]


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
