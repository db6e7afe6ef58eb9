"""Loads the trained model that flags name: shared by `generate`, `evaluate` and `export`."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt2 import model
from gpt2.base.control_characters import visible
from gpt2.base.errors import CheckpointError
from gpt2.checkpoint import store
from gpt2.cli.model_source import ModelSource
from gpt2.config import options
from gpt2.data import saved_tokenizer
from gpt2.data.tokenizer import GPT2_TOKENIZER, Tokenizer
from gpt2.data.vocabulary import Characters
from gpt2.distributed.world import World
from gpt2.inference import interchange
from gpt2.inspection import run_status
from gpt2.model.base import LanguageModel
from gpt2.train import resume, saved_run, status
from gpt2.train.state import TrainState

logger = logging.getLogger(__name__)
FOLDER = Path("checkpoints")
"""where runs are without --checkpoint_dir"""


@dataclass(frozen=True)
class LoadedModel:
    """A trained model on the CPU, and what its checkpoint records of it."""

    source: str
    model: LanguageModel
    train_state: TrainState | None
    """with what was measured after it was saved; None for a model of another tool"""
    config: dict[str, Any] | None
    """configuration of its run; None for a model of another tool"""
    recorded_tokenizer: Tokenizer | None = GPT2_TOKENIZER
    """None for a checkpoint of the first versions, which does not say"""
    corpora: tuple[str, ...] | None = None
    """names of the corpora of its run; None for a model of another tool"""

    @property
    def step(self) -> int | None:
        return None if self.train_state is None else self.train_state.step

    @property
    def tokenizer(self) -> Tokenizer:
        return self.recorded_tokenizer or GPT2_TOKENIZER

    def require_tokens_of_bytes(self, way_out: str = "") -> None:
        """Raises CheckpointError if the model's tokens are a nanoGPT data set's own."""
        if isinstance(self.tokenizer, Characters):
            tokens = saved_tokenizer.described(self.tokenizer)
            raise CheckpointError(
                f"{self.source} was trained on the tokens of {tokens}; expected a model of tokens "
                f"that any text has, as GPT-2's{way_out}"
            )

    def __str__(self) -> str:
        """For a terminal: the name may be that of any file."""
        source = visible(self.source)
        return source if self.step is None else f"{source} (step {self.step})"


def load_model(source: ModelSource, world: World | None = None) -> LoadedModel:
    """The model that `source` names, on the CPU, in float32. All ranks of a `world` call it.

    Raises CheckpointError if there is none, or if its weights are NaN or infinite.
    """
    which, trust = source.checkpoint, source.trust_checkpoint
    train_state, run, shown, corpora = None, None, which, None
    tokenizer: Tokenizer | None
    if interchange.is_foreign(which):
        found = interchange.read(which, trust=trust)
        shape, tokenizer = found.shape, found.tokenizer
        weights = {name: part.float() for name, part in found.weights.items()}
    else:

        def find() -> Path:
            return _checkpoint(which, source.checkpoint_dir)

        path = world.run_on_rank0(find) if world else find()
        state = saved_run.load(path, trust=trust, world=world)
        weights, run = state["model"], state["config"]
        tokenizer = saved_tokenizer.of_checkpoint(state)
        train_state = resume.train_state(state, path, world)
        corpora = resume.StartingPoint(path, state).corpora
        shown = str(path)
        shape = options.of_stored(run).model
    if not all(bool(part.isfinite().all()) for part in weights.values()):
        raise CheckpointError(
            f"{shown} has NaN or infinite weights: its training diverged; use an earlier checkpoint"
        )
    with torch.device("meta"):  # no random numbers for weights that are replaced below
        net = model.build(shape)
    with saved_run.explained(Path(shown)):
        net.load_state_dict(weights, assign=True)
    return LoadedModel(shown, net, train_state, run, tokenizer, corpora)


def _checkpoint(which: str, given: Path | None) -> Path:
    """The path of the checkpoint that `which` names, in the folder `given`; without it, in that of
    `_folder_of_run`. Raises CheckpointError if there is none."""
    is_in_folder = which in ("latest", "best") or which.isdigit()
    folder = given or (_folder_of_run() if is_in_folder else FOLDER)
    is_empty = is_in_folder and which != "latest" and not store.list_checkpoints(folder)
    path = None if is_empty else store.find(folder, which)
    if path is None:
        other = _newest_folder(given or FOLDER, without=folder)
        way_out = f"use --checkpoint_dir {other}" if other else "train a model first"
        raise CheckpointError(f"no checkpoint in {folder}; {way_out}")
    return path


def _newest_folder(root: Path, without: Path) -> Path | None:
    """The folder in or below `root` with the newest checkpoint; None if there is none."""
    written = {
        folder: max(item.metadata.time for item in complete)
        for folder in run_status.run_folders(root, "step_*.json")
        if folder != without and (complete := store.list_checkpoints(folder))
    }
    return max(written, key=lambda folder: written[folder], default=None)


def _folder_of_run() -> Path:
    """`checkpoints`; if no checkpoint is in it, the folder of the run that `gpt2 status` shows."""
    run = None if any(FOLDER.glob("step_*")) else run_status.newest_run(FOLDER)
    if run is None or run.folder == FOLDER:
        return FOLDER
    count = len(run_status.run_folders(FOLDER, status.NAME))
    which = "the run" if count == 1 else f"the newest of {count} runs"
    logger.info("No checkpoint in %s; %s below it is taken: %s", FOLDER, which, run.folder)
    return run.folder
