"""Trainings of several ranks: what their host makes of what they do, and real trainings."""

import functools
import os
import queue
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.given import Given, is_alive, wait_until
from gpt2.base.errors import ConfigError, Diverged, ReportedByOtherRank
from gpt2.checkpoint import store
from gpt2.experiments.compare import models
from gpt2.experiments.pool import worker
from gpt2.experiments.pool.job import Event, Job, Slot, Stopped
from gpt2.experiments.pool.messages import EndedAs, JobEnded, JobReported, WorkerEnded
from gpt2.experiments.pool.process import Engine, WorkerProcess
from gpt2.experiments.pool.scheduler import Limits, Scheduler
from gpt2.experiments.search import space, trial
from gpt2.experiments.search.spec import Search
from gpt2.experiments.sweep.sweep import Sweep
from gpt2.experiments.training import ddp, training_job
from gpt2.train import trainer
from gpt2.train.report import Answer
from support import loss_lines, losses, run_command, small_config, small_flags, train_command

SLOT = Slot(0, "cpu0", {"OMP_NUM_THREADS": "1"})


def host(play: str, report: Callable[..., Answer] = lambda **_: "go", **kwargs: Any) -> Any:
    """The result of two ranks that play."""
    return ddp.run_on_ranks(report, Job("ranks", f"experiments.rank_jobs:{play}", kwargs), 2)


def test_rank_0_reports_and_has_the_result(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    reported: list[dict[str, float]] = []

    def report(**metrics: float) -> Answer:
        reported.append(metrics)
        return "prune" if metrics["step"] == 2 else "go"

    assert host("reports", report) == {"answers": ["go", "go", "prune"], "threads": "3"}
    assert reported == [{"step": 0}, {"step": 1}, {"step": 2}]


def test_what_a_dead_rank_has_started_does_not_hide_its_death(tmp_path: Path):
    """Rank 0 has the result all the same, which it sends after everything is saved."""
    assert host("leaves_a_child", folder=str(tmp_path)) == {"rank": 0}
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)  # it has not ended


@pytest.mark.parametrize(
    ("first", "how", "ended"),
    [
        (1, ["bug", "refuses"], JobEnded("failed", reason="no")),
        (0, ["refuses", "exits"], JobEnded("failed", reason="no")),
        (1, ["nothing", "exits"], JobEnded("lost", reason="its process ended with exit code 7")),
        (0, ["exits", "nothing"], JobEnded("lost", reason="its process ended with exit code 7")),
        (1, ["nothing", "full"], JobEnded("lost", reason="out of memory: MemoryError")),
        (0, ["nothing", "bug"], JobEnded("failed", reason="RuntimeError: CUDA error: the bug")),
    ],
)
def test_the_first_failure_is_the_reason(
    tmp_path: Path, first: int, how: list[str], ended: JobEnded
):
    with pytest.raises(EndedAs) as raised:
        host("ends", folder=str(tmp_path), first=first, how=how)
    found = raised.value.ended
    assert (found.state, found.reason.rpartition("rank 1: ")[2].removeprefix("rank 0: ")) == (
        ended.state,
        ended.reason,
    )
    if "bug" in ended.reason:
        assert found.is_device_error and found.traceback.startswith("On rank 1:\nTraceback")


def test_a_result_counts_also_if_another_rank_fails_later(tmp_path: Path):
    found = host("ends", folder=str(tmp_path), first=0, how=["returns", "exits"])
    assert found == {"rank": 0}


def test_a_stop_reaches_every_rank(tmp_path: Path):
    ranks: set[float] = set()

    def report(**metrics: float) -> Answer:
        ranks.add(metrics["rank"])
        if len(ranks) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return "go"

    with pytest.raises(Stopped):
        host("waits", report, folder=str(tmp_path))
    assert {path.name for path in tmp_path.glob("stopped*")} == {"stopped0", "stopped1"}


