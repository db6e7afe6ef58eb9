"""Checkpoints on disk: saving, listing, finding and loading them.

`step_000250.pt` holds tensors and plain values. `step_000250.json` holds its metadata and is
written last: a `.pt` without it is incomplete, so a kill during a save costs nothing. `latest.pt`
and `best.pt` are relative symlinks, or small text files where the file system has none. A damaged
checkpoint is renamed to `….corrupt`, never removed.
"""

import contextlib
import errno
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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, cast

import torch

from gpt2.base import atomic_files, regular_file
from gpt2.base.errors import CheckpointError, is_out_of_memory
from gpt2.base.text import counted
from gpt2.checkpoint import integrity, verification
from gpt2.checkpoint.metadata import (
    SCHEMA,
    CheckpointMetadata,
    CheckpointState,
    TrainingMetadata,
    metadata_to_json,
    read_metadata,
)
from gpt2.checkpoint.verification import Verified
from gpt2.distributed.world import World

logger = logging.getLogger(__name__)

LATEST, BEST = "latest.pt", "best.pt"
ZIP = b"PK\x03\x04"
"""how a file of torch begins since its version 1.6; an older one cannot be mapped"""
CLASS_OF_SCRIPT = re.compile(
    r"GLOBAL (?:__main__\.(\w+)|(?:train_gpt2|model)\.(GPTConfig))|"
    r"'(\w+)' on <module '(?:gpt2\.)?__main__'"
)
"""in the errors of torch and Python about a pickled object of it; `python -m gpt2` runs
`gpt2.__main__`"""
CORRUPT_SUFFIX = ".corrupt"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint in a folder."""

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
    """Writes a checkpoint, updates `latest.pt` and `best.pt`, and prunes older checkpoints.

    `resumed_from` is never pruned. Returns the path of the checkpoint. Raises CheckpointError if it
    cannot be written; the earlier checkpoints are intact then.
    """
    path = folder / file_name(training.step)
    before: list[Checkpoint] = []
    try:
        before = list_checkpoints(folder)
        # The metadata of an earlier save of this step must not describe the new file.
        drop_metadata = functools.partial(path.with_suffix(".json").unlink, missing_ok=True)
        with atomic_files.writing(path, before_replacing=drop_metadata) as file:
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
        complete = list_checkpoints(folder)
    except (OSError, RuntimeError) as error:
        earlier = "earlier checkpoints are intact; " if before else ""
        raise CheckpointError(
            f"cannot save {path}: {_disk_error(error)} ({_free_gb(folder)} free); {earlier}"
            "make room, or choose another folder with --checkpoint_dir"
        ) from error
    try:
        update_links(folder, complete)
    except OSError as error:  # the checkpoint is whole; the next save tries again
        logger.warning("cannot point %s and %s at the newest files: %s", LATEST, BEST, error)
    with contextlib.suppress(OSError):  # the next save prunes again
        prune(complete, keep_last, keep=[*_best_of_each_validation(complete), resumed_from])
    return path


def file_name(step: int) -> str:
    """The name of the checkpoint of `step`: step_000250.pt"""
    return f"step_{step:06d}.pt"


def prune(complete: list[Checkpoint], keep_last: int, keep: Iterable[Path | None]) -> None:
    """Removes all but the newest `keep_last` (at least two) and those in `keep`."""
    kept = {path.resolve() for path in keep if path is not None}
    for old in complete[: -max(2, keep_last)]:
        if old.path.resolve() not in kept:
            # The metadata first: a kill between the two leaves a file that does not count.
            old.path.with_suffix(".json").unlink(missing_ok=True)
            old.path.unlink(missing_ok=True)


def update_links(folder: Path, complete: list[Checkpoint]) -> None:
    """Points `latest.pt` at the newest and `best.pt` at the best of the checkpoints in `folder`."""
    for name, target in ((LATEST, complete[-1] if complete else None), (BEST, find_best(complete))):
        if target is not None:
            atomic_files.point(folder / name, target.path.name)


def point_at_newest(link: Path, folder: Path) -> None:
    """Points the symlink `link`, which lies beside `folder`, to the newest checkpoint in it."""
    if complete := list_checkpoints(folder):
        atomic_files.point(link, f"{folder.name}/{complete[-1].path.name}")


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints in `folder`, newest last; only their metadata is read."""
    found = []
    for metadata_path in folder.glob("step_*.json"):
        path, metadata = metadata_path.with_suffix(".pt"), read_metadata(metadata_path)
        if metadata is not None and path.exists():
            found.append(Checkpoint(path, metadata))
    return sorted(found, key=lambda item: (item.metadata.sequence, item.training.step))


