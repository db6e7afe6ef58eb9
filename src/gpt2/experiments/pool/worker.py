"""The worker process of a slot: runs the jobs that the owner sends, one after another.

`process.WorkerProcess` starts it with `serve`. Owner and worker exchange `messages` over a socket:
the owner sends a Job; the worker answers with JobLoaded, any number of JobReported, each of which
gets a Reply, and one JobEnded. A worker never outlives its owner, and what a job starts never
outlives the worker.
"""

import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import inspect
import io
import logging
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from gpt2.base import log
from gpt2.base.errors import UserError, is_out_of_memory
from gpt2.distributed.watchdog import PR_SET_PDEATHSIG
from gpt2.experiments.pool import log_lines, messages
from gpt2.experiments.pool.channel import Channel
from gpt2.experiments.pool.job import Job, JobLost, Stopped
from gpt2.experiments.pool.messages import JobEnded, JobLoaded, JobReported, Reply
from gpt2.train.report import Answer

logger = logging.getLogger(__name__)

MAX_RESULT_BYTES = 16_000_000
SHOW_STACK = signal.SIGQUIT
"""makes the worker write the stack of each of its threads to its log"""


def serve(connection: socket.socket, owner: int, log_path: Path, search_path: list[str]) -> None:
    """The life of a worker process: until the owner, whose pid is given, sends no more jobs."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != owner:  # it died before the line above
        os._exit(1)
    os.setsid()  # Ctrl+C reaches the owner alone, which requests its workers to stop
    _write_to(log_path)
    log.setup()
    _kill_group_after_death()
    stop = StopFlag()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    sys.path[:] = search_path
    channel = Channel(connection)
    while (job := channel.wait()) is not None:
        assert isinstance(job, Job)
        ended = run_job(job, Reporter(channel, stop))
        sys.stdout.flush()
        if not job.own_process:
            is_unfit = stop.is_set or not _free_memory() or _may_be_broken(ended)
            ended = replace(ended, takes_no_more=is_unfit)
        channel.send(ended)
        if job.own_process:
            break


def _kill_group_after_death() -> None:
    """Starts a process that waits for this worker's death and then kills its process group, which
    is all that jobs have started. The owner does the same, if it is still alive."""
    worker = os.getpid()
    death = os.pidfd_open(worker)
    if (child := os.fork()) == 0:
        if os.fork() == 0:  # a grandchild, so that init reaps it
            os.setsid()
            select.select([death], [], [])
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker, signal.SIGKILL)
        os._exit(0)
    os.waitpid(child, 0)
    os.close(death)


def _may_be_broken(ended: JobEnded) -> bool:
    """Whether the process is unfit for further jobs: its memory is full, or it uses a GPU, which
    stays unusable in a process after an error in a kernel."""
    torch = sys.modules.get("torch")
    has_gpu = torch is not None and torch.cuda.is_initialized()
    return bool(ended.traceback) and (ended.is_out_of_memory or has_gpu)


class StopFlag:
    """Is set by SIGTERM and SIGINT, with which the owner requests a stop. A training handles the
    signals itself while it runs, and saves."""

    def __init__(self) -> None:
        self.is_set = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, _number: int, _frame: FrameType | None) -> None:
        self.is_set = True


class Reporter:
    """The `report` of a job: sends metrics to the owner, returns what the job is to do."""

    def __init__(self, channel: Channel, stop: StopFlag) -> None:
        self._channel, self._stop = channel, stop
        self.answer: Answer = "go"
        """the last one"""
        self.is_over = False
        """whether the job has ended, although one of its threads may go on"""

    @property
    def stop_requested(self) -> bool:
        return self._stop.is_set

    def send_loaded(self) -> None:
        """From now on the owner applies --job_timeout."""
        self._channel.send(JobLoaded())

    def __call__(self, **metrics: Any) -> Answer:
        if self.is_over:
            return "stop"
        self._channel.send(JobReported(messages.json_ready(metrics)))
        reply = self._channel.wait()
        if reply is None:  # the owner is gone
            os._exit(1)
        assert isinstance(reply, Reply)
        self.answer = "stop" if self._stop.is_set else reply.answer
        return self.answer


def find_function(target: str) -> Callable[..., Any]:
    """The function `module:function`; raises UserError if it cannot be imported."""
    module_name, _, name = target.partition(":")
    expected = "expected module:function, importable from this folder"
    # Not `isidentifier` for the module: a script, such as my-sweep.py, may have any name.
    if not module_name or module_name.startswith(".") or not name.isidentifier():
        raise UserError(f"no function {target}; {expected}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"no function {target} ({error}); {expected}") from error
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None:
        raise UserError(f"no function {target}: {module_name} has no {name}; {expected}")
    if not callable(function):
        raise UserError(f"{target} is not a function; {expected}")
    return function


@functools.cache
def _freeze_modules(_target: str) -> None:
    """Once per function: excludes its modules, which stay, from all garbage collections."""
    gc.freeze()


def run_job(job: Job, report: Reporter) -> JobEnded:
    """Runs a job, and returns how it ended, whatever it raised."""
    logger.info("job %s: %s", job.name, job.target)
    try:
        result = _call(job, report)
        ended = JobEnded("pruned" if report.answer == "prune" else "finished", result)
        size = len(messages.encode(ended))  # raises TypeError here for what JSON cannot hold
        if size > MAX_RESULT_BYTES:
            raise UserError(
                f"its result has {size / 1e6:.0f} MB, more than {MAX_RESULT_BYTES / 1e6:.0f}; "
                "write it to a file and return the name of the file"
            )
        return ended
    except Stopped:
        return JobEnded("stopped")
    except JobLost as error:
        logger.error("job %s is lost: %s", job.name, error)
        return JobEnded("lost", reason=str(error))
    except UserError as error:
        logger.error("%s", error)
        return JobEnded("failed", reason=str(error), is_device_error=_is_device_error(error))
    except BaseException as error:
        logger.exception("job %s failed:", job.name)
        return JobEnded(
            "failed",
            reason=f"{type(error).__name__}: {error}".removesuffix(": "),
            traceback=traceback.format_exc(),
            is_out_of_memory=_is_out_of_memory(error),
            is_device_error=_is_device_error(error),
        )
    finally:
        report.is_over = True


def _call(job: Job, report: Reporter) -> Any:
    """What the job's function returns, in JSON's terms; raises Stopped if it ended early."""
    function = find_function(job.target)
    if report.stop_requested:  # the import may have taken long
        raise Stopped
    report.send_loaded()
    _freeze_modules(job.target)
    kwargs = dict(job.kwargs)
    if "report" in inspect.signature(function).parameters:
        kwargs["report"] = report
    result = function(**kwargs)
    if report.answer == "stop":
        raise Stopped
    if job.wants_numbers:
        _require_numbers(job.target, result)
    return messages.json_ready(result)


def _require_numbers(target: str, result: Any) -> None:
    """Raises UserError unless the result is a number or a dict with one; NaN counts as a number."""
    named = result if isinstance(result, dict) else {"value": result}
    values = [value.tolist() if hasattr(value, "tolist") else value for value in named.values()]
    if not any(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise UserError(
            f"{target} returned {result!r:.80}; expected numbers by name, as in {{'value': 1.5}}"
        )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, RuntimeError):
        return is_out_of_memory(error)
    return isinstance(error, MemoryError)


def _is_device_error(error: BaseException) -> bool:
    return "CUDA error" in str(error)


def _free_memory() -> bool:
    """Frees what the job left, on the GPU too; False if the GPU does not work any more."""
    gc.collect()
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    except RuntimeError:
        return False
    return True


def _write_to(path: Path) -> None:
    """Standard output and error go to the log file, each line of Python's with time and pid."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):  # also for programs that the job starts
        os.dup2(handle, number)
    os.close(handle)
    sys.stdout = sys.stderr = LogStream()
    faulthandler.enable(2)
    faulthandler.register(SHOW_STACK, 2)


class LogStream(io.TextIOBase):
    """Writes whole lines to file descriptor 1, one call each, so that the output of other
    processes does not split them."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
        for line in lines:
            log_lines.write_line(1, line)
        return len(text)

    def flush(self) -> None:
        if self._rest:
            log_lines.write_line(1, self._rest)
            self._rest = ""

    def fileno(self) -> int:
        return 1
