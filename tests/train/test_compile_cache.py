import os
from pathlib import Path

import pytest
import torch
from torch import nn

from gpt2.base.errors import ConfigError
from gpt2.distributed import rendezvous
from gpt2.train import compile_cache
from gpt2.train.compile_cache import compiled
from support import losses, run_command, small_flags, train_command


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import torch._dynamo  # torch sets a variable of its own when this is imported

    monkeypatch.setattr(torch, "compile", lambda net, **_: net)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is as before, afterwards
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "")
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    return tmp_path


def test_kernels_stay_in_the_cache_of_the_user(home: Path):
    compiled(nn.Linear(2, 2))
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.parent == home / ".cache" / "gpt2-from-scratch" / "kernels" and folder.is_dir()


@pytest.mark.usefixtures("home")
def test_where_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    compiled(nn.Linear(2, 2))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


def test_torchs_own_place_where_the_users_cannot_be_written(home: Path):
    (home / ".cache").touch()
    compiled(nn.Linear(2, 2))
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(("cores", "ranks", "workers"), [(16, 4, 4), (2, 4, 1), (256, 1, 32)])
def test_the_ranks_of_a_machine_share_its_cores(
    cores: int, ranks: int, workers: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    for name, value in rendezvous.rank_variables(0, ranks, 1).items():
        monkeypatch.setenv(name, value)
    compiled(nn.Linear(2, 2))
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == str(workers)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
    compiled(nn.Linear(2, 2))
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "7"


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which alone compilers are searched for, on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def compiler(folder: Path, finds_header: bool) -> Path:
    """A `gcc` that reads a program and finds Python's header in it, or not."""
    path = folder / "gcc"
    path.write_text(f"#!/bin/sh\nread line\nexit {int(not finds_header)}\n")
    path.chmod(0o755)
    return path


def test_a_gpu_without_a_compiler_trains_without_compiling(tools: Path, caplog):
    assert compile_cache.missing() == "a C compiler: apt install gcc, or set CC"
    assert not compile_cache.is_used("auto", CUDA)
    assert "training is not compiled, which makes it slower: that needs a C comp" in caplog.text
    with pytest.raises(
        ConfigError, match=r"compile=on needs a C compiler: .* or use --compile off"
    ):
        compile_cache.is_used("on", CUDA)
    caplog.clear()
    assert compile_cache.is_used("on", CPU), "Inductor has messages of its own"
    assert not compile_cache.is_used("auto", CPU) and not compile_cache.is_used("off", CUDA)
    assert not caplog.text


def test_torch_2_9_cannot_compile_as_deterministic_requests(
    tools: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    compiler(tools, finds_header=True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for version, is_used in (("2.9.1+cu128", False), ("2.10.0", True)):
        monkeypatch.setattr(torch, "__version__", version)
        assert compile_cache.is_used("auto", CUDA) is is_used
    assert caplog.text.count("that needs torch 2.10 or newer beside --deterministic") == 1
    assert not compile_cache.is_used("auto", CPU) and compile_cache.is_used("on", CPU)


def test_triton_also_needs_the_headers_of_python(tools: Path, monkeypatch: pytest.MonkeyPatch):
    path = compiler(tools, finds_header=False)
    assert "apt install python3-dev" in (compile_cache.missing() or "")
    compiler(tools, finds_header=True)
    assert compile_cache.missing() is None and compile_cache.is_used("auto", CUDA)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", str(path))
    assert compile_cache.missing() is None
    monkeypatch.setenv("CC", str(tools / "nothing"))
    assert "the one in CC is none" in (compile_cache.missing() or "")


@pytest.mark.soak
def test_resume_finds_what_was_compiled(data_root: Path, tmp_path: Path):
    kernels = tmp_path / "kernels"
    written = []
    for last in (2, 4):
        flags = small_flags(data_root, tmp_path, max_steps=last, compile="on", resume="latest")
        run_command(train_command(flags), TORCHINDUCTOR_CACHE_DIR=str(kernels))
        written.append({path: path.stat().st_mtime_ns for path in kernels.rglob("*.so")})
    assert list(losses(tmp_path / "logs" / "log.txt")) == [1, 2, 3, 4]
    assert written[0] and written[1] == written[0]
