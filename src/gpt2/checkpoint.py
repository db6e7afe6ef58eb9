"""Checkpoints: a kill while one is written costs nothing, and none is loaded unverified.

`step_000250.pt` holds tensors and plain values; `step_000250.json` beside it is the commit mark and
all that a listing needs: a `.pt` without it was never finished. `latest.pt` and `best.pt` are
relative symlinks. What is found damaged is renamed to `….corrupt`, never removed.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from gpt2 import atomic, integrity
from gpt2.errors import CheckpointError

SCHEMA = 1
LATEST, BEST = "latest.pt", "best.pt"
CORRUPT_SUFFIX = ".corrupt"
State = dict[str, Any]
Warn = Callable[[str], None]
Reject = Callable[[Path, str], None]


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
    try:
        before = list_checkpoints(folder)
        # A mark of this step, from a way that was left, must not outlive its file.
        drop_mark = functools.partial(path.with_suffix(".json").unlink, missing_ok=True)
        with atomic.writing(path, before_replacing=drop_mark) as file:
            writer = integrity.HashingWriter(file)
            torch.save({"schema": SCHEMA, **state}, cast(IO[bytes], writer))
        digests = writer.digests()
        sidecar = Sidecar(
            facts=facts,
            schema=SCHEMA,
            bytes=path.stat().st_size,
            piece_bytes=integrity.PIECE_BYTES,
            sha256=digests,
            hmac=integrity.sign(digests),
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
    with contextlib.suppress(OSError):  # the next save prunes again
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


def point_at_newest(link: Path, folder: Path) -> None:
    """Points `link`, beside `folder`, at the newest checkpoint in it, if there is one."""
    if complete := list_checkpoints(folder):
        atomic.point(link, f"{folder.name}/{complete[-1].path.name}")


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


def find(folder: Path, which: str, warn: Warn, *, set_aside: bool = False) -> Path | None:
    """The checkpoint that `latest`, `best`, a step or a path means.

    `latest` skips damaged ones, with a warning, and is None in a folder that never had any;
    `set_aside` renames those, for a run that will write to the folder. Raises CheckpointError for
    anything else that is not there.
    """
    if which == "latest":
        return _newest_good(folder, warn, set_aside)
    complete = list_checkpoints(folder)
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
    """The state in `path`, mapped from the file, after its size and SHA-256 were checked.

    A file that this user signed is unpickled in full; any other yields tensors and plain values
    only, unless `trust`: unpickling runs code. Raises CheckpointError if the file is damaged, needs
    more trust than it has, or is no checkpoint of ours.
    """
    sidecar = _read_sidecar(path.with_suffix(".json"))
    if sidecar is None:
        warn(f"{path} has no readable sidecar: it is loaded unverified")
    state = unpickle(path, trust=trust, sidecar=sidecar)
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} is no checkpoint of gpt2-from-scratch (schema {SCHEMA})")
    return state


def unpickle(path: Path, *, trust: bool = False, sidecar: Sidecar | None = None) -> object:
    """What torch.save wrote to `path`, whoever called it; raises CheckpointError as `load` does."""
    try:
        with path.open("rb") as file:
            if sidecar is not None:
                _verify(path, file, sidecar)
            own = sidecar is not None and integrity.is_signed(sidecar.sha256, sidecar.hmac)
            with warnings.catch_warnings(action="ignore"):  # of foreign formats: refused below
                return torch.load(
                    f"/proc/self/fd/{file.fileno()}",  # the file that was verified, whatever `path`
                    map_location="cpu",  # is by now; a path, because only that can be mapped
                    weights_only=not (own or trust),
                    mmap=True,
                )
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


def require_writable(folder: Path) -> None:
    """Makes `folder`; raises CheckpointError if it cannot take files."""
    probe = folder / f"write_test_{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the checkpoint folder {folder}: {error.strerror}; "
            "choose another with --checkpoint_dir or --out_dir"
        ) from error


def sweep(folder: Path) -> None:
    """Removes what a killed writer left; only for the one run that has the folder."""
    atomic.sweep(folder, mine=lambda name: name.startswith("step_") or name in (LATEST, BEST))


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


def _newest_good(folder: Path, warn: Warn, set_aside: bool) -> Path | None:
    for link in (folder / LATEST, folder / BEST):
        if link.is_symlink() and not link.exists():
            warn(f"{link} points to {os.readlink(link)}, which is not there")
    marks = sorted(folder.glob("step_*.json"))
    damaged = {
        mark.with_suffix(".pt"): f"{mark} is empty, damaged or of another version"
        for mark in marks
        if _read_sidecar(mark) is None
    }
    good = newest_good(list_checkpoints(folder), damaged.__setitem__)
    for path, reason in damaged.items():
        renamed = good is not None and set_aside and _set_aside(path)
        warn(f"{reason}{f'; it is now {path.name}{CORRUPT_SUFFIX}' if renamed else ''}")
    if marks and good is None:
        raise CheckpointError(
            f"all {len(marks)} checkpoints in {folder} are damaged or of another version; "
            "to start anew, choose another folder with --out_dir"
        )
    if good is None and (bare := sorted(folder.glob("step_*.pt"))):
        warn(
            f"{folder} holds {bare[-1].name} without its .json, which is passed over; "
            f"--resume {bare[-1]} takes it unverified"
        )
    return good.path if good else None


def newest_good(items: list[Checkpoint], reject: Reject) -> Checkpoint | None:
    """The last of `items` that is whole; `reject` hears of the damaged ones after it.

    Raises CheckpointError if one cannot be read: that is no damage, and it may pass.
    """
    for item in reversed(items):
        try:
            _verify_patiently(item)
            return item
        except CheckpointError as error:
            reject(item.path, str(error))
        except OSError as error:
            raise CheckpointError(
                f"{item.path} cannot be read: {error.strerror or error}; nothing was changed"
            ) from error
    return None


def _verify_patiently(item: Checkpoint) -> None:
    for pause_s in (1, 3, None):
        try:
            with item.path.open("rb") as file:
                return _verify(item.path, file, item.sidecar)
        except OSError:  # network file systems have their moments
            if pause_s is None:
                raise
            time.sleep(pause_s)


def _set_aside(path: Path) -> bool:
    """Takes a damaged checkpoint out of the way: its mark first, as when one is removed."""
    for part in (path.with_suffix(".json"), path):
        if part.exists():
            os.replace(part, _free_name(part.with_name(part.name + CORRUPT_SUFFIX)))
    return True


def _free_name(path: Path) -> Path:
    numbers = (path.with_name(f"{path.name}{number}") for number in itertools.count(2))
    return next(item for item in itertools.chain([path], numbers) if not item.exists())


def _verify(path: Path, file: BufferedReader, sidecar: Sidecar) -> None:
    size = os.fstat(file.fileno()).st_size
    if size != sidecar.bytes:
        raise CheckpointError(f"{path} has {size} bytes, its sidecar says {sidecar.bytes}")
    if not integrity.is_whole(file.fileno(), sidecar.sha256, sidecar.piece_bytes):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not that of its sidecar")


def _read_sidecar(mark: Path) -> Sidecar | None:
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


def _to_json(sidecar: Sidecar) -> str:
    values = asdict(sidecar)
    return json.dumps(values.pop("facts") | values, indent=2) + "\n"


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
