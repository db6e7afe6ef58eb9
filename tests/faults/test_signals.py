"""Signals and kills at chosen moments, Ctrl+C in a terminal, and the end of the terminal."""

import os
import pty
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from faults.harness import (
    FLAGS,
    Run,
    has_weights_of,
    is_part_of,
    last_step,
    slow_script,
    starts_of,
    trial,
)

pytestmark = pytest.mark.faults

ENDLESS = FLAGS | {"max_steps": 100_000}
CTRL_C = b"\x03"
EVAL, SAVE = FLAGS["eval_interval"], FLAGS["checkpoint_interval"]


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_signals_to_torchrun_save(data_root: Path, tmp_path: Path, number: signal.Signals):
    """torchrun does not forward SIGUSR1 by default, but dies of it. Its ranks still save."""
    run = Run(data_root, tmp_path / "run", **ENDLESS)
    run.wait_for("step 6 |")
    with trial(f"{number.name} to torchrun") as steps_lost:
        assert run.state() == "running"
        os.kill(run.agent.pid, number)
        assert run.end() != 0
        assert run.kept() == last_step(run.log)
        assert f"at step {run.kept()}; --resume latest continues" in run.text()
        assert run.state() == ("failed" if number == signal.SIGUSR1 else "stopped")
        steps_lost.append(0)  # as the line on `kept` says


MOMENTS = {  # module, function, number of its call, and the newest steps that a kill may leave
    "reading the data": ("gpt2.train.dataset", "open_data", 1, {0}),
    "validating": ("gpt2.evaluation.loss", "evaluating", 2, {EVAL, EVAL - SAVE}),
    "writing a checkpoint": ("gpt2.checkpoint.integrity", "HashingWriter", 2, {SAVE}),
    "between a checkpoint and its metadata": ("gpt2.checkpoint.integrity", "sign", 2, {SAVE}),
}


@pytest.mark.soak
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stop_or_kill_at_any_moment_resumes_bit_identically(
    data_root: Path, tmp_path: Path, reference: Path, moment: str, number: signal.Signals
):
    module, name, call, left = MOMENTS[moment]
    script = slow_script(tmp_path, module, name, call)
    run = Run(data_root, tmp_path / "run", script=script, **FLAGS)
    run.wait_for(f"now in {name}")
    victims = run.processes() if number == signal.SIGKILL else [run.agent.pid]
    with trial(f"{number.name} while {moment}"):
        for victim in victims:
            os.kill(victim, number)
        assert run.end() != 0
        if number == signal.SIGKILL:
            assert run.kept() in left
            assert run.state() == ("dead" if any(left) else "none")
        elif run.log.exists():
            assert run.kept() == last_step(run.log)
            assert run.state() == "stopped"
        last = Run(data_root, tmp_path / "run", **FLAGS)
        assert last.end() == 0, last.text()
        assert all(is_part_of(lines, reference) for lines in starts_of(run.out))
        assert last_step(run.log) == FLAGS["max_steps"]
        assert has_weights_of(run.out, reference)
        assert last.state() == "finished"
        assert not list((run.out / "checkpoints").glob("*.tmp"))


@pytest.fixture
def terminal() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The two ends of a pseudo-terminal: the user's and the program's."""
    ours, theirs = (os.fdopen(end, "r+b", buffering=0) for end in pty.openpty())
    with ours, theirs:
        yield ours, theirs


@pytest.mark.soak
@trial("Ctrl+C")
def test_ctrl_c_saves(data_root: Path, tmp_path: Path, terminal: tuple[BinaryIO, BinaryIO]):
    ours, theirs = terminal
    run = Run(data_root, tmp_path / "run", terminal=theirs.fileno(), **ENDLESS)
    run.wait_for("step 6 |")
    ours.write(CTRL_C)
    assert run.end() != 0
    assert "Stopped by signal 2 at step" in run.text()
    assert (run.kept(), run.state()) == (last_step(run.log), "stopped")


@pytest.mark.soak
@trial("Ctrl+C twice")
def test_ctrl_c_twice_exits_at_once(
    data_root: Path, tmp_path: Path, terminal: tuple[BinaryIO, BinaryIO]
):
    """During a save that would never end."""
    ours, theirs = terminal
    script = slow_script(tmp_path, "gpt2.checkpoint.integrity", "HashingWriter", pause_s=10_000)
    flags = ENDLESS | {"checkpoint_interval": 1000}
    run = Run(data_root, tmp_path / "run", script=script, terminal=theirs.fileno(), **flags)
    run.wait_for("step 6 |")
    ours.write(CTRL_C)
    run.wait_for("now in HashingWriter")
    ours.write(CTRL_C)
    assert run.end() != 0
    assert "Stopped by signal" not in run.text()
    assert run.state() == "stopped"


@pytest.mark.soak
@trial("closed terminal")
def test_closed_terminal_saves(
    data_root: Path, tmp_path: Path, terminal: tuple[BinaryIO, BinaryIO]
):
    ours, theirs = terminal
    run = Run(data_root, tmp_path / "run", terminal=theirs.fileno(), **ENDLESS)
    theirs.close()
    run.wait_for("step 6 |")
    ours.close()
    assert run.end() != 0
    assert (run.kept(), run.state()) == (last_step(run.log), "stopped")
