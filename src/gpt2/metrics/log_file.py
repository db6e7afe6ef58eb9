"""`log.txt` as a metrics sink."""

from datetime import datetime
from pathlib import Path

from gpt2.base import regular_file
from gpt2.base.control_characters import visible
from gpt2.metrics.lines import text_of
from gpt2.metrics.records import Record

LOG_NAME = "log.txt"


class LogFile:
    """`log.txt`: records and log messages of one run after another, losses with six digits."""

    def __init__(self, path: Path, run_name: str, step: int) -> None:
        """Appends to `path` from `step` of the run on; raises OSError if it cannot be opened."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = regular_file.open_to_append(
            path, "a", encoding="utf-8", errors="backslashreplace", buffering=1
        )
        self._heading = f"# run {run_name} | from step {step} | {datetime.now():%Y-%m-%d %H:%M:%S}"

    def write(self, record: Record) -> None:
        if self._heading:  # not written at opening, which succeeds on a full disk
            self._file.write(self._heading + "\n")
            self._heading = ""
        self._file.write(visible(text_of(record, loss_digits=6, val_loss_digits=6)) + "\n")

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()
