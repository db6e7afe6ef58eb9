from dataclasses import replace

import pytest
import torch
from packaging.requirements import Requirement

from gpt2.config import flops, memory, options, presets
from gpt2.inspection import checks
from gpt2.inspection.checks import Finding
from gpt2.inspection.machine import Gpu, Torch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GB = 10**9
H200 = Gpu("0", "NVIDIA H200", 150 * GB, 149 * GB, (9, 0))
FOR_CPU, FOR_CUDA = Torch("2.13.0+cpu", None, None), Torch("2.13.0", "13.0", "2.28.9")
GPT2_124M = flops.training_bytes(presets.preset("gpt2-124m").model, "adamw")


def levels(findings) -> list[str]:
    return [finding.level for finding in findings]


@pytest.mark.parametrize(
    ("version", "level"),
    [("3.11.7", "ok"), ("3.12.1", "note"), ("3.15.0b1", "note"), ("3.10.2", "PROBLEM")],
)
def test_python_in_range(version: str, level: str):
    assert checks.check_python(version, ">=3.11", ["3.11", "3.13"]).level == level


def test_an_installation_without_a_list_of_tested_versions_has_no_note():
    assert checks.check_python("3.12.1", ">=3.11", []).level == "ok"


def test_packages_out_of_range_and_missing_ones_are_named_with_their_command():
    needed = [Requirement(text) for text in ("torch>=2.9,<=2.13.0", "numpy<3", "tyro>=0.9")]
    there = {"torch": "2.13.0+cpu", "numpy": "3.0.1", "tyro": None}
    numpy, tyro, good = checks.check_packages(needed, there)
    assert numpy == Finding(
        "PROBLEM", "packages", "expected numpy<3, got 3.0.1", "pip install 'numpy<3'"
    )
    assert tyro.fact == "expected tyro>=0.9, got no such package"
    assert good == Finding("ok", "packages", "torch 2.13.0+cpu")


@pytest.mark.parametrize(
    ("option", "gpus", "build", "driver", "level", "expected"),
    [
        ("auto", 2, FOR_CUDA, "580.65", "ok", "2 GPUs: torch 2.13.0 for CUDA 13.0, driver 580.65"),
        ("auto", 0, FOR_CPU, None, "note", "there is no GPU"),
        ("cpu", 0, FOR_CPU, "580.65", "ok", "CPU: torch 2.13.0+cpu for CPUs alone"),
        ("auto", 0, FOR_CPU, "580.65", "PROBLEM", "install torch for CUDA"),
        ("auto", 0, FOR_CUDA, "580.65", "PROBLEM", "check the driver with nvidia-smi"),
        ("cuda", 0, FOR_CPU, None, "PROBLEM", "use --device cpu"),
    ],
)
def test_no_gpu_is_a_note_and_an_unusable_one_a_problem(
    option, gpus, build, driver, level, expected
):
    found = checks.check_device(option, gpus, build, driver)
    assert found.level == level
    assert expected in f"{found.fact}; {found.remedy}"


@pytest.mark.parametrize(
    ("gpu", "level", "expected"),
    [
        (H200, "ok", "NVIDIA H200, 150.0 GB, 149.0 GB free"),
        (replace(H200, free_bytes=100 * GB), "note", "another process has 50.0 GB"),
        (replace(H200, free_bytes=GB), "PROBLEM", "another process has 149.0 GB"),
        (Gpu("0", "tiny", 2 * GB, 2 * GB, (8, 0)), "PROBLEM", "moments alone take 2.0 GB"),
    ],
)
def test_the_model_fits_beside_others(gpu: Gpu, level: str, expected: str):
    (found,) = checks.check_gpus([gpu], training_bytes=int(2.01 * GB))
    assert found.level == level
    assert expected in found.fact


def test_gpus_of_several_kinds_are_noted():
    assert levels(checks.check_gpus([H200, H200], GPT2_124M)) == ["ok", "ok"]
    other = replace(H200, name="NVIDIA A100")
    assert levels(checks.check_gpus([H200, other], GPT2_124M)) == ["ok", "ok", "note"]


def test_nccl():
    assert checks.check_nccl(FOR_CUDA) == Finding("ok", "NCCL", "2.28.9")
    assert checks.check_nccl(FOR_CPU).level == "PROBLEM"


@pytest.mark.parametrize(
    ("dtype", "fast", "device", "level", "expected"),
    [
        ("auto", torch.bfloat16, CUDA, "ok", "bfloat16"),
        ("auto", torch.float16, CUDA, "ok", "float16"),
        ("auto", torch.float32, CPU, "ok", "float32: this CPU has no fast bfloat16"),
        ("auto", torch.float32, CUDA, "note", "float32: this GPU has no fast bfloat16"),
        ("float32", torch.bfloat16, CUDA, "note", "float32"),
        ("float16", torch.bfloat16, CUDA, "note", "float16"),
        ("bfloat16", torch.float16, CUDA, "note", "bfloat16, which this GPU only emulates"),
        ("bfloat16", torch.float32, CPU, "note", "bfloat16, which this CPU only emulates"),
        ("float16", torch.bfloat16, CPU, "note", "float16, which this CPU only emulates"),
    ],
)
def test_precision(dtype, fast, device, level, expected):
    found = checks.check_precision(dtype, fast, device)
    assert (found.level, found.fact) == (level, expected)


