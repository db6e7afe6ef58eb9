"""Checkpoints: a kill while one is written costs nothing, and none is loaded unverified.

`step_000250.pt` holds tensors and plain values; `step_000250.json` beside it is the commit mark and
all that a listing needs: a `.pt` without it was never finished. `latest.pt` and `best.pt` are
relative symlinks. What is found damaged is renamed to `….corrupt`, never removed.
"""

import contextlib
import functools
import itertools
import logging
import math
import os
import pickle
import re
import shutil
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, cast

import torch

from gpt2.base import atomic_files
from gpt2.base.errors import CheckpointError
from gpt2.checkpoint import integrity
from gpt2.checkpoint.metadata import (
    SCHEMA,
    CheckpointMetadata,
    CheckpointState,
    TrainingMetadata,
    metadata_to_json,
    read_metadata,
)

logger = logging.getLogger(__name__)

LATEST, BEST = "latest.pt", "best.pt"
CORRUPT_SUFFIX = ".corrupt"


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint in a folder."""

    path: Path
    metadata: CheckpointMetadata

    @property
    def training(self) -> TrainingMetadata:
        return self.metadata.training


def save(
    folder: Path,
    state: CheckpointState,
    training: TrainingMetadata,
    *,
    keep_last: int,
    resumed_from: Path | None = None,
) -> Path:
    """Writes a checkpoint, points `latest.pt` and `best.pt`, and removes what is no longer kept.

    Raises CheckpointError if the disk does not take it; the earlier checkpoints are intact then.
    """
    path = folder / f"step_{training.step:06d}.pt"
    try:
        before = list_checkpoints(folder)
        # A mark of this step, from a way that was left, must not outlive its file.
        drop_mark = functools.partial(path.with_suffix(".json").unlink, missing_ok=True)
        with atomic_files.writing(path, before_replacing=drop_mark) as file:
            writer = integrity.HashingWriter(file)
            torch.save({"schema": SCHEMA, **state}, cast(IO[bytes], writer))
        digests = writer.digests()
        metadata = CheckpointMetadata(
            training=training,
            schema=SCHEMA,
            bytes=path.stat().st_size,
            piece_bytes=integrity.PIECE_BYTES,
            sha256=digests,
            hmac=integrity.sign(digests),
            torch_version=torch.__version__,
            time=time.time(),
            sequence=1 + max((item.metadata.sequence for item in before), default=0),
        )
        atomic_files.write_text(path.with_suffix(".json"), metadata_to_json(metadata))
        atomic_files.point(folder / LATEST, path.name)
        complete = list_checkpoints(folder)
        best = find_best(complete)
        if best is not None:
            atomic_files.point(folder / BEST, best.path.name)
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
        atomic_files.point(link, f"{folder.name}/{complete[-1].path.name}")


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The finished checkpoints of `folder`, from their sidecars alone, newest last."""
    found = []
    for mark in folder.glob("step_*.json"):
        path, metadata = mark.with_suffix(".pt"), read_metadata(mark)
        if metadata is not None and path.exists():
            found.append(Checkpoint(path, metadata))
    return sorted(found, key=lambda item: (item.metadata.sequence, item.training.step))


