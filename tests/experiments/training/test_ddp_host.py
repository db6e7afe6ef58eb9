"""Trainings of several ranks: what their host makes of their messages, and in real processes.

A start of torchrun takes seconds, so that the first part plays its ranks by threads.
"""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.pool.test_scheduler import Given, is_alive
from gpt2.base.errors import ConfigError, Diverged
from gpt2.checkpoint import store
from gpt2.experiments.compare import models
from gpt2.experiments.pool.channel import Channel
from gpt2.experiments.pool.job import Event, Job, JobLost, Slot, Stopped
from gpt2.experiments.pool.messages import (
    JobReported,
    RankConnected,
    RankFailed,
    RankFinished,
    Reply,
    RunTraining,
    StopTraining,
)
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits, Scheduler
from gpt2.experiments.search import space, trial
from gpt2.experiments.search.spec import Search
from gpt2.experiments.sweep.sweep import Sweep
from gpt2.experiments.training import ddp_host, ddp_rank, training_job
from gpt2.train import trainer
from gpt2.train.report import Answer
from support import loss_lines, losses, run_command, small_config, small_flags, train_command

Play = Callable[[Channel], None]
SLOT = Slot(0, "cpu0", {"OMP_NUM_THREADS": "1"})


class Cast:
    """Ranks that are threads of this process, each of which plays its part."""

    def __init__(
        self, patch: pytest.MonkeyPatch, *parts: Play, torchrun: str = "sleep 0.5"
    ) -> None:
        self._parts, self.seen = parts, list[Any]()

        def command(_count: int, address: str) -> list[str]:
            for number in range(len(self._parts)):
                threading.Thread(target=self._play, args=(number, address), daemon=True).start()
            return ["sh", "-c", torchrun]

        patch.setattr(ddp_host, "command", command)

    def _play(self, number: int, address: str) -> None:
        channel = ddp_host.connect(address)
        channel.send(RankConnected(number))
        self.seen.append(channel.wait())
        self._parts[number](channel)
        channel.close()


def host(report: Callable[..., Answer] = lambda **_: "go") -> dict[str, Any]:
    return ddp_host.run_on_ranks(report, {"run_name": "x"}, 2)


def ends(channel: Channel) -> None:
    channel.send(RankFinished({}))


def fails_elsewhere(channel: Channel) -> None:
    """A rank whose error another rank reports."""
    channel.send(RankFinished(None))


def test_rank_0_reports_and_has_the_result(monkeypatch: pytest.MonkeyPatch):
    replies, reported = [], []

    def main(channel: Channel) -> None:
        for step in range(3):
            channel.send(JobReported({"step": step}))
            replies.append(channel.wait())
        channel.send(RankFinished({"loss": 1.5}))

    def report(**metrics: float) -> Answer:
        reported.append(metrics)
        return "prune" if metrics["step"] == 2 else "go"

    cast = Cast(monkeypatch, main, ends)
    assert host(report) == {"loss": 1.5}
    assert reported == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert replies == [Reply("go"), Reply("go"), Reply("prune")]
    assert cast.seen == [RunTraining({"run_name": "x"})] * 2


def raising(error: Exception, after_s: float = 0) -> Play:
    def part(channel: Channel) -> None:
        time.sleep(after_s)
        channel.send(RankFailed(type(error).__name__, str(error), "where"))

    return part


def dying(after_s: float) -> Play:
    return lambda _: time.sleep(after_s)


