"""Names of experiments, and the names of their files. Pure.

An experiment is a run with a name; several can train side by side. Name and GPU together determine
where its files are.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gpt2.base.errors import ConfigError
from gpt2.base.validation import require
from gpt2.config import gpu_list

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
        require(
            self.gpu_id in (None, CPU) or gpu_list.is_gpu(self.gpu_id or ""),
            f"gpu_id={self.gpu_id} is not a GPU; expected one such as 2 or GPU-8f3a51c2, or {CPU}",
        )

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


def first_gpu(shown: Sequence[str]) -> str:
    """The first of the GPUs that CUDA shows, as a gpu_id; `cpu` if it shows none."""
    return as_gpu_id(shown[0]) if shown else CPU


def as_gpu_id(gpu: str) -> str:
    """A GPU as a part of file names: without the / of MIG-GPU-…/1/0."""
    return gpu.replace("/", "-")


def gpu_index(gpu_id: str, shown: Sequence[str]) -> int:
    """The index of a GPU among those that CUDA shows this process.

    With one GPU and ids that cannot be compared (a number and a UUID), it is that one. Raises
    ConfigError if CUDA shows no such GPU.
    """
    ids = [as_gpu_id(gpu) for gpu in shown]
    if (found := gpu_list.find(gpu_id, ids)) is not None:
        return ids.index(found)
    if len(ids) == 1 and gpu_list.is_uuid(gpu_id) != gpu_list.is_uuid(ids[0]):
        return 0
    raise ConfigError(
        f"gpu_id={gpu_id} is invalid: CUDA shows this process {', '.join(ids)}; leave --gpu_id "
        f"out, or start with {gpu_list.VARIABLE}={gpu_id}"
    )
