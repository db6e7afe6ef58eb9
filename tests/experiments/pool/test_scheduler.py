import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments.given import SLOTS, Given, is_alive, job, run, wait_until
from gpt2.base.errors import UserError
from gpt2.base.text import LONGEST_REASON
from gpt2.distributed.signals import StopRequest
from gpt2.experiments.pool import scheduler, worker
from gpt2.experiments.pool.job import Event, Job
from gpt2.experiments.pool.messages import JobEnded
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Scheduler
from gpt2.train.report import Answer


def test_every_job_runs_once_and_workers_are_reused(tmp_path: Path):
    trace = str(tmp_path / "trace")
    source = Given(*(job(f"{seed}", "square", seed=seed, trace=trace) for seed in range(20)))
    assert run(source, tmp_path) == 0
    assert source.results() == {f"{seed}": seed * seed for seed in range(20)}
    lines = (tmp_path / "trace").read_text().splitlines()
    assert sorted(line.rpartition(" ")[0] for line in lines) == sorted(
        f"square {seed}" for seed in range(20)
    )
    assert len({line.split()[-1] for line in lines}) <= 2
    assert not any(is_alive(event.pid) for event in source.events)


def test_a_worker_for_which_there_is_no_job_ends(tmp_path: Path):
    """Its memory is free, and its room on a cluster, while others still run."""

    def prune(_event: Event) -> Answer:
        ended = [event.pid for event in source.of("finished")]
        return "prune" if ended and not any(map(is_alive, ended)) else "go"

    jobs = job("long", "counts", until=10_000, pause=0.01), job("short", "square", seed=2)
    source = Given(*jobs, answer=prune)
    run(source, tmp_path)
    assert [event.job.name for event in source.of("pruned") if event.job] == ["long"]


@pytest.mark.parametrize("kind", ["reported", "waiting"])
def test_time_that_the_source_takes_is_no_timeout(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """A database may not answer for minutes: a job whose messages wait does not hang."""
    monkeypatch.setattr(scheduler, "WAITING_EVENT_S", 0.01)
    kinds: set[str] = set()
    waited: list[None] = []

    def slow(event: Event) -> Answer:
        kinds.add(event.kind)
        if event.kind == kind and "reported" in kinds and not waited:
            waited.append(time.sleep(2.5))
        return "go"

    jobs = [job(name, "counts", until=8, pause=0.3) for name in "ab"]
    source = Given(*jobs, answer=slow)
    run(source, tmp_path, retries=0, job_timeout=2.0)
    assert waited and source.results() == {"a": 8, "b": 8}


def test_worker_sees_its_slot_and_logs_with_its_pid(tmp_path: Path):
    source = Given(
        *(job(f"{n}", "environment", own_process=True, variable="SLOT") for n in range(4))
    )
    run(source, tmp_path)
    assert {result["value"] for result in source.results().values()} == {"0", "1"}
    pids = {result["pid"] for result in source.results().values()}
    assert len(pids) == 4, "a fresh process each"
    for result in source.results().values():
        assert result["session"] == result["pid"]
        log = (tmp_path / f"cpu{result['value']}.log").read_text()
        assert f" {result['pid']} | printed\n" in log and f" {result['pid']} | by a job\n" in log
        assert "by a child" in log
    assert "SLOT" not in os.environ


def test_a_worker_imports_nothing_from_the_current_folder_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "socket.py").write_text("raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    source = Given(job("a", "square", seed=3))
    run(source, tmp_path)
    assert source.results() == {"a": 9}


def test_job_that_raises_fails_alone(tmp_path: Path):
    source = Given(job("bad", "rises"), job("mistaken", "misused"), job("good", "square", seed=3))
    run(source, tmp_path)
    failed = {event.job.name: event for event in source.of("failed") if event.job}
    assert failed["bad"].reason == "RuntimeError: the job's own mistake"
    assert "jobs.py" in failed["bad"].traceback and "rises" in failed["bad"].traceback
    assert failed["mistaken"].reason == "seed=-1 is too small"
    assert source.results() == {"good": 9}
    assert "the job's own mistake" in "".join(p.read_text() for p in tmp_path.glob("*.log"))


LONG = f"{'x' * 400}:run"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("experiments.jobs:no_such", "no_such"),
        ("no_such_module:run", "no_such_module"),
        (LONG, "no function xxx"),
        ("experiments.jobs:returns_a_thing", "not JSON serializable"),
    ],
)
def test_invalid_job_fails_with_the_reason(tmp_path: Path, target: str, words: str):
    source = Given(Job("bad", target, {}, own_process=False))
    run(source, tmp_path)
    (event,) = source.of("failed")
    assert words in event.reason and len(event.reason) <= LONGEST_REASON
    if target == LONG:
        assert event.reason.endswith(f"… (whole in {event.log})")
        assert target in Path(event.log).read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_job_whose_worker_dies_runs_again(tmp_path: Path, number: int):
    trace = str(tmp_path / "trace")
    source = Given(
        job("a", "dies", trace=trace, times=1, number=number), job("b", "square", seed=2)
    )
    run(source, tmp_path)
    assert source.results() == {"a": "lived", "b": 4}
    (retried,) = source.of("retried")
    assert signal.Signals(number).name in retried.reason
    assert [event.attempt for event in source.of("finished") if event.job.name == "a"] == [2]


