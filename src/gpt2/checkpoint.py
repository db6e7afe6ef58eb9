"""Checkpoints: a kill while one is written costs nothing, and none is loaded unverified.

`step_000250.pt` holds tensors and plain values; `step_000250.json` beside it is the commit mark and
all that a listing needs: a `.pt` without it was never finished. `latest.pt` and `best.pt` are
relative symlinks.
"""

import hashlib
import hmac
import json
import math
import os
import pickle
import random
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
import torch

from gpt2 import atomic
from gpt2.errors import CheckpointError

SCHEMA = 1
LATEST, BEST = "latest.pt", "best.pt"
KEY_BYTES = 32
State = dict[str, Any]
Warn = Callable[[str], None]


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
    sha256: str
    hmac: str | None
    """proof that this user wrote the file; None where there was no key to sign with"""
    torch_version: str
    time: float
    """seconds since 1970"""
    sequence: int
    """counts the saves of a folder: clocks may jump, and steps may be done again"""


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint in a folder."""

    path: Path
    sidecar: Sidecar

    @property
    def facts(self) -> Facts:
        return self.sidecar.facts


def save(
    folder: Path, state: State, facts: Facts, *, keep_last: int, resumed_from: Path | None = None
) -> Path:
    """Writes a checkpoint, points `latest.pt` and `best.pt`, and removes what is no longer kept.

    Raises CheckpointError if the disk does not take it; the earlier checkpoints are intact then.
    """
    path = folder / f"step_{facts.step:06d}.pt"
    before = list_checkpoints(folder)
    try:
        with atomic.writing(path) as file:
            writer = _HashingWriter(file)
            torch.save({"schema": SCHEMA, **state}, cast(IO[bytes], writer))
        sidecar = Sidecar(
            facts=facts,
            schema=SCHEMA,
            bytes=path.stat().st_size,
            sha256=writer.sha256(),
            hmac=_sign(writer.sha256()),
            torch_version=torch.__version__,
            time=time.time(),
            sequence=1 + max((item.sidecar.sequence for item in before), default=0),
        )
        atomic.write_text(path.with_suffix(".json"), _to_json(sidecar))
        atomic.point(folder / LATEST, path.name)
        complete = list_checkpoints(folder)
        best = find_best(complete)
        if best is not None:
            atomic.point(folder / BEST, best.path.name)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot save {path}: {error} ({_free_gb(folder)} free); earlier checkpoints are "
            "intact; make room, or choose another folder with --checkpoint_dir"
        ) from error
    prune(complete, keep_last, keep=[best.path if best else None, resumed_from])
    return path


def prune(complete: list[Checkpoint], keep_last: int, keep: Iterable[Path | None]) -> None:
    """Removes all but the newest `keep_last` (two at least) and those in `keep`."""
    kept = {path.resolve() for path in keep if path is not None}
    for old in complete[: -max(2, keep_last)]:
        if old.path.resolve() not in kept:
            # The commit mark first: a kill between the two leaves an unfinished file, not a lie.
            old.path.with_suffix(".json").unlink(missing_ok=True)
            old.path.unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The finished checkpoints of `folder`, from their sidecars alone, newest last."""
    found = []
    for mark in folder.glob("step_*.json"):
        path, sidecar = mark.with_suffix(".pt"), _read_sidecar(mark)
        if sidecar is not None and path.exists():
            found.append(Checkpoint(path, sidecar))
    return sorted(found, key=lambda item: (item.sidecar.sequence, item.facts.step))


