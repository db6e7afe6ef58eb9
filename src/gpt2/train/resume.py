"""Where a run starts: from scratch, with given weights, or at a checkpoint."""

import contextlib
import functools
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpt2.base import atomic_files
from gpt2.base.errors import CheckpointError
from gpt2.base.text import counted
from gpt2.checkpoint import store
from gpt2.checkpoint.metadata import CheckpointState, read_metadata
from gpt2.config import options
from gpt2.config.run import RunConfig
from gpt2.data.shards import DatasetIndex, Split
from gpt2.distributed import rendezvous
from gpt2.distributed.world import World
from gpt2.inference import interchange
from gpt2.train.state import TrainState

logger = logging.getLogger(__name__)
SPLITS: dict[Split, str] = {"train": "training data", "val": "validation data"}
LAUNCH = "launch.json"
"""which command trains in a folder, and the newest checkpoint that it found there"""


@dataclass(frozen=True)
class StartingPoint:
    """A checkpoint to resume, weights to start with, or neither: a run from scratch."""

    path: Path | None = None
    """of the checkpoint"""
    checkpoint: CheckpointState | None = None
    weights: dict[str, torch.Tensor] | None = None

    @classmethod
    def find(cls, run_config: RunConfig, world: World) -> "StartingPoint":
        """What --resume and --init_from name; every rank calls it.

        Raises CheckpointError if it is not there, is damaged, or is not trusted.
        """
        settings = run_config.checkpoint
        folder = settings.checkpoint_dir
        # torchrun --max-restarts starts the same command again, which may have saved since.
        has_saved = world.run_on_rank0(lambda: _has_saved(folder))
        requested = "latest" if has_saved else settings.resume_from

        def locate() -> Path | None:
            if requested is not None:
                return store.find(folder, requested, set_aside=True)
            require_fresh(folder)
            return None

        path = world.run_on_rank0(locate)
        if path is not None:
            state = store.load(path, trust=settings.trust_checkpoint, world=world)
            return cls(path=path, checkpoint=state)
        if requested is not None:
            logger.warning("no checkpoint in %s: starting a NEW run from step 0", folder)
        if settings.init_from in ("scratch", "resume"):
            return cls()
        logger.info("Loading weights from: %s", settings.init_from)
        return cls(weights=load_weights(run_config, world))

    def require_agreement(self, run_config: RunConfig, data: DatasetIndex | None) -> None:
        """Raises CheckpointError if the checkpoint is of another run, field by field. None is for
        data that is not there yet."""
        if self.checkpoint is None or self.path is None:
            return
        stored = self.checkpoint["config"]
        rows = options.changed(stored, run_config, options.FIXED_BY_CHECKPOINT)
        if data is not None:
            rows += _data_differences(self.checkpoint, data)
        has_other_preset = stored["preset"] != run_config.preset
        hint = f"it was made with --preset {stored['preset']}" if has_other_preset else ""
        _refuse_contradictions(self.path, rows, hint)

    def train_state(self, world: World) -> TrainState:
        """The state that training begins with."""
        if self.checkpoint is None or self.path is None:
            return TrainState()
        return train_state(self.checkpoint, self.path, world)

    def completed(self, data: DatasetIndex) -> DatasetIndex:
        """The data with the digests of the checkpoint, which may know those of shards without a
        manifest."""
        known = self.checkpoint["data_fingerprint"] if self.checkpoint else ""
        if isinstance(known, str):
            return data
        digests = {split: iter(known[split]) for split in known}
        pairs = [(shard, next(digests[shard.split])) for shard in data.shards]
        shards = (replace(shard, sha256=shard.sha256 or digest) for shard, digest in pairs)
        return replace(data, shards=tuple(shards))

    def notes(self, run_config: RunConfig, world: World) -> list[str]:
        """Permitted differences from the checkpoint, for the banner."""
        assert self.checkpoint is not None
        rows = options.changed(self.checkpoint["config"], run_config, options.NOTED_AT_RESUME)
        notes = [f"{name}: {old} before, {new} from here" for name, old, new in rows]
        if isinstance(self.checkpoint.get("data_fingerprint"), str):
            notes.append(
                "Data: the checkpoint is of an earlier version, which did not record all of the "
                "data's content; the next one does"
            )
        ranks = len(self.checkpoint["rng"])
        if ranks != world.size:
            notes.append(f"Ranks: {ranks} before, {world.size} from here; the data is the same")
            if run_config.model.dropout > 0:
                notes.append("Dropout draws other numbers: its random streams belong to the ranks")
        return notes


