import contextlib
import csv
import io
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from gpt2.base.errors import ConfigError
from gpt2.cli import main
from gpt2.cli.parse import parse
from gpt2.cli.pool_options import TrainingPoolOptions
from gpt2.experiments import job_group
from gpt2.experiments.compare import models
from gpt2.experiments.pool import slots
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits
from gpt2.experiments.pool.slots import preferred_slots
from gpt2.experiments.results import JobResult, read_results
from gpt2.train import trainer
from support import loss_lines, small_config, small_flags


@dataclass(frozen=True)
class Compared:
    """What `gpt2 models` did with a small run of each architecture."""

    arguments: list[str]
    out: Path
    said: str

    @property
    def folder(self) -> Path:
        return self.out / "checkpoints" / "models"

    @property
    def records(self) -> dict[str, JobResult]:
        return {record.job: record for record in read_results(self.folder)}


@pytest.fixture(scope="module")
def compared(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compared]:
    out = tmp_path_factory.mktemp("compared")
    arguments = small_flags(data_root, out, max_steps=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "config_home"))
        code, said = call(arguments)
        assert code == 0, said
        yield Compared(arguments, out, said)


def call(arguments: list[str]) -> tuple[int, str]:
    """The exit code and the output of `gpt2 models`."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpt2", "models", *arguments])
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return main.main(), said.getvalue()


def time_of(record: JobResult) -> tuple[float, float]:
    return record.time - record.elapsed_s, record.time


def test_slots_of_models():
    assert preferred_slots(3, 2) == [0, 1, 1]
    assert preferred_slots(5, 2) == [0, 1, 1, None, None]
    assert preferred_slots(3, 1) == [0, 0, None]
    assert preferred_slots(2, 4) == [0, 1]


@pytest.mark.parametrize(
    ("flags", "at_once", "room"),
    [
        ([], 2, (None, 2)),
        (["--gpus", "1,2,3"], 2, (None, None)),
        (["--max_gpus", "3"], 2, (None, 3)),
        (["--slots", "3"], 2, (3, None)),
        (["--ddp", "2"], 2, (None, 4)),
        (["--no_parallel", "--gpus", "2,3"], 2, (1, None)),
        ([], 1, (1, None)),
        ([], None, (None, None)),
        (["--max_gpus", "2"], None, (None, 2)),
    ],
)
def test_two_at_a_time_unless_more_are_requested(
    flags: list[str], at_once: int | None, room: tuple[int | None, int | None]
):
    pool = parse(TrainingPoolOptions, flags)
    assert pool.room(at_once, pool.ddp) == room


def test_one_after_another_contradicts_slots():
    with pytest.raises(ConfigError, match="use either --slots 3 or --no_parallel"):
        parse(TrainingPoolOptions, ["--slots", "3", "--no_parallel"])


def test_two_train_at_once_and_the_third_follows_on_the_second_slot(compared: Compared):
    gpt2, modern, mlp = (compared.records[name] for name in ("gpt2", "modern", "mlp"))
    assert (gpt2.slot, modern.slot, mlp.slot) == ("cpu0", "cpu1", "cpu1")
    begun, ended = zip(time_of(gpt2), time_of(modern), strict=True)
    assert max(begun) < min(ended)
    assert time_of(modern)[1] <= time_of(mlp)[0]
    pids = set()
    for name in compared.records:
        (log,) = (compared.out / "logs").glob(f"{name}_*.log")
        assert re.fullmatch(rf"{name}_\d{{8}}_\d{{6}}\.log", log.name)
        pids |= set(re.findall(rf" (\d+) \| job {name}:", log.read_text()))
    assert len(pids) == 3 and str(os.getpid()) not in pids


def test_the_comparison_is_printed_and_written(compared: Compared):
    rows = json.loads((compared.folder / "results.json").read_text())["summary"]
    assert [row["model"] for row in rows] == ["gpt2", "modern", "mlp"]
    for row in rows:
        assert row["state"] == "finished" and row["tokens"] == 8 * 32
        assert row["parameters"] > 800_000 and row["peak_memory_gb"] > 0.05
        assert f"{row['val_loss']:.4f}" in compared.said
    lowest = min(row["val_loss"] for row in rows)
    assert re.search(rf"{lowest:.4f} \*", compared.said)
    assert re.search(r"In parallel .* saved", compared.said)
    (log,) = (compared.out / "logs").glob("training_*.log")
    assert "cpu0 begins gpt2" in log.read_text()
    table = list(csv.DictReader((compared.folder / "comparison.csv").read_text().splitlines()))
    assert [float(row["val_loss"]) for row in table] == [row["val_loss"] for row in rows]
    assert (compared.folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_finished_models_are_not_trained_again(compared: Compared):
    before = compared.records
    code, said = call(compared.arguments)
    assert code == 0 and "3 of them are done already" in said
    assert compared.records == before
    assert "In parallel" not in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["--n_layer", "3", "--seed", "7"],
            "holds another experiment (n_layer: 2 before, 3 now; seed: 1337 before, 7 now); give",
        ),
        (["--models", "gpt2,moderm"], "unknown model moderm; did you mean modern?"),
        (["--models", "gpt2,gpt2"], "expected different names"),
        (["--resume", "best"], "--resume best is for one run"),
        (["--architecture", "mlp"], "--architecture is what is compared"),
        (["--n_head", "16"], "modern: n_embd=16 is not a multiple of 2 × n_head=32"),
        (["--data_root", "nowhere"], "nowhere"),
        (["--slots", "0"], "slots=0 is too small"),
        (["--gpus", "7"], "no GPU 7"),
    ],
)
def test_invalid_options_are_refused_before_anything_starts(
    compared: Compared, more: list[str], words: str
):
    logs = sorted((compared.out / "logs").iterdir())
    code, said = call([*compared.arguments, *more])
    assert code == 2 and words in said
    assert sorted((compared.out / "logs").iterdir()) == logs


@pytest.mark.soak
def test_a_failed_or_killed_model_does_not_affect_the_others(data_root: Path, tmp_path: Path):
    """One after another: `killed` dies once and resumes from its checkpoint after the others."""
    run = small_config(data_root, tmp_path, max_steps=24)
    stand_ins = {"killed": {"n_layer": 2}, "bad": {"data_root": str(tmp_path / "nowhere")}}
    asked = models.group(run, stand_ins, tmp_path / "models", log_dir=tmp_path / "logs")
    threading.Thread(target=kill_after_saving, args=(asked.folder / "killed",), daemon=True).start()
    out = Console(file=io.StringIO(), width=160)
    engine = Engine(slots.of_machine(1, device="cpu"))
    assert job_group.run(asked, engine, Limits(), out).exit_code == 1
    said = out.file.getvalue()
    assert "1 at a time, on cpu0" in said
    assert "SIGKILL" in said
    assert re.search("FAILED bad: .*nowhere", said)
    killed, bad = (
        next(item for item in read_results(asked.folder) if item.job == name) for name in stand_ins
    )
    assert (killed.state, killed.attempt, bad.state) == ("finished", 2, "failed")
    assert "from step 0" not in (asked.folder / "killed" / "log.txt").read_text().split("# run")[-1]
    undisturbed = trainer.run(small_config(data_root, tmp_path / "alone", max_steps=24))
    assert killed.result["train_loss"] == undisturbed.train_loss
    assert killed.result["val_loss"] == undisturbed.val_loss
    assert loss_lines(asked.folder / "killed" / "log.txt") == loss_lines(
        tmp_path / "alone" / "logs" / "log.txt"
    )


def kill_after_saving(folder: Path) -> None:
    while not (folder / "step_000010.json").exists():
        time.sleep(0.005)
    os.kill(json.loads((folder / "status.json").read_text())["pid"], signal.SIGKILL)
