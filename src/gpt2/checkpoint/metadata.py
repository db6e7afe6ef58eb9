"""The metadata of a checkpoint: the JSON file beside it, which is all that a listing reads."""

import json
import logging
import sys
import types
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from gpt2.base.errors import CheckpointError

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
    time: float
    """seconds since 1970"""
    sequence: int
    """number of the save in its folder: clocks may jump, and steps may be repeated"""
    unknown: dict[str, Any] = field(default_factory=dict)
    """fields that a later version wrote; they are written back as they are"""


def read_metadata(path: Path) -> CheckpointMetadata | None:
    """The metadata in `path`; None if the file is missing, damaged or of an incompatible version.

    Unknown fields are kept, with a warning. Raises CheckpointError if the file cannot be read.
    """
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}; check the disk and the file's "
            "permissions, then try again"
        ) from error
    except ValueError:  # not JSON, or not UTF-8
        return None
    if not isinstance(values, dict):
        return None
    if isinstance(values.get("sha256"), str):  # the first version had one digest of the whole file
        values |= {"sha256": [values["sha256"]], "piece_bytes": values.get("bytes")}
    if not isinstance(values.get("hmac"), str):
        values["hmac"] = None  # not a signature
    training = _known(TrainingMetadata, values)
    checkpoint = _known(CheckpointMetadata, values)
    if training is None or checkpoint is None:
        return None
    unknown = {name: values[name] for name in values.keys() - training.keys() - checkpoint.keys()}
    if unknown:
        _warn_once(path, tuple(sorted(unknown)))
    metadata = CheckpointMetadata(TrainingMetadata(**training), **checkpoint, unknown=unknown)
    return metadata if _covers_file(metadata) else None


def metadata_to_json(metadata: CheckpointMetadata) -> str:
    """The content of the JSON file: one flat object."""
    values = asdict(metadata)
    return json.dumps(values.pop("training") | values.pop("unknown") | values, indent=2) + "\n"


def _known(kind: type[Any], values: dict[str, Any]) -> dict[str, Any] | None:
    """The values of the fields of `kind`; None if one is missing or has another type."""
    found = {}
    for each in fields(kind):
        if each.name in ("training", "unknown"):
            continue
        if each.name in values:
            if not _is_of(each.type, values[each.name]):
                return None
            found[each.name] = values[each.name]
        elif each.default is MISSING:
            return None
    return found


def _is_of(hint: Any, value: object) -> bool:
    """Whether `value`, which was read from JSON, has the type `hint`."""
    if isinstance(hint, types.UnionType):
        return any(_is_of(part, value) for part in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is_of(get_args(hint)[0], item) for item in value)
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return isinstance(value, float) or abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _covers_file(metadata: CheckpointMetadata) -> bool:
    """Whether there is a digest for every byte of the file."""
    size = metadata.piece_bytes
    return size > 0 and len(metadata.sha256) == max(1, -(-metadata.bytes // size))


@cache  # a listing may read the same file every few seconds
def _warn_once(path: Path, names: tuple[str, ...]) -> None:
    logger.warning("%s: unknown fields, of a later version, are kept: %s", path, ", ".join(names))
