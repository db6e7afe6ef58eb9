"""Ranks that hang or fail, torchrun's restarts, other numbers of ranks, two nodes."""

import os
import re
import signal
import socket
from pathlib import Path

import pytest
import torch

import forked_ranks
from faults.harness import (
    FLAGS,
    Run,
    is_part_of,
    last_step,
    patched_script,
    slow_script,
    starts_of,
    trial,
)
from gpt2.checkpoint import store
from gpt2.train import status, trainer
from support import (
    HANG_S,
    LOSS_TOLERANCE,
    losses,
    run_command,
    small_config,
    small_flags,
    train_command,
)

pytestmark = pytest.mark.faults

ENDLESS = FLAGS | {"max_steps": 100_000, "eval_interval": None}


@pytest.mark.soak
@trial("SIGSTOP of a rank")
def test_a_rank_that_hangs_is_noticed(data_root: Path, tmp_path: Path):
    run = Run(data_root, tmp_path / "run", ranks=3, **ENDLESS, collective_timeout=15)
    run.wait_for("step 6 |")
    frozen = run.ranks()[-1]
    os.kill(frozen, signal.SIGSTOP)
    noticed = "got no reply from another rank within 15 s (--collective_timeout)"
    run.wait_for(noticed)
    assert run.end() != 0  # once torchrun has waited 30 s for the frozen rank
    text = run.text()
    where = text.split("This rank waited here:\n")[1:]
    assert text.count(noticed) == len(where), "one of them, or both if they end at one time"
    assert all("gpt2/train/trainer.py" in trace for trace in where)
    hangs = "rank 2: it hangs: no reply from it within 15 s"
    assert status.read(run.out / "checkpoints").reason == hangs and hangs in text


FAILING = """
import os, torch
from gpt2.model.gpt2 import GPT2
forward, calls = GPT2.forward, []
def fail(self, *arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 10:
        raise {error}
    return forward(self, *arguments)
GPT2.forward = fail
"""
"""Rank 1 fails in its tenth forward pass of at least four steps."""


HANGING = FAILING.replace("raise {error}", "import signal; signal.pause()")


def test_a_rank_that_hangs_is_named_and_says_where(data_root: Path, tmp_path: Path):
    script = patched_script(tmp_path / "hanging.py", HANGING)
    flags = small_flags(data_root, tmp_path, **ENDLESS, collective_timeout=5)
    variables = {"TORCHELASTIC_RUN_ID": "x"}  # each rank has the thread of a watchdog
    text = forked_ranks.run(flags, 3, tmp_path, script, expect=1, **variables)
    hangs = "rank 1: it hangs: no reply from it within 5 s"
    assert status.read(tmp_path / "checkpoints").reason == hangs
    assert set(re.findall(r"rank \d exits because of (.*)", text)) <= {hangs}
    _, _, trace = text.partition("rank 1: its main thread is here:")
    assert 'hanging.py", line' in trace and "signal.pause()" in trace


def failing_script(folder: Path) -> Path:
    patch = FAILING.format(error='ZeroDivisionError("the reason")')
    return patched_script(folder / "failing.py", patch)


def require_reason(text: str, out: Path) -> None:
    """Checks that the failure of rank 1 is what a run prints and keeps as the reason of its end."""
    assert "rank 1 failed:\nTraceback" in text
    assert text.count("failed:\nTraceback") == 1
    assert "Timed out" not in text
    named = re.findall(r"rank \d exits because of (.*)", text)
    assert set(named) <= {"rank 1: ZeroDivisionError: the reason"}
    written = status.read(out / "checkpoints")
    assert (written.state, written.reason) == ("failed", "rank 1: ZeroDivisionError: the reason")


def test_a_rank_that_fails_ends_all_with_its_traceback(data_root: Path, tmp_path: Path):
    """Nobody kills the other rank: it learns of the failure and ends by itself."""
    flags = small_flags(data_root, tmp_path, **ENDLESS, collective_timeout=10_000)
    text = forked_ranks.run(flags, 2, tmp_path, failing_script(tmp_path), expect=1)
    require_reason(text, tmp_path)