def find_best(complete: list[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest validation loss among those that have one."""
    judged = [
        (item.facts.val_loss, item)
        for item in complete
        if item.facts.val_loss is not None and math.isfinite(item.facts.val_loss)
    ]
    return min(judged, key=lambda pair: pair[0])[1] if judged else None


def find(folder: Path, which: str, warn: Warn) -> Path | None:
    """The checkpoint that `latest`, `best`, a step or a path means.

    `latest` skips damaged ones, with a warning, and is None in a folder that never had any. Raises
    CheckpointError for anything else that is not there.
    """
    complete = list_checkpoints(folder)
    if which == "latest":
        return _newest_good(folder, complete, warn)
    if which == "best":
        best = find_best(complete)
        if best is None:
            raise CheckpointError(
                f"no checkpoint in {folder} has a validation loss; use --resume latest"
            )
        return best.path
    if which.isdigit():
        for item in complete:
            if item.facts.step == int(which):
                return item.path
        steps = ", ".join(str(item.facts.step) for item in complete) or "none"
        raise CheckpointError(f"{folder} has no checkpoint of step {which}; steps: {steps}")
    path = Path(which)
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint at {which}; use latest, best, a step or a path "
            "(--list_checkpoints shows them)"
        )
    return path.resolve()


def load(path: Path, *, trust: bool = False, warn: Warn) -> State:
    """The state in `path`, on the CPU, after its size and SHA-256 were checked.

    A file that this user signed is unpickled in full; any other yields tensors and plain values
    only, unless `trust`: unpickling runs code. Raises CheckpointError if the file is damaged, needs
    more trust than it has, or is no checkpoint of ours.
    """
    sidecar = _read_sidecar(path.with_suffix(".json"))
    if sidecar is None:
        warn(f"{path} has no readable sidecar: it is loaded unverified")
    try:
        with path.open("rb") as file:
            if sidecar is not None:
                _verify(path, file, sidecar)
                file.seek(0)
            own = sidecar is not None and _is_signed(sidecar)
            with warnings.catch_warnings(action="ignore"):  # of foreign formats: refused below
                state = torch.load(file, map_location="cpu", weights_only=not (own or trust))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or foreign file can raise anything
        found = _forbidden(error)
        if found is None:
            raise CheckpointError(
                f"{path} cannot be loaded: it is no checkpoint ({error!r:.80})"
            ) from error
        raise CheckpointError(
            f"{path} is refused: it was not written by this user, and it holds more than tensors "
            f"and plain values, which could run code ({found}); if you trust its origin, add "
            "--trust_checkpoint"
        ) from error
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} is no checkpoint of gpt2-from-scratch (schema {SCHEMA})")
    return state


def require_writable(folder: Path) -> None:
    """Makes `folder`; raises CheckpointError if it cannot take files. Sweeps what a kill left."""
    probe = folder / f"write_test_{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        atomic.sweep(folder, mine=lambda name: name.startswith("step_") or name in (LATEST, BEST))
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the checkpoint folder {folder}: {error.strerror}; "
            "choose another with --checkpoint_dir or --out_dir"
        ) from error


def rng_state(device: torch.device) -> State:
    """The random-number states of this process: Python, NumPy, torch CPU and its CUDA device."""
    numpy_state = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    kind, keys, position, has_gauss, gauss = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: State, device: torch.device) -> None:
    """Restores what `rng_state` took; a CUDA state is left out where there is no CUDA."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu().to(torch.uint8))
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu().to(torch.uint8), device)


class _HashingWriter:
    """A file for torch.save that digests what passes; the archive is written front to back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def sha256(self) -> str:
        return self._digest.hexdigest()


def _newest_good(folder: Path, complete: list[Checkpoint], warn: Warn) -> Path | None:
    for item in reversed(complete):
        try:
            with item.path.open("rb") as file:
                _verify(item.path, file, item.sidecar)
            return item.path
        except (CheckpointError, OSError) as error:
            warn(f"{error}; trying the checkpoint before it")
    if marks := list(folder.glob("step_*.json")):
        raise CheckpointError(
            f"all {len(marks)} checkpoints in {folder} are damaged or of another version; "
            "to start anew, choose another folder with --out_dir"
        )
    return None


def _verify(path: Path, file: BufferedReader, sidecar: Sidecar) -> None:
    size = os.fstat(file.fileno()).st_size
    if size != sidecar.bytes:
        raise CheckpointError(f"{path} has {size} bytes, its sidecar says {sidecar.bytes}")
    if hashlib.file_digest(file, "sha256").hexdigest() != sidecar.sha256:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not that of its sidecar")


def _read_sidecar(mark: Path) -> Sidecar | None:
    try:
        values = json.loads(mark.read_text())
        facts = Facts(**{name: values[name] for name in Facts.__dataclass_fields__})
        others = {name: values[name] for name in Sidecar.__dataclass_fields__ if name != "facts"}
        sidecar = Sidecar(facts=facts, **others)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    numbers = (facts.step, facts.epoch, sidecar.bytes, sidecar.time, sidecar.sequence)
    losses = (loss for loss in (facts.train_loss, facts.val_loss) if loss is not None)
    sound = all(isinstance(number, int | float) for number in (*numbers, *losses))
    return sidecar if sound and isinstance(sidecar.sha256, str) else None


def _to_json(sidecar: Sidecar) -> str:
    values = asdict(sidecar)
    return json.dumps(values.pop("facts") | values, indent=2) + "\n"


def _sign(digest: str) -> str | None:
    key = _signing_key(create=True)
    return hmac.new(key, digest.encode(), "sha256").hexdigest() if key else None


def _is_signed(sidecar: Sidecar) -> bool:
    key = _signing_key(create=False)
    if key is None or sidecar.hmac is None:
        return False
    expected = hmac.new(key, sidecar.sha256.encode(), "sha256").hexdigest()
    return hmac.compare_digest(expected.encode(), str(sidecar.hmac).encode())


def _signing_key(create: bool) -> bytes | None:
    """This user's key; None where there is none and none can be made (a read-only home)."""
    try:
        home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        path = Path(home) / "gpt2-from-scratch" / "key"
        if create and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f"key.{os.getpid()}.{secrets.token_hex(4)}")
            handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(fresh, path)  # fails if another process was first: its key counts
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
        key = path.read_bytes()
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    return key if len(key) == KEY_BYTES else None  # a key that anybody could guess proves nothing


def _forbidden(error: Exception) -> str | None:
    """What a pickle wanted to import or call, if that is why torch refused it."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    found = re.search(r"GLOBAL \S+", str(error))
    return found.group(0) if found else None


def _free_gb(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB"
    except OSError:
        return "? GB"
