import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from gpt2.checkpoint import store
from gpt2.train import step_profiler, trainer
from support import loss_lines, small_config


def test_a_run_with_a_profile_is_bit_identical_to_one_without(
    data_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    flags = {"max_steps": 10, "eval_interval": None, "profile": 3, "total_batch_size": 16}
    for name, changes in (("with", flags), ("without", flags | {"profile": None})):
        trainer.run(small_config(data_root, tmp_path / name, **changes))
    one, other = (
        store.load(tmp_path / name / "checkpoints/latest.pt") for name in ("with", "without")
    )
    for state in ("model", "optimizer", "rng"):
        assert repr(one[state]) == repr(other[state])
    assert all(torch.equal(part, other["model"][name]) for name, part in one["model"].items())
    assert loss_lines(tmp_path / "with/logs/log.txt") == loss_lines(
        tmp_path / "without/logs/log.txt"
    )

    [path] = (tmp_path / "with/runs").glob("*/*.pt.trace.json.gz")
    assert path.name == "steps_6-8.pt.trace.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 3
    assert "aten::mm" in names
    [at] = [
        n for n, line in enumerate(caplog.messages) if line.startswith("Profile of steps 6 to 8")
    ]
    table = caplog.messages[at + 1 : at + 11]
    # Which ones take longest depends on the machine and its load.
    assert len(table) == 10
    assert {line.rpartition(" calls: ")[2] for line in table} <= set(names)
    assert all(" ms a step, " in line for line in table)
    assert table == sorted(table, key=lambda line: -float(line.split()[1]))


def test_a_run_that_ends_before_the_profile_says_so(data_root: Path, tmp_path: Path, caplog):
    changes = {"max_steps": 3, "eval_interval": None, "profile": 3}
    trainer.run(small_config(data_root, tmp_path, **changes))
    expected = "no profile: --profile records from step 6 on, and the run ended after 3 steps"
    assert expected in caplog.text
    assert not list(tmp_path.glob("runs/**/*.gz"))


def test_a_full_disk_does_not_end_the_run(data_root: Path, tmp_path: Path, caplog, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    changes = {"max_steps": 8, "eval_interval": None, "profile": 9, "total_batch_size": 8}
    result = trainer.run(small_config(data_root, tmp_path, **changes))
    assert (result.state, result.step) == ("finished", 8)
    assert "no profile:" in caplog.text
    assert "No space left on device" in caplog.text


def event(key: str, cpu_us: float, device_us: float, on_cuda: bool, is_region: bool = False):
    return SimpleNamespace(
        key=key,
        count=20,
        self_cpu_time_total=cpu_us,
        self_device_time_total=device_us,
        device_type=DeviceType.CUDA if on_cuda else DeviceType.CPU,
        is_user_annotation=is_region,
    )


EVENTS = [
    event("aten::mm", 400.0, 9000.0, on_cuda=False),  # an operator has the time of its kernels
    event("sm90_gemm_bf16", 0.0, 9000.0, on_cuda=True),
    event("triton_poi_fused_gelu", 0.0, 1000.0, on_cuda=True),
    event("ProfilerStep*", 0.0, 11000.0, on_cuda=True, is_region=True),
    event("ProfilerStep*", 900.0, 0.0, on_cuda=False, is_region=True),
]


def test_on_cuda_kernels_are_listed_by_their_time_on_the_device():
    assert step_profiler.longest_kernels(EVENTS, 2, on_cuda=True) == [
        "4.500 ms a step, 90.0%, 10 calls: sm90_gemm_bf16",
        "0.500 ms a step, 10.0%, 10 calls: triton_poi_fused_gelu",
    ]
    assert step_profiler.longest_kernels(EVENTS, 2, on_cuda=False) == [
        "0.200 ms a step, 100.0%, 10 calls: aten::mm"
    ]
