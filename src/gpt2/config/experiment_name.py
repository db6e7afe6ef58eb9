"""Names of experiments, and the names of their files. Pure.

An experiment is a run with a name; several can train side by side. Name and GPU together determine
where its files are.
"""

import re
from dataclasses import dataclass

from gpt2.base.errors import ConfigError

_SAFE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
# Without _, so that `read_label` is unambiguous.
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
_MAX_LENGTH = 100  # characters; file systems allow 255 in the name of a file
CPU = "cpu"


@dataclass(frozen=True)
class ExperimentConfig:
    """The name of a run among several, and its place in Weights & Biases."""

    experiment_name: str | None = None
    """name of this run among several, which have separate files; default is --wandb_run_name"""
    gpu_id: str | None = None
    """GPU to train on, or cpu, as a part of file names; default is the first of
    CUDA_VISIBLE_DEVICES, else the current one, else cpu"""
    use_wandb: bool = False
    """log to Weights & Biases; with WANDB_MODE=offline, only to this machine"""
    wandb_project: str = "gpt2-from-scratch"
    """project of the run in Weights & Biases"""
    wandb_run_name: str | None = None
    """name of the run there; default is --experiment_name"""

    def __post_init__(self) -> None:
        flag = "wandb_run_name" if self.experiment_name is None else "experiment_name"
        _require_safe(flag, self.name, _SAFE_NAME, "letters, digits, . _ and -")
        _require_safe("gpu_id", self.gpu_id, _SAFE_ID, "letters, digits, . and -")

    @property
    def name(self) -> str | None:
        """The name of the run; None if it has none."""
        return self.wandb_run_name if self.experiment_name is None else self.experiment_name


def _require_safe(flag: str, value: str | None, safe: re.Pattern[str], characters: str) -> None:
    if value is None or (len(value) <= _MAX_LENGTH and safe.fullmatch(value)):
        return
    instead = "; or give --experiment_name" if flag == "wandb_run_name" else ""
    raise ConfigError(
        f"{flag}={value!r} is part of file names: expected 1 to {_MAX_LENGTH} characters, "
        f"{characters}, not beginning with . or -{instead}"
    )


def label(name: str, gpu_id: str) -> str:
    """`exp_gpu_2`: the name of the experiment's folders, and the beginning of its runs' names."""
    return f"{name}_gpu_{gpu_id}"


def read_label(text: str) -> tuple[str, str] | None:
    """Name and GPU of a label; None if `text` is not a label."""
    name, mark, gpu_id = text.rpartition("_gpu_")
    return (name, gpu_id) if mark and name and _SAFE_ID.fullmatch(gpu_id) else None


def link_name(name: str, gpu_id: str) -> str:
    """The link to the experiment's newest checkpoint."""
    return f"ckpt_exp_{label(name, gpu_id)}.pt"


def first_visible(visible: str) -> str:
    """The first GPU in a value of CUDA_VISIBLE_DEVICES, as a gpu_id; `cpu` if it hides all."""
    first = visible.split(",")[0].strip()
    safe = re.sub(r"[^A-Za-z0-9.-]", "-", first)  # such as the / of MIG-GPU-…/1/0
    return safe if safe and not safe.startswith("-") else CPU


def gpu_index(gpu_id: str, visible: str | None, count: int) -> int:
    """The index of a GPU among the `count` that CUDA shows this process.

    With one GPU and ids that cannot be compared (a number and a UUID), it is that one. Raises
    ConfigError if CUDA shows no such GPU.
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
        f"gpu_id={gpu_id} is invalid: {given} has {', '.join(shown)}; "
        f"leave --gpu_id out, or start with CUDA_VISIBLE_DEVICES={gpu_id}"
    )
