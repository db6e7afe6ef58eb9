"""Several ranks, as real processes."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import forked_ranks
from gpt2.base import log
from gpt2.checkpoint import store
from gpt2.cli.parse import USER_ERROR
from gpt2.train import trainer
from support import (
    LOSS_TOLERANCE,
    ROOT,
    loss_lines,
    losses,
    run_command,
    small_config,
    small_flags,
    train_command,
    write_tasks,
)


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    state = store.load(out / "checkpoints" / f"step_{step:06d}.pt")
    return state["model"]


TWO_MICRO_BATCHES = {"mini_batch_size": 1}
"""of each of two ranks in a step, so that they exchange gradients after the second one only"""


@pytest.fixture(scope="module")
def uninterrupted(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps on 2 ranks, with dropout."""
    out = tmp_path_factory.mktemp("uninterrupted")
    forked_ranks.run(small_flags(data_root, out, **TWO_MICRO_BATCHES), 2, out)
    return out


@pytest.mark.parametrize(
    ("number", "after"),
    [(signal.SIGINT, 4), pytest.param(signal.SIGTERM, 12, marks=pytest.mark.soak)],
)
def test_stopped_by_a_signal_and_resumed_is_bit_identical(
    data_root: Path, tmp_path: Path, uninterrupted: Path, number: signal.Signals, after: int
):
    flags = small_flags(data_root, tmp_path, **TWO_MICRO_BATCHES)
    command = train_command(flags, ranks=2)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as started:
        for line in started.stdout:
            if line.startswith(f"step {after} "):
                started.send_signal(number)
                break
        rest = started.stdout.read()
    assert started.returncode != 0
    assert f"Stopped by signal {int(number)} at step" in rest
    stopped_at = max(losses(tmp_path / "logs/log.txt"))
    assert after <= stopped_at < 20
    assert (tmp_path / "checkpoints" / f"step_{stopped_at:06d}.json").exists()

    resumed = forked_ranks.run([*flags, "--resume", "latest"], 2, tmp_path)
    assert f"  - Step: {stopped_at}\n" in resumed
    assert loss_lines(tmp_path / "logs/log.txt") == loss_lines(uninterrupted / "logs/log.txt")
    one, other = weights(tmp_path, 20), weights(uninterrupted, 20)
    assert all(torch.equal(one[name], other[name]) for name in one)


RANK_1_FAILS_AND_STOPS = """
import os, signal
from gpt2.cli.train import train_main
from gpt2.model.gpt2 import GPT2
forward, calls = GPT2.forward, {True: 0, False: 0}
def interrupted(net, *given):
    calls[net.training] += 1
    if os.environ["RANK"] == "1" and not net.training and calls[False] == 3:
        raise ZeroDivisionError("a validation")
    if os.environ["RANK"] == "1" and net.training and calls[True] == 1 + 7 * 2 + 1:
        signal.raise_signal(signal.SIGTERM)
    return forward(net, *given)
GPT2.forward = interrupted
raise SystemExit(train_main())
"""
"""One rank fails in the first batch of the second validation, and receives a signal in the first of
two micro-batches of step 8. (The first forward pass is that of DDP's buckets.)"""
STOPPED = 128 + signal.SIGTERM


def test_one_rank_that_fails_to_measure_or_is_to_stop_within_a_step_takes_the_others_along(
    data_root: Path, tmp_path: Path, uninterrupted: Path
):
    script = tmp_path / "interrupted.py"
    script.write_text(RANK_1_FAILS_AND_STOPS)
    flags = small_flags(data_root, tmp_path, eval_batches=1, **TWO_MICRO_BATCHES)
    stopped = forked_ranks.run(flags, 2, tmp_path, script, expect=STOPPED)
    assert "WARNING: step 5: validation failed; training continues\nTraceback" in stopped
    assert stopped.count("ZeroDivisionError: a validation") == 1
    assert "Stopped by signal 15 at step 7" in stopped
    forked_ranks.run([*flags, "--resume", "latest"], 2, tmp_path)
    logs = [loss_lines(out / "logs/log.txt") for out in (tmp_path, uninterrupted)]
    steps = [[line for line in log if "val" not in line] for log in logs]
    assert steps[0] == steps[1]
    one, other = weights(tmp_path, 20), weights(uninterrupted, 20)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.soak
