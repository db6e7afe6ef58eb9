"""The JSON file beside a checkpoint: its commit mark, and all that a listing needs."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
State = dict[str, Any]


@dataclass(frozen=True)
class Facts:
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
class Sidecar:
    """The JSON beside a checkpoint."""

    facts: Facts
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


def read(mark: Path) -> Sidecar | None:
    try:
        values = json.loads(mark.read_text())
        if isinstance(values.get("sha256"), str):  # as written before there were pieces
            values |= {"sha256": [values["sha256"]], "piece_bytes": values["bytes"]}
        facts = Facts(**{name: values[name] for name in Facts.__dataclass_fields__})
        others = {name: values[name] for name in Sidecar.__dataclass_fields__ if name != "facts"}
        sidecar = Sidecar(facts=facts, **others)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    numbers = (facts.step, facts.epoch, sidecar.bytes, sidecar.time, sidecar.sequence)
    losses = (loss for loss in (facts.train_loss, facts.val_loss) if loss is not None)
    sound = all(isinstance(number, int | float) for number in (*numbers, *losses))
    return sidecar if sound and _covers(sidecar) else None


def _covers(sidecar: Sidecar) -> bool:
    """Whether there is a digest for every byte."""
    size, digests = sidecar.piece_bytes, sidecar.sha256
    return (
        isinstance(size, int)
        and isinstance(digests, list)
        and all(isinstance(digest, str) for digest in digests)
        and size > 0
        and len(digests) == max(1, -(-sidecar.bytes // size))
    )


def to_json(sidecar: Sidecar) -> str:
    values = asdict(sidecar)
    return json.dumps(values.pop("facts") | values, indent=2) + "\n"
