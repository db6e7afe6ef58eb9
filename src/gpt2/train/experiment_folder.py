"""An experiment's files: the folders that a named run has, the link to its newest checkpoint."""

from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from gpt2.base import atomic_files
from gpt2.base.errors import CheckpointError
from gpt2.base.validation import suggestion
from gpt2.checkpoint import store
from gpt2.config import experiment_name, options, presets
from gpt2.config.run import RunConfig
from gpt2.distributed import device


class TrainedExperiment(NamedTuple):
    """A named run with a checkpoint."""

    name: str
    gpu_id: str
    step: int


def resolve(run_config: RunConfig) -> RunConfig:
    """The run with the folders of its name and GPU; a run without a name is returned unchanged."""
    settings = run_config.experiment
    if settings.name is None:
        return run_config
    return place(run_config, settings.gpu_id or device.gpu_id(run_config.machine.device))


def place(run_config: RunConfig, gpu_id: str) -> RunConfig:
    """The named run with its name and its folders for that GPU; idempotent."""
    name = run_config.experiment.name
    assert name is not None
    label = experiment_name.label(name, gpu_id)
    checkpoint_dir = run_config.checkpoint.checkpoint_dir
    if checkpoint_dir == presets.preset(run_config.preset).checkpoint.checkpoint_dir:
        checkpoint_dir = Path("checkpoints")  # a name keeps presets apart: they share one folder
    values = {"experiment_name": name, "gpu_id": gpu_id}
    folders = {
        "checkpoint_dir": _within(checkpoint_dir, label),
        "log_dir": _within(run_config.watch.log_dir, label),
    }
    return options.overlay(run_config, values | folders)


def _within(folder: Path, label: str) -> Path:
    return folder if folder.name == label else folder / label


def run_name(run_config: RunConfig, stored: str | None = None) -> str:
    """What a run is called in logs and TensorBoard: as it was `stored` in the checkpoint that it
    continues, unless that is another experiment's."""
    begins: str = run_config.preset
    if (name := run_config.experiment.name) is not None:
        begins = experiment_name.label(name, run_config.experiment.gpu_id or experiment_name.CPU)
        stored = stored if stored and stored.rsplit("_", 2)[0] == begins else None
    return stored or f"{begins}_{datetime.now():%Y%m%d_%H%M%S}"


def link(run_config: RunConfig) -> Path | None:
    """The link to the newest checkpoint of an experiment in its folders; None without a name."""
    settings = run_config.experiment
    if settings.name is None or settings.gpu_id is None:
        return None
    name = experiment_name.link_name(settings.name, settings.gpu_id)
    return run_config.checkpoint.checkpoint_dir.parent / name


def folders(run_config: RunConfig) -> list[Path]:
    """Where its checkpoints lie; of a name without a GPU, those of every GPU."""
    settings = run_config.experiment
    resolved = resolve(run_config).checkpoint.checkpoint_dir
    if settings.name is None or settings.gpu_id is not None:
        return [resolved]
    found = [
        folder
        for folder in sorted(resolved.parent.glob(experiment_name.label(settings.name, "*")))
        if (read := experiment_name.read_label(folder.name)) and read[0] == settings.name
    ]
    return found or [resolved]


def existing(base: Path) -> list[TrainedExperiment]:
    """The experiments with a checkpoint in a folder of `base`."""
    found = []
    for folder in sorted(base.glob(experiment_name.label("*", "*"))):
        read = experiment_name.read_label(folder.name)
        if read and (complete := store.list_checkpoints(folder)):
            found.append(TrainedExperiment(*read, complete[-1].training.step))
    return found


def require_possible(run_config: RunConfig) -> None:
    """Raises CheckpointError if a file is in the way of the link, or there is nothing that
    `--init_from resume` could continue; for experiments in their folders, before they have any."""
    newest, settings = link(run_config), run_config.checkpoint
    if newest is None:
        return
    if newest.exists() and atomic_files.pointed_at(newest) is None:
        raise CheckpointError(
            f"{newest} is a file of its own, and not the link to an experiment's newest "
            "checkpoint; move it away, or choose another --experiment_name"
        )
    continues = settings.init_from == "resume" and settings.resume in (None, "latest")
    if continues and not any(settings.checkpoint_dir.glob("step_*.json")):
        raise CheckpointError(_nothing_to_continue(run_config, newest.parent))


def _nothing_to_continue(run_config: RunConfig, base: Path) -> str:
    name, gpu_id = run_config.experiment.name, run_config.experiment.gpu_id
    assert name is not None
    assert gpu_id is not None
    missing = f"experiment {name} on {_spoken(gpu_id)} has no checkpoint in {base}"
    there = existing(base)
    if not there:
        return f"{missing}, nor has any other; begin it without --init_from resume"
    listed = "".join(
        f"\n  {item.name} on {_spoken(item.gpu_id)}, step {item.step}" for item in there
    )
    others = [item.gpu_id for item in there if item.name == name]
    if others:
        path = base / experiment_name.link_name(name, others[0])
        remedy = f"; --gpu_id {others[0]} continues it there, --resume {path} here."
    else:
        remedy = suggestion(name, sorted({item.name for item in there})) or "."
    return f"{missing}{remedy} There are:{listed}"


def _spoken(gpu_id: str) -> str:
    return gpu_id if gpu_id == experiment_name.CPU else f"gpu {gpu_id}"