def test_remote_shards_give_the_same_run(data_root: Path, tmp_path: Path, uninterrupted: Path):
    changes = TWO_MICRO_BATCHES | {"data_root": f"file://{data_root}"}
    flags = small_flags(data_root, tmp_path, **changes)
    cache = tmp_path / "cache"
    printed = forked_ranks.run([*flags, "--cache_dir", str(cache)], 2, tmp_path)
    assert f"copies in {cache}, up to 50 GB" in printed
    assert loss_lines(tmp_path / "logs/log.txt") == loss_lines(uninterrupted / "logs/log.txt")
    copies = [path.stat().st_size for path in cache.glob("*") if path.is_file()]
    shards = [path.stat().st_size for path in data_root.glob("*.npy")]
    assert set(copies) <= set(shards)
    assert 2 <= len(copies) <= len(shards)  # no shard was copied once per rank


def test_number_of_ranks_may_change_at_a_resume(data_root: Path, tmp_path: Path, capsys):
    """1 → 2 → 1 gives the losses of a run on one process, and two ranks the same HellaSwag."""
    log.setup(info_stream="stdout")
    tasks = write_tasks(tmp_path / "tasks.jsonl", count=50)  # of three lengths
    flags = {
        "dropout": 0.0,
        "decay_steps": 12,
        "checkpoint_interval": 4,
        "hellaswag_interval": 8,
        "hellaswag_path": tasks,
    }
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    trainer.run(small_config(data_root, alone, **flags, max_steps=12))
    for ranks, last in ((None, 4), (2, 8), (None, 12)):
        more = {**flags, "max_steps": last, "resume": "latest"}
        if ranks is None:
            trainer.run(small_config(data_root, moved, **more))
        else:
            forked_ranks.run(small_flags(data_root, moved, **more), ranks, tmp_path)
    assert "Ranks: 2 before, 1 from here; the data is the same" in capsys.readouterr().out
    logs = [(out / "logs/log.txt").read_text().splitlines() for out in (moved, alone)]
    scores = [[line for line in log if "step 8 " in line and "hellaswag:" in line] for log in logs]
    assert len(scores[1]) == 1 and scores[0] == scores[1]
    expected = losses(alone / "logs/log.txt")
    assert losses(moved / "logs/log.txt") == pytest.approx(expected, abs=LOSS_TOLERANCE["float32"])


SEVERAL_RUNS = """
import json, os, sys, torch
from gpt2 import model
from gpt2.cli.train import parse_train
from gpt2.train import trainer
build, gradient_norm = model.build, trainer.gradient_norm
def keep(net):
    if os.environ.get("RANK", "0") == "0":
        torch.save({name: part.grad for name, part in net.named_parameters()}, path)
    return gradient_norm(net)
for path, flags in json.loads(sys.argv[1]):
    model.build = (lambda shape: build(shape).double()) if path else build
    trainer.gradient_norm = keep if path else gradient_norm
    trainer.run(parse_train(flags).run)
"""
"""Trains once per pair (path, flags). With a path, in float64, and saves the gradient there."""


def run_each(runs: list[tuple[Path | None, list[str]]], folder: Path, ranks: int) -> None:
    """One run after another in the same processes."""
    script = folder / "several_runs.py"
    script.write_text(SEVERAL_RUNS)
    given = json.dumps([(str(path) if path else None, flags) for path, flags in runs])
    forked_ranks.run([given], ranks, folder, script)


ONE_UPDATE = {
    **{"max_steps": 1, "total_batch_size": 64, "mini_batch_size": 2},
    **{"dropout": 0.0, "eval_interval": None},
}
THREE_UPDATES = {**ONE_UPDATE, "max_steps": 3, "block_size": 4, "total_batch_size": 32}
SIX_UPDATES = {"decay_steps": 6, "eval_interval": None, "checkpoint_interval": 3}


def test_gradient_of_three_ranks_is_that_of_one(characters: Path, tmp_path: Path):
    """Shares of 3, 3 and 2 rows, in micro-batches of 2 and 1. In bfloat16 the losses agree."""
    kept = {ranks: tmp_path / f"{ranks}.pt" for ranks in (1, 3)}
    bfloat16 = {ranks: tmp_path / f"bfloat16_on_{ranks}" for ranks in (1, 3)}
    for ranks, path in kept.items():
        flags = small_flags(characters, tmp_path / f"on_{ranks}", **ONE_UPDATE)
        more = small_flags(characters, bfloat16[ranks], **THREE_UPDATES, dtype="bfloat16")
        run_each([(path, flags), (None, more)], tmp_path, ranks)
    one, three = (losses(out / "logs/log.txt") for out in bfloat16.values())
    assert list(one) == [1, 2, 3]
    assert three == pytest.approx(one, abs=LOSS_TOLERANCE["bfloat16"])
    alone, shared = map(torch.load, kept.values())
    assert all(part.dtype == torch.float64 for part in alone.values())
    for name, gradient in alone.items():
        assert gradient.abs().max() > 0
        assert (shared[name] - gradient).abs().max() < 1e-10, name