def find_best(complete: list[Checkpoint]) -> Checkpoint | None:
    """The checkpoint with the lowest validation loss; None if none has a finite one.

    Only losses of the same corpora and number of rows as the newest one are compared. A loss of an
    earlier version, whose number of rows is not known, compares with any.
    """
    evaluated = _evaluated(complete)
    if not evaluated:
        return None
    newest = evaluated[-1][1].training
    comparable = [
        (loss, item)
        for loss, item in evaluated
        if item.training.validated == newest.validated
        and len({item.training.val_rows, newest.val_rows} - {None}) <= 1
    ]
    return min(comparable, key=lambda pair: pair[0])[1]


def _best_of_each_validation(complete: list[Checkpoint]) -> list[Path]:
    """The best checkpoint for each set of corpora and number of rows that losses are of: a resume
    with other ones must not cost what was the best before, and may be taken back."""
    best: dict[tuple[str, int | None], tuple[float, Checkpoint]] = {}
    for loss, item in _evaluated(complete):
        validation = item.training.validated, item.training.val_rows
        if validation not in best or loss < best[validation][0]:
            best[validation] = loss, item
    return [item.path for _, item in best.values()]


def _evaluated(complete: list[Checkpoint]) -> list[tuple[float, Checkpoint]]:
    """The checkpoints with a finite validation loss, each after that loss."""
    losses = ((item.training.val_loss, item) for item in complete)
    return [(loss, item) for loss, item in losses if loss is not None and math.isfinite(loss)]


def find(folder: Path, which: str, *, set_aside: bool = False) -> Path | None:
    """The path of the checkpoint that `which` names: `latest`, `best`, a step or a path (see
    `at`).

    `latest` skips damaged checkpoints, with a warning, and returns None if there are no checkpoints
    at all. `set_aside` renames damaged ones; only the run that owns `folder` may set it. Raises
    CheckpointError if all are damaged, or if another `which` does not exist.
    """
    if which == "latest":
        return _find_latest(folder, set_aside)
    complete = list_checkpoints(folder)
    if which == "best":
        best = find_best(complete)
        if best is None:
            raise CheckpointError(
                f"no checkpoint in {folder} has a validation loss; use --resume latest or "
                "--checkpoint latest"
            )
        return best.path
    if which.isdigit():
        for item in complete:
            if item.training.step == int(which):
                return item.path
        steps = ", ".join(str(item.training.step) for item in complete) or "none"
        raise CheckpointError(f"{folder} has no checkpoint of step {which}; steps: {steps}")
    path = at(Path(which))
    if path is None:
        raise CheckpointError(
            f"no checkpoint at {which}; use latest, best, a step or a path "
            "(--list_checkpoints shows them)"
        )
    return path


def at(path: Path) -> Path | None:
    """The checkpoint that `path` names: its file or a link to it, its metadata, or the newest one
    in a --checkpoint_dir or an --out_dir. None if there is none."""
    path = resolved(path)
    if path.is_dir():
        return _find_latest(path, False) or _find_latest(path / "checkpoints", False)
    if path.suffix == ".json":
        path = path.with_suffix(".pt")
    return path if path.is_file() else None


def resolved(path: Path) -> Path:
    """The path of a checkpoint's file, also if `path` is a link to it; the metadata lies there.
    Raises CheckpointError for links that form a circle, and for names that no file can have."""
    try:
        found = (atomic_files.pointed_at(path.resolve()) or path).resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found.stat()  # from Python 3.13 on, `resolve` does not raise for a circle
        return found
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot read {path}: {reason}") from error


def load(path: Path, *, trust: bool = False, world: World | None = None) -> CheckpointState:
    """The state in `path`, mapped from the file, after its size and SHA-256 were verified.

    All ranks of a run call it with their `world`: the first rank of each machine verifies the file,
    and no rank unpickles it before all machines have.

    A file that this user signed is unpickled in full. Any other yields tensors and plain values
    only, because unpickling can run code, unless `trust` is set. Raises CheckpointError if the file
    cannot be read, is damaged, needs `trust`, or is not a checkpoint of this project.
    """
    logger.info("Loading checkpoint from: %s", path)
    verify_it = functools.partial(verification.verify, path)
    verified = world.run_on_local_rank0(verify_it) if world else verify_it()
    state = unpickle(path, trust=trust, verified=verified)
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} is not a checkpoint of gpt2-from-scratch (schema {SCHEMA})")
    return state