def test_ranks_that_cannot_train_yet_are_killed_at_a_stop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("RANK_WITHOUT_IMPORT", "1")

    def report(**_metrics: float) -> Answer:
        os.kill(os.getpid(), signal.SIGTERM)
        return "go"

    with pytest.raises(Stopped):
        host("waits", report, folder=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["waits0"]
    assert not is_alive(int((tmp_path / "waits0").read_text()))


def test_no_rank_outlives_a_host_that_gives_up(tmp_path: Path):
    def breaks(**_metrics: float) -> Answer:
        raise OSError("the owner")

    with pytest.raises(OSError, match="the owner"):
        host("hangs", breaks, folder=str(tmp_path))
    assert not any(is_alive(int(path.read_text())) for path in tmp_path.glob("waits*"))


def test_a_rank_dies_with_its_host(tmp_path: Path):
    """A host that hangs is killed, and its log says where the ranks were."""
    kwargs = {"play": "hangs", "count": 2, "folder": str(tmp_path)}
    log, inbox = tmp_path / "worker.log", queue.SimpleQueue[Any]()
    host = WorkerProcess(SLOT, log, inbox)
    host.send(Job("a", "experiments.rank_jobs:host", kwargs))
    while not isinstance(inbox.get()[1], JobReported):
        pass
    wait_until(lambda: len(list(tmp_path.glob("waits*"))) == 2)
    host.signal(worker.SHOW_STACK)
    wait_until(lambda: log.read_text().count("hangs") >= 2)  # the stacks may be mixed
    host.signal(signal.SIGKILL)
    pids = [int(path.read_text()) for path in tmp_path.glob("waits*")]
    wait_until(lambda: not any(map(is_alive, pids)))
    assert isinstance(inbox.get()[1], WorkerEnded)


@pytest.mark.parametrize(
    ("error", "result"),
    [(ReportedByOtherRank("no"), {}), (Diverged("nan"), {"diverged": "nan"})],
)
def test_errors_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch,
    data_root: Path,
    tmp_path: Path,
    error: Exception,
    result: dict[str, Any],
):
    assert rank_that_raises(error, monkeypatch, job_of(data_root, tmp_path)) == result


def test_a_rank_that_lost_another_one_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, data_root: Path, tmp_path: Path
):
    error = RuntimeError("[1] Connection closed by peer")
    with pytest.raises(EndedAs) as raised:
        rank_that_raises(error, monkeypatch, job_of(data_root, tmp_path))
    assert raised.value.ended.state == "lost"
    with pytest.raises(RuntimeError, match="a bug"):
        rank_that_raises(RuntimeError("a bug"), monkeypatch, job_of(data_root, tmp_path))


def rank_that_raises(error: Exception, patch: pytest.MonkeyPatch, job: Job) -> Any:
    def raises(*_given: Any) -> None:
        raise error

    patch.setattr(trainer, "run", raises)
    reporter: Any = SimpleNamespace(send_failure=None)
    return training_job.run_rank(reporter, job.kwargs["run"], "x")


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
        training_job.prepare(run, ranks=9)


def job_of(data_root: Path, out: Path, **changes: object) -> Job:
    run = small_config(data_root, out, dropout=0.0, **changes)
    return training_job.job("a", run, out / "exp" / "a", ranks=2)


def pool_of(source: Given, out: Path, **limits: Any) -> Scheduler:
    log = out / "worker.log"
    return Scheduler(
        Engine([SLOT]), source, lambda _: None, log_of=lambda *_: log, limits=Limits(**limits)
    )


def ranks_of(worker: int) -> list[int]:
    """The processes of the ranks that a worker hosts, in their order."""
    children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    ranks = {int(pid): environment_of(int(pid)).get("RANK") for pid in children}
    return sorted((pid for pid, rank in ranks.items() if rank), key=lambda pid: ranks[pid] or "")


def environment_of(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_text()
    return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)


def weights(folder: Path) -> list[torch.Tensor]:
    newest = store.find(folder, "latest")
    assert newest is not None
    return list(store.load(newest)["model"].values())


def test_two_ranks_train_as_one_process_does(data_root: Path, tmp_path: Path):
    """This process is their host."""
    reported: list[dict[str, float]] = []

    def report(**metrics: float) -> Answer:
        reported.append(metrics)
        return "go"

    result = training_job.run(report, **job_of(data_root, tmp_path, max_steps=10).kwargs)
    assert result["step"] == 10
    assert [metrics for metrics in reported if "val_loss" in metrics]
    alone = small_config(data_root, tmp_path / "alone", dropout=0.0, max_steps=10)
    assert trainer.run(alone).train_loss == pytest.approx(result["train_loss"], rel=1e-4)
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

    def kill(event: Event) -> Answer:
        due = event.kind == "reported" and event.metrics["step"] > 10 * event.attempt
        if due and event.attempt <= kills and event.attempt not in killed:
            killed[event.attempt] = found = ranks_of(event.pid)
            os.kill(found[1] if event.attempt == 1 else event.pid, signal.SIGKILL)
            if event.attempt == 2:
                wait_until(lambda: not any(map(is_alive, found)))
        return "go"

    source.answer = kill
    source.jobs[0].kwargs["run"]["data"]["max_steps"] = 30  # type: ignore[index]
    assert pool_of(source, tmp_path, retries=2).run() == 0
    log = (tmp_path / "worker.log").read_text()
    assert len(source.of("finished")) == 1, log
    reasons = [event.reason for event in source.of("retried")]
    assert len(reasons) == kills and reasons[0].startswith("rank 1: its process was killed by SIG")
    assert all("SIGKILL" in reason for reason in reasons)
    assert "torchrun has died" not in log, "no rank outlives its host to save"
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
        "diverged": {
            **{"learning_rate": 10.0, "weight_decay": 10.0},
            **{"max_bad_steps": 2, "checkpoint_interval": None},
        },
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
            os.kill(os.getpid(), signal.SIGINT)
            source.answer = answers
        return answers(event)

    source.answer = stops
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
