"""The checkpoint of a run, read back: whether a file of ours has all parts of it.

`checkpoint.store` knows whether a file is undamaged. It may still be of another version, or a
script may have changed it.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt2.base import json_fields
from gpt2.base.errors import CheckpointError, UserError, described, is_out_of_memory
from gpt2.base.text import one_line
from gpt2.checkpoint import store
from gpt2.checkpoint.metadata import CheckpointState
from gpt2.config import mixture
from gpt2.distributed import lost_rank
from gpt2.distributed.world import World
from gpt2.train.micro_batch import FittedRows
from gpt2.train.run_identity import RunIdentity
from gpt2.train.state import TrainState

logger = logging.getLogger(__name__)

LONGEST_REASON = 200
"""characters of an error that a message repeats"""


@dataclass(frozen=True)
class Digests:
    """Of the shards of a corpus, as `shards.Fingerprint`."""

    train: list[str | None]
    val: list[str | None]


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """The parts from which a model is built. Earlier versions lack those with a default."""

    model: Mapping[str, Tensor]
    config: Mapping[str, Any]
    progress: Mapping[str, Any]
    data_fingerprint: Digests | Mapping[str, Digests] | str = ""
    fitted_rows: FittedRows | None = None
    run: RunIdentity | None = None


@dataclass(frozen=True, kw_only=True)
class SavedRun(SavedModel):
    """The parts with which training goes on."""

    optimizer: Mapping[str, Any]
    rng: list[Mapping[str, Any]]
    run_name: str
    loss_scale: Mapping[str, Tensor] = field(default_factory=dict)
    spikes: Mapping[str, Tensor] | None = None


def load(
    path: Path,
    *,
    trust: bool = False,
    world: World | None = None,
    parts: type[SavedModel] = SavedModel,
) -> CheckpointState:
    """The state in `path`, as `store.load`; raises CheckpointError also if it lacks `parts`, or has
    something else in their place."""
    state = store.load(path, trust=trust, world=world)
    with explained(path):
        _require(state, parts, path)
    return state


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an error that the content of the checkpoint at `path` causes in the block into a
    CheckpointError. Errors of memory, devices and other ranks are raised as they are."""
    try:
        yield
    except Exception as error:  # torch, NumPy and Python raise many kinds for a wrong shape
        is_of_machine = is_out_of_memory(error) or store.is_cuda_error(error)
        if isinstance(error, UserError) or is_of_machine or lost_rank.is_lost(error):
            raise
        logger.debug("%s cannot be used:", path, exc_info=True)  # it may be a bug in this package
        raise CheckpointError(
            f"{path} is not a complete checkpoint of this version: "
            f"{one_line(described(error)):.{LONGEST_REASON}}; use an earlier one "
            "(--list_checkpoints shows them; --log_level debug shows where it failed)"
        ) from error


def _require(state: CheckpointState, parts: type[SavedModel], path: Path) -> None:
    """Raises TypeError, or another error, unless `state` has all `parts`."""
    names = {part.name for part in fields(parts)} & state.keys()
    json_fields.from_json(parts, {name: state[name] for name in names}, path)
    config = state["config"]
    for name in {*config, "model", "machine"} - {"preset"}:
        json_fields.require_object(config[name])
    _ = config["preset"], config["model"]["vocab_size"]
    progress = TrainState.from_dict(state["progress"]).to_dict()
    json_fields.from_json(TrainState, progress, path)
    mixture.from_plain(state.get("mixture", ()))