def test_what_a_dead_rank_has_started_does_not_hide_its_death(monkeypatch: pytest.MonkeyPatch):
    program = (
        "import os, sys, time\nfrom gpt2.experiments.training import ddp_host\n"
        "from gpt2.experiments.pool.messages import RankConnected\n"
        "channel = ddp_host.connect(sys.argv[1])\n"
        "channel.wait()\n"
        "if (child := os.fork()) == 0:\n    time.sleep(60)\n"
        "channel.send(RankConnected(child))\n"
        "os._exit(1)\n"
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    monkeypatch.setattr(ddp_host, "_same_modules", lambda: environment)
    monkeypatch.setattr(
        ddp_host, "command", lambda _, where: [sys.executable, "-c", program, where]
    )
    with pytest.raises(JobLost, match=r"rank \d+ died without reporting an error") as lost:
        host()
    os.kill(int(str(lost.value).split()[1]), signal.SIGKILL)  # its child has not ended


def test_a_rank_outlives_torchrun_to_save(monkeypatch: pytest.MonkeyPatch):
    parts = (raising(Stopped(), 0.4), raising(Stopped(), 0.4))
    Cast(monkeypatch, *parts, torchrun="sleep 0.1; kill -9 $$")
    with pytest.raises(JobLost, match="torchrun was killed by SIGKILL; the ranks saved"):
        host()


@pytest.mark.parametrize(
    ("parts", "kind", "words"),
    [
        ((raising(Diverged("nan"), 0.2), raising(ConfigError("no"))), ConfigError, "no"),
        ((fails_elsewhere, raising(Diverged("nan"), 0.2)), Diverged, "nan"),
        ((raising(Stopped()), raising(Stopped())), Stopped, r"^\nOn rank"),
        ((dying(0.2), raising(RuntimeError("CUDA error"))), RuntimeError, "CUDA error"),
        (
            (raising(RuntimeError("gloo"), 0.2), dying(0)),
            JobLost,
            "rank 1 died without reporting an error",
        ),
        ((dying(0.1), ends), JobLost, "rank 0 died"),
        ((), JobLost, "torchrun ended with exit code 7"),
    ],
)
def test_the_first_failure_is_the_reason(
    monkeypatch: pytest.MonkeyPatch, parts: tuple[Play, ...], kind: type[Exception], words: str
):
    Cast(monkeypatch, *parts, torchrun="sleep 0.5; exit 7")
    with pytest.raises(kind, match=words):
        host()


def test_a_stop_reaches_every_rank_also_those_that_come_later(monkeypatch: pytest.MonkeyPatch):
    def stops(channel: Channel) -> None:
        assert channel.wait() == StopTraining()
        channel.send(RankFailed("Stopped", "", "where"))

    def early(channel: Channel) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        stops(channel)

    parts = [early, stops]
    cast = Cast(monkeypatch, *parts)
    late = cast._play
    monkeypatch.setattr(
        cast, "_play", lambda number, address: (time.sleep(number * 0.4), late(number, address))
    )
    with pytest.raises(Stopped):
        host()
    assert len(cast.seen) == 2


def test_no_rank_outlives_a_host_that_gives_up(monkeypatch: pytest.MonkeyPatch):
    """The ranks' channels are closed, and torchrun is dead."""
    ended = threading.Event()

    def waits(channel: Channel) -> None:
        channel.send(JobReported({"step": 1}))
        if channel.wait() is None:
            ended.set()

    def breaks(**_metrics: float) -> Answer:
        raise OSError("the owner")

    Cast(monkeypatch, waits, torchrun="exec sleep 300")
    with pytest.raises(OSError, match="the owner"):
        host(breaks)
    assert ended.wait(2)


class Odd(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


@pytest.mark.parametrize(
    ("error", "sent"),
    [
        (Diverged("nan"), Diverged("nan")),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            torch.OutOfMemoryError("CUDA out of memory"),
        ),
        (Odd(1, 2), RuntimeError("Odd: 1 and 2")),
    ],
)
def test_an_error_keeps_its_kind_and_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception, sent: Exception
):
    def part(channel: Channel) -> None:
        me = object.__new__(ddp_rank.HostConnection)
        me._channel = channel
        try:
            raise error
        except Exception as caught:
            me.send_error(caught)

    Cast(monkeypatch, ends, part)
    monkeypatch.setattr(ddp_host._Host, "result", lambda host: host._error)
    received: Any = host()
    assert type(received) is type(sent) and str(received) == str(sent)
    assert "On rank 1" in received.__notes__[0] and "raise error" in received.__notes__[0]


