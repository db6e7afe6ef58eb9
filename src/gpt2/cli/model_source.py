"""Flags that name a trained model: shared by `generate`, `evaluate` and `export`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelSource:
    """Which model."""

    checkpoint: str = "latest"
    """latest, best, a step or a path; hf:FOLDER or nanogpt:FILE for a model of another tool"""
    checkpoint_dir: Path | None = None
    """folder of the run's checkpoints; default is checkpoints or, if it has no checkpoint and no
    status.json of a run, that of the newest run below it, as in `gpt2 status`"""
    trust_checkpoint: bool = False
    """unpickle a checkpoint that another user wrote: it can run any code"""