@pytest.mark.soak
@trial("one rank raises")
def test_torchrun_reports_the_rank_that_fails_once(data_root: Path, tmp_path: Path):
    script = failing_script(tmp_path)
    flags = ENDLESS | {"collective_timeout": 10_000}
    run = Run(data_root, tmp_path / "run", ranks=3, script=script, **flags)
    assert run.end() != 0
    require_reason(run.text(), run.out)
    _, _, last_lines = run.text().rpartition("Root Cause (first observed failure):")
    assert "rank 1: ZeroDivisionError: the reason" in last_lines


def restart_until_finished(data_root: Path, out: Path, kills: int) -> Run:
    """Under --max-restarts, without --resume: torchrun restarts the run, which resumes."""
    script = slow_script(out.parent, "gpt2.train.trainer", "lr_at", call=None, pause_s=0.1)
    flags = FLAGS | {"resume": None}
    run = Run(data_root, out, ["--max-restarts=3"], script=script, **flags)
    for kill in range(kills):
        with trial("killed rank under --max-restarts"):
            run.wait_for_step(last_step(run.log) + 5)
            os.kill(run.ranks()[kill % 2], signal.SIGKILL)
            run.wait_for("Resuming from", count=kill + 1)
    assert run.end() == 0, run.text()
    return run


@pytest.mark.soak
def test_torchrun_restarts_a_killed_rank(data_root: Path, tmp_path: Path, reference: Path):
    run = restart_until_finished(data_root, tmp_path / "run", kills=1)
    assert run.text().count("Resuming from") == 1
    assert all(is_part_of(lines, reference) for lines in starts_of(run.out))
    assert last_step(run.log) == FLAGS["max_steps"]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_soak_restarts(data_root: Path, tmp_path: Path, reference: Path):
    for number, kills in enumerate((3, 3, 2)):
        run = restart_until_finished(data_root, tmp_path / f"run{number}", kills)
        assert run.text().count("Resuming from") == kills
        assert all(is_part_of(lines, reference) for lines in starts_of(run.out))
        assert last_step(run.log) == FLAGS["max_steps"]


@pytest.mark.soak
@pytest.mark.parametrize(
    ("call", "elsewhere", "steps"),
    [(2, False, ["4", "4"]), (2, True, ["4", "4"]), (7, False, ["4", "8"])],
)
@trial("killed rank under --max-restarts --resume STEP")
def test_a_restart_knows_whether_it_has_saved(
    data_root: Path, tmp_path: Path, call: int, elsewhere: bool, steps: list[str]
):
    """Until this run has saved a checkpoint, a restart begins at the step of --resume."""
    earlier = tmp_path / ("earlier" if elsewhere else "run")
    trainer.run(small_config(data_root, earlier, **FLAGS | {"max_steps": 12}))
    script = slow_script(tmp_path, "gpt2.train.trainer", "lr_at", call)
    flags = FLAGS | {"resume": earlier / "checkpoints/step_000004.pt", "max_steps": 14}
    run = Run(data_root, tmp_path / "run", ["--max-restarts=3"], script=script, **flags)
    run.wait_for("now in lr_at")
    os.kill(run.ranks()[0], signal.SIGKILL)
    assert run.end() == 0, run.text()
    assert re.findall(r"  - Step: (\d+)\n", run.text()) == steps


@pytest.mark.soak
@trial("a save slower than --collective_timeout")
def test_a_rank_waits_for_a_slow_disk(data_root: Path, tmp_path: Path):
    script = slow_script(tmp_path, "gpt2.checkpoint.integrity", "HashingWriter", pause_s=30)
    flags = FLAGS | {"max_steps": 12, "collective_timeout": 15}
    run = Run(data_root, tmp_path / "run", script=script, **flags)
    assert run.end() == 0, run.text()
    assert "Waiting: the previous checkpoint is still being written" in run.text()
    assert run.kept() == 12


NAN_ON_ONE_RANK = """
import torch
from gpt2.model.gpt2 import GPT2
forward, calls = GPT2.forward, []
def poisoned(self, *arguments):
    calls.append(1)
    loss = forward(self, *arguments)
    rank = torch.distributed.get_rank()
    return loss * float("nan") if rank == 1 and self.training and len(calls) == 30 else loss
GPT2.forward = poisoned
"""


