"""Where a run begins: its data, and afresh, with given weights, or where a checkpoint left off."""

import contextlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt2.base import atomic_files
from gpt2.base.errors import CheckpointError
from gpt2.base.text import counted
from gpt2.checkpoint import metadata, store
from gpt2.config import options
from gpt2.config.run import RunConfig
from gpt2.distributed import rendezvous
from gpt2.distributed.world import World
from gpt2.inference import interchange

logger = logging.getLogger(__name__)

LAUNCH = "launch.json"
"""which command trains in a folder, and the newest checkpoint that it found there"""


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint's state, with somebody's weights, or afresh."""

    path: Path | None = None
    state: metadata.CheckpointState | None = None
    weights: dict[str, torch.Tensor] | None = None

    @property
    def step(self) -> int | None:
        return None if self.state is None else self.state["progress"]["step"]

    @classmethod
    def find(cls, run_config: RunConfig, world: World) -> "Start":
        settings = run_config.checkpoint
        folder = settings.checkpoint_dir
        # torchrun --max-restarts starts the same command again, which may have saved since.
        begun = world.run_on_rank0(lambda: _has_saved(folder))
        wanted = "latest" if begun else settings.resume_from

        def locate() -> Path | None:
            if wanted is not None:
                return store.find(folder, wanted, set_aside=True)
            require_fresh(folder)
            return None

        path = world.run_on_rank0(locate)
        if path is not None:
            state = store.load(path, trust=settings.trust_checkpoint, world=world)
            return cls(path=path, state=state)
        if wanted is not None:
            logger.warning("no checkpoint in %s: starting a NEW run from step 0", folder)
        if settings.init_from in ("scratch", "resume"):
            return cls()
        if world.is_rank0:
            print(f"Loading weights from: {settings.init_from}", flush=True)
        return cls(weights=load_weights(run_config, world))

    def require_agreement(self, run_config: RunConfig, data_fingerprint: str) -> None:
        """Raises CheckpointError if the run to continue was another one, field by field."""
        if self.state is None or self.path is None:
            return
        rows = options.changed(self.state["config"], run_config, options.FIXED_BY_CHECKPOINT)
        if self.state["data_fingerprint"] != data_fingerprint:
            then = f"{self.state['config']['data']['data_root']} ({self.state['data_fingerprint']})"
            now = f"{run_config.data.data_root} ({data_fingerprint})"
            rows.append(("training data", then, now))
        made_with = self.state["config"]["preset"]
        preset = "" if made_with == run_config.preset else f"it was made with --preset {made_with}"
        _refuse_contradictions(self.path, rows, preset)

    def lines(self, run_config: RunConfig, world: World, epoch: int) -> list[str]:
        """Where a run goes on from; nothing for one that begins."""
        if self.state is None:
            return []
        where = [f"Step: {self.step}", f"Epoch: {epoch}", *self.notes(run_config, world)]
        return ["Resuming from:", *(f"  - {line}" for line in where)]

    def notes(self, run_config: RunConfig, world: World) -> list[str]:
        """What is not as it was when the checkpoint was written, though it may differ."""
        assert self.state is not None
        rows = options.changed(self.state["config"], run_config, options.NOTED_AT_RESUME)
        notes = [f"{name}: {old} before, {new} from here" for name, old, new in rows]
        ranks = len(self.state["rng"])
        if ranks != world.size:
            notes.append(f"Ranks: {ranks} before, {world.size} from here; the data is the same")
            if run_config.model.dropout > 0:
                notes.append("Dropout draws other numbers: its streams belong to the ranks")
        return notes


def _has_saved(folder: Path) -> bool:
    """Whether this very command has made a checkpoint before torchrun restarted it."""
    newest = max((i.metadata.sequence for i in store.list_checkpoints(folder)), default=0)
    record = folder / LAUNCH
    if rendezvous.is_restart():
        try:
            before = json.loads(record.read_text())
        except (OSError, ValueError):
            return True
        # Another launch wrote it: rank 0 was on another machine before.
        same = before["launch"] == rendezvous.launch()
        return not same or newest > int(before["newest"])
    with contextlib.suppress(OSError):  # a full disk: then a restart takes the newest
        record.unlink(missing_ok=True)
        atomic_files.write_text(
            record, json.dumps({"launch": rendezvous.launch(), "newest": newest})
        )
    return False


def load_weights(run_config: RunConfig, world: World | None = None) -> dict[str, torch.Tensor]:
    """What `--init_from` names, a checkpoint of ours or of another tool, for the run's model.

    Raises CheckpointError if it is not there or has another shape.
    """
    source, trust = run_config.checkpoint.init_from, run_config.checkpoint.trust_checkpoint
    if interchange.is_foreign(source):
        return interchange.load(source, run_config.model, trust=trust)
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint at {source}; --init_from takes a path, hf:FOLDER or nanogpt:FILE; "
            "--resume also takes latest, best or a step"
        )
    state = store.load(
        path.resolve(), trust=trust, world=world
    )  # no link: metadata is beside the file
    shape = tuple(name for name in options.FIXED_BY_CHECKPOINT if name.startswith("model."))
    _refuse_contradictions(path, options.changed(state["config"], run_config, shape))
    weights: dict[str, torch.Tensor] = state["model"]
    return weights


def require_fresh(folder: Path) -> None:
    """A new run must not mix with, or prune away, the checkpoints of an earlier one."""
    earlier = sorted(folder.glob("step_*.json"))
    if earlier:
        raise CheckpointError(
            f"{folder} holds {counted(len(earlier), 'checkpoint')} of an earlier run, up to "
            f"{earlier[-1].stem}; continue it with --resume latest, or keep a new run "
            "elsewhere with --out_dir NAME or --experiment_name NAME"
        )


def _refuse_contradictions(path: Path, rows: list[tuple[str, Any, Any]], hint: str = "") -> None:
    if rows:
        listed = "\n".join(
            f"  {name}: {old} in the checkpoint, {new} now" for name, old, new in rows
        )
        raise CheckpointError(
            f"{path} cannot continue with these flags{f' ({hint})' if hint else ''}:\n{listed}\n"
            "give the checkpoint's values, or start another run with --out_dir NAME or "
            "--experiment_name NAME"
        )
