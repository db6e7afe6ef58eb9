"""The worker process of a slot: runs the jobs that the owner sends, one after another.

`process.WorkerProcess` starts it with `serve`. Owner and worker exchange `messages` over a pipe.
A worker never outlives its owner, and what a job starts never outlives the worker.
"""

import contextlib
import faulthandler
import functools
import gc
import importlib
import inspect
import json
import logging
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from gpt2.base import addresses, log
from gpt2.base.errors import UserError, described, is_out_of_memory
from gpt2.distributed.signals import StopRequest
from gpt2.experiments.pool import log_lines
from gpt2.experiments.pool.job import Job, Stopped
from gpt2.experiments.pool.messages import (
    EndedAs,
    JobEnded,
    JobPhase,
    JobReported,
    is_number,
    json_ready,
)
from gpt2.train.report import Answer

logger = logging.getLogger(__name__)

MAX_RESULT_BYTES = 16_000_000
SHOW_STACK = signal.SIGQUIT
"""makes the worker write the stack of each of its threads to its log"""
UNGUARDED = 94
"""exit code of a worker process whose script starts jobs when it is imported"""
GUARD = 'put what starts them below `if __name__ == "__main__":`'
_is_worker = _is_importing = False
SIGNALS = (signal.SIGINT, signal.SIGTERM, SHOW_STACK)
"""are blocked until the worker can handle them"""


def serve(connection: Connection, owner: int | None) -> None:
    """The life of a worker process: until the owner, whose pid is given, sends no more jobs.

    Without a pid it is a part of its owner, which is a worker itself.
    """
    global _is_worker
    _is_worker = True
    if owner is not None:
        if os.getppid() != owner:  # it is dead already
            os._exit(1)
        _kill_group_after_death_of(os.getpid(), owner)
    faulthandler.enable(2)
    faulthandler.register(SHOW_STACK, 2)
    log.setup()
    # A training handles signals itself while it runs. ConnectionError: the owner is dead.
    with StopRequest() as stop, contextlib.suppress(EOFError, ConnectionError):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for job in iter(connection.recv, None):
            # For each job: the one before may have changed or closed them.
            sys.stdout, sys.stderr = log_lines.text_stream(1), log_lines.text_stream(2)
            ended = run_job(job, Reporter(connection, stop))
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(AttributeError, OSError, ValueError):
                    stream.flush()
            is_last = job.own_process or stop.number != 0 or not _is_fit(ended)
            connection.send(replace(ended, takes_no_more=is_last))
            if is_last:
                break


def _kill_group_after_death_of(worker: int, owner: int) -> None:
    """Starts a process that waits until this worker or its owner is dead and then kills the
    worker's process group, which is the worker and all that jobs have started."""
    deaths = [os.pidfd_open(worker), os.pidfd_open(owner)]
    if (child := os.fork()) == 0:
        if os.fork() == 0:  # a grandchild, so that init reaps it
            os.setsid()
            select.select(deaths, [], [])
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker, signal.SIGKILL)
        os._exit(0)
    os.waitpid(child, 0)
    for death in deaths:
        os.close(death)


class Reporter:
    """The `report` of a job: sends metrics to the owner, returns what the job is to do."""

    def __init__(self, connection: Connection, stop: StopRequest) -> None:
        self._connection, self._stop = connection, stop
        self._lock = threading.Lock()
        """several threads of a job may report"""
        self.answer: Answer = "go"
        """the last one"""
        self.is_over = False
        """whether the job has ended, although one of its threads may go on"""

    @property
    def stop_requested(self) -> bool:
        return self._stop.number != 0

    def send(self, message: JobPhase | JobEnded) -> None:
        self._connection.send(message)

    def send_failure(self, error: Exception) -> None:
        """For a job whose process exits at once because of this error."""
        self.send(_ended_by(error))

    def __call__(self, **metrics: Any) -> Answer:
        if self.is_over:
            return "stop"
        reported = JobReported(json_ready(metrics))
        with self._lock:
            self._connection.send(reported)
            reply = self._connection.recv()
        self.answer = "stop" if self.stop_requested else reply.answer
        return self.answer


