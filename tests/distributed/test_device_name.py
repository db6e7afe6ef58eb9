from pathlib import Path

import pytest
import torch

from gpt2.distributed import device_name
from gpt2.distributed.device_name import DeviceName

A100, H100 = "NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3"


def gpus(host: str, model: str, *ids: str) -> list[DeviceName]:
    return [DeviceName(host, model, gpu_id) for gpu_id in ids]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (gpus("a", H100, "0"), f"GPU: 0 ({H100})"),
        (gpus("a", H100, *"0123"), f"GPU: 0, 1, 2, 3 (4 × {H100})"),
        (gpus("a", H100, "3", "1"), f"GPU: 3, 1 (2 × {H100})"),
        (
            gpus("a", A100, "0") + gpus("a", H100, "1") + gpus("a", A100, "2"),
            f"GPU: 0, 2 (2 × {A100}), 1 ({H100})",
        ),
        (
            gpus("a", H100, "0", "1") + gpus("b", H100, "0", "1"),
            f"GPU: 0, 1 (2 × {H100}) on each of a, b",
        ),
        (
            gpus("a", A100, "0", "1") + gpus("b", H100, "5") + gpus("c", A100, "0", "1"),
            f"GPU: 0, 1 (2 × {A100}) on each of a, c; 5 ({H100}) on b",
        ),
        (
            [name for host in "abcde" for name in gpus(host, H100, "0")],
            f"GPU: 0 ({H100}) on each of 5 hosts, a to e",
        ),
        ([DeviceName("a", "Xeon", threads=8)], "CPU: 1 rank of 8 threads (Xeon)"),
        ([DeviceName("a", "Xeon", threads=1)] * 2, "CPU: 2 ranks of 1 thread (Xeon)"),
        (
            [DeviceName(host, "Xeon", threads=4) for host in "aabb"],
            "CPU: 2 ranks of 4 threads (Xeon) on each of a, b",
        ),
    ],
)
def test_the_line_of_all_devices(names: list[DeviceName], expected: str):
    assert device_name.line(names) == expected


@pytest.mark.parametrize(
    ("visible", "gpu_id"),
    [
        (None, "1"),
        ("3,1", "1"),
        ("0, 2", "2"),
        ("1,GPU-8f3a12bc-0a1b-2c3d-4e5f-a0b1c2d3e4f5", "GPU-8f3a12bc"),
        ("0,MIG-GPU-8f3a12bc-0a1b-2c3d-4e5f-a0b1c2d3e4f5/1/0", "MIG-GPU-8f3a12bc/1/0"),
    ],
)
def test_a_gpu_has_the_id_that_its_user_knows(monkeypatch, visible: str | None, gpu_id: str):
    monkeypatch.setattr(torch.cuda, "get_device_name", {torch.device("cuda", 1): A100}.get)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    name = device_name.of(torch.device("cuda", 1))
    assert (name.model, name.gpu_id) == (A100, gpu_id)


def test_a_cpu_has_its_model_and_threads(monkeypatch, tmp_path: Path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: AMD EPYC 7B13\nmodel name\t: AMD EPYC 7B13\n")
    monkeypatch.setattr(device_name, "CPU_INFO", info)
    name = device_name.of(torch.device("cpu"))
    assert (name.model, name.gpu_id) == ("AMD EPYC 7B13", None)
    assert name.threads == torch.get_num_threads()
    info.unlink()
    assert device_name.of(torch.device("cpu")).model  # of the architecture, as on ARM