def test_job_whose_worker_dies_too_often_has_failed(tmp_path: Path):
    trace = str(tmp_path / "trace")
    source = Given(job("a", "dies", trace=trace, times=5), job("b", "square", seed=2))
    run(source, tmp_path, retries=2)
    assert source.results() == {"b": 4}
    assert len(source.of("retried")) == 2 and len(source.of("failed")) == 1
    assert "SIGKILL" in source.of("failed")[0].reason


def test_job_that_loses_one_of_its_processes_runs_again(tmp_path: Path):
    source = Given(job("a", "loses", own_process=True, trace=str(tmp_path / "trace")))
    run(source, tmp_path)
    assert source.results() == {"a": "lived"}
    assert [event.reason for event in source.of("retried")] == ["rank 1 died"]


def test_grandchild_neither_hides_a_death_nor_survives_it(tmp_path: Path):
    trace = str(tmp_path / "trace")
    source = Given(job("a", "dies_with_child", trace=trace))
    run(source, tmp_path, retries=0)
    assert len(source.of("failed")) == 1
    (child,) = (int(line.split()[1]) for line in (tmp_path / "trace").read_text().splitlines())
    wait_until(lambda: not is_alive(child))


def test_job_that_hangs_is_ended_and_its_log_says_where(tmp_path: Path):
    source = Given(job("a", "hangs"))
    run(source, tmp_path, retries=0, job_timeout=0.1)
    assert source.of("failed")[0].reason == "no report for 0.1 s (--job_timeout)"
    assert "in hangs" in "".join(path.read_text() for path in tmp_path.glob("*.log"))


def test_out_of_memory_gets_a_fresh_process(tmp_path: Path):
    trace = str(tmp_path / "trace")
    source = Given(job("before", "square", seed=1), job("a", "full", trace=trace))
    run(source, tmp_path, slots=SLOTS[:1])
    assert source.of("retried")[0].reason.startswith("out of memory: MemoryError")
    assert source.results()["a"] != source.of("retried")[0].pid


def test_answers_reach_the_job(tmp_path: Path):
    def prune(event: Event) -> Answer:
        return "prune" if event.metrics.get("number") == 3 else "go"

    source = Given(job("a", "counts", until=9), answer=prune)
    run(source, tmp_path)
    assert [event.result for event in source.of("pruned")] == [3]
    assert [event.metrics["number"] for event in source.of("reported")] == [0, 1, 2, 3]


def test_job_waits_for_its_slot(tmp_path: Path):
    jobs = [job(f"{n}", "square", seed=n, pause=0.8 * (n == 1)) for n in range(3)]
    pinned = Job("pinned", "experiments.jobs:square", {"seed": 5}, False, slot=1)
    source = Given(*jobs[:2], pinned, jobs[2])
    run(source, tmp_path)
    where = {event.job.name: event.slot.index for event in source.of("finished") if event.job}
    assert where["pinned"] == 1 and where["2"] == 0


