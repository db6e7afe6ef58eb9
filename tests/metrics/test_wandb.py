import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2.base.errors import ConfigError
from gpt2.config.experiment_name import ExperimentConfig
from gpt2.metrics import console, log_reader, wandb
from gpt2.metrics.records import HellaSwagRecord, Metrics, ValidationRecord
from metrics.example_record import RECORD
from metrics.fake_wandb import NAME, FakeWandB, open_wandb
from support import run_command, small_flags, train_command, wait_until


def test_a_run_keeps_its_id_and_logs_no_step_twice(monkeypatch):
    fake = FakeWandB()
    logged = open_wandb(monkeypatch, fake, logged_step=5, experiment_name="exp", wandb_project="p")
    started = fake.started[0]
    assert (started["id"], started["resume"]) == ("exp_gpu_2_20260101_000000", "allow")
    assert (started["project"], started["name"], started["dir"]) == ("p", "exp", "runs")
    for step in (4, 5, 6):
        logged.write(replace(RECORD, step=step))
    logged.write(ValidationRecord(5, 0, 3.0))
    assert [step for step, _ in fake.run.rows] == [5, 6, 5]
    assert fake.run.rows[-1][1] == {"loss/val": 3.0}
    logged.write(ValidationRecord(6, 0, 3.0, 1.0))
    assert fake.run.rows[-1] == (6, {"loss/val": 3.0, "loss/val_bits_per_byte": 1.0})


def test_curves_keep_the_names_that_they_have_in_runs_of_earlier_versions(monkeypatch):
    fake = FakeWandB()
    logged = open_wandb(monkeypatch, fake)
    logged.write(replace(RECORD, rank_gpu=[{"memory_gb": 1.5}, {"memory_gb": 2.5}]))
    logged.write(HellaSwagRecord(5, 1, 0.26, 0.28, 9))
    (_, step), (_, hellaswag) = fake.run.rows
    assert step["train/learning_rate"] == 6e-4
    assert step["speed/tokens_per_s"] == 55188.2
    assert (step["gpu/memory_gb"], step["rank_gpu/memory_gb/1"]) == (1.5, 2.5)
    assert hellaswag == {"hellaswag/acc": 0.26, "hellaswag/acc_norm": 0.28}


@pytest.mark.parametrize(
    "name",
    [
        "seeds_learning_rate=0.001,seed=0_20260101_000000",
        "a:b;c#d?e/f'g h",
        "x" * 300,
        "é",
        "",
    ],
)
def test_any_name_gives_an_id_that_wandb_accepts(monkeypatch, name: str):
    fake = FakeWandB()
    open_wandb(monkeypatch, fake, run_id=name)
    (started,) = fake.started
    assert started["id"] == wandb.safe_id(name) and started["name"] == NAME, "as people read it"
    assert re.fullmatch(r"[\w.=+-]{1,128}", str(started["id"]), re.ASCII)
    others = [f"{name} ", name.replace(",", ";"), f"{name}y"]
    assert wandb.safe_id(name) not in {wandb.safe_id(other) for other in others if other != name}


def test_an_id_that_wandb_accepts_stays(monkeypatch):
    for name in (NAME, "demo_20260101_000000", "a=0.1+b", "x" * 128):
        assert wandb.safe_id(name) == name


def test_what_it_needs_is_tried_without_a_run(monkeypatch, caplog):
    settings = ExperimentConfig(use_wandb=True)
    for module, message in (
        (None, "pip install"),
        (FakeWandB(FakeWandB.UsageError("No API key.")), "No API key; or keep .* WANDB_MODE=off"),
    ):
        monkeypatch.setitem(sys.modules, "wandb", module)
        with pytest.raises(ConfigError, match=message):
            wandb.require_usable(settings)
    assert not caplog.messages
    fake = FakeWandB(failure=OSError("no route\nto host"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    wandb.require_usable(settings)
    assert caplog.messages == ["W&B does not answer: no route"]
    assert not fake.started


def test_no_failure_ends_the_training(monkeypatch, capsys):
    fake = FakeWandB()
    metrics = Metrics([console.Console(), open_wandb(monkeypatch, fake)])
    fake.run.error = RuntimeError("the service is gone\nand more")
    metrics.validation(1, 0, 3.0)
    metrics.close()
    assert "WARNING: WandB cannot write: RuntimeError: the service is gone\n" in (
        capsys.readouterr().out
    )


def test_a_server_that_does_not_answer_is_left_for_later(monkeypatch, caplog):
    fake = FakeWandB(failure=OSError("no route\nto host"))
    open_wandb(monkeypatch, fake).write(ValidationRecord(1, 0, 3.0))
    assert fake.run.rows == [(1, {"loss/val": 3.0})]
    expected = "W&B is offline (no route); upload later with: wandb sync runs/wandb/offline-run"
    assert caplog.messages == [expected]


def test_what_the_user_can_correct_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="pip install"):
        open_wandb(monkeypatch, None)
    unknown = FakeWandB.UsageError("No API key configured.")
    with pytest.raises(ConfigError, match=r"No API key configured; or keep .* WANDB_MODE=offline"):
        open_wandb(monkeypatch, FakeWandB(failure=unknown))


@pytest.mark.soak
def test_killed_and_resumed_offline(data_root: Path, tmp_path: Path):
    """The real package: no point is logged twice, nothing is left behind or printed."""
    pytest.importorskip("wandb")
    environment = {"WANDB_MODE": "offline", "TMPDIR": str(tmp_path)}
    flags = {"use_wandb": True, "wandb_run_name": "exp", "total_batch_size": 64}
    flags["decay_steps"] = 100_000  # the end of the second start would bend the learning rate
    flags |= {"checkpoint_interval": 4, "eval_interval": 4, "eval_batches": 1, "device": "cpu"}
    log = tmp_path / "logs" / "exp_gpu_cpu" / "log.txt"

    def command(last: int, resume: str = "latest") -> list[str]:
        given = small_flags(data_root, tmp_path, resume=resume, max_steps=last, **flags)
        given.remove("True")  # a switch has no value
        return train_command(given)

    environment["CUDA_VISIBLE_DEVICES"] = ""
    with subprocess.Popen(
        command(100_000), env=os.environ | environment, cwd=tmp_path, stdout=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: log.exists() and log_reader.read_runs(log))
        name = log_reader.read_runs(log)[0].name
        wait_until(lambda: log_reader.furthest_step(log, name) >= 15)
        process.send_signal(signal.SIGKILL)
    killed_at = log_reader.furthest_step(log, name)
    wait_until(lambda: not wandb_helpers(process.pid))

    done = run_command(command(killed_at + 5), cwd=tmp_path, **environment)
    assert "WARNING" not in done.stdout + done.stderr
    assert "wandb:" not in done.stdout + done.stderr
    assert not (tmp_path / "wandb").exists()
    first, second = sorted((tmp_path / "runs" / "wandb").glob(f"offline-run-*-{name}-*/*.wandb"))
    before, after = steps_logged(first), steps_logged(second)
    assert len(before & after) <= 1
    assert after == set(range(killed_at, killed_at + 6))


def steps_logged(file: Path) -> set[int]:
    """The steps in a file of W&B: records of key and JSON, with these bytes between them."""
    return {int(step) for step in re.findall(rb"_step\x82\x01.(\d+)", file.read_bytes(), re.S)}


def wandb_helpers(pid: int) -> list[str]:
    """The processes that W&B started for a training."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has just ended
            continue
        if "wandb-core" in command and f"--pid {pid} " in command:
            found.append(command)
    return found
