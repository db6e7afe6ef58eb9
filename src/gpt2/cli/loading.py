"""What the `gpt2` command does with a trained model: `generate`, `export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.base.errors import CheckpointError
from gpt2.config.model import ModelConfig

if TYPE_CHECKING:
    from gpt2.model.base import LanguageModel


@dataclass(frozen=True)
class Source:
    """Which model."""

    checkpoint: str = "latest"
    """latest, best, a step or a path; hf:FOLDER or nanogpt:FILE for a model of other tools"""
    checkpoint_dir: Path = Path("checkpoints")
    """folder of the run's checkpoints"""
    trust_checkpoint: bool = False
    """unpickle a checkpoint that this user did not write: it can run any code"""


@dataclass(frozen=True)
class Loaded:
    """A model that was trained, on the CPU, and what its checkpoint says of it."""

    source: str
    model: "LanguageModel"
    progress: dict[str, Any]
    config: dict[str, Any] | None
    """of its run; None for one that came from other tools"""

    @property
    def step(self) -> int | None:
        return self.progress.get("step")

    def __str__(self) -> str:
        return self.source if self.step is None else f"{self.source} (step {self.step})"


def load_model(source: Source) -> Loaded:
    """The model that `source` names, on the CPU, in float32.

    Raises CheckpointError if it is not there, or its weights are no finite numbers.
    """
    import torch

    from gpt2 import model
    from gpt2.checkpoint import store
    from gpt2.inference import interchange
    from gpt2.inspection import runs

    which, folder, trust = source.checkpoint, source.checkpoint_dir, source.trust_checkpoint
    progress, run, shown = {}, None, which
    if interchange.is_foreign(which):
        shape, weights = interchange.read(which, trust=trust)
        weights = {name: part.float() for name, part in weights.items()}
    else:
        path = store.find(folder, which)
        if path is None:
            others = runs.run_folders(folder, "step_*.json")
            way_out = f"use --checkpoint_dir {others[0]}" if others else "train a model first"
            raise CheckpointError(f"no checkpoint in {folder}; {way_out}")
        state = store.load(path, trust=trust)
        weights, progress, run, shown = (
            state["model"],
            state["progress"],
            state["config"],
            str(path),
        )
        shape = ModelConfig(**run["model"])
    if not all(bool(part.isfinite().all()) for part in weights.values()):
        raise CheckpointError(
            f"{shown} has weights that are no finite numbers: its training diverged; use an "
            "earlier checkpoint"
        )
    with torch.device("meta"):  # weights that are replaced at once need not be drawn
        net = model.build(shape)
    net.load_state_dict(weights, assign=True)
    return Loaded(shown, net, progress, run)