@pytest.mark.parametrize(
    ("error", "lost"), [("CUDA error: unspecified launch failure", [0]), ("a bug", [])]
)
def test_bad_slot_is_taken_out_of_service(tmp_path: Path, error: str, lost: list[int]):
    """A GPU that gives errors is; one that meets three jobs with a bug is not."""
    source = Given(*(job(f"{n}", "bad_on", slot="0", seed=n, error=error) for n in range(20)))
    seen: list[Event] = []
    pool = Scheduler(Engine(SLOTS), source, seen.append, log_of=lambda *_: tmp_path / "log")
    pool.run()
    assert [event.slot.index for event in seen if event.kind == "slot_lost"] == lost
    assert len(source.of("failed")) >= 3 and len(source.events) == 40
    if lost:
        after = seen[[event.kind for event in seen].index("slot_lost") + 1 :]
        assert {event.slot.index for event in after} == {1}, "it gets no more jobs"


def test_a_worker_that_got_a_stop_signal_gets_no_more_jobs(tmp_path: Path):
    source = Given(
        job("a", "counts", until=400, pause=0.01),
        *(job(f"{n}", "square", seed=n) for n in range(3)),
    )

    def stop(event: Event) -> Answer:
        if event.kind == "reported" and event.metrics["number"] == 2 and event.attempt == 1:
            os.kill(event.pid, signal.SIGTERM)
        return "go" if event.attempt == 1 else "prune"

    source.answer = stop
    run(source, tmp_path, slots=SLOTS[:1])
    assert [event.reason for event in source.of("retried")] == [
        "its worker got a stop signal that this command did not send"
    ]
    assert len(source.of("finished")) == 3 and not source.of("failed")


def test_jobs_stop_and_save_when_the_source_raises(tmp_path: Path):
    def breaks(event: Event) -> Answer:
        if event.kind == "finished":
            raise OSError("database is locked")
        return "go"

    trace = str(tmp_path / "trace")
    source = Given(
        job("long", "counts", until=10_000, pause=0.01, trace=trace),
        job("short", "counts", until=20, pause=0.05),
        answer=breaks,
    )
    with pytest.raises(OSError, match="database is locked"):
        run(source, tmp_path)
    assert {event.kind for event in source.events} == {"started", "reported", "finished"}
    assert Path(trace).read_text().splitlines()[-1].startswith("stops "), "it was not killed"
    assert not any(is_alive(event.pid) for event in source.events)


def test_results_that_are_too_large_fail_alone(tmp_path: Path):
    source = Given(
        job("small", "returns_much", size=3_000_000), job("large", "returns_much", size=20_000_000)
    )
    run(source, tmp_path)
    assert len(source.results()["small"]) == 3_000_000
    assert source.of("failed")[0].reason.startswith("its result has more than 16 MB; write it")


def test_what_a_job_leaves_is_gone_before_the_next(tmp_path: Path):
    source = Given(*(job(f"{n}", "leaves_something", seed=n) for n in range(6)))
    run(source, tmp_path, slots=SLOTS[:1])
    assert set(source.results().values()) <= {1, 2}


