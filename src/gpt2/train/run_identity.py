"""Which run trains in a folder: its id, which every checkpoint has, keeps runs apart."""

import uuid
from dataclasses import dataclass
from pathlib import Path

from gpt2.base.errors import CheckpointError
from gpt2.base.text import counted
from gpt2.checkpoint import store
from gpt2.checkpoint.metadata import CheckpointState
from gpt2.checkpoint.store import Checkpoint


@dataclass(frozen=True)
class RunIdentity:
    """A run, from its first step in a folder on, however often it is resumed there."""

    id: str
    parent: str | None = None
    """id of the run that it goes on from, which is in another folder"""
    mark: str = ""
    """what makes its name unique in Weights & Biases; empty in runs of earlier versions, which keep
    the id that they have there"""

    def unique_name(self, run_name: str) -> str:
        return f"{run_name}-{self.mark}" if self.mark else run_name


def find(folder: Path, path: Path | None, checkpoint: CheckpointState | None) -> RunIdentity:
    """The run that goes on in `folder` from the checkpoint at `path`, or begins there without one.

    It is the run of the checkpoint, if that lies in `folder`; else a new one. Checkpoints of
    earlier versions, without an id, belong to whichever run is in their folder. Raises
    CheckpointError if `folder` holds checkpoints of another run, which this one would overwrite.
    """
    stored = checkpoint.get("run", {}) if checkpoint else {}
    is_inside = path is not None and path.resolve().parent == folder.resolve()
    complete = store.list_checkpoints(folder)
    ids = {item.training.run_id for item in complete} - {""}
    own: str | None = stored.get("id")
    if own is None and is_inside and len(ids) == 1:
        own = ids.pop()
    own_ids = {own, ""} if is_inside else {own}
    if others := [item for item in complete if item.training.run_id not in own_ids]:
        raise _other_run(folder, others)
    if own is not None and (is_inside or complete):
        return RunIdentity(own, stored.get("parent"), stored.get("mark", ""))
    new = uuid.uuid4().hex
    return RunIdentity(new, parent=own, mark="" if is_inside else new[:8])


def goes_on(identity: RunIdentity, checkpoint: CheckpointState) -> bool:
    """Whether the run is that of `checkpoint`, and not a new one that begins from it."""
    stored: str = checkpoint.get("run", {}).get("id", identity.id)
    return stored == identity.id


def _other_run(folder: Path, others: list[Checkpoint]) -> CheckpointError:
    newest = others[-1]
    return CheckpointError(
        f"{folder} holds {counted(len(others), 'checkpoint')} of another run "
        f"({newest.training.run_name}), up to {newest.path.stem}; keep this run elsewhere with "
        "--out_dir NAME or --experiment_name NAME, continue that one with --resume latest, or move "
        "its checkpoints away"
    )
