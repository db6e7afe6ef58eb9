"""The table of checkpoints, of `--list_checkpoints`."""

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gpt2.base.text import fitted
from gpt2.checkpoint import store
from gpt2.checkpoint.store import Checkpoint
from gpt2.config.flops import duration
from gpt2.inspection.run_status import run_folders


def print_checkpoints(root: Path, out: Console) -> None:
    """Prints the complete checkpoints in `root` and the folders below it, from their metadata."""
    listed = {path: store.list_checkpoints(path) for path in run_folders(root, "step_*.json")}
    if not any(listed.values()):
        out.print(f"No checkpoints in {root}")
    for folder, complete in listed.items():
        if complete:
            out.print(_table(folder, complete, out.width))


def _table(folder: Path, complete: list[Checkpoint], width: int) -> Table:
    best = store.find_best(complete)
    rows = [
        {
            "step": f"{item.training.step}",
            "epoch": f"{item.training.epoch}",
            "train loss": _number(item.training.train_loss) or "-",
            "val loss": _number(item.training.val_loss) or "-",
            "bits/byte": _number(item.training.bits_per_byte),
            "validated": item.training.validated,
            "val rows": f"{item.training.val_rows or ''}",
            "best": "*" if item is best else "",
            "size": f"{item.metadata.bytes / 1e6:,.1f} MB",
            "age": duration(time.time() - item.metadata.time),
            "path": str(item.path),
        }
        for item in complete
    ]
    has_bits = any(row["bits/byte"] for row in rows)  # not in checkpoints of earlier versions
    is_shown = {
        "bits/byte": has_bits,
        "validated": len({row["validated"] for row in rows}) > 1,
        "val rows": len({row["val rows"] for row in rows} - {""}) > 1,
    }
    columns = [name for name in rows[0] if is_shown.get(name, True)]
    cells = [[row[name] for name in columns] for row in rows]
    return fitted(f"Checkpoints in {folder}", columns, cells, width, elastic="path")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
