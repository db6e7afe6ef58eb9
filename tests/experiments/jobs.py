"""What the tests let workers do. Each function leaves a line in `trace` for every start."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpt2.base.errors import ConfigError
from gpt2.experiments.pool.messages import EndedAs, JobEnded


def note(trace: str, word: str, pid: int | None = None) -> None:
    handle = os.open(trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{word} {pid or os.getpid()}\n".encode())
    os.close(handle)


def square(seed: int, trace: str | None = None, pause: float = 0.0) -> int:
    if trace:
        note(trace, f"square {seed}")
    time.sleep(pause)
    return seed * seed


def spelled(
    seed: int,
    code: str,
    other: "str",
    width: float,
    x=None,
    label: str | None = None,
    tag: "str | None" = None,
) -> int:
    return len(code)


def environment(variable: str) -> dict[str, Any]:
    print("printed\nby a job")
    subprocess.run(["echo", "by a child"], check=True)
    return {"value": os.environ.get(variable), "pid": os.getpid(), "session": os.getsid(0)}


def flags() -> list[Any]:
    return [sys.flags.optimize, sys.flags.utf8_mode, sys.warnoptions]


def rises() -> None:
    raise RuntimeError("the job's own mistake")


def misused() -> None:
    raise ConfigError("seed=-1 is too small")


def returns_a_thing() -> object:
    return object()


def dies(trace: str, times: int, number: int = signal.SIGKILL) -> str:
    """Kills itself the first `times` times."""
    note(trace, "dies")
    if len(Path(trace).read_text().splitlines()) <= times:
        os.kill(os.getpid(), number)
    return "lived"


def dies_with_child(trace: str) -> None:
    """Leaves a child that holds every handle of the worker."""
    child = os.fork()
    if child == 0:
        time.sleep(300)
        os._exit(0)
    note(trace, f"child {child}")
    os.kill(os.getpid(), signal.SIGKILL)


def waits_with_child(trace: str) -> None:
    """Starts a child that ignores its parent's end, and waits for it."""
    note(trace, "worker")
    child = subprocess.Popen(["sleep", "300"])
    note(trace, "child", child.pid)
    child.wait()


def loses(trace: str) -> str:
    """Loses one of its processes the first time."""
    note(trace, "loses")
    if len(Path(trace).read_text().splitlines()) == 1:
        raise EndedAs(JobEnded("lost", reason="rank 1 died"))
    return "lived"


def hangs() -> None:
    time.sleep(300)


def full(trace: str) -> int:
    """Runs out of memory the first time."""
    note(trace, "full")
    if len(Path(trace).read_text().splitlines()) == 1:
        raise MemoryError
    return os.getpid()


def counts(report: Any, until: int, pause: float = 0.0, trace: str | None = None) -> int:
    """Reports each number; ends when the answer is not "go"."""
    if trace:
        note(trace, "counts")
    for number in range(until):
        if report(number=number) != "go":
            if trace:
                note(trace, "stops")
            return number
        time.sleep(pause)
    return until


def bad_on(slot: str, seed: int, error: str, pause: float = 0.05) -> int:
    """Fails on one slot."""
    time.sleep(pause)
    if os.environ["SLOT"] == slot:
        raise RuntimeError(error)
    return seed


def returns_much(size: int) -> str:
    return "x" * size


KEPT: list[object] = []


class Cycle:
    """Only a collection ends it."""

    living = 0

    def __init__(self) -> None:
        self.me = self
        Cycle.living += 1

    def __del__(self) -> None:
        Cycle.living -= 1


def leaves_something(seed: int) -> int:
    """What the job before has left is replaced; how much of all that still lives."""
    KEPT[:] = [Cycle()]
    return Cycle.living


def measured(seed: int, rate: float = 1.0) -> dict[str, float]:
    """Fails for seed 3 as long as the variable says so; leaves a line in TRACE for every start."""
    note(os.environ["TRACE"], f"{rate} {seed} {time.time()}")
    time.sleep(float(os.environ.get("PAUSE", "0")))
    if seed == 3 and "FAIL" in os.environ:
        raise RuntimeError("three is bad")
    return {"value": seed * rate, "nan": float("nan")}


def scored(report: Any, folder: str, trace: str, number: int, pause: float) -> dict[str, Any]:
    """In the place of a trial's training: six steps, each kept, from the one that is kept."""
    kept = Path(folder) / "step"
    first = int(kept.read_text()) if kept.exists() else 0
    note(trace, f"trial {number} {first}")
    for step in range(first + 1, 7):
        time.sleep(pause)
        if report(step=step, total_steps=6, val_loss=10.0 - step * (1 + number % 3)) != "go":
            break
        new = kept.with_suffix(".new")
        new.write_text(str(step))
        new.replace(kept)
    return {"tokens": 1}


def odd(seed: int) -> object:
    """Numbers that are none, and things that are no numbers."""
    nan = float("nan")
    return [nan, {"value": nan}, {"value": 1, "note": "x"}, "hello", None, {"value": None}][seed]


def counts_for_seed(report: Any, seed: int, until: int, pause: float, trace: str) -> dict[str, int]:
    """`counts` as a sweep calls it."""
    return {"value": counts(report, until, pause, trace)}


def named(seed: int, target: int, grid: int) -> int:
    return target + grid


def also_named(seed: int, target: int, grid: int) -> int:
    return target - grid
