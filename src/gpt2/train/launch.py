"""`launch.json`: which command trains in a folder, so that its restart continues what it saved."""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from gpt2.base import atomic_files, json_fields
from gpt2.checkpoint import store
from gpt2.distributed import rendezvous

FILE = "launch.json"


@dataclass(frozen=True)
class Launch:
    """Which command trains in a folder, and the newest checkpoint that it found there."""

    launch: str
    newest: int
    """number of its save"""


def saved_before_restart(folder: Path) -> bool:
    """Whether this very command has saved a checkpoint before torchrun restarted it."""
    newest = max((item.metadata.sequence for item in store.list_checkpoints(folder)), default=0)
    record = folder / FILE
    if rendezvous.is_restart():
        try:
            before = json_fields.from_json(Launch, json_fields.read(record), record)
        except json_fields.UNREADABLE:
            return True
        # Another launch wrote it: rank 0 was on another machine before.
        return before.launch != rendezvous.launch() or newest > before.newest
    with contextlib.suppress(OSError):  # a full disk: then a restart takes the newest
        record.unlink(missing_ok=True)
        text = json.dumps(asdict(Launch(rendezvous.launch(), newest)))
        atomic_files.write_text(record, text)
    return False