def test_a_gpu_without_what_torch_compile_needs(monkeypatch: pytest.MonkeyPatch):
    lacking = "a C compiler: apt install gcc, or set CC"
    monkeypatch.setattr(checks.compile_cache, "missing", lambda: lacking)
    (note,) = checks.check_compiler([H200], "auto")
    fact = "needs a C compiler; without it, a run is slower"
    assert note == Finding("note", "torch.compile", fact, "apt install gcc, or set CC")
    assert levels(checks.check_compiler([H200], "on")) == ["PROBLEM"]
    assert not [*checks.check_compiler([H200], "off"), *checks.check_compiler([], "auto")]
    monkeypatch.setattr(checks.compile_cache, "missing", lambda: None)
    assert not [*checks.check_compiler([H200], "on")]


def test_a_gpu_without_kernels_is_a_problem():
    v100 = Gpu("1", "Tesla V100", 32 * GB, 31 * GB, (7, 0))
    build = replace(FOR_CUDA, architectures=("sm_75", "sm_80", "sm_90"))
    (found,) = checks.check_kernels([H200, v100], build)
    assert (found.level, found.fact) == ("PROBLEM", "torch 2.13.0 has none for Tesla V100")
    assert "CUDA 12.6" in found.remedy
    assert not [*checks.check_kernels([v100], replace(build, cuda=None))]


def test_a_batch_is_divided_among_the_ranks():
    run = presets.preset("gpt2-124m")
    even = checks.check_batch(run, 4, 4)
    expected = "4 ranks of 128 rows per step, 64 at once, gradient accumulation 2"
    assert (even.level, even.fact) == ("ok", expected)
    uneven = checks.check_batch(run, 3, 3)
    assert (uneven.level, uneven.fact[:36]) == ("note", "3 ranks of 170 or one row more per s")
    assert checks.check_batch(run, 4, 2).remedy == "use --nproc_per_node=2"
    one = options.overlay(run, {"total_batch_size": 1024})
    assert checks.check_batch(one, 1, 1).fact.startswith("1 rank of 1 row per step, 1 at once")
    few = options.overlay(run, {"total_batch_size": 2048})
    assert "too few for 4 ranks" in checks.check_batch(few, 4, 4).fact


def test_a_batch_is_what_fits_into_the_memory_unless_a_number_is_given():
    run = presets.preset("gpt2-124m")
    small = checks.check_batch(run, 1, 1, free_bytes=16 * 10**9)
    assert "512 rows per step, 16 at once, gradient accumulation 32" in small.fact
    given = options.overlay(run, {"mini_batch_size": 64})
    assert "64 at once" in checks.check_batch(given, 1, 1, free_bytes=16 * 10**9).fact
    none = checks.check_batch(run, 1, 1, free_bytes=2 * 10**9)
    assert (none.level, none.fact) == (
        "PROBLEM",
        "2.0 GB of memory are too little for a single row",
    )


def test_what_fits_into_which_gpu_is_listed():
    fact = checks.check_cards(presets.preset("gpt2-1558m"), 1).fact
    assert fact.startswith("estimated rows of 1024 tokens at once on a GPU of 16 GB: does not fit")
    assert [size for size in memory.CARDS_GB if f"{size} GB: " in fact] == [*memory.CARDS_GB]


def test_limits():
    assert checks.check_open_files(4096, 100).level == "ok"
    assert checks.check_open_files(None, 100).fact == "no limit, 1,124 needed"
    assert checks.check_open_files(1024, 100).level == "PROBLEM"
    assert checks.check_memory(2 * GB, GB, training_bytes=0).level == "ok"
    assert checks.check_memory(2 * GB, GB, training_bytes=GB * 4 // 3).level == "PROBLEM"
    assert checks.check_memory(None, GB, training_bytes=GB).level == "note"
    docker = 64 * 2**20
    assert checks.check_shared_memory(docker, ranks_on_gpu=1).level == "ok"
    assert checks.check_shared_memory(docker, ranks_on_gpu=2).remedy == "docker run --shm-size=1g"


def test_name_and_clock():
    assert checks.check_host_name("127.0.0.1", 4).level == "ok"
    assert checks.check_host_name(None, 1).level == "note"
    assert checks.check_host_name(None, 2).level == "PROBLEM"
    assert checks.check_clock(now=2e9, newest=1e9).level == "ok"
    assert checks.check_clock(now=0, newest=1e9).fact.startswith("1970-01-0")