def test_every_source_of_trainings_passes_the_ranks_on(data_root: Path, tmp_path: Path):
    run = small_config(data_root, tmp_path)
    searched = space.parse("[n_layer]\nchoices = [1, 2]", run, "space")
    sweep = Sweep([{}], range(1), "val_loss")
    groups = [
        make(run, folder=tmp_path, ranks=ranks)
        for make in (sweep.of_training, functools.partial(models.group, models=models.MODELS))
        for ranks in (3, 1)
    ]
    assert [group.job("gpt2", {}).kwargs["ranks"] for group in groups] == [3, 1, 3, 1]
    for three, one in (groups[:2], groups[2:]):
        assert three.fixed == one.fixed, "it continues with another number of GPUs"
    assert trial.job(0, run, tmp_path, {}, ranks=3).kwargs["ranks"] == 3
    two, one = Search(run, searched, ranks=2), Search(run, searched)
    assert two.description() == one.description(), "a search continues with another number of GPUs"
    with pytest.raises(ConfigError, match="too few for 9 ranks"):
        training_job.require_data(run, ranks=9)


def job_of(data_root: Path, out: Path, **changes: object) -> Job:
    run = small_config(data_root, out, dropout=0.0, **changes)
    return training_job.job("a", run, out / "exp" / "a", ranks=2)


def pool_of(source: Given, out: Path, **limits: Any) -> Scheduler:
    log = out / "worker.log"
    return Scheduler(
        Engine([SLOT]), source, lambda _: None, log_of=lambda *_: log, limits=Limits(**limits)
    )


def ranks_of(worker: int) -> list[int]:
    """The processes of the ranks that a worker hosts: children of its only child."""
    children = Path("/proc/{0}/task/{0}/children")
    below = [int(pid) for pid in Path(str(children).format(worker)).read_text().split()]
    (torchrun,) = (pid for pid in below if b"torch.distributed.run" in command_line(pid))
    return [int(pid) for pid in Path(str(children).format(torchrun)).read_text().split()]


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def weights(folder: Path) -> list[torch.Tensor]:
    newest = store.find(folder, "latest")
    assert newest is not None
    return list(store.load(newest)["model"].values())


def test_a_rank_dies_with_its_host(monkeypatch: pytest.MonkeyPatch):
    """At once, and says where it was; it would save for 30 s if only torchrun were dead."""
    program = (
        "import sys, time\nfrom gpt2.experiments.training.ddp_rank import HostConnection\n"
        "HostConnection(sys.argv[1], 0).report(step=1)\n"
    )
    started: list[subprocess.Popen[bytes]] = []

    def command(_count: int, address: str) -> list[str]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        run = [sys.executable, "-c", program, address]
        started.append(subprocess.Popen(run, env=environment, stderr=subprocess.PIPE))
        return ["sleep", "100"]

    def breaks(**_metrics: float) -> Answer:
        raise OSError("the owner is gone")

    monkeypatch.setattr(ddp_host, "command", command)
    with pytest.raises(OSError, match="the owner is gone"):
        host(breaks)
    try:
        _, stack = started[0].communicate(timeout=2)
    finally:
        started[0].kill()
    assert started[0].returncode == -signal.SIGKILL and b"in report" in stack


def test_two_ranks_train_as_one_process_does(data_root: Path, tmp_path: Path):
    source = Given(job_of(data_root, tmp_path, max_steps=10))
    assert pool_of(source, tmp_path).run() == 0
    (ended,) = source.of("finished")
    assert ended.result["step"] == 10
    assert [event.metrics for event in source.of("reported") if "val_loss" in event.metrics]
    alone = small_config(data_root, tmp_path / "alone", dropout=0.0, max_steps=10)
    assert trainer.run(alone).train_loss == pytest.approx(ended.result["train_loss"], rel=1e-4)
    assert losses(alone.watch.log_dir / "log.txt") == pytest.approx(
        losses(tmp_path / "exp" / "a" / "log.txt"), rel=1e-4
    )