@pytest.mark.soak
@trial("NaN in the loss of one rank")
def test_a_bad_loss_of_one_rank_is_left_out_by_all(data_root: Path, tmp_path: Path):
    script = patched_script(tmp_path / "poisoned.py", NAN_ON_ONE_RANK)
    flags = FLAGS | {"max_steps": 20, "eval_interval": None}
    run = Run(data_root, tmp_path / "run", script=script, **flags)
    assert run.end() == 0, run.text()
    assert run.text().count("no update (1 in a row, 1 in all)") == 1
    state = store.load(run.out / "checkpoints/latest.pt")
    assert all(torch.isfinite(part).all() for part in state["model"].values())


@pytest.mark.soak
@trial("rank 1 out of memory")
def test_out_of_memory_on_one_rank_names_the_flag(data_root: Path, tmp_path: Path):
    patch = FAILING.format(error='torch.OutOfMemoryError("CUDA out of memory")')
    script = patched_script(tmp_path / "full.py", patch)
    run = Run(data_root, tmp_path / "run", script=script, **ENDLESS | {"mini_batch_size": 2})
    assert run.end() != 0
    advice = "error: 2 rows of block_size=8 at once do not fit into the memory; use --mini_batch"
    assert advice in run.text()
    assert "rank 1: 2 rows of block_size=8" in status.read(run.out / "checkpoints").reason


@pytest.mark.soak
@trial("other numbers of ranks")
def test_number_of_ranks_changes_at_every_resume(data_root: Path, tmp_path: Path):
    """1 → 2 → 4 → 3 → 1: the losses are those of one process."""
    flags = {"dropout": 0.0, "decay_steps": 20, "checkpoint_interval": 4}
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    run_command(train_command(small_flags(data_root, alone, **flags, max_steps=20)))
    for number, ranks in enumerate((None, 2, 4, 3, None), 1):
        more = small_flags(data_root, moved, **flags, max_steps=4 * number, resume="latest")
        run_command(train_command(more, ranks=ranks))
    one, other = (losses(out / "logs/log.txt") for out in (moved, alone))
    assert one == pytest.approx(other, abs=LOSS_TOLERANCE["float32"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.soak
@pytest.mark.parametrize("killed", [0, 1])
@trial("one of two nodes killed")
def test_two_nodes_one_killed(data_root: Path, tmp_path: Path, reference: Path, killed: int):
    """Two agents on loopback; the killed one hosts the store, or does not."""

    def start() -> list[Run]:
        rendezvous = [
            "--nnodes=2",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{port}",
            "--rdzv-id=test",
        ]
        flags = FLAGS | {"collective_timeout": 20}
        runs = []
        for node in range(2):
            here = ["--rdzv-conf=is_host=" + ("1" if node == 0 else "0")]
            run = Run(data_root, tmp_path / "run", rendezvous + here, ranks=1, **flags)
            runs.append(run)
        return runs

    port = free_port()
    nodes = start()
    nodes[0].wait_for("step 9 |")
    reached = last_step(nodes[0].log)
    mine = [pid for pid in nodes[0].processes() if parent(pid) == nodes[killed].agent.pid]
    for pid in (nodes[killed].agent.pid, *mine):
        os.kill(pid, signal.SIGKILL)
    other = nodes[1 - killed]
    assert other.agent.wait(HANG_S) != 0
    nodes[killed].agent.wait(HANG_S)
    other.end()
    newest = store.find(tmp_path / "run/checkpoints", "latest")
    kept = int(newest.stem.removeprefix("step_"))
    port = free_port()
    for run in start():
        assert run.agent.wait(HANG_S) == 0, run.text()
    assert all(is_part_of(lines, reference) for lines in starts_of(tmp_path / "run"))
    assert last_step(tmp_path / "run/logs/log.txt") == FLAGS["max_steps"]
    assert kept >= reached - 2 * FLAGS["checkpoint_interval"]


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