def find_function(target: str) -> Callable[..., Any]:
    """The function `module:function`; raises UserError if it cannot be imported."""
    module, _, name = target.partition(":")
    expected = "expected module:function, importable from this folder"
    # Not `isidentifier` for the module: a script, such as my-sweep.py, may have any name.
    if not module or module.startswith(".") or not name.isidentifier():
        raise UserError(f"no function {target}; {expected}")
    global _is_importing
    _is_importing, before = True, _is_importing
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"no function {target} ({error}); {expected}") from error
    finally:
        _is_importing = before
    if not callable(function):
        raise UserError(f"no function {target}: {module} has none; {expected}")
    return function  # type: ignore[no-any-return]


def require_not_importing() -> None:
    """For what starts jobs: raises UserError if a module does so while the function of a job is
    imported from it, and ends a worker process."""
    if _is_importing and _is_worker:
        os._exit(UNGUARDED)
    if _is_importing:
        raise UserError(f"the module of the function starts jobs when it is imported; {GUARD}")


@functools.cache
def _freeze_modules(_target: str) -> None:
    """Once per function: excludes its modules, which stay, from all garbage collections."""
    gc.freeze()


def run_job(job: Job, report: Reporter) -> JobEnded:
    """Runs a job, and returns how it ended, whatever it raised."""
    logger.info("job %s: %s", job.name, job.target)
    try:
        report.send(JobPhase("loading"))
        return _call(job, report)
    except Stopped:
        return JobEnded("stopped")
    except EndedAs as other:
        return other.ended
    except UserError as error:
        logger.error("%s", error)
        return _ended_by(error)
    except BaseException as error:
        logger.exception("job %s failed:", job.name)
        return _ended_by(error)
    finally:
        report.is_over = True


def _call(job: Job, report: Reporter) -> JobEnded:
    """How the job ends if its function returns; raises Stopped if it ended early."""
    function = find_function(job.target)
    if report.stop_requested:  # the import may have taken long
        raise Stopped
    report.send(JobPhase("running"))  # from now on the owner applies --job_timeout
    _freeze_modules(job.target)
    kwargs = dict(job.kwargs)
    if "report" in inspect.signature(function).parameters:
        kwargs["report"] = report
    returned = function(**kwargs)
    if report.answer == "stop":
        raise Stopped
    if job.wants_numbers and not _has_number(returned):
        example = "expected numbers by name, as in {'value': 1.5}"
        raise UserError(f"{job.target} returned {returned!r:.80}; {example}")
    result = json_ready(returned)
    if len(json.dumps(result)) > MAX_RESULT_BYTES:
        most = f"{MAX_RESULT_BYTES / 1e6:.0f} MB"
        raise UserError(f"its result has more than {most}; write it to a file and return its name")
    return JobEnded("pruned" if report.answer == "prune" else "finished", result)


def _ended_by(error: BaseException) -> JobEnded:
    """How a job ends that raises this error."""
    reason, trace = described(error), ""
    if not isinstance(error, UserError):
        trace = addresses.without_secrets("".join(traceback.format_exception(error)))
    if is_out_of_memory(error):  # perhaps because of the jobs before it
        return JobEnded("lost", reason=f"out of memory: {reason}", traceback=trace)
    is_device_error = "CUDA error" in str(error)
    return JobEnded("failed", reason=reason, traceback=trace, is_device_error=is_device_error)


def _has_number(result: Any) -> bool:
    """Whether it is a number or a dict with one. NaN counts, a bool does not."""
    named = result if isinstance(result, dict) else {"value": result}
    values = [value.tolist() if hasattr(value, "tolist") else value for value in named.values()]
    return any(map(is_number, values))


def _is_fit(ended: JobEnded) -> bool:
    """Frees what the job has left; whether the process can run another one: not if its memory was
    full, and not if a job raised an error after it had used the GPU, which stays unusable in a
    process after an error in a kernel."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ended.state != "lost"
    try:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    except RuntimeError:
        return False
    return not ended.traceback