def unpickle(
    path: Path,
    *,
    trust: bool = False,
    verified: Verified | None = None,
    as_values: Mapping[str, type] = MappingProxyType({}),
) -> object:
    """What torch.save wrote to `path`, by this project or another one.

    In place of an object of another program's class, whose name `as_values` has, there is one of
    the class there with its attributes; that runs no code. Raises CheckpointError as `load` does.
    An error of CUDA is raised as it is.
    """
    try:
        with regular_file.open_to_read(path) as file:
            if verified is not None and verification.version_of(file) != verified.version:
                # Another file has the name now, or this rank sees the folder through another mount.
                verified = verification.verify_open_file(path, file, verified.metadata)
            signed = verified is not None and integrity.is_signed(
                verified.metadata.sha256, verified.metadata.hmac
            )
            load_it = functools.partial(
                torch.load,
                f"/proc/self/fd/{file.fileno()}",  # this very file; torch maps only by path
                map_location="cpu",
                mmap=file.peek(len(ZIP)).startswith(ZIP),
            )
            safe: list[Any] = [(stand_in, name) for name, stand_in in as_values.items()]
            with warnings.catch_warnings(action="ignore"):  # about formats that are refused below
                if signed:
                    return load_it(weights_only=False)
                try:
                    with torch.serialization.safe_globals(safe):
                        return load_it(weights_only=True)
                except pickle.UnpicklingError:
                    if not trust:
                        raise
                    return load_it(weights_only=False)
    except CheckpointError:
        raise
    except OSError as error:
        if error.errno == errno.EINVAL and error.filename is None:  # torch goes to a damaged offset
            raise CheckpointError(_reason(path, error)) from error
        raise verification.unreadable(path, error) from error
    except Exception as error:  # a damaged or foreign file can raise anything
        if is_cuda_error(error):
            raise
        raise CheckpointError(_reason(path, error)) from error


def _reason(path: Path, error: Exception) -> str:
    """Why torch could not load `path`, and what to do."""
    if is_out_of_memory(error):
        return (
            f"not enough memory to load {path} ({error!r:.120}); stop other processes on this "
            "machine or use one with more memory"
        )
    if found := CLASS_OF_SCRIPT.search(str(error)):
        return _written_by_script(path, found[1] or found[2] or found[3])
    if imported := _forbidden_import(error):
        return (
            f"{path} is refused: it was not written by this user, and contains more than tensors "
            f"and plain values, which could run code ({imported}); if you trust its origin, add "
            "--trust_checkpoint"
        )
    # Of pickles, torch writes a page about its own options.
    text = "" if isinstance(error, pickle.UnpicklingError) else str(error).strip()
    detail = f" ({text.splitlines()[0]:.80})" if text else ""
    return f"cannot load {path}: it is damaged or not a checkpoint{detail}"


def _written_by_script(path: Path, name: str) -> str:
    """What to do with a file that holds an object of the class `name` of a script."""
    what = f"{path} holds an object of the class {name} of the script that wrote it"
    if name == "GPTConfig":
        return (
            f"{what}, as checkpoints of build-nanogpt do; the weights of such a GPT-2 are read by "
            f"--init_from nanogpt:{path} and --checkpoint nanogpt:{path}"
        )
    return (
        f"{what}, which no other program can read, also with --trust_checkpoint; in that script, "
        "save tensors and plain values, as nanoGPT does: torch.save({'model': model.state_dict(), "
        "'model_args': dict(n_layer=…, n_head=…, n_embd=…, block_size=…, vocab_size=…, bias=…)}, "
        "'ckpt.pt'), and use nanogpt:ckpt.pt"
    )


def is_cuda_error(error: Exception) -> bool:
    """Whether a device failed, or its memory is full."""
    return isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error)
    )


def remove_unfinished(folder: Path) -> None:
    """Removes the temporary files of killed writers; only the run that owns `folder` may call
    it."""
    atomic_files.remove_temporary(
        folder, owns=lambda name: name.startswith("step_") or name in (LATEST, BEST)
    )


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
        target = atomic_files.pointed_at(link)
        if target is not None and not target.exists():
            logger.warning("%s points to %s, which does not exist", link, target.name)
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
            f"no checkpoint in {folder} can be used ({counted(len(metadata_paths), 'file')} "
            "damaged or of another version); a new run needs another folder, with --out_dir"
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
            verification.verify_against(item.path, item.metadata)
            return item, damaged
        except CheckpointError as error:
            damaged[item.path] = str(error)
        except OSError as error:
            raise verification.unreadable(item.path, error) from error
    return None, damaged


def _set_aside(path: Path) -> bool:
    """Renames a damaged checkpoint: its metadata first, as when one is removed."""
    for part in (path.with_suffix(".json"), path):
        if part.exists():
            os.replace(part, _free_name(part.with_name(part.name + CORRUPT_SUFFIX)))
    return True


def _free_name(path: Path) -> Path:
    numbers = (path.with_name(f"{path.name}{number}") for number in itertools.count(2))
    return next(item for item in itertools.chain([path], numbers) if not item.exists())


def _forbidden_import(error: Exception) -> str | None:
    """What a pickle wanted to import or call, if torch refused it for that."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    found = re.search(r"GLOBAL \S+", str(error))
    return found.group(0) if found else None


def _disk_error(error: BaseException) -> BaseException:
    """The OSError that caused `error`, else `error`: torch's own only names a place in its file."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found or error


def _free_gb(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB"
    except OSError:
        return "? GB"
