"""What every worker does, wherever it runs: one case class for all of them."""

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.given import is_alive, job, wait_until
from experiments.ray_cluster import Machines
from gpt2.experiments.pool import worker
from gpt2.experiments.pool.job import Job, Slot
from gpt2.experiments.pool.messages import (
    JobEnded,
    JobPhase,
    JobReported,
    Message,
    Reply,
    WorkerEnded,
)
from gpt2.experiments.pool.process import Engine, Inbox, Worker

LOADED = [JobPhase("loading"), JobPhase("running")]


class Started:
    """A worker, and what arrives from it."""

    def __init__(self, engine: Engine, log: Path, *jobs: Job) -> None:
        self.inbox: Inbox = queue.SimpleQueue()
        self.worker: Worker = engine.start_worker(Slot(0, "cpu0", {"SLOT": "7"}), log, self.inbox)
        for given in jobs:
            self.worker.send(given)

    def next(self) -> Message:
        sender, message = self.inbox.get()
        assert sender is self.worker
        return message

    def until(self, kind: type[Message]) -> list[Message]:
        """The messages up to the first one of this kind."""
        messages = [self.next()]
        while not isinstance(messages[-1], kind):
            messages.append(self.next())
        return messages


class WorkerContract:
    @pytest.fixture
    def engine(self) -> Engine:
        raise NotImplementedError

    def test_jobs_share_a_worker_until_it_is_let_go(self, engine: Engine, tmp_path: Path):
        started = Started(engine, tmp_path / "log", job("a", "environment", variable="SLOT"))
        *phases, ended = started.until(JobEnded)
        assert phases == LOADED and isinstance(ended, JobEnded)
        assert ended.state == "finished" and ended.result["value"] == "7"
        assert ended.result["pid"] == started.worker.pid == ended.result["session"]
        started.worker.send(job("b", "square", seed=3))
        assert started.until(JobEnded) == [*LOADED, JobEnded("finished", 9)]
        started.worker.send(None)
        assert isinstance(started.next(), WorkerEnded)
        assert "by a child" in (tmp_path / "log").read_text()

    def test_replies_reach_the_job_and_its_process_ends_with_it(
        self, engine: Engine, tmp_path: Path
    ):
        started = Started(engine, tmp_path / "log", job("a", "counts", until=9, own_process=True))
        for number in range(3):
            assert started.until(JobReported)[-1] == JobReported({"number": number})
            started.worker.send(Reply("prune" if number == 2 else "go"))
        assert started.next() == JobEnded("pruned", 2, takes_no_more=True)
        assert isinstance(started.next(), WorkerEnded)

    def test_a_signal_stops_the_job(self, engine: Engine, tmp_path: Path):
        started = Started(engine, tmp_path / "log", job("a", "counts", until=9))
        started.until(JobReported)
        started.worker.signal(signal.SIGTERM)
        wait_until(lambda: not is_pending(started.worker.pid, signal.SIGTERM))
        started.worker.send(Reply("go"))
        assert started.until(JobEnded)[-1] == JobEnded("stopped", takes_no_more=True)
        assert isinstance(started.next(), WorkerEnded)

    def test_a_signal_while_it_starts_stops_it(self, engine: Engine, tmp_path: Path):
        started = Started(engine, tmp_path / "log", job("a", "rises"))
        started.worker.signal(signal.SIGTERM)
        *_, ended = started.until(WorkerEnded)[:-1] or [JobEnded("stopped", takes_no_more=True)]
        assert ended == JobEnded("stopped", takes_no_more=True)

    def test_a_worker_that_hangs_shows_where_and_is_killed_with_all_that_it_started(
        self, engine: Engine, tmp_path: Path
    ):
        trace, log = tmp_path / "trace", tmp_path / "log"
        started = Started(engine, log, job("a", "waits_with_child", trace=str(trace)))
        wait_until(lambda: trace.exists() and trace.read_text().count("\n") == 2)
        pids = [int(line.split()[1]) for line in trace.read_text().splitlines()]
        assert pids[0] == started.worker.pid and all(map(is_alive, pids))
        started.worker.signal(worker.SHOW_STACK)
        wait_until(lambda: "in waits_with_child" in log.read_text())
        started.worker.signal(signal.SIGKILL)
        assert isinstance(started.until(WorkerEnded)[-1], WorkerEnded)
        wait_until(lambda: not any(map(is_alive, pids)))
        started.worker.signal(signal.SIGKILL)
        started.worker.send(None)
        started.worker.signal(signal.SIGTERM)  # nothing happens

    def test_death_is_seen_although_a_child_holds_the_pipe(self, engine: Engine, tmp_path: Path):
        trace = tmp_path / "trace"
        started = Started(engine, tmp_path / "log", job("a", "dies_with_child", trace=str(trace)))
        ended = started.until(WorkerEnded)[-1]
        assert isinstance(ended, WorkerEnded) and ended.lost == "worker"
        assert "killed by SIGKILL" in ended.reason
        (child,) = (int(line.split()[1]) for line in trace.read_text().splitlines())
        wait_until(lambda: not is_alive(child))


def is_pending(pid: int, number: int) -> bool:
    """Whether a signal waits to be delivered to a process."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return bool(int(fields["ShdPnd"], 16) >> (number - 1) & 1)


class TestWorkerProcess(WorkerContract):
    @pytest.fixture
    def engine(self) -> Engine:
        return Engine([])

    def test_the_end_by_a_signal_without_a_name_is_reported(self, engine: Engine, tmp_path: Path):
        values = {"trace": str(tmp_path / "trace"), "times": 1, "number": signal.SIGRTMIN + 3}
        started = Started(engine, tmp_path / "log", job("a", "dies", **values))
        reason = f"its process was killed by signal {signal.SIGRTMIN + 3}"
        assert started.until(WorkerEnded)[-1] == WorkerEnded(reason)

    def test_it_runs_with_the_options_of_its_owner(self, tmp_path: Path):
        code = (
            "import pathlib, queue\n"
            "from gpt2.experiments.pool import job, process\n"
            "inbox = queue.SimpleQueue()\n"
            "log = pathlib.Path('log')\n"
            "worker = process.WorkerProcess(job.Slot(0, 'cpu0', {}), log, inbox)\n"
            "worker.send(job.Job('a', 'experiments.jobs:flags', {}))\n"
            "print([inbox.get()[1] for _ in range(3)][-1].result)"
        )
        command = [sys.executable, "-O", "-W", "error::UserWarning", "-X", "utf8", "-c", code]
        tests = str(Path(__file__).parents[2])
        path = os.pathsep.join((tests, *filter(None, [os.environ.get("PYTHONPATH")])))
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.stdout.splitlines() == ["[1, 1, ['error::UserWarning']]"], done.stderr


@pytest.mark.soak
class TestRemoteWorker(WorkerContract):
    @pytest.fixture
    def engine(self, machines: Machines, tmp_path: Path) -> Iterator[Engine]:
        ray_engine: Any = pytest.importorskip("gpt2.experiments.pool.ray_engine")
        with ray_engine.connected(machines.address, tmp_path, 1, "cpu") as engine:
            yield engine
