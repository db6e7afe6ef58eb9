"""With a simulated CUDA."""

from pathlib import Path

import pytest
import torch

from gpt2.base.errors import TrainingError
from gpt2.config.run import WatchConfig
from gpt2.distributed.world import World
from gpt2.train import memory_snapshot, trainer
from support import small_config

CUDA_IS_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
GPU = torch.device("cuda", 0)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The calls that start and stop the recording of allocations."""
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options)
    )
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot")
    )
    return calls


def test_the_memory_of_a_full_gpu_is_written(tmp_path: Path, recorded: list[dict[str, object]]):
    config, world = WatchConfig(log_dir=tmp_path, memory_snapshot=True), World(3, 8, GPU)
    with memory_snapshot.recording(config, GPU):
        assert recorded == [{"max_entries": memory_snapshot.KEPT_EVENTS}]
        path = memory_snapshot.write(config, world)
    assert path == tmp_path / "out_of_memory_rank3.pickle"
    assert path.read_bytes() == b"snapshot"
    assert recorded[1:] == [{"enabled": None}], "the next run of this process records nothing"


def test_without_the_option_nothing_is_recorded(tmp_path: Path, recorded: list[dict[str, object]]):
    config = WatchConfig(log_dir=tmp_path)
    with memory_snapshot.recording(config, GPU):
        assert memory_snapshot.write(config, World(0, 1, GPU)) is None
    assert not recorded
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_warning(tmp_path: Path, recorded, caplog):
    config = WatchConfig(log_dir=tmp_path / "missing", memory_snapshot=True)
    assert memory_snapshot.write(config, World(0, 1, GPU)) is None
    assert "cannot write" in caplog.text


def test_on_a_cpu_one_line_says_that_it_is_for_cuda(data_root: Path, tmp_path: Path, caplog):
    config = small_config(
        data_root, tmp_path, max_steps=1, memory_snapshot=True, eval_interval=None
    )
    trainer.run(config)
    assert caplog.text.count("--memory_snapshot is for CUDA") == 1


def test_the_error_names_the_file(data_root: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(memory_snapshot, "write", lambda *_: Path("logs/memory.pickle"))

    def fail(*_: object, **__: object) -> None:
        raise CUDA_IS_FULL

    monkeypatch.setattr("gpt2.model.gpt2.GPT2.forward", fail)
    with pytest.raises(
        TrainingError,
        match=r"use --mini_batch_size 2 .*; what holds it is in logs/memory.pickle",
    ):
        trainer.run(small_config(data_root, tmp_path, eval_interval=None))