def find_best(complete: list[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest validation loss among those that have one."""
    judged = [
        (item.training.val_loss, item)
        for item in complete
        if item.training.val_loss is not None and math.isfinite(item.training.val_loss)
    ]
    return min(judged, key=lambda pair: pair[0])[1] if judged else None


def find(folder: Path, which: str, *, set_aside: bool = False) -> Path | None:
    """The checkpoint that `latest`, `best`, a step or a path means.

    `latest` skips damaged ones, with a warning, and is None in a folder that never had any;
    `set_aside` renames those, for a run that will write to the folder. Raises CheckpointError for
    anything else that is not there.
    """
    if which == "latest":
        return _find_latest(folder, set_aside)
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
            if item.training.step == int(which):
                return item.path
        steps = ", ".join(str(item.training.step) for item in complete) or "none"
        raise CheckpointError(f"{folder} has no checkpoint of step {which}; steps: {steps}")
    path = Path(which)
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint at {which}; use latest, best, a step or a path "
            "(--list_checkpoints shows them)"
        )
    return path.resolve()


def load(path: Path, *, trust: bool = False) -> CheckpointState:
    """The state in `path`, mapped from the file, after its size and SHA-256 were checked.

    A file that this user signed is unpickled in full; any other yields tensors and plain values
    only, unless `trust`: unpickling runs code. Raises CheckpointError if the file is damaged, needs
    more trust than it has, or is no checkpoint of ours.
    """
    metadata = read_metadata(path.with_suffix(".json"))
    if metadata is None:
        logger.warning("%s has no readable metadata: it is loaded unverified", path)
    state = unpickle(path, trust=trust, metadata=metadata)
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} is no checkpoint of gpt2-from-scratch (schema {SCHEMA})")
    return state


def unpickle(
    path: Path, *, trust: bool = False, metadata: CheckpointMetadata | None = None
) -> object:
    """What torch.save wrote to `path`, whoever called it; raises CheckpointError as `load` does."""
    try:
        with path.open("rb") as file:
            if metadata is not None:
                _verify(path, file, metadata)
            own = metadata is not None and integrity.is_signed(metadata.sha256, metadata.hmac)
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


def remove_unfinished(folder: Path) -> None:
    """Removes the temporary files of killed writers; only the run that owns `folder` may call
    it."""
    atomic_files.sweep(folder, mine=lambda name: name.startswith("step_") or name in (LATEST, BEST))


def newest_good(items: list[Checkpoint]) -> Checkpoint | None:
    """The last of `items` that is undamaged; logs a warning for each damaged one after it.

    Raises CheckpointError if a file cannot be read: that is not damage, and may be temporary.
    """
    good, damaged = _newest_verified(items)
    for reason in damaged.values():
        logger.warning(reason)
    return good


def _find_latest(folder: Path, set_aside: bool) -> Path | None:
    for link in (folder / LATEST, folder / BEST):
        if link.is_symlink() and not link.exists():
            logger.warning("%s points to %s, which does not exist", link, os.readlink(link))
    metadata_paths = sorted(folder.glob("step_*.json"))
    unreadable = {
        path.with_suffix(".pt"): f"{path} is empty, damaged or of another version"
        for path in metadata_paths
        if read_metadata(path) is None
    }
    good, damaged = _newest_verified(list_checkpoints(folder))
    for path, reason in (unreadable | damaged).items():
        renamed = good is not None and set_aside and _set_aside(path)
        suffix = f"; renamed to {path.name}{CORRUPT_SUFFIX}" if renamed else ""
        logger.warning("%s%s", reason, suffix)
    if metadata_paths and good is None:
        raise CheckpointError(
            f"all {len(metadata_paths)} checkpoints in {folder} are damaged or of another "
            "version; to start a new run, choose another folder with --out_dir"
        )
    if good is None and (bare := sorted(folder.glob("step_*.pt"))):
        logger.warning(
            "%s contains %s without its .json, which is skipped; --resume %s loads it unverified",
            folder,
            bare[-1].name,
            bare[-1],
        )
    return good.path if good else None


def _newest_verified(items: list[Checkpoint]) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The last of `items` that is undamaged, and for each damaged one after it the reason."""
    damaged: dict[Path, str] = {}
    for item in reversed(items):
        try:
            _verify_patiently(item)
            return item, damaged
        except CheckpointError as error:
            damaged[item.path] = str(error)
        except OSError as error:
            raise CheckpointError(
                f"cannot read {item.path}: {error.strerror or error}; nothing was changed"
            ) from error
    return None, damaged


def _verify_patiently(item: Checkpoint) -> None:
    for pause_s in (1, 3, None):
        try:
            with item.path.open("rb") as file:
                return _verify(item.path, file, item.metadata)
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


def _verify(path: Path, file: BufferedReader, metadata: CheckpointMetadata) -> None:
    size = os.fstat(file.fileno()).st_size
    if size != metadata.bytes:
        raise CheckpointError(f"{path} has {size} bytes, its metadata says {metadata.bytes}")
    if not integrity.is_whole(file.fileno(), metadata.sha256, metadata.piece_bytes):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not that of its metadata")


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