@pytest.mark.soak
def test_three_ranks_resume_bit_identically(data_root: Path, tmp_path: Path):
    """Sums of three gradients, whose order matters."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    runs: list[tuple[Path | None, list[str]]] = [
        (None, small_flags(data_root, whole, **SIX_UPDATES, max_steps=6)),
        (None, small_flags(data_root, parts, **SIX_UPDATES, max_steps=3)),
    ]
    run_each(runs, tmp_path, ranks=3)
    again = small_flags(data_root, parts, **SIX_UPDATES, max_steps=6, resume="latest")
    forked_ranks.run(again, 3, tmp_path)
    assert loss_lines(parts / "logs/log.txt") == loss_lines(whole / "logs/log.txt")
    one, other = weights(parts, 6), weights(whole, 6)
    assert all(torch.equal(one[name], other[name]) for name in one)


NO_DATA = (
    "error: no training data in /nowhere/fineweb_edu; make it with: "
    "gpt2 data fineweb-edu --out /nowhere/fineweb_edu"
)


def test_user_errors_are_one_line_from_one_rank(data_root: Path, tmp_path: Path):
    """One rank also leaves it in the file from which torchrun reports it."""
    report = tmp_path / "error.json"
    flags = small_flags(data_root, tmp_path, data_root="/nowhere/fineweb_edu")
    printed = forked_ranks.run(
        flags, 2, tmp_path, expect=USER_ERROR, TORCHELASTIC_ERROR_FILE=str(report)
    )
    assert printed == f"{NO_DATA}\n"
    assert json.loads(report.read_text())["message"]["message"] == NO_DATA


@pytest.mark.soak
def test_torchrun_reports_a_user_error(data_root: Path, tmp_path: Path):
    flags = small_flags(data_root, tmp_path, data_root="/nowhere/fineweb_edu")
    failed = run_command(train_command(flags, ranks=2), expect=None)
    assert failed.returncode != 0
    lines = failed.stderr.splitlines()
    assert lines[-1] == NO_DATA  # below torchrun's report, and above it
    assert [line for line in lines if line.startswith("error: ")] == [NO_DATA, NO_DATA]
    assert "exitcode  : 2" in failed.stderr
    root_cause = failed.stderr.partition("Root Cause")[2]
    assert "traceback : error: no training data in /nowhere/fineweb_edu; make it" in root_cause
    assert "train.py" not in failed.stderr  # no traceback


def test_an_error_on_rank_0_is_raised_on_all(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from gpt2.distributed import rendezvous\n"
        "from gpt2.config.run import MachineConfig\n"
        "from gpt2.base.errors import DataError\n"
        "def fail(): raise DataError('no data')\n"
        "with rendezvous.join(MachineConfig()) as world:\n"
        "    assert world.run_on_rank0(lambda: world.rank) == 0\n"
        "    assert world.gather([world.rank, 7]) == [[0.0, 7.0], [1.0, 7.0]]\n"
        "    assert world.all_reduce_max(world.rank << 40) == 1 << 40\n"
        "    assert (world.local_rank, world.is_local_rank0) == (world.rank, world.is_rank0)\n"
        "    called = []\n"
        "    world.run_on_local_rank0(lambda: called.append(world.rank))\n"
        "    assert called == ([] if world.rank else [0])\n"
        "    try: world.run_on_local_rank0(fail)\n"
        "    except DataError as error: assert str(error) == 'no data'\n"
        "    else: raise AssertionError('no error on this rank')\n"
        "    assert world.gather_objects(str(world.rank)) == ([] if world.rank else ['0', '1'])\n"
        "    try: world.run_on_rank0(fail)\n"
        "    except DataError as error: os.write(1, f'rank {world.rank}: {error}\\n'.encode())\n"
    )
    printed = forked_ranks.run([], 2, tmp_path, script)
    assert sorted(printed.split("\n")) == ["", "rank 0: no data", "rank 1: no data"]
