import os
from pathlib import Path

import pytest
import torch
from torch import nn

from gpt2.distributed import rendezvous
from gpt2.train.compile_cache import compiled
from support import losses, run_command, small_flags, train_command


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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
