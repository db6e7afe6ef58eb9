"""The JSON file beside a checkpoint: its commit mark, and all that a listing needs."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
CheckpointState = dict[str, Any]


@dataclass(frozen=True)
class TrainingMetadata:
    """What the trainer knows of a checkpoint and a listing shows."""

    step: int
    epoch: int
    tokens: int
    train_loss: float | None
    val_loss: float | None
    """validation loss at this very step; None if it was not measured there"""
    world_size: int
    run_name: str
    config_digest: str


@dataclass(frozen=True)
class CheckpointMetadata:
    """The JSON beside a checkpoint."""

    training: TrainingMetadata
    schema: int
    bytes: int
    piece_bytes: int
    sha256: list[str]
    """of every `piece_bytes` of the file"""
    hmac: str | None
    """proof that this user wrote the file; None where there was no key to sign with"""
    torch_version: str
    time: float
    """seconds since 1970"""
    sequence: int
    """counts the saves of a folder: clocks may jump, and steps may be done again"""


def read_metadata(mark: Path) -> CheckpointMetadata | None:
    try:
        values = json.loads(mark.read_text())
        if isinstance(values.get("sha256"), str):  # as written before there were pieces
            values |= {"sha256": [values["sha256"]], "piece_bytes": values["bytes"]}
        training = TrainingMetadata(
            **{name: values[name] for name in TrainingMetadata.__dataclass_fields__}
        )
        others = {
            name: values[name]
            for name in CheckpointMetadata.__dataclass_fields__
            if name != "training"
        }
        metadata = CheckpointMetadata(training=training, **others)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    numbers = (training.step, training.epoch, metadata.bytes, metadata.time, metadata.sequence)
    losses = (loss for loss in (training.train_loss, training.val_loss) if loss is not None)
    sound = all(isinstance(number, int | float) for number in (*numbers, *losses))
    return metadata if sound and _covers(metadata) else None


def _covers(metadata: CheckpointMetadata) -> bool:
    """Whether there is a digest for every byte."""
    size, digests = metadata.piece_bytes, metadata.sha256
    return (
        isinstance(size, int)
        and isinstance(digests, list)
        and all(isinstance(digest, str) for digest in digests)
        and size > 0
        and len(digests) == max(1, -(-metadata.bytes // size))
    )


def metadata_to_json(metadata: CheckpointMetadata) -> str:
    values = asdict(metadata)
    return json.dumps(values.pop("training") | values, indent=2) + "\n"
