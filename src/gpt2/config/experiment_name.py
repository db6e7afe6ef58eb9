"""Names of runs that go on side by side, and what follows from a name. Pure.

An experiment is a run with a name; name and GPU together say where its files lie.
"""

import re
from dataclasses import dataclass

from gpt2.base.errors import ConfigError

_SAFE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")  # no _, so that folders read back as they were
_LONGEST = 100  # characters: a file's name may have 255
CPU = "cpu"


@dataclass(frozen=True)
class ExperimentConfig:
    """A name, for runs side by side; and Weights & Biases, where all are seen together."""

    experiment_name: str | None = None
    """name of this run among several, with files of its own; default is --wandb_run_name"""
    gpu_id: str | None = None
    """GPU to train on, or cpu; its files are named after it; default is the first of
    CUDA_VISIBLE_DEVICES, else the current one, else cpu"""
    use_wandb: bool = False
    """log to Weights & Biases; WANDB_MODE=offline keeps it on this machine"""
    wandb_project: str = "gpt2-from-scratch"
    """where Weights & Biases shows the run"""
    wandb_run_name: str | None = None
    """what it is called there; default is --experiment_name"""

    def __post_init__(self) -> None:
        flag = "wandb_run_name" if self.experiment_name is None else "experiment_name"
        _require_safe(flag, self.name, _SAFE_NAME, "letters, digits, . _ and -")
        _require_safe("gpu_id", self.gpu_id, _SAFE_ID, "letters, digits, . and -")

    @property
    def name(self) -> str | None:
        """What the run is called among others; None if it has no name."""
        return self.wandb_run_name if self.experiment_name is None else self.experiment_name


def _require_safe(flag: str, value: str | None, safe: re.Pattern[str], characters: str) -> None:
    if value is None or (len(value) <= _LONGEST and safe.fullmatch(value)):
        return
    instead = "; or give --experiment_name" if flag == "wandb_run_name" else ""
    raise ConfigError(
        f"{flag}={value!r} is part of files' names: it must have 1 to {_LONGEST} characters, "
        f"{characters}, and begin with none of . and -{instead}"
    )


def label(name: str, gpu_id: str) -> str:
    """`exp_gpu_2`: what the experiment's folders are called, and what its runs begin with."""
    return f"{name}_gpu_{gpu_id}"


def read_label(text: str) -> tuple[str, str] | None:
    """Name and GPU of a label; None if it is none."""
    name, mark, gpu_id = text.rpartition("_gpu_")
    return (name, gpu_id) if mark and name and _SAFE_ID.fullmatch(gpu_id) else None


def link_name(name: str, gpu_id: str) -> str:
    """The file that always is the experiment's newest checkpoint."""
    return f"ckpt_exp_{label(name, gpu_id)}.pt"


def first_visible(visible: str) -> str:
    """The first GPU of a CUDA_VISIBLE_DEVICES, as a gpu_id; `cpu` if it hides all."""
    first = visible.split(",")[0].strip()
    safe = re.sub(r"[^A-Za-z0-9.-]", "-", first)  # as in the older MIG-GPU-…/1/0
    return safe if safe and not safe.startswith("-") else CPU


def gpu_index(gpu_id: str, visible: str | None, count: int) -> int:
    """Which of the `count` GPUs that CUDA shows this process has that id.

    Where there is one GPU only and the ids cannot be compared (a number, a UUID), it is that one.
    Raises ConfigError if CUDA shows no such GPU.
    """
    shown = [str(index) for index in range(count)]
    if visible is not None:
        shown = [first_visible(item) for item in visible.split(",")][:count]
    if gpu_id in shown:
        return shown.index(gpu_id)
    if count == 1 and gpu_id.isdigit() != shown[0].isdigit():
        return 0
    given = f"CUDA_VISIBLE_DEVICES={visible}" if visible is not None else "this machine"
    raise ConfigError(
        f"gpu_id={gpu_id}, but {given} has {', '.join(shown)}; "
        f"leave --gpu_id out, or start with CUDA_VISIBLE_DEVICES={gpu_id}"
    )
