"""The metadata of a checkpoint: the JSON file beside it, which is all that a listing reads."""

import json
import logging
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from gpt2.base import json_fields
from gpt2.base.errors import CheckpointError
from gpt2.base.json_fields import Timestamp

logger = logging.getLogger(__name__)

SCHEMA = 1
CheckpointState = dict[str, Any]


@dataclass(frozen=True)
class TrainingMetadata:
    """What the trainer knows about a checkpoint, for listings."""

    step: int
    epoch: int
    tokens: int
    train_loss: float | None
    val_loss: float | None
    """validation loss at this step; None if it was not measured there"""
    world_size: int
    run_name: str
    config_digest: str
    hellaswag: float | None = None
    """acc_norm at this very step; None if it was not measured there"""
    bits_per_byte: float | None = None
    """beside `val_loss`; None in checkpoints of earlier versions"""
    is_evaluated: bool = False
    """whether everything that was due at this step is measured"""
    run_id: str = ""
    """of the run that saved it; empty in checkpoints of earlier versions"""
    parent_run: str | None = None
    """id of the run, in another folder, that this one goes on from"""
    validated: str = ""
    """names of the corpora that `val_loss` is of; empty for one without a name"""
    val_rows: int | None = None
    """rows that `val_loss` is of; None in checkpoints of earlier versions"""


@dataclass(frozen=True)
class CheckpointMetadata:
    """The content of the JSON file."""

    training: TrainingMetadata
    schema: int
    bytes: int
    piece_bytes: int
    sha256: list[str]
    """of each `piece_bytes` of the file"""
    hmac: str | None
    """signature of the digests with this user's key; None if there was no key to sign with"""
    torch_version: str
    time: Timestamp
    sequence: int
    """number of the save in its folder: clocks may jump, and steps may be repeated"""
    unknown: dict[str, Any] = field(default_factory=dict)
    """fields that a later version wrote; they are written back as they are"""


def read_metadata(path: Path) -> CheckpointMetadata | None:
    """The metadata in `path`; None if the file is missing, damaged or of an incompatible version.

    Unknown fields are kept, with a warning. Raises CheckpointError if the file cannot be read.
    """
    try:
        values = _in_parts(json_fields.read(path))
        metadata = json_fields.from_json(CheckpointMetadata, values, path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}; check the disk and the file's "
            "permissions, then try again"
        ) from error
    except (ValueError, TypeError) as error:
        logger.debug("%s is damaged or of another version: %s", path, error)
        return None
    if metadata.unknown:
        _warn_once(path, tuple(sorted(metadata.unknown)))
    return metadata if _covers_file(metadata) else None


def metadata_to_json(metadata: CheckpointMetadata) -> str:
    """The content of the JSON file: one flat object."""
    values = asdict(metadata)
    return json.dumps(values.pop("training") | values.pop("unknown") | values, indent=2) + "\n"


def _in_parts(values: dict[str, Any]) -> dict[str, Any]:
    """The content of a file, of any version, with the fields of `CheckpointMetadata`."""
    training = {each.name for each in fields(TrainingMetadata)}
    own = {each.name for each in fields(CheckpointMetadata)} - {"training", "unknown"}
    parts = {name: value for name, value in values.items() if name in own}
    if isinstance(parts.get("sha256"), str):  # the first version had one digest of the whole file
        parts |= {"sha256": [parts["sha256"]], "piece_bytes": parts.get("bytes")}
    if not isinstance(parts.get("hmac"), str):
        parts["hmac"] = None  # not a signature
    unknown = {name: value for name, value in values.items() if name not in training | own}
    known = {name: value for name, value in values.items() if name in training}
    return parts | {"training": known, "unknown": unknown}


def _covers_file(metadata: CheckpointMetadata) -> bool:
    """Whether there is a digest for every byte of the file."""
    size = metadata.piece_bytes
    return size > 0 and len(metadata.sha256) == max(1, -(-metadata.bytes // size))


@cache  # a listing may read the same file every few seconds
def _warn_once(path: Path, names: tuple[str, ...]) -> None:
    logger.warning("%s: unknown fields, of a later version, are kept: %s", path, ", ".join(names))