@pytest.mark.soak
@pytest.mark.parametrize("kills", [1, 2])
def test_killed_ranks_and_hosts_cost_no_bit(data_root: Path, tmp_path: Path, kills: int):
    """A rank is killed, then the worker that hosts the next attempt; the last one ends as one
    that runs under torchrun undisturbed, and nearly as a training of one process."""
    source = Given(job_of(data_root, tmp_path))
    killed: dict[int, list[int]] = {}
    died_s: list[float] = []

    def kill(event: Event) -> Answer:
        due = event.kind == "reported" and event.metrics["step"] > 10 * event.attempt
        if due and event.attempt <= kills and event.attempt not in killed:
            killed[event.attempt] = found = ranks_of(event.pid)
            began = time.monotonic()
            os.kill(found[1] if event.attempt == 1 else event.pid, signal.SIGKILL)
            if event.attempt == 2:
                while any(map(is_alive, found)) and time.monotonic() < began + 20:
                    time.sleep(0.02)
                died_s.append(time.monotonic() - began)
        return "go"

    source._answer = kill
    source.jobs[0].kwargs["run"]["data"]["max_steps"] = 30  # type: ignore[index]
    assert pool_of(source, tmp_path, retries=2).run() == 0
    log = (tmp_path / "worker.log").read_text()
    assert len(source.of("finished")) == 1, log
    reasons = [event.reason for event in source.of("retried")]
    assert len(reasons) == kills and reasons[0] == "rank 1 died without reporting an error"
    if kills == 2:
        assert "SIGKILL" in reasons[1] and died_s[0] < 2, "no rank outlives its host"
    assert log.count("Loading checkpoint from") == kills, "each goes on where the last one was"

    flags = small_flags(data_root, tmp_path / "by_hand", dropout=0.0, max_steps=30)
    run_command(train_command(flags, ranks=2))
    mine, hand = tmp_path / "exp" / "a", tmp_path / "by_hand"
    assert loss_lines(mine / "log.txt") == loss_lines(hand / "logs" / "log.txt")
    for ours, theirs in zip(weights(mine), weights(hand / "checkpoints"), strict=True):
        assert torch.equal(ours, theirs)

    alone = small_config(data_root, tmp_path / "alone", dropout=0.0, max_steps=30)
    trainer.run(alone)
    assert losses(alone.watch.log_dir / "log.txt") == pytest.approx(
        losses(mine / "log.txt"), rel=1e-4
    )


@pytest.mark.soak
def test_prune_stop_and_errors_reach_the_other_side(data_root: Path, tmp_path: Path):
    def answers(event: Event) -> Answer:
        if event.kind != "reported" or event.metrics["step"] < 5 or event.job is None:
            return "go"
        return "prune" if event.job.name == "pruned" else "go"

    jobs = {
        "pruned": {"max_steps": 1000},
        "diverged": {"learning_rate": 1e30, "max_bad_steps": 2, "checkpoint_interval": None},
        "broken": {},
        "stopped": {"max_steps": 100_000},
    }
    made = {
        name: replace(job_of(data_root, tmp_path / name, **changes), name=name)
        for name, changes in jobs.items()
    }
    made["broken"] = replace(made["broken"], target="experiments.broken_rank:run")
    source = Given(*made.values(), answer=answers)

    def stops(event: Event) -> Answer:
        if event.kind == "reported" and event.job and event.job.name == "stopped":
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            source._answer = answers
        return answers(event)

    source._answer = stops
    assert pool_of(source, tmp_path, retries=0).run() == signal.SIGINT
    assert [event.job.name for event in source.of("pruned") if event.job] == ["pruned"]
    assert 5 <= source.of("pruned")[0].result["step"] < 100
    failed = {event.job.name: event for event in source.of("failed") if event.job}
    assert "updates in a row" in failed["diverged"].reason
    assert not failed["diverged"].traceback, "a known mistake"
    assert failed["broken"].reason == "RuntimeError: CUDA error: the bug"
    assert "On rank 1" in failed["broken"].traceback
    (stopped,) = source.of("stopped")
    assert stopped.reason == "", "it saved by itself"
    kept = sorted((tmp_path / "stopped" / "exp" / "a").glob("step_*.json"))
    assert kept and "Stopped by signal 15" in (tmp_path / "worker.log").read_text()
