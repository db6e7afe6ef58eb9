"""Whether two trainings can run side by side on two GPUs of this machine.

`python tests/test_parallel_gpus.py` says so, or what stands against it with exit code 1.
"""

import functools
import io
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console

import side_by_side
from gpt2.base.errors import UserError
from gpt2.base.text import counted
from gpt2.config import flops
from gpt2.config.model import ModelConfig
from gpt2.experiments import api
from gpt2.experiments.pool import slots
from gpt2.experiments.pool.job import Slot
from gpt2.inspection import checks, machine
from gpt2.inspection.machine import Gpu, Torch

POSSIBLE = "✓ Parallel training on 2 GPUs is possible!"
IMPOSSIBLE = "✗ Parallel training on 2 GPUs is not possible:"
TRAINING_BYTES = flops.training_bytes(ModelConfig(), "adamw")


def obstacles(gpus: list[Gpu], build: Torch, driver: str | None, visible: str | None) -> list[str]:
    """What stands against a GPT-2 on each of two GPUs; `visible` is CUDA_VISIBLE_DEVICES."""
    bad = [item for item in checks.check_gpus(gpus, TRAINING_BYTES) if item.level == "PROBLEM"]
    if len(gpus) - len(bad) >= 2:
        return []
    found = [f"{item.what}: {item.fact}; {item.remedy}" for item in bad]
    if len(gpus) < 2:
        found.append(f"torch sees {counted(len(gpus), 'GPU')}, expected 2")
    if not driver:
        found.append("no NVIDIA driver; install one, then nvidia-smi lists the GPUs")
    if not build.cuda:
        found.append(f"torch {build.version} is for CPUs alone; make clean install CPU=0")
    if visible is not None and len(gpus) < 2:
        found.append(f"CUDA_VISIBLE_DEVICES={visible} hides the other GPUs; unset it or name two")
    return found


def failures(chosen: Sequence[Slot]) -> list[str]:
    """Why two jobs failed on these slots; empty if both ran at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        job = functools.partial(side_by_side.meets, folder=folder)
        swept = api.sweep(
            job,
            [{}],
            2,
            folder=Path(folder, "sweep"),
            engine=api.Engine(chosen),
            limits=api.Limits(retries=0),
            log_dir=Path(folder, "logs"),
            out=Console(file=io.StringIO()),
        )
    return [f"{item.slot}: {item.reason}" for item in swept.records if item.state == "failed"]


def main() -> int:
    """Prints the answer for this machine; returns the exit code."""
    try:
        gpus = machine.gpus()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        against = obstacles(gpus, machine.installed_torch(), machine.driver(), visible)
        against = against or failures(slots.of_machine(max_gpus=2))
    except UserError as error:  # CUDA_VISIBLE_DEVICES is invalid
        gpus, against = [], [str(error)]
    except RuntimeError as error:  # a GPU does not respond
        gpus, against = [], [f"{str(error).strip().splitlines()[0]}; see nvidia-smi"]
    if against:
        print(IMPOSSIBLE, *(f"  - {line}" for line in against), sep="\n")
        return 1
    for gpu in gpus:
        print(f"GPU {gpu.id}: {gpu.name}, {checks.gigabytes(gpu.free_bytes)} free")
    print(POSSIBLE)
    return 0


FREE, FULL = (
    Gpu(gpu, "NVIDIA H100", 80 * 10**9, free, (9, 0))
    for gpu, free in (("0", 79 * 10**9), ("1", 10**9))
)
CUDA, CPU = Torch("2.13.0", "13.0", "2.27.3"), Torch("2.13.0", None, None)


@pytest.mark.parametrize(
    ("gpus", "build", "driver", "visible", "words"),
    [
        ([], CPU, None, None, ["torch sees 0 GPUs", "no NVIDIA driver", "for CPUs alone"]),
        ([], CPU, "580.65", None, ["torch sees 0 GPUs", "2.13.0 is for CPUs alone"]),
        ([], CUDA, "580.65", "", ["torch sees 0 GPUs", "CUDA_VISIBLE_DEVICES= hides"]),
        ([FREE], CUDA, "580.65", None, ["torch sees 1 GPU, expected 2"]),
        ([FREE], CUDA, "580.65", "3", ["CUDA_VISIBLE_DEVICES=3 hides", "name two"]),
        ([FREE, FULL], CUDA, "580.65", None, ["GPU 1: NVIDIA H100, 80", "another process has 79"]),
    ],
)
def test_what_stands_against_two_gpus(
    gpus: list[Gpu], build: Torch, driver: str | None, visible: str | None, words: list[str]
):
    found = " ".join(obstacles(gpus, build, driver, visible))
    assert [word for word in words if word not in found] == [], found


def test_two_free_gpus_suffice():
    assert obstacles([FREE, FULL, FREE], CUDA, "580.65", "0,1,2") == []


def test_two_jobs_run_at_the_same_time():
    assert failures(slots.of_cores(2, "1")) == []


def test_a_wrong_list_of_gpus_stands_against_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0;1")
    assert main() == 1
    assert "'0;1' is not a GPU" in capsys.readouterr().out


def test_the_answer_for_this_machine(capsys: pytest.CaptureFixture[str]):
    code = main()
    said = capsys.readouterr().out
    if torch.cuda.device_count() < 2:
        assert code == 1 and said.startswith(IMPOSSIBLE) and "torch sees" in said
    else:
        assert (code == 0) == (POSSIBLE in said)


if __name__ == "__main__":
    sys.exit(main())