def test_nothing_outlives_an_owner_that_is_killed(tmp_path: Path):
    """Neither its workers nor what these have started."""
    trace = tmp_path / "trace"
    program = (
        "import sys, pathlib\nfrom experiments.given import *\n"
        "run(Given(job('a', 'waits_with_child', trace=sys.argv[1])), pathlib.Path(sys.argv[2]))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(trace), str(tmp_path)]
    owner = subprocess.Popen(command, env=environment)
    wait_until(lambda: trace.exists() and trace.read_text().count("\n") == 2)
    pids = [int(line.split()[1]) for line in trace.read_text().splitlines()]
    assert all(map(is_alive, pids))
    owner.kill()
    owner.wait()
    wait_until(lambda: not any(map(is_alive, pids)))


def test_stop_reaches_every_job_and_loses_none(tmp_path: Path):
    jobs = set[str]()

    def stops(event: Event) -> Answer:
        if event.kind == "reported" and event.job:
            before = len(jobs)
            jobs.add(event.job.name)
            if len(jobs) == 2 > before:  # once: a second Ctrl+C kills
                os.kill(os.getpid(), signal.SIGINT)
        return "go"

    endless = (job(f"{n}", "counts", until=10_000, pause=0.01) for n in range(2))
    source = Given(*endless, job("later", "square", seed=1), answer=stops)
    assert run(source, tmp_path) == signal.SIGINT
    assert [event.reason for event in source.of("stopped")] == ["", ""]
    assert [item.name for item in source.jobs] == ["later"]
    assert not any(is_alive(event.pid) for event in source.events)


def test_stop_while_workers_start_needs_no_reason(tmp_path: Path):
    def stops(event: Event) -> Answer:
        if event.kind == "started":
            os.kill(os.getpid(), signal.SIGTERM)
        return "go"

    jobs = (job(name, "counts", until=10_000, pause=0.01) for name in "ab")
    source = Given(*jobs, answer=stops)
    assert run(source, tmp_path) == signal.SIGTERM
    assert [event.reason for event in source.of("stopped")] == ["", ""]


def test_a_job_that_is_stopped_while_it_loads_does_not_begin():
    stop = StopRequest()
    stop.request(signal.SIGTERM)
    own_end, other_end = multiprocessing.Pipe()
    with own_end, other_end:
        report = worker.Reporter(own_end, stop)
        assert worker.run_job(job("a", "rises"), report) == JobEnded("stopped")


def test_a_bug_in_the_module_of_a_function_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "module_with_a_bug.py").write_text("int('x')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="invalid literal"):
        worker.find_function("module_with_a_bug:run")
    for target in ("jobs", ".jobs:run", "experiments.jobs:", "a b:c"):
        with pytest.raises(UserError, match="expected module:function"):
            worker.find_function(target)


def test_a_script_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "2nd-sweep.py").write_text("def run(seed): return seed\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert worker.find_function("2nd-sweep:run")(3) == 3


def stop_when_it_hangs(number: int, source: Given, trace: Path, times: int = 1) -> None:
    """Sends this process a signal, so often, as soon as `waits_with_child` waits."""

    def send() -> None:
        wait_until(lambda: trace.exists() and trace.read_text().count("\n") == 2)
        os.kill(os.getpid(), number)
        for _ in range(times - 1):
            wait_until(lambda: any(event.kind == "stopping" for event in source.shown))
            os.kill(os.getpid(), number)

    threading.Thread(target=send).start()


def test_stop_kills_what_does_not_end(tmp_path: Path):
    trace = tmp_path / "trace"
    source = Given(job("a", "waits_with_child", trace=str(trace)))
    stop_when_it_hangs(signal.SIGTERM, source, trace)
    assert run(source, tmp_path, grace=0.01) == signal.SIGTERM
    assert source.of("stopped")[0].reason == "it did not end within 0.01 s (--grace)"
    assert not any(is_alive(event.pid) for event in source.events)


@pytest.mark.parametrize("kind", ["failed", "finished"])
def test_an_interrupt_that_comes_while_an_end_is_handled_ends_all(tmp_path: Path, kind: str):
    """No worker is waited for that has ended already."""

    def interrupted(event: Event) -> Answer:
        if event.kind == kind:
            raise KeyboardInterrupt
        return "go"

    trace = str(tmp_path / "trace")
    jobs = [job("dies", "dies", trace=trace, times=9), job("ends", "square", seed=2)]
    source = Given(*(jobs if kind == "failed" else jobs[1:]), answer=interrupted)
    assert run(source, tmp_path, retries=0) == signal.SIGINT
    assert not any(is_alive(event.pid) for event in source.events)


def test_second_interrupt_kills_at_once(tmp_path: Path):
    """Although the job has all the time in the world."""
    trace = tmp_path / "trace"
    source = Given(job("a", "waits_with_child", trace=str(trace)))
    stop_when_it_hangs(signal.SIGINT, source, trace, times=2)
    assert run(source, tmp_path, grace=math.inf) == signal.SIGINT
    assert source.of("stopped")[0].reason == "its owner has ended"
    assert not any(is_alive(event.pid) for event in source.events)
