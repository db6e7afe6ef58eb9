"""The number of rows that a rank computes at once, on GPUs that are made up."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from gpt2.config import memory, presets
from gpt2.config.memory import Computation
from gpt2.config.run import RunConfig
from gpt2.distributed import device
from gpt2.distributed.device import DeviceMemory
from gpt2.distributed.world import World
from gpt2.train import micro_batch, trainer
from support import losses, small_config

CPU = torch.device("cpu")
EAGER = Computation(is_half=False, is_compiled=False)


def enough_for(run_config: RunConfig, rows: int, total: int = 80 * 10**9) -> DeviceMemory:
    needed = memory.step_bytes(run_config.model, rows, EAGER)
    return DeviceMemory(total, int(needed / memory.USABLE) + 1)


def test_cpus_have_a_size_for_every_preset():
    for run in presets.PRESETS.values():
        assert micro_batch.given(run) > 0


@pytest.mark.parametrize(
    ("preset", "rows"),
    [("gpt2-124m", 64), ("gpt2-350m", 32), ("gpt2-774m", 16), ("gpt2-1558m", 8), ("demo", 8)],
)
def test_cpus_compute_as_many_rows_as_ever(preset: str, rows: int):
    run = presets.preset(preset)
    assert run.data.mini_batch_size == "auto"
    assert not micro_batch.is_to_be_fitted(run, World(0, 1, CPU))
    assert micro_batch.given(run) == rows


def test_a_given_number_is_not_fitted(monkeypatch, data_root: Path, tmp_path: Path):
    run = small_config(data_root, tmp_path, mini_batch_size=2)
    monkeypatch.setattr(device, "memory", lambda _: DeviceMemory(1, 1))
    assert not micro_batch.is_to_be_fitted(run, World(0, 1, CPU))
    assert micro_batch.given(run) == 2


class Ranks(World):
    """A rank among others, whose memory is given."""

    others: Sequence[DeviceMemory] = ()
    order: ClassVar[list[str]] = []
    """what was done, in order"""

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        return [list(values), *([*other] for other in self.others)]

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.order.append(f"exchange {tensor.nbytes} bytes")
        return tensor

    def all_reduce_max(self, value: int) -> int:
        return value


def test_the_rank_with_the_least_memory_decides(data_root: Path, tmp_path: Path, monkeypatch):
    run = small_config(data_root, tmp_path, mini_batch_size="auto", total_batch_size=16 * 8)
    small, large = enough_for(run, 2, total=16), enough_for(run, 8, total=80)
    for own, other in ((small, large), (large, small)):
        monkeypatch.setattr(device, "memory", lambda _, own=own: own)
        monkeypatch.setattr(Ranks, "others", [other])
        Ranks.order.clear()
        found = micro_batch.fitted(
            run, Ranks(0, 2, CPU), EAGER, lambda rows: Ranks.order.append(f"try {rows} rows")
        )
        assert (found.rows, found.memory_bytes, found.rows_per_rank) == (2, 16, 8)
        assert Ranks.order == [f"exchange {25 * 2**20} bytes", "try 2 rows"]  # NCCL's buffers exist


def test_a_failed_pass_is_freed_before_the_next_one(monkeypatch):
    passes: list[weakref.ref[torch.Tensor]] = []

    def run_micro_batch(rows: int) -> None:
        assert all(tensor() is None for tensor in passes)
        activations = torch.zeros(rows)
        passes.append(weakref.ref(activations))
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert micro_batch.largest_that_fits(8, run_micro_batch, World(0, 1, CPU), 1024) == 2
    assert len(passes) == 3


def test_a_resume_keeps_the_rows_on_the_same_gpu_alone(
    gpt2_tokens: Path, tmp_path: Path, monkeypatch, capsys
):
    plain: dict[str, Any] = {"dropout": 0.0, "decay_steps": 20}
    changes = {**plain, "mini_batch_size": "auto", "resume": "latest"}

    def train(last: int, gpu: DeviceMemory) -> str:
        monkeypatch.setattr(device, "memory", lambda _: gpu)
        config = small_config(gpt2_tokens, tmp_path / "auto", **changes, max_steps=last)
        trainer.run(config)
        return capsys.readouterr().out

    run = small_config(gpt2_tokens, tmp_path)
    assert "  - --mini_batch_size auto: 4 rows at once\n" in train(2, enough_for(run, 4))
    less_is_free = enough_for(run, 2)
    assert "  - --mini_batch_size auto: 4 rows at once\n" in train(4, less_is_free)
    printed = train(6, enough_for(run, 2, total=24 * 10**9))
    line = "2 rows at once, 4 before (a GPU with other memory); each step trains on the same tokens"
    assert line in printed
    monkeypatch.undo()
    trainer.run(small_config(gpt2_tokens, tmp_path / "plain", **plain, max_steps=6))
    one, other = (losses(tmp_path / name / "logs/log.txt") for name in ("auto", "plain"))
    assert list(one) == [1, 2, 3, 4, 5, 6]
    assert one == pytest.approx(other, abs=1e-5)
