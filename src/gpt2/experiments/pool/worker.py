"""The worker's side of a slot: runs the jobs that the owner sends, one after another.

Owner and worker speak over a socket of their own, one JSON text per line. The owner sends a job,
the worker that it has begun, any number of reports, each of which is answered, and at last what
became of the job. A worker never outlives its owner, and nothing that a job starts its worker.
"""

import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import inspect
import io
import json
import math
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from gpt2.base.errors import UserError, is_out_of_memory
from gpt2.distributed.watchdog import PR_SET_PDEATHSIG
from gpt2.experiments.pool import log_lines
from gpt2.experiments.pool.job import Job, JobLost, Stopped
from gpt2.train.report import Answer

MAX_RESULT_BYTES = 16_000_000
SHOW_STACK = signal.SIGQUIT
"""makes the worker write where each of its threads is to its log"""


def serve(channel: socket.socket, owner: int, log: Path, search_path: list[str]) -> None:
    """What a worker process does, from its start until the owner closes the channel."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != owner:  # it died before the line above
        os._exit(1)
    os.setsid()  # Ctrl+C is for the owner, which asks its workers to stop
    _write_to(log)
    _let_nothing_outlive_me()
    stop = StopFlag()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    sys.path[:] = search_path
    commands = channel.makefile("r", encoding="utf-8")
    for line in commands:
        job = Job(**json.loads(line))
        outcome = _run(job, Reporter(channel, commands, stop))
        sys.stdout.flush()
        if not job.own_process:
            outcome["recycle"] = stop.is_set or not _free_memory() or _may_be_broken(outcome)
        _send(channel, outcome)
        if job.own_process:
            break


def _let_nothing_outlive_me() -> None:
    """A process of its own session kills what a job has started when this worker is dead: its owner
    does the same, if that lives."""
    me = os.getpid()
    death = os.pidfd_open(me)
    if (child := os.fork()) == 0:
        if os.fork() == 0:  # the grandchild is nobody's to wait for
            os.setsid()
            select.select([death], [], [])
            with contextlib.suppress(ProcessLookupError):
                os.killpg(me, signal.SIGKILL)
        os._exit(0)
    os.waitpid(child, 0)
    os.close(death)


def _may_be_broken(outcome: dict[str, Any]) -> bool:
    """Whether the process is no good for further jobs: its memory is full, or it has a GPU, which
    does not work in it any more after an error in a kernel."""
    torch = sys.modules.get("torch")
    failed = "failed" in outcome and not outcome["known"]
    has_gpu = torch is not None and torch.cuda.is_initialized()
    return failed and (outcome["out_of_memory"] or has_gpu)


class StopFlag:
    """Remembers SIGTERM and SIGINT, by which the owner asks its workers to stop. A training takes
    the signals itself while it runs, and saves."""

    def __init__(self) -> None:
        self.is_set = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, _number: int, _frame: FrameType | None) -> None:
        self.is_set = True


class Reporter:
    """The `report` of a job: tells the owner, and answers what the job is to do."""

    def __init__(self, channel: socket.socket, commands: io.TextIOBase, stop: StopFlag) -> None:
        self._channel, self._commands, self._stop = channel, commands, stop
        self.answer: Answer = "go"
        """the last one"""
        self.is_over = False
        """whether the job has ended; a thread may go on"""

    @property
    def must_stop(self) -> bool:
        """Whether the owner has asked for that: what it needs may have taken long to load."""
        return self._stop.is_set

    def begin(self) -> None:
        """What a job needs is loaded: from here on it may hang."""
        _send(self._channel, {"begun": os.getpid()})

    def __call__(self, **metrics: Any) -> Answer:
        if self.is_over:
            return "stop"
        _send(self._channel, {"report": metrics})
        reply = self._commands.readline()
        if not reply:  # the owner is gone
            os._exit(1)
        self.answer = "stop" if self._stop.is_set else json.loads(reply)
        return self.answer


def find(target: str) -> Callable[..., Any]:
    """The function `module:function`; raises UserError if there is none."""
    module, _, name = target.partition(":")
    needed = "needed is module:function, importable from this folder"
    if not module or not name:
        raise UserError(f"there is no function {target}; {needed}")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"there is no function {target} ({error}); {needed}") from error
    if not callable(function):
        raise UserError(f"{target} is no function")
    return function


@functools.cache
def _keep_modules(_target: str) -> None:
    """The modules that a function needs stay: no collection need look at them again."""
    gc.freeze()


def _run(job: Job, report: Reporter) -> dict[str, Any]:
    """The outcome of a job, whatever it does, as long as the process lives."""
    print(f"job {job.name}: {job.target}", flush=True)
    try:
        function = find(job.target)
        if report.must_stop:
            raise Stopped
        report.begin()
        _keep_modules(job.target)
        kwargs = dict(job.kwargs)
        if "report" in inspect.signature(function).parameters:
            kwargs["report"] = report
        result = function(**kwargs)
        if report.answer == "stop":
            raise Stopped
        if job.wants_numbers:
            _require_numbers(job.target, result)
        outcome = {"pruned" if report.answer == "prune" else "finished": _plain(result)}
        size = len(json.dumps(outcome))  # what has no plain form fails here, as the job's mistake
        if size > MAX_RESULT_BYTES:
            raise UserError(
                f"its result has {size / 1e6:.0f} MB, more than {MAX_RESULT_BYTES / 1e6:.0f}; "
                "write it to a file, and return the file's name"
            )
        return outcome
    except Stopped:
        return {"stopped": None}
    except JobLost as error:
        print(f"lost: {error}", file=sys.stderr, flush=True)
        return {"lost": str(error)}
    except BaseException as error:
        known = isinstance(error, UserError)
        text = "" if known else traceback.format_exc()
        print(text or f"error: {error}", file=sys.stderr, flush=True)
        reason = str(error) if known else f"{type(error).__name__}: {error}".removesuffix(": ")
        return {
            "failed": reason,
            "traceback": text,
            "known": known,
            "out_of_memory": _has_no_memory(error),
            "on_device": "CUDA error" in str(error),
        }
    finally:
        report.is_over = True


def _require_numbers(target: str, result: Any) -> None:
    """Raises UserError unless the result is a number, or has one by name; here NaN is one, too."""
    named = result if isinstance(result, dict) else {"value": result}
    values = [value.tolist() if hasattr(value, "tolist") else value for value in named.values()]
    if not any(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise UserError(
            f"{target} returned {result!r:.80}; needed are numbers by name, as in {{'value': 1.5}}"
        )


def _has_no_memory(error: BaseException) -> bool:
    of_torch = isinstance(error, RuntimeError) and is_out_of_memory(error)
    return of_torch or isinstance(error, MemoryError)


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    channel.sendall(json.dumps(_plain(message)).encode() + b"\n")


def _plain(value: Any) -> Any:
    """`value` in JSON's terms: numbers of NumPy and torch as Python's, paths as text, numbers that
    are none (NaN, infinity) as null."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _free_memory() -> bool:
    """Whether what the job left is gone before the next one begins, on a GPU too."""
    gc.collect()
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    except RuntimeError:  # the GPU does not work in this process any more
        return False
    return True


def _write_to(log: Path) -> None:
    """Standard output and error go to the log, each line with time and pid in front."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):  # also for what is no Python
        os.dup2(handle, number)
    os.close(handle)
    sys.stdout = sys.stderr = Lines()
    faulthandler.enable(2)
    faulthandler.register(SHOW_STACK, 2)


class Lines(io.TextIOBase):
    """Writes whole lines, each with one call, so that no other process's output cuts them."""

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