def train_state(checkpoint: CheckpointState, path: Path, world: World | None = None) -> TrainState:
    """The state that a checkpoint holds, with what was measured after it was saved, which is in the
    metadata beside it.

    All ranks of a `world` call it, and take the metadata that rank 0 reads: machines may have
    copies of different age, but all ranks must agree on what is left to measure.
    """
    state = TrainState.from_dict(checkpoint["progress"])
    state.plain_head |= not checkpoint["config"]["machine"].get("fast", True)
    read_it = functools.partial(read_metadata, path.with_suffix(".json"))
    metadata = world.run_on_rank0(read_it) if world else read_it()
    if metadata is None or metadata.training.step != state.step:
        return state
    measured = metadata.training
    if measured.val_loss is not None and state.validated_step != state.step:
        state.add_validation(measured.val_loss)
    if measured.hellaswag is not None and state.scored_step != state.step:
        state.add_hellaswag(measured.hellaswag)
    if measured.is_evaluated:
        state.evaluated_step = state.step
    return state


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
    state = store.load(store.resolved(path), trust=trust, world=world)
    shape = tuple(name for name in options.FIXED_BY_CHECKPOINT if name.startswith("model."))
    _refuse_contradictions(path, options.changed(state["config"], run_config, shape))
    weights: dict[str, torch.Tensor] = state["model"]
    return weights


def require_fresh(folder: Path) -> None:
    """Raises CheckpointError if an earlier run has checkpoints in the folder: a new run would mix
    with them, and remove them as its own grow old."""
    earlier = sorted(folder.glob("step_*.json"))
    if earlier:
        raise CheckpointError(
            f"{folder} holds {counted(len(earlier), 'checkpoint')} of an earlier run, up to "
            f"{earlier[-1].stem}; continue it with --resume latest, or keep a new run "
            "elsewhere with --out_dir NAME or --experiment_name NAME"
        )


def _has_saved(folder: Path) -> bool:
    """Whether this very command has saved a checkpoint before torchrun restarted it."""
    newest = max((item.metadata.sequence for item in store.list_checkpoints(folder)), default=0)
    record = folder / LAUNCH
    if rendezvous.is_restart():
        try:
            before = json.loads(record.read_text())
        except (OSError, ValueError):
            return True
        # Another launch wrote it: rank 0 was on another machine before.
        is_same = before["launch"] == rendezvous.launch()
        return not is_same or newest > int(before["newest"])
    with contextlib.suppress(OSError):  # a full disk: then a restart takes the newest
        record.unlink(missing_ok=True)
        launch = {"launch": rendezvous.launch(), "newest": newest}
        atomic_files.write_text(record, json.dumps(launch))
    return False


def _data_differences(
    checkpoint: CheckpointState, data: DatasetIndex
) -> list[tuple[str, Any, Any]]:
    """How far the data is not that of the checkpoint, as far as digests are known."""
    root, known = checkpoint["config"]["data"]["data_root"], checkpoint["data_fingerprint"]
    if isinstance(known, str):
        if (now := data.former_fingerprint()) == known:
            return []
        return [("training data", f"{root} ({known})", f"{data.storage.root} ({now})")]
    rows: list[tuple[str, Any, Any]] = []
    for split, name in SPLITS.items():
        before, shards = known[split], data.of(split)
        if len(before) != len(shards):
            rows.append((name, counted(len(before), "shard"), counted(len(shards), "shard")))
            continue
        others = [
            shard.file
            for shard, digest in zip(shards, before, strict=True)
            if digest and data.digest(shard) not in (None, digest)
        ]
        if others:
            count = f"{len(others)} of {counted(len(shards), 'shard')}"
            now = f"{data.storage.root}, where {count} differ in content, first {others[0]}"
            rows.append((name, root, now))
    return rows


def _refuse_contradictions(path: Path, rows: list[tuple[str, Any, Any]], hint: str = "") -> None:
    if rows:
        listed = "\n".join(
            f"  {name}: {old} in the checkpoint, {new} now" for name, old, new in rows
        )
        raise CheckpointError(
            f"{path} cannot continue with these flags{f' ({hint})' if hint else ''}:\n{listed}\n"
            "use the checkpoint's values, or start another run with --out_dir NAME or "
            "--experiment_name NAME"
        )
