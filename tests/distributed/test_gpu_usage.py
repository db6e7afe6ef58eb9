import math

import pytest
import torch

from gpt2.distributed import gpu_usage
from gpt2.distributed.gpu_usage import GpuUsage

GPU = torch.device("cuda", 1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's figures of a second GPU."""
    figures = {"memory_allocated": 2_500_000_000, "max_memory_allocated": 5_000_000_000}
    for name, value in (figures | {"utilization": 93}).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: {GPU: value}[device])


@pytest.mark.usefixtures("gpu")
def test_a_rank_measures_its_own_gpu():
    assert gpu_usage.measure(GPU) == GpuUsage(2.5, 5.0, 93.0)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("error", [ModuleNotFoundError("pynvml"), RuntimeError("MIG")])
def test_without_nvidias_library_the_memory_is_known(monkeypatch, error: Exception):
    def refuse(_: object) -> int:
        raise error

    monkeypatch.setattr(torch.cuda, "utilization", refuse)
    assert gpu_usage.measure(GPU).known() == {"memory_gb": 2.5, "peak_memory_gb": 5.0}


def test_a_cpu_has_no_figures():
    usage = gpu_usage.measure(torch.device("cpu"))
    assert all(math.isnan(figure) for figure in usage)
    assert usage.known() == {}
